"""What folders and tar shards share: each picture is a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Literal

from PIL import Image
from torch import Tensor

from samplers.pictures import Before, no_wait, open_srgb
from train.data.decoding import decode_picture, map_in_threads
from train.data.names import describe_suffixes
from train.data.source import Unreadable


class FilePictures(ABC):
    """Pictures in files of their own, turned as their EXIF data say. See `StoredPictures`.

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
        """The caption of each picture; None if there are none. Read when first used: most metrics need none.

        ValueError if only some pictures have a caption, or one has two, or an empty one (often a captioning
        tool that failed).
        """
        remedy = f"{self.remedy} (objective.drop trains without captions now and then)"
        return self._require_all("caption", self._captions(), remedy)

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
        name, content = str(self.file(index)), self.content(index)
        return open_srgb(name, mode, content, max_pixels=self.max_pixels, before=before)

    def read(self, indices: Sequence[int]) -> Iterator[Tensor | Unreadable]:
        """See `Source`, and `decode_picture`."""
        return map_in_threads(self._decode, indices)

    def _decode(self, index: int, before: Before) -> Tensor:
        return decode_picture(str(self.file(index)), self.content(index), self.max_pixels, before)

    def _require_all(self, what: str, texts: Sequence[str | None], remedy: str) -> list[str] | None:
        """The texts; None if all are missing. ValueError if only some are missing, or one is empty."""
        missing = [i for i, text in enumerate(texts) if text is None]
        if missing and len(missing) < len(texts):
            raise ValueError(
                f"{len(missing)} of {len(texts)} pictures have no {what}, the first is "
                f"{self.file(missing[0])}: {remedy}"
            )
        if "" in texts:
            raise ValueError(f"the {what} of {self.file(texts.index(''))} is empty: {remedy}")
        return None if missing else [text for text in texts if text is not None]

    def _describe_ignored(self) -> str:
        """For errors: which files there are instead of pictures."""
        return f", and found {describe_suffixes(self.ignored)}" if self.ignored else ""
