"""Beyond sampling: inversion, image to image, inpainting and likelihood, against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import (
    NONE,
    Condition,
    CosineVP,
    DiscreteVP,
    Estimate,
    Grid,
    Inpainting,
    Level,
    NoiseLevel,
    RectifiedFlow,
    Schedule,
    VarianceExploding,
    initial_noise,
    marginal,
    time_grid,
)
from diffusion.oracle import EmpiricalData, GaussianMixture, PointMass
from eval.bench.convergence import MIXTURE
from samplers import SAMPLERS, image_to_image, invert, log_likelihood, sample
from tests.peers import diffusers
from tests.samplers.cases import F64, ORDER

VP, FLOW, COSINE = DiscreteVP.scaled_linear(), RectifiedFlow(), CosineVP()
INSIDE: list[Any] = [
    (VP, {"t_end": 20}),
    (FLOW, {"t_start": 0.99, "t_end": 0.01}),
    (VarianceExploding(0.02, 20.0), {}),
]
SHAPE = (2, 3, 3)

# Inversion --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "ends"), INSIDE, ids=["vp", "flow", "ve"])
@pytest.mark.parametrize("sampler", ORDER)
def test_inversion_keeps_quantiles(sampler: str, schedule: Schedule, ends: dict[str, Any]) -> None:
    """The ODE run upwards takes each quantile at the cleanest level to the same quantile at the noisiest,
    ever closer with more steps."""
    u, error = torch.linspace(0.03, 0.97, 25, dtype=F64), []
    for steps in (100, 200):
        grid = time_grid(schedule, steps, "log_snr", **ends)
        x0 = MIXTURE.quantile(u, grid[-2]) / grid[-2].alpha
        error.append(
            float(
                (invert(MIXTURE, x0, grid, sampler) - MIXTURE.quantile(u, grid[0])).abs().max()
                / grid[0].sigma
            )
        )
    assert error[0] < 0.1
    assert error[1] < error[0] / 2 ** (0.8 * ORDER[sampler])


@pytest.mark.parametrize("sampler", ["ddim", "heun", "rk4", "dpmpp_2m"])
def test_there_and_back(sampler: str) -> None:
    """An image inverted and sampled again comes back, the closer the more steps."""
    data = GaussianMixture(initial_noise([1, 2, 3], SHAPE, F64), torch.tensor([0.3, 0.4, 0.5], dtype=F64))
    x0, error = data.sample(4, torch.Generator().manual_seed(0)), []
    for steps in (50, 100):
        grid = time_grid(FLOW, steps, "log_snr", t_start=0.99, t_end=1e-3)
        x_t = invert(data, x0, grid, sampler)
        error.append(float((sample(sampler, data, grid[:-1], start=x_t) - grid[-2].alpha * x0).abs().max()))
    assert error[1] < error[0] / 2 ** (0.8 * ORDER[sampler])
    assert error[1] < 0.1
    assert sample(sampler, data, grid, start=x_t).sub(x0).abs().max() < error[1] + 0.01


@pytest.mark.parametrize("sampler", ORDER)
@pytest.mark.parametrize(
    "schedule", [FLOW, COSINE, DiscreteVP.linear(zero_terminal_snr=True), VarianceExploding()]
)
def test_inversion_reaches_pure_noise(sampler: str, schedule: Schedule) -> None:
    """Also on grids that begin where there is no signal at all, and in EDM's coordinate: a point leads back
    to its own noise."""
    grid = time_grid(schedule, 12, t_end=20 if schedule.rows else 0.02)
    x_t = invert(PointMass(torch.zeros(SHAPE)), initial_noise([3], SHAPE, F64), grid, sampler)
    exact = grid[0].sigma / grid[-2].sigma * grid[-2].alpha * initial_noise([3], SHAPE, F64)
    torch.testing.assert_close(x_t, exact, rtol=1e-9, atol=1e-9)
    ratio = invert(
        PointMass(torch.zeros(SHAPE)), initial_noise([3], SHAPE, F64), grid, "heun", coordinate="ratio"
    )
    torch.testing.assert_close(ratio, exact, rtol=1e-9, atol=1e-9)


def test_inversion_takes_conditions_and_refuses_noise() -> None:
    """The condition reaches the denoiser; a solver that draws noise is refused by name, DDIM only with
    eta."""
    told: list[Condition] = []

    def denoiser(x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        told.append(condition)
        return MIXTURE(x_t, level)

    grid, x0, condition = (
        time_grid(VP, 5),
        torch.zeros(2, 1, dtype=F64),
        Condition(label=torch.tensor([3, 3])),
    )
    invert(denoiser, x0, grid, "ddim", condition=condition)
    assert told == [condition] * 4
    refused: list[tuple[str, dict[str, Any]]] = [
        ("ddpm", {}),
        ("ddim", {"eta": 0.5}),
        ("dpmpp_2m_sde", {}),
        ("edm", {}),
    ]
    for sampler, options in refused:
        with pytest.raises(ValueError, match=f"{sampler} adds noise, but on this grid noise rises"):
            invert(denoiser, x0, grid, sampler, **options)
    with pytest.raises(ValueError, match="take more steps"):
        invert(denoiser, x0, time_grid(VP, 1))


# Image to image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.05, 0.3, 0.33, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("schedule", [VP, FLOW, COSINE], ids=["vp", "flow", "cosine"])
def test_any_strength_starts_at_its_own_level(schedule: Schedule, strength: float) -> None:
    """The first level the denoiser sees lies `strength` of the way up the grid, and x there is the image with
    the seed's noise."""
    grid, seen = time_grid(schedule, 20, "trailing"), []
    image = initial_noise([5], SHAPE, F64)

    def denoiser(x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        seen.append((x_t, level))
        return PointMass(image[0])(x_t, level)

    got = image_to_image(denoiser, image, grid, strength, seeds=[1, 2], sampler="ddim")
    x_t, level = seen[0]
    assert level.t == pytest.approx(
        schedule.t_data + strength * (schedule.t_max - schedule.t_data), rel=1e-12
    )
    torch.testing.assert_close(
        x_t, marginal(image.expand_as(x_t), initial_noise([1, 2], SHAPE, F64), level), rtol=0, atol=1e-14
    )
    assert len(seen) == math.ceil(20 * strength - 1e-9)
    torch.testing.assert_close(got, image.expand_as(got), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("beyond", [1e-2, 1e-3, 1e-5, 1e-7])
def test_a_sliver_of_a_step_magnifies_nothing(sampler: str, beyond: float) -> None:
    """Strengths just above a whole number of steps: a network that rounds to bfloat16 stays within a few of
    its roundings."""
    data = GaussianMixture(initial_noise([1, 2], SHAPE), torch.tensor([0.3, 0.4]))

    def rounded(x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        return Estimate.from_x0(x_t, data(x_t, level).x0.bfloat16().float(), level)

    image, strength = initial_noise([5], SHAPE), 20 / 30 + beyond
    runs = [
        image_to_image(d, image, time_grid(FLOW, 30), strength, seeds=[1, 2], sampler=sampler)
        for d in (data, rounded)
    ]
    assert float((runs[0] - runs[1]).abs().max()) < 0.1


def test_strength_counts_steps_as_pipelines_do() -> None:
    """At whole steps the part of the grid is the one that diffusers' get_timesteps takes."""

    class Scheduler:
        order = 1
        timesteps = torch.arange(30)

    pipeline: Any = type("Pipeline", (), {"scheduler": Scheduler()})()
    for strength in (0.1, 0.3, 0.5, 0.8, 1.0):
        timesteps, count = diffusers.StableDiffusionImg2ImgPipeline.get_timesteps(
            pipeline, 30, strength, "cpu"
        )
        part = time_grid(VP, 30).tail(strength)
        assert (part.steps, part.levels) == (count, time_grid(VP, 30).levels[int(timesteps[0]) :])


def test_strength_decides_how_much_is_kept() -> None:
    """Between two clusters, little noise keeps an image's own cluster and full noise forgets it."""
    data = EmpiricalData(torch.tensor([[[[-1.0]]], [[[1.0]]]], dtype=F64))
    image = torch.ones(200, 1, 1, 1, dtype=F64)
    stayed = [
        float(
            (image_to_image(data, image, time_grid(FLOW, 20), strength, seeds=range(200)) > 0).double().mean()
        )
        for strength in (0.2, 0.6, 1.0)
    ]
    assert stayed[0] == 1
    assert 0.6 < stayed[1] < 1
    assert stayed[2] == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(200))


# Inpainting -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
def test_what_is_known_stays_and_the_rest_is_painted(sampler: str, schedule: Schedule) -> None:
    """Under every solver the image ends as it was where the mask is 0, as the model's where it is 1, and
    between at a half."""
    known, point = initial_noise([3, 4], SHAPE, F64), initial_noise([5], SHAPE, F64)
    mask = torch.zeros(1, 1, 3, 3, dtype=F64)
    mask[..., 1:, :], mask[..., 0, 0] = 1, 0.5
    got = sample(
        sampler,
        Inpainting(PointMass(point[0]), known, mask),
        time_grid(schedule, 8),
        shape=SHAPE,
        seeds=[0, 1],
        dtype=F64,
    )
    torch.testing.assert_close(got, (1 - mask) * known + mask * point, rtol=0, atol=1e-11)


def test_the_painted_part_sees_the_known_part() -> None:
    """Two images that differ in their left half: whichever left half is known, the right one that belongs to
    it is painted."""
    images = initial_noise([1, 2], (1, 4, 4), F64)
    mask = torch.ones(1, 1, 4, 4, dtype=F64)
    mask[..., :2] = 0
    denoiser = Inpainting(EmpiricalData(images), images, mask)
    got = sample("dpmpp_2m", denoiser, time_grid(FLOW, 30), shape=(1, 4, 4), seeds=[7, 8], dtype=F64)
    torch.testing.assert_close(got, images, rtol=0, atol=1e-6)


# Likelihood -------------------------------------------------------------------------------------------------

PLANE = GaussianMixture(
    torch.tensor([[-1.2, 0.3], [0.9, 1.1], [0.4, -1.0]], dtype=F64),
    torch.tensor([0.35, 0.5, 0.4], dtype=F64),
    torch.tensor([0.3, 0.5, 0.2]),
)


def log_density(data: GaussianMixture, x0: Tensor, grid: Grid) -> Tensor:
    """log p of x0 where alpha x0 is distributed as the noised mixture at the grid's cleanest level with
    noise."""
    level = grid[-2]
    return data.log_prob(level.alpha * x0, level) + x0[0].numel() * math.log(level.alpha)


@pytest.mark.parametrize(
    ("schedule", "ends"),
    [
        (FLOW, {"t_end": 0.02}),
        (COSINE, {"t_end": 0.02}),
        (DiscreteVP.linear(zero_terminal_snr=True), {"t_end": 20}),
    ],
)
def test_exact_likelihood_is_the_mixtures(schedule: Schedule, ends: dict[str, Any]) -> None:
    """With the exact trace, log p is the closed form's at the cleanest level, in nats, at the fourth order of
    the steps."""
    x, error = PLANE.sample(20, torch.Generator().manual_seed(0)), []
    for steps in (50, 100):
        grid = time_grid(schedule, steps, "linspace", **ends)
        error.append(
            float((log_likelihood(PLANE, x, grid, trace="exact") - log_density(PLANE, x, grid)).abs().max())
        )
    assert error[1] < 1e-5
    assert error[1] < error[0] / 2**3.5


def test_hutchinson_is_unbiased() -> None:
    """The mean over seeds of the estimate is the exact value, within 4 standard errors; more probes spread
    less; seeds repeat it."""
    x, grid = (
        PLANE.sample(1, torch.Generator().manual_seed(0)).expand(400, 2),
        time_grid(FLOW, 30, t_end=0.02),
    )
    exact = log_likelihood(PLANE, x[:1], grid, trace="exact")
    one, four = (log_likelihood(PLANE, x, grid, seeds=range(400), probes=probes) for probes in (1, 4))
    assert float(one.std()) > 1e-3
    for estimate in (one, four):
        assert abs(float(estimate.mean() - exact)) < 4 * float(estimate.std()) / math.sqrt(400)
    assert float(four.std()) == pytest.approx(float(one.std()) / 2, rel=0.2)
    torch.testing.assert_close(
        one[7:9], log_likelihood(PLANE, x[7:9], grid, seeds=[7, 8]), rtol=1e-12, atol=1e-12
    )


def test_probes_know_nothing_of_the_samples() -> None:
    """Samples of seeds 0, 1, ... measured with the probes of the same seeds: still no bias, within 4 standard
    errors."""
    data = GaussianMixture(
        torch.stack([torch.ones(8), -torch.ones(8)]).double(), torch.tensor([0.5, 0.5], dtype=F64)
    )
    grid = time_grid(FLOW, 12, "log_snr", t_start=0.99, t_end=0.05)
    x0 = sample("heun", data, grid, shape=(8,), seeds=range(1500), dtype=F64)
    gap = log_likelihood(data, x0, grid) - log_likelihood(data, x0, grid, trace="exact")
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(1500)


def test_a_lost_likelihood_is_named() -> None:
    """NaN from the network is an error that names sample and level."""

    def denoiser(x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        return Estimate.from_x0(x_t, x_t * (math.nan if level.t > 0.5 else 0.5), level)

    with pytest.raises(
        FloatingPointError,
        match=r"2 of 2 samples are not finite, the first of seed 0, from step \d+ on, at t=",
    ):
        log_likelihood(denoiser, torch.zeros(2, 2), time_grid(FLOW, 8, t_end=0.1), seeds=[0, 1])


def test_the_prior_is_what_samples_start_from() -> None:
    """On EDM's schedule samples start from N(0, sigma_max^2), which forgets the data's own mean: by a share
    of 1 / sigma_max."""
    x, error = PLANE.sample(20, torch.Generator().manual_seed(0)), []
    for sigma_max in (80.0, 800.0):
        grid = time_grid(VarianceExploding(0.02, sigma_max), 300, "karras")
        error.append(
            float((log_likelihood(PLANE, x, grid, trace="exact") - log_density(PLANE, x, grid)).abs().max())
        )
    assert error[0] < 0.03
    assert error[1] == pytest.approx(error[0] / 10, rel=0.1)


def test_likelihood_takes_images_and_conditions() -> None:
    """Samples of any shape, float32 too, and conditions for the denoiser."""
    mean, std = torch.zeros(1, *SHAPE), torch.tensor([0.7])
    data, told = GaussianMixture(mean, std), []

    def denoiser(x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        told.append(condition)
        return data(x_t, level)

    x, grid = initial_noise([1, 2], SHAPE), time_grid(FLOW, 40, t_end=0.01)
    condition = Condition(label=torch.tensor([1, 1]))
    got = log_likelihood(denoiser, x, grid, trace="exact", condition=condition)
    torch.testing.assert_close(got, log_density(data, x, grid), rtol=0, atol=1e-3)
    assert not got.requires_grad
    assert told[0] is condition


KNOWN, MASK = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: image_to_image(MIXTURE, KNOWN, time_grid(FLOW, 5), 0.0, seeds=[0]),
            r"must lie in \(0, 1\], not 0",
        ),
        (
            lambda: image_to_image(MIXTURE, KNOWN, time_grid(FLOW, 5), 1.2, seeds=[0]),
            r"must lie in \(0, 1\], not 1.2",
        ),
        (
            lambda: image_to_image(MIXTURE, KNOWN, time_grid(FLOW, 5), math.nan, seeds=[0]),
            r"must lie in \(0, 1\], not nan",
        ),
        (
            lambda: image_to_image(
                MIXTURE, KNOWN.expand(2, 1, 4, 4), time_grid(FLOW, 5), 0.5, seeds=[0, 1, 2]
            ),
            "2 images for 3 seeds",
        ),
        (
            lambda: Inpainting(MIXTURE, KNOWN, MASK[..., :3]),
            r"a mask \(1, 1, 4, 3\) does not fit an image \(1, 1, 4, 4\)",
        ),
        (lambda: Inpainting(MIXTURE, KNOWN, MASK.expand(1, 2, 4, 4)), "does not fit"),
        (lambda: Inpainting(MIXTURE, KNOWN.byte(), MASK), "must be floating point"),
        (
            lambda: image_to_image(MIXTURE, KNOWN.byte(), time_grid(FLOW, 5), 0.5, seeds=[0]),
            "must be floating point",
        ),
        (
            lambda: log_likelihood(PLANE, torch.zeros(2, 2), time_grid(FLOW, 5, t_end=0.1), seeds=[1]),
            "1 seeds for a batch of 2",
        ),
        (
            lambda: sample("euler", MIXTURE, time_grid(FLOW, 5).reversed(), shape=(1,), seeds=[0]),
            "this grid rises from data",
        ),
        (lambda: Grid((NoiseLevel(1.0, -1.0, 1.0), FLOW.level(0.1)), 1.0, FLOW), "finite alpha, sigma >= 0"),
        (lambda: Inpainting(MIXTURE, KNOWN, 255 * MASK), r"a mask has values in \[0, 1\]"),
        (
            lambda: Inpainting(MIXTURE, KNOWN, MASK)(torch.zeros(1, 1, 5, 5), FLOW.level(0.5)),
            "the known image is",
        ),
        (
            lambda: log_likelihood(PLANE, torch.zeros(1, 2), time_grid(FLOW, 5, t_end=0.1), probes=0),
            "probes must be at least 1",
        ),
        (
            lambda: log_likelihood(PLANE, torch.zeros(1, 2), time_grid(FLOW, 5, t_end=0.1), trace="exat"),  # type: ignore[arg-type]
            "no trace named 'exat'",
        ),
        (lambda: Grid((FLOW.level(0.2), FLOW.level(0.8), FLOW.level(0.5)), 1.0, FLOW), "noise must"),
        (lambda: Grid((FLOW.level(0.2), FLOW.level(0.8), FLOW.level(0.8)), 1.0, FLOW), "noise must"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    """One clear line before anything is sampled."""
    with pytest.raises(ValueError, match=message):
        make()
