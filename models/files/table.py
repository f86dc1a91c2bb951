"""Our names of tensors and published ones, as data: one table loads and, read backwards, saves.

A layout is a list of rules that turn our names into published ones. If one of our tensors is several
published ones (query, key and value are one product here), the rule's result names them in brackets,
"attn1.to_[q,k,v]", in the order in which they are stacked.

From a file to a parameter: a `TensorFile` holds `Stored` tensors; a `Part` has those of one network; a
`Source` is a row of the table, and a `Supply` is that row with its stored tensors, from which the parameter
is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from diffusion.spec import check_names
from models.files.stored import InMemory, Stored, TensorFile

T = TypeVar("T")

Form = Literal["same", "conv", "transposed", "swapped"]
"""How a published tensor differs from ours: not, it is a 1x1 convolution (ours is a linear layer), its two
dimensions are exchanged, or the two halves of its first dimension are."""


@dataclass(frozen=True)
class Source:
    """The published tensors that make up one of ours.

    keys    in the order in which they are stacked along the first dimension
    form    how they are written
    shares  the ratios of their sizes along that dimension, () if these are equal
    """

    keys: tuple[str, ...]
    form: Form = "same"
    shares: tuple[int, ...] = ()

    def split(self, value: Tensor) -> tuple[Tensor, ...]:
        """The share of each key in one of our tensors."""
        if len(self.keys) == 1:
            return (value,)
        shares = self.shares or (1,) * len(self.keys)
        return value.split([len(value) * share // sum(shares) for share in shares])

    def convert(self, part: Tensor) -> Tensor:
        """Our tensor in its published form; except for a convolution, also the published one in our form."""
        if self.form == "conv" and part.ndim == 2:  # biases stay as they are
            return part[..., None, None]
        if self.form == "transposed":
            return part.T
        return part.roll(len(part) // 2, 0) if self.form == "swapped" else part


Table = dict[str, Source]
"""By our names."""


@dataclass(frozen=True)
class Layout:
    """How one kind of network is written in one kind of files. All patterns match our names.

    rules      patterns and their replacements: all are applied, in order
    forms      patterns for tensors in another form
    shares     patterns for tensors whose published parts differ in size, with the ratios of the sizes
    renumber   applied to our names before the rules, for layouts that number blocks differently
    submodule  the part of the network that such a file holds, "" for all of it
    """

    name: str
    rules: Mapping[str, str]
    forms: Mapping[str, Form] = field(default_factory=dict)
    renumber: Callable[[str], str] = str
    submodule: str = ""
    shares: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def table(self, names: Iterable[str]) -> Table:
        """The published keys of each of our names."""
        return {
            name: Source(self._keys(name), _lookup(name, self.forms, "same"), _lookup(name, self.shares, ()))
            for name in names
        }

    def _keys(self, name: str) -> tuple[str, ...]:
        name = self.renumber(name)
        for pattern, replacement in self.rules.items():
            name = re.sub(pattern, replacement, name)
        if not (match := re.search(r"\[([\w.,]+)\]", name)):
            return (name,)
        return tuple(name.replace(match[0], part) for part in match[1].split(","))  # a.[q,k].b: a.q.b, a.k.b


def _lookup(name: str, patterns: Mapping[str, T], default: T) -> T:
    """The value of the first pattern that matches a name."""
    return next((value for pattern, value in patterns.items() if re.search(pattern, name)), default)


@dataclass(frozen=True, eq=False)
class Part:
    """One network in a file, or the part of one that `layout.submodule` names.

    kind    "backbone", "vae", "text" (one tower) or "preview"
    title   what messages call it
    stored  its tensors by the layout's keys
    prefix  of these keys in the file
    hints   the configuration that accompanies the file
    """

    kind: str
    title: str
    params: Any
    layout: Layout
    file: TensorFile
    stored: Mapping[str, Stored]
    prefix: str = ""
    hints: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Supply:
    """One of our tensors and the stored tensors that it is read from, whenever it is needed.

    dtype      it is converted to this
    cast_from  the supply that was cast to this dtype, if any: values are rounded to both dtypes, as in a
               network that was loaded as a whole
    """

    shape: torch.Size
    dtype: torch.dtype
    source: Source
    pieces: tuple[Stored, ...]
    cast_from: Supply | None = None

    def take(self) -> Tensor:
        """The tensor, memory-mapped unless it is converted or stacked. ValueError as in `Stored.take`."""
        if len(self.pieces) == 1 and self.source.form in ("same", "conv") and not self.cast_from:
            return self.pieces[0].take(self.dtype).view(self.shape)
        return self.read()

    def read(self) -> Tensor:
        """The tensor in new memory. ValueError if it is not finite."""
        value = torch.empty(self.shape, dtype=self.dtype)
        self._put(value, lambda stored, out: stored.read_finite(out))
        return value

    def read_into(self, out: Tensor) -> None:
        """Copy the tensor to `out`, unchecked, piece by piece, so that no piece stays in memory."""
        self._put(out, lambda stored, part: stored.read_into(part))

    def cast(self, dtype: torch.dtype) -> Supply:
        """The same tensor, converted whenever it is read."""
        return replace(self, dtype=dtype, cast_from=self)

    def packed(self) -> dict[str, Supply] | None:
        """The packed matrix and its scale ("packed", "scale"). None if not packed, or in several ways."""
        kinds = {(piece.packing, piece.raw.dtype if piece.raw else None) for piece in self.pieces}
        if len(kinds) > 1 or self.pieces[0].packing is None or self.source.form != "same":
            return None
        raw = tuple(piece.raw for piece in self.pieces if piece.raw)
        shape = torch.Size((self.shape[0], raw[0].shape[1]))
        packed = {"packed": Supply(shape, raw[0].dtype, self.source, raw)}
        scales = [piece.scale for piece in self.pieces if piece.scale is not None]
        if scales:
            rows = [scale.expand(piece.shape[0], 1) for piece, scale in zip(self.pieces, scales, strict=True)]
            scale = scales[0] if len(scales) == 1 else torch.cat(rows)
            held = InMemory.from_tensor(self.pieces[0].path, self.pieces[0].keys[-1], scale)
            packed["scale"] = Supply(scale.shape, scale.dtype, Source(held.keys), (held,))
        return packed

    def _put(self, value: Tensor, copy: Callable[[Stored, Tensor], None]) -> None:
        if self.cast_from:
            uncast = torch.empty(self.shape, dtype=self.cast_from.dtype)
            self.cast_from._put(uncast, copy)
            value.copy_(uncast)
            return
        for piece, part in zip(self.pieces, self.source.split(value), strict=True):
            if self.source.form in ("same", "conv"):
                copy(piece, part)
            else:
                raw = torch.empty(piece.shape, dtype=value.dtype)
                copy(piece, raw)
                part.copy_(self.source.convert(raw))


Supplies = Mapping[str, Supply]
"""By the names of a module's tensors."""


