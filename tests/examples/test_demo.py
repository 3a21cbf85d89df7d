"""The demo: what it holds out, and that it fails when nothing was learnt."""

import importlib
from pathlib import Path

import pytest

from spidr_hf.data.manifests import read_manifest

ROOT = Path(__file__).resolve().parents[2]
demo = vars(importlib.import_module("spidr_hf.examples.demo"))


def row(step, loss, target_ppl):
    active = {"active_codewords": [26.0, 30.0]}
    return {"step": step, "loss": loss, "layer_losses": [loss], "target_ppl": target_ppl, "pred_ppl": 30.0} | active


def test_two_utterances_of_each_voice_are_held_out(speech, tmp_path):
    train, held_out = demo["split"](read_manifest(speech / "manifest.csv"))
    assert (len(train), len(held_out)) == (54, 12)
    fileids = [{part.fileid(i) for i in range(len(part))} for part in (train, held_out)]
    assert not fileids[0] & fileids[1]
    assert sorted({fileid.split("-")[1] for fileid in fileids[1]}) == ["awb", "kal", "ked", "rms", "slt", "slt_hts"]
    # Written elsewhere, the manifest still finds its archive.
    held_out.write(tmp_path / "run" / "held_out.csv")
    again = read_manifest(tmp_path / "run" / "held_out.csv")
    assert len(again.read(3)) == held_out.num_samples[3]


def test_a_healthy_run_passes(capsys):
    demo["check"]([row(1, 4.1, 27.0), row(300, 2.9, 20.0)])
    assert "4.10 -> 2.90" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1, 4.1, 27.0)] + [row(10 * i, 3.4, 20.0) for i in range(1, 9)], "fell by 0.70 instead of 0.8"),
        ([row(1, 4.1, 28.0)] + [row(10 * i, 0.2, 6.9) for i in range(1, 9)], "fell to 6.9. At 7.0 the codebooks"),
    ],
)
def test_no_learning_and_collapse_are_errors(rows, message):
    with pytest.raises(SystemExit, match=message):
        demo["check"](rows)
