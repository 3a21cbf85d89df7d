"""Newcomers and their first hour: a linguist, and one who builds spoken language models. Each types the commands of
the documents, in a copy of the repository or by what the wheel installed.

The speech is that of `examples/data`, or of the folder that SPIDR_HF_SPEECH names: recordings, and where there are any,
TextGrids beside them with speakers.txt (lines "FILEID SPEAKER"), and transcripts.csv (columns fileid, text). Commands
that need what is not there are left out.
"""

import csv
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from tiny import tiny_model
from walk import ROOT, build_wheel, copy_repository, own_environment, type_in

from spidr_hf import SpidrFeatureExtractor

pytestmark = pytest.mark.slow
Walk = Callable[[Iterable[str]], Path]


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
    with (folder / "transcripts.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("fileid", "text"), *((row["id"], row["text"]) for row in rows)])
    names = ((f"{row['voice']}/{row['id']}", row["speaker"]) for row in rows)
    (folder / "speakers.txt").write_text("".join(f"{fileid} {speaker}\n" for fileid, speaker in names))


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """Variables of an environment that has the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    (wheel,) = build_wheel(folder).glob("*.whl")
    environment = own_environment(folder / "venv")
    type_in(f"pip install --no-deps {wheel}", folder, environment)
    return environment


@pytest.fixture(params=["repository", "wheel"])
def walk(request, tmp_path) -> Walk:
    """Types command lines, `COMMAND ARGUMENTS`, in a folder with a model and speech; returns the folder."""
    if request.param == "repository":
        folder = copy_repository(tmp_path / "copy")
        environment = own_environment(tmp_path / "venv")
    else:
        folder = tmp_path / "anywhere"
        environment = request.getfixturevalue("installed")
    environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    tiny_model().save_pretrained(folder / "model")
    SpidrFeatureExtractor().save_pretrained(folder / "model")
    write_speech(folder / "speech")
    shutil.copy(ROOT / "examples" / "configs" / "demo.toml", folder / "mine.toml")

    def typed(lines: Iterable[str]) -> Path:
        for line in lines:
            command, arguments = line.split(maxsplit=1)
            if command != "python":
                script = f"python examples/{command.replace('-', '_')}.py"
                line = f"{script if request.param == 'repository' else f'spidr-hf {command}'} {arguments}"
            type_in(line, folder, environment)
        return folder

    return typed


def recordings(folder: Path) -> list[Path]:
    """Paths below the folder `speech`."""
    speech = folder / "speech"
    found = (path.relative_to(speech) for path in speech.rglob("*") if path.suffix.lower() in (".flac", ".wav"))
    return sorted(found)


def has_units(path: Path, folder: Path) -> bool:
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    return len(rows) == len(recordings(folder)) and all(row["units"] for row in rows)


def not_empty(folder: Path, *names: str) -> bool:
    return all((folder / name).stat().st_size > 0 for name in names)


def test_a_linguist(walk):
    folder = walk(["extract-units model speech units", "extract-features model speech features --layers 3 4"])
    assert all(has_units(folder / "units" / layer / "units.jsonl", folder) for layer in "234")
    assert all(len([*(folder / "features" / layer).rglob("*.pt")]) == len(recordings(folder)) for layer in "34")
    walk(["plot-units speech units plain.png"])
    assert not_empty(folder, "plain.png")
    if any(folder.glob("speech/**/*.TextGrid")):
        walk(
            [
                "plot-units speech units utterance.png --alignments speech",
                "evaluate-units units speech --json scores.json --plot layers.png",
                "write-items speech triphones.item --speakers speech/speakers.txt",
                "evaluate-abx triphones.item features --json abx.json",
            ]
        )
        assert not_empty(folder, "utterance.png", "layers.png", "triphones.item", "abx.json")
        scores = json.loads((folder / "scores.json").read_text())["layers"]
        assert all(0 <= scores[layer]["pnmi"] < 1 for layer in "234")


def test_a_builder_of_spoken_language_models(walk):
    small = "--steps 3 --num-layers 1 --hidden-size 32 --warmup-steps 1"
    folder = walk(
        [
            "write-manifest speech manifest.csv",
            "extract-units model manifest.csv units --layers 4 --deduplicate",
            f"train-unit-lm units/4/units.jsonl lm --valid units/4/units.jsonl --deduplicate {small}",
            "extract-features model manifest.csv features --layers 1",
            "train-kmeans features/1 kmeans.safetensors --clusters 20",
            "extract-units model manifest.csv kmeans-units --kmeans kmeans.safetensors",
        ]
    )
    assert has_units(folder / "units" / "4" / "units.jsonl", folder)
    assert has_units(folder / "kmeans-units" / "1" / "units.jsonl", folder)
    assert not_empty(folder, "lm/final/config.json", "lm/metrics.json")
    rows = [json.loads(line)["file"] for line in (folder / "units" / "4" / "units.jsonl").open(encoding="utf-8")]
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("positive", "negative"), *pairwise(rows)])
    walk(["score-pairs lm/final pairs.csv --units units/4/units.jsonl --json pairs.json"])
    assert not_empty(folder, "pairs.json")
