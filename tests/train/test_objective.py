"""The denoising objective: zero for the ideal network, conditions dropped as asked, and the bound that trains a variance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion import EPS, Denoiser, DiscreteVP, Prediction, RectifiedFlow, Schedule, initial_noise, marginal
from train.density import Uniform
from train.objective import DenoisingObjective, drop_conditions
from train.variational import variational_bound
from train.weighting import uniform

F64 = torch.float64
TABLE = DiscreteVP.linear(steps=50)


def test_the_ideal_denoiser_of_a_point_has_no_loss(schedule: Schedule, prediction: Prediction) -> None:
    """Whose data is one point knows the noise: the loss is 0 for every prediction on every schedule, and is not for another point."""
    point = initial_noise([3], (1, 2, 2), F64)

    def ideal(x: Tensor, t: Tensor) -> Tensor:
        level = schedule.levels(t)
        alpha, sigma = (value.view(-1, 1, 1, 1) for value in (level.alpha, level.sigma))
        return prediction.target(point.expand_as(x), (x - alpha * point) / sigma, level)

    objective = DenoisingObjective(schedule, prediction, Uniform(schedule), uniform)
    torch.manual_seed(0)
    denoiser = Denoiser(ideal, schedule, prediction)
    assert float(objective(denoiser, {"x0": point.repeat(64, 1, 1, 1)}).max()) < 1e-20
    assert float(objective(denoiser, {"x0": (point + 1).repeat(64, 1, 1, 1)}).min()) > 1e-9


def test_the_loss_is_the_weighted_mean_square() -> None:
    """One loss per sample: the weight at its level times the mean square of output minus target."""
    x0 = initial_noise(range(8), (1, 2, 2), F64)
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.extend([x, t])
        return torch.zeros_like(x)

    objective = DenoisingObjective(TABLE, EPS, Uniform(TABLE), lambda level, prediction: level.t + 1)
    torch.manual_seed(0)
    found = objective(Denoiser(network, TABLE, EPS), {"x0": x0})
    x_t, t = seen
    level = TABLE.levels(t)
    eps = (x_t - level.alpha.view(-1, 1, 1, 1) * x0) / level.sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(found, (t + 1) * eps.square().mean((1, 2, 3)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 1.0])
def test_conditions_are_dropped_together_as_often_as_asked(probability: float) -> None:
    """A share of the samples gets the null value of every condition; the others keep theirs. The share is within 4 standard errors."""
    n = 4000
    cond = {"label": torch.arange(n) % 10, "vector": torch.ones(n, 3, 2)}
    torch.manual_seed(0)
    found = drop_conditions(cond, {"label": 10, "vector": torch.tensor([5.0, 7.0])}, probability)
    dropped = found["label"] == 10
    assert torch.equal(found["label"][~dropped], cond["label"][~dropped])
    assert torch.equal(found["vector"][dropped], torch.tensor([5.0, 7.0]).expand(int(dropped.sum()), 3, 2))
    assert torch.equal(found["vector"][~dropped], cond["vector"][~dropped])
    assert abs(float(dropped.double().mean()) - probability) <= 4 * math.sqrt(probability * (1 - probability) / n)
    assert {name: value.dtype for name, value in found.items()} == {name: value.dtype for name, value in cond.items()}


def test_nothing_to_drop_stays() -> None:
    """Without conditions, or without null values, there is nothing to drop."""
    label = torch.arange(4)
    assert drop_conditions({}, {"label": 10}, 1.0) == {}
    assert drop_conditions({"label": label}, {}, 1.0)["label"] is label


def bound(t: int, x0: Tensor, x_t: Tensor, x0_hat: Tensor, v: Tensor) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 4-7, 10 and 15, from the betas: the term of one step for one sample, in bits per dimension."""
    alpha_bar = TABLE.alpha_bar
    before = torch.cat([torch.ones(1, dtype=F64), alpha_bar[:-1]])
    beta = 1 - alpha_bar / before
    posterior_variance = beta * (1 - before) / (1 - alpha_bar)
    clipped = torch.cat([posterior_variance[1:2], posterior_variance[1:]])
    c0 = beta * before.sqrt() / (1 - alpha_bar)
    ct = (1 - before) * (1 - beta).sqrt() / (1 - alpha_bar)
    share = (v + 1) / 2
    std = (0.5 * (share * beta[t].log() + (1 - share) * clipped[t].log())).exp()
    guess = Normal(c0[t] * x0_hat + ct[t] * x_t, std)
    if t > 0:
        exact = Normal(c0[t] * x0 + ct[t] * x_t, clipped[t].sqrt().expand_as(x_t))
        return kl_divergence(exact, guess).mean() / math.log(2)
    upper = torch.where(x0 > 0.999, 1.0, guess.cdf(x0 + 1 / 255))
    lower = torch.where(x0 < -0.999, 0.0, guess.cdf(x0 - 1 / 255))
    return -(upper - lower).log().mean() / math.log(2)


