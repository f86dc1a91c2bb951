"""Noise schedules: alpha and sigma as functions of time, x_t = alpha(t) * x0 + sigma(t) * eps.

A schedule is a pure function of t. It does not know steps, networks or solvers: those meet it in `time_grid`
and `Denoiser`. Times are floats or tensors of any shape on any device; results are float64 tensors of that
shape on the CPU.

Three families differ in how they scale (alpha, sigma) for a given noise-to-signal ratio sigma / alpha:
variance preserving (alpha^2 + sigma^2 = 1), flow (alpha + sigma = 1) and variance exploding (alpha = 1).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion import betas as beta_tables
from diffusion.level import BatchLevel, NoiseLevel
from diffusion.spec import check_mapping, check_type, make


class Schedule(ABC):
    """alpha(t), sigma(t) and the inverse, t from sigma / alpha.

    t_min, t_max  the range of times of training
    t_data        the time of clean data (alpha 1, sigma 0); t_min if training reaches it
    rows          the number of training indices if t is one, else None
    """

    t_min: float
    t_max: float
    t_data: float
    rows: int | None = None

    @abstractmethod
    def alpha(self, t: float | Tensor) -> Tensor:
        """Factor of the data."""

    @abstractmethod
    def sigma(self, t: float | Tensor) -> Tensor:
        """Factor of the noise."""

    @abstractmethod
    def t_from_ratio(self, ratio: float | Tensor) -> Tensor:
        """The time with sigma / alpha = `ratio`: 0 at data, inf at pure noise if the schedule has it."""

    @abstractmethod
    def family_norm(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The quantity that is 1 in the family: hypot(alpha, sigma), alpha + sigma, or alpha."""

    def ratio(self, t: float | Tensor) -> Tensor:
        """sigma / alpha, the noise-to-signal ratio."""
        return self.sigma(t) / self.alpha(t)

    def snr(self, t: float | Tensor) -> Tensor:
        """alpha^2 / sigma^2, the signal-to-noise ratio."""
        return (self.alpha(t) / self.sigma(t)).square()

    def level(self, t: float) -> NoiseLevel:
        """The level at time t, as host floats."""
        return NoiseLevel(float(t), float(self.alpha(t)), float(self.sigma(t)))

    def levels(self, t: Tensor) -> BatchLevel:
        """One level per sample for a batch of times (B,)."""
        t = _float64(t)
        return BatchLevel(t, self.alpha(t), self.sigma(t))

    @property
    def terminal(self) -> NoiseLevel:
        """Clean data: alpha 1, sigma 0."""
        return NoiseLevel(self.t_data, 1.0, 0.0)

    def shift_t(self, t: float | Tensor, factor: float) -> Tensor:
        """The time whose noise-to-signal ratio is `factor` times that of t.

        On a flow t' = factor*t / (1 + (factor-1)*t) (Esser et al. 2024, eq. 23); on VP schedules log-SNR
        falls by 2 log(factor) (Hoogeboom et al. 2023).
        """
        if factor <= 0:
            raise ValueError(f"a shift multiplies sigma/alpha and must be positive, not {factor:g}")
        return _float64(t) if factor == 1 else self.t_from_ratio(self.ratio(t) * factor)


