"""Weights that stay small in memory: products with matrices that are unpacked for their duration only.

    fp8                    8-bit floats (Micikevicius et al. 2022, arXiv:2209.05433) and a float32 scale, one
                           for all rows or one for each
    Q8_0, Q4_K, Q5_K, ...  the blocks of GGML and its files, GGUF: 32 or 256 values of a row share scales and
                           offsets in float16

Unpacked, all are float32, whose precision holds every product of a block's scale and number exactly: the only
rounding is that of adding an offset. So the values are the same, to the last bit, however and on whatever
device they are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
CHUNK = 2**18  # values unpacked at a time on a CPU: several passes over them, which its cache holds
ROWS = 128  # that products take at a time on a GPU: pieces of a weight have a multiple of it
MAX_UNPACKED = {
    "cpu": 2**22,
    "cuda": 2**24,
}  # values at once, 16 or 64 MB: as much of a CPU's memory as is kept for the next time


# Blocks -----------------------------------------------------------------------------------------------------

Parts = tuple[Tensor, Tensor, Tensor | None]
"""Of n blocks: their numbers, n * values in order, in 8 bits each; each group's factor (n, groups); what is
then taken off, likewise."""


@dataclass(frozen=True)
class Blocks:
    """One of GGML's types: so many values in so many bytes, and how these bytes (n, size) are read."""

    values: int
    size: int
    parts: Callable[[Tensor], Parts]


def _halves(blocks: Tensor, at: int, count: int = 1) -> Tensor:
    """The float16s from that byte of each block on, (n, count) in float32."""
    return blocks[:, at : at + 2 * count].view(torch.float16).float()


def _lined_up(data: Tensor) -> Tensor:
    """Bytes as whole numbers of four. A copy in any case: a single block calls itself contiguous wherever it
    begins."""
    return data.clone(memory_format=torch.contiguous_format).view(torch.int32)


def _fields(data: Tensor, bits: int) -> Tensor:
    """The numbers of so many bits in bytes (n, groups, w), those of all w bytes' lowest bits first: (n,
    groups * 8 / bits * w) bytes."""
    words = _lined_up(data)  # four bytes at a time
    fields = torch.stack([words, *(words >> shift for shift in range(bits, 8, bits))], dim=2)
    return fields.bitwise_and_((2**bits - 1) * 0x01010101).view(torch.uint8).flatten(1)


def _row_of_bits(data: Tensor) -> Tensor:
    """The 32 bits in 4 bytes, one after the other."""
    return (
        (_lined_up(data) >> torch.arange(32, dtype=torch.int32, device=data.device))
        .bitwise_and_(1)
        .to(torch.uint8)
    )


def _q4_0(blocks: Tensor) -> Parts:
    return _fields(blocks[:, None, 2:], 4).view(torch.int8).sub_(8), _halves(blocks, 0), None


def _q4_1(blocks: Tensor) -> Parts:
    return _fields(blocks[:, None, 4:], 4), _halves(blocks, 0), -_halves(blocks, 2)


def _q5_0(blocks: Tensor) -> Parts:
    q = _fields(blocks[:, None, 6:], 4).add_(_row_of_bits(blocks[:, 2:6]), alpha=16)
    return q.view(torch.int8).sub_(16), _halves(blocks, 0), None


def _q5_1(blocks: Tensor) -> Parts:
    q = _fields(blocks[:, None, 8:], 4).add_(_row_of_bits(blocks[:, 4:8]), alpha=16)
    return q, _halves(blocks, 0), -_halves(blocks, 2)


def _q8_0(blocks: Tensor) -> Parts:
    return blocks[:, 2:].view(torch.int8), _halves(blocks, 0), None


def _q2_k(blocks: Tensor) -> Parts:
    pairs = blocks[:, :16]
    return (
        _fields(blocks[:, 16:80].unflatten(1, (2, 32)), 2),
        _halves(blocks, 80) * (pairs & 15),
        _halves(blocks, 82) * (pairs >> 4),
    )


def _q3_k(blocks: Tensor) -> Parts:
    scales = (
        _fields(blocks[:, None, 96:104], 4)
        .add_(_fields(blocks[:, None, 104:108], 2), alpha=16)
        .view(torch.int8)
        .sub_(32)
    )
    q = _fields(blocks[:, 32:96].unflatten(1, (2, 32)), 2).add_(_fields(blocks[:, None, :32], 1), alpha=4)
    return q.view(torch.int8).sub_(4), _halves(blocks, 108) * scales, None


