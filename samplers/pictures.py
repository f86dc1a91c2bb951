"""Images from files, and samples as image files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from diffusion.messages import one_line
from models.files.text import parse_strict_json, read_bytes, strict
from models.files.writing import replacing
from samplers.picture_files import png_text, take_apart, webp_size

MAX_PIXELS = 2**27  # of one picture: more than a camera's 102 million
MAX_SIDE = 2**20  # pixels; Pillow takes memory for each row, however short
MAX_SETTINGS, MAX_DEPTH = 2**20, 16  # characters and nesting of the settings in a picture
Turn = Image.Transpose
ORIENTATIONS = {2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE}
ORIENTATIONS |= {6: Turn.ROTATE_270, 7: Turn.TRANSVERSE, 8: Turn.ROTATE_90}  # EXIF's
SRGB_ROUNDING = 2  # of 255: the difference between versions of the sRGB profile
SETTINGS = "settings"  # the name of the PNG's text with its settings, as JSON

Before = Callable[[int], None]  # called with a picture's number of pixels before it is decoded


def no_wait(pixels: int) -> None:
    """The default `before`: there is enough memory."""


def to_uint8(images: Tensor, low: float = -1.0) -> Tensor:
    """(B, C, H, W) in [low, 1] to 0 ... 255, rounded to the nearest and clipped. ValueError for NaN."""
    if images.isnan().any():
        raise ValueError("images with NaN cannot be shown as pictures")
    return ((images.clamp(low, 1) - low) * (255 / (1 - low))).round().byte()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures of images (B, 3 or 1, H, W) in [0, 1], as `generate` returns, or of one (3 or 1, H, W)."""
    if images.ndim not in (3, 4) or images.shape[-3] not in (1, 3) or not images.is_floating_point():
        kind = f"{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"pictures need images (B, 3, H, W) in [0, 1], not {kind}")
    return [_picture(pixels) for pixels in to_uint8(images if images.ndim == 4 else images[None], low=0.0)]


