"""Where training spends its samples: probability densities over t. What each sample's loss counts is
`train.weighting`'s affair.

A density is its quantile function, u in [0, 1] -> t. Times of a batch are stratified (Kingma et al. 2021,
appendix I.1): each is distributed as stated, and together they cover the range evenly, which lowers the
variance of the loss.
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
        """The time below which a share u of all samples lies, float64."""

    def sample(self, n: int) -> Tensor:
        """n times, (n,) float64 on the host, from torch's global generator. On a table they are whole."""
        u = (torch.rand((), dtype=torch.float64) + torch.arange(n, dtype=torch.float64) / n) % 1.0
        return self.quantile(u)

    def gaps(self) -> str:
        """A warning if a fifth of the noise range at either end gets hardly any samples, else "".

        Noise is measured by sigma / (alpha + sigma), from 0 at data to 1 at pure noise.
        """
        rare = self.quantile(torch.tensor([1e-4, 1 - 1e-4], dtype=torch.float64))
        ends = torch.tensor([self.schedule.t_min, self.schedule.t_max], dtype=torch.float64)
        (low, high), (least, most) = (1 / (1 + 1 / self.schedule.ratio(t)) for t in (rare, ends))
        missing = [f"below t={rare[0]:.3g}"] * bool(low - least > 0.2) + [f"above t={rare[1]:.3g}"] * bool(
            most - high > 0.2
        )
        if not missing:
            return ""
        return (
            f"this density puts fewer than 1 of 10,000 samples {' and '.join(missing)}, where the network "
            "will not have learned anything"
        )


class Uniform(Density):
    """All times alike; on a table, all its rows (Ho et al. 2020, alg. 1)."""

    def quantile(self, u: Tensor) -> Tensor:
        if (rows := self.schedule.rows) is not None:
            return (u * rows).floor().clamp(max=rows - 1)
        return self.schedule.t_min + u * (self.schedule.t_max - self.schedule.t_min)


class LogitNormal(Density):
    """logit(t) is normal: more samples in the middle of a flow (Esser et al. 2024, eq. 19). For schedules on
    [0, 1].

    shift multiplies sigma/alpha of every time drawn (the same paper's eq. 23).
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
    """log(sigma) is normal (Karras et al. 2022, table 1). For variance-exploding schedules, whose range it is
    cut to."""

    def __init__(self, schedule: Schedule, mean: float = -1.2, std: float = 1.2) -> None:
        super().__init__(schedule)
        _check_std(std)
        if not isinstance(schedule, VarianceExploding):
            raise ValueError("a log-normal density needs a variance-exploding schedule (ve)")
        self.mean, self.std = mean, std

    def quantile(self, u: Tensor) -> Tensor:
        return (
            (self.mean + self.std * torch.special.ndtri(u))
            .exp()
            .clamp(self.schedule.t_min, self.schedule.t_max)
        )


def _check_std(std: float) -> None:
    if not std > 0:
        raise ValueError(f"std of a density must be greater than 0, not {std:g}: all times would be one")


def usual(schedule: Schedule) -> Density:
    """The density that models of a schedule are trained with: log-normal on a variance-exploding one,
    elsewhere uniform."""
    return LogNormal(schedule) if isinstance(schedule, VarianceExploding) else Uniform(schedule)


DENSITIES: dict[str, Callable[..., Density]] = {
    "usual": usual,
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "log_normal": LogNormal,
}
