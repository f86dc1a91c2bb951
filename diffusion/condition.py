"""Everything that a network sees besides x and t, as one object with one row per sample."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.messages import brief

C = TypeVar("C", bound="Condition")


@dataclass(frozen=True, eq=False)
class Condition:
    """The conditions of B samples, one row per sample; each is None if there is none.

    context   text or other tokens (B, L, D)
    mask      True for tokens that exist, bool (B, L); None: all. Attention ignores the others, so that a
              sample does not depend on its batch
    vector    pooled text, sizes, ... (B, V)
    label     the class, integers (B,)
    guidance  the guidance scale that a distilled network takes as an input (B,)
    image     extra input channels of x's height and width (B, C', H, W)

    All others are floating point. Subclasses may add fields; every operation covers all fields. ValueError
    for a tensor of the wrong rank or dtype, and for different numbers of rows.
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    vector: Tensor | None = None
    label: Tensor | None = None
    guidance: Tensor | None = None
    image: Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in self.tensors.items():
            _check(name, value)
        rows = {name: len(value) for name, value in self.tensors.items()}
        if len(set(rows.values())) > 1:
            counts = ", ".join(f"{name} {n}" for name, n in rows.items())
            raise ValueError(f"conditions have one row per sample, but these differ in their rows: {counts}")
        if self.mask is not None and (self.context is None or self.mask.shape != self.context.shape[:2]):
            context = None if self.context is None else tuple(self.context.shape)
            shapes = f"mask {tuple(self.mask.shape)}, context {context}"
            raise ValueError(f"a mask (B, L) needs a context (B, L, D) of the same size: {shapes}")

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The conditions that are not None, by name."""
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in every.items() if value is not None}

    @property
    def names(self) -> list[str]:
        """The names of the conditions that are not None, without the mask, which belongs to the context."""
        return [name for name in self.tensors if name != "mask"]

    def without(self: C, names: Collection[str]) -> C:
        """A copy without these conditions. Removing the context removes its mask too."""
        return replace(self, **dict.fromkeys([*names, "mask"] if "context" in names else names))

    def __bool__(self) -> bool:
        return bool(self.tensors)

    def __len__(self) -> int:
        """B. ValueError if there is no condition."""
        for value in self.tensors.values():
            return len(value)
        raise ValueError("an empty condition has no number of rows")

    @property
    def device(self) -> torch.device | None:
        """The device of its tensors, None if there are none."""
        return next((value.device for value in self.tensors.values()), None)

    def to(self: C, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> C:
        """Move it. `dtype` is for floating-point tensors but the guidance scale, which would be rounded."""

        def moved(name: str, value: Tensor) -> Tensor:
            return _moved(value, device, dtype if value.is_floating_point() and name != "guidance" else None)

        return replace(self, **{name: moved(name, value) for name, value in self.tensors.items()})

    def __getitem__(self: C, rows: int | slice | Sequence[int] | Tensor) -> C:
        """Some of the samples: condition[:4], condition[[0, 2]]; condition[0] is a batch of one."""
        if isinstance(rows, int):
            rows = [rows]
        index = rows if isinstance(rows, (slice, Tensor)) else list(rows)
        return replace(self, **{name: value[index] for name, value in self.tensors.items()})

    def expand(self: C, n: int) -> C:
        """The same condition for n samples, from one row or n rows."""
        return replace(self, **{name: _expanded(name, value, n) for name, value in self.tensors.items()})

    def updated(self: C, other: Condition) -> C:
        """A copy in which the tensors of `other` replace those of the same name.

        They are converted to the dtype and device of the old ones, and one row is repeated for all samples.
        Used to replace conditions by null conditions for guidance. A new context replaces the mask too.
        ValueError if `other` has a condition that this one lacks.
        """
        own = self.tensors
        changes: dict[str, Tensor | None] = {}
        if other.context is not None and self.mask is not None:
            changes["mask"] = None
        for name, value in other.tensors.items():
            like = own.get("context" if name == "mask" else name)
            if like is None:
                raise ValueError(f"there is no condition {name!r} to replace; {_names_given(own)}")
            width = 2 if name == "context" else 1  # contexts may have any length
            if name != "mask" and value.shape[width:] != like.shape[width:]:
                shapes = f"{tuple(value.shape)} cannot replace {tuple(like.shape)}"
                raise ValueError(f"the condition {name!r} {shapes}: it has another width")
            dtype = None if name == "mask" else like.dtype
            changes[name] = _expanded(name, _moved(value, like.device, dtype), len(self))
        return replace(self, **changes)

    def where(self: C, keep: Tensor, other: Condition) -> C:
        """Per sample this condition, or `other`'s (`updated`) where `keep` (B,) is False."""
        if keep.dtype != torch.bool or keep.shape != (len(self),):
            flags = f"{keep.dtype} {tuple(keep.shape)}"
            raise ValueError(f"one flag per sample is needed, bool ({len(self)},), not {flags}")
        mine, theirs = _with_masks(self, self.updated(other))

        def choose(name: str, a: Tensor) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (a.ndim - 1)), a, theirs.tensors[name])

        return replace(mine, **{name: choose(name, value) for name, value in mine.tensors.items()})

    @staticmethod
    def cat(conditions: Sequence[C]) -> C:
        """Concatenate along the batch. Shorter contexts are padded and masked.

        ValueError if they do not all have the same conditions (masks aside).
        """
        if not conditions:
            raise ValueError("there is no condition to concatenate: give at least one")
        first, *others = parts = _with_masks(*conditions)
        for other in others:
            if odd := sorted(first.tensors.keys() ^ other.tensors.keys()):
                raise ValueError(f"a batch has one set of conditions, but only some samples have {odd[0]!r}")
        return replace(
            first, **{name: torch.cat([each.tensors[name] for each in parts]) for name in first.tensors}
        )

    def require(self, takes: Collection[str]) -> None:
        """ValueError unless exactly the conditions in `takes` exist: an ignored condition is a mistake too.

        A mask is allowed with every context.
        """
        names = self.names
        for name in takes:
            if name not in names:
                raise ValueError(f"this network needs the condition {name!r}: {_names_given(self.tensors)}")
        for name in names:
            if name not in takes:
                known = ", ".join(takes) or "none"
                raise ValueError(f"this network does not take the condition {name!r}; it takes: {known}")


