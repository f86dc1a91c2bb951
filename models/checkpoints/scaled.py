"""8-bit floats in files: a weight and its scale, which lie there apart, as one tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoints.stored import Stored
from models.packed import CHUNK, FLOAT8, unpack_float8

SCALES = ("scale_weight", "weight_scale")  # beside "weight"
ACTIVATIONS = "the range of a layer's input, for products in 8 bits"
IGNORED = {
    "scaled_fp8": "a mark of files with scaled 8-bit weights",
    "scale_input": ACTIVATIONS,
    "input_scale": ACTIVATIONS,
    "comfy_quant": "ComfyUI's description of how a weight is packed",
}


@dataclass(frozen=True)
class Joined:
    """The tensors of a file, scales in their weights.

    scales   the key of each scale that was taken, and of the weight that it is in
    ignored  the other keys that belong to 8-bit weights, and why they are left out
    """

    tensors: Mapping[str, Stored]
    scales: Mapping[str, str]
    ignored: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class _Scaled(Stored):
    """A weight times its scale, () or (rows, 1); packed if it is a matrix of 8-bit floats."""

    weight: Stored
    scale: Tensor
    dtype: torch.dtype = torch.float32

    @property
    def key(self) -> str:  # type: ignore[override]
        return self.weight.key

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.weight.shape

    @property
    def packing(self) -> str | None:  # type: ignore[override]
        return "fp8" if self.weight.dtype in FLOAT8 and len(self.shape) == 2 else None

    @property
    def raw(self) -> Stored | None:  # type: ignore[override]
        return self.weight if self.packing else None

    def mapped(self) -> Tensor:
        out = torch.empty(self.shape)
        self.read_into(out)
        return out

    def chunks(self, of: int = 1) -> Iterator[Tensor]:
        row = max(1, math.prod(self.shape[1:]))
        unit = math.lcm(of, row)
        scale, done = self.scale.expand(self.shape[0] if self.shape else 1, 1), 0
        for chunk in self.weight.chunks(unit):
            for rows in chunk.view(-1, row).split(max(1, CHUNK // unit) * unit // row):
                factor = scale[done : done + len(rows)]
                values = unpack_float8(rows, factor) if rows.dtype in FLOAT8 else rows.float().mul_(factor)
                yield values.view(-1)
                done += len(rows)


def join_scales(tensors: Mapping[str, Stored], path: str | Path) -> Joined:
    """Each X.weight with its X.scale_weight or X.weight_scale; matrices of 8-bit floats without one have the scale 1.

    A scale is one number, or one for each row: of shape (), (1,), (rows,) or (rows, 1). ValueError, with the path, where one is of another
    shape, without a weight, or anything but a finite number above zero.
    """
    scales: dict[str, str] = {}
    ignored: dict[str, str] = {}
    for key in tensors:
        layer, _, name = key.rpartition(".")
        if name in SCALES:
            scales[key] = f"{layer}.weight" if layer else "weight"
        elif name in IGNORED:
            ignored[key] = IGNORED[name]
    if twice := [key for key, weight in scales.items() if all(f"{weight[:-6]}{name}" in scales for name in SCALES)]:
        raise ValueError(f"{path} is damaged: {sorted(twice)[0]} and {sorted(twice)[1]} are scales of the same weight")
    joined = {key: stored for key, stored in tensors.items() if key not in scales and key not in ignored}
    for key, stored in joined.items():
        if stored.dtype in FLOAT8 and len(stored.shape) == 2:
            joined[key] = _Scaled(stored, torch.ones(()))
    for key, weight in scales.items():
        if weight not in joined:
            raise ValueError(f"{path} is damaged: {key} is a scale, and there is no {weight}")
        joined[weight] = _Scaled(tensors[weight], _read_scale(tensors[key], tensors[weight], path))
    return Joined(joined, scales, ignored)


def _read_scale(stored: Stored, weight: Stored, path: str | Path) -> Tensor:
    """() or (rows, 1) in float32."""
    if not stored.dtype.is_floating_point or not weight.dtype.is_floating_point:
        raise ValueError(f"{path} cannot be read: {stored.key} is {stored.dtype} and scales {weight.dtype}; only floats are known to be")
    rows = weight.shape[0] if weight.shape else 1
    if stored.shape not in ((), (1,), (rows,), (rows, 1)):
        raise ValueError(f"{path} is damaged: {stored.key} is {stored.shape}, where a scale of {weight.key} is () or ({rows}, 1)")
    scale = torch.empty(stored.shape)
    stored.read_into(scale)
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"{path} is damaged: {stored.key} holds a scale that is no finite number above zero")
    return scale.view(()) if scale.numel() == 1 else scale.view(-1, 1)
