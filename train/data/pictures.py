"""Pictures to train on: with classes, or with captions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.messages import warn
from samplers.pictures import MAX_PIXELS, Before, cover_box
from train.data.change import PACKED, pack
from train.data.dataset import Batch, Dataset, digits
from train.data.decoding import map_in_threads
from train.data.names import class_order, describe_suffixes
from train.data.open import open_pictures
from train.data.source import StoredPictures, Unreadable


class PictureData:
    """Pictures of a folder, tar shards or a NumPy file (`open_pictures`), decoded when used, in sRGB.

    size            height and width after resizing (bicubic, antialiased) and a centre crop; None if all
                    pictures have the same size
    channels        3 for colour, 1 for grey
    max_pixels      of one picture
    classes         the names of the classes, by number, in the order of `class_order`
    fixed_settings  what a resumed run must find again: the classes, and the pictures' names (`pack`)
    """

    def __init__(
        self,
        folder: str | Path,
        size: int | None = None,
        channels: Literal[1, 3] = 3,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.pictures = stored = _open(folder, max_pixels, classes=True)
        self.size, self.channels = size, channels
        self.classes = sorted(set(stored.labels or ()), key=class_order)
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([number[label] for label in stored.labels]) if stored.labels else None
        self.num_classes = len(self.classes) or None
        packed = pack(stored.names, stored.labels, stored.content)
        self.fixed_settings = {"classes": self.classes, PACKED: packed}
        self.shape = (channels, size, size) if size is not None else self._first_shape()

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images = [self._read(i) for i in indices]
        for i, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"{self.pictures.origin}/{self.pictures.names[i]} has shape {tuple(image.shape)}, "
                    f"others {tuple(images[0].shape)}: give a size to resize to"
                )
        batch = {"x0": torch.stack(images)}
        return batch if self.labels is None else {**batch, "label": self.labels[torch.as_tensor(indices)]}

    def _first_shape(self) -> tuple[int, int, int]:
        """The shape of the first picture that can be read. If there is none, the first error is raised."""
        errors: list[ValueError | OSError] = []
        for index in range(len(self)):
            try:
                channels, height, width = self._read(index).shape
            except (ValueError, OSError) as error:
                errors = errors or [error]
            else:
                return channels, height, width
        raise errors[0]

    def _read(self, index: int) -> Tensor:
        image = self.pictures.open(index, "RGB" if self.channels == 3 else "L")
        return to_tensor(image if self.size is None else resize_and_crop(image, self.size, self.size)[0])


class CaptionedImages:
    """Pictures with captions, of a folder and its sub-folders or of tar shards (`open_pictures`)."""

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS) -> None:
        self.pictures = _open(path, max_pixels, classes=False)
        n, prompts = len(self.pictures), self.pictures.prompts
        if prompts is None:
            first = f"{path}/{self.pictures.names[0]}"
            raise ValueError(
                f"{n} of {n} pictures have no caption, the first is {first}: write it into a .txt file of "
                "its name beside it"
            )
        self.captions = prompts

    def __len__(self) -> int:
        return len(self.captions)

    def fingerprint(self) -> str:
        """SHA-256 of all images and captions in order. ValueError for an image that cannot be read."""
        digest = hashlib.sha256()
        for image, caption in zip(map_in_threads(self._sha256, range(len(self))), self.captions, strict=True):
            if isinstance(image, Unreadable):
                raise ValueError(image.reason)
            digest.update(image + hashlib.sha256(caption.encode()).digest())
        return digest.hexdigest()

    def _sha256(self, index: int, before: Before) -> bytes:
        """The SHA-256 of a file, after a check that its image is complete."""
        self.pictures.open(index, "RGB", before)
        return hashlib.sha256(self.pictures.content(index)).digest()

    def read(self, index: int, height: int, width: int) -> tuple[Tensor, dict[str, float]]:
        """An image, resized and cropped to (3, height, width) in [-1, 1], and sizes for SDXL's condition.

        These are, in pixels, height and width of the original, top and left of the crop within the resized
        image, target_height and target_width of the result (Podell et al. 2023, section 2.2). Photographs are
        turned as their EXIF data say, and are in sRGB.
        """
        original = self.pictures.open(index, "RGB")
        image, top, left = resize_and_crop(original, height, width)
        sizes = {"height": original.height, "width": original.width, "top": top, "left": left}
        return to_tensor(image), {**sizes, "target_height": height, "target_width": width}


def _open(path: str | Path, max_pixels: int, classes: bool) -> StoredPictures:
    """The pictures of a path, with a warning of files that are not read."""
    pictures = open_pictures(path, max_pixels=max_pixels, classes=classes)
    if pictures.ignored:
        warn(f"files of {path} that are not read: {describe_suffixes(pictures.ignored)}")
    return pictures


def resize_and_crop(image: Image.Image, height: int, width: int) -> tuple[Image.Image, int, int]:
    """The picture resized (bicubic, antialiased) to cover a size and cropped to its centre; top and left."""
    scaled_height, scaled_width, top, left = cover_box(image.height, image.width, (height, width))
    image = image.resize((scaled_width, scaled_height), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + width, top + height)), top, left


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels (C, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


DATASETS: dict[str, Callable[..., Dataset]] = {"digits": digits, "folder": PictureData}
