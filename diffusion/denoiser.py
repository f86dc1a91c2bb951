"""A denoiser is a network with its schedule and prediction: one function (x_t, level) -> (x0, eps).

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
    """What solvers call with one level for the batch, and distillation with one level per sample.

    The condition goes to the network; wrappers pass it on. A function of (x_t, level) is enough for a solver,
    and for `sample` without a condition.
    """

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate: ...


class Denoiser:
    """network + schedule + prediction.

    The network is called as network(x, t, condition). x and the condition have its own dtype; t is float32
    (B,), or float64 if x_t is. A network with twice x's channels has a learned variance in the second half. t
    is the level's own, also between a table's first row (t = 0) and data (t = -1), unless the prediction
    defines another (EDM's preconditioning).
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
        """The raw network output, in x_t's dtype: the training loss compares it with `prediction.target`."""
        scale, dtype = self.prediction.input_scale, self.dtype
        x = x_t if scale is None else broadcast(scale(level), x_t) * x_t
        out = self.network(x.to(dtype or x.dtype), self._time(level, x_t), condition.to(dtype=dtype))
        b, c, *size = x_t.shape
        if out.shape not in ((b, c, *size), (b, 2 * c, *size)):
            shapes = f"{tuple(out.shape)} for x {tuple(x_t.shape)}"
            raise ValueError(f"the network returned {shapes}: it needs the same shape, or twice the channels")
        return out.to(x_t.dtype)

    def _time(self, level: Level, x_t: Tensor) -> Tensor:
        """The time input of the network, (B,), on x_t's device."""
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        own = self.prediction.network_time
        t = level.t if own is None else own(level)
        if isinstance(t, Tensor):
            return t.to(x_t.device, dtype, non_blocking=True).expand(len(x_t))
        # Filled on the device: a copy would wait for it.
        return torch.full((len(x_t),), t, dtype=dtype, device=x_t.device)

    @property
    def dtype(self) -> torch.dtype | None:
        """The network's dtype, None for a function without parameters."""
        parameter = self._parameter()
        return None if parameter is None else parameter.dtype

    @property
    def device(self) -> torch.device:
        """The device of the network, the CPU for a function without parameters."""
        parameter = self._parameter()
        return torch.device("cpu") if parameter is None else parameter.device

    def _parameter(self) -> nn.Parameter | None:
        return next(self.network.parameters(), None) if isinstance(self.network, nn.Module) else None


class Wrapper:
    """Base class of denoisers that wrap a denoiser; has the device of the wrapped one."""

    def __init__(self, denoiser: DenoiserLike) -> None:
        self.denoiser = denoiser

    @property
    def device(self) -> torch.device:
        return getattr(self.denoiser, "device", torch.device("cpu"))


class Clipped(Wrapper):
    """Clamp x0 to [low, high]; eps follows (DDPM's `clip_denoised`). For pixels: latents have no range."""

    def __init__(self, denoiser: DenoiserLike, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(denoiser)
        self.low, self.high = low, high

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        estimate = self.denoiser(x_t, level, condition)
        return Estimate.from_x0(x_t, estimate.x0.clamp(self.low, self.high), level, estimate.variance)


class Thresholded(Wrapper):
    """Dynamic thresholding (Saharia et al. 2022, sec. 2.3): clamp x0 to [-s, s] and divide by s; eps follows.

    s is a quantile of |x0| in each sample, at least 1, so that values saturated by guidance return to [-1, 1]
    instead of being cut off. For pixels: latents have no such range. percentile in (0, 1]: the share of
    values that s bounds.
    """

    def __init__(self, denoiser: DenoiserLike, percentile: float = 0.995) -> None:
        if not 0 < percentile <= 1:
            raise ValueError(f"percentile is a share in (0, 1], not {percentile:g}")
        super().__init__(denoiser)
        self.percentile = percentile

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        estimate = self.denoiser(x_t, level, condition)
        x0 = estimate.x0.reshape(len(x_t), -1)
        size = x0.abs().to(torch.promote_types(x0.dtype, torch.float32))
        s = size.quantile(self.percentile, dim=1, keepdim=True).clamp(min=1)
        return Estimate.from_x0(x_t, (x0.clamp(-s, s) / s).view_as(x_t), level, estimate.variance)


class OnSchedule(Wrapper):
    """A denoiser at the levels of any other schedule: x_t is rescaled to its own level of equal sigma/alpha.

    So a VP network can sample on EDM's sigmas, and a flow network on a cosine schedule, with the same x0 and
    eps.
    """

    def __init__(self, denoiser: DenoiserLike, schedule: Schedule) -> None:
        """schedule: the denoiser's own."""
        super().__init__(denoiser)
        self.schedule = schedule

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        own: Level
        if isinstance(level, BatchLevel):
            own = self.schedule.levels(self.schedule.t_from_ratio(level.sigma / level.alpha))
        else:
            own = self.schedule.level(float(self.schedule.t_from_ratio(level.ratio)))
        # Scale by sigma: it is positive wherever a denoiser is called, alpha may be 0.
        return self.denoiser(broadcast(own.sigma / level.sigma, x_t) * x_t, own, condition)
