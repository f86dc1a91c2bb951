"""Every solver against closed forms: exact trajectories, measured orders of convergence, moments, and the contract of a solver."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion import (
    EPS,
    PREDICTIONS,
    SPACINGS,
    BrownianPath,
    ClassifierFreeGuidance,
    Clipped,
    CosineVP,
    Denoiser,
    DenoiserLike,
    DiscreteVP,
    Estimate,
    Grid,
    Level,
    Noise,
    NoiseLevel,
    Prediction,
    RectifiedFlow,
    Schedule,
    SeededNoise,
    V,
    VarianceExploding,
    betas,
    initial_noise,
    time_grid,
)
from diffusion.oracle import GaussianMixture, PointMass
from samplers import SAMPLERS, Step, sample
from tests.conftest import within

F64 = torch.float64
VP, FLOW = DiscreteVP.scaled_linear(), RectifiedFlow()

# Point mass: the exact trajectory --------------------------------------------------------------------------------------

Rule = Callable[[NoiseLevel, NoiseLevel, Grid], float]
"""(t, s, grid) -> p: x_s holds the noise p eps + sqrt(1 - p^2) z, given the noise eps in x_t and fresh noise z."""


def kept(t: NoiseLevel, s: NoiseLevel, grid: Grid) -> float:
    """Deterministic solvers: on the exact trajectory the noise never changes."""
    return 1.0


def renewed(share: float) -> Rule:
    """DDIM-eta and, at share 1, DDPM: part of tau, from the ratios themselves, is replaced."""
    return lambda t, s, grid: math.sqrt(1 - share * (1 - (s.ratio / t.ratio) ** 2))


def decayed(eta: float) -> Rule:
    """The reverse SDE: noise dies as (sigma/alpha)^eta."""
    return lambda t, s, grid: (s.ratio / t.ratio) ** eta


def turned(diffusion: float) -> Rule:
    """The SDE of a flow model: noise dies as a power of flow time."""
    return lambda t, s, grid: (flow_time(s) / flow_time(t)) ** (diffusion / 2)


def churned(churn: float) -> Rule:
    """EDM: noise is raised first, where the schedule has more."""

    def rule(t: NoiseLevel, s: NoiseLevel, grid: Grid) -> float:
        raised = 1 + min(churn / grid.steps, math.sqrt(2) - 1)
        return 1 / raised if t.ratio * raised <= float(grid.schedule.ratio(grid.schedule.t_max)) and t.alpha > 0 else 1.0

    return rule


def fresh(t: NoiseLevel, s: NoiseLevel, grid: Grid) -> float:
    """Multistep consistency sampling: all noise is replaced."""
    return 0.0


def flow_time(level: NoiseLevel) -> float:
    return level.sigma / (level.alpha + level.sigma)


# Any solver not named here is taken for a deterministic one, and has to follow the exact trajectory.
DISTINCT_SAMPLERS = list({solver: name for name, solver in reversed(SAMPLERS.items())}.values())[::-1]  # "lcm" is `consistency` again
CASES: dict[str, tuple[str, dict[str, Any], Rule]] = {
    **{name: (name, {}, kept) for name in DISTINCT_SAMPLERS},
    "heun-ratio": ("heun", {"coordinate": "ratio"}, kept),
    "ddim-0.6": ("ddim", {"eta": 0.6}, renewed(0.36)),
    "ddpm": ("ddpm", {}, renewed(1.0)),
    "euler_ancestral": ("euler_ancestral", {}, renewed(1.0)),
    "dpmpp_sde": ("dpmpp_sde", {}, decayed(1.0)),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {}, decayed(1.0)),
    "dpmpp_3m_sde": ("dpmpp_3m_sde", {}, decayed(1.0)),
    "dpmpp_3m_sde-0.4": ("dpmpp_3m_sde", {"eta": 0.4}, decayed(0.4)),
    "sit_sde": ("sit_sde", {}, turned(1.0)),
    "sit_sde-2.5": ("sit_sde", {"diffusion": 2.5}, turned(2.5)),
    "edm": ("edm", {}, churned(40.0)),
    "consistency": ("consistency", {}, fresh),
}
PATHS = [name for name, solver in SAMPLERS.items() if "path" in inspect.signature(solver).parameters]
SHAPE = (1, 2, 2)
DISTINCT = {function: name for name, function in SPACINGS.items()}.values()  # each spacing once, by one of its names
STEPS = (1, 2, 3, 7, 13, 50)


@lru_cache(10_000)
def level_at(schedule: Schedule, time: float) -> NoiseLevel:
    return schedule.level(time)


def fake(x0: Tensor, schedule: Schedule, prediction: Prediction, grid: Grid) -> Denoiser:
    """A perfect network for data that is one point: it finds its level by the time it is told."""
    oracle, levels = PointMass(x0), {level.t: level for level in grid}

    def network(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        time = float(t[0])
        level = levels[time] if time in levels else level_at(schedule, time)  # some solvers ask between two rows
        x0, eps = oracle(x, level)
        return prediction.target(x0, eps, level)

    return Denoiser(network, schedule, prediction)


@cache
def noise_in(case: str, grid: Grid) -> Tensor:
    """What each exact x is made of: its share of x0, of the first noise and of z, and max(1, sigma), (4, steps, 1, 1, 1, 1)."""
    rows, of_eps, of_z = [], 1.0, 0.0
    for i, (t, s) in enumerate(pairwise(grid)):
        p = CASES[case][2](t, s, grid)
        of_eps, of_z = p * of_eps, p * of_z + math.sqrt((1 - p) * (1 + p)) * math.cos(i)
        rows.append((s.alpha, s.sigma * of_eps, s.sigma * of_z, max(1.0, s.sigma)))
    return torch.tensor(rows, dtype=F64).T[..., None, None, None, None]


Z, START = initial_noise(range(10), SHAPE, F64), initial_noise(range(10, 20), SHAPE, F64)


def known_noise(case: str, grid: Grid, z: Tensor) -> dict[str, Any]:
    """The options of a case, with cos(i) z for the noise of step i; a path tells the step by the clock, which rises with it."""
    sampler, options, rule = CASES[case]
    if rule is kept:
        return options
    if sampler not in PATHS:
        return {**options, "noise": lambda x, i: z * math.cos(i)}

    starts: list[float] = []

    def path(x: Tensor, start: float, stop: float) -> Tensor:
        """Half a step comes before the whole one that starts where it starts."""
        starts.extend([start] if start not in starts[-1:] else [])
        return z * math.cos(len(starts) - 1)

    return {**options, "path": path}


def looking_ahead(r: Callable[[NoiseLevel], float]) -> Callable[[Grid], float]:
    """A slope measured near the end of a step is a difference divided by r_s, and may be followed for a way as long as r_t."""
    return lambda grid: max((r(t) / r(s) for t, s in pairwise(grid) if t.alpha > 0 and s.sigma > 0), default=1.0)


def extrapolating(degree: int) -> Callable[[Grid], float]:
    """The polynomial through the last estimates holds, at the end of a step, sum_j |l_j| times their rounding (Lebesgue's constant)."""

    def lebesgue(grid: Grid) -> float:
        lambdas = [level.half_log_snr for level in grid if level.alpha > 0 and level.sigma > 0]
        if degree == 2 and len(lambdas) > 2:
            lambdas.insert(1, (lambdas[0] + lambdas[1]) / 2)  # the look ahead of the first step
        runs = [lambdas[i : i + degree + 2] for i in range(len(lambdas) - degree - 1)]
        return max((sum(abs(at_end(nodes, j, end)) for j in range(len(nodes))) for *nodes, end in runs), default=1.0)

    def at_end(nodes: list[float], j: int, end: float) -> float:
        return math.prod((end - other) / (nodes[j] - other) for k, other in enumerate(nodes) if k != j)

    return lebesgue


# How many times a solver's own arithmetic enlarges rounding, where it does.
ENLARGES: dict[str, Callable[[Grid], float]] = {
    "heun": looking_ahead(flow_time),
    "heun-ratio": looking_ahead(lambda level: level.ratio),
    "dpm2": looking_ahead(lambda level: level.ratio),
    "edm": lambda grid: math.sqrt(2) * looking_ahead(lambda level: level.ratio)(grid),
    "rk4": looking_ahead(flow_time),
    "dpmpp_2m": extrapolating(1),
    "dpmpp_3m": extrapolating(2),
    "dpmpp_3m_sde": extrapolating(2),
}


@cache
def bound(case: str, grid: Grid) -> float:
    """The error that rounding excuses: 1e-12, times what the solver makes of it."""
    return 1e-12 * (ENLARGES.get(case) or ENLARGES.get(CASES[case][0], lambda grid: 1.0))(grid)


def worst_error(case: str, denoiser: DenoiserLike, x0: Tensor, grid: Grid) -> float:
    """The largest distance from the exact trajectory over all steps, in units of max(1, sigma)."""
    z, x = Z[: len(x0)], grid.start(START[: len(x0)])
    reached = torch.stack([step.x for step in SAMPLERS[CASES[case][0]](denoiser, x, grid, **known_noise(case, grid, z))])
    alpha, of_eps, of_z, unit = noise_in(case, grid)
    exact = alpha * x0 + of_eps * ((x - grid[0].alpha * x0) / grid[0].sigma) + of_z * z
    return float(((reached - exact).abs() / unit).max())


@cache
def grid_of(schedule: Schedule, steps: int, spacing: str, *, below_pure_noise: bool) -> Grid:
    """A grid of that spacing, and where asked one level short of pure noise, at which eps-prediction is singular."""
    grid = time_grid(schedule, steps, spacing, **within(schedule, spacing))
    if below_pure_noise and grid[0].alpha == 0:
        return time_grid(schedule, max(2, steps), spacing, **within(schedule, spacing))[1:]
    return grid


def side_by_side(*predictions: Prediction) -> Prediction:
    """A batch whose sample i has the i-th prediction: one run proves them all, and none can lean on another."""

    @cache
    def coefficients(level: Level) -> tuple[Tensor, Tensor]:
        a, b = zip(*(prediction.coefficients(level) for prediction in predictions), strict=True)
        return torch.tensor(a, dtype=F64), torch.tensor(b, dtype=F64)

    return Prediction("rows", coefficients)


EVERY = list(PREDICTIONS.values())
AT_PURE_NOISE = [prediction for prediction in EVERY if prediction is not EPS]
ALL, FINITE = side_by_side(*EVERY), side_by_side(*AT_PURE_NOISE)
ALL_TWICE, FINITE_TWICE = side_by_side(*EVERY, *EVERY), side_by_side(*AT_PURE_NOISE, *AT_PURE_NOISE)
N = len(PREDICTIONS)


def grids(schedule: Schedule, spacing: str, steps: int) -> Iterator[tuple[Grid, Prediction, int]]:
    """Each grid with the predictions that it suits and their number: eps-prediction starts below pure noise."""
    grid, below = (grid_of(schedule, steps, spacing, below_pure_noise=below) for below in (False, True))
    if grid is below:
        yield grid, ALL, N
    else:
        yield grid, FINITE, N - 1
        yield below, EPS, 1


@pytest.mark.parametrize("case", CASES)
def test_point_mass_is_exact(case: str, schedule: Schedule) -> None:
    """Every solver x schedule x prediction x spacing x steps follows the exact trajectory to 1e-12."""
    with torch.inference_mode():
        for spacing, steps in product(DISTINCT, STEPS):
            for grid, prediction, n in grids(schedule, spacing, steps):
                x0 = initial_noise(range(20, 20 + n), SHAPE, F64)
                error = worst_error(case, fake(x0, schedule, prediction, grid), x0, grid)
                assert error <= bound(case, grid), (spacing, steps, prediction.name)


@pytest.mark.parametrize("case", CASES)
def test_guided_point_masses_are_exact(case: str, schedule: Schedule) -> None:
    """Guidance between two points is a third point: the same product, guided, follows the exact trajectory of that one.

    Rounding grows as guidance stretches it: scale 3 takes 3 times one estimate less 2 times the other.
    """
    with torch.inference_mode():
        for spacing, steps in product(DISTINCT, (1, 2, 13)):
            for grid, prediction, n in grids(schedule, spacing, steps):
                both = initial_noise(range(20, 20 + 2 * n), SHAPE, F64)
                network = fake(both, schedule, twice(prediction), grid)
                denoiser = partial(ClassifierFreeGuidance(network, 3.0, {"label": 0}), label=torch.ones(n))
                error = worst_error(case, denoiser, both[n:] + 3 * (both[:n] - both[n:]), grid)
                assert error <= (3 + 2) * bound(case, grid), (spacing, steps, prediction.name)


def twice(prediction: Prediction) -> Prediction:
    """For a doubled batch."""
    return {ALL: ALL_TWICE, FINITE: FINITE_TWICE}.get(prediction, prediction)


@pytest.mark.parametrize("case", DISTINCT_SAMPLERS)
@pytest.mark.parametrize(("schedule", "spacings"), [(VP, ["linspace", "trailing", "leading", "karras"]), (FLOW, ["linspace"])])
def test_point_mass_is_exact_on_long_grids(case: str, schedule: Schedule, spacings: list[str]) -> None:
    """The same at 999 and 1000 steps on the table of 1000 rows and on flow time."""
    x0 = initial_noise(range(20, 20 + N), SHAPE, F64)
    with torch.inference_mode():
        for spacing, steps in product(spacings, (999, 1000)):
            grid = grid_of(schedule, steps, spacing, below_pure_noise=True)
            assert worst_error(case, fake(x0, schedule, ALL, grid), x0, grid) <= bound(case, grid), (spacing, steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", [CosineVP(), FLOW, DiscreteVP.linear(zero_terminal_snr=True)])
def test_eps_prediction_raises_at_pure_noise(sampler: str, schedule: Schedule) -> None:
    """An eps-network says nothing of x0 where there is no signal: an error, not a clamp."""
    grid = time_grid(schedule, 4, "trailing")
    with pytest.raises(ValueError, match="eps-prediction says nothing about x0"):
        sample(sampler, fake(torch.zeros(SHAPE), schedule, EPS, grid), grid, shape=SHAPE, seeds=[0])


# Gaussian mixture: convergence and moments -----------------------------------------------------------------------------

MEAN, STD, WEIGHT = (torch.tensor(v, dtype=F64) for v in ([[-1.3], [0.4], [1.7]], [0.25, 0.4, 0.2], [0.3, 0.5, 0.2]))
MIXTURE = GaussianMixture(MEAN, STD, WEIGHT)
ORDER, STRONG_ORDER = (
    {name: int(found[1]) for name, solver in SAMPLERS.items() if (found := re.search(rf"{said} (\d)", solver.__doc__ or ""))}
    for said in ("Order", "Strong order")
)


def quantile(u: Tensor, level: NoiseLevel) -> Tensor:
    """x_t (N, 1) at which the noised mixture's distribution function is u, by bisection to the last bits."""
    mean, std = level.alpha * MEAN[:, 0], (level.alpha**2 * STD**2 + level.sigma**2).sqrt()
    low, high = torch.full_like(u, -20.0), torch.full_like(u, 20.0)
    for _ in range(70):
        middle = 0.5 * (low + high)
        below = (WEIGHT * torch.special.ndtr((middle[:, None] - mean) / std)).sum(1) < u
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low[:, None]


def last(steps: Iterator[Step]) -> Tensor:
    """x after the last step."""
    *_, step = steps
    return step.x


def test_deterministic_solvers_state_their_order() -> None:
    """A solver without noise says "Order N" in its docstring, one on a Brownian path "Strong order N"; the next tests measure it."""
    options = {name: set(inspect.signature(solver).parameters) for name, solver in SAMPLERS.items()}
    assert all(name in ORDER for name, taken in options.items() if not {"noise", "path"} & taken)
    assert set(PATHS) == set(STRONG_ORDER)
    assert ORDER == {"ddim": 1, "euler": 1, "heun": 2, "dpm2": 2, "rk4": 4, "dpmpp_2s": 2, "dpmpp_2m": 2, "dpmpp_3m": 3, "unipc": 3}


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

    The probability-flow ODE in one dimension keeps quantiles, so the exact answer is a quantile: no reference run is needed.
    Grids uniform in t stay off both ends, where a step in log-SNR is never short and solvers in it show their order late.
    """
    u = torch.linspace(0.02, 0.98, 25, dtype=F64)
    error = []
    for steps in (400, 800):
        grid = time_grid(schedule, steps, spacing, **ends)[:-1]
        x = last(SAMPLERS[sampler](MIXTURE, quantile(u, grid[0]), grid, **options))
        error.append(float((x - quantile(u, grid[-1])).abs().mean()))
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.05)


def test_unipc_of_order_3_is_better_than_its_start() -> None:
    """Its single first steps leave order 3; what they cost is so little that more shows."""
    u, error = torch.linspace(0.02, 0.98, 25, dtype=F64), []
    for steps in (100, 200):
        grid = time_grid(VP, steps, "log_snr")[:-1]
        runs = [last(SAMPLERS["unipc"](MIXTURE, quantile(u, grid[0]), grid, order=order)) for order in (2, 3)]
        error.append([float((x - quantile(u, grid[-1])).abs().mean()) for x in runs])
    assert math.log2(error[0][1] / error[1][1]) > 3.5
    assert error[1][1] < error[1][0] / 10


GENTLE = GaussianMixture(torch.tensor([[-0.6], [0.7]], dtype=F64), torch.tensor([0.5, 0.4], dtype=F64))


def each_number(x_t: Tensor, level: Level, /, **cond: Any) -> Estimate:
    """A mixture's denoiser for samples whose every number is a draw of its own."""
    x0, eps = GENTLE(x_t.reshape(-1, 1), level)
    return Estimate(x0.view_as(x_t), eps.view_as(x_t))


@pytest.mark.parametrize("sampler", STRONG_ORDER)
@pytest.mark.parametrize(("schedule", "ends"), [(VP, {"t_end": 20}), (FLOW, {"t_start": 0.98, "t_end": 0.02})], ids=["vp", "flow"])
def test_refining_the_steps_refines_the_sample(sampler: str, schedule: Schedule, ends: dict[str, Any]) -> None:
    """Each seed has one Brownian path, so that twice the steps bring every sample nearer to its own limit, at the stated strong order."""
    start, found = initial_noise(range(4), (1000,), F64), []
    for steps in (64, 128, 256):
        grid = time_grid(schedule, steps + 1, "log_snr", **ends)[:-1]
        found.append(last(SAMPLERS[sampler](each_number, grid.start(start), grid, path=BrownianPath(range(4)))))
    moved = [float((a - b).square().mean().sqrt()) for a, b in pairwise(found)]
    assert moved[0] < 0.05
    assert math.log2(moved[0] / moved[1]) == pytest.approx(STRONG_ORDER[sampler], abs=0.1)


def test_noise_without_a_path_does_not_refine() -> None:
    """The test above notices: with noise of their own for every step, samples end as far apart at any number of steps."""
    start, found = initial_noise(range(4), (1000,), F64), []
    for steps in (64, 128, 256):
        draw = randn(steps)
        grid = time_grid(VP, steps + 1, "log_snr")[:-1]
        found.append(last(SAMPLERS["dpmpp_2m_sde"](each_number, grid.start(start), grid, path=lambda x, a, b: draw(x, 0))))  # noqa: B023
    moved = [float((a - b).square().mean().sqrt()) for a, b in pairwise(found)]
    assert min(moved) > 0.4


def test_sit_is_the_published_sde() -> None:
    """Ma et al. 2024: du = [v - w/2 score] dr backwards + sqrt(w) dW with w = c r. A short step agrees to the order of its square."""
    z, gaps = initial_noise(range(4), (8,), F64), []
    for dr in (1e-3, 5e-4):
        t, s = FLOW.level(0.6), FLOW.level(0.6 - dr)
        u, w = initial_noise(range(4, 8), (8,), F64), 1.7 * t.sigma
        x0, eps = each_number(u, t)
        score = -eps / t.sigma
        maruyama = u - dr * (eps - x0) + 0.5 * w * dr * score + math.sqrt(w * dr) * z
        ours = last(SAMPLERS["sit_sde"](each_number, u, Grid((t, s), 1.0, FLOW), diffusion=1.7, path=lambda x, a, b: z))
        gaps.append(float((ours - maruyama).abs().max()))
    assert gaps[0] < 3e-4
    assert gaps[1] < gaps[0] / 2.5


def test_ddim_is_euler(schedule: Schedule) -> None:
    """A DDIM step is an Euler step in flow time, and one in sigma/alpha, on every schedule: to 1e-12 of max(1, sigma)."""
    grid = time_grid(schedule, 20, "trailing")
    x = ratio_x = grid.start(initial_noise(range(4), (1,), F64))
    for ddim, euler in zip(SAMPLERS["ddim"](MIXTURE, x, grid), SAMPLERS["euler"](MIXTURE, x, grid), strict=True):
        t, s = grid[ddim.i], ddim.level
        torch.testing.assert_close(ddim.x, euler.x, rtol=0, atol=1e-12 * max(1, s.sigma))
        if t.alpha > 0:  # k-diffusion's coordinates: y = x / alpha, dy/d(sigma/alpha) = (y - x0) / (sigma/alpha)
            y = ratio_x / t.alpha
            y = y + (s.ratio - t.ratio) * (y - MIXTURE(ratio_x, t).x0) / t.ratio
            torch.testing.assert_close(ddim.x, s.alpha * y, rtol=0, atol=1e-12 * max(1, s.sigma))
        ratio_x = ddim.x


STOCHASTIC = {
    "ddpm": ("ddpm", {}),
    "ddim-1": ("ddim", {"eta": 1.0}),
    "ddim-0.5": ("ddim", {"eta": 0.5}),
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
    """A Brownian motion that is asked forwards only: quicker than a seed per sample where samples are many."""

    def __init__(self, seed: int) -> None:
        self.draw = randn(seed)
        self.known: dict[float, Tensor] = {}

    def __call__(self, x: Tensor, start: float, stop: float) -> Tensor:
        for clock in (start, stop):
            if clock not in self.known:
                last, w = max(self.known.items(), key=lambda item: item[0], default=(0.0, torch.zeros_like(x)))
                self.known[clock] = w + math.sqrt(clock - last) * self.draw(x, 0)
        return (self.known[stop] - self.known[start]) / math.sqrt(stop - start)


def random(sampler: str, seed: int) -> dict[str, Any]:
    """The noise that a stochastic solver asks for."""
    return {"path": Walk(seed)} if sampler in PATHS else {"noise": randn(seed)}


@pytest.mark.parametrize("case", STOCHASTIC)
@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_stochastic_solvers_keep_the_moments(case: str, schedule: Schedule) -> None:
    """4000 samples by 200 steps: mean, variance and share left of zero are the mixture's, within 4 standard errors."""
    n, (sampler, options) = 4000, STOCHASTIC[case]
    grid = time_grid(schedule, 200, "log_snr", **within(schedule, "log_snr"))
    generator = torch.Generator().manual_seed(1)
    start = grid[0].alpha * MIXTURE.sample(n, generator) + grid[0].sigma * torch.randn(n, 1, generator=generator, dtype=F64)
    x = last(SAMPLERS[sampler](MIXTURE, start, grid, **random(sampler, 2), **options))[:, 0]
    mean = (WEIGHT * MEAN[:, 0]).sum()
    expected = {
        "mean": (x, mean),
        "variance": ((x - mean).square(), (WEIGHT * (STD**2 + (MEAN[:, 0] - mean) ** 2)).sum()),
        "left": ((x < 0).to(F64), (WEIGHT * torch.special.ndtr(-MEAN[:, 0] / STD)).sum()),
    }
    for name, (values, truth) in expected.items():
        assert abs(float(values.mean() - truth)) < 4 * float(values.std()) / math.sqrt(n), name


def test_ddim_with_eta_one_is_ddpm(schedule: Schedule) -> None:
    """Song et al. 2021, section 4.1: the two are the same sampler, for the same noise, step by step to 1e-12 of max(1, sigma)."""
    grid = time_grid(schedule, 12, "trailing")
    x, noise = grid.start(initial_noise(range(4), (1,), F64)), SeededNoise(range(4))
    pairs = zip(SAMPLERS["ddim"](MIXTURE, x, grid, eta=1.0, noise=noise), SAMPLERS["ddpm"](MIXTURE, x, grid, noise=noise), strict=True)
    for ddim, ddpm in pairs:
        torch.testing.assert_close(ddim.x, ddpm.x, rtol=0, atol=1e-12 * max(1, ddim.level.sigma))


@pytest.mark.parametrize("row", [1, 10, 999])
@pytest.mark.parametrize(("variance", "v"), [("posterior", None), ("upper", None), ("learned", -1.0), ("learned", 1.0), ("learned", 0.3)])
def test_ddpm_variances_are_the_published_ones(row: int, variance: str, v: float | None) -> None:
    """One step between rows adds noise of variance beta-tilde, beta, or exp(w log beta + (1 - w) log beta-tilde), w = (v + 1) / 2."""
    beta, bar = betas.linear(), betas.alpha_bar(betas.linear())
    low, high = float((1 - bar[row - 1]) / (1 - bar[row]) * beta[row]), float(beta[row])
    w = {"posterior": 0.0, "upper": 1.0}.get(variance, ((v or 0.0) + 1) / 2)
    expected = math.exp(w * math.log(high) + (1 - w) * math.log(low))

    def denoiser(x_t: Tensor, level: Level, /, **cond: Any) -> Estimate:
        return Estimate(x_t.sin(), x_t, None if v is None else torch.full_like(x_t, v))

    grid = time_grid(DiscreteVP.linear(), spacing=[row, row - 1])[:2]
    x = initial_noise([0, 1], SHAPE, F64)
    quiet = last(SAMPLERS["ddpm"](denoiser, x, grid, variance=variance, noise=lambda x, i: torch.zeros_like(x)))
    loud = last(SAMPLERS["ddpm"](denoiser, x, grid, variance=variance, noise=lambda x, i: torch.ones_like(x)))
    torch.testing.assert_close((loud - quiet).square(), torch.full_like(x, expected), rtol=1e-9, atol=0)


def test_upper_variance_is_exact_for_white_data() -> None:
    """Ho et al. 2020, section 3.2: for N(0, 1) data on VP, x_s = c x_t + sqrt(1 - c^2) z, c = alpha_t / alpha_s, at any stride."""
    white = GaussianMixture(torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64))
    grid, x, z = time_grid(CosineVP(), 7), initial_noise(range(3), (1,), F64), initial_noise(range(3, 6), (1,), F64)
    for step in SAMPLERS["ddpm"](white, x, grid[:-1], variance="upper", noise=lambda x, i: z):
        c = grid[step.i].alpha / step.level.alpha
        x = c * x + math.sqrt(1 - c**2) * z
        torch.testing.assert_close(step.x, x, rtol=0, atol=1e-13)


# Samples, batches, and the contract ------------------------------------------------------------------------------------

IMAGES = GaussianMixture(initial_noise([1, 2, 3], SHAPE, F64), STD, WEIGHT)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_know_its_batch(sampler: str, schedule: Schedule) -> None:
    """Sample i of a batch of 4 is its seed alone: noise to the last bit, images to float tolerance."""
    grid, seeds, starts = time_grid(schedule, 6, "trailing"), [11, 3, 11, 8], []

    def denoiser(x_t: Tensor, level: Level, /, **cond: Any) -> Estimate:
        if level == grid[0]:
            starts.append(x_t)
        return IMAGES(x_t, level)

    together = sample(sampler, denoiser, grid, shape=SHAPE, seeds=seeds)
    alone = torch.cat([sample(sampler, denoiser, grid, shape=SHAPE, seeds=[seed]) for seed in seeds])
    assert torch.equal(starts[0], torch.cat(starts[1:]))
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(together[0], together[2], rtol=0, atol=2e-6)
    assert float((together[0] - together[1]).abs().max()) > 1e-2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_solver_is_a_generator_of_steps(sampler: str, schedule: Schedule) -> None:
    """It calls the network only when asked, yields one Step per row, ends at the terminal row, and leaves its start alone."""
    calls, grid = [], time_grid(schedule, 5, "trailing")

    def denoiser(x_t: Tensor, level: Level, /, **cond: Any) -> Estimate:
        calls.append(level)
        return IMAGES(x_t, level)

    start = grid.start(initial_noise([0, 1], SHAPE, F64))
    before, steps = start.clone(), []
    for step in SAMPLERS[sampler](denoiser, start, grid):
        steps.append(step)
    assert [step.i for step in steps] == list(range(5))
    assert [step.level for step in steps] == list(grid.levels[1:])
    assert steps[-1].level == schedule.terminal
    assert torch.equal(start, before)
    assert torch.equal(steps[0].x0, IMAGES(start, grid[0]).x0)
    assert all(step.x.shape == step.x0.shape == start.shape and step.x.dtype == F64 for step in steps)
    calls.clear()
    next(iter(SAMPLERS[sampler](denoiser, start, grid)))
    assert 0 < len(calls) < len(grid)


def test_sample_runs_a_solver_to_its_end() -> None:
    """By name, by function, from seeds and from a given start: the same numbers, without gradients."""
    grid = time_grid(FLOW, 7)
    start = grid.start(initial_noise([4, 5], SHAPE, F64)).requires_grad_()
    expected = last(SAMPLERS["ddim"](IMAGES, start, grid))
    for got in (
        sample("ddim", IMAGES, grid, shape=SHAPE, seeds=[4, 5], dtype=F64),
        sample("ddim", IMAGES, grid, start=start),
        sample(SAMPLERS["ddim"], IMAGES, grid, start=start),
    ):
        assert torch.equal(got, expected)
        assert not got.requires_grad


def test_seeds_also_seed_the_loop() -> None:
    """Stochastic solvers draw from the seeds given to `sample`, also with an explicit start."""
    grid, start = time_grid(FLOW, 7), initial_noise([4, 5], SHAPE, F64)
    expected = last(SAMPLERS["ddpm"](IMAGES, start, grid, noise=SeededNoise([4, 5])))
    assert torch.equal(sample("ddpm", IMAGES, grid, start=start, seeds=[4, 5]), expected)
    assert not torch.equal(sample("ddpm", IMAGES, grid, start=start, seeds=[4, 6]), expected)


def test_noise_that_is_given_comes_before_seeds() -> None:
    """seeds then only draw the start."""
    grid, start = time_grid(FLOW, 5), initial_noise([4, 5], SHAPE)
    expected = last(SAMPLERS["ddpm"](IMAGES, start, grid, noise=lambda x, i: torch.full_like(x, i)))
    got = sample("ddpm", IMAGES, grid, shape=SHAPE, seeds=[4, 5], noise=lambda x, i: torch.full_like(x, i))
    assert torch.equal(got, expected)


RANDOM = [case for case, (_, _, rule) in CASES.items() if rule is not kept]


@pytest.mark.parametrize("case", RANDOM)
def test_noise_defaults_to_the_first_seeds(case: str) -> None:
    """A stochastic solver that is given no noise takes seeds 0 ... B-1, and so gives the same numbers every time."""
    sampler, options, _ = CASES[case]
    grid, start = time_grid(FLOW, 4), initial_noise([4, 5], SHAPE, F64)
    default = last(SAMPLERS[sampler](IMAGES, start, grid, **options))
    assert torch.equal(sample(sampler, IMAGES, grid, start=start, seeds=[0, 1], **options), default)
    assert not torch.equal(sample(sampler, IMAGES, grid, start=start, seeds=[0, 2], **options), default)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_conditions_and_guidance_reach_any_solver(sampler: str) -> None:
    """cond goes to the denoiser at every step; guidance is a denoiser, so every solver ends at the guided point."""

    def towards(x_t: Tensor, level: Level, /, **cond: Any) -> Estimate:
        return Estimate.from_x0(x_t, cond["label"].to(x_t).view(-1, 1, 1, 1).expand_as(x_t), level)

    denoiser: DenoiserLike = ClassifierFreeGuidance(towards, 3.0, {"label": 1})
    got = sample(sampler, denoiser, time_grid(FLOW, 5), shape=SHAPE, seeds=[0, 1], dtype=F64, cond={"label": torch.tensor([2, 5])})
    expected = torch.tensor([1 + 3 * (2 - 1), 1 + 3 * (5 - 1)], dtype=F64).view(2, 1, 1, 1).expand(2, *SHAPE)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


class Copies(TorchDispatchMode):
    """Counts the copies between devices."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own is not annotated
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        copied = isinstance(out, Tensor) and args and isinstance(args[0], Tensor) and args[0].device != out.device
        self.count += bool(copied and function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default))
        return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schedule", [VP, FLOW, VarianceExploding()], ids=["vp", "flow", "ve"])
def test_nothing_is_copied_to_the_device_but_noise(case: str, schedule: Schedule) -> None:
    """A copy waits for the device. The loop makes none but of noise, which is drawn on the host: not for levels, times or null labels."""
    sampler, options, rule = CASES[case]
    network = lambda x, t, label: x * 1.0  # noqa: E731
    plain = Denoiser.edm(network, schedule) if isinstance(schedule, VarianceExploding) else Denoiser(network, schedule, V)
    guided = Clipped(ClassifierFreeGuidance(plain, 2.0, {"label": 10}))
    grid, start = time_grid(schedule, 8), torch.ones(2, *SHAPE, device="meta")
    label, drawn = torch.tensor([1, 2], device="meta"), 0

    def counted(noise: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def draw(x: Tensor, *keys: float) -> Tensor:
            nonlocal drawn
            drawn += 1
            return noise(x, *keys)

        return draw

    if rule is not kept:
        options = {**options, **({"path": counted(BrownianPath([0, 1]))} if sampler in PATHS else {"noise": counted(SeededNoise([0, 1]))})}
    with Copies() as copies:
        for _ in SAMPLERS[sampler](partial(guided, label=label), start, grid, **options):
            pass
    assert copies.count == drawn
    assert (drawn > 0) == (rule is not kept)


GRID = time_grid(FLOW, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sample("ddmi", MIXTURE, GRID, shape=(1,), seeds=[0]), "no sampler named 'ddmi'.*dd"),
        (lambda: sample("ddim", MIXTURE, GRID, shape=(1,), seeds=[0], etta=1.0), "'etta'.*eta"),
        (lambda: sample("euler", MIXTURE, GRID, shape=(1,), seeds=[0], eta=1.0), "euler.*'eta'|'eta'.*euler"),
        (lambda: sample("ddim", MIXTURE, GRID, shape=(1,), seeds=[0], eta=1.5), r"eta must lie in \[0, 1\]"),
        (lambda: sample("ddim", MIXTURE, GRID, shape=(1,), seeds=[0], eta=-0.1), r"eta must lie in \[0, 1\]"),
        (lambda: sample("ddpm", MIXTURE, GRID, shape=(1,), seeds=[0], variance="large"), "no variance named 'large'"),
        (lambda: sample("ddpm", MIXTURE, GRID, shape=(1,), seeds=[0], variance="learned"), "learned variance"),
        (lambda: sample("ddpm", MIXTURE, time_grid(FLOW, 1), shape=(1,), seeds=[0], variance="large"), "no variance named 'large'"),
        (lambda: sample("ddim", MIXTURE, GRID, shape=(1,), seeds=[]), "at least one seed"),
        (lambda: sample("ddim", MIXTURE, GRID, start=torch.zeros(1, 1), shape=(1,)), "start brings its own shape"),
        (lambda: sample("ddim", MIXTURE, GRID, shape=(1,)), "shape and seeds, or start"),
        (lambda: sample("ddim", MIXTURE, GRID, seeds=[0]), "shape and seeds, or start"),
        (lambda: sample("ddpm", MIXTURE, GRID, start=torch.zeros(3, 1), seeds=[0]), "1 seeds for a batch of 3"),
        (lambda: sample("ddim", MIXTURE, time_grid(FLOW, 0), shape=(1,), seeds=[0]), "steps must be a whole number >= 1"),
        (lambda: sample("ddim", MIXTURE, time_grid(FLOW, 3, "linear"), shape=(1,), seeds=[0]), "no spacing named 'linear'"),
        (lambda: sample("ddim", MIXTURE, time_grid(FLOW, spacing=[0.5, 0.7]), shape=(1,), seeds=[0]), "noise must fall"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    """A wrong name, option or value raises before anything is sampled, and the message names it."""
    with pytest.raises(ValueError, match=message):
        make()
