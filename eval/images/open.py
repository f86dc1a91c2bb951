"""Any source of pictures, from a description in plain values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.spec import make
from eval.images.drawn import drawn
from samplers.pictures import MAX_PIXELS
from train.data import digits
from train.data.open import open_pictures
from train.data.source import Source
from train.data.tensors import TensorPictures


def open_source(spec: str | Path | Mapping[str, Any], prompts: str | None = None, max_pixels: int = MAX_PIXELS) -> Source:
    """A source of pictures: files (`open_pictures`), what draws them (`drawn`), or a data set, {"name": "digits", "split": "held_out"}.

    prompts  a file of one prompt per picture (`read_prompts`), instead of captions beside the pictures; not for what draws, which is
             told its own
    """
    if not isinstance(spec, Mapping):
        return open_pictures(spec, prompts, max_pixels)
    if prompts is not None:
        raise ValueError("a model is told its prompts as it draws: give them beside its weights, prompts: FILE")
    if "name" not in spec:
        return drawn(spec)
    data = make("data set", spec, {"digits": digits})
    return TensorPictures.from_signed(data.images, data.labels, origin=", ".join(str(value) for value in spec.values()))
