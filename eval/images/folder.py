"""Pictures of a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor

from eval.images.decoding import in_threads, pixels
from eval.images.prompts import Captioned, prompts_for
from eval.images.source import Unreadable, stamp_of
from samplers.pictures import open_picture
from train.captions import METADATA, CaptionedImages
from train.data import IMAGE_SUFFIXES


class FolderPictures(Captioned):
    """The pictures of a folder and its sub-folders, by their paths within it, in the order of these; hidden files are not looked at.

    Sub-folders, if there are any, are classes, as python -m samplers writes them. Pictures are turned as their EXIF data say.

    prompts  one per picture, or a file of them (`read_prompts`); None: the captions beside the pictures or in metadata.jsonl, as
             `CaptionedImages` reads them, if there are any. That happens when they are first asked for, and raises ValueError where
             a picture has none
    """

    def __init__(self, folder: str | Path, prompts: str | Path | Sequence[str] | None = None) -> None:
        self._folder = Path(folder)
        self._files = _files(self._folder)
        self.origin = str(folder)
        self.names: Sequence[str] = [file.relative_to(self._folder).as_posix() for file in self._files]
        self.labels: Sequence[str] | None = _classes(self._folder, self.names)
        self.prompts = None if prompts is None else prompts_for(prompts, self.names)

    def _captions(self) -> Sequence[str] | None:
        if not (self._folder / METADATA).is_file() and not any(file.with_suffix(".txt").is_file() for file in self._files):
            return None
        return CaptionedImages(self._folder).captions

    @cached_property
    def stamp(self) -> str:
        """Of the files, and of where each lies, which says its class."""
        return hashlib.sha256("\n".join([*self.names, stamp_of(self._files)]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: Sequence[int]) -> list[Tensor | Unreadable]:
        """See `Source`."""
        return in_threads(lambda index: pixels(open_picture(self._files[index])), indices)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        what = f"{folder} is a file, not a folder of pictures" if folder.exists() else f"no such folder of pictures: {folder}"
        raise FileNotFoundError(what)
    found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted(path for path in found if not any(name.startswith(".") for name in path.relative_to(folder).parts))
    if not files:
        raise ValueError(f"no pictures in {folder}: expected files ending in {', '.join(sorted(IMAGE_SUFFIXES))}")
    return files


def _classes(folder: Path, names: Sequence[str]) -> list[str] | None:
    """The first folder on the way to each; None where there are no folders."""
    loose, inside = [name for name in names if "/" not in name], [name.split("/")[0] for name in names if "/" in name]
    if loose and inside:
        raise ValueError(
            f"{folder} mixes class folders ({inside[0]}, ...) and loose pictures ({loose[0]}, ...): "
            f"keep one kind, or give a folder in it, such as {folder / inside[0]}"
        )
    return inside or None
