"""The forward process and its conditionals: Bayes' rule, composition, published special cases, both ends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffusion import (
    DiscreteVP,
    Gaussian,
    Level,
    NoiseLevel,
    Schedule,
    betas,
    initial_noise,
    learned_std,
    marginal,
    posterior,
    tau,
    transition,
)

F64 = torch.float64
ONE, ZERO = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)


def pair_of(schedule: Schedule, t: float = 0.8, s: float = 0.3) -> tuple[NoiseLevel, NoiseLevel]:
    """A noisier and a cleaner level inside the schedule, at these fractions of its range."""
    return schedule.level(t * schedule.t_max), schedule.level(s * schedule.t_max)


def test_marginal_is_the_definition(schedule: Schedule) -> None:
    """x_t = alpha x0 + sigma eps, one level for all or one each."""
    x0, eps = initial_noise([0, 1], (3,), F64), initial_noise([2, 3], (3,), F64)
    t, s = pair_of(schedule)
    rows = torch.stack([t.alpha * x0[0] + t.sigma * eps[0], s.alpha * x0[1] + s.sigma * eps[1]])
    assert torch.equal(marginal(x0, eps, schedule.levels(torch.tensor([t.t, s.t], dtype=F64))), rows)


def test_noise_added_twice_is_noise_added_once(schedule: Schedule) -> None:
    """q(x_t | x_s) after q(x_s | x0) is q(x_t | x0): the means multiply, the variances add up."""
    t, s = pair_of(schedule)
    step = transition(ONE, s, t)
    kept = float(step.mean)
    assert kept * s.alpha == pytest.approx(t.alpha, rel=1e-14)
    assert kept**2 * s.sigma**2 + float(step.std) ** 2 == pytest.approx(t.sigma**2, rel=1e-12)


def test_posterior_is_bayes_rule(schedule: Schedule) -> None:
    """q(x_s | x_t, x0) is the product of q(x_t | x_s) and q(x_s | x0): precisions add, means weigh by
    precision."""
    t, s = pair_of(schedule)
    x_t, x0 = torch.tensor([0.7], dtype=F64), torch.tensor([-1.2], dtype=F64)
    c, var = t.alpha / s.alpha, t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
    precision = c**2 / var + 1 / s.sigma**2
    mean = (c / var * x_t + s.alpha * x0 / s.sigma**2) / precision
    got = posterior(x_t, x0, t, s)
    torch.testing.assert_close(got.mean, mean, rtol=1e-12, atol=1e-12)
    assert got.std == pytest.approx(precision**-0.5, rel=1e-12)


def test_posterior_averages_to_the_marginal(schedule: Schedule) -> None:
    """Over x_t ~ q(x_t | x0), the posterior at s is q(x_s | x0): no noise is lost or made, also from pure
    noise."""
    for start in (0.8, 1.0):
        t, s = pair_of(schedule, t=start)
        of_x0, of_x_t = float(posterior(ZERO, ONE, t, s).mean), float(posterior(ONE, ZERO, t, s).mean)
        assert of_x0 + of_x_t * t.alpha == pytest.approx(s.alpha, rel=1e-12)
        assert of_x_t**2 * t.sigma**2 + float(posterior(ONE, ZERO, t, s).std) ** 2 == pytest.approx(
            s.sigma**2, rel=1e-12
        )


@pytest.mark.parametrize("row", [1, 2, 500, 999])
def test_ddpm_equation_7(row: int) -> None:
    """Ho et al. 2020, eq. 7 on neighbouring rows, in their own symbols: beta, alpha, alpha_bar; and the
    forward step's beta."""
    beta = float(betas.linear()[row])
    bar, bar_last = (float(betas.alpha_bar(betas.linear())[i]) for i in (row, row - 1))
    schedule = DiscreteVP.linear()
    t, s = schedule.level(row), schedule.level(row - 1)
    got = posterior(torch.tensor([0.3], dtype=F64), torch.tensor([0.9], dtype=F64), t, s)
    mean = (
        math.sqrt(bar_last) * beta / (1 - bar) * 0.9 + math.sqrt(1 - beta) * (1 - bar_last) / (1 - bar) * 0.3
    )
    assert float(got.mean) == pytest.approx(mean, rel=1e-11)
    assert float(got.std) ** 2 == pytest.approx((1 - bar_last) / (1 - bar) * beta, rel=1e-10)
    assert float(transition(ONE, s, t).std) ** 2 == pytest.approx(beta, rel=1e-10)


