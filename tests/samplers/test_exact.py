"""Every solver on data that is one point, where the exact trajectory is known, and the identities between
solvers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache, partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import (
    APG,
    EPS,
    NONE,
    SPACINGS,
    X0,
    AutoGuidance,
    ClassifierFreeGuidance,
    Condition,
    CosineVP,
    Denoiser,
    DenoiserLike,
    DiscreteVP,
    Estimate,
    Grid,
    Level,
    NoiseLevel,
    Prediction,
    RectifiedFlow,
    Rule,
    Schedule,
    SeededNoise,
    Thresholded,
    VarianceExploding,
    betas,
    extrapolate,
    initial_noise,
    rescaled,
    time_grid,
)
from diffusion.oracle import GaussianMixture, PointMass
from eval.bench.convergence import MIXTURE
from samplers import SAMPLERS, sample
from tests.conftest import PREDICTIONS, SCHEDULES, within
from tests.samplers.cases import CASES, DISTINCT_SAMPLERS, F64, PATHS, SHAPE, kept, last

VP, FLOW = DiscreteVP.scaled_linear(), RectifiedFlow()

# Point mass: the exact trajectory ---------------------------------------------------------------------------

DISTINCT = {
    function: name for name, function in SPACINGS.items()
}.values()  # each spacing once, by one of its names
STEPS = (1, 2, 3, 7, 13)


@lru_cache(10_000)
def level_at(schedule: Schedule, time: float) -> NoiseLevel:
    return schedule.level(time)


def fake(
    x0: Tensor, schedule: Schedule, prediction: Prediction, grid: Grid, wrong_by: float = 0.0
) -> Denoiser:
    """A perfect network for data that is one point, or one that errs by that much: it finds its level by the
    time it is told."""
    oracle, levels = PointMass(x0), {level.t: level for level in grid}

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        time = float(t[0])
        level = (
            levels[time] if time in levels else level_at(schedule, time)
        )  # some solvers ask between two rows
        x0, eps = oracle(x, level)
        return prediction.target(x0, eps, level) + wrong_by * (1e5 * x).cos()

    return Denoiser(network, schedule, prediction)


@cache
def noise_in(case: str, grid: Grid) -> Tensor:
    """What each exact x is made of: its share of x0, of the first noise and of z, and max(1, sigma), (4,
    steps, 1, 1, 1, 1)."""
    rows, of_eps, of_z = [], 1.0, 0.0
    for i, (t, s) in enumerate(pairwise(grid)):
        p = CASES[case][2](t, s, grid)
        of_eps, of_z = p * of_eps, p * of_z + math.sqrt((1 - p) * (1 + p)) * math.cos(i)
        rows.append((s.alpha, s.sigma * of_eps, s.sigma * of_z, max(1.0, s.sigma)))
    return torch.tensor(rows, dtype=F64).T[..., None, None, None, None]


Z, START = initial_noise(range(10), SHAPE, F64), initial_noise(range(10, 20), SHAPE, F64)


def known_noise(case: str, grid: Grid, z: Tensor) -> dict[str, Any]:
    """The options of a case, with cos(i) z for the noise of step i; a path tells the step by the clock, which
    rises with it."""
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


def worst_error(case: str, denoiser: DenoiserLike, x0: Tensor, grid: Grid) -> float:
    """The largest distance from the exact trajectory over all steps, in units of max(1, sigma)."""
    z, x = Z[: len(x0)], grid.start(START[: len(x0)])
    reached = torch.stack(
        [step.x for step in SAMPLERS[CASES[case][0]](denoiser, x, grid, **known_noise(case, grid, z))]
    )
    alpha, of_eps, of_z, unit = noise_in(case, grid)
    exact = alpha * x0 + of_eps * ((x - grid[0].alpha * x0) / grid[0].sigma) + of_z * z
    return float(((reached - exact).abs() / unit).max())


def require_exact(
    case: str, network: Callable[[float], DenoiserLike], x0: Tensor, grid: Grid, *where: object
) -> None:
    """The error is below 1e-12; or, where a solver on this grid enlarges what a network errs by more than
    tenfold, 1e-13 so enlarged."""
    error = worst_error(case, network(0.0), x0, grid)
    if error > 1e-12:
        enlarged = worst_error(case, network(1e-6), x0, grid) / 1e-6
        assert error <= 1e-13 * enlarged, where


@cache
def grid_of(schedule: Schedule, steps: int, spacing: str, *, below_pure_noise: bool) -> Grid:
    """A grid of that spacing, and where asked one level short of pure noise, at which eps-prediction is
    singular."""
    grid = time_grid(schedule, steps, spacing, **within(schedule, spacing))
    if below_pure_noise and grid[0].alpha == 0:
        return time_grid(schedule, max(2, steps), spacing, **within(schedule, spacing))[1:]
    return grid


def side_by_side(*predictions: Prediction) -> Prediction:
    """A batch whose sample i has the i-th prediction: one run proves them all, and none can lean on
    another."""

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
    """Each grid with the predictions that it suits and their number: eps-prediction starts below pure
    noise."""
    grid, below = (grid_of(schedule, steps, spacing, below_pure_noise=below) for below in (False, True))
    if grid is below:
        yield grid, ALL, N
    else:
        yield grid, FINITE, N - 1
        yield below, EPS, 1


@pytest.mark.parametrize("case", CASES)
def test_point_mass_is_exact(case: str, schedule: Schedule) -> None:
    """Every solver x schedule x prediction x spacing follows the exact trajectory to 1e-12.

    The number of steps changes from one spacing, schedule and solver to the next, so that any two of them
    occur with every number up to 13; 50 steps are taken on one spacing. A slow test takes the whole product.
    """
    turn = list(CASES).index(case) + list(SCHEDULES.values()).index(schedule)
    by_turns = [(spacing, STEPS[(turn + i) % len(STEPS)]) for i, spacing in enumerate(DISTINCT)]
    require_all_exact(case, schedule, [*by_turns, (list(DISTINCT)[turn % len(DISTINCT)], 50)])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_number_of_steps_of_every_spacing(case: str, schedule: Schedule) -> None:
    """The same for the whole product."""
    require_all_exact(case, schedule, product(DISTINCT, (*STEPS, 50)))


def require_all_exact(case: str, schedule: Schedule, runs: Iterable[tuple[str, int]]) -> None:
    """For all predictions, on grids of these spacings and steps."""
    with torch.inference_mode():
        for spacing, steps in runs:
            for grid, prediction, n in grids(schedule, spacing, steps):
                x0 = initial_noise(range(20, 20 + n), SHAPE, F64)
                network = partial(fake, x0, schedule, prediction, grid)
                require_exact(case, network, x0, grid, spacing, steps, prediction.name)


def batched(scale: float, rule: Rule = extrapolate) -> Callable[[Denoiser, Denoiser], DenoiserLike]:
    """Classifier-free guidance of a network that knows both points."""

    def guide(network: Denoiser, _: Denoiser) -> DenoiserLike:
        guided = ClassifierFreeGuidance(network, scale, Condition(label=torch.tensor([0])), rule=rule)
        return lambda x_t, level, condition=NONE: guided(
            x_t, level, Condition(label=torch.ones(len(x_t), dtype=torch.long))
        )

    return guide


def flat(x: Tensor) -> Tensor:
    """A number per sample, ready to multiply samples."""
    return x.view(-1, 1, 1, 1)


def projected(c: Tensor, u: Tensor) -> Tensor:
    """APG with eta 0.3 and differences no longer than 1, at scale 3."""
    d = c - u
    along = flat((d * c).sum((1, 2, 3)) / (c * c).sum((1, 2, 3))) * c
    return c + 2 * flat((1 / d.flatten(1).norm(dim=1)).clamp(max=1)) * (d - along + 0.3 * along)


def led_back(c: Tensor, u: Tensor) -> Tensor:
    """Half of the way to the contrast of c, at scale 3."""
    g = u + 3 * (c - u)
    return (0.5 * flat(c.flatten(1).std(1) / g.flatten(1).std(1)) + 0.5) * g


def limited(c: Tensor, u: Tensor) -> Tensor:
    """The guided point within its own largest value, at scale 3."""
    g = u + 3 * (c - u)
    return g / flat(g.abs().flatten(1).amax(1).clamp(min=1))


# How the guidance is made of (a network that knows both points, one that knows the second), and the point it
# leads to.
Guided = tuple[Callable[[Denoiser, Denoiser], DenoiserLike], Callable[[Tensor, Tensor], Tensor]]
GUIDANCE: dict[str, Guided] = {
    "cfg": (batched(3.0), lambda c, u: u + 3 * (c - u)),
    "negative scale": (batched(-1.0), lambda c, u: u - (c - u)),
    "apg": (batched(3.0, APG(eta=0.3, norm_limit=1.0)), projected),
    "rescaled": (batched(3.0, rescaled(0.5, space=X0)), led_back),
    "thresholded": (lambda both, weak: Thresholded(batched(3.0)(both, weak), percentile=1.0), limited),
    "autoguidance": (
        lambda both, weak: AutoGuidance(batched(2.0)(both, weak), weak, 2.0),
        lambda c, u: u + 2 * (u + 2 * (c - u) - u),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_guided_point_masses_are_exact(case: str, schedule: Schedule) -> None:
    """Guidance between two points is a third point, and a guided solver follows the exact trajectory of that
    one.

    Each kind on one spacing, by 2 or 13 steps: others for the next solver and schedule.
    """
    turn = list(CASES).index(case) + list(SCHEDULES.values()).index(schedule)
    for i, kind in enumerate(GUIDANCE):
        require_guided_exact(
            kind, case, schedule, list(DISTINCT)[(turn + i) % len(DISTINCT)], (2, 13)[turn % 2]
        )


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_guidance_on_every_spacing(case: str, schedule: Schedule) -> None:
    """The same for plain guidance on every spacing."""
    for spacing, steps in product(DISTINCT, (2, 13)):
        require_guided_exact("cfg", case, schedule, spacing, steps)


def require_guided_exact(kind: str, case: str, schedule: Schedule, spacing: str, steps: int) -> None:
    """For all predictions, between points of their own."""
    guide, point = GUIDANCE[kind]
    with torch.inference_mode():
        for grid, prediction, n in grids(schedule, spacing, steps):
            c, u = (initial_noise(range(first, first + n), SHAPE, F64) for first in (20, 30))

            def network(
                wrong_by: float, c: Tensor = c, u: Tensor = u, p: Prediction = prediction, g: Grid = grid
            ) -> DenoiserLike:
                return guide(
                    fake(torch.cat([c, u]), schedule, twice(p), g, wrong_by),
                    fake(u, schedule, p, g, wrong_by),
                )

            require_exact(case, network, point(c, u), grid, kind, spacing, steps, prediction.name)


def twice(prediction: Prediction) -> Prediction:
    """For a doubled batch."""
    return {ALL: ALL_TWICE, FINITE: FINITE_TWICE}.get(prediction, prediction)


LONG = [
    *product(
        [(VP, "linspace"), (VP, "trailing"), (VP, "leading"), (VP, "karras"), (FLOW, "linspace")], (999, 1000)
    )
]


@pytest.mark.parametrize("case", DISTINCT_SAMPLERS)
def test_point_mass_is_exact_on_long_grids(case: str) -> None:
    """The same at 999 or 1000 steps, on the table of 1000 rows or on flow time: one of these grids for each
    solver, by turns."""
    require_long_exact(case, [LONG[DISTINCT_SAMPLERS.index(case) % len(LONG)]])


@pytest.mark.slow
@pytest.mark.parametrize("case", DISTINCT_SAMPLERS)
def test_every_long_grid(case: str) -> None:
    """The same on all of them."""
    require_long_exact(case, LONG)


def require_long_exact(case: str, runs: Iterable[tuple[tuple[Schedule, str], int]]) -> None:
    """For all predictions at once."""
    x0 = initial_noise(range(20, 20 + N), SHAPE, F64)
    with torch.inference_mode():
        for (schedule, spacing), steps in runs:
            grid = grid_of(schedule, steps, spacing, below_pure_noise=True)
            require_exact(case, partial(fake, x0, schedule, ALL, grid), x0, grid, spacing, steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", [CosineVP(), FLOW, DiscreteVP.linear(zero_terminal_snr=True)])
def test_eps_prediction_raises_at_pure_noise(sampler: str, schedule: Schedule) -> None:
    """An eps-network says nothing of x0 where there is no signal: an error, not a clamp."""
    grid = time_grid(schedule, 4, "trailing")
    with pytest.raises(ValueError, match="eps-prediction does not determine x0"):
        sample(sampler, fake(torch.zeros(SHAPE), schedule, EPS, grid), grid, shape=SHAPE, seeds=[0])


# Identities -------------------------------------------------------------------------------------------------


def test_ddim_is_euler(schedule: Schedule) -> None:
    """A DDIM step is an Euler step in flow time, and one in sigma/alpha, on every schedule: to 1e-12 of
    max(1, sigma)."""
    grid = time_grid(schedule, 20, "trailing")
    x = ratio_x = grid.start(initial_noise(range(4), (1,), F64))
    for ddim, euler in zip(
        SAMPLERS["ddim"](MIXTURE, x, grid), SAMPLERS["euler"](MIXTURE, x, grid), strict=True
    ):
        t, s = grid[ddim.i], ddim.level
        torch.testing.assert_close(ddim.x, euler.x, rtol=0, atol=1e-12 * max(1, s.sigma))
        if (
            t.alpha > 0
        ):  # k-diffusion's coordinates: y = x / alpha, dy/d(sigma/alpha) = (y - x0) / (sigma/alpha)
            y = ratio_x / t.alpha
            y = y + (s.ratio - t.ratio) * (y - MIXTURE(ratio_x, t).x0) / t.ratio
            torch.testing.assert_close(ddim.x, s.alpha * y, rtol=0, atol=1e-12 * max(1, s.sigma))
        ratio_x = ddim.x


def test_ddim_with_eta_one_is_ddpm(schedule: Schedule) -> None:
    """Song et al. 2021, section 4.1: the two are the same sampler, for the same noise, step by step to 1e-12
    of max(1, sigma)."""
    grid = time_grid(schedule, 12, "trailing")
    x, noise = grid.start(initial_noise(range(4), (1,), F64)), SeededNoise(range(4))
    pairs = zip(
        SAMPLERS["ddim"](MIXTURE, x, grid, eta=1.0, noise=noise),
        SAMPLERS["ddpm"](MIXTURE, x, grid, noise=noise),
        strict=True,
    )
    for ddim, ddpm in pairs:
        torch.testing.assert_close(ddim.x, ddpm.x, rtol=0, atol=1e-12 * max(1, ddim.level.sigma))


@pytest.mark.parametrize("row", [1, 10, 999])
@pytest.mark.parametrize(
    ("variance", "v"),
    [("posterior", None), ("upper", None), ("learned", -1.0), ("learned", 1.0), ("learned", 0.3)],
)
def test_ddpm_variances_are_the_published_ones(row: int, variance: str, v: float | None) -> None:
    """One step between rows adds noise of variance beta-tilde, beta, or exp(w log beta + (1 - w) log
    beta-tilde), w = (v + 1) / 2."""
    beta, bar = betas.linear(), betas.alpha_bar(betas.linear())
    low, high = float((1 - bar[row - 1]) / (1 - bar[row]) * beta[row]), float(beta[row])
    w = {"posterior": 0.0, "upper": 1.0}.get(variance, ((v or 0.0) + 1) / 2)
    expected = math.exp(w * math.log(high) + (1 - w) * math.log(low))

    def denoiser(x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        return Estimate(x_t.sin(), x_t, None if v is None else torch.full_like(x_t, v))

    grid = time_grid(DiscreteVP.linear(), spacing=[row, row - 1])[:2]
    x = initial_noise([0, 1], SHAPE, F64)
    quiet = last(
        SAMPLERS["ddpm"](denoiser, x, grid, variance=variance, noise=lambda x, i: torch.zeros_like(x))
    )
    loud = last(SAMPLERS["ddpm"](denoiser, x, grid, variance=variance, noise=lambda x, i: torch.ones_like(x)))
    torch.testing.assert_close((loud - quiet).square(), torch.full_like(x, expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", [CosineVP(), FLOW, VarianceExploding()], ids=["vp", "flow", "ve"])
def test_upper_variance_is_exact_for_white_data(schedule: Schedule) -> None:
    """Ho et al. 2020, section 3.2: for N(0, 1) data each step leaves the exact variance alpha^2 + sigma^2, at
    any stride."""
    white = GaussianMixture(torch.zeros(1, 1, dtype=F64), torch.ones(1, dtype=F64))
    grid, one = time_grid(schedule, 7), torch.ones(1, 1, dtype=F64)
    variance = grid[0].alpha ** 2 + grid[0].sigma ** 2
    for t, s in pairwise(grid[:-1]):
        step = Grid((t, s), 1.0, schedule)
        kept_part = float(
            last(SAMPLERS["ddpm"](white, one, step, variance="upper", noise=lambda x, i: 0 * x))
        )
        fresh_part = float(
            last(SAMPLERS["ddpm"](white, 0 * one, step, variance="upper", noise=lambda x, i: one))
        )
        variance = kept_part**2 * variance + fresh_part**2
        assert variance == pytest.approx(s.alpha**2 + s.sigma**2, rel=1e-12)
