"""A few pictures of a source, side by side."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from eval.images.source import Source
from samplers.pictures import save_png, thumbnail, tile

SHOWN = 24  # pictures without classes
COLUMNS = 12
EACH, CLASSES = 3, 10  # pictures of each class, and the most classes


def save_sheet(source: Source, path: str | Path) -> None:
    """Write a PNG of the first pictures of a source or, where it has classes, of the first of each, a class per column.

    The first ones and not a choice. Such as cannot be read, or are of another size than the first, are left out.
    """
    chosen, columns = _chosen(source)
    pictures = [thumbnail(picture.float() / 127.5 - 1) for picture in source.read(chosen) if isinstance(picture, Tensor)]
    alike = [picture for picture in pictures if picture.shape == pictures[0].shape]
    if alike:
        zoom = max(1, 32 // alike[0].shape[-1])
        save_png(tile(torch.stack(alike), columns if len(alike) == len(chosen) else COLUMNS), Path(path), zoom=zoom)


def _chosen(source: Source) -> tuple[list[int], int]:
    """Which pictures, row by row, and in how many columns."""
    if source.labels is None:
        return list(range(min(SHOWN, len(source)))), COLUMNS
    members: dict[str, list[int]] = {}
    for i, label in enumerate(source.labels):
        members.setdefault(label, []).append(i)
    columns = sorted(members, key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label))[:CLASSES]
    each = min(EACH, *(len(members[label]) for label in columns), EACH)
    return [members[label][k] for k in range(each) for label in columns], len(columns)
