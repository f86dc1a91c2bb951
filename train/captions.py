"""A folder of images and a caption to each, as common tools write it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from samplers.pictures import open_picture, open_srgb
from train.data import IMAGE_SUFFIXES, covering, to_tensor

METADATA = "metadata.jsonl"


class CaptionedImages:
    """The images of a folder and its sub-folders, in the order of their names, with a caption each; hidden files are not looked at.

    A caption is the text in cat.txt beside cat.png, or in a line {"file_name": "cat.png", "text": "a cat"} of the folder's metadata.jsonl,
    whose names are relative to the folder; other entries of a line are not read.

    Raises FileNotFoundError where there is no such folder, else ValueError, in one line: no images, or one without a caption, with an empty
    one or with two that differ. (Empty captions are mostly those of a captioning tool that failed. To train without captions now and then,
    for guidance, is the objective's affair: `drop`.)
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder of captioned images: {folder}")
        found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        self.files = sorted(path for path in found if not any(name.startswith(".") for name in path.relative_to(folder).parts))
        if not self.files:
            raise ValueError(f"no images in {folder}: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
        listed = _listed(folder / METADATA) if (folder / METADATA).is_file() else {}
        there = set(self.files)
        if strange := [path for path in listed if path not in there]:
            raise ValueError(f"{folder / METADATA} names {strange[0].relative_to(folder)}, but there is no such image in {folder}")
        captions = {path: _caption(path, listed) for path in self.files}
        if lacking := [path for path, caption in captions.items() if caption is None]:
            raise ValueError(
                f"{len(lacking)} of {len(self.files)} images have no caption, the first is {lacking[0]}: "
                f"write it into {lacking[0].with_suffix('.txt').name} beside it, or into {METADATA}"
            )
        if empty := [path for path, caption in captions.items() if not caption]:
            raise ValueError(f"the caption of {empty[0]} is empty: write one (objective.drop trains without captions now and then)")
        self.captions = [caption or "" for caption in captions.values()]

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """SHA-256 of all images and captions in their order, wherever they lie. ValueError at the first image that `read` would refuse."""
        digest = hashlib.sha256()
        with ThreadPoolExecutor() as pool:  # decoding takes longer than a disk reads
            for image, caption in zip(pool.map(_sha256, self.files), self.captions, strict=True):
                digest.update(image + hashlib.sha256(caption.encode()).digest())
        return digest.hexdigest()

    def read(self, index: int, height: int, width: int) -> tuple[Tensor, dict[str, float]]:
        """An image, resized to cover that size and cropped to its centre, (3, height, width) in [-1, 1], and what SDXL is told of it.

        That is, in pixels, height and width of the original, top and left of the crop within the resized image, target_height and
        target_width of what remains (Podell et al. 2023, section 2.2). Photographs are turned as their EXIF data say, and are in sRGB.
        """
        original = open_srgb(self.files[index])
        image, top, left = covering(original, height, width)
        sizes = {"height": original.height, "width": original.width, "target_height": height, "target_width": width}
        return to_tensor(image), {**sizes, "top": top, "left": left}


def _sha256(image: Path) -> bytes:
    """Of a file that is an image to its end."""
    open_picture(image)
    return hashlib.sha256(image.read_bytes()).digest()


def _caption(image: Path, listed: Mapping[Path, str]) -> str | None:
    beside = image.with_suffix(".txt")
    if not beside.is_file():
        return listed.get(image)
    caption = _text(beside).strip()
    if listed.get(image, caption) != caption:
        raise ValueError(f"{image} has two captions, one in {beside.name} and another one in {METADATA}: keep one")
    return caption


def _listed(file: Path) -> dict[Path, str]:
    """Image and caption of every line."""
    found: dict[Path, str] = {}
    for number, line in enumerate(_text(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, caption = entry["file_name"], entry["text"].strip()
            path = file.parent / name
        except (ValueError, TypeError, KeyError, AttributeError):
            like = '{"file_name": "cat.png", "text": "a cat"}'
            raise ValueError(f"{file}, line {number} must be like {like}, not {line.strip()[:80]}") from None
        if path in found:
            raise ValueError(f"{file}, line {number} is the second one about {name}")
        found[path] = caption
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text: {error}") from None
