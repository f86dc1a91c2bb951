"""A folder of images with captions, as common tools write it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import Tensor

from diffusion.messages import one_line, warn
from models.files.text import parse_json, read_text
from samplers.pictures import MAX_PIXELS, open_picture, open_srgb
from train.data.listing import Listing, describe, find_names, list_pictures, same_text
from train.data.pictures import covering, to_tensor

METADATA = "metadata.jsonl"
MAX_CAPTION, MAX_LIST = 2**20, 2**28  # bytes of one caption's file, and of a list of captions


class CaptionedImages:
    """The pictures of a folder and its sub-folders (see `train.data.listing`), with a caption each (see `read_captions`).

    Raises FileNotFoundError where there is no such folder, else ValueError, in one line.
    """

    def __init__(self, folder: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        listing = list_pictures(folder)
        if listing.left_out:
            warn(f"files of {folder} that are not read: {describe(listing.left_out)}")
        self.files, self.captions, self.max_pixels = listing.files, read_captions(listing), max_pixels

    def __len__(self) -> int:
        return len(self.files)

    def fingerprint(self) -> str:
        """SHA-256 of all images and captions in their order, wherever they are. ValueError at the first image that `read` would refuse."""
        digest = hashlib.sha256()
        with ThreadPoolExecutor() as pool:  # decoding takes longer than a disk reads
            for image, caption in zip(pool.map(partial(_sha256, max_pixels=self.max_pixels), self.files), self.captions, strict=True):
                digest.update(image + hashlib.sha256(caption.encode()).digest())
        return digest.hexdigest()

    def read(self, index: int, height: int, width: int) -> tuple[Tensor, dict[str, float]]:
        """An image, resized to cover that size and cropped to its centre, (3, height, width) in [-1, 1], and sizes for SDXL's condition.

        These are, in pixels, height and width of the original, top and left of the crop within the resized image, target_height and
        target_width of what remains (Podell et al. 2023, section 2.2). Photographs are turned as their EXIF data say, and are in sRGB.
        """
        original = open_srgb(self.files[index], max_pixels=self.max_pixels)
        image, top, left = covering(original, height, width)
        sizes = {"height": original.height, "width": original.width, "target_height": height, "target_width": width}
        return to_tensor(image), {**sizes, "top": top, "left": left}


def has_captions(listing: Listing) -> bool:
    """Whether `read_captions` would find any."""
    return (listing.folder / METADATA).exists() or not _texts_by_stem(listing).keys().isdisjoint(map(_stem, listing.names))


def read_captions(listing: Listing) -> list[str]:
    """A caption for each picture: the text in cat.txt beside cat.png, or in a line {"file_name": "cat.png", "text": "a cat"} of the
    folder's metadata.jsonl, whose names are relative to the folder; other entries of a line are not read.

    ValueError, in one line: a picture without a caption, with an empty one or with two that differ. (Empty captions are mostly those of a
    captioning tool that failed. The objective's `drop` trains without captions now and then, for guidance.)
    """
    folder, texts = listing.folder, _texts_by_stem(listing)
    listed = _read_metadata(listing) if (folder / METADATA).exists() else {}
    captions = [_caption(folder, name, texts.get(_stem(name), []), listed.get(name)) for name in listing.names]
    if lacking := [name for name, caption in zip(listing.names, captions, strict=True) if caption is None]:
        raise ValueError(
            f"{len(lacking)} of {len(captions)} images have no caption, the first is {folder / lacking[0]}: "
            f"write it into {Path(lacking[0]).with_suffix('.txt').name} beside it, or into {METADATA}"
        )
    if empty := [name for name, caption in zip(listing.names, captions, strict=True) if not caption]:
        raise ValueError(f"the caption of {folder / empty[0]} is empty: write one (objective.drop trains without captions now and then)")
    return [caption or "" for caption in captions]


def _texts_by_stem(listing: Listing) -> dict[str, list[str]]:
    """The .txt files by the path without suffix, which they share with their pictures."""
    texts: dict[str, list[str]] = {}
    for name in listing.texts:
        texts.setdefault(_stem(name), []).append(name)
    return texts


def _stem(name: str) -> str:
    return same_text(os.path.splitext(name)[0])


def _caption(folder: Path, name: str, texts: Sequence[str], listed: str | None) -> str | None:
    found = [(Path(text).name, read_text(folder / text, MAX_CAPTION).strip()) for text in texts]
    found += [] if listed is None else [(METADATA, listed)]
    for place, caption in found:
        if caption != found[0][1]:
            raise ValueError(f"{folder / name} has two captions, one in {found[0][0]} and another one in {place}: keep one")
    return found[0][1] if found else None


def _read_metadata(listing: Listing) -> dict[str, str]:
    """The captions in metadata.jsonl, by picture."""
    file = listing.folder / METADATA
    entries = [_read_entry(file, number, line) for number, line in enumerate(read_text(file, MAX_LIST).split("\n"), 1) if line.strip()]
    found: dict[str, str] = {}
    for (number, name, caption), picture in zip(entries, find_names([name for _, name, _ in entries], listing.names), strict=True):
        if picture is None:
            raise ValueError(f"{file} names {one_line(name)}, but there is no such image in {listing.folder}")
        if picture in found:
            raise ValueError(f"{file}, line {number} is the second one about {picture}")
        found[picture] = caption
    return found


def _read_entry(file: Path, number: int, line: str) -> tuple[int, str, str]:
    try:
        entry = parse_json(line)
        name, caption = entry["file_name"], entry["text"]
        return number, name + "", caption.strip()
    except (ValueError, TypeError, KeyError, AttributeError):
        like = '{"file_name": "cat.png", "text": "a cat"}'
        raise ValueError(f"{file}, line {number} must be like {like}, not {line.strip()[:80]}") from None


def _sha256(image: Path, max_pixels: int) -> bytes:
    """The SHA-256 of a file, after checking that its image is complete."""
    open_picture(image, max_pixels=max_pixels)
    return hashlib.sha256(image.read_bytes()).digest()
