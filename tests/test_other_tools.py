"""Units and features in the hands of the tools they are for: fastabx and DiscoPhon, which need Python >= 3.12.

FASTABX_PYTHON names a Python that has them (`pip install fastabx discophon`); this one is tried without it.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from commands import run_command
from tiny import tiny_model

from spidr_hf import SpidrFeatureExtractor
from spidr_hf.data.alignments import read_alignments
from spidr_hf.data.manifests import Manifest, read_manifest
from spidr_hf.evaluation.phones import phone_steps

pytestmark = pytest.mark.slow
PYTHON = os.environ.get("FASTABX_PYTHON", sys.executable)


def run(script: str, *arguments: object) -> dict:
    done = subprocess.run([PYTHON, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def files(tmp_path_factory, speech):
    """Units and features of twelve utterances in both layouts, and their items."""
    if subprocess.run([PYTHON, "-c", "import fastabx, discophon"], capture_output=True).returncode:
        pytest.skip("fastabx and discophon are not installed; FASTABX_PYTHON may name a Python that has them")
    folder = tmp_path_factory.mktemp("tools")
    tiny_model().save_pretrained(folder / "model")
    SpidrFeatureExtractor().save_pretrained(folder / "model")
    manifest = read_manifest(speech / "manifest.csv")
    chosen = list(range(0, 60, 5))  # of all voices
    Manifest(manifest.table.take(chosen), manifest.root).write(folder / "few.csv")
    wanted = [manifest.fileid(i) for i in chosen]
    lines = (speech / "alignments.jsonl").read_text().splitlines()
    (folder / "few.jsonl").write_text("".join(line + "\n" for line in lines if json.loads(line)["id"] in wanted))
    assert run_command("write_items", folder / "few.jsonl", folder / "few.item").status == 0
    few, model = folder / "few.csv", folder / "model"
    for out, layout in (("f", ("fastabx",)), ("d", ("discophon", "--language", "deu", "--split", "dev"))):
        for command in ("extract_units", "extract_features"):
            done = run_command(command, model, few, folder / out, "--layers", 4, "--layout", *layout)
            assert done.status == 0, done.err
    return folder


def test_fastabx_reads_units_and_features(files):
    script = """if True:
        import json, sys
        from fastabx import Dataset, Task, Score
        item, units, features = sys.argv[1:]
        u = Dataset.from_item_and_units(item, units, 50)
        f = Dataset.from_item(item, features, 50)
        score = Score(Task(u, on="#phone", by=["speaker"]), "identical").collapse(levels=["speaker"])
        print(json.dumps([len(u.labels), len(f.labels), list(f.accessor[0].shape), score]))
    """
    units, features, shape, score = run(script, files / "few.item", files / "f/4/units.jsonl", files / "f/4")
    items = len((files / "few.item").read_text().splitlines()) - 1
    assert units == features == items and shape[1] == 48 and 0 < score < 1


def test_fastabx_agrees_on_abx(files, tmp_path):
    script = """if True:
        import json, sys
        import torch
        from fastabx import zerospeech_abx
        item, features = sys.argv[1:]
        options = dict(
            max_size_group=None, max_x_across=None, context="any", frequency=50, feature_maker=torch.load, seed=0
        )
        found = {s: 100 * zerospeech_abx(item, features, speaker=s, **options) for s in ("within", "across")}
        print(json.dumps(found))
    """
    theirs = run(script, files / "few.item", files / "f/4")
    everything = (
        "--context",
        "any",
        "--max-size-group",
        0,
        "--max-x-across",
        0,
        "--backend",
        "own",
        "--json",
        tmp_path / "abx.json",
    )
    done = run_command("evaluate_abx", files / "few.item", files / "f/4", *everything)
    assert done.status == 0, done.err
    assert json.loads((tmp_path / "abx.json").read_text()) == pytest.approx(theirs, abs=1e-3)


def test_discophon_reads_units_and_agrees_on_pnmi(files, tmp_path):
    script = """if True:
        import json, sys
        from pathlib import Path
        from discophon.data import read_submitted_units, units_filename
        from discophon.evaluate import cooccurrence_matrix, pnmi
        from discophon.languages import get_language
        folder, phones = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
        units = read_submitted_units(folder / units_filename(get_language("deu"), "dev"))
        matrix = cooccurrence_matrix(units, phones, n_units=24, n_phonemes=40)
        print(json.dumps([len(units), float(pnmi(matrix))]))
    """
    alignments = read_alignments(files / "few.jsonl")
    labels = {name: [phones[i][0] for i in phone_steps(phones)] for name, phones in alignments.items()}
    (tmp_path / "phones.json").write_text(json.dumps(labels))
    count, pnmi = run(script, files / "d/4", tmp_path / "phones.json")
    units = files / "d/4/units-deu-dev.jsonl"
    assert run_command("evaluate_units", units, files / "few.jsonl", "--json", tmp_path / "s.json").status == 0
    assert count == 12
    assert json.loads((tmp_path / "s.json").read_text())["pnmi"] == pytest.approx(pnmi, abs=1e-6)
    names = {p.stem for p in (files / "d/4/deu/dev").glob("*.pt")}
    assert names == {json.loads(line)["file"] for line in units.read_text().splitlines()}
    assert np.isfinite(pnmi)
