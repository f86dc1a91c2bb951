"""The programs about solvers: the table of orders and the benchmark write what they measure."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest

from eval.bench import harness, orders, samplers
from eval.bench.convergence import Curve, stated_orders
from samplers import SAMPLERS
from tests.composing import composed


def settings(program: str, out: Path, **changes: Any) -> dict[str, Any]:
    """The experiment's own configuration, with changes."""
    return {**composed("eval", f"experiment={program}"), "out": str(out), "progress": False, **changes}


def test_orders_are_measured_and_written(tmp_path: Path) -> None:
    """Three files; the table has a row per solver, the order measured stands near the one stated."""
    small = {
        "samplers": ["ddim", "rk4", "sit_sde"],
        "steps": [32, 64, 128],
        "path_steps": [16, 32],
        "path_samples": 2000,
    }
    curves = orders.run(settings("sampler_orders", tmp_path, **small))
    assert {(c.sampler, c.strong) for c in curves} == {("ddim", False), ("rk4", False), ("sit_sde", True)}
    assert len(curves) == 3 + 3 + 1
    for curve in curves:
        assert curve.measured == pytest.approx(curve.stated, abs=0.3)
    assert next(c.calls for c in curves if c.sampler == "rk4") == (4 * 32, 4 * 64, 4 * 128)
    rows = (tmp_path / "orders.md").read_text().splitlines()
    measured = {(c.sampler, c.grid if not c.strong else "path"): f"{c.measured:.2f}" for c in curves}
    names = ["VP, log-SNR", "flow, log-SNR", "flow, uniform"]
    assert rows[2:] == [
        f"| `ddim` | 1 | 1 | {' | '.join(measured['ddim', name] for name in names)} |  |",
        f"| `rk4` | 4 | 4 | {' | '.join(measured['rk4', name] for name in names)} |  |",
        f"| `sit_sde` | 1 | 1 (strong) |  |  |  | {measured['sit_sde', 'path']} |",
    ]
    assert len(json.loads((tmp_path / "orders.json").read_text())["rows"]) == 7
    assert (tmp_path / "orders.png").stat().st_size > 10_000


def test_errors_of_rounding_are_no_order() -> None:
    """The order is that of the last pair of errors above rounding; without one there is none."""
    curve = Curve("rk4", "grid", 4, False, (1, 2, 4), (4, 8, 16), (1e-3, 1e-3 / 16, 1e-13))
    assert curve.measured == pytest.approx(4)
    assert math.isnan(Curve("rk4", "grid", 4, False, (1, 2), (4, 8), (1e-12, 1e-13)).measured)


def test_every_solver_states_an_order_or_draws_independent_noise() -> None:
    """What the table leaves out is only what has no order to measure."""
    stated = stated_orders("Order") | stated_orders("Strong order")
    assert all(
        "noise" in inspect.signature(solver).parameters
        for name, solver in SAMPLERS.items()
        if name not in stated
    )


def test_the_benchmark_times_pairs(tmp_path: Path) -> None:
    """A row per pair with both times and their ratio; nothing is asserted of the clock."""
    timings = harness.run(settings("bench_samplers", tmp_path, steps=3, rounds=1, shape=[1, 2, 4, 4]))
    assert [t.sampler for t in timings] == list(samplers.PEERS)
    for t in timings:
        assert t.ours > 0 < t.theirs
        assert t.ratio == pytest.approx(t.ours / t.theirs)
    assert (tmp_path / "bench.md").read_text().count("\n") == 2 + len(timings)
    assert json.loads((tmp_path / "bench.json").read_text())["facts"]["torch"]


@pytest.mark.parametrize(
    ("program", "changes", "message"),
    [
        ("sampler_orders", {"steps": [8, 24]}, "steps must double"),
        ("sampler_orders", {"steps": [8]}, "steps must double, at least once"),
        ("sampler_orders", {"samplers": ["hein"]}, "no sampler named 'hein'; did you mean 'heun'"),
        ("sampler_orders", {"grids": [{"name": "a"}]}, "a grid needs a name and a schedule"),
        (
            "sampler_orders",
            {"grids": [{"name": "a", "schedule": {"name": "flow"}, "spacing": "karass"}]},
            "did you mean 'karras'",
        ),
        ("sampler_orders", {"grid": []}, "no parameter named 'grid'; did you mean 'grids'"),
        ("bench_samplers", {"samplers": ["rk4"]}, "no counterpart of 'rk4' to time"),
        ("bench_samplers", {"rounds": 0}, "rounds must be at least 1"),
    ],
)
def test_errors(tmp_path: Path, program: str, changes: dict[str, Any], message: str) -> None:
    """Before anything is measured, and nothing is written."""
    with pytest.raises(ValueError, match=message):
        {"sampler_orders": orders.run, "bench_samplers": harness.run}[program](
            settings(program, tmp_path / "out", **changes)
        )
    assert not (tmp_path / "out").exists()
