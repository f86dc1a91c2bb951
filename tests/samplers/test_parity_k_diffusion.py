"""Parity with k-diffusion in float64, call by call from equal noise, and its defects.

It samples where alpha = 1: it sees x / alpha, and its sigma is sigma / alpha. Both sides ask the same
stand-in for a network, and have to ask it in the same places, equally often, and end in the same place: so
every step agrees, and every stage of a step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import NONE, Condition, Estimate, Grid, Level, VarianceExploding, time_grid
from samplers import SAMPLERS
from tests.peers import k_sampling
from tests.samplers.parity import F64, NOISE, STRAIGHT, VP, Z

GRIDS = {
    "ve-karras": time_grid(VarianceExploding(), 12, "karras"),
    "vp-karras": time_grid(VP, 12, "karras"),
    "vp-linspace": time_grid(VP, 10),
    "flow": time_grid(STRAIGHT, 12, t_start=0.999, t_end=0.01),
}


class Asked:
    """A smooth stand-in for a network, x0 as a function of y = x / alpha and sigma / alpha, that keeps what
    it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, float]] = []

    def __call__(self, y: Tensor, sigma: Tensor) -> Tensor:
        """As k-diffusion asks: sigma is a (B,) tensor."""
        ratio = float(sigma[0])
        self.calls.append((y, ratio))
        scaled = y / math.hypot(1, ratio)
        return (1.3 * scaled + 0.3 * math.log(ratio)).sin() + 0.4 * scaled

    def denoiser(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        """As our solvers ask."""
        return Estimate.from_x0(
            x_t, self(x_t / level.alpha, torch.tensor([level.sigma / level.alpha], dtype=F64)), level
        )


def between(sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
    """Noise that belongs to a step, and changes smoothly with its ends: another step has other noise, a
    rounded one the same."""
    angle = 3 * math.log(sigma) + 5 * math.log(sigma_next)
    return math.cos(angle) * Z[0] + math.sin(angle) * Z[1]


def agree(grid: Grid, sampler: str, options: dict[str, Any], peer: str, peer_options: dict[str, Any]) -> None:
    """Every call and the end, to 1e-11 of what is compared."""
    asked, asked_there = Asked(), Asked()
    sigmas = torch.tensor([level.ratio for level in grid], dtype=F64)
    start = NOISE * grid[0].sigma
    *_, last = SAMPLERS[sampler](asked.denoiser, start, grid, **options)
    end = getattr(k_sampling(), f"sample_{peer}")(
        asked_there, start / grid[0].alpha, sigmas, disable=True, **peer_options
    )
    assert len(asked.calls) == len(asked_there.calls)
    for (y, sigma), (y_there, sigma_there) in zip(asked.calls, asked_there.calls, strict=True):
        assert sigma == pytest.approx(sigma_there, rel=1e-11)
        torch.testing.assert_close(y, y_there, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(last.x, end, rtol=1e-11, atol=1e-11)


def noise(sampler: str, grid: Grid, eta: float) -> dict[str, Any]:
    """The same noise for ours: steps are numbered, and paths run in the clock (alpha / sigma)^(2 eta)."""
    if "path" in inspect.signature(SAMPLERS[sampler]).parameters:
        return {"path": lambda x, start, stop: between(start ** (-0.5 / eta), stop ** (-0.5 / eta))}
    return {"noise": lambda x, i: between(grid[i].ratio, grid[i + 1].ratio)}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
@pytest.mark.parametrize(
    ("sampler", "options", "peer", "peer_options"),
    [
        ("euler", {}, "euler", {}),
        ("ddim", {}, "euler", {}),
        ("heun", {"coordinate": "ratio"}, "heun", {}),
        ("dpm2", {}, "dpm_2", {}),
        ("dpmpp_2s", {}, "dpmpp_2s_ancestral", {"eta": 0.0}),
        ("dpmpp_2m", {}, "dpmpp_2m", {}),
        ("dpmpp_sde", {"eta": 0.0}, "dpmpp_sde", {"eta": 0.0, "noise_sampler": between}),
        ("dpmpp_2m_sde", {"eta": 0.0}, "dpmpp_2m_sde", {"eta": 0.0, "noise_sampler": between}),
    ],
)
def test_ode(
    grid: Grid, sampler: str, options: dict[str, Any], peer: str, peer_options: dict[str, Any]
) -> None:
    """The deterministic solvers, on every schedule."""
    agree(grid, sampler, options, peer, peer_options)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
@pytest.mark.parametrize(
    ("sampler", "eta", "peer"),
    [
        ("euler_ancestral", 1.0, "euler_ancestral"),
        ("euler_ancestral", 0.5, "euler_ancestral"),
        ("ddim", 0.5, "euler_ancestral"),
        ("dpmpp_sde", 1.0, "dpmpp_sde"),
        ("dpmpp_2m_sde", 1.0, "dpmpp_2m_sde"),
        ("dpmpp_2m_sde", 0.3, "dpmpp_2m_sde"),
    ],
)
def test_noise(grid: Grid, sampler: str, eta: float, peer: str) -> None:
    """The stochastic solvers, on every schedule. DPM++ SDE at eta 1 alone: below it theirs renews noise as
    DDIM, ours as the SDE."""
    agree(
        grid, sampler, {"eta": eta, **noise(sampler, grid, eta)}, peer, {"eta": eta, "noise_sampler": between}
    )


@pytest.mark.parametrize("schedule", [VarianceExploding(), VP], ids=["ve", "vp"])
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_3m_sde_until_its_parabola(schedule: Any, eta: float) -> None:
    """Two steps and the one to data, before the third estimate counts: its coefficient there is wrong, see
    test_third_order.py."""
    grid = time_grid(schedule, 3, "karras")
    agree(
        grid,
        "dpmpp_3m_sde",
        {"eta": eta, **noise("dpmpp_3m_sde", grid, eta)},
        "dpmpp_3m_sde",
        {"eta": eta, "noise_sampler": between},
    )


@pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
@pytest.mark.parametrize(("churn", "low", "high"), [(40.0, 0.05, 8.0), (2.0, 0.05, 8.0), (2.0, 0.0, 4.0)])
def test_edm_churn(
    grid: Grid, churn: float, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EDM's stochastic sampler, below the noise that a schedule ends at: there ours does not churn, having no
    such level."""

    def z(x: Tensor, i: int) -> Tensor:
        return math.cos(i) * Z[0] + math.sin(i) * Z[1]

    steps = count()
    monkeypatch.setattr(
        torch, "randn_like", lambda x: z(x, next(steps))
    )  # theirs draws once a step, also where it does not churn
    ours = {"churn": churn, "low": low, "high": high, "noise_scale": 1.003, "noise": z}
    agree(grid, "edm", ours, "heun", {"s_churn": churn, "s_tmin": low, "s_tmax": high, "s_noise": 1.003})


# Where the peer is wrong: here, and its third order in test_third_order.py ----------------------------------


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_one_step_of_the_sde_solvers(sampler: str) -> None:
    """A single step, to data, leaves its step size unset: an UnboundLocalError (k-diffusion #72, #88). Ours
    is the estimate."""
    grid, asked = time_grid(VP, 1), Asked()
    start = grid.start(NOISE)
    sample: Callable[..., Tensor] = getattr(k_sampling(), f"sample_{sampler}")
    with pytest.raises(UnboundLocalError):
        sample(
            asked,
            start / grid[0].alpha,
            torch.tensor([grid[0].ratio, 0.0], dtype=F64),
            noise_sampler=between,
            disable=True,
        )
    (step,) = SAMPLERS[sampler](asked.denoiser, start, grid)
    assert torch.equal(step.x, step.x0)
