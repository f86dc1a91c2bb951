"""Parts of a source."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from train.data.names import class_order
from train.data.source import Source, Unreadable


class Subset:
    """The pictures of a source with these numbers, which ascend."""

    def __init__(self, source: Source, chosen: Sequence[int]) -> None:
        self._source, self._chosen = source, chosen
        numbers = hashlib.sha256(json.dumps(list(chosen)).encode()).hexdigest()
        self.origin, self.stamp = source.origin, f"{source.stamp} {numbers}"
        self.names = [source.names[i] for i in chosen]
        labels = source.labels
        self.labels = None if labels is None else [labels[i] for i in chosen]
        self.ignored = getattr(source, "ignored", {})
        self.computes = getattr(source, "computes", False)

    @property
    def prompts(self) -> Sequence[str] | None:
        """Of each picture; read on first use."""
        prompts = self._source.prompts
        return None if prompts is None else [prompts[i] for i in self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, indices: Sequence[int]) -> Iterable[Tensor | Unreadable]:
        """See `Source`."""
        return self._source.read([self._chosen[i] for i in indices])


def first_pictures(source: Source, n: int) -> Subset:
    """The first n pictures, of each class in turn if there are classes. ValueError if there are fewer.

    The first n of a folder that is sorted by class would lack the last classes.
    """
    if n > len(source):
        raise ValueError(f"{source.origin} has {len(source)} pictures, fewer than n={n}")
    if source.labels is None:
        return Subset(source, range(n))
    in_turn = sorted((number, i) for i, number in enumerate(index_within_class(source.labels)))
    return Subset(source, sorted(i for _, i in in_turn[:n]))


def equal_parts(source: Source, parts: int) -> list[Source]:
    """The source in so many equal parts, in its order. ValueError if its pictures cannot be divided so."""
    size, left = divmod(len(source), parts)
    if left or not size:
        raise ValueError(
            f"{source.origin} has {len(source)} pictures, which do not divide into parts={parts} equal parts"
        )
    return [source] if parts == 1 else [Subset(source, range(k * size, (k + 1) * size)) for k in range(parts)]


def index_within_class(labels: Sequence[str]) -> list[int]:
    """The index of each picture among those of its class."""
    seen: dict[str, int] = {}
    found = []
    for label in labels:
        found.append(seen.setdefault(label, 0))
        seen[label] += 1
    return found


def proportional_classes(labels: Sequence[str], n: int) -> list[str]:
    """n classes in a fixed random order, in the proportions of `labels`, to within one picture.

    Other proportions would add to distances. ValueError if n is larger than the number of labels.
    """
    if not 1 <= n <= len(labels):
        raise ValueError(
            f"n must lie in 1 ... {len(labels)}, the number of pictures of the reference, not {n}"
        )
    ordered = sorted(labels, key=class_order)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    return [ordered[i * len(labels) // n] for i in order]
