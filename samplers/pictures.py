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

MAX_PIXELS = (
    2**27
)  # of one picture: a camera's 102 million are read, and what only claims to be huge is refused
MAX_SIDE = 2**20  # pixels; Pillow takes memory for each row, however short it is
MAX_SETTINGS, MAX_DEPTH = (
    2**20,
    16,
)  # characters of what a picture says of itself, and how deep it may be nested
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SRGB_ROUNDING = 2  # of 255: what the many versions of the sRGB profile differ by
SETTINGS = "settings"  # the name of the text in a PNG that holds what it was drawn with, as JSON


Before = Callable[[int], None]  # is called with the number of pixels of a picture before it is decoded


def no_wait(pixels: int) -> None:
    """The usual `before`: there is memory enough."""


def to_uint8(images: Tensor, low: float = -1.0) -> Tensor:
    """(B, C, H, W) in [low, 1] to whole values 0 ... 255, rounded to the nearest; what lies outside is cut
    off, NaN is an error."""
    if images.isnan().any():
        raise ValueError("images hold values that are no numbers (NaN): no picture shows them")
    return ((images.clamp(low, 1) - low) * (255 / (1 - low))).round().byte()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures of images (B, 3 or 1, H, W) in [0, 1], as `generate` makes them, or of one (3 or 1, H, W)."""
    if images.ndim not in (3, 4) or images.shape[-3] not in (1, 3) or not images.is_floating_point():
        raise ValueError(
            f"pictures need images (B, 3, H, W) in [0, 1], not {images.dtype} {tuple(images.shape)}"
        )
    return [_picture(pixels) for pixels in to_uint8(images if images.ndim == 4 else images[None], low=0.0)]


def read_image(
    path: str | Path, size: tuple[int, int] | None = None, *, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """A picture as (1, 3, H, W) in [0, 1], upright; with a size, (height, width), made to cover it
    (`scale_and_crop`).

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
    """A picture wholly read and upright, in colour or grey; of an animation the first frame. May be called by
    several threads at once.

    PNG, JPEG, WebP and BMP are read, whatever their names end in. Values are those of the file: `open_srgb`
    heeds colour profiles too. Colours of 16 bits keep the upper 8, CMYK becomes RGB by complement. Of the
    metadata only orientation and profile are looked at, and what is odd about it is passed over.

    content     of the file, where that is no file of its own but within another, and `path` only its name
    max_pixels  the most that a picture may have

    FileNotFoundError where there is none, else ValueError, in one line: no picture, a damaged one, one that
    is transparent in places, has grey values of more than 8 bits, or too many pixels.
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
    """What `open_picture` does, with the colours that the picture's profile means, in sRGB (`to_srgb`): what
    networks are trained on.

    before  as in `read_pixels`
    """
    with _decoded(path, content, max_pixels, before) as picture:
        return _in_mode(to_srgb(_opaque(path, picture)), mode)


def read_pixels(
    path: str | Path, content: bytes | None = None, *, max_pixels: int = MAX_PIXELS, before: Before = no_wait
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What `open_picture` opens in colour, as uint8 (H, W, 3).

    before  called with the number of its pixels before a picture is decoded: it may wait until there is
            memory for them
    """
    with _decoded(path, content, max_pixels, before) as picture:
        return _as_array(_in_mode(_opaque(path, picture), "RGB"))


