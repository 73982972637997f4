"""Every notebook runs from top to bottom, and is kept without what it printed."""

import ast

import nbformat
import pytest
from nbclient import NotebookClient

from paths import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS][:1] == ["01_watch_entropy_and_prune.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_clean(path):
    """No outputs, no counts, the plain kernel; one question in the title; seeded."""
    notebook = read(path)
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code(notebook))
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].source.splitlines()[0].startswith("# ")
    assert notebook.cells[0].source.splitlines()[0].endswith("?")
    assert any("manual_seed(" in cell.source or "seed_everything(" in cell.source for cell in code(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_imports_public_names_only(path):
    tree = ast.parse("\n".join(cell.source for cell in code(read(path))))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    attributes = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    private = [part for name in names + modules + attributes for part in name.split(".") if part.startswith("_")]
    assert private == []
    assert any(name.split(".")[0] == "actprune" for name in names + modules)


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    """In an empty folder; every code cell is executed, and something is printed and drawn."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    notebook = read(path)
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert all(cell.execution_count for cell in code(notebook))
    assert any(output.output_type == "stream" and output.name == "stdout" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
