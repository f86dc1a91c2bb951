"""Loss weights: finite everywhere, the published min-SNR in every parametrisation, and losses that convert
exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion import (
    EPS,
    FLOW,
    X0,
    BatchLevel,
    CosineVP,
    DiscreteVP,
    Prediction,
    RectifiedFlow,
    Schedule,
    V,
    initial_noise,
    marginal,
)
from tests.conftest import PREDICTIONS
from train.weighting import WEIGHTINGS, Weighting, as_loss_of, min_snr, uniform

F64 = torch.float64


def inner(schedule: Schedule, n: int = 9) -> BatchLevel:
    """Levels off both ends."""
    return schedule.levels(torch.linspace(0.02, 0.98, n, dtype=F64) * schedule.t_max)


def loss(
    network: Prediction, weighting: Weighting, x0: Tensor, x0_hat: Tensor, eps: Tensor, level: BatchLevel
) -> Tensor:
    """The loss of a network that believes x0_hat, trained on its own output with a weight."""
    x_t = marginal(x0, eps, level)
    eps_hat = (x_t - level.alpha.view(-1, 1) * x0_hat) / level.sigma.view(-1, 1)
    error = network.target(x0_hat, eps_hat, level) - network.target(x0, eps, level)
    return weighting(level, network) * error.square().mean(1)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("prediction", [X0, V, FLOW], ids=lambda p: p.name)
@pytest.mark.parametrize(
    "schedule",
    [DiscreteVP.scaled_linear(zero_terminal_snr=True), CosineVP(), RectifiedFlow()],
    ids=["zero_snr", "cosine_vp", "flow"],
)
def test_weights_are_finite_at_pure_noise(schedule: Schedule, prediction: Prediction, name: str) -> None:
    """At every level down to zero SNR, where predictions that say something of x0 are trained, weights are
    finite and not negative.

    The x0-loss of an output that says nothing of x0 is infinite, and x0 says nothing of eps: those two are
    left out at the ends.
    """
    t = torch.linspace(0.01, 1, 100, dtype=F64) * schedule.t_max
    weight = WEIGHTINGS[name]()(schedule.levels(t), prediction)
    assert weight.isfinite().all()
    assert (weight >= 0).all()
    assert weight.dtype == F64


@pytest.mark.parametrize("name", ["uniform", "min_snr", "eps"])
def test_eps_weights_are_finite_at_pure_noise(name: str) -> None:
    """An eps-prediction at zero SNR has weight 1, by min-SNR too, where published code divides by zero."""
    schedule = DiscreteVP.scaled_linear(zero_terminal_snr=True)
    weight = WEIGHTINGS[name]()(schedule.levels(torch.tensor([998.0, 999.0])), EPS)
    torch.testing.assert_close(weight, torch.ones(2, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_published_one(gamma: float) -> None:
    """Hang et al. 2023: min(1, gamma/SNR) on eps, min(SNR, gamma)/(SNR + 1) on v, min(SNR, gamma) on x0, on a
    VP schedule."""
    schedule = DiscreteVP.linear()
    level = schedule.levels(torch.arange(1000, dtype=F64))
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    expected = {
        EPS: (gamma / snr).clamp(max=1),
        V: snr.clamp(max=gamma) / (snr + 1),
        X0: snr.clamp(max=gamma),
    }
    for prediction, weight in expected.items():
        torch.testing.assert_close(min_snr(gamma)(level, prediction), weight, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["min_snr", "eps", "x0", "v", "flow"])
@pytest.mark.parametrize("schedule", [DiscreteVP.linear(), RectifiedFlow()], ids=["vp", "flow"])
def test_a_weighting_is_one_loss_for_all_networks(schedule: Schedule, name: str) -> None:
    """The same belief about x0 costs the same, whatever the network predicts: eps, x0, v and flow agree to
    1e-9."""
    level = inner(schedule)
    x0, x0_hat, eps = (initial_noise(range(k, k + 9), (6,), F64) for k in (0, 10, 20))
    losses = [
        loss(network, WEIGHTINGS[name](), x0, x0_hat, eps, level)
        for network in PREDICTIONS.values()
        if network.name != "edm"
    ]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction", [EPS, X0, V, FLOW], ids=lambda p: p.name)
def test_own_loss_has_weight_one(prediction: Prediction) -> None:
    """The eps-loss of an eps-network is the plain squared error, and so on; uniform is 1 for all."""
    level = inner(RectifiedFlow())
    for weighting in (as_loss_of(prediction), uniform):
        assert torch.equal(weighting(level, prediction), torch.ones(9, dtype=F64))
