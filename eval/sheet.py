"""A sheet: a few pictures of a source, side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from samplers.pictures import save_png, thumbnail, tile
from train.data.names import class_order
from train.data.source import Source, reading

SHOWN = 24  # pictures without classes
COLUMNS = 12
EACH, CLASSES = 3, 10  # pictures of each class, and the most classes


class Sheet:
    """The first pictures of a source; if it has classes, the first of each class, a column per class."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._chosen, self._columns = _chosen(source)
        self._seen: dict[int, Tensor] = {}

    def see(self, index: int, pixels: Tensor) -> None:
        """Keep a picture, uint8 (3, H, W), if it is on the sheet, so that it need not be drawn again."""
        if index in self._chosen:
            self._seen[index] = _small(pixels)

    def save(self, path: str | Path) -> None:
        """Write a PNG. Pictures not seen yet are read now; unreadable ones and other sizes are left out."""
        missing = [i for i in self._chosen if i not in self._seen]
        with reading(self._source, missing) as read:
            for i, pixels in zip(missing, read, strict=True):
                if isinstance(pixels, Tensor):
                    self.see(i, pixels)
        shown = [self._seen[i] for i in self._chosen if i in self._seen]
        alike = [picture for picture in shown if picture.shape == shown[0].shape]
        if alike:
            columns = self._columns if len(alike) == len(self._chosen) else COLUMNS
            save_png(tile(torch.stack(alike), columns), Path(path), zoom=max(1, 32 // alike[0].shape[-1]))


def _small(pixels: Tensor) -> Tensor:
    """In [-1, 1]; channel by channel, since float32 takes four times the memory."""
    return torch.cat([thumbnail(channel.float().div_(127.5).sub_(1)) for channel in pixels.split(1)])


def _chosen(source: Source) -> tuple[list[int], int]:
    """The numbers of the pictures, row by row, and how many columns there are."""
    if source.labels is None:
        return list(range(min(SHOWN, len(source)))), COLUMNS
    members: dict[str, list[int]] = {}
    for i, label in enumerate(source.labels):
        members.setdefault(label, []).append(i)
    columns = sorted(members, key=class_order)[:CLASSES]
    each = min(EACH, *(len(members[label]) for label in columns))
    return [members[label][k] for k in range(each) for label in columns], len(columns)
