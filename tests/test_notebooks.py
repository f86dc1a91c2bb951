"""The notebooks run from top to bottom, and are committed with what they show."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    """The folder is where this file looks for it."""
    assert len(NOTEBOOKS) >= 2


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_with_outputs(path: Path) -> None:
    """Every notebook asks a question first, holds pictures, and ends with exercises."""
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert "?" in notebook.cells[0].source
    assert "## Exercises" in notebook.cells[-1].source
    assert path.stat().st_size < 2_000_000, "outputs are to be small"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run from top to bottom in one go"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pictures_come_before_equations(path: Path) -> None:
    """A displayed equation stands right after cells that showed what it says."""
    cells = nbformat.read(path, as_version=4).cells
    assert "$" not in cells[0].source
    for i, cell in enumerate(cells):
        if cell.cell_type == "markdown" and "$$" in cell.source:
            assert any("image/png" in output.get("data", {}) for output in cells[i - 1].get("outputs", [])), cell.source


@pytest.mark.loopback  # which a kernel is spoken to over
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs from top to bottom in a fresh kernel, and leaves no weights among the temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}, shutdown_kernel="graceful").execute()
    assert not [file for file in tmp_path.glob("tmp*/**/*") if file.suffix == ".safetensors"]


@pytest.mark.loopback
def test_a_mistyped_checkpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a random miniature in its place: nothing is written, and the message is that of `models.load`."""
    path = next(path for path in NOTEBOOKS if "checkpoint" in path.stem)
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "v1-5.safetensors"))
    notebook = nbformat.read(path, as_version=4)
    with pytest.raises(CellExecutionError, match=r"no such file or folder: .*v1-5\.safetensors"):
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not any(tmp_path.iterdir())
