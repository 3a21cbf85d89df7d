"""Newcomers and their first hour: a linguist, one who builds spoken language models, one who pretrains on their own
recordings, one who fine-tunes. Each types the commands of the documents, in a copy of the repository or by what the
wheel installed.

The speech is that of `examples/data`, or of the folder that SPIDR_HF_SPEECH names: recordings, and where there are any,
TextGrids beside them with speakers.txt (lines "FILEID SPEAKER"), and transcripts.csv (columns fileid, text). Commands
that need what is not there are left out.
"""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from commands import check_counts
from runs import rows, wait_for_rows
from tiny import tiny_model
from walk import ROOT, build_wheel, copy_repository, own_environment, type_in

from spidr_hf import SpidrFeatureExtractor

pytestmark = pytest.mark.slow


def write_textgrid(path: Path, phones: list[tuple[str, float, float]]) -> None:
    """In Praat's short format."""
    ends = f"0\n{phones[-1][2]}\n"
    rows = "".join(f'{start}\n{end}\n"{phone}"\n' for phone, start, end in phones)
    path.write_text(
        'File type = "ooTextFile"\nObject class = "TextGrid"\n\n'
        f'{ends}<exists>\n1\n"IntervalTier"\n"phones"\n{ends}{len(phones)}\n{rows}'
    )


def write_speech(folder: Path) -> None:
    """The speech of SPIDR_HF_SPEECH, or the shipped one in the same form."""
    if given := os.environ.get("SPIDR_HF_SPEECH"):
        shutil.copytree(given, folder)
        return
    with tarfile.open(ROOT / "examples" / "data" / "small.tar") as archive:
        archive.extractall(folder, filter="data")
    rows = [json.loads(line) for line in (ROOT / "examples" / "data" / "alignments.jsonl").open(encoding="utf-8")]
    for row in rows:
        write_textgrid(folder / row["voice"] / f"{row['id']}.TextGrid", row["phones"])
    names = [f"{row['voice']}/{row['id']}" for row in rows]
    texts = [row["text"] for row in rows]
    write_csv(folder / "transcripts.csv", ("fileid", "text"), *zip(names, texts, strict=True))
    lines = (f"{name} {row['speaker']}\n" for name, row in zip(names, rows, strict=True))
    (folder / "speakers.txt").write_text("".join(lines), encoding="utf-8")


@dataclass
class Walk:
    """Types command lines, `COMMAND ARGUMENTS`, in a folder with a model and speech."""

    folder: Path
    environment: dict[str, str]
    cloned: bool

    def line(self, line: str) -> str:
        """A command line as it is typed here."""
        command, _, arguments = line.partition(" ")
        if command == "python":
            return line
        typed = f"python examples/{command.replace('-', '_')}.py" if self.cloned else f"spidr-hf {command}"
        return f"{typed} {arguments}"

    def __call__(self, *lines: str) -> str:
        """All that they print; each must end well, and none in Python's own words."""
        printed = "".join(type_in(self.line(line), self.folder, self.environment) for line in lines)
        check_counts(printed)
        assert not re.search(r"Traceback|Warning:", printed), printed
        return printed

    def start(self, line: str) -> subprocess.Popen:
        """The process of a command that does not end before it is killed."""
        return subprocess.Popen(
            shlex.split(self.line(line)),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.fixture(scope="module", params=["repository", "wheel"])
def environment(request, tmp_path_factory) -> tuple[bool, dict[str, str]]:
    """Whether there is a clone, and variables of an environment; without a clone, one that has the wheel."""
    cloned, folder = request.param == "repository", tmp_path_factory.mktemp(request.param)
    variables = own_environment(folder / "venv")
    if not cloned:
        (wheel,) = build_wheel(folder).glob("*.whl")
        type_in(f"pip install --no-deps {wheel}", folder, variables)
    return cloned, {name: value for name, value in variables.items() if name != "PYTHONPATH"}


@pytest.fixture
def walk(environment, tmp_path) -> Walk:
    cloned, variables = environment
    folder = copy_repository(tmp_path / "copy") if cloned else tmp_path / "anywhere"
    tiny_model().save_pretrained(folder / "model")
    SpidrFeatureExtractor().save_pretrained(folder / "model")
    write_speech(folder / "speech")
    shutil.copy(ROOT / "examples" / "configs" / "demo.toml", folder / "mine.toml")
    return Walk(folder, variables, cloned)


def recordings(folder: Path) -> list[Path]:
    """Paths below the folder `speech`."""
    speech = folder / "speech"
    found = (path.relative_to(speech) for path in speech.rglob("*") if path.suffix.lower() in (".flac", ".wav"))
    return sorted(found)


def has_units(path: Path, folder: Path) -> bool:
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    return len(rows) == len(recordings(folder)) and all(row["units"] for row in rows)


def textgrids(folder: Path) -> list[Path]:
    return sorted(folder.glob("speech/**/*.TextGrid"))


def validated(folder: Path) -> dict[str, float]:
    """Scores of a fine-tuning run on its validation audio."""
    return json.loads((folder / "results.json").read_text())["scores"]["validation"]


def type_card(walk: Walk, model: str) -> None:
    """Runs the Python that a model's card shows, on one of the recordings."""
    card = (walk.folder / model / "README.md").read_text(encoding="utf-8")
    typed = "\n".join(re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)).replace("this-repository", model)
    speech = f"speech/{recordings(walk.folder)[0]}"
    # Of a file's name transformers makes samples by ffmpeg.
    typed = typed.replace('"speech.wav"', repr(speech) if shutil.which("ffmpeg") else "waveform")
    given = f"import soundfile\n\nwaveform, _ = soundfile.read({speech!r})\n"
    (walk.folder / "card.py").write_text(given + typed, encoding="utf-8")
    assert "pipe(" in typed or "encode(" in typed
    walk("python card.py")


