"""8-bit floats in files: joins a weight and its scale, which files hold as two tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.files.stored import Stored, TensorFile
from models.layers.packed import CHUNK, FLOAT8, unpack_float8

SCALES = ("scale_weight", "weight_scale")  # next to "weight"
ACTIVATIONS = "the range of a layer's input, for products in 8 bits"
IGNORED = {
    "scaled_fp8": "marks files with scaled 8-bit weights",
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
    """Multiply each X.weight by its X.scale_weight or X.weight_scale, which other 8-bit matrices lack.

    A scale has the shape (), (1,), (rows,) or (rows, 1). ValueError for a scale of another shape, without a
    weight, or not finite and above zero. Other tensors that belong to 8-bit weights are ignored.
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
                raise ValueError(f"{file.path} is damaged: {key} is a scale, and {weight} is missing")
            if weight in scales:
                one, other = sorted((scales[weight].key, key))
                raise ValueError(f"{file.path} is damaged: {one} and {other} are scales of the same weight")
            scales[weight] = tensors.pop(key)
    for key, stored in tensors.items():
        if key in scales:
            tensors[key] = _join(stored, _read_scale(scales[key], stored), scales[key].keys)
        elif stored.dtype in FLOAT8 and len(stored.shape) == 2:
            tensors[key] = _join(stored, torch.ones(()))
    return replace(file, tensors=tensors, ignored=ignored)


def _join(weight: Stored, scale: Tensor, keys: tuple[str, ...] = ()) -> Stored:
    """A weight and its scale, () or (rows, 1), as one tensor. keys: the scale's, () if the file has none."""
    joined = _Scaled(weight.path, (*weight.keys, *keys), weight.shape, torch.float32, weight, scale)
    packed = weight.dtype in FLOAT8 and len(weight.shape) == 2
    return replace(joined, packing="fp8", raw=weight, scale=scale) if packed else joined


def _read_scale(stored: Stored, weight: Stored) -> Tensor:
    """A weight's scale, () or (rows, 1), in float32."""
    path = stored.path
    if not stored.dtype.is_floating_point or not weight.dtype.is_floating_point:
        dtypes = f"{stored.key} is {stored.dtype} and scales {weight.dtype}"
        raise ValueError(f"{path} cannot be read: {dtypes}; both must be floats")
    rows = weight.shape[0] if weight.shape else 1
    if stored.shape not in ((), (1,), (rows,), (rows, 1)):
        right = f"a scale of {weight.key} must be () or ({rows}, 1)"
        raise ValueError(f"{path} is damaged: {stored.key} is {stored.shape}, and {right}")
    scale = torch.empty(stored.shape)
    stored.read_into(scale)
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(
            f"{path} is damaged: {stored.key} holds a scale that is not a finite number above zero"
        )
    return scale.view(()) if scale.numel() == 1 else scale.view(-1, 1)
