"""Consistency functions: the identity at data, and the two published parametrisations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import (
    EPS,
    NONE,
    Condition,
    ConsistencyFunction,
    CosineVP,
    Denoiser,
    DiscreteVP,
    NoiseLevel,
    Prediction,
    RectifiedFlow,
    Schedule,
    VarianceExploding,
    build_blend,
    cm,
    edm,
    initial_noise,
    lcm,
    marginal,
)
from tests.conftest import PREDICTIONS

F64 = torch.float64
X = initial_noise([0, 1, 2], (2, 2, 2), F64)


def network(x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
    """Any smooth function of x and t."""
    return (2 * x).sin() + t.view(-1, 1, 1, 1).cos()


@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
@pytest.mark.parametrize("sigma_min", [0.002, 0.03])
def test_cm_is_the_identity_at_sigma_min(prediction: Prediction, sigma_min: float) -> None:
    """Song et al. 2023: f(x, sigma_min) = x to the last bit, whatever the network says."""
    function = ConsistencyFunction(Denoiser(network, VarianceExploding(), prediction), cm(sigma_min))
    assert torch.equal(function(X, VarianceExploding().level(sigma_min)).x0, X)


def test_cm_is_the_identity_on_x_over_alpha_elsewhere() -> None:
    """On schedules that shrink the data, f at the ratio sigma_min is x / alpha, to rounding of the ratio."""
    for schedule in (CosineVP(), RectifiedFlow(), DiscreteVP.scaled_linear()):
        level = schedule.level(float(schedule.t_from_ratio(0.03)))
        function = ConsistencyFunction(Denoiser(network, schedule, EPS), cm(0.03))
        torch.testing.assert_close(function(X, level).x0, X / level.alpha, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "schedule", [CosineVP(), RectifiedFlow(), DiscreteVP.linear(zero_terminal_snr=True)], ids=type
)
def test_cm_ends_in_the_estimate_at_pure_noise(schedule: Schedule) -> None:
    """x_t holds nothing of x0 at alpha = 0: f is x0_hat there, finite, and what levels beside it tend to."""
    end, beside = (schedule.level(t) for t in (schedule.t_max, schedule.t_max * (1 - 1e-9)))
    assert end.alpha == 0
    assert cm()(end) == (0, 1)
    skip, share = cm()(beside)
    assert (skip, share) == pytest.approx((0, 1), abs=1e-5)


@pytest.mark.parametrize("scaling", [10.0, 3.0])
def test_lcm_is_the_identity_at_time_zero(scaling: float) -> None:
    """Luo et al. 2023: f(x, t = 0) = x to the last bit, on the table whose first row is noisy and nothing
    else is exact."""
    schedule = DiscreteVP.scaled_linear()
    function = ConsistencyFunction(Denoiser(network, schedule, EPS), lcm(scaling))
    assert torch.equal(function(X, schedule.level(0)).x0, X)


@pytest.mark.parametrize("sigma", [0.002, 0.01, 0.5, 80.0])
@pytest.mark.parametrize("sigma_data", [0.5, 1.1])
def test_cm_is_edm_moved_by_sigma_min(sigma: float, sigma_data: float) -> None:
    """Song et al. 2023, appendix C: f = c_skip x + c_out F(c_in x, log(sigma)/4), in their own scalings."""
    low = 0.002
    c_skip = sigma_data**2 / ((sigma - low) ** 2 + sigma_data**2)
    c_out = sigma_data * (sigma - low) / math.sqrt(sigma**2 + sigma_data**2)
    c_in = 1 / math.sqrt(sigma**2 + sigma_data**2)
    x = sigma * X
    expected = c_skip * x + c_out * network(c_in * x, torch.full((3,), sigma, dtype=F64).log() / 4)
    function = ConsistencyFunction(
        Denoiser(network, VarianceExploding(), edm(sigma_data)), cm(low, sigma_data)
    )
    torch.testing.assert_close(
        function(x, NoiseLevel(sigma, 1.0, sigma)).x0, expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("t", [0.0, 19.0, 999.0])
def test_lcm_is_the_published_blend(t: float) -> None:
    """Luo et al. 2023, as LCM weights expect: c_skip x + c_out x0_hat, with s = 10 t and sigma_data = 0.5."""
    schedule = DiscreteVP.scaled_linear()
    level, denoiser = schedule.level(t), Denoiser(network, schedule, EPS)
    s = 10 * t
    expected = 0.25 / (s**2 + 0.25) * X + s / math.sqrt(s**2 + 0.25) * denoiser(X, level).x0
    torch.testing.assert_close(
        ConsistencyFunction(denoiser, lcm())(X, level).x0, expected, rtol=1e-13, atol=1e-13
    )


@pytest.mark.parametrize("make", [cm, lcm])
def test_a_level_per_sample_is_each_level_alone(make: Callable[[], Any]) -> None:
    """In training every sample has its own level; f is the same, and its eps explains x_t."""
    schedule = CosineVP()
    t = torch.tensor([0.1, 0.4, 0.9], dtype=F64)
    function = ConsistencyFunction(Denoiser(network, schedule, EPS), make())
    batch = function(X, schedule.levels(t))
    for i in range(3):
        torch.testing.assert_close(
            batch.x0[i], function(X[i : i + 1], schedule.level(float(t[i]))).x0[0], rtol=1e-12, atol=1e-12
        )
    torch.testing.assert_close(marginal(batch.x0, batch.eps, schedule.levels(t)), X, rtol=0, atol=1e-13)


def test_blends_by_name() -> None:
    """A description builds the parametrisation it names with its options; an unknown name raises."""
    level = RectifiedFlow().level(0.5)
    assert build_blend({"name": "cm", "ratio_min": 0.1})(level) == cm(0.1)(level) != cm()(level)
    assert build_blend({"name": "lcm", "scaling": 3.0})(level) == lcm(3.0)(level)
    with pytest.raises(ValueError, match="no consistency parametrisation named 'lmc'"):
        build_blend({"name": "lmc"})
