"""Linear layers with packed (quantised) weights, which are unpacked only for the duration of a product.

    fp8                    8-bit floats (Micikevicius et al. 2022, arXiv:2209.05433) and a float32 scale, one
                           for all rows or one per row
    Q8_0, Q4_K, Q5_K, ...  the blocks of GGML and its file format GGUF: 32 or 256 values of a row share scales
                           and offsets in float16

Weights are unpacked to float32, which holds every product of a scale and a number exactly. Only adding an
offset rounds, so the values are the same to the last bit on every device.
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
CHUNK = 2**18  # values unpacked at a time on a CPU, so that its cache holds them for several passes
ROWS = 128  # parts of a weight have a multiple of this many rows, the size of a GPU's tiles
MAX_UNPACKED = {"cpu": 2**22, "cuda": 2**24}  # values at once, 16 or 64 MB; a CPU's allocator reuses so much


# Blocks -----------------------------------------------------------------------------------------------------

Parts = tuple[Tensor, Tensor, Tensor | None]
"""Of n blocks: their numbers in order, 8 bits each; scales (n, groups); offsets to subtract (n, groups)."""


@dataclass(frozen=True)
class Blocks:
    """A type of GGML's blocks: values per block, bytes per block, and how bytes (n, size) are unpacked."""

    values: int
    size: int
    parts: Callable[[Tensor], Parts]


def _float16s(blocks: Tensor, start: int, count: int = 1) -> Tensor:
    """`count` float16s from byte `start` of each block, (n, count) in float32."""
    return blocks[:, start : start + 2 * count].view(torch.float16).float()


def _int32s(data: Tensor) -> Tensor:
    """Bytes as int32. Always copied: a single block counts as contiguous even where it is not aligned."""
    return data.clone(memory_format=torch.contiguous_format).view(torch.int32)


def _fields(data: Tensor, bits: int) -> Tensor:
    """The numbers of `bits` bits in bytes (n, groups, w): (n, groups * 8 / bits * w) bytes.

    The lowest bits of all w bytes come first.
    """
    words = _int32s(data)  # four bytes at a time
    fields = torch.stack([words, *(words >> shift for shift in range(bits, 8, bits))], dim=2)
    return fields.bitwise_and_((2**bits - 1) * 0x01010101).view(torch.uint8).flatten(1)


def _bits(data: Tensor) -> Tensor:
    """The 32 bits of 4 bytes, in order."""
    shifts = torch.arange(32, dtype=torch.int32, device=data.device)
    return (_int32s(data) >> shifts).bitwise_and_(1).to(torch.uint8)


def _q4_0(blocks: Tensor) -> Parts:
    return _fields(blocks[:, None, 2:], 4).view(torch.int8).sub_(8), _float16s(blocks, 0), None


def _q4_1(blocks: Tensor) -> Parts:
    return _fields(blocks[:, None, 4:], 4), _float16s(blocks, 0), -_float16s(blocks, 2)


def _q5_0(blocks: Tensor) -> Parts:
    q = _fields(blocks[:, None, 6:], 4).add_(_bits(blocks[:, 2:6]), alpha=16)
    return q.view(torch.int8).sub_(16), _float16s(blocks, 0), None


def _q5_1(blocks: Tensor) -> Parts:
    q = _fields(blocks[:, None, 8:], 4).add_(_bits(blocks[:, 4:8]), alpha=16)
    return q, _float16s(blocks, 0), -_float16s(blocks, 2)


def _q8_0(blocks: Tensor) -> Parts:
    return blocks[:, 2:].view(torch.int8), _float16s(blocks, 0), None


def _q2_k(blocks: Tensor) -> Parts:
    q, pairs = _fields(blocks[:, 16:80].unflatten(1, (2, 32)), 2), blocks[:, :16]
    return q, _float16s(blocks, 80) * (pairs & 15), _float16s(blocks, 82) * (pairs >> 4)


