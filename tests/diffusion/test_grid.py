"""Time grids: published spacings by hand, ends, initial scale, slices, errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from diffusion import (
    SPACINGS,
    CosineVP,
    DiscreteVP,
    Grid,
    NoiseLevel,
    RectifiedFlow,
    Schedule,
    Shifted,
    VarianceExploding,
    flux_mu,
    time_grid,
)
from tests.conftest import within

FLOW, TABLE, VE = RectifiedFlow(), DiscreteVP.scaled_linear(), VarianceExploding()
wrong_grid: Any = time_grid  # for values that the types forbid


def t_of(grid: Grid) -> list[float]:
    return [level.t for level in grid]


@pytest.mark.parametrize(
    ("schedule", "spacing", "options", "expected"),
    [
        (FLOW, "linspace", {}, [1, 0.75, 0.5, 0.25, 0]),
        (FLOW, "linspace", {"t_end": 0.1}, [1, 0.7, 0.4, 0.1, 0]),
        (FLOW, "linspace", {"t_start": 0.8}, [0.8, 0.6, 0.4, 0.2, 0]),
        (FLOW, "trailing", {}, [1, 0.75, 0.5, 0.25, 0]),
        (FLOW, "leading", {"t_end": 0.2}, [0.8, 0.6, 0.4, 0.2, 0]),
        (FLOW, "linspace", {"shift": 3.0}, [1, 0.9, 0.75, 0.5, 0]),
        (FLOW, "mu_shift", {"mu": math.log(3)}, [1, 0.9, 0.75, 0.5, 0]),
        (FLOW, [1.0, 0.3, 0.2, 0.1], {}, [1, 0.3, 0.2, 0.1, 0]),
        (FLOW, [1.0, 0.3, 0.2, 0.1, 0.0], {}, [1, 0.3, 0.2, 0.1, 0]),
        (TABLE, "linspace", {}, [999, 666, 333, 0, -1]),
        (TABLE, "trailing", {}, [999, 749, 499, 249, -1]),
        (TABLE, "leading", {}, [750, 500, 250, 0, -1]),
        (TABLE, "leading", {"offset": 1}, [751, 501, 251, 1, -1]),
        (TABLE, "leading", {"offset": 1, "terminal": "t_min"}, [751, 501, 251, 1, 0]),
        (TABLE, "linspace", {"t_start": 900, "t_end": 1, "whole": True}, [900, 600, 301, 1, -1]),
    ],
)
def test_spacings_by_hand(
    schedule: Schedule, spacing: str | list[float], options: dict[str, Any], expected: list[float]
) -> None:
    """Four steps of each spacing, worked out on paper."""
    steps = 4 if isinstance(spacing, str) else None
    assert t_of(time_grid(schedule, steps, spacing, **options)) == pytest.approx(
        expected, rel=1e-13, abs=1e-13
    )


def test_leading_stride_is_whole_and_trailing_is_not() -> None:
    """13 steps over 1000 rows: DDIM's stride is 1000 // 13 = 76; trailing divides the whole range, and
    `whole` rounds it."""
    assert t_of(time_grid(TABLE, 13, "leading")) == [*(76.0 * i for i in range(12, -1, -1)), -1]
    exact = [999 - 1000 * i / 13 for i in range(14)]
    assert t_of(time_grid(TABLE, 13, "trailing")) == pytest.approx(exact, abs=1e-10)
    assert t_of(time_grid(TABLE, 13, "trailing", whole=True)) == [round(t) for t in exact]


@pytest.mark.parametrize("rho", [3.0, 7.0])
def test_karras_is_equation_5(rho: float) -> None:
    """Karras et al. 2022, eq. 5: sigma_i = (s_max^(1/rho) + i/(N-1) (s_min^(1/rho) - s_max^(1/rho)))^rho,
    then 0."""
    i = np.arange(18) / 17
    expected = (80 ** (1 / rho) + i * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    grid = time_grid(VE, 18, "karras", rho=rho)
    assert [level.sigma for level in grid] == pytest.approx([*expected, 0.0], rel=1e-12)


@pytest.mark.parametrize("spacing", ["log_snr", "exponential"])
def test_log_snr_steps_are_equal(schedule: Schedule, spacing: str) -> None:
    """Half log-SNR rises by the same amount at each step, on every schedule."""
    grid = time_grid(schedule, 9, spacing, **within(schedule, spacing))
    rise = np.diff([level.half_log_snr for level in grid[:-1]])
    np.testing.assert_allclose(rise, rise.mean(), rtol=1e-10)


def test_flux_shift() -> None:
    """Flux: mu goes through 256 tokens -> 0.5 and 4096 -> 1.15, and sigma = e^mu / (e^mu + 1/t - 1)."""
    assert flux_mu(256) == 0.5
    assert flux_mu(4096) == pytest.approx(1.15, rel=1e-15)
    mu = flux_mu(1024)
    expected = [math.exp(mu) / (math.exp(mu) + 1 / t - 1) for t in (1, 0.75, 0.5, 0.25)]
    assert t_of(time_grid(FLOW, 4, "mu_shift", mu=mu))[:-1] == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_grid_falls_to_data(schedule: Schedule, spacing: str) -> None:
    """Any spacing on any schedule has `steps` steps of falling noise, ends at exact data, and holds the
    schedule's own numbers."""
    for steps in (1, 2, 3, 7, 13, 50, 99, 100):
        grid = time_grid(schedule, steps, spacing, **within(schedule, spacing))
        assert (grid.steps, len(grid), grid[-1]) == (steps, steps + 1, schedule.terminal)
        t, alpha, sigma = torch.tensor(grid.levels, dtype=torch.float64).T
        assert (t.diff() < 0).all()
        assert (sigma[1:] * alpha[:-1] < sigma[:-1] * alpha[1:]).all()
        torch.testing.assert_close(alpha, schedule.alpha(t), rtol=1e-13, atol=0)
        torch.testing.assert_close(sigma, schedule.sigma(t), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("spacing", "steps"), [("linspace", 1000), ("trailing", 1000), ("leading", 1000), ("leading", 999)]
)
def test_a_table_can_be_walked_row_by_row(spacing: str, steps: int) -> None:
    """1000 steps over 1000 rows visit every row once; 999 leading ones leave out the noisiest."""
    assert t_of(time_grid(TABLE, steps, spacing)) == pytest.approx([*range(steps - 1, -1, -1), -1], abs=1e-10)


