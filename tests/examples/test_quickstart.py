"""examples/quickstart.ipynb as a reader runs it: every cell, in order, with a model from a server on this machine."""

import json

import pytest
from tiny import tiny_model
from walk import ROOT, serve_checkpoint

from spidr_hf.conversion.sources import MIRROR_VARIABLE

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_it_is_kept_without_results():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with serve_checkpoint(tmp_path / "served", tiny_model(num_hidden_layers=12, num_codebooks=8)) as address:
        monkeypatch.setenv(MIRROR_VARIABLE, address)
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.get("text", "") for output in outputs if output.output_type == "stream")
    assert "layer 5: phone_purity" in printed and "layer 6: phone_purity" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)
