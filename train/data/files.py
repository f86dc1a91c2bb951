"""What folders and tar shards have in common: each picture is a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal

from PIL import Image
from torch import Tensor

from samplers.pictures import Before, no_wait, open_srgb
from train.data.decoding import map_in_threads, pixels
from train.data.names import describe
from train.data.source import Unreadable


class FilePictures(ABC):
    """Pictures of which each is a file, turned as its EXIF data say: see `StoredPictures`.

    max_pixels  of one picture; larger ones cannot be read
    remedy      for errors: where to write a missing caption
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
        """The caption of each picture; None if there are no captions. They are read when first used: most
        metrics need none.

        ValueError if only some pictures have a caption, or one has an empty one (often a captioning tool that
        failed), or two that differ.
        """
        return self._all(
            "caption",
            self._captions(),
            f"{self.remedy} (objective.drop trains without captions now and then)",
        )

    @abstractmethod
    def file(self, index: int) -> object:
        """The file of a picture; as text, it names the picture in errors."""

    @abstractmethod
    def content(self, index: int) -> bytes:
        """See `StoredPictures`."""

    @abstractmethod
    def _captions(self) -> Sequence[str | None]:
        """The caption of each picture, None for those without one."""

    def open(self, index: int, mode: Literal["RGB", "L"] = "RGB", before: Before = no_wait) -> Image.Image:
        """See `StoredPictures`; errors as in `open_srgb`."""
        return open_srgb(
            str(self.file(index)), mode, self.content(index), max_pixels=self.max_pixels, before=before
        )

    def read(self, indices: Sequence[int]) -> Iterator[Tensor | Unreadable]:
        """See `Source`, and `pixels`."""
        return map_in_threads(self._pixels, indices)

    def _pixels(self, index: int, before: Before) -> Tensor:
        return pixels(str(self.file(index)), self.content(index), self.max_pixels, before)

    def _all(self, what: str, found: Sequence[str | None], remedy: str) -> list[str] | None:
        """The texts, if all pictures have one; None if none has. ValueError if only some have one, or one is
        empty."""
        lacking = [i for i, text in enumerate(found) if text is None]
        if lacking and len(lacking) < len(found):
            raise ValueError(
                f"{len(lacking)} of {len(found)} pictures have no {what}, the first is "
                f"{self.file(lacking[0])}: {remedy}"
            )
        if "" in found:
            raise ValueError(f"the {what} of {self.file(found.index(''))} is empty: {remedy}")
        return None if lacking else [text for text in found if text is not None]

    def _found(self) -> str:
        """What there is instead of pictures, for an error."""
        return f", and found {describe(self.ignored)}" if self.ignored else ""
