"""Pictures of a folder."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from eval.images.decoding import in_threads, pixels
from eval.images.prompts import Captioned, prompts_for
from eval.images.source import Unreadable, stamp_of
from train.captions import METADATA, CaptionedImages
from train.data import IMAGE_SUFFIXES

NOT_READ = {".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".pgm", ".ppm", ".tga", ".tif", ".tiff"}
"""What other files of pictures end in. These are counted, and left out."""


class FolderPictures(Captioned):
    """The pictures of a folder and its sub-folders, by their paths within it, in the order of these; hidden files are not looked at.

    Sub-folders, if there are any, are classes, as python -m samplers writes them; those that are links are entered. Pictures are turned as
    their EXIF data say.

    ignored  how many pictures there are of formats that are not read, by their suffix, {".tif": 12}
    prompts  one per picture, or a file of them (`read_prompts`); None: the captions beside the pictures or in metadata.jsonl, as
             `CaptionedImages` reads them, if there are any. That happens when they are first asked for, and raises ValueError where
             a picture has none
    """

    def __init__(self, folder: str | Path, prompts: str | Path | Sequence[str] | None = None) -> None:
        self._folder = Path(folder)
        self._files, self.ignored = _files(self._folder)
        self.origin = str(folder)
        self.names: Sequence[str] = [file.relative_to(self._folder).as_posix() for file in self._files]
        self.labels: Sequence[str] | None = _classes(self._folder, self.names)
        self.prompts = None if prompts is None else prompts_for(prompts, self.names)

    def _captions(self) -> Sequence[str] | None:
        if not (self._folder / METADATA).is_file() and not any(file.with_suffix(".txt").is_file() for file in self._files):
            return None
        real, places = self._folder.resolve(), sorted({file.parent for file in self._files})
        if linked := [place for place in places if place.resolve() != real / place.relative_to(self._folder)]:
            raise ValueError(f"captions are not looked for behind links such as {linked[0]}: give the prompts as a file")
        return CaptionedImages(self._folder).captions

    @cached_property
    def stamp(self) -> str:
        """Of the files, and of where each lies, which says its class."""
        return hashlib.sha256("\n".join([*self.names, stamp_of(self._files)]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: Sequence[int]) -> list[Tensor | Unreadable]:
        """See `Source`."""
        return in_threads(lambda index: pixels(self._files[index]), indices)


def _files(folder: Path) -> tuple[list[Path], Mapping[str, int]]:
    """The pictures that are read, and how many are not, by suffix."""
    if not folder.is_dir():
        what = f"{folder} is a file, not a folder of pictures" if folder.exists() else f"no such folder of pictures: {folder}"
        raise FileNotFoundError(what)
    found = list(_walk(folder))
    files = sorted(path for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
    ignored = dict(sorted(Counter(path.suffix.lower() for path in found if path.suffix.lower() in NOT_READ).items()))
    if not files:
        others = "".join(f", not {suffix}" for suffix in ignored)
        raise ValueError(f"no pictures in {folder}: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}{others}")
    return files, ignored


def _walk(folder: Path) -> Iterator[Path]:
    """All files that are not hidden, of linked folders too. ValueError where links lead to one folder twice."""
    entered: dict[str, str] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        if place != entered.setdefault(os.path.realpath(place), place):
            raise ValueError(f"{place} is the same folder as {entered[os.path.realpath(place)]}: keep one of them")
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _classes(folder: Path, names: Sequence[str]) -> list[str] | None:
    """The first folder on the way to each; None where there are no folders."""
    loose, inside = [name for name in names if "/" not in name], [name.split("/")[0] for name in names if "/" in name]
    if loose and inside:
        raise ValueError(
            f"{folder} mixes class folders ({inside[0]}, ...) and loose pictures ({loose[0]}, ...): "
            f"keep one kind, or give a folder in it, such as {folder / inside[0]}"
        )
    return inside or None
