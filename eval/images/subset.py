"""A part of a source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from train.data.source import Source, Unreadable


class Part:
    """n pictures of a source, in its order: the first ones or, where there are classes, the first of each in turn, as a folder that is
    sorted by class would otherwise lose the last ones. ValueError where it has fewer.
    """

    def __init__(self, source: Source, n: int) -> None:
        if n > len(source):
            raise ValueError(f"{source.origin} has {len(source)} pictures, fewer than n={n}")
        self._source, self._chosen = source, _chosen(source, n)
        self.origin, self.stamp = source.origin, f"{source.stamp} {n}"
        self.names = [source.names[i] for i in self._chosen]
        labels = source.labels
        self.labels = None if labels is None else [labels[i] for i in self._chosen]
        self.ignored = getattr(source, "ignored", {})

    @property
    def prompts(self) -> Sequence[str] | None:
        """Of each; read when they are first asked for, as the source does."""
        prompts = self._source.prompts
        return None if prompts is None else [prompts[i] for i in self._chosen]

    def __len__(self) -> int:
        return len(self._chosen)

    def read(self, indices: Sequence[int]) -> Iterable[Tensor | Unreadable]:
        """See `Source`."""
        return self._source.read([self._chosen[i] for i in indices])


def _chosen(source: Source, n: int) -> list[int]:
    """Which pictures, ascending."""
    if source.labels is None:
        return list(range(n))
    in_turn = sorted((turn, i) for i, turn in enumerate(turns(source.labels)))
    return sorted(i for _, i in in_turn[:n])


def turns(labels: Sequence[str]) -> list[int]:
    """The number of each picture among those of its class: in the order of these, classes come in turn, as from a sampler."""
    seen: dict[str, int] = {}
    found = []
    for label in labels:
        found.append(seen.setdefault(label, 0))
        seen[label] += 1
    return found