class DiscreteVP(Schedule):
    """A variance-preserving table (DDPM, SD 1 / 2 / XL): t is the training index 0 ... N-1.

    Between rows log(sigma/alpha) is linear in t, as in k-diffusion. From the first row to data (t = -1)
    sigma/alpha is linear; up to a last row of zero SNR alpha/sigma is. So both ends are exact, without
    clamps.
    """

    def __init__(self, alpha_bar: Tensor) -> None:
        """alpha_bar (N,): the squared data factor of each row, strictly decreasing in [0, 1), N >= 2."""
        alpha_bar = alpha_bar.detach().to("cpu", torch.float64)
        if alpha_bar.ndim != 1 or len(alpha_bar) < 2:
            shape = tuple(alpha_bar.shape)
            raise ValueError(f"alpha_bar needs one dimension and at least 2 rows, not shape {shape}")
        if not (alpha_bar[0] < 1 and alpha_bar[-1] >= 0 and (alpha_bar.diff() < 0).all()):
            raise ValueError("alpha_bar must decrease strictly within [0, 1): betas must lie in (0, 1)")
        self.alpha_bar = alpha_bar
        self.t_min, self.t_max, self.t_data, self.rows = 0.0, float(len(alpha_bar) - 1), -1.0, len(alpha_bar)
        self._log_ratio = 0.5 * ((1 - alpha_bar).log() - alpha_bar.log())

    @classmethod
    def from_betas(cls, betas: Tensor, zero_terminal_snr: bool = False) -> DiscreteVP:
        """From a table of betas (N,), optionally rescaled to end in pure noise (Lin et al. 2024)."""
        alpha_bar = beta_tables.alpha_bar(betas)
        return cls(beta_tables.zero_terminal_snr(alpha_bar) if zero_terminal_snr else alpha_bar)

    @classmethod
    def linear(
        cls, start: float = 1e-4, end: float = 0.02, steps: int = 1000, zero_terminal_snr: bool = False
    ) -> DiscreteVP:
        """DDPM's betas: see `diffusion.betas.linear`."""
        return cls.from_betas(beta_tables.linear(start, end, steps), zero_terminal_snr)

    @classmethod
    def scaled_linear(
        cls, start: float = 0.00085, end: float = 0.012, steps: int = 1000, zero_terminal_snr: bool = False
    ) -> DiscreteVP:
        """Latent diffusion's betas: see `diffusion.betas.scaled_linear`."""
        return cls.from_betas(beta_tables.scaled_linear(start, end, steps), zero_terminal_snr)

    @classmethod
    def cosine(
        cls,
        offset: float = 0.008,
        max_beta: float = 0.999,
        steps: int = 1000,
        zero_terminal_snr: bool = False,
    ) -> DiscreteVP:
        """Improved DDPM's betas: see `diffusion.betas.cosine`."""
        return cls.from_betas(beta_tables.cosine(offset, max_beta, steps), zero_terminal_snr)

    @classmethod
    def sigmoid(
        cls, start: float = 1e-4, end: float = 0.02, steps: int = 1000, zero_terminal_snr: bool = False
    ) -> DiscreteVP:
        """Sigmoid betas: see `diffusion.betas.sigmoid`."""
        return cls.from_betas(beta_tables.sigmoid(start, end, steps), zero_terminal_snr)

    def ratio(self, t: float | Tensor) -> Tensor:
        t = self._inside(t)
        row = t.floor().clamp(0, self.t_max - 1).long()
        low, high = self._log_ratio[row], self._log_ratio[row + 1]
        fraction = t - row
        # A last row of zero SNR has an infinite ratio: its cell is linear in alpha/sigma instead.
        inside = torch.where(high.isinf(), low.exp() / (1 - fraction), (low + fraction * (high - low)).exp())
        return torch.where(t < 0, (t + 1) * self._log_ratio[0].exp(), inside)

    def alpha(self, t: float | Tensor) -> Tensor:
        return self._exact(t, self.alpha_bar.sqrt(), lambda ratio: 1 / _hypot_1(ratio))

    def sigma(self, t: float | Tensor) -> Tensor:
        return self._exact(t, (1 - self.alpha_bar).sqrt(), lambda ratio: 1 / _hypot_1(1 / ratio))

    def t_from_ratio(self, ratio: float | Tensor) -> Tensor:
        ratio = _float64(ratio)
        log = ratio.log()
        row = (torch.searchsorted(self._log_ratio, log, right=True) - 1).clamp(0, len(self.alpha_bar) - 2)
        low, high = self._log_ratio[row], self._log_ratio[row + 1]
        fraction = torch.where(high.isinf(), 1 - (low - log).exp(), (log - low) / (high - low))
        t = torch.where(log < self._log_ratio[0], ratio / self._log_ratio[0].exp() - 1, row + fraction)
        return self._inside(t)

    def family_norm(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.hypot(alpha, sigma)

    def _exact(self, t: float | Tensor, table: Tensor, from_ratio: Callable[[Tensor], Tensor]) -> Tensor:
        """The table's own value on its rows, an interpolated one between them."""
        t = self._inside(t)
        row = t.round().clamp(0, self.t_max).long()
        return torch.where(t == row, table[row], from_ratio(self.ratio(t)))

    def _inside(self, t: float | Tensor) -> Tensor:
        """t as float64, rounding errors at the ends removed. ValueError outside the table."""
        t = _float64(t)
        inside = (t >= self.t_data - 1e-6) & (t <= self.t_max + 1e-6)
        _require(t, inside, f"[-1, {self.t_max:g}] for this table of {self.rows} rows")
        return t.clamp(self.t_data, self.t_max)


class CosineVP(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), t in [0, 1]; usual with v-prediction (TrigFlow)."""

    t_min, t_max, t_data = 0.0, 1.0, 0.0

    def alpha(self, t: float | Tensor) -> Tensor:
        return ((1 - _unit(t)) * (math.pi / 2)).sin()  # cos(pi t / 2) would be 6e-17 at t = 1

    def sigma(self, t: float | Tensor) -> Tensor:
        return (_unit(t) * (math.pi / 2)).sin()

    def t_from_ratio(self, ratio: float | Tensor) -> Tensor:
        return _float64(ratio).atan() * (2 / math.pi)

    def family_norm(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.hypot(alpha, sigma)


class RectifiedFlow(Schedule):
    """alpha = 1 - t, sigma = t, t in [0, 1] (Liu et al. 2022; Lipman et al. 2023; SD3, Flux)."""

    t_min, t_max, t_data = 0.0, 1.0, 0.0

    def alpha(self, t: float | Tensor) -> Tensor:
        return 1 - _unit(t)

    def sigma(self, t: float | Tensor) -> Tensor:
        return _unit(t)

    def t_from_ratio(self, ratio: float | Tensor) -> Tensor:
        return 1 / (1 + 1 / _float64(ratio))

    def family_norm(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha + sigma


class VarianceExploding(Schedule):
    """alpha = 1, sigma = t, the noise's standard deviation (Song et al. 2021; Karras et al. 2022, EDM)."""

    t_data = 0.0

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0) -> None:
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"need 0 < sigma_min < sigma_max < inf, not {sigma_min:g} and {sigma_max:g}")
        self.t_min, self.t_max = float(sigma_min), float(sigma_max)

    def alpha(self, t: float | Tensor) -> Tensor:
        return torch.ones_like(_float64(t))

    def sigma(self, t: float | Tensor) -> Tensor:
        t = _float64(t)
        _require(t, t >= 0, "[0, inf) on this schedule")
        return t

    def t_from_ratio(self, ratio: float | Tensor) -> Tensor:
        return _float64(ratio)

    def family_norm(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha


class Shifted(Schedule):
    """A schedule with sigma/alpha multiplied by `factor` at every t: more noise for larger images.

    The network still gets t. For a flow alpha = (1-t)/(1+(factor-1)t) (Esser et al. 2024); for VP log-SNR
    falls by 2 log(factor) (simple diffusion, Hoogeboom et al. 2023). To shift the grid of a network that was
    trained without a shift, use `time_grid(..., shift=factor)`.
    """

    def __init__(self, base: Schedule, factor: float) -> None:
        if factor <= 0:
            raise ValueError(f"a shift multiplies sigma/alpha and must be positive, not {factor:g}")
        self.base, self.factor = base, factor
        self.t_min, self.t_max, self.t_data, self.rows = base.t_min, base.t_max, base.t_data, base.rows
        if isinstance(base, VarianceExploding):
            raise ValueError("VarianceExploding has no shift: give it other sigma_min and sigma_max instead")

    def alpha(self, t: float | Tensor) -> Tensor:
        alpha, sigma = self.base.alpha(t), self.factor * self.base.sigma(t)
        return alpha / self.base.family_norm(alpha, sigma)

    def sigma(self, t: float | Tensor) -> Tensor:
        alpha, sigma = self.base.alpha(t), self.factor * self.base.sigma(t)
        return sigma / self.base.family_norm(alpha, sigma)

    def t_from_ratio(self, ratio: float | Tensor) -> Tensor:
        return self.base.t_from_ratio(_float64(ratio) / self.factor)

    def family_norm(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self.base.family_norm(alpha, sigma)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": DiscreteVP.linear,
    "scaled_linear": DiscreteVP.scaled_linear,
    "cosine": DiscreteVP.cosine,
    "sigmoid": DiscreteVP.sigmoid,
    "cosine_vp": CosineVP,
    "flow": RectifiedFlow,
    "ve": VarianceExploding,
}


def build_schedule(spec: Mapping[str, Any]) -> Schedule:
    """A schedule from its description, e.g. {"name": "scaled_linear"} or {"name": "flow", "shift": 3.0}."""
    options = check_mapping("a schedule", spec)
    shift = options.pop("shift", 1.0)
    check_type("shift of a schedule", shift, float)
    schedule = make("schedule", options, SCHEDULES)
    return schedule if shift == 1 else Shifted(schedule, shift)


def _float64(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")


def _hypot_1(x: Tensor) -> Tensor:
    return torch.hypot(torch.ones_like(x), x)


def _unit(t: float | Tensor) -> Tensor:
    t = _float64(t)
    _require(t, (t >= 0) & (t <= 1), "[0, 1] on this schedule")
    return t


def _require(t: Tensor, inside: Tensor, where: str) -> None:
    """ValueError at the first time outside; NaN is always outside."""
    if not inside.all():
        raise ValueError(f"t must lie in {where}, not {t[~inside][0]:g}")
