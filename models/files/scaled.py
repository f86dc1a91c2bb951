"""8-bit floats in files: a weight and its scale, which are two tensors there, as one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.files.stored import Stored, TensorFile
from models.layers.packed import CHUNK, FLOAT8, unpack_float8

SCALES = ("scale_weight", "weight_scale")  # beside "weight"
ACTIVATIONS = "the range of a layer's input, for products in 8 bits"
IGNORED = {
    "scaled_fp8": "a mark of files with scaled 8-bit weights",
    "scale_input": ACTIVATIONS,
    "input_scale": ACTIVATIONS,
    "comfy_quant": "ComfyUI's description of how a weight is packed",
}


@dataclass(frozen=True, eq=False)
class _Scaled(Stored):
    """A weight times its scale; packed if it is a matrix of 8-bit floats."""

    weight: Stored
    factors: Tensor  # () or (rows, 1)

    def chunks(self, of: int = 1) -> Iterator[Tensor]:
        row = max(1, math.prod(self.shape[1:]))
        unit = math.lcm(of, row)
        factors, done = self.factors.expand(self.shape[0] if self.shape else 1, 1), 0
        for chunk in self.weight.chunks(unit):
            for rows in chunk.view(-1, row).split(max(1, CHUNK // unit) * unit // row):
                factor = factors[done : done + len(rows)]
                values = unpack_float8(rows, factor) if rows.dtype in FLOAT8 else rows.float().mul_(factor)
                yield values.view(-1)
                done += len(rows)


def join_scales(file: TensorFile) -> TensorFile:
    """The file with each X.weight multiplied by its X.scale_weight or X.weight_scale, if any; matrices of
    8-bit floats without one get the scale 1. What else belongs to 8-bit weights is ignored.

    A scale is one number, or one for each row: of shape (), (1,), (rows,) or (rows, 1). ValueError if one has
    another shape, no weight, or is anything but a finite number above zero.
    """
    tensors, ignored, scales = dict(file.tensors), dict(file.ignored), dict[str, Stored]()
    for key in file.tensors:
        layer, _, name = key.rpartition(".")
        if name in IGNORED:
            ignored[key] = IGNORED[name]
            del tensors[key]
        elif name in SCALES:
            weight = f"{layer}.weight" if layer else "weight"
            if weight not in file.tensors:
                raise ValueError(f"{file.path} is damaged: {key} is a scale, and there is no {weight}")
            if weight in scales:
                one, other = sorted((scales[weight].key, key))
                raise ValueError(f"{file.path} is damaged: {one} and {other} are scales of the same weight")
            scales[weight] = tensors.pop(key)
    for key, stored in tensors.items():
        if key in scales:
            tensors[key] = _scaled(stored, _read_scale(scales[key], stored), scales[key].keys)
        elif stored.dtype in FLOAT8 and len(stored.shape) == 2:
            tensors[key] = _scaled(stored, torch.ones(()))
    return replace(file, tensors=tensors, ignored=ignored)


def _scaled(weight: Stored, scale: Tensor, keys: tuple[str, ...] = ()) -> Stored:
    """A weight and its scale, () or (rows, 1), as one tensor. keys: the scale's, () if the file has none."""
    found = _Scaled(weight.path, (*weight.keys, *keys), weight.shape, torch.float32, weight, scale)
    packed = weight.dtype in FLOAT8 and len(weight.shape) == 2
    return replace(found, packing="fp8", raw=weight, scale=scale) if packed else found


def _read_scale(stored: Stored, weight: Stored) -> Tensor:
    """() or (rows, 1) in float32."""
    path = stored.path
    if not stored.dtype.is_floating_point or not weight.dtype.is_floating_point:
        raise ValueError(
            f"{path} cannot be read: {stored.key} is {stored.dtype} and scales {weight.dtype}; only floats "
            "are known to be"
        )
    rows = weight.shape[0] if weight.shape else 1
    if stored.shape not in ((), (1,), (rows,), (rows, 1)):
        raise ValueError(
            f"{path} is damaged: {stored.key} is {stored.shape}, where a scale of {weight.key} is () or "
            f"({rows}, 1)"
        )
    scale = torch.empty(stored.shape)
    stored.read_into(scale)
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"{path} is damaged: {stored.key} holds a scale that is no finite number above zero")
    return scale.view(()) if scale.numel() == 1 else scale.view(-1, 1)
