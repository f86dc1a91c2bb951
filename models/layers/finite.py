"""Whether weights are numbers: one that is not spreads to every image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.layers.packed import BLOCKS, CHUNK, PackedLinear, unpack_blocks
from models.layers.streaming import layers, values


def is_finite(value: Tensor) -> bool:
    """One pass, without a copy: NaN and infinity both show in the extremes."""
    if not value.dtype.is_floating_point or not value.numel():
        return True
    if value.dtype.itemsize == 1:  # 8-bit floats, which nothing computes in
        value = value.to(torch.bfloat16)
    return all(map(math.isfinite, value.aminmax()))


def lost_weight(network: nn.Module) -> str | None:
    """The name of the first weight that holds a value which is not finite; of packed ones all are unpacked,
    some at a time."""
    packed = {
        f"{name}.packed": layer.packing for name, layer in layers(network) if isinstance(layer, PackedLinear)
    }
    return next(
        (name for name, read in values(network) if not _all_finite(read(), packed.get(name, ""))), None
    )


def _all_finite(value: Tensor, packing: str) -> bool:
    if packing not in BLOCKS:
        return is_finite(value)
    kind = BLOCKS[packing]
    return all(
        is_finite(unpack_blocks(packing, blocks))
        for blocks in value.view(-1, kind.size).split(CHUNK // kind.values)
    )
