"""examples/tour.ipynb runs from its first cell to its last one, and draws the curves of both methods."""

from __future__ import annotations

import ast

import pytest

from tests.paths import ROOT


def test_the_notebook_runs_and_draws_both_curves(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient, of the extra docs, is not installed; .ci/run has it")
    pytest.importorskip("ipykernel", reason="ipykernel, of the extra docs, is not installed; .ci/run has it")
    pytest.importorskip("matplotlib", reason="matplotlib, of the extras plots and dev, is not installed")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # what a reader sees comes from his own run
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    errors = next(
        ast.literal_eval(data["text/plain"]) for data in shown if "with a synthesizer" in data.get("text/plain", "")
    )
    assert errors["with a synthesizer"] < errors["truncated BPTT"] < 0.3
    assert "image/png" in shown[-1]
