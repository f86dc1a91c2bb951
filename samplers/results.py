"""What all ways of sampling share: settings without nulls, and the folder of results."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.files.text import read_json, strict, write_json
from samplers.pictures import save_png, thumbnail, tile

SHOWN = 200  # images in grid.png


def drop_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without nulls, and without sections that are empty then."""
    inner = {key: drop_nulls(each) if isinstance(each, Mapping) else each for key, each in config.items()}
    return {key: value for key, value in inner.items() if value is not None and value != {}}


@dataclass(frozen=True)
class ImageRecord:
    """An image (C, H, W), the name of its file in images/, and its settings."""

    image: Tensor
    name: str
    settings: Mapping[str, Any]


class Outcome(NamedTuple):
    """The folder of results, and its new images."""

    out: Path
    images: list[Path]


def check_sha256(key: str, path: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """ValueError if a wanted SHA-256 is not the one found."""
    if key in wanted and found.get(key) != wanted[key]:
        hashes = f"its SHA-256 is {found.get(key, '')[:12]}..., not {wanted[key][:12]}..."
        raise ValueError(f"{path} has changed: {hashes}; {key}=... says where the original is")


def sibling_folder(out: Path) -> Path:
    """A new folder next to the results, for an image that is drawn again and replaces none."""
    names = chain(["again"], (f"again-{i}" for i in count(2)))
    return next(place for name in names if not (place := out.with_name(f"{out.name}-{name}")).exists())


def check_folder(out: Path, shared: Mapping[str, Any]) -> None:
    """ValueError if the folder holds images of other settings, OSError if it cannot be written."""
    images, record = out / "images", out / "samples.json"
    same = record.exists() and read_json(record).get("settings") == as_json(shared)
    if not same and images.is_dir() and any(images.iterdir()):
        raise ValueError(f"{images} already holds images of other settings: give another out=...")
    parent = next(place for place in (images, *images.absolute().parents) if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        reason = "a file" if parent.is_file() else "not writable"
        raise OSError(f"cannot write {images}: {parent} is {reason}")


def fill_folder(
    out: Path,
    shared: Mapping[str, Any],
    provenance: Mapping[str, str],
    records: Iterable[ImageRecord],
    *,
    columns: int,
    low: float,
) -> list[Path]:
    """Save images with values in [low, 1] one by one, and return their paths.

    images/       one PNG per image
    grid.png      the first 200 together, if there are several; large ones made smaller
    samples.json  the settings that all images of the folder share, and provenance
    """
    paths: list[Path] = []
    shown: list[Tensor] = []
    for each in records:
        if not paths:
            write_json(out / "samples.json", {"settings": shared, "provenance": provenance})
        paths.append(out / "images" / f"{each.name}.png")
        save_png(each.image, paths[-1], each.settings, low=low)
        if len(paths) <= SHOWN:
            shown.append(thumbnail(each.image))
    if len(shown) > 1:
        settings = {"settings": dict(shared), "images": len(shown)}
        grid, zoom = tile(torch.stack(shown), columns), max(1, 64 // shown[0].shape[-1])
        save_png(grid, out / "grid.png", settings, zoom=zoom, low=low)
    return paths


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values as a JSON file returns them: lists in place of tuples."""
    return dict(json.loads(json.dumps(strict(values))))