def supplies(part: Part, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Supply]:
    """A supply for each tensor of a network's state.

    ValueError names the first key that is missing, unknown to the layout, of another shape, or not a float.
    """
    table, path = part.layout.table(state), part.file.path
    known = dict.fromkeys(key for source in table.values() for key in source.keys)
    if missing := [key for key in known if key not in part.stored]:
        raise ValueError(f"{path} lacks {_first(missing, part.prefix)}")
    if unknown := sorted(stored.key for key, stored in part.stored.items() if key not in known):
        raise ValueError(f"{path} holds {_first(unknown)}, which its {part.title} does not have")
    made = {
        name: Supply(state[name].shape, dtype, source, tuple(part.stored[key] for key in source.keys))
        for name, source in table.items()
    }
    for supply in made.values():
        _check_shapes(supply, path)
    return made


def _first(keys: list[str], prefix: str = "") -> str:
    return f"{prefix}{keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")


def check_dtype(dtype: torch.dtype | Mapping[str, torch.dtype] | None, parts: Iterable[str]) -> None:
    """ValueError unless networks can compute in this dtype, or in these dtypes by part."""
    dtypes = dtype if isinstance(dtype, Mapping) else {} if dtype is None else {"": dtype}
    check_names("part", (part for part in dtypes if part), parts)
    for value in dtypes.values():
        if not isinstance(value, torch.dtype) or not value.is_floating_point or value.itemsize < 2:
            supported = "torch.float32, torch.bfloat16, torch.float16 or torch.float64"
            raise ValueError(f"networks compute in {supported}, not {value}")


def scatter(table: Table, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors from ours: `supplies` backwards, without copies if none are necessary."""
    published: dict[str, Tensor] = {}
    for name, source in table.items():
        for key, part in zip(source.keys, source.split(state[name].detach()), strict=True):
            published[key] = source.convert(part).contiguous()
    return published


def _check_shapes(supply: Supply, path: Path) -> None:
    """ValueError unless the stored tensors have the right shapes and are floats."""
    blank = torch.empty(supply.shape, device="meta")
    for stored, part in zip(supply.pieces, supply.source.split(blank), strict=True):
        own, expected = tuple(part.shape), tuple(supply.source.convert(part).shape)
        # A 1x1 convolution may have been saved as a linear layer, and GGUF leaves out a leading 1.
        if stored.shape not in (expected, own) and (1, *stored.shape) != own:
            shapes = f"{stored.key} is {stored.shape}, not {expected}"
            raise ValueError(f"{path} is of another architecture: {shapes}")
        if not stored.dtype.is_floating_point:
            raise ValueError(f"{path} holds no weights: {stored.key} is {stored.dtype}")
