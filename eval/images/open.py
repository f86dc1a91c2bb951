"""Any source of pictures, from a description in plain values."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.spec import make
from eval.images.drawn import drawn
from eval.images.folder import FolderPictures
from eval.images.npz import NpzPictures
from eval.images.source import Source
from eval.images.tar import TarPictures
from eval.images.tensors import TensorPictures
from samplers.pictures import MAX_PIXELS
from train.data import digits
from train.listing import check_path


def open_source(spec: str | Path | Mapping[str, Any], prompts: str | None = None, max_pixels: int = MAX_PIXELS) -> Source:
    """A source of pictures: a folder, an .npz or .npy file, tar shards ("a-{000000..000009}.tar", "*.tar"), what draws them (`drawn`), or
    a data set, {"name": "digits", "split": "held_out"}.

    prompts     a file of one prompt per picture (`read_prompts`), instead of captions beside the pictures; not for what draws, which is
                told its own
    max_pixels  of one picture that is read from a file
    """
    if isinstance(spec, Mapping):
        if prompts is not None:
            raise ValueError("a model is told its prompts as it draws: give them beside its weights, prompts: FILE")
        return _dataset(spec) if "name" in spec else drawn(spec)
    path, name = Path(spec), check_path(spec).lower()
    if path.is_dir():
        return FolderPictures(path, prompts, max_pixels)
    if name.endswith((".npz", ".npy")):
        return NpzPictures(path, prompts)
    if name.endswith((".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst")):
        return TarPictures(spec, prompts, max_pixels)
    if path.exists():
        raise ValueError(f"{path} is no source of pictures: give a folder, an .npz or .npy file, or .tar files")
    raise FileNotFoundError(f"no such folder of pictures: {path}{_near(path)}")


def _dataset(spec: Mapping[str, Any]) -> Source:
    data = make("data set", spec, {"digits": digits})
    return TensorPictures.from_signed(data.images, data.labels, origin=", ".join(str(value) for value in spec.values()))


def _near(path: Path) -> str:
    """What is there by a similar name."""
    beside = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
