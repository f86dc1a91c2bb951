"""Samples as image files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from models.files import replacing


def to_uint8(images: Tensor) -> Tensor:
    """(B, C, H, W) in [-1, 1] to whole values 0 ... 255, rounded to the nearest; what lies outside is cut off, NaN is an error."""
    if images.isnan().any():
        raise ValueError("images hold values that are no numbers (NaN): no picture shows them")
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def tile(images: Tensor, columns: int, gap: int = 1, fill: float = 1.0) -> Tensor:
    """(N, C, H, W) to one picture (C, rows*(H + gap) - gap, columns*(W + gap) - gap), row by row.

    `fill`, white by default, is the value between the images and where they run out.
    """
    if images.ndim != 4 or len(images) == 0 or columns < 1:
        raise ValueError(f"tiles need images (N, C, H, W) and at least one column, not {tuple(images.shape)} in {columns}")
    columns = min(columns, len(images))
    missing = -len(images) % columns
    n, channels, height, width = images.shape
    padded = images.new_full((n + missing, channels, height + gap, width + gap), fill)
    padded[:n, :, :height, :width] = images
    sheet = rearrange(padded, "(r k) c h w -> c (r h) (k w)", k=columns)
    return sheet[:, : sheet.shape[1] - gap, : sheet.shape[2] - gap]


def save_png(image: Tensor, path: Path, settings: Mapping[str, Any] | None = None, zoom: int = 1) -> None:
    """Write one picture (C, H, W) in [-1, 1], grey or colour, atomically; `settings` go into its metadata as JSON."""
    pixels = rearrange(to_uint8(image[None])[0].cpu(), "c h w -> h w c").numpy()
    picture = Image.fromarray(np.ascontiguousarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels))
    if zoom > 1:
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    info = PngInfo()
    if settings:
        info.add_text("settings", json.dumps(dict(settings)))
    with replacing(path) as temporary:
        picture.save(temporary, "png", pnginfo=info)
