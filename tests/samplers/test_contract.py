"""What every solver promises: samples that do not know their batch, a generator of steps, clear errors."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion import (
    NONE,
    ClassifierFreeGuidance,
    Condition,
    DenoiserLike,
    DiscreteVP,
    Estimate,
    Level,
    RectifiedFlow,
    Schedule,
    SeededNoise,
    initial_noise,
    time_grid,
)
from diffusion.oracle import GaussianMixture, PointMass
from eval.bench.convergence import MIXTURE
from samplers import SAMPLERS, network_calls, sample
from tests.samplers.cases import CASES, DISTINCT_SAMPLERS, F64, SHAPE, STD, WEIGHT, kept, last

VP, FLOW = DiscreteVP.scaled_linear(), RectifiedFlow()

IMAGES = GaussianMixture(initial_noise([1, 2, 3], SHAPE, F64), STD, WEIGHT)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_know_its_batch(sampler: str, schedule: Schedule) -> None:
    """Sample i of a batch of 4 is its seed alone: noise to the last bit, images to float tolerance."""
    grid, seeds, starts = time_grid(schedule, 6, "trailing"), [11, 3, 11, 8], []

    def denoiser(x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
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
    """It calls the network only when asked, yields one Step per row, ends at the terminal row, and leaves its
    start alone."""
    calls, grid = [], time_grid(schedule, 5, "trailing")

    def denoiser(x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
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
    """A stochastic solver that is given no noise takes seeds 0 ... B-1, and so gives the same numbers every
    time."""
    sampler, options, _ = CASES[case]
    grid, start = time_grid(FLOW, 4), initial_noise([4, 5], SHAPE, F64)
    default = last(SAMPLERS[sampler](IMAGES, start, grid, **options))
    assert torch.equal(sample(sampler, IMAGES, grid, start=start, seeds=[0, 1], **options), default)
    assert not torch.equal(sample(sampler, IMAGES, grid, start=start, seeds=[0, 2], **options), default)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_conditions_and_guidance_reach_any_solver(sampler: str) -> None:
    """cond goes to the denoiser at every step; guidance is a denoiser, so every solver ends at the guided
    point."""

    def towards(x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        label = condition.tensors["label"].to(x_t).view(-1, 1, 1, 1)
        return Estimate.from_x0(x_t, label.expand_as(x_t), level)

    denoiser: DenoiserLike = ClassifierFreeGuidance(towards, 3.0, Condition(label=torch.tensor([1])))
    got = sample(
        sampler,
        denoiser,
        time_grid(FLOW, 5),
        shape=SHAPE,
        seeds=[0, 1],
        dtype=F64,
        condition=Condition(label=torch.tensor([2, 5])),
    )
    expected = torch.tensor([1 + 3 * (2 - 1), 1 + 3 * (5 - 1)], dtype=F64).view(2, 1, 1, 1).expand(2, *SHAPE)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


GRID = time_grid(FLOW, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sample("ddmi", MIXTURE, GRID, shape=(1,), seeds=[0]), "no sampler named 'ddmi'.*dd"),
        (lambda: sample("ddim", MIXTURE, GRID, shape=(1,), seeds=[0], etta=1.0), "'etta'.*eta"),
        (lambda: sample("euler", MIXTURE, GRID, shape=(1,), seeds=[0], eta=1.0), "euler.*'eta'|'eta'.*euler"),
        (lambda: sample("ddim", MIXTURE, GRID, shape=(1,), seeds=[0], eta=1.5), r"eta must lie in \[0, 1\]"),
        (lambda: sample("ddim", MIXTURE, GRID, shape=(1,), seeds=[0], eta=-0.1), r"eta must lie in \[0, 1\]"),
        (
            lambda: sample("ddpm", MIXTURE, GRID, shape=(1,), seeds=[0], variance="large"),
            "no variance named 'large'",
        ),
        (
            lambda: sample("ddpm", MIXTURE, GRID, shape=(1,), seeds=[0], variance="learned"),
            "learned variance",
        ),
        (
            lambda: sample("ddpm", MIXTURE, time_grid(FLOW, 1), shape=(1,), seeds=[0], variance="large"),
            "no variance named 'large'",
        ),
        (
            lambda: sample("heun", MIXTURE, GRID, shape=(1,), seeds=[0], eta=0.5),
            "no option of heun named 'eta'",
        ),
        (
            lambda: sample("heun", MIXTURE, GRID, shape=(1,), seeds=[0], coordinate="flow"),
            "no coordinate named 'flow'.*'flow_time'",
        ),
        (
            lambda: sample("euler_ancestral", MIXTURE, GRID, shape=(1,), seeds=[0], eta=2.0),
            r"eta must lie in \[0, 1\]",
        ),
        (
            lambda: sample("dpmpp_sde", MIXTURE, GRID, shape=(1,), seeds=[0], eta=-1.0),
            "eta must be 0 or more, not -1",
        ),
        (
            lambda: sample("dpmpp_2m_sde", MIXTURE, GRID, shape=(1,), seeds=[0], eta=math.nan),
            "eta must be 0 or more, not nan",
        ),
        (
            lambda: sample("sit_sde", MIXTURE, GRID, shape=(1,), seeds=[0], diffusion=-1.0),
            "diffusion must be 0 or more",
        ),
        (
            lambda: sample("edm", MIXTURE, GRID, shape=(1,), seeds=[0], churn=-1.0),
            "churn, low <= high and noise_scale must be 0 or more",
        ),
        (lambda: sample("unipc", MIXTURE, GRID, shape=(1,), seeds=[0], order=4), "order must be 2 or 3"),
        (
            lambda: sample("unipc", MIXTURE, time_grid(FLOW, 2), shape=(1,), seeds=[0], order=3),
            "at most the steps, not 3 on 2",
        ),
        (
            lambda: sample("ddim", MIXTURE, time_grid(FLOW, spacing=[0.7, 0.7, 0.2]), shape=(1,), seeds=[0]),
            "noise must fall at every step",
        ),
        (
            lambda: sample("ddpm", MIXTURE, time_grid(FLOW, 4).reversed(), start=torch.zeros(1, 1)),
            "adds noise, but on this grid noise rises",
        ),
        (lambda: sample("ddim", MIXTURE, GRID, shape=(1,), seeds=[]), "at least one seed"),
        (
            lambda: sample("ddim", MIXTURE, GRID, shape=(1,), seeds=[0], condition=torch.zeros(2)),  # type: ignore[arg-type]
            "condition must be Condition, not tensor",
        ),
        (
            lambda: sample("ddim", MIXTURE, GRID, start=torch.zeros(1, 1), shape=(1,)),
            "start has its own shape",
        ),
        (lambda: sample("ddim", MIXTURE, GRID, shape=(1,)), "shape and seeds, or start"),
        (lambda: sample("ddim", MIXTURE, GRID, seeds=[0]), "shape and seeds, or start"),
        (
            lambda: sample("ddpm", MIXTURE, GRID, start=torch.zeros(3, 1), seeds=[0]),
            "1 seeds for a batch of 3",
        ),
        (
            lambda: sample("ddim", MIXTURE, time_grid(FLOW, 0), shape=(1,), seeds=[0]),
            "steps must be a whole number >= 1",
        ),
        (
            lambda: sample("ddim", MIXTURE, time_grid(FLOW, 3, "linear"), shape=(1,), seeds=[0]),
            "no spacing named 'linear'",
        ),
        (
            lambda: sample("ddim", MIXTURE, time_grid(FLOW, spacing=[0.5, 0.7]), shape=(1,), seeds=[0]),
            "noise must fall",
        ),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    """A wrong name, option or value raises before anything is sampled, and the message names it."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("sampler", DISTINCT_SAMPLERS)