def write_csv(path: Path, *rows: Iterable[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def not_empty(folder: Path, *names: str) -> bool:
    return all((folder / name).stat().st_size > 0 for name in names)


def test_a_linguist(walk):
    walk("extract-units model speech units", "extract-features model speech features --layers 3 4")
    folder = walk.folder
    assert all(has_units(folder / "units" / layer / "units.jsonl", folder) for layer in "234")
    assert all(len([*(folder / "features" / layer).rglob("*.pt")]) == len(recordings(folder)) for layer in "34")
    walk("plot-units speech units plain.png")
    assert not_empty(folder, "plain.png")
    if textgrids(folder):
        walk(
            "plot-units speech units utterance.png --alignments speech",
            "evaluate-units units speech --json scores.json --plot layers.png",
            "write-items speech triphones.item --speakers speech/speakers.txt",
            "evaluate-abx triphones.item features --json abx.json",
        )
        assert not_empty(folder, "utterance.png", "layers.png", "triphones.item", "abx.json")
        scores = json.loads((folder / "scores.json").read_text())["layers"]
        assert all(0 <= scores[layer]["pnmi"] < 1 for layer in "234")


def test_a_builder_of_spoken_language_models(walk):
    small = "--steps 3 --num-layers 1 --hidden-size 32 --warmup-steps 1"
    walk(
        "write-manifest speech manifest.csv",
        "extract-units model manifest.csv units --layers 4 --deduplicate",
        f"train-unit-lm units/4/units.jsonl lm --valid units/4/units.jsonl --deduplicate {small}",
        "extract-features model manifest.csv features --layers 1",
        "train-kmeans features/1 kmeans.safetensors --clusters 20",
        "extract-units model manifest.csv kmeans-units --kmeans kmeans.safetensors",
    )
    folder = walk.folder
    assert has_units(folder / "units" / "4" / "units.jsonl", folder)
    assert has_units(folder / "kmeans-units" / "1" / "units.jsonl", folder)
    assert not_empty(folder, "lm/final/config.json", "lm/metrics.json")
    files = [json.loads(line)["file"] for line in (folder / "units" / "4" / "units.jsonl").open(encoding="utf-8")]
    write_csv(folder / "pairs.csv", ("positive", "negative"), *pairwise(files))
    walk("score-pairs lm/final pairs.csv --units units/4/units.jsonl --json pairs.json")
    assert not_empty(folder, "pairs.json")


def test_one_who_pretrains(walk):
    """A run that is killed outright on the way, and continued by the command that began it."""
    steps = "--optimizer.max_steps 12 --run.save_interval 3 --run.log_interval 1"
    line, folder = f"pretrain --config mine.toml --output-dir run --data.manifest manifest.csv {steps}", walk.folder
    said = walk("write-manifest speech manifest.csv", f"{line} --dry-run")
    assert "Nothing was written" in said and not (folder / "run").exists()
    process = walk.start(line)
    wait_for_rows(process, folder / "run", 7)
    process.kill()
    process.communicate()
    assert not (folder / "run" / "final").exists()
    assert re.search(r"checkpoints/step_\d+", walk(line))
    assert [row["step"] for row in rows(folder / "run")] == list(range(1, 13))
    alignments = " --alignments speech" if textgrids(folder) else ""
    walk(
        f"validate --run-dir run --data manifest.csv{alignments}",
        "info run/final",
        "extract-units run/final speech units --layers 5",
    )
    assert not_empty(folder, "run/curves.png", "run/validation.png", "run/best/model.safetensors")
    assert has_units(folder / "units" / "5" / "units.jsonl", folder)
    type_card(walk, "run/final")


def test_one_who_fine_tunes(walk):
    """On speech of which a part is labelled."""
    folder = walk.folder
    short = "--steps 4 --eval-interval 2 --num-workers 0 --valid dev.csv"
    walk("write-manifest speech manifest.csv")
    header, *lines = (folder / "manifest.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "dev.csv").write_text("".join([header, *lines[1::2]]), encoding="utf-8")
    if (folder / "speech" / "transcripts.csv").exists():
        said = walk(f"finetune-ctc model manifest.csv text --labels speech/transcripts.csv {short}")
        assert validated(folder / "text").keys() == {"utterances", "loss", "wer", "cer"}, said
        type_card(walk, "text/final")
    if textgrids(folder):
        textgrids(folder)[0].unlink()
        said = walk(f"finetune-ctc model manifest.csv phones --units phones --labels speech {short}")
        left_out = len(recordings(folder)) - len(textgrids(folder))
        assert re.search(rf"^{left_out} utterances? for training without labels: left out", said, re.M), said
        assert validated(folder / "phones")["per"] > 0
        walk(f"finetune-classification model manifest.csv frames --task frame --labels speech {short}")
        assert 0 <= validated(folder / "frames")["accuracy"] <= 1
        speakers = [line.split() for line in (folder / "speech" / "speakers.txt").open(encoding="utf-8")]
        if len({speaker for _, speaker in speakers}) > 1:
            write_csv(folder / "speakers.csv", ("fileid", "speaker"), *speakers)
            options = f"--task utterance --column speaker --labels speakers.csv {short}"
            walk(f"finetune-classification model manifest.csv speakers {options}")
            assert 0 <= validated(folder / "speakers")["accuracy"] <= 1
            type_card(walk, "speakers/final")
