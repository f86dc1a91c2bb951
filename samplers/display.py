"""Images side by side with labels: a notebook cell displays what `show` returns."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from samplers.pictures import thumbnail, to_uint8

SMALL, LARGE = 96, 256  # pixels of a side: smaller images are magnified, larger ones reduced
GAP, LINE = 4, 16  # pixels between images, and of a line of text


def show(
    images: Tensor,
    columns: int | None = None,
    *,
    labels: Sequence[object] | None = None,
    rows: Sequence[object] | None = None,
    title: str | None = None,
    low: float = 0.0,
) -> Image.Image:
    """One picture of images (N, 1 or 3, H, W) with values in [low, 1], row by row, for a notebook.

    columns  default 8, or the number of images if that is smaller
    labels   one per image, above it; rows: one per row, to its left
    low      0 for images of `generate`, -1 for digits of `sample`
    """
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        raise ValueError(f"show takes images (N, 1 or 3, H, W), at least one, not {tuple(images.shape)}")
    columns = min(columns or 8, len(images))
    count = -(-len(images) // columns)
    for name, texts, needed in (("labels", labels, len(images)), ("rows", rows, count)):
        if texts is not None and len(texts) != needed:
            raise ValueError(f"{name} has {len(texts)} texts, but {needed} are needed")
    zoom = max(1, -(-SMALL // max(images.shape[2:])))
    shown = [thumbnail(image, LARGE) for image in images.detach().cpu().float()]
    shown = [image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2) for image in shown]
    height, width = shown[0].shape[1:]
    font = ImageFont.load_default(LINE * 0.75)
    left = GAP + (max(int(font.getlength(str(row))) for row in rows) + GAP if rows else 0)
    top, line = (LINE + GAP if title else GAP), (LINE if labels else 0)
    sheet = Image.new("RGB", (left + columns * (width + GAP), top + count * (height + line + GAP)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((left, GAP // 2), title or "", "black", font)
    for i, image in enumerate(shown):
        x, y = left + i % columns * (width + GAP), top + i // columns * (height + line + GAP)
        pixels = to_uint8(image[None], low)[0].expand(3, -1, -1).permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels), (x, y + line))
        if labels:
            draw.text((x, y), _fitting(str(labels[i]), width, font), "black", font)
        if rows and i % columns == 0:
            draw.text((GAP, y + line + height // 2 - LINE // 2), str(rows[i // columns]), "black", font)
    return sheet


def _fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, cut to a width in pixels."""
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2] + "…"
    return text
