"""Weights of each sample's squared error, by its noise level. `train.density` sets how often levels occur.

A weighting maps (level, prediction) to (B,) float64 factors of the squared error of the network's output.
Conversions follow from determinants: an error in one parametrisation is D'/D times that in another.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion import EPS, FLOW, X0, BatchLevel, Prediction, V

Weighting = Callable[[BatchLevel, Prediction], Tensor]


def uniform(level: BatchLevel, prediction: Prediction) -> Tensor:
    """1: the plain squared error of the output (Ho et al. 2020, eq. 14)."""
    return torch.ones_like(level.t)


def as_loss_of(other: Prediction) -> Weighting:
    """As if the network predicted `other`: the eps-, x0-, v- or flow-loss of any network."""

    def weighting(level: BatchLevel, prediction: Prediction) -> Tensor:
        ratio = torch.as_tensor(other.determinant(level)) / prediction.determinant(level)
        # 0/0 only where neither output depends on x0 (alpha 0) or on eps (sigma 0): both are then the same.
        return torch.where(ratio.isnan(), 1.0, ratio).square()

    weighting.__doc__ = f"The {other.name}-loss, as if the network predicted {other.name}."
    return weighting


def min_snr(gamma: float = 5.0) -> Weighting:
    """The x0-loss times min(SNR, gamma) (Hang et al. 2023).

    That is min(1, gamma/SNR) times the eps-loss, and min(SNR, gamma)/(SNR+1) times the v-loss.
    """
    if not gamma > 0:
        raise ValueError(f"gamma of min_snr must be greater than 0, not {gamma:g}: all weights would be 0")
    eps_loss, x0_loss = as_loss_of(EPS), as_loss_of(X0)

    def weighting(level: BatchLevel, prediction: Prediction) -> Tensor:
        return torch.minimum(eps_loss(level, prediction), gamma * x0_loss(level, prediction))

    return weighting


WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "uniform": lambda: uniform,
    "min_snr": min_snr,
    "eps": lambda: as_loss_of(EPS),
    "x0": lambda: as_loss_of(X0),
    "v": lambda: as_loss_of(V),
    "flow": lambda: as_loss_of(FLOW),
}
