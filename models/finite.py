"""Whether weights are numbers: one that is not spreads to every image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.streaming import values


def is_finite(value: Tensor) -> bool:
    """One pass, without a copy: NaN and infinity both show in the extremes."""
    if not value.dtype.is_floating_point or not value.numel():
        return True
    if value.dtype.itemsize == 1:  # 8-bit floats, which nothing computes in
        value = value.to(torch.bfloat16)
    return all(map(math.isfinite, value.aminmax()))


def lost_weight(network: nn.Module) -> str | None:
    """The name of the first weight that holds a value which is not finite."""
    return next((name for name, read in values(network) if not is_finite(read())), None)
