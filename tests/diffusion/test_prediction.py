"""Predictions: published targets, one inversion for all, the singular points."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffusion import (
    EPS,
    FLOW,
    X0,
    CosineVP,
    Estimate,
    NoiseLevel,
    Prediction,
    RectifiedFlow,
    Schedule,
    V,
    edm,
    initial_noise,
)
from diffusion import marginal as noised
from tests.conftest import PREDICTIONS

F64 = torch.float64


def pair(n: int = 3) -> tuple[Tensor, Tensor]:
    """Data and noise, (n, 2, 2, 2) each."""
    return initial_noise(range(n), (2, 2, 2), F64), initial_noise(range(100, 100 + n), (2, 2, 2), F64)


def test_targets_are_the_published_ones() -> None:
    """eps; x0; v = alpha eps - sigma x0; flow velocity eps - x0."""
    x0, eps = pair()
    level = NoiseLevel(0.4, 0.8, 0.6)
    expected = {"eps": eps, "x0": x0, "v": 0.8 * eps - 0.6 * x0, "flow": eps - x0}
    for name, target in expected.items():
        torch.testing.assert_close(PREDICTIONS[name].target(x0, eps, level), target, rtol=0, atol=1e-15)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_edm_target_is_table_1(sigma: float, sigma_data: float) -> None:
    """Karras et al. 2022, eq. 7-8: F = (x0 - c_skip x) / c_out, and the denoiser is c_skip x + c_out F."""
    x0, eps = pair()
    level = NoiseLevel(sigma, 1.0, sigma)
    x = x0 + sigma * eps
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / math.sqrt(sigma**2 + sigma_data**2)
    torch.testing.assert_close(
        edm(sigma_data).target(x0, eps, level), (x0 - c_skip * x) / c_out, rtol=1e-11, atol=1e-11
    )
    out = eps.sin()
    torch.testing.assert_close(
        edm(sigma_data).estimate(x, out, level).x0, c_skip * x + c_out * out, rtol=1e-13, atol=1e-13
    )


def test_estimate_inverts_target(schedule: Schedule, prediction: Prediction) -> None:
    """(x_t, target) -> (x0, eps) gives back the pair, over the whole schedule; where the output says nothing
    it raises."""
    x0, eps = pair()
    for t in torch.linspace(schedule.t_min, schedule.t_max, 11).tolist():
        level = schedule.level(t)
        x_t, out = noised(x0, eps, level), prediction.target(x0, eps, level)
        if (prediction is EPS and level.alpha == 0) or (prediction is X0 and level.sigma == 0):
            with pytest.raises(
                ValueError,
                match=f"{prediction.name}-prediction does not determine "
                f"{'eps' if prediction is X0 else 'x0'}",
            ):
                prediction.estimate(x_t, out, level)
            continue
        estimate = prediction.estimate(x_t, out, level)
        # How far an output's rounding error is blown up: 1/alpha in x0 for eps, 1/sigma in eps for x0.
        blown = 1 / abs(float(prediction.determinant(level)))
        torch.testing.assert_close(
            estimate.x0, x0, rtol=0, atol=1e-14 * max(1, level.sigma * blown, level.sigma)
        )
        torch.testing.assert_close(estimate.eps, eps, rtol=0, atol=1e-14 * max(1, level.alpha * blown))
        assert estimate.variance is None


@pytest.mark.parametrize("schedule", [CosineVP(), RectifiedFlow()])
@pytest.mark.parametrize("prediction", [V, FLOW])
def test_velocities_are_finite_at_both_ends(schedule: Schedule, prediction: Prediction) -> None:
    """v and flow determine x0 and eps at data and at pure noise alike: their determinant is 1 on their own
    family."""
    for t in (0.0, 1.0):
        assert prediction.determinant(schedule.level(t)) == 1.0


def test_a_level_per_sample_is_each_level_alone(schedule: Schedule, prediction: Prediction) -> None:
    """Training's batch of levels gives each sample what its own level gives, targets and estimates."""
    x0, eps = pair()
    t = torch.tensor([0.2, 0.5, 0.7], dtype=F64) * schedule.t_max
    x_t = noised(x0, eps, schedule.levels(t))
    target = prediction.target(x0, eps, schedule.levels(t))
    batch = prediction.estimate(x_t, target, schedule.levels(t))
    for i in range(3):
        level = schedule.level(float(t[i]))
        torch.testing.assert_close(
            x_t[i], noised(x0[i], eps[i], level), rtol=1e-14, atol=1e-15
        )  # which rounds a sum only once
        torch.testing.assert_close(target[i], prediction.target(x0[i], eps[i], level), rtol=1e-14, atol=1e-14)
        alone = prediction.estimate(x_t[i], target[i], level)
        torch.testing.assert_close(
            torch.stack([batch.x0[i], batch.eps[i]]), torch.stack(list(alone)), rtol=1e-13, atol=1e-13
        )


def test_one_singular_sample_in_a_batch_raises() -> None:
    """A batch with one sample at pure noise cannot be inverted from eps."""
    levels = CosineVP().levels(torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match="start the grid below pure noise"):
        EPS.estimate(torch.zeros(2, 1), torch.zeros(2, 1), levels)


@pytest.mark.parametrize("other", [EPS, X0, V, FLOW])
def test_losses_agree_after_conversion(prediction: Prediction, other: Prediction) -> None:
    """An error in one output is the error of the same belief in another, times the ratio of determinants."""
    x0, eps = pair()
    level = CosineVP().level(0.37)
    x_t, error = noised(x0, eps, level), 0.1 * eps.cos()
    believed = prediction.estimate(x_t, prediction.target(x0, eps, level) + error, level)
    other_error = other.target(believed.x0, believed.eps, level) - other.target(x0, eps, level)
    ratio = other.determinant(level) / prediction.determinant(level)
    torch.testing.assert_close(other_error, ratio * error, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        believed.x0 - x0, -level.sigma / prediction.determinant(level) * error, rtol=1e-12, atol=1e-13
    )


def test_estimates_unpack_and_complete(schedule: Schedule) -> None:
    """`x0, eps = estimate`; from_x0 fills in the noise that makes x_t = alpha x0 + sigma eps hold."""
    x0, eps = pair()
    level = schedule.level(0.5 * schedule.t_max)
    got_x0, got_eps = Estimate.from_x0(noised(x0, eps, level), x0, level)
    assert torch.equal(got_x0, x0)
    torch.testing.assert_close(got_eps, eps, rtol=0, atol=1e-12)
