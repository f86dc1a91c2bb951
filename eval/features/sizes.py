"""Pictures of many sizes, in a batch per size."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def by_size(pictures: Sequence[Tensor], fn: Callable[[Tensor], Tensor]) -> Tensor:
    """fn of batches (B, 3, H, W) of pictures of one size each; its rows (B, ...) in the pictures' order."""
    groups: dict[torch.Size, list[int]] = {}
    for index, picture in enumerate(pictures):
        groups.setdefault(picture.shape, []).append(index)
    rows = torch.cat([fn(torch.stack([pictures[i] for i in group])) for group in groups.values()])
    places = torch.tensor([i for group in groups.values() for i in group]).argsort()
    return rows[places.to(rows.device, non_blocking=True)]
