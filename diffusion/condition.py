"""What a network is told beside x and t, as one object: per sample, so that batches are cut, joined and moved
as samples are."""

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
    """Conditions of B samples, one row per sample; None where there is none.

    context   text or other tokens (B, L, D)
    mask      which of them are there, (B, L) bool; None: all. Attention passes over the others, so a batch
              equals its samples alone
    vector    pooled text, sizes, ... (B, V)
    label     the class, whole numbers (B,)
    guidance  the scale that a distilled network imitates (B,)
    image     what the network sees beside x: channels of the same height and width (B, C', H, W)

    Where no kind of number is named, they are floating point. A subclass may have more fields; all operations
    run over the fields there are. (Batches of training name those that stand here.) ValueError for what is no
    tensor of that rank and kind, and for numbers of rows that differ.
    """

    context: Tensor | None = None
    mask: Tensor | None = None
    vector: Tensor | None = None
    label: Tensor | None = None
    guidance: Tensor | None = None
    image: Tensor | None = None

    def __post_init__(self) -> None:
        given = self.tensors
        for name, value in given.items():
            _check(name, value)
        rows = {name: len(value) for name, value in given.items()}
        if len(set(rows.values())) > 1:
            told = ", ".join(f"{name} {n}" for name, n in rows.items())
            raise ValueError(f"conditions have one row per sample, and these have different numbers: {told}")
        if self.mask is not None and (self.context is None or self.mask.shape != self.context.shape[:2]):
            of = "no context" if self.context is None else f"a context {tuple(self.context.shape)}"
            raise ValueError(
                f"the mask {tuple(self.mask.shape)} says which tokens of a context are there, and goes with "
                f"{of}"
            )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The conditions that there are, by name."""
        return {
            field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None
        }

    @property
    def names(self) -> list[str]:
        """The names of the conditions that there are. The mask has none of its own: it goes with its
        context."""
        return [name for name in self.tensors if name != "mask"]

    def without(self: C, names: Collection[str]) -> C:
        """But for the conditions of these names; a context takes its mask along."""
        return replace(self, **dict.fromkeys([*names, "mask"] if "context" in names else names))

    def __bool__(self) -> bool:
        return bool(self.tensors)

    def __len__(self) -> int:
        """B. ValueError where nothing is given, which fits any number of samples."""
        for value in self.tensors.values():
            return len(value)
        raise ValueError("an empty condition has no number of rows")

    @property
    def device(self) -> torch.device | None:
        """Where it is, None where nothing is given."""
        return next((value.device for value in self.tensors.values()), None)

    def to(self: C, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> C:
        """On another device; dtype: of what is floating point, but for the guidance scale, which half
        precision would round by a step."""

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
        """The same for n samples, from one row or from n."""
        return replace(self, **{name: _expanded(name, value, n) for name, value in self.tensors.items()})

    def updated(self: C, other: Condition) -> C:
        """This condition with what `other` gives in place of its own, in the dtype and on the device of its
        own; one row serves all.

        So a null condition takes the place of those that guidance leads away from, and what it does not name
        stays. A context brings its mask along. ValueError where `other` gives what is not given here.
        """
        own = self.tensors
        changes: dict[str, Tensor | None] = (
            {"mask": None} if other.context is not None and self.mask is not None else {}
        )
        for name, value in other.tensors.items():
            like = own.get("context" if name == "mask" else name)
            if like is None:
                raise ValueError(
                    f"the condition {name!r} cannot be replaced, since there is none: {_listed(own)}"
                )
            if (
                name != "mask"
                and value.shape[1 + (name == "context") :] != like.shape[1 + (name == "context") :]
            ):  # of any length
                raise ValueError(
                    f"the condition {name!r} {tuple(value.shape)} cannot take the place of one "
                    f"{tuple(like.shape)}: it has another width"
                )
            dtype = None if name == "mask" else like.dtype
            changes[name] = _expanded(name, _moved(value, like.device, dtype), len(self))
        return replace(self, **changes)

    def where(self: C, keep: Tensor, other: Condition) -> C:
        """Per sample this condition or, where `keep` (B,) is False, `other`'s (`updated`): how training drops
        conditions."""
        if keep.dtype != torch.bool or keep.shape != (len(self),):
            raise ValueError(
                f"one flag per sample is needed, bool ({len(self)},), not {keep.dtype} {tuple(keep.shape)}"
            )
        others = self.updated(other)
        mine, theirs = _with_masks(self, others)

        def chosen(name: str, a: Tensor) -> Tensor:
            return torch.where(keep.view(-1, *[1] * (a.ndim - 1)), a, theirs.tensors[name])

        return replace(mine, **{name: chosen(name, value) for name, value in mine.tensors.items()})

    @staticmethod
    def cat(conditions: Sequence[C]) -> C:
        """The rows of several, one after the other. Contexts of different lengths are filled up, and masks
        say so.

        ValueError where one gives what another does not, but for masks.
        """
        if not conditions:
            raise ValueError("there is no condition to join: give at least one")
        joined = _with_masks(*conditions)
        names = joined[0].tensors.keys()
        for other in joined[1:]:
            if odd := sorted(names ^ other.tensors.keys()):
                raise ValueError(
                    f"some of these samples have the condition {odd[0]!r} and some have not: they cannot be "
                    "one batch"
                )
        return replace(
            joined[0], **{name: torch.cat([each.tensors[name] for each in joined]) for name in names}
        )

    def require(self, takes: Collection[str]) -> None:
        """ValueError unless exactly what a network takes is given: an ignored condition is as wrong as a
        missing one.

        A mask may come with every context.
        """
        names = self.names
        for name in takes:
            if name not in names:
                raise ValueError(f"this network needs the condition {name!r}: {_listed(self.tensors)}")
        for name in names:
            if name not in takes:
                raise ValueError(
                    f"this network has no use for the condition {name!r}; it takes: "
                    f"{', '.join(takes) or 'none'}"
                )


NONE = Condition()
"""Nothing is told but x and t."""

RANKS = {"context": 3, "mask": 2, "vector": 2, "label": 1, "guidance": 1, "image": 4}
KINDS = {"mask": "bool", "label": "whole numbers"}  # all others are floating point


def _check(name: str, value: Any) -> None:
    """ValueError unless it is a tensor of its rank and kind. Looks at no value: that would wait for a
    device."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"the condition {name!r} must be a tensor with one row per sample, not {brief(value)}"
        )
    rank = RANKS.get(name)
    if value.ndim < 1 or rank not in (None, value.ndim):
        raise ValueError(
            f"the condition {name!r} has {rank or 'at least 1'} dimensions, one row per sample, not shape "
            f"{tuple(value.shape)}"
        )
    kind = KINDS.get(name, "floating point")
    fits = {"bool": value.dtype == torch.bool, "whole numbers": value.dtype in (torch.int32, torch.int64)}
    if rank and not fits.get(kind, value.is_floating_point()):
        raise ValueError(f"the condition {name!r} must be {kind}, not {value.dtype}")