def read_image(
    path: str | Path, size: tuple[int, int] | None = None, *, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """A picture as (1, 3, H, W) in [0, 1], upright; with `size` (height, width) scaled and cropped to it.

    Errors as in `open_picture`.
    """
    return scale_and_crop(_as_tensor(open_picture(path, max_pixels=max_pixels)), size)


def open_picture(
    path: str | Path,
    mode: Literal["RGB", "L"] = "RGB",
    content: bytes | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
) -> Image.Image:
    """A whole picture, upright, in colour or grey; the first frame of an animation. Thread-safe.

    Reads PNG, JPEG, WebP and BMP, whatever their names end in. Values are those of the file; `open_srgb`
    applies colour profiles. 16-bit colours keep the upper 8 bits, CMYK becomes RGB by complement. Only
    orientation and profile are read from the metadata, and odd ones are ignored.

    content     of a file within another, whose name `path` is
    max_pixels  the limit for a picture

    FileNotFoundError, or ValueError in one line: not a picture, damaged, transparent in places, grey values
    of more than 8 bits, too many pixels.
    """
    with _decoded(path, content, max_pixels) as picture:
        return _in_mode(_opaque(path, picture), mode)


def open_srgb(
    path: str | Path,
    mode: Literal["RGB", "L"] = "RGB",
    content: bytes | None = None,
    *,
    max_pixels: int = MAX_PIXELS,
    before: Before = no_wait,
) -> Image.Image:
    """Like `open_picture`, converted to sRGB by its colour profile (`to_srgb`): networks are trained on sRGB.

    before  as in `read_pixels`
    """
    with _decoded(path, content, max_pixels, before) as picture:
        return _in_mode(to_srgb(_opaque(path, picture)), mode)


def read_pixels(
    path: str | Path, content: bytes | None = None, *, max_pixels: int = MAX_PIXELS, before: Before = no_wait
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Like `open_picture` in colour, as uint8 (H, W, 3).

    before  called with the number of pixels before decoding: it may wait for memory
    """
    with _decoded(path, content, max_pixels, before) as picture:
        return _as_array(_in_mode(_opaque(path, picture), "RGB"))


def read_mask(
    path: str | Path, size: tuple[int, int] | None = None, *, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """A mask as (1, 1, H, W) in [0, 1]: 1, where to paint, if white and opaque; 0 if black or transparent.

    `size` as in `read_image`, errors as in `open_picture`. ValueError too for a hole in black, which some
    programs paint: the whole mask would be 0. A mask that is black and opaque is valid, and paints nothing.
    """
    with _decoded(path, None, max_pixels) as picture:
        mask = _as_tensor(_in_mode(picture, "L"))
        if "A" in picture.getbands():
            alpha = _as_tensor(picture.getchannel("A"))
            mask = mask * alpha
            if alpha.min() < 1 and not mask.any():
                advice = "a mask is white and opaque where to paint"
                raise ValueError(f"{path} is black or transparent everywhere: {advice}")
        return scale_and_crop(mask, size)


def scale_and_crop(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """(B, C, H, W) in [0, 1], scaled to cover `size` (height, width), cropped to its centre."""
    if size is None or images.shape[2:] == size:
        return images
    height, width, top, left = cover_box(images.shape[2], images.shape[3], size)
    scaled = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return scaled[:, :, top : top + size[0], left : left + size[1]]


def cover_box(height: int, width: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Height and width of a picture scaled to just cover `size`; top and left of its central crop."""
    scale = max(size[0] / height, size[1] / width)
    height, width = max(size[0], round(scale * height)), max(size[1], round(scale * width))
    return height, width, (height - size[0]) // 2, (width - size[1]) // 2


def tile(images: Tensor, columns: int, gap: int = 1, fill: float = 1.0) -> Tensor:
    """(N, C, H, W) to one picture (C, rows*(H + gap) - gap, columns*(W + gap) - gap), row by row.

    `fill`, white by default, is the value of gaps and of missing images.
    """
    if images.ndim != 4 or len(images) == 0 or columns < 1:
        shape = f"{tuple(images.shape)} in {columns}"
        raise ValueError(f"tiles need images (N, C, H, W) and at least one column, not {shape}")
    columns = min(columns, len(images))
    missing = -len(images) % columns
    n, channels, height, width = images.shape
    padded = images.new_full((n + missing, channels, height + gap, width + gap), fill)
    padded[:n, :, :height, :width] = images
    sheet = rearrange(padded, "(r k) c h w -> c (r h) (k w)", k=columns)
    return sheet[:, : sheet.shape[1] - gap, : sheet.shape[2] - gap]


def thumbnail(image: Tensor, side: int = 256) -> Tensor:
    """A picture (C, H, W) made smaller by a whole factor until no side is longer than `side`."""
    factor = -(-max(image.shape[1:]) // side)
    if factor <= 1:
        return image
    return F.avg_pool2d(image[None], factor, ceil_mode=True, count_include_pad=False)[0]


def save_png(
    image: Tensor, path: Path, settings: Mapping[str, Any] | None = None, zoom: int = 1, low: float = -1.0
) -> None:
    """Writes a picture (C, H, W) in [low, 1] atomically, with `settings` as JSON in its metadata."""
    picture = _picture(to_uint8(image[None], low)[0])
    if zoom > 1:
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    info = PngInfo()
    if settings:
        info.add_text(SETTINGS, json.dumps(strict(settings)))
    with replacing(path) as temporary:
        picture.save(temporary, "png", pnginfo=info)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a PNG of ours. OSError or ValueError in one line for any other file."""
    content = read_file(path, MAX_PIXELS)
    try:
        kind = take_apart(content).kind
        text = (png_text(content, SETTINGS.encode()) if kind == "PNG" else None) or ""
    except ValueError as error:
        raise _unreadable(path, error) from None
    try:
        settings = parse_strict_json(text[: MAX_SETTINGS + 1])
    except ValueError:
        settings = None
    if not isinstance(settings, dict) or _depth(settings) > MAX_DEPTH:
        raise ValueError(f"{path} has no settings: it was not drawn here, or another program has changed it")
    return settings


def _depth(value: Any, limit: int = MAX_DEPTH) -> int:
    """The nesting depth of lists and objects, up to the limit."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((_depth(each, limit - 1) for each in inner), default=0) if limit >= 0 else 1


def pixel_difference(a: str | Path, b: str | Path) -> int:
    """The largest difference of two pictures in any channel, 0 ... 255; 255 if size or kind differ."""
    with _decoded(a) as one, _decoded(b) as other:
        if (one.size, one.mode) != (other.size, other.mode):
            return 255
        return int(np.abs(_as_array(one).astype(np.int16) - _as_array(other)).max())


# Reading ----------------------------------------------------------------------------------------------------


@contextmanager
def _decoded(
    path: str | Path, content: bytes | None = None, max_pixels: int = MAX_PIXELS, before: Before = no_wait
) -> Iterator[Image.Image]:
    """A whole picture, upright, with an alpha channel if it may be transparent."""
    content = read_file(path, max_pixels) if content is None else content
    try:
        file = take_apart(content)
        picture = None if file.kind == "WEBP" else file.open()
        width, height = webp_size(content) if picture is None else picture.size
    except Exception as error:  # Pillow raises many kinds of errors for damaged files
        raise _unreadable(path, error) from None
    if width * height > max_pixels:
        size = f"{width}x{height} = {width * height:,} pixels, more than max_pixels={max_pixels:,}"
        raise ValueError(f"{path} has {size}: make it smaller, or raise max_pixels")
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{path} has {width}x{height} pixels, but a side may have at most {MAX_SIDE:,}")
    before(width * height)
    try:
        whole: Image.Image = file.open() if picture is None else picture
        whole.load()
    except Exception as error:
        raise _unreadable(path, error) from None
    if whole.mode.startswith(("I", "F")):
        raise ValueError(f"{path} has pixels of more than 8 bits: save it with 8 bits per channel")
    if file.orientation > 1:
        whole = whole.transpose(ORIENTATIONS[file.orientation])
    if "transparency" in whole.info:
        whole = whole.convert("RGBA")
    whole.info = {"icc_profile": file.profile} if file.profile else {}
    yield whole


def read_file(path: str | Path, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of a picture's file. FileNotFoundError; ValueError as in `check_size`, or for a folder."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such picture: {path}")
    if path.is_file():
        check_size(path, path.stat().st_size, max_pixels)
    return read_bytes(path, _most_bytes(max_pixels))


def check_size(path: object, size: int, max_pixels: int) -> None:
    """ValueError if a picture's file has more bytes than so many pixels may need."""
    if size > _most_bytes(max_pixels):
        limit = f"more than 8 per pixel of max_pixels={max_pixels:,}"
        raise ValueError(f"{path} has {size:,} bytes, {limit}: make it smaller, or raise max_pixels")


def _most_bytes(max_pixels: int) -> int:
    return 8 * max_pixels + 2**20


def _unreadable(path: str | Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as a picture: {one_line(error)}")


def _opaque(path: str | Path, picture: Image.Image) -> Image.Image:
    if "A" in picture.getbands() and picture.getchannel("A").getextrema()[0] != 255:
        raise ValueError(f"{path} is transparent in places: give it a background first")
    return picture


def _in_mode(picture: Image.Image, mode: str) -> Image.Image:
    return picture if picture.mode == mode else picture.convert(mode)


def _as_array(picture: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 (H, W, C), copied in strips: Pillow's own conversion takes twice the memory of the picture."""
    width, height = picture.size
    pixels = np.empty((height, width, len(picture.getbands())), np.uint8)
    rows = max(1, 2**20 // width)
    for top in range(0, height, rows):
        whole = rows >= height
        strip = picture if whole else picture.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = np.asarray(strip).reshape(-1, *pixels.shape[1:])
    return pixels


def _as_tensor(picture: Image.Image) -> Tensor:
    return rearrange(torch.from_numpy(_as_array(picture)), "h w c -> 1 c h w").float() / 255


def _picture(pixels: Tensor) -> Image.Image:
    """A picture of one image (3 or 1, H, W) of uint8."""
    pixels = rearrange(pixels.cpu(), "c h w -> h w c")
    pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return Image.fromarray(np.ascontiguousarray(pixels.numpy()))


# Colours ----------------------------------------------------------------------------------------------------


def to_srgb(picture: Image.Image) -> Image.Image:
    """A picture converted to sRGB by its ICC profile (perceptual intent).

    Unchanged if the profile is missing, broken, for another kind of pictures, or sRGB itself.
    """
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    space, convert = _conversion(profile)
    mode, own = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space), picture.mode
    fits = own == mode or (mode == "RGB" and own != "CMYK") or (mode == "L" and own in ("1", "LA"))
    return convert(_in_mode(picture, mode)) if mode and convert and fits else picture


@lru_cache(maxsize=16)
def _conversion(profile: bytes) -> tuple[str, Callable[[Image.Image], Image.Image] | None]:
    """A profile's colour space, and its conversion to sRGB: None if it is sRGB or broken."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        mode = {"GRAY": "L"}.get(space, space)
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return "", None
    if space == "RGB":
        axes = np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3)
        probe = np.stack(axes, axis=-1).reshape(16, -1, 3)
        difference = np.asarray(transform.apply(Image.fromarray(probe))).astype(int) - probe
        if abs(difference).max() <= SRGB_ROUNDING:
            return space, None
    return space, transform.apply
