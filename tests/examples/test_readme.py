"""The commands of examples/README.md work: every one in its tables and blocks runs, in order, in a copy of the
repository.

Words in capitals stand for the reader's own files; `STANDS_FOR` says what they are here. A new one is refused until it
is told there, and so is a new script that would take long: `SHORTER` says how it is shortened.
"""

import csv
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from tiny import tiny_config, tiny_model
from walk import ROOT, command_lines, copy_repository, own_environment, type_in

from spidr_hf import SpidrFeatureExtractor
from spidr_hf.data.alignments import read_alignments
from spidr_hf.hub.spidr_names import to_model_section


def written(value: object) -> str:
    """A value as `--section.field` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


PAGE = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
SCRIPT = re.compile(r"\b(\w+)\.py\b")
# By the script that is run (None: any), what a word in capitals stands for: no folder that the page itself names.
STANDS_FOR: dict[str | None, dict[str, str]] = {
    None: {
        "MODEL": "model",
        "DATA": "speech/manifest.csv",
        "ALIGNMENTS": "speech/alignments.jsonl",
        "AUDIO_DIR_OR_TAR": "examples/data/small.tar",
        "FEATURES": "my-features",
        "PAIRS_CSV": "pairs.csv",
        "UNITS_JSONL": "my-units/6/units.jsonl",
        "RUN_DIR": "runs/mine",
        "DEV_DATA": "speech/manifest.csv",
        "DEV_ALIGNMENTS": "speech/alignments.jsonl",
        "LABELS": "speakers.csv",
        "DEV_LABELS": "speakers.csv",
    },
    "extract_features": {"OUT_DIR": "my-features"},
    "extract_units": {"OUT_DIR": "my-units"},
    "plot_units": {"OUT_DIR": "my-units"},
    "evaluate_units": {"OUT_DIR": "my-units"},
    "train_unit_lm": {"OUT_DIR": "my-lm"},
    "score_pairs": {"OUT_DIR": "my-lm"},
    "finetune_ctc": {"OUT_DIR": "ctc"},
    "finetune_classification": {"OUT_DIR": "classes"},
}
# What a script gets besides, so that it takes seconds; the configs of pretraining are shortened in the copy.
SHORTER = {
    "train_unit_lm": "--steps 3 --num-layers 1 --hidden-size 32 --warmup-steps 1",
    "finetune_ctc": "--steps 3",
    "finetune_classification": "--steps 3",
    "demo_app": "--port 0",
    "benchmark": "--size tiny --parts masks codebooks --rounds 1 --peers",
    "benchmark_data": "--rows 1000 --batches 100 --utterances 4 --workers 1",
    "benchmark_cuda": "--size tiny --batch 2 --seconds 0.5 --rounds 1 --device cpu",
}
# A config whose run would not end, and a model that fits it, are made small on the command line.
SMALL_MODEL = tiny_config(num_hidden_layers=12, num_codebooks=8)
SHORTER_CONFIGS = {
    "adapt-to-language": "--run.compile false --optimizer.max_steps 3 --data.max_batch_length 320000 "
    + " ".join(f"--model.{name} {shlex.quote(written(value))}" for name, value in to_model_section(SMALL_MODEL).items())
}
# What does not end by itself, or needs more than this machine, and what holds it instead.
ELSEWHERE = {
    "make demo": "test_make_demo",
    "make": "Makefile: runs the scripts of this page, or the tests",
    "sbatch": "tests/test_slurm.py",
    "examples/demo_app.py": "tests/test_demo_app.py",
    "examples/slurm/": "tests/test_slurm.py",
    "examples/s3prl/": "tests/test_s3prl.py",
    "examples/benchmark_cuda.py": "needs a GPU",
    "pip install spidr": "one of the benchmark's peers, for Python 3.12",
    "examples/reference_run.py": "needs the spidr package",
    "--num_machines": "tests/test_two_machines.py",
}


def commands_of_row(row: str) -> list[str]:
    """Commands in a row of a table: what stands in backticks and begins like one, or like a script's name."""
    return [
        code
        for code in re.findall(r"`([^`]+)`", row)
        if re.match(r"(\w+=\S+ )*(python|accelerate|make|sbatch|srun) |\w+\.py --", code)
    ]


def commands(page: str) -> list[str]:
    """All commands of the page, in its order. One that begins with a script's name continues that script's command."""
    found: list[str] = []
    for block, row in re.findall(r"^```bash\n(.*?)^```$|^(\|[^\n]*\|)$", page, re.M | re.S):
        if same := re.search(r"\bthe same with `(--[^`]+)`", row):
            found.append(f"{found[-1]} {same[1]}")
        for line in command_lines(block) if block else commands_of_row(row):
            if match := re.match(r"(\w+)\.py (.*)", line):
                whole = next((other for other in found_and_rest(page) if f"/{match[1]}.py " in other), None)
                assert whole, f"{line}: no row of the page has the whole command"
                line = f"{whole} {match[2]}".replace("OUT_DIR", "OTHER_OUT_DIR")
            found.append(line)
    return found


def found_and_rest(page: str) -> list[str]:
    """The whole commands of all rows."""
    rows = re.findall(r"^\|.*\|$", page, re.M)
    return [line for row in rows for line in commands_of_row(row) if not re.match(r"\w+\.py ", line)]


