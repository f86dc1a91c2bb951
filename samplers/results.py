"""What both ways of sampling share: which settings are given, and the folder of results."""

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

SHOWN = 200  # images on the sheet


def drop_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration is not null; sections without anything in them are left out too."""
    inner = {key: drop_nulls(each) if isinstance(each, Mapping) else each for key, each in config.items()}
    return {key: value for key, value in inner.items() if value is not None and value != {}}


@dataclass(frozen=True)
class ImageRecord:
    """An image (C, H, W), the name of its file within images/, and what it was drawn with."""

    image: Tensor
    name: str
    settings: Mapping[str, Any]


class Outcome(NamedTuple):
    """The folder of results, and the images in it that are new."""

    out: Path
    images: list[Path]


def check_sha256(key: str, path: str, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """ValueError where the SHA-256 of what a setting names is not the wanted one, if there is one."""
    if key in wanted and found.get(key) != wanted[key]:
        raise ValueError(
            f"{path} has changed: its SHA-256 is {found.get(key, '')[:12]}..., and {wanted[key][:12]}... is "
            "asked for; "
            f"{key}=... says where that lies now"
        )


def sibling_folder(out: Path) -> Path:
    """A new folder beside one of results, for an image that is drawn once more and replaces none."""
    names = chain(["again"], (f"again-{i}" for i in count(2)))
    return next(place for name in names if not (place := out.with_name(f"{out.name}-{name}")).exists())


def check_folder(out: Path, kept: Mapping[str, Any]) -> None:
    """Raise unless images of these settings may be written there: ValueError where others are, OSError where
    it is no folder."""
    images, record = out / "images", out / "samples.json"
    if (
        images.is_dir()
        and any(images.iterdir())
        and (not record.exists() or read_json(record).get("settings") != as_json(kept))
    ):
        raise ValueError(
            f"{images} already holds images of other settings: out=... names another place for these"
        )
    there = next(place for place in (images, *images.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise OSError(
            f"cannot write {images}: {there} is {'a file' if there.is_file() else 'not open to writing'}"
        )


def fill_folder(
    out: Path,
    kept: Mapping[str, Any],
    provenance: Mapping[str, str],
    drawn: Iterable[ImageRecord],
    *,
    columns: int,
    low: float,
) -> list[Path]:
    """Save images, values in [low, 1], as they are drawn, and return their paths.

    images/       one PNG per image
    grid.png      the first 200 together, in so many columns, where there are several; large ones made smaller
    samples.json  what all images in the folder have in common (`kept`), and provenance
    """
    paths: list[Path] = []
    shown: list[Tensor] = []
    for each in drawn:
        if not paths:
            write_json(out / "samples.json", {"settings": kept, "provenance": provenance})
        paths.append(out / "images" / f"{each.name}.png")
        save_png(each.image, paths[-1], each.settings, low=low)
        if len(paths) <= SHOWN:
            shown.append(thumbnail(each.image))
    if len(shown) > 1:
        sheet = {"settings": dict(kept), "images": len(shown)}
        save_png(
            tile(torch.stack(shown), columns),
            out / "grid.png",
            sheet,
            zoom=max(1, 64 // shown[0].shape[-1]),
            low=low,
        )
    return paths


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values as a JSON file gives them back: lists, not tuples."""
    return dict(json.loads(json.dumps(strict(values))))
