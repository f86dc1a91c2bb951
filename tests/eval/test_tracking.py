"""Results in Weights & Biases: every figure with both ends of its interval, the sheet, and what the figures
rest on; without a network."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from eval import tracking
from eval.results import Result, Scored, write_result

ROOT = Path(__file__).parents[2]
RESULT = Result(
    "unet, 10 steps",
    {
        "fid": Scored(12.34, "lower", 100, {"metric": "fid", "reference": "ab" * 32}, 12.1, 12.6),
        "clip_score": Scored(28.5, "higher", 100, {"metric": "clip_score"}, math.nan, math.nan),
    },
    {"origin": "drawn", "n": 100},
    settings={"batch_size": 64},
    facts={"torch": "2.15.0"},
)


class Recorder:
    """Stands in for WandB: what it was made with, logged and closed with."""

    made: list[Recorder] = []  # noqa: RUF012  (emptied by the fixture)

    def __init__(self, folder: Path, config: Mapping[str, Any], project: str) -> None:
        self.folder, self.config, self.project = folder, config, project
        self.logged: list[tuple[int, Mapping[str, float]]] = []
        self.closed = False
        Recorder.made.append(self)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Keep it, or break as a full disk would."""
        if "broken" in self.project:
            raise OSError("no space")
        self.logged.append((step, values))

    def close(self) -> None:
        """Remember that."""
        self.closed = True


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    """In place of WandB."""
    Recorder.made.clear()
    monkeypatch.setattr(tracking, "WandB", Recorder)
    return Recorder


def test_figures_are_numbers_and_what_they_rest_on_is_config(
    tmp_path: Path, recorder: type[Recorder]
) -> None:
    """fid, fid_low, fid_high; no NaN; settings at the top of the config, bases and facts under fingerprint;
    plain values throughout."""
    tracking.log_result(RESULT, "project", tmp_path / "a.json")
    (run,) = recorder.made
    assert run.logged == [(0, {"fid": 12.34, "fid_low": 12.1, "fid_high": 12.6, "clip_score": 28.5})]
    assert run.closed
    assert (run.project, run.folder, run.config["batch_size"], run.config["result"]) == (
        "project",
        tmp_path / "a",
        64,
        "unet, 10 steps",
    )
    assert run.config["fingerprint"] == {
        "samples": {"origin": "drawn", "n": 100}, "facts": {"torch": "2.15.0"},
        "fid": {"metric": "fid", "reference": "ab" * 32}, "clip_score": {"metric": "clip_score"},
    }  # fmt: skip
    json.dumps(run.config, allow_nan=False)


def test_a_failure_closes_the_run_and_is_not_hidden(tmp_path: Path, recorder: type[Recorder]) -> None:
    """What goes wrong while logging is raised, and no run is left open."""
    with pytest.raises(OSError, match="no space"):
        tracking.log_result(RESULT, "broken", tmp_path / "a.json")
    assert recorder.made[0].closed


def test_without_a_login_it_stays_offline_and_silent(tmp_path: Path) -> None:
    """The real client, in a process of its own: a run in a folder beside the result, with the sheet as its
    picture, and nothing printed."""
    write_result(replace(RESULT, figures={"fid": RESULT.figures["fid"]}), tmp_path / "a.json")
    Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / "a.png")
    program = "import sys; from eval.results import read_result; from eval.tracking import log_result\n"
    program += "log_result(read_result(sys.argv[1]), 'project', sys.argv[1])"
    home = tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.json")], cwd=tmp_path, stdin=subprocess.DEVNULL,
        capture_output=True, text=True,
        env={**environment, "HOME": str(home), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list((tmp_path / "a").glob("wandb/offline-run-*/*.wandb"))
    assert len(list((tmp_path / "a").glob("wandb/offline-run-*/files/media/images/*.png"))) == 1
