"""The oracles themselves: against numerical integration, torch.distributions, autograd and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from diffusion import NONE, Condition, NoiseLevel, Schedule, initial_noise, marginal
from diffusion.oracle import EmpiricalData, GaussianMixture, PointMass

F64 = torch.float64
MEAN, STD, WEIGHT = (
    torch.tensor(v, dtype=F64) for v in ([[-1.3], [0.4], [1.7]], [0.25, 0.4, 0.2], [0.3, 0.5, 0.2])
)
LINE = GaussianMixture(MEAN, STD, WEIGHT)
PLANE = GaussianMixture(initial_noise([0, 1, 2], (2, 3), F64), STD, 7 * WEIGHT)


def noised(mixture: GaussianMixture, level: NoiseLevel) -> MixtureSameFamily:
    """torch's own distribution of alpha x0 + sigma eps."""
    mean = level.alpha * mixture.mean.flatten(1)
    std = (level.alpha**2 * mixture.std**2 + level.sigma**2).sqrt()
    return MixtureSameFamily(Categorical(WEIGHT), Independent(Normal(mean, std[:, None].expand_as(mean)), 1))


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.1])
def test_mixture_is_the_posterior_mean(schedule: Schedule, fraction: float) -> None:
    """E[x0 | x_t] by integrating x0 q(x0) q(x_t | x0) numerically over the line, to 1e-10."""
    level = schedule.level(fraction * schedule.t_max)
    x_t = torch.linspace(-2, 2, 9, dtype=F64)[:, None] * (level.alpha + level.sigma)
    x0 = torch.linspace(-6, 6, 40001, dtype=F64)
    prior = sum(
        w / s * torch.exp(-0.5 * ((x0 - m) / s) ** 2) for w, s, m in zip(WEIGHT, STD, MEAN[:, 0], strict=True)
    )
    off = (x_t - level.alpha * x0) / level.sigma
    joint = prior * torch.exp(-0.5 * (off.square() - off.square().amin(1, keepdim=True)))
    expected = (joint * x0).sum(1) / joint.sum(1)
    got = LINE(x_t, level)
    torch.testing.assert_close(got.x0[:, 0], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        marginal(got.x0, got.eps, level), x_t, rtol=0, atol=1e-12 * max(1, level.sigma)
    )


def test_log_prob_is_torchs(schedule: Schedule) -> None:
    """The noised density equals torch.distributions', for images of several pixels, weights normalised."""
    for t in (0.0, 0.3, 1.0):
        level = schedule.level(t * schedule.t_max)
        x_t = initial_noise(range(5), (2, 3), F64) * (level.alpha + level.sigma)
        torch.testing.assert_close(
            PLANE.log_prob(x_t, level), noised(PLANE, level).log_prob(x_t.flatten(1)), rtol=1e-12, atol=1e-12
        )


def test_eps_is_minus_sigma_times_the_score(schedule: Schedule) -> None:
    """Tweedie: eps = -sigma grad log q(x_t), by autograd through torch's own density."""
    for t in (0.1, 0.6, 1.0):
        level = schedule.level(t * schedule.t_max)
        x_t = (initial_noise(range(5), (2, 3), F64) * (level.alpha + level.sigma)).requires_grad_()
        (score,) = torch.autograd.grad(noised(PLANE, level).log_prob(x_t.flatten(1)).sum(), x_t)
        torch.testing.assert_close(PLANE(x_t, level).eps, -level.sigma * score, rtol=1e-11, atol=1e-12)


def test_mixture_at_both_ends() -> None:
    """On clean data it answers x0 = x_t and eps 0; at pure noise the mean of the data and eps = x_t."""
    x = initial_noise(range(4), (2, 3), F64)
    clean, noise = PLANE(x, NoiseLevel(0, 1.0, 0.0)), PLANE(x, NoiseLevel(1, 0.0, 1.0))
    torch.testing.assert_close(clean.x0, x, rtol=0, atol=1e-14)
    assert not clean.eps.any()
    torch.testing.assert_close(
        noise.x0, (WEIGHT[:, None, None] * PLANE.mean).sum(0).expand_as(x), rtol=0, atol=1e-14
    )
    torch.testing.assert_close(noise.eps, x, rtol=0, atol=1e-14)


def test_mixture_samples_have_its_moments() -> None:
    """40000 draws: mean and second moment within 4 standard errors; the same generator draws the same."""
    draws = LINE.sample(40000, torch.Generator().manual_seed(0))[:, 0]
    mean = float((WEIGHT * MEAN[:, 0]).sum())
    second = float((WEIGHT * (MEAN[:, 0] ** 2 + STD**2)).sum())
    assert float(draws.mean()) == pytest.approx(mean, abs=4 * float(draws.std()) / 200)
    assert float(draws.square().mean()) == pytest.approx(second, abs=4 * float(draws.square().std()) / 200)
    assert torch.equal(draws, LINE.sample(40000, torch.Generator().manual_seed(0))[:, 0])
    assert PLANE.sample(3).shape == (3, 2, 3)


@pytest.mark.parametrize(
    ("std", "weight"), [([0.1], None), ([0.1, 0.0], None), ([0.1, 0.1], [1.0, 0.0]), ([0.1, 0.1], [1.0])]
)
def test_mixture_refuses_bad_parameters(std: list[float], weight: list[float] | None) -> None:
    """As many positive stds and weights as means."""
    with pytest.raises(ValueError, match="as many positive stds and weights as means"):
        GaussianMixture(
            torch.zeros(2, 1), torch.tensor(std), None if weight is None else torch.tensor(weight)
        )


