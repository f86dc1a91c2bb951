"""Damaged, hostile and foreign files end in one clear line, whatever they are: no code is run, no memory is
taken, nothing hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.models.files.damaged import CASES

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What loading said to each case, in a process that may take 256 MiB more than it has when nothing is
    loaded."""
    folder = tmp_path_factory.mktemp("damaged")
    program = [sys.executable, "-m", "tests.models.files.damaged", str(folder)]
    done = subprocess.run(
        program,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads((folder / "said.json").read_text()))


@pytest.mark.parametrize("case", CASES)
def test_one_clear_line(case: str, said: dict[str, Any]) -> None:
    """A ValueError or an OSError in one line, which names the file and what is wrong with it."""
    kind, message, _ = said[case]
    assert kind in ("ValueError", "FileNotFoundError"), message
    assert CASES[case][1] in message
    assert message.isprintable()
    assert "PATH" in message
    assert len(message) < 1000


def test_flipped_bytes_give_a_model_or_one_line(said: dict[str, Any]) -> None:
    """500 times, bits of a header flipped at random."""
    assert said["fuzz"] == []


def test_no_pickle_ran_its_code(said: dict[str, Any]) -> None:
    """Three of the cases would have left a file behind, which they do leave where Python's own unpickler
    reads them."""
    assert said["ran"] == []


def test_the_hostile_pickle_would_run_its_code(tmp_path: Path) -> None:
    """Else the test before could not fail."""
    import pickle

    from tests.models.files.damaged import bare_pickle

    pickle.loads(bare_pickle(tmp_path / "model").read_bytes())
    assert (tmp_path / "model.ran").read_text() == "ran\n"
