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
    """(B, C, H, W) in [-1, 1] to whole values 0 ... 255, rounded to the nearest; what lies outside is cut off."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte()


def tile(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """(N, C, H, W) in [-1, 1] to one picture (C, rows*H, columns*W), row by row, white between and where images run out."""
    missing = -len(images) % columns
    padded = images.new_ones(len(images) + missing, images.shape[1], images.shape[2] + gap, images.shape[3] + gap)
    padded[: len(images), :, :-gap, :-gap] = images
    return rearrange(padded, "(r k) c h w -> c (r h) (k w)", k=columns)


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
