"""What each sample's squared error counts, by its noise level. Where samples fall is `train.density`'s
affair.

A weighting maps (level, prediction) to (B,) float64 factors of the squared error of the network's own output.
An error d of the output is D'/D times that in another parametrisation, D its determinant; all conversions
follow from it.
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
        # 0/0 only where both say nothing of x0 (alpha 0) or of eps (sigma 0): both then output the other
        # alone, alike.
        return torch.where(ratio.isnan(), 1.0, ratio).square()

    return weighting


def min_snr(gamma: float = 5.0) -> Weighting:
    """Hang et al. 2023: the x0-loss weighted by min(SNR, gamma), so min(1, gamma/SNR) on eps and min(SNR,
    gamma)/(SNR+1) on v."""
    if not gamma > 0:
        raise ValueError(f"gamma of min_snr must be greater than 0, not {gamma:g}: no sample would count")
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
