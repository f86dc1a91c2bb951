"""The benchmark of the FID network: what it counts, measures and writes. Nothing is asserted of the clock."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.bench import features, harness
from eval.bench.features import flops
from tests.composing import composed


def settings(out: Path, **changes: Any) -> dict[str, Any]:
    """The experiment's own configuration on the CPU, tiny, with changes."""
    tiny = {
        "n": 4,
        "batch": 2,
        "size": 32,
        "rounds": 1,
        "dtypes": ["fp32"],
        "device": "cpu",
        "progress": False,
    }
    return {**composed("eval", "experiment=bench_features"), "out": str(out), **tiny, **changes}


def test_arithmetic_of_a_picture() -> None:
    """5.7 billion multiply-adds, which Szegedy et al. 2015, section 6, round to 5."""
    assert flops() / 2 == pytest.approx(5.7e9, rel=0.01)


def test_times_both_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row with both sides' rates and ratios; what is made of our features is what is made of theirs, so
    that both did the same work."""
    monkeypatch.setattr(
        features, "_distance", lambda rows: float(rows.square().sum())
    )  # the distance itself takes seconds
    # torch-fidelity starts workers by the number of processors; they would hand pictures over through
    # sockets.
    monkeypatch.setattr("multiprocessing.cpu_count", lambda: 0)
    (timing,) = harness.run(settings(tmp_path))
    assert timing.speedup == pytest.approx(timing.ours / timing.theirs)
    assert timing.folder_speedup == pytest.approx(timing.folder / timing.their_folder)
    assert min(timing.ours, timing.theirs, timing.folder, timing.their_folder, timing.share) > 0
    assert abs(timing.distance) < 1e-5
    rows = (tmp_path / "bench.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["dtype", "---", "fp32"]
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["settings"]["batch"] == 2
    assert written["facts"]["torch"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtypes": ["bf61"]}, "no dtype named 'bf61'; did you mean 'bf16'"),
        ({"n": 3}, "n must be at least 4, two for each side of a distance, not 3"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"device": "tpu"}, "no device 'tpu' here"),
    ],
)
def test_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Before anything is measured, and nothing is written."""
    with pytest.raises(ValueError, match=message):
        harness.run(settings(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch-fidelity there is nobody to compare with, and the error says how to get it."""
    monkeypatch.setitem(sys.modules, "torch_fidelity.datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'plain-diffusion\[bench\]'"):
        harness.run(settings(tmp_path / "out"))
