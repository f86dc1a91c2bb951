"""A denoiser: a network, its schedule and its prediction, seen as one function (x_t, level) -> (x0, eps).

Everything that steers sampling (guidance, clipping, another schedule) is a denoiser that wraps a denoiser, so
that any of it works with any solver.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from diffusion.condition import NONE, Condition
from diffusion.level import BatchLevel, Level, broadcast
from diffusion.prediction import Estimate, Prediction
from diffusion.schedule import Schedule


class DenoiserLike(Protocol):
    """What solvers ask (at one level for the batch) and distillation too (one per sample). The condition goes
    to the network.

    Denoisers that wrap others always hand it on; a function of (x_t, level) alone does for a solver, and for
    `sample` without a condition.
    """

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate: ...


class Denoiser:
    """network + schedule + prediction.

    The network is called as network(x, t, condition): x and the condition in its own dtype, t a float32
    tensor (B,) (float64 beside float64 samples) whatever the network's dtype. A network with twice x's
    channels carries a learned variance in the second half. It is told the level's own t, also within the one
    index between a table's first row (t = 0) and data (t = -1), unless the prediction says otherwise (EDM's
    preconditioning).
    """

    def __init__(self, network: Callable[..., Tensor], schedule: Schedule, prediction: Prediction) -> None:
        self.network, self.schedule, self.prediction = network, schedule, prediction

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        out = self.output(x_t, level, condition)
        if out.shape[1] == 2 * x_t.shape[1]:
            out, variance = out.chunk(2, dim=1)
            return self.prediction.estimate(x_t, out, level, variance)
        return self.prediction.estimate(x_t, out, level)

    def output(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Tensor:
        """The raw network output at a level, in x_t's dtype: what a training loss compares with
        `prediction.target`."""
        scale, dtype = self.prediction.input_scale, self.dtype
        x = x_t if scale is None else broadcast(scale(level), x_t) * x_t
        out = self.network(x.to(dtype or x.dtype), self._time(level, x_t), condition.to(dtype=dtype))
        if out.shape[2:] != x_t.shape[2:] or out.shape[:2] not in (
            x_t.shape[:2],
            (len(x_t), 2 * x_t.shape[1]),
        ):
            raise ValueError(
                f"the network made {tuple(out.shape)} of x {tuple(x_t.shape)}: the same shape is needed, or "
                "twice the channels"
            )
        return out.to(x_t.dtype)

    def _time(self, level: Level, x_t: Tensor) -> Tensor:
        """The network's time (B,), on x_t's device."""
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        own = self.prediction.network_time
        t = level.t if own is None else own(level)
        if isinstance(t, Tensor):
            return t.to(x_t.device, dtype, non_blocking=True).expand(len(x_t))
        return torch.full(
            (len(x_t),), t, dtype=dtype, device=x_t.device
        )  # filled there: a copy would wait for the device

    @property
    def dtype(self) -> torch.dtype | None:
        """The network's dtype, None for a function without parameters."""
        parameter = self._parameter()
        return None if parameter is None else parameter.dtype

    @property
    def device(self) -> torch.device:
        """Where the network lives, the CPU for a function without parameters."""
        parameter = self._parameter()
        return torch.device("cpu") if parameter is None else parameter.device

    def _parameter(self) -> nn.Parameter | None:
        return next(self.network.parameters(), None) if isinstance(self.network, nn.Module) else None


class Wrapper:
    """Base of the denoisers that wrap a denoiser: it lives where the wrapped one lives."""

    def __init__(self, denoiser: DenoiserLike) -> None:
        self.denoiser = denoiser

    @property
    def device(self) -> torch.device:
        return getattr(self.denoiser, "device", torch.device("cpu"))


class Clipped(Wrapper):
    """Limit x0 to a range and let eps follow (`clip_denoised` of DDPM). For pixels in [-1, 1]; latents have
    no such range."""

    def __init__(self, denoiser: DenoiserLike, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(denoiser)
        self.low, self.high = low, high

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        estimate = self.denoiser(x_t, level, condition)
        return Estimate.from_x0(x_t, estimate.x0.clamp(self.low, self.high), level, estimate.variance)


class Thresholded(Wrapper):
    """Dynamic thresholding: limit x0 to [-s, s], divide by s, and let eps follow (Saharia et al. 2022, sec.
    2.3).

    s is the percentile of |x0| in each sample, at least 1: what high guidance saturates comes back within
    [-1, 1], not cut flat. For pixels; latents have no such range. percentile in (0, 1], the share of values
    that s bounds.
    """

    def __init__(self, denoiser: DenoiserLike, percentile: float = 0.995) -> None:
        if not 0 < percentile <= 1:
            raise ValueError(f"percentile is a share in (0, 1], not {percentile:g}")
        super().__init__(denoiser)
        self.percentile = percentile

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        estimate = self.denoiser(x_t, level, condition)
        x0 = estimate.x0.reshape(len(x_t), -1)
        s = (
            x0.abs()
            .to(torch.promote_types(x0.dtype, torch.float32))
            .quantile(self.percentile, dim=1, keepdim=True)
            .clamp(min=1)
        )
        return Estimate.from_x0(x_t, (x0.clamp(-s, s) / s).view_as(x_t), level, estimate.variance)


class OnSchedule(Wrapper):
    """A denoiser at the levels of any other schedule: the level of equal sigma/alpha on its own one, x
    rescaled to match.

    So a VP network samples on EDM's sigmas, or a flow network on a cosine schedule, with the same x0 and eps.
    """

    def __init__(self, denoiser: DenoiserLike, schedule: Schedule) -> None:
        """schedule: the denoiser's own, which levels are translated to."""
        super().__init__(denoiser)
        self.schedule = schedule

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        own: Level
        if isinstance(level, BatchLevel):
            own = self.schedule.levels(self.schedule.t_from_ratio(level.sigma / level.alpha))
        else:
            own = self.schedule.level(float(self.schedule.t_from_ratio(level.ratio)))
        # sigma is positive wherever a denoiser is asked, alpha is not: scale by sigma.
        return self.denoiser(broadcast(own.sigma / level.sigma, x_t) * x_t, own, condition)
