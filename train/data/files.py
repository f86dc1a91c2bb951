"""What pictures of folders and of tar shards have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal

from PIL import Image
from torch import Tensor

from samplers.pictures import Before, no_wait, open_srgb
from train.data.decoding import in_threads, pixels
from train.data.names import describe
from train.data.source import Unreadable


class FilePictures(ABC):
    """Pictures in files of their own, turned as their EXIF data say: see `StoredPictures`.

    max_pixels  of one picture: those with more cannot be read
    remedy      where a caption is to be written
    """

    origin: str
    names: Sequence[str]
    labels: Sequence[str] | None
    ignored: Mapping[str, int]
    max_pixels: int
    remedy: str

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def prompts(self) -> Sequence[str] | None:
        """The caption of each picture; None without captions. They are read at their first use, since most metrics need none.

        ValueError for a picture without a caption where others have one, with an empty one, or with two that differ. (Empty captions are
        mostly those of a captioning tool that failed.)
        """
        return self._all("caption", self._captions(), f"{self.remedy} (objective.drop trains without captions now and then)")

    @property
    @abstractmethod
    def files(self) -> Sequence[object]:
        """The place of each picture, whose text names it in errors."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """See `StoredPictures`."""

    @abstractmethod
    def _captions(self) -> Sequence[str | None]:
        """What is written of each picture."""

    def open(self, index: int, mode: Literal["RGB", "L"] = "RGB", before: Before = no_wait) -> Image.Image:
        """See `StoredPictures`. Pictures are refused as `open_srgb` does."""
        return open_srgb(str(self.files[index]), mode, self.content(index), max_pixels=self.max_pixels, before=before)

    def read(self, indices: Sequence[int]) -> Iterator[Tensor | Unreadable]:
        """See `Source`, and `pixels`."""
        return in_threads(self._pixels, indices)

    def _pixels(self, index: int, before: Before) -> Tensor:
        return pixels(str(self.files[index]), self.content(index), self.max_pixels, before)

    def _all(self, what: str, found: Sequence[str | None], remedy: str) -> list[str] | None:
        """The texts of all pictures, None if none has one. ValueError if only some have one, or one is empty."""
        lacking = [i for i, text in enumerate(found) if text is None]
        if lacking and len(lacking) < len(found):
            raise ValueError(f"{len(lacking)} of {len(found)} pictures have no {what}, the first is {self.files[lacking[0]]}: {remedy}")
        if "" in found:
            raise ValueError(f"the {what} of {self.files[found.index('')]} is empty: {remedy}")
        return None if lacking else [text for text in found if text is not None]

    def _found(self) -> str:
        """For errors where there are no pictures."""
        return f", and found {describe(self.ignored)}" if self.ignored else ""