NONE = Condition()
"""No condition: the network sees x and t only."""

RANKS = {"context": 3, "mask": 2, "vector": 2, "label": 1, "guidance": 1, "image": 4}
KINDS = {"mask": "bool", "label": "whole numbers"}  # all others are floating point


def _check(name: str, value: Any) -> None:
    """ValueError for a wrong type, rank or dtype. Does not read values: that would wait for the device."""
    if not isinstance(value, Tensor):
        raise ValueError(f"the condition {name!r} must be a tensor (B, ...), not {brief(value)}")
    rank = RANKS.get(name)
    if value.ndim < 1 or rank not in (None, value.ndim):
        dimensions = f"{rank or 'at least 1'} dimensions, one row per sample"
        raise ValueError(f"the condition {name!r} has {dimensions}, not shape {tuple(value.shape)}")
    kind = KINDS.get(name, "floating point")
    fits = {"bool": value.dtype == torch.bool, "whole numbers": value.dtype in (torch.int32, torch.int64)}
    if rank and not fits.get(kind, value.is_floating_point()):
        raise ValueError(f"the condition {name!r} must be {kind}, not {value.dtype}")


def _names_given(names: Collection[str]) -> str:
    return f"given: {', '.join(names) or 'none'}"


def _moved(value: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Copy to a device. Only copies to the CPU wait: the host may read those at once."""
    return value.to(device, dtype, non_blocking=device is not None and torch.device(device).type != "cpu")


def _expanded(name: str, value: Tensor, n: int) -> Tensor:
    if len(value) not in (1, n):
        rows = f"{len(value)} rows for {n} samples"
        raise ValueError(f"the condition {name!r} has {rows}: give one for each, or one for all")
    return value.expand(n, *value.shape[1:])


def _with_masks(*conditions: C) -> list[C]:
    """The same conditions with contexts padded to one length; if any needs a mask, all get one."""
    kinds = {(each.context.shape[1], each.mask is None) for each in conditions if each.context is not None}
    if len(kinds) <= 1:
        return list(conditions)
    longest, padded = max(length for length, _ in kinds), []
    for each in conditions:
        if (context := each.context) is not None:
            more = longest - context.shape[1]
            mask = context.new_ones(context.shape[:2], dtype=torch.bool) if each.mask is None else each.mask
            each = replace(each, context=F.pad(context, (0, 0, 0, more)), mask=F.pad(mask, (0, more)))
        padded.append(each)
    return padded