def test_point_mass_knows_the_noise(schedule: Schedule) -> None:
    """x0 is the point, whatever x_t; eps is what was added, one point for all or one each."""
    points, eps = initial_noise([0, 1], (3,), F64), initial_noise([2, 3], (3,), F64)
    level = schedule.level(0.5 * schedule.t_max)
    for point in (points, points[0]):
        got = PointMass(point)(
            marginal(point.expand(2, 3), eps, level), level, Condition(label=torch.tensor([0, 1]))
        )
        assert torch.equal(got.x0, point.expand(2, 3))
        torch.testing.assert_close(got.eps, eps, rtol=0, atol=1e-12)


def brute_force(x_t: Tensor, level: NoiseLevel, data: list[Tensor]) -> Tensor:
    """E[x0 | x_t] over a list of images, one sample, in plain Python."""
    log_weights = [
        -0.5 * float((x_t - level.alpha * image).square().sum()) / level.sigma**2 for image in data
    ]
    weights = [math.exp(value - max(log_weights)) for value in log_weights]
    return torch.stack(
        [weight / sum(weights) * image for weight, image in zip(weights, data, strict=True)]
    ).sum(0)


@pytest.mark.parametrize("label", [None, [0, 1, 2, 9]])
def test_empirical_data_is_brute_force(schedule: Schedule, label: list[int] | None) -> None:
    """Karras et al. 2022, eq. 57, image by image; a label keeps its own class, one beyond those known means
    any class."""
    data, labels = initial_noise(range(12), (1, 2, 2), F64), torch.arange(12) % 3
    oracle = EmpiricalData(data, labels)
    condition = NONE if label is None else Condition(label=torch.tensor(label))
    for t in (1.0, 0.4, 0.02):
        level = schedule.level(t * schedule.t_max)
        x_t = marginal(
            initial_noise(range(50, 54), (1, 2, 2), F64), initial_noise(range(60, 64), (1, 2, 2), F64), level
        )
        got = oracle(x_t, level, condition)
        for i, wanted in enumerate(label or [9] * 4):
            known = [
                image
                for image, own in zip(data, labels.tolist(), strict=True)
                if own == wanted or wanted == 9
            ]
            torch.testing.assert_close(got.x0[i], brute_force(x_t[i], level, known), rtol=0, atol=1e-11)
        torch.testing.assert_close(
            marginal(got.x0, got.eps, level), x_t, rtol=0, atol=1e-12 * max(1, level.sigma)
        )


def test_empirical_weights_are_a_posterior() -> None:
    """They sum to 1, are uniform over the class at pure noise, and single out the image near data."""
    data, labels = initial_noise(range(6), (1, 2, 2), F64), torch.tensor([0, 0, 0, 1, 1, 2])
    oracle = EmpiricalData(data, labels)
    noise = oracle.weights(data[:2], NoiseLevel(1, 0.0, 1.0), torch.tensor([1, 7]))
    half, sixth = 1 / 2, 1 / 6
    torch.testing.assert_close(
        noise, torch.tensor([[0, 0, 0, half, half, 0], [sixth] * 6], dtype=F64), rtol=0, atol=1e-15
    )
    assert torch.equal(oracle.weights(data, NoiseLevel(0, 1.0, 1e-3)), torch.eye(6, dtype=F64))


def test_empirical_data_without_labels_ignores_them() -> None:
    """A condition it does not know changes nothing."""
    oracle, level, x = (
        EmpiricalData(initial_noise(range(6), (3,), F64)),
        NoiseLevel(0.5, 0.5, 0.5),
        initial_noise([8], (3,), F64),
    )
    assert torch.equal(oracle(x, level, Condition(label=torch.tensor([1]))).x0, oracle(x, level).x0)


@pytest.mark.parametrize(
    "oracle", [LINE, PLANE, EmpiricalData(initial_noise(range(6), (2, 3), F64), torch.arange(6) % 2)]
)
def test_a_level_per_sample_is_each_level_alone(
    schedule: Schedule, oracle: GaussianMixture | EmpiricalData
) -> None:
    """Distillation asks oracles at one level per sample: each gets what its own level gives, the density
    too."""
    shape = (1,) if oracle is LINE else (2, 3)
    x_t, t = initial_noise(range(3), shape, F64), torch.tensor([0.9, 0.5, 0.1], dtype=F64) * schedule.t_max
    condition = Condition(label=torch.tensor([0, 1, 5]))
    batch = oracle(x_t, schedule.levels(t), condition)
    for i in range(3):
        level = schedule.level(float(t[i]))
        alone = oracle(x_t[i : i + 1], level, condition[i : i + 1])
        torch.testing.assert_close(batch.x0[i], alone.x0[0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            batch.eps[i], alone.eps[0], rtol=1e-12, atol=1e-12 * max(1, 1 / level.sigma)
        )
        if isinstance(oracle, GaussianMixture):
            torch.testing.assert_close(
                oracle.log_prob(x_t, schedule.levels(t))[i],
                oracle.log_prob(x_t[i : i + 1], level)[0],
                rtol=1e-12,
                atol=1e-12,
            )
