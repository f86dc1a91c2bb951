"""Folders of captioned images: what is read, what SDXL is told of it, and one line about every mistake."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.data.test_dataset import UNREADABLE
from train.data.pictures import CaptionedImages


def draw(path: Path, width: int = 8, height: int = 8, caption: str | None = "a picture") -> Path:
    """A horizontal ramp from black to white, and a caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, width).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp[None, :, None], (height, width, 3)).copy()).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def test_captions_beside_images_and_in_a_list(tmp_path: Path) -> None:
    """Both ways in one folder, sub-folders too, in the order of names; white space around is cut; hidden and other files do not count."""
    draw(tmp_path / "b.png", caption="\ufeff a café \n")
    draw(tmp_path / "a.JPEG", caption=None)
    draw(tmp_path / "deep" / "c.png", caption=None)
    draw(tmp_path / ".trash" / "d.png", caption=None)
    (tmp_path / "notes.md").write_text("not an image")
    lines = '{"file_name": "a.JPEG", "text": "first\u2028line", "score": 3}\n\n{"file_name": "./deep/c.png", "text": " third "}\n'
    (tmp_path / "metadata.jsonl").write_text(lines, encoding="utf-8")
    images = CaptionedImages(tmp_path)
    assert images.pictures.names == ["a.JPEG", "b.png", "deep/c.png"]
    assert images.captions == ["first\u2028line", "a café", "third"]
    assert len(images) == 3


@pytest.mark.parametrize(
    ("width", "height", "top", "left"), [(40, 20, 0, 8), (20, 40, 8, 0), (16, 16, 0, 0), (8, 4, 0, 8), (31, 20, 0, 4)], ids=str
)
def test_an_image_comes_with_the_numbers_that_sdxl_is_told(tmp_path: Path, width: int, height: int, top: int, left: int) -> None:
    """Size before, crop within the resized image, size afterwards; and the pixels of that crop."""
    image, numbers = CaptionedImages(draw(tmp_path / "a.png", width, height).parent).read(0, 16, 16)
    assert numbers == {"height": height, "width": width, "top": top, "left": left, "target_height": 16, "target_width": 16}
    assert image.shape == (3, 16, 16)
    scale = max(16 / width, 16 / height)
    resized = round(width * scale)
    seen = (torch.arange(16) + left + 0.5) / resized * width - 0.5  # where each pixel was
    inside = (seen > 1) & (seen < width - 2)
    expected = (seen / (width - 1) * 2 - 1)[inside]
    assert float((image[0, 8, inside] - expected).abs().max()) < 0.03


def test_height_comes_before_width(tmp_path: Path) -> None:
    """An image that is to be wider than high covers that size; the rest is cut off evenly above and below."""
    image, numbers = CaptionedImages(draw(tmp_path / "a.png", 32, 32).parent).read(0, 8, 16)
    assert image.shape == (3, 8, 16)
    assert (numbers["top"], numbers["left"], numbers["target_height"], numbers["target_width"]) == (4, 0, 8, 16)


def test_photographs_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    """Orientation 6: what the file holds lying on its side stands upright, and height and width are those that a viewer shows."""
    path = draw(tmp_path / "a.jpg", 16, 8)
    with Image.open(path) as opened:
        exif = opened.getexif()
        exif[0x0112] = 6  # turned by 90 degrees clockwise
        opened.save(path, exif=exif, quality=100)
    image, numbers = CaptionedImages(tmp_path).read(0, 16, 8)
    assert (numbers["height"], numbers["width"]) == (16, 8)
    assert float(image[:, 0].mean()) < -0.9  # dark was left and is on top
    assert float(image[:, -1].mean()) > 0.9


def test_the_fingerprint_is_of_content_and_order(tmp_path: Path) -> None:
    """The same for a copy elsewhere; another one for other pixels, another caption, another order."""

    def found(folder: str, captions: str = "ab", width: int = 8, names: str = "ab") -> str:
        for name, caption, size in zip(names, captions, (8, width), strict=True):
            draw(tmp_path / folder / f"{name}.png", size, caption=caption)
        return CaptionedImages(tmp_path / folder).fingerprint()

    first = found("first")
    assert found("copy") == first
    others = [found("caption", "ac"), found("pixels", width=9), found("order", names="ba", captions="ab", width=9), found("swapped", "ba")]
    assert len({first, *others}) == 5


MISTAKES: dict[str, tuple[dict[str, str | None], str]] = {
    "nothing": ({}, r"no pictures in {folder}: expected files ending in .*\.png"),
    "no caption": ({"b.png": "x", "a.png": None, "c.png": None}, r"2 of 3 pictures have no caption, the first is {folder}/a\.png: write"),
    "empty caption": ({"a.png": " \n"}, r"the caption of {folder}/a\.png is empty: write it .*\(objective\.drop"),
    "two captions": (
        {"a.png": "a cat", "metadata.jsonl": '{"file_name": "a.png", "text": "a dog"}'},
        r"{folder}/a\.png has two captions, one in a\.txt and another one in metadata\.jsonl: keep one",
    ),
    "strange name": (
        {"a.png": "a cat", "metadata.jsonl": '{"file_name": "b.png", "text": "a dog"}'},
        r"metadata\.jsonl has a prompt for b\.png, which is none of the 1 pictures; did you mean a\.png\?",
    ),
    "a line twice": (
        {"a.png": None, "metadata.jsonl": '{"file_name": "a.png", "text": "a"}\n{"file_name": "a.png", "text": "b"}'},
        r"metadata\.jsonl has 2 prompts, and more than one for a\.png: keep one",
    ),
    "no json": ({"a.png": None, "metadata.jsonl": "\na.png a cat"}, r"metadata\.jsonl, line 2 is no JSON: "),
    "no text": ({"a.png": None, "metadata.jsonl": '{"file_name": "a.png"}'}, r"metadata\.jsonl, line 1 must be like"),
    "a number": ({"a.png": None, "metadata.jsonl": '{"file_name": "a.png", "text": 3}'}, r"metadata\.jsonl, line 1 must be like"),
    "a list": ({"a.png": None, "metadata.jsonl": '["a.png", "a cat"]'}, r"metadata\.jsonl, line 1 must be like"),
}  # fmt: skip


@pytest.mark.parametrize(("files", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_named(tmp_path: Path, files: dict[str, str | None], message: str) -> None:
    """One line that names the file and what to do."""
    for name, content in files.items():
        if name.endswith(".png"):
            draw(tmp_path / name, caption=content)
        else:
            (tmp_path / name).write_text(content or "")
    with pytest.raises(ValueError, match=message.format(folder=tmp_path)) as refusal:
        CaptionedImages(tmp_path)
    assert "\n" not in str(refusal.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    """No folder, no text, no image, half an image, and what samplers refuse too."""
    with pytest.raises(FileNotFoundError, match=f"no such folder of pictures: {tmp_path / 'none'}"):
        CaptionedImages(tmp_path / "none")
    path = draw(tmp_path / "a.png")
    path.with_suffix(".txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a\.txt is no UTF-8 text: "):
        CaptionedImages(tmp_path)
    draw(path)
    whole = path.read_bytes()
    for content in (b"", b"<html>", whole[: len(whole) // 2], whole.replace(b"IDAT", b"IDAX")):
        path.write_bytes(content)
        refused(tmp_path, r"a\.png cannot be read as a picture: ")
    for make, message in UNREADABLE:
        make(path)
        refused(tmp_path, rf"a\.png {message}")


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        CaptionedImages(folder).fingerprint()
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=message):
        CaptionedImages(folder).read(0, 8, 8)
