"""Pictures in files, from a path."""

from __future__ import annotations

import difflib
from pathlib import Path

from samplers.pictures import MAX_PIXELS
from train.data.folder import FolderPictures
from train.data.names import check_path
from train.data.npz import NpzPictures
from train.data.source import StoredPictures
from train.data.tar import TarPictures


def open_pictures(
    path: str | Path, prompts: str | None = None, max_pixels: int = MAX_PIXELS, classes: bool = True
) -> StoredPictures:
    """The pictures of a folder, an .npz or .npy file, or tar shards ("a-{000000..000009}.tar", "*.tar").

    prompts     a file of one prompt per picture (`read_prompts`), instead of captions beside the pictures
    max_pixels  of one picture in a file of its own
    classes     whether sub-folders, or .cls members of shards, are classes
    """
    name, place = check_path(path).lower(), Path(path)
    if place.is_dir():
        return FolderPictures(place, prompts, max_pixels, classes)
    if name.endswith((".npz", ".npy")):
        return NpzPictures(place, prompts)
    if name.endswith((".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")):
        return TarPictures(path, prompts, max_pixels, classes)
    if place.exists():
        raise ValueError(f"{place} has no pictures: give a folder, an .npz or .npy file, or .tar files")
    raise FileNotFoundError(f"no such folder of pictures: {place}{_suggest(place)}")


def _suggest(path: Path) -> str:
    """A hint at a file or folder of a similar name."""
    names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