def test_initial_scale(schedule: Schedule) -> None:
    """A sample starts from sigma n, or with "unit" from norm(alpha, sigma) n; the grid says so, and `start`
    applies it."""
    noise, unit = (
        time_grid(schedule, 5, "trailing", initial="noise"),
        time_grid(schedule, 5, "trailing", initial="unit"),
    )
    first = schedule.level(schedule.t_max)
    assert noise.initial_scale == first.sigma
    assert unit.initial_scale == math.hypot(first.alpha, first.sigma)
    assert noise.start(torch.tensor(2.0)) == 2 * first.sigma


def test_slices() -> None:
    """A slice is a grid: it keeps the initial scale with its first level, and otherwise starts from its own
    sigma."""
    grid = time_grid(TABLE, 10, initial="unit")
    assert grid[:-1] == Grid(grid.levels[:-1], 1.0, grid.schedule)
    assert grid[3:] == Grid(grid.levels[3:], grid[3].sigma, grid.schedule)
    assert tuple(grid) == grid.levels


def test_grids_are_immutable_values() -> None:
    """Two grids of the same levels are equal, and neither can change."""
    grid = time_grid(FLOW, 3)
    assert grid == time_grid(FLOW, 3) != time_grid(FLOW, 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.initial_scale = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: time_grid(FLOW, 0), "steps must be a whole number >= 1"),
        (lambda: time_grid(FLOW), "steps must be a whole number >= 1"),
        (lambda: time_grid(FLOW, 5, "linspce"), "no spacing named 'linspce'"),
        (lambda: time_grid(FLOW, 5, "linspace", rho=7.0), "linspace.*'rho'|'rho'.*linspace"),
        (lambda: time_grid(VE, 5, "karras", roh=7.0), "'roh'.*rho"),
        (lambda: time_grid(FLOW, 5, t_start=0.2, t_end=0.8), "from noise to data"),
        (lambda: time_grid(FLOW, spacing=[0.2, 0.8]), "noise must fall at every step.*step 0"),
        (lambda: time_grid(FLOW, spacing=[0.5, 0.5]), "noise must fall"),
        (lambda: time_grid(FLOW, 3, [1.0, 0.5]), "steps=3, but the list holds 2"),
        (lambda: time_grid(FLOW, spacing=[1.0, 0.5], t_end=0.1), "takes no t_start"),
        (lambda: time_grid(FLOW, spacing=[0.0]), "at least 2 levels"),
        (lambda: wrong_grid(FLOW, 5, terminal="dta"), "no terminal rule named 'dta'; did you mean 'data'"),
        (lambda: wrong_grid(FLOW, 5, initial="units"), "no initial noise named 'units'; did you mean 'unit'"),
        (lambda: wrong_grid(FLOW, 2.5), "steps must be a whole number >= 1, not 2.5"),
        (
            lambda: time_grid(VarianceExploding(), spacing=[80.0, 1.0, -1.0]),
            r"t must lie in \[0, inf\) on this schedule, not -1",
        ),
        (
            lambda: time_grid(FLOW, spacing=[float("nan")]),
            r"t must lie in \[0, 1\] on this schedule, not nan",
        ),
        (lambda: DiscreteVP.linear().level(float("nan")), "not nan"),
        (lambda: time_grid(FLOW, 5, whole=True), "only a table such as DiscreteVP"),
        (lambda: time_grid(TABLE, 1001, whole=True), "noise must fall"),
        (lambda: time_grid(TABLE, 1001, "leading"), "noise must fall"),
        (lambda: time_grid(TABLE, 1000, "leading", offset=1), "above 999"),
        (lambda: time_grid(FLOW, 5, "leading"), "clean data"),
        (lambda: time_grid(FLOW, 5, "trailing", t_end=0.1), "leave t_end out"),
        (lambda: time_grid(TABLE, 5, shift=3.0), r"\[-1, 999\]"),
        (lambda: time_grid(FLOW, 5, "karras"), "finite sigma/alpha at both ends"),
        (lambda: time_grid(CosineVP(), 5, "log_snr", t_start=0.99), "finite sigma/alpha at both ends"),
        (lambda: time_grid(TABLE, 5, terminal="t_min"), "noise must fall"),
        (lambda: Grid((NoiseLevel(1.0, 0.0, 1.0),), 1.0, FLOW), "steps must be >= 1"),
        (lambda: time_grid(FLOW, 5)[2:3], "steps must be >= 1"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    """A grid that cannot be walked is never made, and the message names the reason."""
    with pytest.raises(ValueError, match=message):
        make()


def test_leading_strides_cover_the_range_that_is_asked_for() -> None:
    """Between t_end and t_start, and neither more nor less; on a table in whole strides, also where it is
    shifted."""
    assert [level.t for level in time_grid(FLOW, 4, "leading", t_end=0.2)] == pytest.approx(
        [0.8, 0.6, 0.4, 0.2, 0]
    )
    shifted = Shifted(DiscreteVP.scaled_linear(), 2.0)
    assert [level.t for level in time_grid(shifted, 4, "leading", whole=True)][:4] == [750, 500, 250, 0]
    assert [level.t for level in time_grid(TABLE, 4, "leading", t_start=799, t_end=400)][:4] == [
        700,
        600,
        500,
        400,
    ]