def read_mask(
    path: str | Path, size: tuple[int, int] | None = None, *, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """A mask as (1, 1, H, W) in [0, 1]: 1, where to paint, where the picture is white and opaque, 0 where it
    is black or transparent.

    `size` as in `read_image`, errors as in `open_picture`; ValueError too for a hole in black, which some
    programs paint: all of it would be 0. A mask that is black and opaque everywhere is read, and paints
    nothing.
    """
    with _decoded(path, None, max_pixels) as picture:
        mask = _as_tensor(_in_mode(picture, "L"))
        if "A" in picture.getbands():
            alpha = _as_tensor(picture.getchannel("A"))
            mask = mask * alpha
            if alpha.min() < 1 and not mask.any():
                raise ValueError(
                    f"{path} is black or transparent everywhere: a mask is white and opaque where to paint"
                )
        return scale_and_crop(mask, size)


def scale_and_crop(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """(B, C, H, W) in [0, 1], scaled until it just covers the size (height, width), and what stands over cut
    off evenly; None: as it is."""
    if size is None or images.shape[2:] == size:
        return images
    height, width, top, left = cover_box(images.shape[2], images.shape[3], size)
    scaled = F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)
    return scaled[:, :, top : top + size[0], left : left + size[1]]


def cover_box(height: int, width: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Height and width to scale a picture to, so that it just covers the size (height, width); top and left
    of its centre in that."""
    scale = max(size[0] / height, size[1] / width)
    height, width = max(size[0], round(scale * height)), max(size[1], round(scale * width))
    return height, width, (height - size[0]) // 2, (width - size[1]) // 2


def tile(images: Tensor, columns: int, gap: int = 1, fill: float = 1.0) -> Tensor:
    """(N, C, H, W) to one picture (C, rows*(H + gap) - gap, columns*(W + gap) - gap), row by row.

    `fill`, white by default, is the value between the images and where they run out.
    """
    if images.ndim != 4 or len(images) == 0 or columns < 1:
        raise ValueError(
            f"tiles need images (N, C, H, W) and at least one column, not {tuple(images.shape)} in {columns}"
        )
    columns = min(columns, len(images))
    missing = -len(images) % columns
    n, channels, height, width = images.shape
    padded = images.new_full((n + missing, channels, height + gap, width + gap), fill)
    padded[:n, :, :height, :width] = images
    sheet = rearrange(padded, "(r k) c h w -> c (r h) (k w)", k=columns)
    return sheet[:, : sheet.shape[1] - gap, : sheet.shape[2] - gap]


def thumbnail(image: Tensor, side: int = 256) -> Tensor:
    """One picture (C, H, W) made smaller by a whole factor, so that no side is longer than that; smaller ones
    as they are."""
    factor = -(-max(image.shape[1:]) // side)
    return (
        F.avg_pool2d(image[None], factor, ceil_mode=True, count_include_pad=False)[0] if factor > 1 else image
    )


def save_png(
    image: Tensor, path: Path, settings: Mapping[str, Any] | None = None, zoom: int = 1, low: float = -1.0
) -> None:
    """Write one picture (C, H, W) in [low, 1], grey or colour, atomically; `settings` go into its metadata as
    JSON."""
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
        raise ValueError(
            f"{path} does not say what it was drawn with: it is none of our pictures, or was written again "
            "by another program"
        )
    return settings


def _depth(value: Any, limit: int = MAX_DEPTH) -> int:
    """How deep lists and objects are nested, as far as the limit."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((_depth(each, limit - 1) for each in inner), default=0) if limit >= 0 else 1


def pixel_difference(a: str | Path, b: str | Path) -> int:
    """The largest difference between two pictures in any channel, 0 ... 255; 255 for pictures of different
    size or kind."""
    with _decoded(a) as one, _decoded(b) as other:
        if (one.size, one.mode) != (other.size, other.mode):
            return 255
        return int(np.abs(_as_array(one).astype(np.int16) - _as_array(other)).max())


# Reading ----------------------------------------------------------------------------------------------------


@contextmanager
def _decoded(
    path: str | Path, content: bytes | None = None, max_pixels: int = MAX_PIXELS, before: Before = no_wait
) -> Iterator[Image.Image]:
    """A picture, wholly read and upright, with an alpha channel where any of it may be transparent."""
    content = read_file(path, max_pixels) if content is None else content
    try:
        file = take_apart(content)
        picture = None if file.kind == "WEBP" else file.open()
        width, height = webp_size(content) if picture is None else picture.size
    except Exception as error:  # whatever Pillow meets in a damaged file, of which it raises many kinds
        raise _unreadable(path, error) from None
    if width * height > max_pixels:
        size = f"{width}x{height} = {width * height:,} pixels"
        raise ValueError(
            f"{path} has {size}, more than max_pixels={max_pixels:,}: make it smaller, or raise max_pixels"
        )
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"{path} has {width}x{height} pixels, and a side may have at most {MAX_SIDE:,}")
    before(width * height)
    try:
        whole: Image.Image = file.open() if picture is None else picture
        whole.load()
    except Exception as error:
        raise _unreadable(path, error) from None
    if whole.mode.startswith(("I", "F")):
        raise ValueError(f"{path} has pixels of more than 8 bits: save it with 8 bits per channel")
    if file.orientation > 1:
        whole = whole.transpose(TURNS[file.orientation])
    if "transparency" in whole.info:
        whole = whole.convert("RGBA")
    whole.info = {"icc_profile": file.profile} if file.profile else {}
    yield whole


def read_file(path: str | Path, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of a picture's file. FileNotFoundError; ValueError as from `check_size`, and for a folder or
    a pipe."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no such picture: {path}")
    if path.is_file():
        check_size(path, path.stat().st_size, max_pixels)
    return read_bytes(path, _most_bytes(max_pixels))


def check_size(path: object, size: int, max_pixels: int) -> None:
    """ValueError if a picture's file has more bytes than so many pixels may need."""
    if size > _most_bytes(max_pixels):
        raise ValueError(
            f"{path} has {size:,} bytes, more than 8 per pixel of max_pixels={max_pixels:,}: make it "
            "smaller, or raise max_pixels"
        )


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
    """uint8 (H, W, C), copied in strips: Pillow's conversion of a whole picture takes its size twice more."""
    pixels = np.empty((picture.height, picture.width, len(picture.getbands())), np.uint8)
    rows = max(1, 2**20 // picture.width)
    for top in range(0, picture.height, rows):
        strip = (
            picture
            if rows >= picture.height
            else picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        )
        pixels[top : top + rows] = np.asarray(strip).reshape(-1, *pixels.shape[1:])
    return pixels


def _as_tensor(picture: Image.Image) -> Tensor:
    return rearrange(torch.from_numpy(_as_array(picture)), "h w c -> 1 c h w").float() / 255


def _picture(pixels: Tensor) -> Image.Image:
    """Of one image (3 or 1, H, W) of whole values."""
    pixels = rearrange(pixels.cpu(), "c h w -> h w c")
    return Image.fromarray(
        np.ascontiguousarray((pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).numpy())
    )


# Colours ----------------------------------------------------------------------------------------------------


def to_srgb(picture: Image.Image) -> Image.Image:
    """A picture in sRGB, of the colours that its ICC profile means (perceptual intent); itself where there is
    none, or one that is broken, is not for pictures of its kind, or is sRGB's own.
    """
    profile = picture.info.get("icc_profile")
    if not profile:
        return picture
    space, convert = _conversion(profile)
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space)
    fits = (
        picture.mode == mode
        or (mode == "RGB" and picture.mode != "CMYK")
        or (mode == "L" and picture.mode in ("1", "LA"))
    )
    return convert(_in_mode(picture, mode)) if mode and convert and fits else picture


@lru_cache(maxsize=16)
def _conversion(profile: bytes) -> tuple[str, Callable[[Image.Image], Image.Image] | None]:
    """The colour space of a profile, and what converts pictures of it to sRGB; None for sRGB itself, and for
    a profile that is broken."""
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space.strip()
        mode = {"GRAY": "L"}.get(space, space)
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return "", None
    if space == "RGB":
        probe = np.stack(np.meshgrid(*[np.arange(0, 256, 17, dtype=np.uint8)] * 3), axis=-1).reshape(
            16, -1, 3
        )
        moved = np.asarray(transform.apply(Image.fromarray(probe))).astype(int) - probe
        if abs(moved).max() <= SRGB_ROUNDING:
            return space, None
    return space, transform.apply
