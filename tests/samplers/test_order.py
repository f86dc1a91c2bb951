"""Every solver on a mixture: measured orders of convergence, strong orders on a Brownian path, moments."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import (
    BrownianPath,
    CosineVP,
    DiscreteVP,
    Grid,
    Noise,
    RectifiedFlow,
    Schedule,
    initial_noise,
    time_grid,
)
from eval.bench.convergence import MIXTURE, each_number, ode_error
from samplers import SAMPLERS
from tests.conftest import within
from tests.samplers.cases import F64, MEAN, ORDER, PATHS, STD, STRONG_ORDER, WEIGHT, last

VP, FLOW = DiscreteVP.scaled_linear(), RectifiedFlow()


def test_deterministic_solvers_state_their_order() -> None:
    """A solver without noise says "Order N" in its docstring, one on a Brownian path "Strong order N"; the
    next tests measure it."""
    options = {name: set(inspect.signature(solver).parameters) for name, solver in SAMPLERS.items()}
    assert all(name in ORDER for name, taken in options.items() if not {"noise", "path"} & taken)
    assert set(PATHS) == set(STRONG_ORDER)
    known = {
        "ddim": 1,
        "euler": 1,
        "heun": 2,
        "dpm2": 2,
        "rk4": 4,
        "dpmpp_2s": 2,
        "dpmpp_2m": 2,
        "dpmpp_3m": 3,
        "unipc": 3,
    }
    assert ORDER.items() >= known.items()


@pytest.mark.parametrize(
    ("sampler", "order", "options"),
    [
        *((sampler, order, {}) for sampler, order in ORDER.items()),
        ("heun", 2, {"coordinate": "ratio"}),
        ("dpmpp_2m_sde", 2, {"eta": 0.0}),
        ("dpmpp_sde", 2, {"eta": 0.0}),
    ],
)
@pytest.mark.parametrize(
    ("schedule", "spacing", "ends"),
    [
        (VP, "linspace", {"t_start": 900, "t_end": 150}),
        (VP, "log_snr", {}),
        (FLOW, "linspace", {"t_start": 0.95, "t_end": 0.05}),
        (FLOW, "log_snr", {"t_start": 0.995, "t_end": 0.005}),
        (CosineVP(), "linspace", {"t_start": 0.95, "t_end": 0.05}),
    ],
)
def test_order_of_convergence(
    sampler: str, order: int, options: dict[str, Any], schedule: Schedule, spacing: str, ends: dict[str, Any]
) -> None:
    """Halving the steps divides the error by 2^order, within 0.05, on a mixture.

    The probability-flow ODE in one dimension keeps quantiles, so the exact answer is a quantile: no reference
    run is needed. Grids uniform in t stay off both ends, where a step in log-SNR is never short and solvers
    in it show their order late.
    """
    counts = (400, 800) if order == 3 else (200, 400) if sampler == "heun" else (100, 200)  # where it shows
    error = [
        ode_error(sampler, time_grid(schedule, steps, spacing, **ends)[:-1], **options) for steps in counts
    ]
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.05)


def test_unipc_of_order_3_is_better_than_its_start() -> None:
    """Its single first steps leave order 3; what they cost is so little that more shows."""
    u, error = torch.linspace(0.02, 0.98, 25, dtype=F64), []
    for steps in (100, 200):
        grid = time_grid(VP, steps, "log_snr")[:-1]
        runs = [
            last(SAMPLERS["unipc"](MIXTURE, MIXTURE.quantile(u, grid[0]), grid, order=order))
            for order in (2, 3)
        ]
        error.append([float((x - MIXTURE.quantile(u, grid[-1])).abs().mean()) for x in runs])
    assert math.log2(error[0][1] / error[1][1]) > 3.5
    assert error[1][1] < error[1][0] / 10


@pytest.mark.parametrize("sampler", STRONG_ORDER)
@pytest.mark.parametrize(
    ("schedule", "ends"), [(VP, {"t_end": 20}), (FLOW, {"t_start": 0.95, "t_end": 0.05})], ids=["vp", "flow"]
)
def test_refining_the_steps_refines_the_sample(
    sampler: str, schedule: Schedule, ends: dict[str, Any]
) -> None:
    """Each seed has one Brownian path, so that twice the steps bring every sample nearer to its own limit, at
    the stated strong order."""
    start, found = initial_noise(range(4), (1000,), F64), []
    for steps in (64, 128, 256):
        grid = time_grid(schedule, steps + 1, "log_snr", **ends)[:-1]
        found.append(
            last(SAMPLERS[sampler](each_number, grid.start(start), grid, path=BrownianPath(range(4))))
        )
    moved = [float((a - b).square().mean().sqrt()) for a, b in pairwise(found)]
    assert moved[0] < 0.05
    assert math.log2(moved[0] / moved[1]) == pytest.approx(STRONG_ORDER[sampler], abs=0.1)


def test_noise_without_a_path_does_not_refine() -> None:
    """The test above notices: with noise of their own for every step, samples end as far apart at any number
    of steps."""
    start, found = initial_noise(range(4), (1000,), F64), []
    for steps in (64, 128, 256):
        draw = randn(steps)
        grid = time_grid(VP, steps + 1, "log_snr")[:-1]
        path = lambda x, a, b, draw=draw: draw(x, 0)  # noqa: E731
        found.append(last(SAMPLERS["dpmpp_2m_sde"](each_number, grid.start(start), grid, path=path)))
    moved = [float((a - b).square().mean().sqrt()) for a, b in pairwise(found)]
    assert min(moved) > 0.4


def test_sit_is_the_published_sde() -> None:
    """Ma et al. 2024: du = [v - w/2 score] dr backwards + sqrt(w) dW with w = c r. A short step agrees to the
    order of its square."""
    z, gaps = initial_noise(range(4), (8,), F64), []
    for dr in (1e-3, 5e-4):
        t, s = FLOW.level(0.6), FLOW.level(0.6 - dr)
        u, w = initial_noise(range(4, 8), (8,), F64), 1.7 * t.sigma
        x0, eps = each_number(u, t)
        score = -eps / t.sigma
        maruyama = u - dr * (eps - x0) + 0.5 * w * dr * score + math.sqrt(w * dr) * z
        ours = last(
            SAMPLERS["sit_sde"](
                each_number, u, Grid((t, s), 1.0, FLOW), diffusion=1.7, path=lambda x, a, b: z
            )
        )
        gaps.append(float((ours - maruyama).abs().max()))
    assert gaps[0] < 3e-4
    assert gaps[1] < gaps[0] / 2.5


STOCHASTIC = {
    "ddpm": ("ddpm", {}),
    "ddim-1": ("ddim", {"eta": 1.0}),
    "ddim-0.5": ("ddim", {"eta": 0.5}),
    "euler_ancestral": ("euler_ancestral", {}),
    "dpmpp_sde": ("dpmpp_sde", {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}),
    "dpmpp_3m_sde-0.5": ("dpmpp_3m_sde", {"eta": 0.5}),
    "sit_sde": ("sit_sde", {}),
    "edm": ("edm", {}),
}


def randn(seed: int) -> Noise:
    """Noise from one generator: quicker than a seed per sample where samples are many."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x, step: torch.randn(x.shape, generator=generator, dtype=x.dtype)


