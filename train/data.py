"""Data sets: indexed by a list, they give a batch, a dictionary of tensors with one row per sample.

x0       float32 (B, C, H, W): images in [-1, 1], or latents in the diffusion model's units
x0_std   where the data is a distribution, an autoencoder's: its standard deviation, and x0 is its mean
label, context, vector   the conditions that the network is told
null.*   what a sample that is to go without a condition is told in its place, where that is not the model's to say
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion.messages import warn
from diffusion.noise import mix
from samplers.pictures import MAX_PIXELS, open_srgb
from train.listing import PACKED, describe, list_pictures

Batch = dict[str, Tensor]


class Dataset(Protocol):
    """What training asks of data. `num_classes` is None where there are no labels; shape is (C, H, W).

    One that has `labels`, a tensor (N,), lets on_error=skip put samples of the same class in the place of others.
    """

    num_classes: int | None
    shape: tuple[int, int, int]

    def __len__(self) -> int: ...
    def __getitems__(self, indices: Sequence[int]) -> Batch: ...


class TensorData:
    """Images (N, C, H, W) and labels (N,) held in memory."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, num_classes: int | None = None) -> None:
        if len(images) == 0:
            raise ValueError("a data set needs at least one image")
        if labels is not None and num_classes is None:
            num_classes = int(labels.max()) + 1
        if labels is not None and ((labels < 0) | (labels >= (num_classes or 0))).any():
            raise ValueError(f"labels must lie in 0 ... {(num_classes or 0) - 1}; found {int(labels.min())} to {int(labels.max())}")
        self.images, self.labels, self.num_classes = images, labels, num_classes
        self.shape = (images.shape[1], images.shape[2], images.shape[3])

    def __len__(self) -> int:
        return len(self.images)

    def of_classes(self, labels: Tensor, seed: int) -> Tensor:
        """Indices (N,) of different images, chosen at random, whose classes are `labels` (N,). ValueError where there are too few."""
        if self.labels is None:
            raise ValueError("choosing images by class needs labels")
        generator, chosen = torch.Generator().manual_seed(mix(seed)), torch.empty(len(labels), dtype=torch.long)
        for k in labels.unique().tolist():
            members, places = (self.labels == k).nonzero()[:, 0], (labels == k).nonzero()[:, 0]
            if len(members) < len(places):
                raise ValueError(f"{len(places)} images of class {k} are asked for, but there are {len(members)}: ask for fewer")
            chosen[places] = members[torch.randperm(len(members), generator=generator)[: len(places)]]
        return chosen

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices)
        batch = {"x0": self.images[index]}
        return batch if self.labels is None else {**batch, "label": self.labels[index]}


def digits(split: Literal["train", "held_out", "all"] = "train", held_out: float = 0.3, seed: int = 0) -> TensorData:
    """Handwritten digits, 1,797 images of 8x8 with labels (UCI, shipped with scikit-learn), in 17 grey levels.

    split  "held_out" is a random share of each class that training never sees; the same for the same seed
    """
    from sklearn.datasets import load_digits  # not at the top: half a second that other data sets need not pay

    raw = load_digits()
    labels = torch.from_numpy(raw.target).long()
    images = torch.from_numpy(raw.images).float()[:, None] / 8 - 1  # 0 ... 16 -> [-1, 1]
    if split == "all":
        return TensorData(images, labels, 10)
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is a share of each class, in [0, 1), not {held_out:g}")
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train', 'held_out' or 'all', not {split!r}")
    generator = torch.Generator().manual_seed(seed)
    away = torch.zeros(len(labels), dtype=torch.bool)
    for k in range(10):
        members = (labels == k).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        away[members[: round(held_out * len(members))]] = True
    chosen = away if split == "held_out" else ~away
    return TensorData(images[chosen], labels[chosen], 10)


class ImageFolder:
    """Pictures of a folder (which ones: see `train.listing`), decoded when asked for, turned as their EXIF data say, and in sRGB.

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


def shuffled_batches(n: int, batch_size: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Endless batches of indices below n, from batch number `start` on: each epoch is a permutation keyed by (seed, epoch).

    A batch may span two epochs. Nothing but its number says what it holds, so that training resumes anywhere.
    """
    epoch, order = -1, torch.empty(0, dtype=torch.long)
    position = start * batch_size
    while True:
        batch: list[int] = []
        while len(batch) < batch_size:
            if position // n != epoch:
                epoch = position // n
                order = torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, epoch)))
            taken = order[position % n : position % n + batch_size - len(batch)].tolist()
            batch += taken
            position += len(taken)
        yield batch
