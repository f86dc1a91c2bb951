"""From picture files to pixels, several at a time."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from eval.images.source import Unreadable


def pixels(picture: Image.Image) -> Tensor:
    """uint8 (3, H, W) of a picture in colour, channels last in memory, as it was decoded."""
    return rearrange(torch.from_numpy(np.array(picture)), "h w c -> c h w")


def decoded(data: bytes, name: str) -> Image.Image:
    """A picture in colour from the content of a file of that name. ValueError as from `samplers.pictures.open_picture`."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.width * picture.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"Image size ({picture.width} x {picture.height} pixels) exceeds limit, could be decompression bomb")
            picture.load()
            upright = ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} is no picture that can be read: {' '.join(str(error).split())}") from None
    if upright.mode.startswith(("I", "F")):
        raise ValueError(f"{name} has pixels of more than 8 bits ({upright.mode}): save it with 8 bits per channel")
    if upright.mode in ("P", "LA") or "transparency" in upright.info:
        upright = upright.convert("RGBA")
    if "A" in upright.getbands() and upright.getchannel("A").getextrema()[0] != 255:
        raise ValueError(f"{name} is transparent in places: give it a background first")
    return upright.convert("RGB")


def in_threads(read: Callable[[int], Tensor], indices: Sequence[int]) -> list[Tensor | Unreadable]:
    """read(i) of each, in order, side by side, for decoding leaves Python free; what ValueError or OSError says becomes Unreadable."""

    def attempt(index: int) -> Tensor | Unreadable:
        try:
            return read(index)
        except (OSError, ValueError) as error:
            return Unreadable(str(error))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(attempt, indices))
