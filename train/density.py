"""Distributions of the training times t. The weight of each sample's loss is set in `train.weighting`.

A density is its quantile function, u in [0, 1] -> t. Times of a batch are stratified (Kingma et al. 2021,
appendix I.1): together they cover the range evenly, which lowers the variance of the loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from diffusion import Schedule, VarianceExploding


class Density(ABC):
    """A distribution of t on a schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share u of the samples lies, float64."""

    def sample(self, n: int) -> Tensor:
        """n times, (n,) float64 on the host, from torch's global generator. Whole numbers on a table."""
        u = (torch.rand((), dtype=torch.float64) + torch.arange(n, dtype=torch.float64) / n) % 1.0
        return self.quantile(u)

    def gaps(self) -> str:
        """A warning, or "", if a fifth of the noise range at either end gets hardly any samples.

        The range is that of sigma / (alpha + sigma): 0 for data, 1 for pure noise.
        """
        rare = self.quantile(torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64))
        ends = torch.tensor([self.schedule.t_min, self.schedule.t_max], dtype=torch.float64)
        (low, high), (least, most) = (1 / (1 + 1 / self.schedule.ratio(t)) for t in (rare, ends))
        missing = [f"below t={rare[0]:.3g}"] * bool(low - least > 0.2)
        missing += [f"above t={rare[1]:.3g}"] * bool(most - high > 0.2)
        if not missing:
            return ""
        where = " and ".join(missing)
        return f"this density has fewer than 1 of 10,000 samples {where}: nothing is learned there"


class Uniform(Density):
    """All times, or all rows of a table, with equal probability (Ho et al. 2020, alg. 1)."""

    def quantile(self, u: Tensor) -> Tensor:
        if (rows := self.schedule.rows) is not None:
            return (u * rows).floor().clamp(max=rows - 1)
        return self.schedule.t_min + u * (self.schedule.t_max - self.schedule.t_min)


class LogitNormal(Density):
    """logit(t) is normal: more samples in the middle of a flow on [0, 1] (Esser et al. 2024, eq. 19).

    shift multiplies sigma/alpha of every time (the same paper's eq. 23).
    """

    def __init__(self, schedule: Schedule, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> None:
        super().__init__(schedule)
        _check_std(std)
        if (schedule.t_min, schedule.t_max) != (0.0, 1.0):
            raise ValueError("a logit-normal density needs a schedule on [0, 1], such as flow or cosine_vp")
        self.mean, self.std, self.shift = mean, std, shift

    def quantile(self, u: Tensor) -> Tensor:
        return self.schedule.shift_t((self.mean + self.std * torch.special.ndtri(u)).sigmoid(), self.shift)


class LogNormal(Density):
    """log(sigma) is normal (Karras et al. 2022, table 1), within a variance-exploding schedule's range."""

    def __init__(self, schedule: Schedule, mean: float = -1.2, std: float = 1.2) -> None:
        super().__init__(schedule)
        _check_std(std)
        if not isinstance(schedule, VarianceExploding):
            raise ValueError("a log-normal density needs a variance-exploding schedule (ve)")
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor) -> Tensor:
        sigma = (self.mean + self.std * torch.special.ndtri(u)).exp()
        return sigma.clamp(self.schedule.t_min, self.schedule.t_max)


def _check_std(std: float) -> None:
    if not std > 0:
        raise ValueError(f"std of a density must be greater than 0, not {std:g}: all times would be equal")


def usual(schedule: Schedule) -> Density:
    """Log-normal on a variance-exploding schedule, uniform on others."""
    return LogNormal(schedule) if isinstance(schedule, VarianceExploding) else Uniform(schedule)


DENSITIES: dict[str, Callable[..., Density]] = {
    "usual": usual,
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "log_normal": LogNormal,
}