def _q3_k(blocks: Tensor) -> Parts:
    low, high = _fields(blocks[:, None, 96:104], 4), _fields(blocks[:, None, 104:108], 2)
    scales = low.add_(high, alpha=16).view(torch.int8).sub_(32)
    q = _fields(blocks[:, 32:96].unflatten(1, (2, 32)), 2).add_(_fields(blocks[:, None, :32], 1), alpha=4)
    return q.view(torch.int8).sub_(4), _float16s(blocks, 108) * scales, None


def _scales_and_offsets(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of eight groups: two float16s, each times eight 6-bit numbers.

    They are stored in 12 bytes. The lower 6 bits of the first eight bytes hold four scales and four offsets.
    The other numbers have their lower four bits in the last four bytes, and their upper two in the first
    eight.
    """
    rows = blocks[:, 4:16].T.contiguous()  # (12, n): long rows are faster than a block's short ones
    first, rest = rows[:8] & 63, torch.cat([rows[8:] & 15, rows[8:] >> 4]).add_(rows[:8] >> 6, alpha=16)
    numbers = torch.stack([first.view(2, 4, -1), rest.view(2, 4, -1)], dim=1).flatten(1, 2)  # (2, 8, n)
    scale, offset = numbers.float().mul_(_float16s(blocks, 0, 2).T[:, None])
    return scale.T, offset.T


def _q4_k(blocks: Tensor) -> Parts:
    return _fields(blocks[:, 16:].unflatten(1, (4, 32)), 4), *_scales_and_offsets(blocks)


def _q5_k(blocks: Tensor) -> Parts:
    q = _fields(blocks[:, 48:].unflatten(1, (4, 32)), 4).add_(_fields(blocks[:, None, 16:48], 1), alpha=16)
    return q, *_scales_and_offsets(blocks)


def _q6_k(blocks: Tensor) -> Parts:
    low = _fields(blocks[:, :128].unflatten(1, (2, 64)), 4)
    q = low.add_(_fields(blocks[:, 128:192].unflatten(1, (2, 32)), 2), alpha=16).view(torch.int8).sub_(32)
    return q, _float16s(blocks, 208) * blocks[:, 192:208].view(torch.int8), None


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
    """The bytes of whole blocks, in any shape, to values (n, values per block) in float32."""
    kind = BLOCKS[packing]
    q, scale, offset = kind.parts(blocks.view(-1, kind.size))
    values = q.view(*scale.shape, -1).float().mul_(scale[..., None])
    return (values if offset is None else values.sub_(offset[..., None])).view(-1, kind.values)


# 8-bit floats -----------------------------------------------------------------------------------------------


def unpack_float8(values: Tensor, scale: Tensor) -> Tensor:
    """scale * values in float32. A CPU has no instructions for float8: so the bits become float16 first."""
    if values.device.type != "cpu":
        return values.float().mul_(scale)
    bits = values.view(torch.uint8).to(torch.int16)
    if values.dtype == torch.float8_e5m2:
        return bits.bitwise_left_shift_(8).view(torch.float16).float().mul_(scale)
    bits += bits & 0x80  # the sign moves up by one: float16 has one more bit of exponent
    bits |= (bits + 1) & 0x80  # NaN has all bits of the exponent set, in float16 too
    floats = bits.bitwise_left_shift_(7).view(torch.float16).float()
    return floats.mul_(scale * 2.0**8)  # the biases of the exponents differ by 8


# Matrices ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed matrix (rows, columns), as files hold it.

    packing  "fp8", or a name in BLOCKS
    data     float8 (rows, columns), or bytes (rows, bytes per row)
    scale    for fp8, in float32: () or (rows, 1)
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
        """Rows start ... stop-1, without a copy."""
        scale = self.scale if self.scale is None or not self.scale.dim() else self.scale[start:stop]
        return replace(self, data=self.data[start:stop], scale=scale)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The unpacked matrix, computed in float32 and rounded to the dtype."""
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
    """x W^T + b in the dtype of x, where W (out_features, in_features) is packed and unpacked part by part.

    Only the bias is a parameter; gradients flow to x. The packed weight moves between devices, but is never
    cast.
    """

    packed: Tensor
    scale: Tensor | None

    def __init__(self, weight: Packed, bias: nn.Parameter | None = None) -> None:
        nn.Module.__init__(self)  # without nn.Linear's weight
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", bias)
        self.set_matrix(weight)

    def set_matrix(self, weight: Packed) -> None:
        self.packing = weight.packing
        self.register_buffer("packed", weight.data)
        self.register_buffer("scale", weight.scale)

    @property
    def matrix(self) -> Packed:
        return Packed(self.packing, self.packed, self.scale)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The unpacked weight."""
        return self.matrix.dense(dtype)

    def forward(self, x: Tensor) -> Tensor:
        step = max(1, MAX_UNPACKED.get(x.device.type, MAX_UNPACKED["cuda"]) // self.in_features)
        step -= step % ROWS if step > ROWS else 0
        parts = [self._product(x, start, start + step) for start in range(0, self.out_features, step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _product(self, x: Tensor, start: int, stop: int) -> Tensor:
        weight = self.matrix.rows(start, stop).dense(x.dtype)
        bias = None if self.bias is None else self.bias[start:stop]
        return F.linear(x, weight, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Moves or casts. Meanwhile the packed weight is viewed as integers, which casts to floats ignore."""
        dtypes = {}
        for name, value in self._buffers.items():
            if value is not None and value.is_floating_point():
                dtypes[name] = value.dtype
                self._buffers[name] = value.view(torch.uint8 if value.itemsize == 1 else torch.int32)
        try:
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            for name, dtype in dtypes.items():
                self._buffers[name] = self.get_buffer(name).view(dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, packing={self.packing}"


def pack(network: nn.Module, name: str, weight: Packed) -> None:
    """Replaces the weight of the linear layer `name`, which may be on the meta device, and keeps its bias.

    Subclasses of nn.Linear, such as `Modulation`, keep their class. ValueError unless there is a linear layer
    of that name and shape.
    """
    try:
        layer = network.get_submodule(name)
    except AttributeError:
        raise ValueError(f"there is no layer {name!r} to pack") from None
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"only linear layers can be packed, and {name} is a {type(layer).__name__}")
    if (shape := (layer.out_features, layer.in_features)) != weight.shape:
        raise ValueError(f"{name} is {shape}, and the packed weight {weight.shape}")
    if not isinstance(layer, PackedLinear):
        del layer.weight
        layer.__class__ = _packed_class(type(layer))  # type: ignore[arg-type]  # modules are hashable
    assert isinstance(layer, PackedLinear)
    layer.set_matrix(weight)


@cache
def _packed_class(kind: type[Any]) -> type[PackedLinear]:
    """The class of a packed layer that keeps the forward method of `kind`."""
    if issubclass(PackedLinear, kind):
        return PackedLinear
    return type(f"Packed{kind.__name__}", (kind, PackedLinear), {})


def is_packed(network: nn.Module) -> bool:
    """Whether some of its weights are packed."""
    return any(isinstance(layer, PackedLinear) for layer in network.modules())


def unpacked_state(network: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Its state dict with packed weights unpacked in that dtype."""
    state = dict(network.state_dict())
    for name, layer in network.named_modules():
        if isinstance(layer, PackedLinear):
            del state[f"{name}.packed"]
            state.pop(f"{name}.scale", None)
            state[f"{name}.weight"] = layer.dense(dtype)
    return state


def weight_bytes(network: nn.Module) -> int:
    """Bytes of a network's weights, packed ones as they are, shared ones once."""
    return sum(value.nbytes for value in [*network.parameters(), *network.buffers()])
