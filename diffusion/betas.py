"""Tables of beta_i, the noise variance of step i of a discrete VP process: alpha_bar_i = prod_{j<=i} 1 -
beta_j.

Each function returns a float64 tensor (steps,). Code that builds them in float32 changes alpha_bar by 1e-6
relative; parity tests account for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_TRAINING_STEPS = 100_000  # noise levels that a model is trained on; published ones have 1000


def linear(start: float = 1e-4, end: float = 0.02, steps: int = 1000) -> Tensor:
    """Ho et al. 2020 (DDPM), section 4: beta goes linearly from start to end."""
    return _line(start, end, steps)


def scaled_linear(start: float = 0.00085, end: float = 0.012, steps: int = 1000) -> Tensor:
    """Rombach et al. 2022 (SD 1, 2, XL): linear in sqrt(beta), from sqrt(start) to sqrt(end)."""
    if not (start > 0 and end > 0):
        raise ValueError(f"betas must lie in (0, 1), and not go from {start:g} to {end:g}")
    return _line(math.sqrt(start), math.sqrt(end), steps).square()


def cosine(offset: float = 0.008, max_beta: float = 0.999, steps: int = 1000) -> Tensor:
    """Nichol & Dhariwal 2021, eq. 17: alpha_bar follows cos^2, each beta capped at max_beta."""
    u = _line(0, 1, steps, more=1)
    alpha_bar = ((u + offset) / (1 + offset) * math.pi / 2).cos().square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)


def sigmoid(start: float = 1e-4, end: float = 0.02, steps: int = 1000) -> Tensor:
    """Xu et al. 2022 (GeoDiff), as in DDPM code: beta follows a sigmoid on [-6, 6] from start to end."""
    return _line(-6, 6, steps).sigmoid() * (end - start) + start


def alpha_bar(betas: Tensor) -> Tensor:
    """The cumulative product alpha_bar_i = prod_{j <= i} (1 - beta_j), float64 (steps,)."""
    return (1 - betas.to(torch.float64)).cumprod(0)


def zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Lin et al. 2024, alg. 1: shift and scale sqrt(alpha_bar) so that the last step is pure noise."""
    root = alpha_bar.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)).square()


def _line(start: float, end: float, steps: int, more: int = 0) -> Tensor:
    """`steps + more` equally spaced numbers, both ends included."""
    if not 2 <= steps <= MAX_TRAINING_STEPS:
        raise ValueError(f"a table of betas needs 2 to {MAX_TRAINING_STEPS:,} steps, not {steps:,}")
    return torch.linspace(start, end, steps + more, dtype=torch.float64, device="cpu")
