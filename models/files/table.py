"""The names of tensors here and in a published layout, as data: one table serves loading and, read backwards,
saving.

A layout is a list of rules that turn our names into published ones. If one tensor of ours is several
published ones (query, key and value are one product here), the rule's result names them in brackets,
"attn1.to_[q,k,v]", in the order in which they are stacked.

From a file to a parameter: a `TensorFile` holds `Stored` tensors; a `Part` is those of one network; a
`Source` is a row of the table, and a `Supply` that row with its stored tensors, which gives the parameter.
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
from models.files.stored import Held, Stored, TensorFile

T = TypeVar("T")

Form = Literal["same", "conv", "transposed", "swapped"]
"""How a published tensor is written: as ours, as a 1x1 convolution (ours is a linear layer), with its two
dimensions exchanged, or with the two halves of its first dimension exchanged."""


@dataclass(frozen=True)
class Source:
    """The published tensors that one of ours is made of.

    keys    in the order in which they are stacked along the first dimension
    form    how they are written
    shares  the ratios of their sizes along that dimension, () if these are equal
    """

    keys: tuple[str, ...]
    form: Form = "same"
    shares: tuple[int, ...] = ()

    def split(self, value: Tensor) -> tuple[Tensor, ...]:
        """What each key has of a tensor of ours."""
        shares = self.shares or (1,) * len(self.keys)
        return (
            value.split([len(value) * share // sum(shares) for share in shares])
            if len(self.keys) > 1
            else (value,)
        )

    def turned(self, part: Tensor) -> Tensor:
        """Ours as it is published. But for a convolution, what is published as ours too."""
        if self.form == "conv" and part.ndim == 2:  # biases are written as they are
            return part[..., None, None]
        return (
            part.T
            if self.form == "transposed"
            else part.roll(len(part) // 2, 0)
            if self.form == "swapped"
            else part
        )


Table = dict[str, Source]
"""By our names."""


@dataclass(frozen=True)
class Layout:
    """How one kind of network is written in one family of files.

    rules   patterns over our names, and their replacements: all are applied, in order
    forms   patterns over our names, for tensors that are written in another form
    shares  patterns over our names, for tensors whose published parts differ in size: the ratios of the sizes
    number  applied to our names before the rules, for layouts that count blocks differently
    inside  the sub-module that such a file holds, "" for the whole network
    """

    name: str
    rules: Mapping[str, str]
    forms: Mapping[str, Form] = field(default_factory=dict)
    number: Callable[[str], str] = str
    inside: str = ""
    shares: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def table(self, names: Iterable[str]) -> Table:
        """The published keys of each of our names."""
        return {
            name: Source(
                _split(self._renamed(name)), _found(name, self.forms, "same"), _found(name, self.shares, ())
            )
            for name in names
        }

    def _renamed(self, name: str) -> str:
        name = self.number(name)
        for pattern, replacement in self.rules.items():
            name = re.sub(pattern, replacement, name)
        return name


def _found(name: str, patterns: Mapping[str, T], otherwise: T) -> T:
    """The value of the first pattern that the name fits."""
    return next((value for pattern, value in patterns.items() if re.search(pattern, name)), otherwise)


def _split(name: str) -> tuple[str, ...]:
    """a.[q,k].b -> a.q.b, a.k.b."""
    if not (found := re.search(r"\[([\w.,]+)\]", name)):
        return (name,)
    return tuple(name.replace(found[0], part) for part in found[1].split(","))


@dataclass(frozen=True, eq=False)
class Part:
    """One network in a file, or the half of one that `layout.inside` names.

    kind    "backbone", "vae", "text" (one tower) or "preview"
    words   what people call it, for messages
    stored  its tensors by the layout's keys
    prefix  what stands before these keys in the file
    hints   what a configuration beside the file says
    """

    kind: str
    words: str
    params: Any
    layout: Layout
    file: TensorFile
    stored: Mapping[str, Stored]
    prefix: str = ""
    hints: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Supply:
    """One tensor of ours and the stored tensors that it is read from, whenever it is needed.

    dtype   what it is converted to
    before  the supply that was cast to this dtype, if any: the values are rounded to both dtypes, as in a
            network that was loaded whole
    """

    shape: torch.Size
    dtype: torch.dtype
    source: Source
    pieces: tuple[Stored, ...]
    before: Supply | None = None

    def take(self) -> Tensor:
        """The tensor: the file's memory-mapped pages if nothing has to be converted or stacked, else new
        memory.

        ValueError if it is not finite, see `Stored.take`.
        """
        if len(self.pieces) == 1 and self.source.form in ("same", "conv") and not self.before:
            return self.pieces[0].take(self.dtype).view(self.shape)
        return self.read()

    def read(self) -> Tensor:
        """The tensor in new memory. ValueError if it is not finite."""
        value = torch.empty(self.shape, dtype=self.dtype)
        self._put(value, lambda stored, out: stored.read_finite(out))
        return value

    def read_into(self, out: Tensor) -> None:
        """Copy it to `out`, piece by piece, unchecked: nothing of a safetensors file stays in memory."""
        self._put(out, lambda stored, part: stored.read_into(part))

    def cast(self, dtype: torch.dtype) -> Supply:
        """The same tensor, converted whenever it is read."""
        return replace(self, dtype=dtype, before=self)

    def packed(self) -> dict[str, Supply] | None:
        """The packed matrix as in the file, and its scale ("packed", "scale"). None if it is not packed, or
        in more than one way."""
        kinds = {(piece.packing, piece.raw.dtype if piece.raw else None) for piece in self.pieces}
        if len(kinds) > 1 or self.pieces[0].packing is None or self.source.form != "same":
            return None
        raw = tuple(piece.raw for piece in self.pieces if piece.raw)
        found = {
            "packed": Supply(torch.Size((self.shape[0], raw[0].shape[1])), raw[0].dtype, self.source, raw)
        }
        scales = [piece.scale for piece in self.pieces if piece.scale is not None]
        if scales:
            rows = [scale.expand(piece.shape[0], 1) for piece, scale in zip(self.pieces, scales, strict=True)]
            scale = scales[0] if len(scales) == 1 else torch.cat(rows)
            held = Held.of(self.pieces[0].path, self.pieces[0].keys[-1], scale)
            found["scale"] = Supply(scale.shape, scale.dtype, Source(held.keys), (held,))
        return found

    def _put(self, value: Tensor, copy: Callable[[Stored, Tensor], None]) -> None:
        if self.before:
            uncast = torch.empty(self.shape, dtype=self.before.dtype)
            self.before._put(uncast, copy)
            value.copy_(uncast)
            return
        for piece, part in zip(self.pieces, self.source.split(value), strict=True):
            if self.source.form in ("same", "conv"):
                copy(piece, part)
            else:
                raw = torch.empty(piece.shape, dtype=value.dtype)
                copy(piece, raw)
                part.copy_(self.source.turned(raw))


Supplies = Mapping[str, Supply]
"""By the names of a module's tensors."""


