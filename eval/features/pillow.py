"""Pillow's resize of 8-bit pictures, bit for bit, on any device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

AT_ONCE = 2**26  # values that are in float64 at once
FRACTION = 2**22  # Pillow's weights for 8-bit pictures are multiples of 1 / FRACTION


def triangle(x: Tensor) -> Tensor:
    """Bilinear, of support 1."""
    return (1 - x.abs()).clamp(min=0)


def keys(x: Tensor) -> Tensor:
    """Bicubic (Keys 1981) with a = -1/2, of support 2."""
    a, x = -0.5, x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


FILTERS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "bilinear": (triangle, 1.0),
    "bicubic": (keys, 2.0),
}
"""By name: the function and its support."""


def resize(pictures: Tensor, size: tuple[int, int], kernel: str = "bicubic") -> Tensor:
    """uint8 (..., H, W) -> uint8 (..., *size), bitwise PIL.Image.resize with BILINEAR or BICUBIC.

    First along the width, then along the height, rounded to 8 bits each time, as Pillow up to 12, which
    published figures used. Pillow 13 resizes some tall pictures in the other order, which moves pixels by a
    few levels. Sums of whole numbers below 2^53 are exact in float64.
    """
    height, width = size
    if width != pictures.shape[-1]:
        across = weights(pictures.shape[-1], width, kernel).to(pictures.device).T
        rows = max(
            1, AT_ONCE * pictures.shape[-2] // pictures.numel()
        )  # float64 takes eight times the memory
        parts = [_rounded(part.double() @ across) for part in pictures.split(rows, dim=-2)]
        pictures = torch.cat(parts, dim=-2)
    if height != pictures.shape[-2]:
        down = weights(pictures.shape[-2], height, kernel).to(pictures.device)
        pictures = _rounded(down @ pictures.double())
    return pictures


@cache
def weights(old: int, new: int, kernel: str) -> Tensor:
    """Float64 (new, old): the weight of each old pixel in each new one, in multiples of 1 / FRACTION."""
    function, support = FILTERS[kernel]
    scale = old / new
    stretch = max(scale, 1.0)
    centre = (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * scale
    pixel = torch.arange(old, dtype=torch.float64)
    low = (centre - support * stretch + 0.5).trunc().clamp(min=0)
    high = (centre + support * stretch + 0.5).trunc()
    taken = (pixel >= low) & (pixel < high)
    share = torch.where(taken, function((pixel - centre + 0.5) / stretch), 0)
    share = share / share.sum(1, keepdim=True) * FRACTION
    return (share.abs() + 0.5).floor() * share.sign()


def _rounded(sums: Tensor) -> Tensor:
    return ((sums + FRACTION // 2) / FRACTION).floor().clamp(0, 255).to(torch.uint8)
