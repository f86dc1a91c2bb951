"""Reads diffusers' folders: a sub-folder per part, which holds its weights and a config.json."""

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
    """The folders with weights: sub-folders, or the folder itself. FileNotFoundError without any.

    Sub-folders of unknown names are included, as their keys show what they hold, but not those that
    model_index.json does not name.
    """
    paths = [path for path, reason in _sub_folders(folder, ema).items() if not reason]
    if paths or holds_weights(folder):
        return sorted(paths, key=lambda path: path.name not in COMPONENTS) or [folder]
    files = [path.name for path in sorted(folder.iterdir()) if path.name.endswith((*SAFETENSORS, *PICKLES))]
    hint = f"no sub-folder {', '.join(COMPONENTS)} has weights in it"
    if files:
        hint = f"load the file itself: {folder / files[0]}"
    lacks = "neither a training run's checkpoint nor diffusers' folders"
    raise FileNotFoundError(f"{folder} holds no model, {lacks}: {hint}")


def open_components(folder: Path, variant: str | None, ema: bool) -> list[tuple[TensorFile, dict[str, Any]]]:
    """The weights of each part, and its config.json ({} without one).

    variant  "fp16", "non_ema", ...: these weights in the parts that have them; None takes the plain ones,
             else any; ema=False prefers "non_ema", and unet to unet_ema
    """
    folders = components(folder, ema)
    if variant and not any(variant == name for each in folders for name, _ in _variants(each)):
        files = _list_files(folders)
        raise FileNotFoundError(f"{folder} holds no weights of the variant {variant!r}: there is {files}")
    paths = [_choose_file(each, variant, ema) for each in folders]
    return [(open_tensors(path), part_config(path)) for path in paths]


def part_config(file: Path) -> dict[str, Any]:
    """The config.json next to a file with one of diffusers' names for weights; {} without one."""
    config = file.parent / "config.json"
    named = WHOLE.fullmatch(file.name) or INDEX.fullmatch(file.name)
    return read_json(config) if named and config.is_file() else {}


def unused(folder: Path, ema: bool) -> dict[str, str]:
    """The sub-folders whose weights are left out, with the reason."""
    if not folder.is_dir():
        return {}
    return {f"{path.name}/": reason for path, reason in _sub_folders(folder, ema).items() if reason}


def _sub_folders(folder: Path, ema: bool) -> dict[Path, str]:
    """The sub-folders with weights, and why each is left out, or "". Either unet or unet_ema is left out."""
    reasons = dict(UNUSED)
    if all((folder / name).is_dir() for name in ("unet", "unet_ema")):
        reasons |= {"unet": AVERAGED} if ema else {"unet_ema": RAW}
    paths = sorted(path for path in folder.iterdir() if path.is_dir() and holds_weights(path))
    unnamed = "not named in model_index.json"
    return {path: reasons.get(path.name, "" if _is_named(path) else unnamed) for path in paths}


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A pipeline's configuration (SCHEDULER or PIPELINE); {} without one."""
    return read_json(folder / name) if (folder / name).is_file() else {}


def _is_named(folder: Path) -> bool:
    """Whether the pipeline's index names this folder, because some repositories also keep older parts.

    Always true without an index, and for a preview, which diffusers does not have.
    """
    index = read_config(folder.parent, PIPELINE)
    named = {name for name, what in index.items() if what != [None, None]}
    if folder.name in (PREVIEW.folder, *named):
        return True
    return not any((folder.parent / name).is_dir() for name in named)


def _variants(folder: Path) -> dict[tuple[str, str], str]:
    """The file for each variant ("" is the plain one) and format: a whole one, else an index."""
    variants = {}
    for pattern in (INDEX, WHOLE):
        for path in sorted(folder.iterdir()):
            if match := pattern.fullmatch(path.name):
                variants[match["variant"] or "", match["kind"]] = path.name
    return variants


def _choose_file(folder: Path, variant: str | None, ema: bool) -> Path:
    """safetensors before pickles, then by variant. FileNotFoundError for shards without their index."""
    variants = _variants(folder)
    if not variants:
        shards = _list_files([folder])
        raise FileNotFoundError(
            f"{folder} holds {shards}, but not the index, which says what each shard holds"
        )
    others = sorted({name for name, _ in variants} - {"", "non_ema"})
    order = [variant or "", "", *others, "non_ema"] if ema or variant else ["non_ema", "", *others]
    key = min(variants, key=lambda each: (each[1] != "safetensors", order.index(each[0])))
    return folder / variants[key]


def _list_files(folders: Iterable[Path]) -> str:
    names = {path.name for folder in folders for path in folder.iterdir()}
    return ", ".join(sorted(name for name in names if name.endswith((*SAFETENSORS, *PICKLES)))) or "none"
