"""The third-order multistep formula as it is published takes half of the parabola's second derivative, and
converges at order 2.

DPM-Solver++(3M) in diffusers and 3M SDE in k-diffusion multiply a second divided difference, which is f''/2,
by the coefficient that belongs to f''. (The single-step solver of diffusers, in the same words, has the
factor 2.) Proved twice: by an x0 that is a parabola in lambda, which a method of order 3 integrates exactly,
and by measured order on a mixture whose exact trajectories are quantiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import NONE, Condition, Estimate, Grid, Level, NoiseLevel, time_grid
from eval.bench.convergence import MIXTURE
from samplers import SAMPLERS
from tests.peers import diffusers, k_sampling
from tests.samplers.parity import F64, NOISE, VP

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what the peers make of NumPy

# A parabola in lambda: exact, step by step ------------------------------------------------------------------

A, B, C = 0.7, -0.4, 0.3


def parabola(lambda_: float) -> float:
    return A + B * lambda_ + C * lambda_**2


def denoiser(x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
    """x0 follows the parabola, whatever x is."""
    assert isinstance(level, NoiseLevel)
    return Estimate.from_x0(x_t, torch.full_like(x_t, parabola(level.half_log_snr)), level)


def exact_step(x: Tensor, t: NoiseLevel, s: NoiseLevel, eta: float) -> Tensor:
    """The mean of x_s: alpha (p - p'/a + p''/a^2) with a = 1 + eta solves the equation, and what x differs
    from that by decays."""
    a = 1 + eta
    kept = s.sigma / t.sigma * (s.ratio / t.ratio) ** eta

    def particular(level: NoiseLevel) -> float:
        lambda_ = level.half_log_snr
        return level.alpha * (parabola(lambda_) - (B + 2 * C * lambda_) / a + 2 * C / a**2)

    return particular(s) + kept * (x - particular(t))


def phi_3(h: float) -> float:
    """integral_0^1 h e^{-h (1 - v)} v^2 / 2 dv, the coefficient of f'' over a step of length 1."""
    return 0.5 - (1 + math.expm1(-h) / h) / h


def missing(steps: Sequence[Tensor], grid: Grid, eta: float) -> list[tuple[Tensor, float]]:
    """What each step from the third on lacks of the exact one in units of alpha_s f''/2 h^2, with its
    phi_3."""
    found = []
    for x, x_s, (t, s) in list(zip(steps, steps[1:], pairwise(grid), strict=False))[2:]:
        h = s.half_log_snr - t.half_log_snr
        found.append(((exact_step(x, t, s, eta) - x_s) / (s.alpha * C * h**2), phi_3((1 + eta) * h)))
    return found


GRID = time_grid(VP, 10, "karras")[:-1]


@pytest.mark.parametrize(
    ("sampler", "options", "eta"),
    [("dpmpp_3m", {}, 0.0), *(("dpmpp_3m_sde", {"eta": e}, e) for e in (0.0, 0.4, 1.0))],
)
def test_ours_is_exact(sampler: str, options: dict[str, Any], eta: float) -> None:
    """From the third step on, with noise held at zero, to 1e-10 of f''/2 h^2."""
    quiet = {"path": lambda x, start, stop: torch.zeros_like(x)} if eta else {}
    start = GRID.start(NOISE)
    steps = [start, *(step.x for step in SAMPLERS[sampler](denoiser, start, GRID, **options, **quiet))]
    for error, _ in missing(steps, GRID, eta):
        torch.testing.assert_close(error, torch.zeros_like(error), rtol=0, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_k_diffusion_takes_half(eta: float) -> None:
    """Each of its steps lacks phi_3 f''/2 h^2, exactly as much as it takes."""
    steps: list[Tensor] = []
    end = k_sampling().sample_dpmpp_3m_sde(
        lambda y, sigma: torch.full_like(y, parabola(-math.log(sigma[0]))), GRID.start(NOISE) / GRID[0].alpha,
        torch.tensor([level.ratio for level in GRID], dtype=F64), eta=eta, noise_sampler=lambda a,
        b: torch.zeros_like(NOISE),
        callback=lambda info: steps.append(info["x"]), disable=True,
    )  # fmt: skip
    steps = [y * level.alpha for y, level in zip([*steps, end], GRID, strict=True)]
    for error, phi in missing(steps, GRID, eta):
        torch.testing.assert_close(error, torch.full_like(error, phi), rtol=0, atol=1e-10)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_diffusers_takes_half_and_in_its_sde_the_wrong_sign(
    exactly: Callable[[Any], Any], algorithm: str
) -> None:
    """The ODE lacks phi_3 f''/2 h^2. The SDE counts phi_3 - 1 where 2 phi_3 is right, a number that does not
    shrink with the step."""
    peer = exactly(diffusers.DPMSolverMultistepScheduler)(
        solver_order=3, algorithm_type=algorithm, lower_order_final=False, prediction_type="sample"
    )
    peer.set_timesteps(GRID.steps)
    peer.sigmas = torch.tensor([level.ratio for level in GRID], dtype=F64)
    steps, noise = [GRID.start(NOISE)], torch.zeros_like(NOISE)
    for t, level in zip(peer.timesteps, GRID, strict=False):
        x0 = torch.full_like(NOISE, parabola(level.half_log_snr))
        steps.append(peer.step(x0, t, steps[-1], variance_noise=noise).prev_sample)
    eta = 1.0 if algorithm.startswith("sde") else 0.0
    for error, phi in missing(steps[:-1], GRID, eta):
        expected = phi + 1 if eta else phi
        torch.testing.assert_close(error, torch.full_like(error, expected), rtol=0, atol=1e-10)


# A mixture: measured order ----------------------------------------------------------------------------------

U = torch.linspace(0.02, 0.98, 25, dtype=F64)
STEPS = (200, 400, 800)


def grid_of(steps: int) -> Grid:
    return time_grid(VP, steps, "log_snr")[:-1]


def order(ends: Sequence[Tensor]) -> list[float]:
    """log2 of the ratio of errors, each time the steps double."""
    error = [
        float((x - MIXTURE.quantile(U, grid_of(steps)[-1])).abs().mean())
        for x, steps in zip(ends, STEPS, strict=True)
    ]
    return [math.log2(a / b) for a, b in pairwise(error)]


def mixture(y: Tensor, sigma: float) -> Tensor:
    """x0 at y = x / alpha."""
    alpha = 1 / math.hypot(1, sigma)
    return MIXTURE(alpha * y, NoiseLevel(0.0, alpha, sigma * alpha)).x0


def third_order(y: Tensor, lambdas: Sequence[float], x0s: Sequence[Tensor], factor: float) -> Tensor:
    """The published step, from the last three estimates; lambdas are theirs and its end's. The second
    difference counts `factor`-fold."""
    h_2, h_1, h = (b - a for a, b in pairwise(lambdas))
    r_0, r_1 = h_1 / h, h_2 / h
    d1_0, d1_1 = (x0s[2] - x0s[1]) / r_0, (x0s[1] - x0s[0]) / r_1
    d1, d2 = d1_0 + (d1_0 - d1_1) * r_0 / (r_0 + r_1), (d1_0 - d1_1) / (r_0 + r_1)
    phi_2 = math.expm1(-h) / h + 1
    return math.exp(-h) * y - math.expm1(-h) * x0s[2] + phi_2 * d1 + factor * phi_3(h) * d2


def from_exact_start(grid: Grid, factor: float) -> Tensor:
    """That formula over a grid, its first two estimates and the third's x taken from the exact trajectory."""
    lambdas = [level.half_log_snr for level in grid]
    ys = [MIXTURE.quantile(U, level) / level.alpha for level in grid.levels[:3]]
    x0s = [mixture(y, level.ratio) for y, level in zip(ys, grid, strict=False)]
    y = ys[2]
    for i in range(2, grid.steps):
        y = third_order(y, lambdas[i - 2 : i + 2], x0s[-3:], factor)
        x0s.append(mixture(y, grid[i + 1].ratio))
    return y * grid[-1].alpha


def k_diffusion(grid: Grid, **options: Any) -> Tensor:
    sigmas = torch.tensor([level.ratio for level in grid], dtype=F64)
    start = MIXTURE.quantile(U, grid[0]) / grid[0].alpha
    model = lambda y, sigma: mixture(y, float(sigma[0]))  # noqa: E731
    return k_sampling().sample_dpmpp_3m_sde(
        model, start, sigmas, eta=0.0, noise_sampler=len, disable=True, **options
    )


def test_the_formula_is_k_diffusions() -> None:
    """With factor 1 it makes the peer's steps, to 1e-13."""
    grid = grid_of(20)
    seen: list[dict[str, Any]] = []
    k_diffusion(grid, callback=seen.append)
    lambdas = [level.half_log_snr for level in grid]
    for i in range(2, grid.steps - 1):
        y = third_order(
            seen[i]["x"], lambdas[i - 2 : i + 2], [info["denoised"] for info in seen[i - 2 : i + 1]], 1.0
        )
        torch.testing.assert_close(y, seen[i + 1]["x"], rtol=1e-13, atol=1e-13)


def test_published_order() -> None:
    """k-diffusion's converges at order 2, and so does its formula started exactly: it is not the start. With
    the factor 2: order 3.

    At 800 steps that is an error of 1e-6 against 2e-8.
    """
    assert order(
        [k_diffusion(grid_of(steps)) * grid_of(steps)[-1].alpha for steps in STEPS]
    ) == pytest.approx([2, 2], abs=0.05)
    assert order([from_exact_start(grid_of(steps), 1.0) for steps in STEPS]) == pytest.approx(
        [2, 2], abs=0.05
    )
    assert order([from_exact_start(grid_of(steps), 2.0) for steps in STEPS]) == pytest.approx(
        [3, 3], abs=0.05
    )


def test_our_order() -> None:
    """Ours, which starts by itself, converges at order 3."""
    ends = []
    for steps in STEPS:
        *_, last = SAMPLERS["dpmpp_3m"](MIXTURE, MIXTURE.quantile(U, grid_of(steps)[0]), grid_of(steps))
        ends.append(last.x)
    assert order(ends) == pytest.approx([3, 3], abs=0.05)
