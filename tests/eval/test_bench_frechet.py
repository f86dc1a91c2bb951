"""The benchmark of the Frechet distance: what it measures and writes. Nothing is asserted of the clock."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from eval.bench import frechet, harness
from eval.metrics.frechet import frechet_distance
from eval.metrics.moments import Moments
from tests.composing import composed


def settings(out: Path, **changes: Any) -> dict[str, Any]:
    """The experiment's own configuration, of 60 dimensions, with changes."""
    config = composed("eval", "experiment=bench_frechet")
    return {
        **config,
        "out": str(out),
        "progress": False,
        "dim": 60,
        "n": [300, 20],
        "rounds": 1,
        **changes,
    }


@pytest.mark.bench
def test_times_both_and_writes(tmp_path: Path) -> None:
    """A row per size with both times and their ratio; ours within 1e-9 of what the features themselves say,
    at full rank and below."""
    timings = harness.run(settings(tmp_path))
    assert [(t.samples, t.dim) for t in timings] == [(300, 60), (20, 60)]
    for t in timings:
        assert t.speedup == pytest.approx(t.theirs / t.ours)
        assert t.error < 1e-9
        assert t.their_error < 1e-3
    rows = (tmp_path / "bench.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["samples", "---", "300", "20"]
    assert len(json.loads((tmp_path / "bench.json").read_text())["rows"]) == 2


def test_the_truth_is_another_way_to_the_distance() -> None:
    """From features alone, to 1e-10 of the distance from moments, for more samples than dimensions and for
    fewer."""
    for n in (300, 20):
        x, y = (frechet.features(n, 60, seed) for seed in (0, 1))
        assert frechet.distance_of_features(x, y) == pytest.approx(
            frechet_distance(Moments.of(x), Moments.of(y)), rel=1e-10
        )


@pytest.mark.parametrize("changes", [{"n": [300, 1]}, {"n": []}, {"rounds": 0}, {"dim": 0}], ids=str)
def test_what_cannot_be_timed_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    """Sets without a covariance, and nothing to do."""
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must"):
        harness.run(settings(tmp_path, **changes))


def test_without_scipy_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the package."""
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    with pytest.raises(ValueError, match=r"pip install 'plain-diffusion\[bench\]'"):
        harness.run(settings(tmp_path))
