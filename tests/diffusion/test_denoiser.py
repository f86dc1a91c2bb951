"""Denoisers: what the network is told, dtypes, learned variance, EDM's preconditioning, and the wrappers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion import (
    EPS,
    FLOW,
    NONE,
    X0,
    ClassifierFreeGuidance,
    Clipped,
    Condition,
    CosineVP,
    Denoiser,
    DiscreteVP,
    Level,
    NoiseLevel,
    OnSchedule,
    Prediction,
    RectifiedFlow,
    Schedule,
    Thresholded,
    V,
    VarianceExploding,
    edm,
    initial_noise,
    marginal,
)
from diffusion.oracle import GaussianMixture
from tests.peers import diffusers

F64 = torch.float64
MIXTURE = GaussianMixture(initial_noise([1, 2, 3], (2, 2, 2), F64), torch.tensor([0.3, 0.5, 0.2], dtype=F64))
X = initial_noise([4, 5], (2, 2, 2), F64)


def told(x_t: Tensor, level: Level, denoiser: Denoiser, condition: Condition = NONE) -> dict[str, Any]:
    """What the denoiser's network is called with."""
    seen: dict[str, Any] = {}

    def network(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        seen.update(x=x, t=t, condition=condition)
        return x

    Denoiser(network, denoiser.schedule, denoiser.prediction)(x_t, level, condition)
    return seen


def fake(schedule: Schedule, prediction: Prediction) -> Denoiser:
    """A perfect network of that prediction for the mixture: it outputs the target of the closed-form
    estimate."""

    def network(x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
        level = schedule.level(float(t[0]))
        x0, eps = MIXTURE(x, level)
        return prediction.target(x0, eps, level)

    return Denoiser(network, schedule, prediction)


def test_a_perfect_network_gives_the_oracle_back(schedule: Schedule, prediction: Prediction) -> None:
    """network -> Denoiser is the closed-form estimate, for every prediction on every schedule, to 1e-12 (of
    sigma, if larger)."""
    for t in (0.9, 0.5, 0.1):
        level = schedule.level(t * schedule.t_max)
        x = level.sigma * X
        got, expected = fake(schedule, prediction)(x, level), MIXTURE(x, level)
        torch.testing.assert_close(got.x0, expected.x0, rtol=0, atol=1e-12 * max(1, level.sigma))
        torch.testing.assert_close(got.eps, expected.eps, rtol=0, atol=1e-12 * max(1, 1 / level.sigma))


def test_the_network_is_told_the_schedules_own_time() -> None:
    """t is (B,): float64 beside float64 samples, else float32; conditions go through untouched."""
    denoiser, level = (
        Denoiser(lambda x, t, condition: x, DiscreteVP.linear(), EPS),
        DiscreteVP.linear().level(123.25),
    )
    seen = told(X, level, denoiser, Condition(label=torch.tensor([3, 4])))
    assert seen["t"].tolist() == [123.25, 123.25]
    assert seen["t"].dtype == F64
    assert seen["x"] is X
    assert seen["condition"].label.tolist() == [3, 4]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert told(X.to(dtype), level, denoiser)["t"].dtype == torch.float32


def test_a_batch_of_levels_tells_each_sample_its_own_time() -> None:
    """In training every sample has its own t."""
    levels = RectifiedFlow().levels(torch.tensor([0.25, 0.75]))
    assert told(X, levels, Denoiser(lambda x, t, condition: x, RectifiedFlow(), FLOW))["t"].tolist() == [
        0.25,
        0.75,
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_the_network_runs_in_its_own_dtype(dtype: torch.dtype) -> None:
    """x and the condition are cast to the weights' dtype on the way in, and x back on the way out; time and
    the scale keep theirs."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, dtype=dtype))

        def forward(self, x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
            assert (x.dtype, t.dtype) == (dtype, torch.float32)
            dtypes = [value.dtype for value in condition.tensors.values()]
            assert dtypes == [dtype, torch.int64, torch.float32]
            return x * self.weight

    denoiser = Denoiser(Net(), RectifiedFlow(), X0)
    x = X.float()
    condition = Condition(
        torch.ones(len(x), 1, 2), label=torch.ones(len(x), dtype=torch.long), guidance=torch.ones(len(x))
    )
    estimate = denoiser(x, RectifiedFlow().level(0.7), condition)
    assert (denoiser.dtype, estimate.x0.dtype, estimate.eps.dtype) == (dtype, torch.float32, torch.float32)
    assert torch.equal(estimate.x0, x.to(dtype).float())


def test_learned_variance_is_the_second_half_of_the_channels() -> None:
    """Twice the channels: the first half predicts, the second is handed on as it is; the same channels carry
    none."""
    level = DiscreteVP.linear().level(500)
    wide = Denoiser(lambda x, t, condition: torch.cat([x.sin(), x.cos()], 1), DiscreteVP.linear(), EPS)(
        X, level
    )
    narrow = Denoiser(lambda x, t, condition: x.sin(), DiscreteVP.linear(), EPS)(X, level)
    assert torch.equal(wide.x0, narrow.x0)
    assert torch.equal(wide.eps, narrow.eps)
    assert wide.variance is not None
    assert torch.equal(wide.variance, X.cos())
    assert narrow.variance is None


@pytest.mark.parametrize("sigma_data", [0.5, 1.2])
@pytest.mark.parametrize("sigma", [0.002, 1.0, 80.0])
def test_edm_preconditioning_is_table_1(sigma: float, sigma_data: float) -> None:
    """Karras et al. 2022, eq. 7: D = c_skip x + c_out F(c_in x; log(sigma)/4)."""
    schedule, level, x = VarianceExploding(), NoiseLevel(sigma, 1.0, sigma), sigma * X
    q = (sigma**2 + sigma_data**2) ** 0.5
    c_noise = torch.tensor(sigma, dtype=F64).log() / 4
    expected = sigma_data**2 / q**2 * x + sigma * sigma_data / q * ((x / q).sin() + c_noise)
    denoiser = Denoiser(lambda x, t, condition: x.sin() + t.view(-1, 1, 1, 1), schedule, edm(sigma_data))
    torch.testing.assert_close(denoiser(x, level).x0, expected, rtol=1e-12, atol=1e-12)
    each = denoiser(x, schedule.levels(torch.tensor([sigma, sigma], dtype=F64))).x0
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "own", [DiscreteVP.scaled_linear(zero_terminal_snr=True), CosineVP(), RectifiedFlow()]
)
def test_the_same_x0_under_a_change_of_schedule(schedule: Schedule, own: Schedule) -> None:
    """A network asked at another schedule's level of equal sigma/alpha, x rescaled, believes the same x0 and
    eps."""
    wrapped = OnSchedule(fake(own, V), own)
    x0, eps = initial_noise([6, 7], (2, 2, 2), F64), X
    for t in (1.0, 0.6, 0.2):
        level = schedule.level(t * schedule.t_max)
        other = own.level(float(own.t_from_ratio(level.ratio)))
        got, expected = wrapped(marginal(x0, eps, level), level), MIXTURE(marginal(x0, eps, other), other)
        torch.testing.assert_close(got.x0, expected.x0, rtol=0, atol=1e-11)
        torch.testing.assert_close(got.eps, expected.eps, rtol=0, atol=1e-11)


def test_a_level_beyond_the_denoisers_own_schedule_raises() -> None:
    """A table that ends at sigma/alpha 14.6 was never trained on 80: no answer rather than a clamped one."""
    with pytest.raises(ValueError, match="t must lie in"):
        OnSchedule(fake(DiscreteVP.scaled_linear(), EPS), DiscreteVP.scaled_linear())(
            X, VarianceExploding().level(80.0)
        )


def test_clipping_limits_x0_and_eps_follows() -> None:
    """x0 within the range, x_t = alpha x0 + sigma eps still true, variance kept; inside the range nothing
    changes."""
    level, x = CosineVP().level(0.4), 3 * X
    wide = Denoiser(lambda x, t, condition: torch.cat([x, x.cos()], 1), CosineVP(), X0)
    got = Clipped(wide, -0.5, 1.5)(x, level)
    assert torch.equal(got.x0, x.clamp(-0.5, 1.5))
    torch.testing.assert_close(marginal(got.x0, got.eps, level), x, rtol=0, atol=1e-14)
    assert got.variance is not None
    assert torch.equal(got.variance, x.cos())
    loose, plain = Clipped(wide, -100, 100)(x, level), wide(x, level)
    assert torch.equal(loose.x0, plain.x0)
    torch.testing.assert_close(loose.eps, plain.eps, rtol=0, atol=1e-14)


def test_dynamic_thresholding_is_the_formula() -> None:
    """Each sample by itself: values beyond the percentile are cut to it, all are divided by it, and eps
    follows; variance kept.

    numpy's percentile is the peer. A sample within [-1, 1] at its percentile is only clipped to that range.
    """
    level, x = CosineVP().level(0.4), torch.cat([4 * X[:1], X[1:] / X[1:].abs().amax()])
    wide = Denoiser(lambda x, t, condition: torch.cat([x, x.cos()], 1), CosineVP(), X0)
    for percentile in (0.6, 0.995, 1.0):
        got = Thresholded(wide, percentile)(x, level)
        for x0, sample in zip(got.x0, x, strict=True):
            s = max(1.0, float(np.percentile(sample.abs().numpy(), 100 * percentile)))
            torch.testing.assert_close(
                x0, torch.tensor(np.clip(sample.numpy(), -s, s) / s), rtol=0, atol=1e-15
            )
        torch.testing.assert_close(marginal(got.x0, got.eps, level), x, rtol=0, atol=1e-14)
        assert got.variance is not None
        assert torch.equal(got.variance, x.cos())
        assert torch.equal(got.x0[1:], x[1:])
    edge = torch.full_like(x, 0.5)
    edge[:, 0, 0, 0] = 7.0
    assert torch.equal(Thresholded(wide, 0.6)(edge, level).x0, edge.clamp(-1, 1))


@pytest.mark.parametrize("percentile", [0.0, -0.5, 1.5, 99.5, math.nan])
def test_a_percentile_beyond_its_range_is_refused(percentile: float) -> None:
    """It is a share, not a number out of a hundred."""
    with pytest.raises(ValueError, match=r"percentile is a share in \(0, 1\]"):
        Thresholded(MIXTURE, percentile)


def test_dynamic_thresholding_equals_diffusers() -> None:
    """Its `_threshold_sample`, without the largest s that it allows for."""
    scheduler = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=math.inf
    )
    x, level = 3 * initial_noise([1, 2], (3, 5, 5), F64), CosineVP().level(0.4)
    got = Thresholded(Denoiser(lambda x, t, condition: x, CosineVP(), X0), 0.9)(x, level)
    torch.testing.assert_close(got.x0, scheduler._threshold_sample(x), rtol=0, atol=1e-15)


def test_wrappers_live_where_the_network_lives() -> None:
    """`device` is that of the innermost network's weights, the CPU for a plain function."""
    network = nn.Linear(1, 1, device="meta")
    for denoiser in (Denoiser(network, CosineVP(), V), Clipped(Denoiser(network, CosineVP(), V))):
        assert denoiser.device == torch.device("meta")
    assert OnSchedule(Clipped(fake(CosineVP(), V)), CosineVP()).device == torch.device("cpu")
    assert Clipped(MIXTURE).device == torch.device("cpu")


def test_wrappers_take_a_level_per_sample(schedule: Schedule) -> None:
    """Distillation asks at one level per sample: a wrapped denoiser gives each sample what its own level
    gives."""
    own, t = CosineVP(), torch.tensor([0.7, 0.2], dtype=F64) * schedule.t_max
    wrapped = ClassifierFreeGuidance(
        Clipped(OnSchedule(MIXTURE, own), -0.5, 0.5), 2.0, Condition(label=torch.tensor([0]))
    )
    batch = wrapped(X, schedule.levels(t), Condition(label=torch.tensor([1, 2])))
    for i in range(2):
        alone = wrapped(X[i : i + 1], schedule.level(float(t[i])), Condition(label=torch.tensor([1 + i])))
        torch.testing.assert_close(batch.x0[i], alone.x0[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(batch.eps[i], alone.eps[0], rtol=1e-11, atol=1e-11)
