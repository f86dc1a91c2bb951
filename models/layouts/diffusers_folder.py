"""Folders as diffusers opens them: a sub-folder per part, with its configuration beside its weights, and an
index of all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.families import Family
from models.families.taesd_keys import PREVIEW
from models.files.text import write_json
from models.layouts import native
from models.layouts.folder import PIPELINE, SCHEDULER
from models.layouts.own_settings import FAMILY_KEY, SETTINGS_KEY, untold_settings
from models.layouts.scheduler import scheduler
from models.layouts.written import check_text, family_of_model, in_dtype, kinds_of, published, said_in_folders
from models.model import Model
from models.text.encoder import TextEncoder

FILE, TEXT_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
Written = tuple[str, dict[str, Any], dict[str, Tensor]]
"""A part as it is written: the name of its file of weights, its configuration, its tensors."""


def save_diffusers(model: Model, folder: Path, dtype: torch.dtype | None) -> None:
    for place, (file, _, tensors) in _parts(model).items():
        native.write_tensors(folder / place / file, in_dtype(tensors, dtype), {"format": "pt"})
    write_configs(model, folder)


def write_configs(model: Model, folder: Path) -> None:
    """All of a diffusers folder but the weights, which the model need not have: configurations, tokenizers
    and the index."""
    found = _parts(model)
    classes = {
        place: _class_of(config)
        for place, (_, config, _) in found.items()
        if place not in ("", PREVIEW.folder)
    }
    for place, (_, config, _) in found.items():
        write_json(folder / place / "config.json", config)
    if model.text is not None:
        of = family_of_model(model)
        check_text(model, of, said_in_folders(model.text.params))
        classes |= _save_tokenizers(model.text, of, folder)
    if model.backbone is not None:
        of = family_of_model(model)
        config = scheduler(model)
        write_json(folder / SCHEDULER, config)
        classes["scheduler"] = ("diffusers", config["_class_name"])
        size = found[of.architecture.kind.folder][1].get("sample_size")
        write_json(folder / PIPELINE, _index(model, of, classes, size))


def _parts(model: Model) -> dict[str, Written]:
    """By sub-folder."""
    parts: dict[str, Written] = {}
    size = (0, 0) if model.backbone is None else model.shape[1:]
    for name, kind in kinds_of(model).items():
        network = model.require(name)
        config = kind.config(network.params, size)
        parts[kind.folder] = (FILE, config, published(network, kind.diffusers(network.params), kind, config))
    if model.text is not None:
        towers = [
            tower for tower in family_of_model(model).architecture.towers if tower.name in model.text.towers
        ]
        for tower in towers:
            reader, own = model.text.params.readers[tower.name], model.text.tokenizers.get(tower.name)
            parts[tower.folder] = (
                TEXT_FILE,
                *reader.to_diffusers(model.text.towers[tower.name], own, tower.identity),
            )
    return {"": parts[PREVIEW.folder]} if parts.keys() == {PREVIEW.folder} else parts


def _class_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """Library and class of the part that has this configuration."""
    return (
        ("diffusers", config["_class_name"])
        if "_class_name" in config
        else ("transformers", config["architectures"][0])
    )


def _index(
    model: Model, of: Family, parts: Mapping[str, tuple[str, str]], sample_size: Any
) -> dict[str, Any]:
    """model_index.json, with the pipeline's class and every part's, as (library, class); sample_size: see
    `untold_settings`."""
    built = of.architecture
    named: dict[str, Any] = {FAMILY_KEY: model.spec["family"]} if "family" in model.spec else {}
    if own := untold_settings(model, of, sample_size):
        named[SETTINGS_KEY] = own
    absent = [tower.folder for tower in built.towers if tower.optional and tower.folder not in parts]
    unused = {place: [None, None] for folder in absent for place in (folder, _tokenizer_of(folder))}
    text = model.text.params if model.text is not None else of.join_readers(of.readers)
    zeros = {"force_zeros_for_empty_prompt": text.null == "zeros"} if text.numbers else {}
    return {
        "_class_name": of.pipeline if of.pipeline and model.role is None else built.pipelines[model.role],
        "_diffusers_version": built.diffusers,
        **named,
        **zeros,
        **built.index,
        **unused,
        **{part: list(what) for part, what in parts.items()},
    }


def _tokenizer_of(folder: str) -> str:
    return folder.replace("text_encoder", "tokenizer")


def _save_tokenizers(text: TextEncoder, of: Family, folder: Path) -> dict[str, tuple[str, str]]:
    """The tokenizer of every text encoder in its folder, and the classes that read them."""
    places = {tower.name: _tokenizer_of(tower.folder) for tower in of.architecture.towers}
    readers = text.params.readers.items()
    classes = {
        places[name]: reader.write_tokenizer(text.tokenizers.get(name), folder / places[name])
        for name, reader in readers
    }
    return {place: ("transformers", name) for place, name in classes.items() if name}
