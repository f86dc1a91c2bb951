"""Writes diffusers' folders: a sub-folder with weights and configuration per part, and an index."""

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
from models.layouts.export import check_text, family_of_model, in_dtype, in_folders, kinds_of, published
from models.layouts.folder import PIPELINE, SCHEDULER
from models.layouts.own_settings import FAMILY_KEY, SETTINGS_KEY, settings_to_write
from models.layouts.scheduler import scheduler
from models.model import Model
from models.text.encoder import TextEncoder

FILE, TEXT_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
PartFiles = tuple[str, dict[str, Any], dict[str, Tensor]]
"""The name of a part's file of weights, its configuration, and its tensors."""


def save_diffusers(model: Model, folder: Path, dtype: torch.dtype | None) -> None:
    for name, (file, _, tensors) in _parts(model).items():
        native.write_tensors(folder / name / file, in_dtype(tensors, dtype), {"format": "pt"})
    write_configs(model, folder)


def write_configs(model: Model, folder: Path) -> None:
    """Write a diffusers folder without its weights: configurations, tokenizers and the index."""
    parts = _parts(model)
    classes = {name: _class(each[1]) for name, each in parts.items() if name not in ("", PREVIEW.folder)}
    for name, (_, config, _) in parts.items():
        write_json(folder / name / "config.json", config)
    if model.text is not None:
        family = family_of_model(model)
        check_text(model, family, in_folders(model.text.params))
        classes |= _save_tokenizers(model.text, family, folder)
    if model.backbone is not None:
        family = family_of_model(model)
        config = scheduler(model)
        write_json(folder / SCHEDULER, config)
        classes["scheduler"] = ("diffusers", config["_class_name"])
        size = parts[family.architecture.kind.folder][1].get("sample_size")
        write_json(folder / PIPELINE, _index(model, family, classes, size))


def _parts(model: Model) -> dict[str, PartFiles]:
    """The files of each part, by sub-folder."""
    parts: dict[str, PartFiles] = {}
    size = (0, 0) if model.backbone is None else model.shape[1:]
    for name, kind in kinds_of(model).items():
        network = model.require(name)
        config = kind.config(network.params, size)
        parts[kind.folder] = (FILE, config, published(network, kind.diffusers(network.params), kind, config))
    if (text := model.text) is not None:
        for tower in family_of_model(model).architecture.towers:
            if (name := tower.name) in text.towers:
                reader, tokenizer = text.params.readers[name], text.tokenizers.get(name)
                files = reader.to_diffusers(text.towers[name], tokenizer, tower.identity)
                parts[tower.folder] = (TEXT_FILE, *files)
    return {"": parts[PREVIEW.folder]} if parts.keys() == {PREVIEW.folder} else parts


def _class(config: Mapping[str, Any]) -> tuple[str, str]:
    """Library and class of the part that has this configuration."""
    if "_class_name" in config:
        return "diffusers", config["_class_name"]
    return "transformers", config["architectures"][0]


def _index(
    model: Model, family: Family, classes: Mapping[str, tuple[str, str]], sample_size: Any
) -> dict[str, Any]:
    """model_index.json, with the pipeline's class, and library and class of every part."""
    architecture = family.architecture
    own: dict[str, Any] = {FAMILY_KEY: model.spec["family"]} if "family" in model.spec else {}
    if settings := settings_to_write(model, family, sample_size):
        own[SETTINGS_KEY] = settings
    absent = [tower.folder for tower in architecture.towers if tower.optional and tower.folder not in classes]
    unused = {name: [None, None] for folder in absent for name in (folder, _tokenizer_folder(folder))}
    text = model.text.params if model.text is not None else family.join_readers(family.readers)
    zeros = {"force_zeros_for_empty_prompt": text.null == "zeros"} if text.numbers else {}
    plain = family.pipeline and model.role is None
    return {
        "_class_name": family.pipeline if plain else architecture.pipelines[model.role],
        "_diffusers_version": architecture.diffusers,
        **own,
        **zeros,
        **architecture.index,
        **unused,
        **{part: list(what) for part, what in classes.items()},
    }


def _tokenizer_folder(folder: str) -> str:
    return folder.replace("text_encoder", "tokenizer")


def _save_tokenizers(text: TextEncoder, family: Family, folder: Path) -> dict[str, tuple[str, str]]:
    """Write the tokenizer of every text encoder into its folder, and return library and class of each."""
    folders = {tower.name: _tokenizer_folder(tower.folder) for tower in family.architecture.towers}
    classes: dict[str, tuple[str, str]] = {}
    for name, reader in text.params.readers.items():
        if written := reader.write_tokenizer(text.tokenizers.get(name), folder / folders[name]):
            classes[folders[name]] = ("transformers", written)
    return classes
