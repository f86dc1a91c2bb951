"""Pictures of a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from samplers.pictures import MAX_PIXELS
from train.data.captions import has_captions, read_captions
from train.data.decoding import in_threads, pixels
from train.data.listing import list_pictures
from train.data.prompts import Captioned, Prompts, prompts_for
from train.data.source import Unreadable, stamp_of


class FolderPictures(Captioned):
    """The pictures of a folder and its sub-folders, by their paths within it, in the order of these: those that `train.data.listing` finds.

    Sub-folders, if there are any, are classes, as python -m samplers writes them. Pictures are turned as their EXIF data say.

    ignored     how many files look like pictures but are not read, by their suffix, {".tif": 12}
    prompts     one per picture, or a file of them (`read_prompts`); None: the captions beside the pictures or in metadata.jsonl, as
                `read_captions` reads them, if there are any. That happens when they are first asked for, and raises ValueError where
                a picture has none
    max_pixels  of one picture: those with more cannot be read
    """

    def __init__(self, folder: str | Path, prompts: Prompts | None = None, max_pixels: int = MAX_PIXELS) -> None:
        self._listing, self._max_pixels = list_pictures(folder), max_pixels
        self.origin = str(folder)
        self.ignored: Mapping[str, int] = self._listing.left_out
        self.names: Sequence[str] = self._listing.names
        self.labels: Sequence[str] | None = self._listing.labels
        self.prompts = None if prompts is None else prompts_for(prompts, self.names)

    def _captions(self) -> Sequence[str] | None:
        return read_captions(self._listing) if has_captions(self._listing) else None

    @cached_property
    def stamp(self) -> str:
        """A hash of the files, of their paths, which include their classes, and of max_pixels."""
        return hashlib.sha256("\n".join([*self.names, stamp_of(self._listing.files, self._max_pixels)]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int]) -> Iterator[Tensor | Unreadable]:
        """See `Source`."""
        return in_threads(lambda i, before: pixels(self._listing.files[i], max_pixels=self._max_pixels, before=before), indices)