def test_posterior_at_both_ends(schedule: Schedule) -> None:
    """At data it is x0 itself with no noise; from pure noise it is q(x_s | x0), whatever x_t is."""
    x_t, x0 = torch.tensor([5.0], dtype=F64), torch.tensor([0.25], dtype=F64)
    assert posterior(x_t, x0, schedule.level(schedule.t_max), schedule.terminal) == Gaussian(x0, 0.0)
    s = pair_of(schedule)[1]
    assert posterior(x_t, x0, NoiseLevel(math.nan, 0.0, 1.0), s) == Gaussian(s.alpha * x0, s.sigma)


def test_tau(schedule: Schedule) -> None:
    """The share of new noise: 0 for no step, 1 at data and from pure noise, and 1 - (ratio_s / ratio_t)^2
    between."""
    t, s = pair_of(schedule)
    assert tau(t, t) == 0.0
    assert tau(t, schedule.terminal) == 1.0
    assert tau(NoiseLevel(math.nan, 0.0, 1.0), s) == 1.0
    assert tau(t, s) == pytest.approx(1 - (s.ratio / t.ratio) ** 2, rel=1e-12)


def test_a_level_per_sample_is_each_level_alone(schedule: Schedule) -> None:
    """Batched conditionals give each sample what its own pair of levels gives."""
    t, s = (torch.tensor(fractions, dtype=F64) * schedule.t_max for fractions in ([0.9, 0.6], [0.4, 0.1]))
    x, x0 = initial_noise([0, 1], (2, 2), F64), initial_noise([2, 3], (2, 2), F64)
    down, up = (
        posterior(x, x0, schedule.levels(t), schedule.levels(s)),
        transition(x, schedule.levels(s), schedule.levels(t)),
    )
    for i in range(2):
        t_i, s_i = schedule.level(float(t[i])), schedule.level(float(s[i]))
        for batch, alone in ((down, posterior(x[i], x0[i], t_i, s_i)), (up, transition(x[i], s_i, t_i))):
            torch.testing.assert_close(batch.mean[i], alone.mean, rtol=1e-13, atol=1e-13)
            assert float(torch.as_tensor(batch.std)[i]) == pytest.approx(float(alone.std), rel=1e-12)


@pytest.mark.parametrize("std", [2.0, torch.tensor([2.0, 3.0])])
def test_gaussian_sample(std: float | Tensor) -> None:
    """mean + std z, std one number or one per sample."""
    got = Gaussian(torch.ones(2, 1, 1), std).sample(torch.ones(2, 1, 1))
    assert got.flatten().tolist() == ([3, 3] if isinstance(std, float) else [3, 4])


def test_learned_std_interpolates_log_variance() -> None:
    """Nichol & Dhariwal 2021, eq. 15: lower at -1, upper at 1, their geometric mean at 0."""
    got = learned_std(torch.tensor([[-1.0, 1.0, 0.0, 0.5]], dtype=F64), 0.1, 0.4)
    expected = math.exp(0.5 * (0.75 * math.log(0.4**2) + 0.25 * math.log(0.1**2)))
    assert got[0].tolist() == pytest.approx([0.1, 0.4, 0.2, expected], rel=1e-14)


def test_learned_std_takes_bounds_per_sample() -> None:
    """Bounds may be one number per sample, as in training."""
    lower, upper = torch.tensor([0.1, 0.2], dtype=F64), torch.tensor([0.4, 0.8], dtype=F64)
    assert learned_std(torch.zeros(2, 1, dtype=F64), lower, upper).flatten().tolist() == pytest.approx(
        [0.2, 0.4], rel=1e-14
    )


def test_levels_are_interchangeable(schedule: Schedule) -> None:
    """A function of levels takes either kind: one number for the batch, or one per sample."""
    levels: list[Level] = [
        schedule.level(0.5 * schedule.t_max),
        schedule.levels(torch.tensor([0.5, 0.5], dtype=F64) * schedule.t_max),
    ]
    x = torch.ones(2, 3, dtype=F64)
    one, each = (marginal(x, 2 * x, level) for level in levels)
    assert torch.equal(one, each)