def _factors(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets of eight groups: two float16s, each times eight numbers of 6 bits.

    Of their 12 bytes eight hold four scales and four offsets, and above these the upper two bits of the
    others, whose lower four follow.
    """
    rows = blocks[
        :, 4:16
    ].T.contiguous()  # (12, n): long rows, where a block's own are too short to be computed with quickly
    whole, rest = rows[:8] & 63, torch.cat([rows[8:] & 15, rows[8:] >> 4]).add_(rows[:8] >> 6, alpha=16)
    numbers = torch.stack([whole.view(2, 4, -1), rest.view(2, 4, -1)], dim=1).flatten(1, 2)  # (2, 8, n)
    scale, less = numbers.float().mul_(_halves(blocks, 0, 2).T[:, None])
    return scale.T, less.T


def _q4_k(blocks: Tensor) -> Parts:
    return _fields(blocks[:, 16:].unflatten(1, (4, 32)), 4), *_factors(blocks)


def _q5_k(blocks: Tensor) -> Parts:
    q = _fields(blocks[:, 48:].unflatten(1, (4, 32)), 4).add_(_fields(blocks[:, None, 16:48], 1), alpha=16)
    return q, *_factors(blocks)


def _q6_k(blocks: Tensor) -> Parts:
    low = _fields(blocks[:, :128].unflatten(1, (2, 64)), 4)
    q = low.add_(_fields(blocks[:, 128:192].unflatten(1, (2, 32)), 2), alpha=16).view(torch.int8).sub_(32)
    return q, _halves(blocks, 208) * blocks[:, 192:208].view(torch.int8), None


BLOCKS = {
    "Q4_0": Blocks(32, 18, _q4_0),
    "Q4_1": Blocks(32, 20, _q4_1),
    "Q5_0": Blocks(32, 22, _q5_0),
    "Q5_1": Blocks(32, 24, _q5_1),
    "Q8_0": Blocks(32, 34, _q8_0),
    "Q2_K": Blocks(256, 84, _q2_k),
    "Q3_K": Blocks(256, 110, _q3_k),
    "Q4_K": Blocks(256, 144, _q4_k),
    "Q5_K": Blocks(256, 176, _q5_k),
    "Q6_K": Blocks(256, 210, _q6_k),
}
"""By their names in GGUF files."""


def unpack_blocks(packing: str, blocks: Tensor) -> Tensor:
    """Whole blocks, bytes in any shape, to their values (n, values of a block) in float32."""
    kind = BLOCKS[packing]
    q, scale, less = kind.parts(blocks.view(-1, kind.size))
    values = q.view(*scale.shape, -1).float().mul_(scale[..., None])
    return (values if less is None else values.sub_(less[..., None])).view(-1, kind.values)


# 8-bit floats -----------------------------------------------------------------------------------------------


def unpack_float8(values: Tensor, scale: Tensor) -> Tensor:
    """Scale times 8-bit floats, in float32. On a CPU, which has no instruction for them, by float16s, whose
    bits stand in other places."""
    if values.device.type != "cpu":
        return values.float().mul_(scale)
    bits = values.view(torch.uint8).to(torch.int16)
    if values.dtype == torch.float8_e5m2:
        return bits.bitwise_left_shift_(8).view(torch.float16).float().mul_(scale)
    bits += bits & 0x80  # the sign one place up, where float16 has one more bit of exponent
    bits |= (bits + 1) & 0x80  # of the numbers with all seven bits set, which stand for NaN, that bit too
    return (
        bits.bitwise_left_shift_(7).view(torch.float16).float().mul_(scale * 2.0**8)
    )  # the exponents' zeros differ by 8


# Matrices ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix (rows, columns) as it lies in a file.

    packing  "fp8", or a name in BLOCKS
    data     float8 (rows, columns), or bytes (rows, bytes of a row)
    scale    of fp8, float32: () for all rows, or (rows, 1)
    """

    packing: str
    data: Tensor
    scale: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.data.shape
        kind = BLOCKS.get(self.packing)
        return rows, width // kind.size * kind.values if kind else width

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def rows(self, start: int, stop: int) -> Packed:
        """Some of its rows, without a copy."""
        scale = self.scale if self.scale is None or not self.scale.dim() else self.scale[start:stop]
        return replace(self, data=self.data[start:stop], scale=scale)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All of it, unpacked: computed in float32, then rounded to the dtype."""
        rows, columns = self.shape
        if self.data.device.type != "cpu" or torch.compiler.is_compiling():
            return self._values().to(dtype)
        out = torch.empty(rows, columns, dtype=dtype)
        step = max(1, CHUNK // max(1, columns))
        for start in range(0, rows, step):
            out[start : start + step] = self.rows(start, start + step)._values()
        return out

    def _values(self) -> Tensor:
        if self.packing == "fp8":
            assert self.scale is not None
            return unpack_float8(self.data, self.scale)
        return unpack_blocks(self.packing, self.data).view(self.shape)


# Layers -----------------------------------------------------------------------------------------------------


class PackedLinear(nn.Linear):
    """x W^T + b in the dtype of x, with W (out_features, in_features) packed: unpacked some rows at a time,
    for their product only.

    It has no parameter but the bias, and is not trained; gradients reach x. Its packed weight moves between
    devices and is not cast.
    """

    packed: Tensor
    scale: Tensor | None

    def __init__(self, weight: Packed, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)  # without the weight that a linear layer makes
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)
        self.hold(weight)

    def hold(self, weight: Packed) -> None:
        self.packing = weight.packing
        self.register_buffer("packed", weight.data)
        self.register_buffer("scale", weight.scale)

    @property
    def held(self) -> Packed:
        return Packed(self.packing, self.packed, self.scale)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight, unpacked."""
        return self.held.dense(dtype)

    def forward(self, x: Tensor) -> Tensor:
        step = max(1, MAX_UNPACKED.get(x.device.type, MAX_UNPACKED["cuda"]) // self.in_features)
        step -= step % ROWS if step > ROWS else 0
        parts = [self._product(x, start, start + step) for start in range(0, self.out_features, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _product(self, x: Tensor, start: int, stop: int) -> Tensor:
        weight = self.held.rows(start, stop).dense(x.dtype)
        bias = None if self.bias is None else self.bias[start:stop]
        return F.linear(x, weight, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move or cast: the packed weight goes as the whole numbers that its bits are, which no cast to a
        float touches."""
        floats = {
            name: value
            for name, value in self._buffers.items()
            if value is not None and value.is_floating_point()
        }
        self._buffers |= {
            name: value.view(torch.uint8 if value.itemsize == 1 else torch.int32)
            for name, value in floats.items()
        }
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers |= {
                name: moved.view(floats[name].dtype)
                for name, moved in self._buffers.items()
                if name in floats and moved is not None
            }

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, packing={self.packing}"
        )


def pack(network: nn.Module, name: str, weight: Packed) -> None:
    """Give a network's linear layer of that name a packed weight in place of its own, which may be on the
    meta device; its bias stays.

    A layer of a class of its own, as a modulation is, stays one. ValueError where the name or the shape is
    none of a linear layer's.
    """
    try:
        layer = network.get_submodule(name)
    except AttributeError:
        raise ValueError(f"there is no layer {name!r} to pack") from None
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"only linear layers can be packed, and {name} is a {type(layer).__name__}")
    if (layer.out_features, layer.in_features) != weight.shape:
        raise ValueError(
            f"{name} is ({layer.out_features}, {layer.in_features}), and the packed weight {weight.shape}"
        )
    if not isinstance(layer, PackedLinear):
        del layer.weight
        layer.__class__ = _packed_class(type(layer))  # type: ignore[arg-type]  # modules are hashable
    assert isinstance(layer, PackedLinear)
    layer.hold(weight)


@cache
def _packed_class(kind: type[Any]) -> type[PackedLinear]:
    """A linear layer's class whose product, called by its own forward, is that of the packed weight."""
    return (
        PackedLinear
        if issubclass(PackedLinear, kind)
        else type(f"Packed{kind.__name__}", (kind, PackedLinear), {})
    )


def is_packed(network: nn.Module) -> bool:
    """Whether some of its weights are."""
    return any(isinstance(layer, PackedLinear) for layer in network.modules())


def unpacked(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Its state dict as if no weight were packed: those that are, in that dtype."""
    state = dict(network.state_dict())
    for name, layer in network.named_modules():
        if isinstance(layer, PackedLinear):
            state = {
                key: value for key, value in state.items() if key not in (f"{name}.packed", f"{name}.scale")
            }
            state[f"{name}.weight"] = layer.dense(dtype)
    return state


def memory(network: nn.Module) -> int:
    """Bytes that a network's weights take, packed ones as they are; what is shared is counted once."""
    return sum(value.nbytes for value in [*network.parameters(), *network.buffers()])
