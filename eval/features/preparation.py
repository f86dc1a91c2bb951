"""How a picture becomes the input of a network, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.features.pillow import resize


@dataclass(frozen=True)
class Preparation:
    """Resized in 8 bits as Pillow does, cut to a square, and normalised: (x / 255 - mean) / std.

    size    side of the square, in pixels
    fit     "shortest": the shorter side becomes `size`, then the centre is cut; "square": the centre is cut,
            then resized; "longest": the longer side becomes `size`, with `fill` around; "squash": both sides
            become `size`
    kernel  "bicubic" or "bilinear", widened when a picture shrinks
    fill    8-bit level outside the picture
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fit: Literal["shortest", "square", "longest", "squash"] = "shortest"
    kernel: Literal["bicubic", "bilinear"] = "bicubic"
    fill: int = 0

    def __str__(self) -> str:
        fill = f", around it {self.fill}" if self.fit == "longest" else ""
        mean, std = ("/".join(map(str, each)) for each in (self.mean, self.std))
        return f"{self.fit} {self.size}, {self.kernel} as Pillow{fill}, mean {mean}, std {std}"

    def __call__(self, pictures: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) -> float32 (B, 3, size, size), equal to torchvision's of Pillow pictures."""
        mean, std = (
            torch.tensor(each)[:, None, None].to(pictures.device, non_blocking=True)
            for each in (self.mean, self.std)
        )
        return (self._fitted(pictures).float() / 255 - mean) / std

    def _fitted(self, pictures: Tensor) -> Tensor:
        height, width = pictures.shape[-2:]
        square = (self.size, self.size)
        if self.fit == "squash":
            return resize(pictures, square, self.kernel)
        if self.fit == "square":
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            return resize(pictures[..., top : top + side, left : left + side], square, self.kernel)
        if self.fit == "longest":
            ratio = max(height, width) / self.size
            fitted = resize(pictures, (round(height / ratio), round(width / ratio)), self.kernel)
            return _padded(fitted, self.size, self.fill)
        short = min(height, width)
        fitted = resize(pictures, (self.size * height // short, self.size * width // short), self.kernel)
        top, left = (round((n - self.size) / 2) for n in fitted.shape[-2:])
        return fitted[..., top : top + self.size, left : left + self.size]


def _padded(pictures: Tensor, size: int, fill: int) -> Tensor:
    """In the middle of a square, rounded to the upper left."""
    missing_rows, missing_columns = (size - n for n in pictures.shape[-2:])
    left, top = missing_columns // 2, missing_rows // 2
    return F.pad(pictures, (left, missing_columns - left, top, missing_rows - top), value=fill)
