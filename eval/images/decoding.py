"""From picture files to pixels, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from eval.images.source import Unreadable
from samplers.pictures import MAX_PIXELS, read_pixels


def pixels(path: str | Path, content: bytes | None = None, max_pixels: int = MAX_PIXELS) -> Tensor:
    """uint8 (3, H, W) of a picture in colour, channels last in memory; see `read_pixels`.

    Values are those of the file, whatever colour profile it has: published protocols read pictures so, and their figures with it.
    """
    return rearrange(torch.from_numpy(read_pixels(path, content, max_pixels=max_pixels)), "h w c -> c h w")


def in_threads(read: Callable[[int], Tensor], indices: Sequence[int]) -> list[Tensor | Unreadable]:
    """read(i) of each, in order, side by side, for decoding leaves Python free; what ValueError or OSError says becomes Unreadable."""

    def attempt(index: int) -> Tensor | Unreadable:
        try:
            return read(index)
        except (OSError, ValueError) as error:
            return Unreadable(str(error))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(attempt, indices))