class Walk:
    """A Brownian motion that is asked forwards only: quicker than a seed per sample where samples are
    many."""

    def __init__(self, seed: int) -> None:
        self.draw = randn(seed)
        self.known: dict[float, Tensor] = {}

    def __call__(self, x: Tensor, start: float, stop: float) -> Tensor:
        for clock in (start, stop):
            if clock not in self.known:
                last, w = max(
                    self.known.items(), key=lambda item: item[0], default=(0.0, torch.zeros_like(x))
                )
                self.known[clock] = w + math.sqrt(clock - last) * self.draw(x, 0)
        return (self.known[stop] - self.known[start]) / math.sqrt(stop - start)


def random(sampler: str, seed: int) -> dict[str, Any]:
    """The noise that a stochastic solver asks for."""
    return {"path": Walk(seed)} if sampler in PATHS else {"noise": randn(seed)}


@pytest.mark.parametrize("case", STOCHASTIC)
@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_stochastic_solvers_keep_the_moments(case: str, schedule: Schedule) -> None:
    """4000 samples by 200 steps: mean, variance and share left of zero are the mixture's, within 4 standard
    errors."""
    n, (sampler, options) = 4000, STOCHASTIC[case]
    grid = time_grid(schedule, 200, "log_snr", **within(schedule, "log_snr"))
    generator = torch.Generator().manual_seed(1)
    start = grid[0].alpha * MIXTURE.sample(n, generator) + grid[0].sigma * torch.randn(
        n, 1, generator=generator, dtype=F64
    )
    x = last(SAMPLERS[sampler](MIXTURE, start, grid, **random(sampler, 2), **options))[:, 0]
    mean = (WEIGHT * MEAN[:, 0]).sum()
    expected = {
        "mean": (x, mean),
        "variance": ((x - mean).square(), (WEIGHT * (STD**2 + (MEAN[:, 0] - mean) ** 2)).sum()),
        "left": ((x < 0).to(F64), (WEIGHT * torch.special.ndtr(-MEAN[:, 0] / STD)).sum()),
    }
    for name, (values, truth) in expected.items():
        assert abs(float(values.mean() - truth)) < 4 * float(values.std()) / math.sqrt(n), name