def test_a_network_that_fails_is_named(sampler: str) -> None:
    """NaN for one sample at one level: an error at that step that names seed, step and level, and no silently
    wrong picture."""
    grid, asked = time_grid(FLOW, 6), []

    def denoiser(x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        asked.append(level)
        x0 = torch.zeros_like(x_t)
        x0[1] = math.nan if level.t <= grid[3].t else 0.0
        return Estimate.from_x0(x_t, x0, level)

    with pytest.raises(
        FloatingPointError,
        match=r"1 of 3 samples are not finite, the first of seed 8, from step [23] on, at t=0\.[56]",
    ):
        sample(sampler, denoiser, grid, shape=SHAPE, seeds=[7, 8, 9])
    assert min(level.t for level in asked) > grid[5].t, "the run stops at the step"


def test_network_calls_are_counted() -> None:
    """Whatever a solver asks on that grid: looks ahead, and single calls where a step has no middle."""
    grid = time_grid(FLOW, 10)
    expected = dict(ddim=10, dpmpp_2m=10, unipc=10, heun=19, dpm2=18, rk4=37, dpmpp_2s=18, dpmpp_3m=11)
    assert {name: network_calls(name, grid) for name in expected} == expected


def test_half_precision_is_not_taken_for_a_loss() -> None:
    """A large float16 sample, whose sum is beyond float16, is finite all the same."""
    white = torch.ones(3, 256, 256)
    assert (
        sample(
            "euler", PointMass(white), time_grid(FLOW, 3), shape=(3, 256, 256), seeds=[0], dtype=torch.float16
        )
        .isfinite()
        .all()
    )
