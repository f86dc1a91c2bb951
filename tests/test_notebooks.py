"""The notebooks run from top to bottom, and are committed with what they show."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from tests.forking import Command, forking

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
# Here the same cells train for fewer steps and draw fewer pictures: what they show is committed, and `make
# notebooks` makes it whole.
SHORTER = {
    "02_train_and_sample": {
        "steps=600, batch_size=64": "steps=8, batch_size=16",
        "log_every=20": "log_every=4",
    },
    "03_samplers_compared": {
        "grid_of(200)": "grid_of(20)",
        "range(600)": "range(60)",
        "(6, 10, 20, 40, 80, 120)": "(6, 10)",
        "(8, 16, 32, 64, 128)": "(8, 16)",
    },
    "04_guidance": {
        "depth=2, steps=600": "depth=2, steps=8",
        "depth=1, steps=200": "depth=1, steps=8",
        "batch_size=64": "batch_size=16",
        "arange(10).repeat(20)": "arange(10).repeat(4)",
        "range(200)": "range(40)",
    },
    "05_open_a_checkpoint": {"prompt, steps=8": "prompt, steps=2"},
    "06_rectified_flow": {
        **dict.fromkeys(("params(400, ", "params(250, ", "params(200, "), "params(8, "),
        "batch_size=64": "batch_size=16",
        "log_every=10": "log_every=4",
        "arange(10).repeat(20)": "arange(10).repeat(4)",
        "range(200)": "range(40)",
        "m.view(20, ": "m.view(4, ",
        "torch.arange(2000)": "torch.arange(500)",
        "range(1000, 3000)": "range(1000, 1500)",
    },
    "07_what_fid_sees": {
        "train_classifier(training)": "train_classifier(training, epochs=2)",
        "899], 40": "899], 2",
        "n, draws = 300, 200": "n, draws = 300, 4",
        "step in range(200)": "step in range(4)",
        "features(resized_pictures, ": "features(resized_pictures[:3], ",
    },
}

DRAWING = """
import matplotlib, sklearn.datasets, torch._dynamo, eval.scoring, eval, models, samplers, train
matplotlib.use("agg")
import matplotlib.pyplot as plt

def show():  # every picture is drawn, as a kernel draws it
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")

plt.show = show
"""


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
            assert any("image/png" in output.get("data", {}) for output in cells[i - 1].get("outputs", [])), (
                cell.source
            )


@pytest.mark.loopback  # which a kernel is spoken to over
@pytest.mark.parametrize(
    "path", [NOTEBOOKS[0], *(pytest.param(path, marks=pytest.mark.slow) for path in NOTEBOOKS[1:])]
)
def test_runs_in_jupyter(path: Path, tmp_path: Path) -> None:
    """From top to bottom in a fresh kernel, as it is committed; the first one always, the others where time
    allows."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(tmp_path)}}).execute()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Runs a notebook's cells as a program: a kernel for each would import torch, matplotlib and scikit-learn
    anew, in eight seconds."""
    with forking(tmp_path_factory.mktemp("said"), DRAWING) as run:
        yield run


@pytest.mark.parametrize("path", NOTEBOOKS[1:], ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, command: Command) -> None:
    """It runs from top to bottom in a process of its own, and leaves no weights among the temporary files."""
    cells = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    program = "\n".join(["import tempfile", f"tempfile.tempdir = {str(tmp_path)!r}", *cells])
    for long, short in SHORTER.get(path.stem, {}).items():
        assert long in program, f"{path.name} holds no {long!r} that could be shorter"
        program = program.replace(long, short)
    (tmp_path / "notebook.py").write_text(program)
    status, _, error = command("notebook", here=tmp_path)
    assert status == 0, error
    assert not [file for file in tmp_path.glob("tmp*/**/*") if file.suffix == ".safetensors"]


def test_a_mistyped_checkpoint_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a random miniature in its place: nothing is written, and the message is that of `models.load`."""
    path = next(path for path in NOTEBOOKS if "checkpoint" in path.stem)
    monkeypatch.setenv("CHECKPOINT", str(tmp_path / "v1-5.safetensors"))
    monkeypatch.chdir(tmp_path)
    first = next(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    with (
        plt.rc_context(),
        torch.enable_grad(),
        pytest.raises(FileNotFoundError, match=r"no such file or folder: .*v1-5\.safetensors"),
    ):
        exec(first, {})  # which changes matplotlib's settings and torch's, both of which are put back
    assert not any(tmp_path.iterdir())
