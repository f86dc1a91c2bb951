"""The interface of sources of pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from PIL import Image
from torch import Tensor

from samplers.pictures import MAX_PIXELS, Before, no_wait


@dataclass(frozen=True)
class Unreadable:
    """Takes the place of a picture that cannot be used. The reason is one line that names it."""

    reason: str


class Source(Protocol):
    """Pictures in a fixed order, numbered from 0.

    origin   where they come from, for results: a path, or how they are generated
    names    one per picture, all different: a path within the folder, a key of a shard, "seed 12"
    labels   the class of each, by name; None without classes
    prompts  the caption of each; None without captions
    stamp    a hash that changes when the pictures do: of sizes and times of files, or settings of a model
    """

    @property
    def origin(self) -> str: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def labels(self) -> Sequence[str] | None: ...
    @property
    def prompts(self) -> Sequence[str] | None: ...
    @property
    def stamp(self) -> str: ...

    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int]) -> Iterable[Tensor | Unreadable]:
        """These pictures, uint8 (3, H, W), grey ones with three equal channels; few in memory at once.

        A picture that cannot be used becomes Unreadable. ValueError or OSError if the whole source fails.
        """
        ...


class StoredPictures(Source, Protocol):
    """Pictures in files, which can be trained on too.

    ignored   numbers of files that look like pictures or archives but are not read: {".tif": 12}
    """

    @property
    def ignored(self) -> Mapping[str, int]: ...

    def content(self, index: int) -> bytes:
        """The bytes of a picture's file, or of its pixels in an array. ValueError or OSError as in `open`."""
        ...

    def open(self, index: int, mode: Literal["RGB", "L"], before: Before = no_wait) -> Image.Image:
        """A picture to train on: upright, in sRGB (`open_srgb`). ValueError or OSError in one line."""
        ...


@contextmanager
def reading(source: Source, indices: Sequence[int]) -> Iterator[Iterable[Tensor | Unreadable]]:
    """`source.read(indices)` for a with block; its threads end with the block."""
    pictures = source.read(indices)
    try:
        yield pictures
    finally:
        if isinstance(pictures, Generator):
            pictures.close()


def stamp_files(files: Iterable[Path], max_pixels: int = MAX_PIXELS) -> str:
    """SHA-256 of names, sizes and times of files, and of max_pixels if it is not the default."""
    digest = hashlib.sha256()
    for file in files:
        try:
            stat = file.stat()
            digest.update(os.fsencode(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n"))
        except OSError:  # a broken link, which reading reports
            digest.update(os.fsencode(f"{file.name} missing\n"))
    if max_pixels != MAX_PIXELS:
        digest.update(f"max_pixels {max_pixels}".encode())
    return digest.hexdigest()
