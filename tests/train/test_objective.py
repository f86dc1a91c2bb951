"""The denoising objective: zero for the ideal network, conditions dropped as asked, and the bound that trains
a variance."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import models
from diffusion import (
    EPS,
    NONE,
    Condition,
    Denoiser,
    DiscreteVP,
    Prediction,
    RectifiedFlow,
    Schedule,
    V,
    initial_noise,
    marginal,
)
from tests.peers import diffusers
from train.density import Uniform
from train.objective import DenoisingObjective, batch_condition, draw_x0, drop_condition
from train.variational import variational_bound
from train.weighting import min_snr, uniform

F64 = torch.float64
TABLE = DiscreteVP.linear(steps=50)


def test_the_ideal_denoiser_of_a_point_has_no_loss(schedule: Schedule, prediction: Prediction) -> None:
    """Whose data is one point knows the noise: the loss is 0 for every prediction on every schedule, and is
    not for another point."""
    point = initial_noise([3], (1, 2, 2), F64)

    def ideal(x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
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

    def network(x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
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
    """A share of the samples gets the null value of every condition; the others keep theirs. The share is
    within 4 standard errors."""
    n = 4000
    condition = Condition(label=torch.arange(n) % 10, vector=torch.ones(n, 2))
    torch.manual_seed(0)
    null = Condition(label=torch.tensor([10]), vector=torch.tensor([[5.0, 7.0]]))
    found, cond = drop_condition(condition, null, probability).tensors, condition.tensors
    dropped = found["label"] == 10
    assert torch.equal(found["label"][~dropped], cond["label"][~dropped])
    assert torch.equal(found["vector"][dropped], torch.tensor([5.0, 7.0]).expand(int(dropped.sum()), 2))
    assert torch.equal(found["vector"][~dropped], cond["vector"][~dropped])
    assert abs(float(dropped.double().mean()) - probability) <= 4 * math.sqrt(
        probability * (1 - probability) / n
    )
    assert {name: value.dtype for name, value in found.items()} == {
        name: value.dtype for name, value in cond.items()
    }


def test_nothing_to_drop_stays() -> None:
    """Without conditions, or where none is dropped, all stays; without a null value there is nothing that
    could stand for one."""
    label = Condition(label=torch.arange(4))
    assert drop_condition(NONE, Condition(label=torch.tensor([10])), 1.0) is NONE
    assert drop_condition(label, NONE, 0.0) is label
    with pytest.raises(ValueError, match=r"objective\.drop=0\.5 needs a null value of 'label'"):
        drop_condition(label, Condition(context=torch.zeros(1, 2, 3)), 0.5)


def test_a_batch_may_say_itself_what_no_condition_is() -> None:
    """Its null.* go before the model's own, one per sample or one for all, and the network is never told them
    beside the conditions."""
    seen: list[dict[str, Tensor]] = []

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        seen.append(condition.tensors)
        return torch.zeros_like(x)

    rows = torch.arange(64.0)[:, None]
    batch = {
        "x0": torch.zeros(64, 1, 2, 2),
        "vector": rows,
        "null.vector": -rows - 1,
        "label": torch.ones(64).long(),
    }
    null = Condition(label=torch.tensor([10]), vector=torch.tensor([[0.5]]))
    objective = DenoisingObjective(TABLE, EPS, Uniform(TABLE), uniform, null, drop=0.5)
    torch.manual_seed(0)
    objective(Denoiser(network, TABLE, EPS), batch)
    vector, label = seen[0]["vector"], seen[0]["label"]
    assert seen[0].keys() == {"vector", "label"}
    dropped = label == 10
    assert 16 < int(dropped.sum()) < 48
    assert torch.equal(vector, torch.where(dropped[:, None], -rows - 1, rows))


def test_latents_are_drawn_anew_from_their_distribution() -> None:
    """x0 + x0_std * z, z standard normal and another one at every call; without x0_std the data is what it
    is."""
    mean, std = torch.full((1000, 1, 4, 4), 3.0, dtype=F64), torch.full((1000, 1, 4, 4), 0.5, dtype=F64)
    torch.manual_seed(0)
    first, second = (draw_x0({"x0": mean, "x0_std": std}) for _ in range(2))
    for x0 in (first, second):
        assert abs(float(x0.mean()) - 3) < 5 * 0.5 / math.sqrt(16000)
        assert abs(float(x0.std()) - 0.5) < 5 * 0.5 / math.sqrt(2 * 16000)
    assert abs(float(((first - 3) * (second - 3)).mean())) < 5 * 0.25 / math.sqrt(16000)
    assert draw_x0({"x0": mean}) is mean
    text = torch.zeros(1000, 2, 3)
    condition = batch_condition({"x0": mean, "x0_std": std, "null.context": text, "context": text})
    assert condition.tensors.keys() == {"context"}


@pytest.mark.parametrize("gamma", [None, 1.0, 5.0])
@pytest.mark.parametrize("said", ["epsilon", "v_prediction"])
def test_loss_and_gradient_are_those_of_the_usual_training_script(said: str, gamma: float | None) -> None:
    """diffusers' train_text_to_image on the same latents, noise and timesteps: add_noise, target, mean
    square, min-SNR; to 1e-5."""
    model = models.miniature("sd1")
    model.prediction = EPS if said == "epsilon" else V
    network = model.network.train()
    batch = {"x0": initial_noise(range(4), (4, 8, 8)), "context": initial_noise(range(4, 8), (77, 64))}
    weighting = uniform if gamma is None else min_snr(gamma)
    objective = DenoisingObjective(
        model.schedule, model.prediction, density := Uniform(model.schedule), weighting, drop=0
    )
    torch.manual_seed(3)
    loss = objective(model.network_denoiser(), batch).mean()
    ours = torch.autograd.grad(loss, list(network.parameters()))

    torch.manual_seed(3)
    timesteps = density.sample(4).long()
    noise = torch.randn_like(batch["x0"])
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=said
    )
    noisy = scheduler.add_noise(batch["x0"], noise, timesteps)
    target = noise if said == "epsilon" else scheduler.get_velocity(batch["x0"], noise, timesteps)
    out = network(noisy, timesteps.float(), Condition(context=batch["context"]))
    if gamma is None:
        expected = F.mse_loss(out, target)
    else:
        snr = diffusers.training_utils.compute_snr(scheduler, timesteps)
        weights = snr.clamp(max=gamma) / (snr if said == "epsilon" else snr + 1)
        expected = (F.mse_loss(out, target, reduction="none").mean((1, 2, 3)) * weights).mean()
    theirs = torch.autograd.grad(expected, list(network.parameters()))
    assert len(set(timesteps.tolist())) == 4
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    ours_flat, theirs_flat = (torch.cat([g.flatten() for g in gradient]) for gradient in (ours, theirs))
    assert float((ours_flat - theirs_flat).norm() / theirs_flat.norm()) < 1e-5


def bound(t: int, x0: Tensor, x_t: Tensor, x0_hat: Tensor, v: Tensor) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 4-7, 10 and 15, from the betas: the term of one step for one sample, in
    bits per dimension."""
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
    """Every step of a table: KL to the exact posterior, and at step 0 the likelihood of the 8-bit value with
    the clipped variance."""
    x0, eps, x0_hat, v = belief(50)
    level = TABLE.levels(torch.arange(50, dtype=F64))
    x_t = marginal(x0, eps, level)
    expected = torch.stack([bound(t, x0[t], x_t[t], x0_hat[t], v[t]) for t in range(50)])
    found = variational_bound(TABLE, x0, x_t, x0_hat, v, level)
    torch.testing.assert_close(found, 50 * expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        found.mean(), expected.sum(), rtol=1e-7, atol=0
    )  # steps drawn evenly estimate L_vlb, the sum


def test_the_bound_of_the_exact_posterior_is_zero() -> None:
    """A network that knows x0 and says -1, the posterior's own variance, loses nothing at any step after the
    first."""
    x0, eps, _, v = belief(49)
    level = TABLE.levels(torch.arange(1, 50, dtype=F64))
    found = variational_bound(TABLE, x0, marginal(x0, eps, level), x0, -torch.ones_like(v), level)
    assert float(found.abs().max()) < 1e-12


def test_the_bound_trains_the_variance_only() -> None:
    """Its gradient reaches the second half of the output only, times its factor; the squared error reaches
    the first half only."""

    def gradient(bound_weight: float, weight: float) -> Tensor:
        out = torch.full((16, 2, 4, 4), 0.1, dtype=F64, requires_grad=True)
        objective = DenoisingObjective(
            TABLE,
            EPS,
            Uniform(TABLE),
            lambda level, prediction: torch.full_like(level.t, weight),
            bound_weight=bound_weight,
        )
        torch.manual_seed(0)
        objective(Denoiser(lambda x, t, condition: out, TABLE, EPS), {"x0": belief(16)[0]}).sum().backward()
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