def _listed(given: Collection[str]) -> str:
    return f"given is {', '.join(given)}" if given else "none is given"


def _moved(value: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """A copy to a GPU is not waited for; one from it is, for the host reads at once what may not have come
    yet."""
    return value.to(device, dtype, non_blocking=device is not None and torch.device(device).type != "cpu")


def _expanded(name: str, value: Tensor, n: int) -> Tensor:
    if len(value) not in (1, n):
        raise ValueError(
            f"the condition {name!r} has {len(value)} rows for {n} samples: give one for each, or one for all"
        )
    return value.expand(n, *value.shape[1:])


def _with_masks(*conditions: C) -> list[C]:
    """The same conditions with contexts of one length. Those that are filled up get a mask, and the others
    with them."""
    lengths = [each.context.shape[1] for each in conditions if each.context is not None]
    if not lengths or (
        len(set(lengths)) == 1
        and len({each.mask is None for each in conditions if each.context is not None}) == 1
    ):
        return list(conditions)
    most, filled = max(lengths), []
    for each in conditions:
        if each.context is None:
            filled.append(each)
            continue
        mask = (
            each.context.new_ones(each.context.shape[:2], dtype=torch.bool)
            if each.mask is None
            else each.mask
        )
        more = most - each.context.shape[1]
        filled.append(
            replace(each, context=F.pad(each.context, (0, 0, 0, more)), mask=F.pad(mask, (0, more)))
        )
    return filled
