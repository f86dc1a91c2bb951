"""Pictures to train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.messages import warn
from samplers.pictures import MAX_PIXELS, open_srgb
from train.data.dataset import Batch, Dataset, digits
from train.data.listing import PACKED, describe, list_pictures


class ImageFolder:
    """Pictures of a folder (which ones: see `train.data.listing`), decoded when asked for, turned as their EXIF data say, and in sRGB.

    Subfolders, if there are any, are classes: numbers in their order, then names in theirs. Pictures are refused as `open_srgb` does.

    size        the shorter side is resized to it (bicubic, antialiased), then the centre is cropped; None keeps sizes,
                which must then be equal
    channels    3 for colour, 1 for grey
    max_pixels  of one picture
    classes     their names, by number
    kept        what a run must find again when it is resumed: the classes, and the pictures' names in their order (`Listing.packed`)
    """

    def __init__(self, folder: str | Path, size: int | None = None, channels: Literal[1, 3] = 3, max_pixels: int = MAX_PIXELS) -> None:
        listing = list_pictures(folder)
        self.files, self.size, self.channels, self.max_pixels = listing.files, size, channels, max_pixels
        self.classes = listing.classes
        if listing.left_out:
            warn(f"files of {folder} that are not read: {describe(listing.left_out)}")
        number = {name: i for i, name in enumerate(self.classes)}
        self.labels = torch.tensor([number[label] for label in listing.labels]) if listing.labels else None
        self.num_classes = len(self.classes) or None
        self.kept = {"classes": self.classes, PACKED: listing.packed}
        self.shape = (channels, size, size) if size is not None else self._first_shape()

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        images = [self._read(self.files[i]) for i in indices]
        for i, image in zip(indices, images, strict=True):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"{self.files[i]} has shape {tuple(image.shape)}, others {tuple(images[0].shape)}: give a size to resize to"
                )
        batch = {"x0": torch.stack(images)}
        return batch if self.labels is None else {**batch, "label": self.labels[torch.as_tensor(indices)]}

    def _first_shape(self) -> tuple[int, int, int]:
        """The shape of the first picture that can be read; training decides about the others. If none can, the first error is raised."""
        errors: list[ValueError | OSError] = []
        for file in self.files:
            try:
                channels, height, width = self._read(file).shape
            except (ValueError, OSError) as error:
                errors = errors or [error]
            else:
                return channels, height, width
        raise errors[0]

    def _read(self, file: Path) -> Tensor:
        image = open_srgb(file, "RGB" if self.channels == 3 else "L", max_pixels=self.max_pixels)
        return to_tensor(image if self.size is None else covering(image, self.size, self.size)[0])


def covering(image: Image.Image, height: int, width: int) -> tuple[Image.Image, int, int]:
    """The picture resized (bicubic, antialiased) to just cover that size, and its centre cut out; and the crop's top and left."""
    scale = max(width / image.width, height / image.height)
    resized = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height)), top, left


def to_tensor(image: Image.Image) -> Tensor:
    """Pixels (C, H, W) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


DATASETS: dict[str, Callable[..., Dataset]] = {"digits": digits, "folder": ImageFolder}
