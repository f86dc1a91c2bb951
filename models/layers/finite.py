"""Finds weights that are NaN or infinite: one of them spoils every image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.layers.packed import BLOCKS, CHUNK, PackedLinear, unpack_blocks
from models.layers.streaming import all_layers, weight_readers


def is_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite: both show in the extremes, which take one pass and no copy."""
    if not value.dtype.is_floating_point or not value.numel():
        return True
    if value.dtype.itemsize == 1:  # torch does not compute with 8-bit floats
        value = value.to(torch.bfloat16)
    return all(map(math.isfinite, value.aminmax()))


def find_nonfinite(network: nn.Module) -> str | None:
    """The name of the first weight that is not finite, or None. Packed weights are checked chunk by chunk."""
    packings = {f"{name}.packed": m.packing for name, m in all_layers(network) if isinstance(m, PackedLinear)}
    for name, read in weight_readers(network):
        if not _all_finite(read(), packings.get(name, "")):
            return name
    return None


def _all_finite(value: Tensor, packing: str) -> bool:
    if packing not in BLOCKS:
        return is_finite(value)
    kind = BLOCKS[packing]
    chunks = value.view(-1, kind.size).split(CHUNK // kind.values)
    return all(is_finite(unpack_blocks(packing, chunk)) for chunk in chunks)