def belief(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """8-bit images with both extremes, noise, an estimate near the image, a variance."""
    x0 = (initial_noise(range(n), (1, 4, 4), F64).clamp(-1, 1) * 127.5 - 0.5).round() / 127.5 + 1 / 255
    x0[:, 0, 0, 0], x0[:, 0, 0, 1] = -1, 1
    noise, error = (initial_noise(range(k, k + n), (1, 4, 4), F64) for k in (50, 100))
    return x0, noise, x0 + 0.02 * error, initial_noise(range(150, 150 + n), (1, 4, 4), F64).tanh()


def test_the_bound_is_the_published_one() -> None:
    """Every step of a table: KL to the exact posterior, and at step 0 the likelihood of the 8-bit value with the clipped variance."""
    x0, eps, x0_hat, v = belief(50)
    level = TABLE.levels(torch.arange(50, dtype=F64))
    x_t = marginal(x0, eps, level)
    expected = torch.stack([bound(t, x0[t], x_t[t], x0_hat[t], v[t]) for t in range(50)])
    found = variational_bound(TABLE, x0, x_t, x0_hat, v, level)
    torch.testing.assert_close(found, 50 * expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(found.mean(), expected.sum(), rtol=1e-7, atol=0)  # steps drawn evenly estimate L_vlb, the sum


def test_the_bound_of_the_exact_posterior_is_zero() -> None:
    """A network that knows x0 and says -1, the posterior's own variance, loses nothing at any step after the first."""
    x0, eps, _, v = belief(49)
    level = TABLE.levels(torch.arange(1, 50, dtype=F64))
    found = variational_bound(TABLE, x0, marginal(x0, eps, level), x0, -torch.ones_like(v), level)
    assert float(found.abs().max()) < 1e-12


def test_the_bound_trains_the_variance_only() -> None:
    """Its gradient reaches the second half of the output only, times its factor; the squared error reaches the first half only."""

    def gradient(bound_weight: float, weight: float) -> Tensor:
        out = torch.full((16, 2, 4, 4), 0.1, dtype=F64, requires_grad=True)
        objective = DenoisingObjective(
            TABLE, EPS, Uniform(TABLE), lambda level, prediction: torch.full_like(level.t, weight), bound_weight=bound_weight
        )
        torch.manual_seed(0)
        objective(Denoiser(lambda x, t: out, TABLE, EPS), {"x0": belief(16)[0]}).sum().backward()
        assert out.grad is not None
        return out.grad

    variance = gradient(0.5, 0.0)
    assert torch.equal(variance[:, 0], torch.zeros(16, 4, 4, dtype=F64))
    assert float(variance[:, 1].abs().min()) > 0
    torch.testing.assert_close(gradient(1.0, 0.0), 2 * variance)
    mean = gradient(0.0, 1.0)
    assert float(mean[:, 0].abs().min()) > 0
    assert torch.equal(mean[:, 1], torch.zeros(16, 4, 4, dtype=F64))


def test_a_learned_variance_needs_a_table() -> None:
    """The bound has steps only where the schedule has rows."""
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="DiscreteVP"):
        variational_bound(RectifiedFlow(), x, x, x, x, RectifiedFlow().levels(torch.tensor([0.5])))