def supplies(part: Part, state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Supply]:
    """A supply for each tensor of a network's state.

    ValueError names the first key that is missing, unknown to the layout, of another shape, or not of a
    floating-point type.
    """
    table, path = part.layout.table(state), part.file.path
    known = dict.fromkeys(key for source in table.values() for key in source.keys)
    if missing := [key for key in known if key not in part.stored]:
        raise ValueError(f"{path} lacks {part.prefix}{missing[0]}{_more(missing)}")
    if unknown := sorted(stored.key for key, stored in part.stored.items() if key not in known):
        raise ValueError(
            f"{path} holds {unknown[0]}{_more(unknown)}, for which its {part.words} has no place"
        )
    found = {
        name: Supply(state[name].shape, dtype, source, tuple(part.stored[key] for key in source.keys))
        for name, source in table.items()
    }
    for supply in found.values():
        _check_shapes(supply, path)
    return found


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def check_dtype(dtype: torch.dtype | Mapping[str, torch.dtype] | None, parts: Iterable[str]) -> None:
    """ValueError unless networks can compute in these dtypes, given for all or by part."""
    given = dtype if isinstance(dtype, Mapping) else {} if dtype is None else {"": dtype}
    check_names("part", (part for part in given if part), parts)
    for value in given.values():
        if not isinstance(value, torch.dtype) or not value.is_floating_point or value.itemsize < 2:
            raise ValueError(
                "networks compute in torch.float32, torch.bfloat16, torch.float16 or torch.float64, not "
                f"{value}"
            )


def scatter(table: Table, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published tensors from ours: `supplies` backwards, without a copy where ours need none."""
    published: dict[str, Tensor] = {}
    for name, source in table.items():
        for key, part in zip(source.keys, source.split(state[name].detach()), strict=True):
            published[key] = source.turned(part).contiguous()
    return published


def _check_shapes(supply: Supply, path: Path) -> None:
    """ValueError unless the stored tensors have the shapes that ours needs, and are floats."""
    blank = torch.empty(supply.shape, device="meta")
    for stored, part in zip(supply.pieces, supply.source.split(blank), strict=True):
        own, wanted = tuple(part.shape), tuple(supply.source.turned(part).shape)
        # A 1x1 convolution may have been saved as the linear layer that it is, and GGUF leaves a leading 1
        # out.
        if stored.shape not in (wanted, own) and (1, *stored.shape) != own:
            raise ValueError(
                f"{path} is of another architecture: {stored.key} is {stored.shape}, not {wanted}"
            )
        if not stored.dtype.is_floating_point:
            raise ValueError(f"{path} holds no weights: {stored.key} is {stored.dtype}")
