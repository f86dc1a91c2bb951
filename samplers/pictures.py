"""Images from files, and samples as image files."""

from __future__ import annotations

import io
import json
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from models.files import replacing, strict

_OPENING = threading.Lock()  # filters of warnings are the whole program's, and threads that restore them in another order leave others
MAX_PIXELS = 2**27  # of one picture: a camera's 102 million are read, and what only claims to be huge is refused
SETTINGS = "settings"  # the name of the text in a PNG that holds what it was drawn with, as JSON


def to_uint8(images: Tensor, low: float = -1.0) -> Tensor:
    """(B, C, H, W) in [low, 1] to whole values 0 ... 255, rounded to the nearest; what lies outside is cut off, NaN is an error."""
    if images.isnan().any():
        raise ValueError("images hold values that are no numbers (NaN): no picture shows them")
    return ((images.clamp(low, 1) - low) * (255 / (1 - low))).round().byte()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures of images (B, 3 or 1, H, W) in [0, 1], as `generate` makes them, or of one (3 or 1, H, W)."""
    if images.ndim not in (3, 4) or images.shape[-3] not in (1, 3) or not images.is_floating_point():
        raise ValueError(f"pictures need images (B, 3, H, W) in [0, 1], not {images.dtype} {tuple(images.shape)}")
    return [_picture(pixels) for pixels in to_uint8(images if images.ndim == 4 else images[None], low=0.0)]


def read_image(path: str | Path, size: tuple[int, int] | None = None, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """A picture as (1, 3, H, W) in [0, 1], upright; with a size, (height, width), made to cover it (`covering`).

    OSError or ValueError in one line for what is no picture, or has transparent pixels, more than 8 bits, or more than `max_pixels`.
    """
    return covering(_pixels(open_picture(path, max_pixels=max_pixels)), size)


def open_picture(
    path: str | Path, mode: Literal["RGB", "L"] = "RGB", content: bytes | None = None, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """A picture wholly read and upright, in colour or grey; errors as in `read_image`. May be called by several threads at once.

    content  of the file, where that is no file of its own but within another, and `path` only its name
    """
    picture = _opened(path, content, max_pixels)
    if "A" in picture.getbands() and picture.getchannel("A").getextrema()[0] != 255:
        raise ValueError(f"{path} is transparent in places: give it a background first")
    return picture.convert(mode)


def read_mask(path: str | Path, size: tuple[int, int] | None = None, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """A mask as (1, 1, H, W) in [0, 1], 1, where to paint, where the picture is white; `size` and errors as in `read_image`."""
    return covering(_pixels(_opened(path, max_pixels=max_pixels).convert("L")), size)


def covering(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """(B, C, H, W) in [0, 1], scaled until it just covers the size (height, width), and what stands over cut off evenly; None: as it is."""
    if size is None or images.shape[2:] == size:
        return images
    scale = max(wanted / side for wanted, side in zip(size, images.shape[2:], strict=True))
    height, width = (max(wanted, round(scale * side)) for wanted, side in zip(size, images.shape[2:], strict=True))
    scaled = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return scaled[:, :, top : top + size[0], left : left + size[1]]


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


def thumbnail(image: Tensor, side: int = 256) -> Tensor:
    """One picture (C, H, W) made smaller by a whole factor, so that no side is longer than that; smaller ones as they are."""
    factor = -(-max(image.shape[1:]) // side)
    return F.avg_pool2d(image[None], factor, ceil_mode=True, count_include_pad=False)[0] if factor > 1 else image


def save_png(image: Tensor, path: Path, settings: Mapping[str, Any] | None = None, zoom: int = 1, low: float = -1.0) -> None:
    """Write one picture (C, H, W) in [low, 1], grey or colour, atomically; `settings` go into its metadata as JSON."""
    picture = _picture(to_uint8(image[None], low)[0])
    if zoom > 1:
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    info = PngInfo()
    if settings:
        info.add_text(SETTINGS, json.dumps(strict(settings)))
    with replacing(path) as temporary:
        picture.save(temporary, "png", pnginfo=info)


def read_settings(path: str | Path) -> dict[str, Any]:
    """What a PNG of ours was drawn with. OSError or ValueError in one line for a file that is none."""
    text = _opened(path).info.get(SETTINGS)
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} does not say what it was drawn with: it is none of our pictures, or was written again by another program")
    return settings


def pixel_difference(a: str | Path, b: str | Path) -> int:
    """The largest difference between two pictures in any channel, 0 ... 255; 255 for pictures of different size or kind."""
    one, other = _opened(a), _opened(b)
    if (one.size, one.mode) != (other.size, other.mode):
        return 255
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def _opened(path: str | Path, content: bytes | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A picture, wholly read and upright."""
    path = Path(path)
    if content is None and not path.exists():
        raise FileNotFoundError(f"no such picture: {path}")
    try:
        with _OPENING, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            usual, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                picture = Image.open(path if content is None else io.BytesIO(content))
            finally:
                Image.MAX_IMAGE_PIXELS = usual
        with picture:
            if picture.width * picture.height > max_pixels:
                size = f"{picture.width}x{picture.height} = {picture.width * picture.height:,} pixels"
                raise ValueError(f"{size} are more than max_pixels={max_pixels}: make it smaller, or raise max_pixels")
            picture.load()
            info = dict(picture.info)
            upright = ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read: {' '.join(str(error).split())}") from None
    if upright.mode.startswith(("I", "F")):
        raise ValueError(f"{path} has pixels of more than 8 bits ({upright.mode}): save it with 8 bits per channel")
    if upright.mode == "P" or upright.mode == "LA" or "transparency" in upright.info:
        upright = upright.convert("RGBA")
    upright.info = info
    return upright


def _pixels(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(picture)).reshape(picture.height, picture.width, -1)
    return rearrange(pixels, "h w c -> 1 c h w").float() / 255


def _picture(pixels: Tensor) -> Image.Image:
    """Of one image (3 or 1, H, W) of whole values."""
    pixels = rearrange(pixels.cpu(), "c h w -> h w c")
    return Image.fromarray(np.ascontiguousarray((pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).numpy()))
