"""A part of a source."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eval.images.source import Source, Unreadable


class First:
    """The first n pictures of a source. ValueError where it has fewer."""

    def __init__(self, source: Source, n: int) -> None:
        if n > len(source):
            raise ValueError(f"{source.origin} has {len(source)} pictures, fewer than n={n}")
        self._source, self._n = source, n
        self.origin, self.stamp = source.origin, f"{source.stamp} first {n}"
        self.names = source.names[:n]
        self.labels = None if source.labels is None else source.labels[:n]

    @property
    def prompts(self) -> Sequence[str] | None:
        """Of each; read when they are first asked for, as the source does."""
        return None if self._source.prompts is None else self._source.prompts[: self._n]

    def __len__(self) -> int:
        return self._n

    def read(self, indices: Sequence[int]) -> list[Tensor | Unreadable]:
        """See `Source`."""
        return self._source.read(indices)