def runnable(line: str) -> str | None:
    """The command as it is typed here; None where another test holds it."""
    if any(line.startswith(start) or f" {start}" in line for start in ELSEWHERE):
        return None
    script = match[1] if (match := SCRIPT.search(line)) else None
    words = STANDS_FOR[None] | STANDS_FOR.get(script, {})
    words |= {f"OTHER_{word}": f"{value}-other" for word, value in words.items()}

    def stands_for(match: re.Match[str]) -> str:
        assert match[0] in words, f"{line!r} has the word {match[0]}: say in STANDS_FOR what it is here"
        return words[match[0]]

    line = re.sub(r"(?<![\w./-])[A-Z][A-Z_]{3,}(?![\w.=])", stands_for, line)
    line = re.sub(r"--minutes [\d.]+", "--minutes 3", line)
    config = match[1] if (match := re.search(r"/configs/([\w-]+)\.toml", line)) else None
    return " ".join([line, *filter(None, (SHORTER.get(script), SHORTER_CONFIGS.get(config)))])


def test_every_script_is_on_the_page():
    scripts = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"__init__", "demo"}  # make demo
    scripts = {name for name in scripts if not name.startswith("benchmark")}  # make benchmark
    assert scripts <= {match for line in commands(PAGE) for match in SCRIPT.findall(line)}


def test_rows_and_blocks_are_found():
    page = (
        "| get | `python examples/x.py MODEL DATA OUT_DIR`, then `x.py --more FILE` | `no command` |\n"
        "| check | the same with `--dry-run` |\n\n"
        "```bash\npython a.py one \\\n    two\n# said\n```\n"
    )
    assert commands(page) == [
        "python examples/x.py MODEL DATA OUT_DIR",
        "python examples/x.py MODEL DATA OTHER_OUT_DIR --more FILE",
        "python examples/x.py MODEL DATA OTHER_OUT_DIR --more FILE --dry-run",
        "python a.py one two",
    ]
    with pytest.raises(AssertionError, match="FILE: say in STANDS_FOR"):
        runnable("python examples/x.py FILE")
    assert runnable("make demo") is None


def prepare(folder: Path) -> None:
    """The reader's own files: a model, speech of three voices with its alignments, units, pairs, a second run."""
    tiny_model(**{name: getattr(SMALL_MODEL, name) for name in ("num_hidden_layers", "num_codebooks")}).save_pretrained(
        folder / "model"
    )
    SpidrFeatureExtractor().save_pretrained(folder / "model")
    data = ROOT / "examples" / "data"
    (folder / "speech").mkdir()
    with (data / "manifest.csv").open() as file:
        rows = list(csv.reader(file))
    chosen = [row for row in rows[1:] if row[0].rsplit("-", 1)[0] in voices(rows)][:30]
    with (folder / "speech" / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([rows[0], *chosen])
    shutil.copy(data / "small.tar", folder / "speech")
    fileids = {row[0] for row in chosen}
    lines = [line for line in (data / "alignments.jsonl").open() if json.loads(line)["id"] in fileids]
    (folder / "speech" / "alignments.jsonl").write_text("".join(lines))
    assert set(read_alignments(folder / "speech" / "alignments.jsonl")) == fileids
    units = [{"file": fileid, "units": [i % 7, 3, 3, i % 5, 1]} for i, fileid in enumerate(sorted(fileids))]
    for name in ("train.jsonl", "dev.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in units))
    speakers = "".join(f"{fileid},{fileid.rsplit('-', 1)[0]}\n" for fileid in sorted(fileids))
    (folder / "speakers.csv").write_text("fileid,speaker\n" + speakers)
    pairs = "".join(f"{a['file']},{b['file']}\n" for a, b in zip(units[::2], units[1::2], strict=True))
    (folder / "pairs.csv").write_text("positive,negative\n" + pairs)


def voices(rows: list[list[str]]) -> list[str]:
    return sorted({row[0].rsplit("-", 1)[0] for row in rows[1:]})


@pytest.mark.slow
def test_every_command_runs(tmp_path):
    for program in ("flite", "festival", "espeak-ng", "bible"):
        if shutil.which(program) is None:
            pytest.skip(f"make_corpus.py needs {program}, which is not installed")
    folder, environment = copy_repository(tmp_path / "copy"), own_environment(tmp_path / "venv")
    environment |= {"ACCELERATE_USE_CPU": "true"}
    type_in("pip install -e .", folder, environment)
    prepare(folder)
    for line in commands(PAGE):
        if line := runnable(line):
            type_in(line, folder, environment)
            if "runs/mine" in line and not (folder / "runs" / "other").exists():
                shutil.copytree(folder / "runs" / "mine", folder / "runs" / "other")


@pytest.mark.slow
def test_make_demo(tmp_path):
    """The main job as it ships, minutes long."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    folder = copy_repository(tmp_path / "copy", shortened=False)
    environment = own_environment(tmp_path / "venv")
    type_in("pip install -e .", folder, environment)
    (tmp_path / "venv" / ".installed").touch()  # the environment is there
    result = subprocess.run(
        ["make", "demo", f"VENV={tmp_path / 'venv'}"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert (folder / "runs" / "demo" / "demo.png").stat().st_size > 50_000
