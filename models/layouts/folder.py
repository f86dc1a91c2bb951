"""Folders as diffusers writes them: one sub-folder per part, with a config.json beside its weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from models.families import AUTOENCODERS, BACKBONES, TOWERS
from models.families.taesd_keys import PREVIEW
from models.files.stored import TensorFile
from models.files.tensors import INDEX, PICKLES, SAFETENSORS, WHOLE, holds_weights, open_tensors
from models.files.text import read_json
from models.layouts.parts import AVERAGED, RAW

SCHEDULER = "scheduler/scheduler_config.json"
PIPELINE = "model_index.json"
_NETWORKS = [kind.folder for kind in (*BACKBONES.values(), *AUTOENCODERS.values())]
COMPONENTS = tuple(dict.fromkeys([*_NETWORKS, *(tower.folder for tower in TOWERS)]))
UNUSED = {"safety_checker": "a filter for finished images", "image_encoder": "for image prompts"}


def components(folder: Path, ema: bool = True) -> list[Path]:
    """The folders that hold weights: those of a pipeline's parts, or the folder itself. FileNotFoundError
    where there are none.

    Parts of unknown names are included, since their keys tell what they are; parts that model_index.json does
    not name are not.
    """
    found = [path for path, why in _inside(folder, ema).items() if not why]
    if found or holds_weights(folder):
        return sorted(found, key=lambda path: path.name not in COMPONENTS) or [folder]
    files = [path.name for path in sorted(folder.iterdir()) if path.name.endswith((*SAFETENSORS, *PICKLES))]
    hint = (
        f"load the file itself: {folder / files[0]}"
        if files
        else f"no sub-folder {', '.join(COMPONENTS)} has weights in it"
    )
    raise FileNotFoundError(
        f"{folder} holds no model, neither a training run's checkpoint nor diffusers' folders: {hint}"
    )


def open_components(folder: Path, variant: str | None, ema: bool) -> list[tuple[TensorFile, dict[str, Any]]]:
    """The weights of each part, and its config.json ({} without one).

    variant  "fp16", "non_ema", ...: weights of that name in the parts that have them; None takes the plain
             ones, else whatever there is; ema=False prefers "non_ema", and unet to unet_ema
    """
    places = components(folder, ema)
    if variant and not any(variant == having for place in places for having, _ in _offers(place)):
        raise FileNotFoundError(
            f"{folder} holds no weights of the variant {variant!r}: there is {_listed(places)}"
        )
    files = [_chosen(place, variant, ema) for place in places]
    return [(open_tensors(file), config_beside(file)) for file in files]


def config_beside(file: Path) -> dict[str, Any]:
    """The config.json beside a file that is named as diffusers names the weights of a part; {} without
    one."""
    config = file.parent / "config.json"
    return (
        read_json(config)
        if config.is_file() and (WHOLE.fullmatch(file.name) or INDEX.fullmatch(file.name))
        else {}
    )


def unused(folder: Path, ema: bool) -> dict[str, str]:
    """The sub-folders whose weights are left out, with the reason."""
    return (
        {f"{path.name}/": why for path, why in _inside(folder, ema).items() if why} if folder.is_dir() else {}
    )


def _inside(folder: Path, ema: bool) -> dict[Path, str]:
    """The sub-folders that hold weights, and why each is left out, "" where it is not. Of a training's unet
    and unet_ema one is."""
    reasons = dict(UNUSED)
    if all((folder / name).is_dir() for name in ("unet", "unet_ema")):
        reasons |= {"unet": AVERAGED} if ema else {"unet_ema": RAW}
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and holds_weights(path))
    return {
        path: reasons.get(path.name, "" if _is_named(path) else "not named in model_index.json")
        for path in inside
    }


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A pipeline's configuration of that name (SCHEDULER, PIPELINE); {} without one."""
    return read_json(folder / name) if (folder / name).is_file() else {}


def _is_named(place: Path) -> bool:
    """Whether the pipeline's index, if there is one, names this folder: some repositories keep older parts
    beside those in use.

    A preview, which diffusers has no place for, need not be named.
    """
    named = {name for name, what in read_config(place.parent, PIPELINE).items() if what != [None, None]}
    return (
        place.name == PREVIEW.folder
        or place.name in named
        or not any((place.parent / name).is_dir() for name in named)
    )


def _offers(folder: Path) -> dict[tuple[str, str], str]:
    """The file to open for each variant ("" is the plain one) in each format: the whole, else the index of
    its shards."""
    offers = {}
    for pattern in (INDEX, WHOLE):
        for path in sorted(folder.iterdir()):
            if found := pattern.fullmatch(path.name):
                offers[found["variant"] or "", found["kind"]] = path.name
    return offers


def _chosen(folder: Path, variant: str | None, ema: bool) -> Path:
    """safetensors before pickles, then by variant. FileNotFoundError where there are only shards without
    their index."""
    offers = _offers(folder)
    if not offers:
        raise FileNotFoundError(
            f"{folder} holds {_listed([folder])}, and not the index that says what lies in which shard"
        )
    others = sorted({name for name, _ in offers} - {"", "non_ema"})
    variants = [variant or "", "", *others, "non_ema"] if ema or variant else ["non_ema", "", *others]
    key = min(offers, key=lambda offer: (offer[1] != "safetensors", variants.index(offer[0])))
    return folder / offers[key]


def _listed(folders: Iterable[Path]) -> str:
    names = {
        path.name
        for folder in folders
        for path in folder.iterdir()
        if path.name.endswith((*SAFETENSORS, *PICKLES))
    }
    return ", ".join(sorted(names)) or "none"
