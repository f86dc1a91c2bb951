"""Folders as diffusers opens them: a sub-folder per part, with its configuration beside its weights, and an index of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.families import Family, Tower
from models.families.taesd_keys import PREVIEW
from models.files.table import scatter
from models.files.text import write_json
from models.layouts import native
from models.layouts.folder import PIPELINE, SCHEDULER
from models.layouts.own_settings import FAMILY_KEY, SETTINGS_KEY, untold_settings
from models.layouts.scheduler import scheduler
from models.layouts.written import check_text, family_of_model, in_dtype, kinds_of, published, use_of
from models.model import Model
from models.networks.t5 import T5
from models.text import clip_keys, t5_keys
from models.text.encoder import TextEncoder
from models.text.vocabulary import write_clip_tokenizer, write_t5_tokenizer

FILE, TEXT_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"
T5_CONFIG = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}  # its tokenizer's
Written = tuple[str, dict[str, Any], dict[str, Tensor]]
"""A part as it is written: the name of its file of weights, its configuration, its tensors."""


def save_diffusers(model: Model, folder: Path, dtype: torch.dtype | None) -> None:
    for place, (file, _, tensors) in _parts(model).items():
        native.write_tensors(folder / place / file, in_dtype(tensors, dtype), {"format": "pt"})
    write_configs(model, folder)


def write_configs(model: Model, folder: Path) -> None:
    """All of a diffusers folder but the weights, which the model need not have: configurations, tokenizers and the index."""
    found = _parts(model)
    classes = {place: _class_of(config) for place, (_, config, _) in found.items() if place not in ("", PREVIEW.folder)}
    for place, (_, config, _) in found.items():
        write_json(folder / place / "config.json", config)
    if model.text is not None:
        of = family_of_model(model)
        check_text(model, of, {"pad", "blocks"} | ({"null"} if model.text.params.numbers else set()))
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
        towers = [tower for tower in family_of_model(model).architecture.towers if tower.name in model.text.towers]
        parts |= {tower.folder: (TEXT_FILE, *_text_tower(model, tower)) for tower in towers}
    return {"": parts[PREVIEW.folder]} if parts.keys() == {PREVIEW.folder} else parts


def _class_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """Library and class of the part that has this configuration."""
    return ("diffusers", config["_class_name"]) if "_class_name" in config else ("transformers", config["architectures"][0])


def _index(model: Model, of: Family, parts: Mapping[str, tuple[str, str]], sample_size: Any) -> dict[str, Any]:
    """model_index.json, with the pipeline's class and every part's, as (library, class); sample_size: see `untold_settings`."""
    built = of.architecture
    named: dict[str, Any] = {FAMILY_KEY: model.spec["family"]} if "family" in model.spec else {}
    if own := untold_settings(model, of, sample_size):
        named[SETTINGS_KEY] = own
    absent = [tower.folder for tower in built.towers if tower.optional and tower.folder not in parts]
    unused = {place: [None, None] for folder in absent for place in (folder, _tokenizer_of(folder))}
    text = model.text.params if model.text is not None else built.text()
    zeros = {"force_zeros_for_empty_prompt": text.null == "zeros"} if text.numbers else {}
    return {
        "_class_name": of.pipeline or built.pipelines[model.role],
        "_diffusers_version": built.diffusers,
        **named,
        **zeros,
        **built.index,
        **unused,
        **{part: list(what) for part, what in parts.items()},
    }


def _tokenizer_of(folder: str) -> str:
    return folder.replace("text_encoder", "tokenizer")


def _text_tower(model: Model, encoder: Tower) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors of a text encoder, cut to what pipelines of diffusers read of it.

    They take either the last state through its norm, or the one before it: so the encoder ends with the block that gives the context, or
    with the next. A projection is written only if it is used; an encoder that pipelines always project gets the identity in its place.
    """
    name, tower = encoder.name, model.require("text").towers[encoder.name]
    state = tower.state_dict()
    if isinstance(tower, T5):
        return t5_keys.config(tower.params), scatter(t5_keys.transformers().table(state), state)
    params, use = tower.params, use_of(model, name)
    used = params.layers if use.blocks is None else use.blocks if use.norm else use.blocks + 1
    if use.pooled and used != params.layers:
        raise ValueError(f"pipelines of diffusers take another state of {name} than the one after {use.blocks} blocks: use layout='native'")
    projected = use.pooled and use.projected and params.projection is not None
    params = replace(params, layers=used, projection=params.projection if projected else None)
    unused = tuple(f"blocks.{i}." for i in range(used, tower.params.layers)) + ("projection.",) * (not projected)
    state = {key: value for key, value in state.items() if not key.startswith(unused)}
    if use.pooled and not projected and encoder.identity:
        params = replace(params, projection=params.width)
        state["projection.weight"] = torch.eye(params.width).to(state["norm.weight"])
    tokenizer = model.require("text").tokenizer(name)
    return clip_keys.config(params, tokenizer.bos, tokenizer.eos), scatter(clip_keys.transformers().table(state), state)


def _save_tokenizers(text: TextEncoder, of: Family, folder: Path) -> dict[str, tuple[str, str]]:
    """The tokenizer of every text encoder in its folder, and the classes that read them."""
    places = {tower.name: _tokenizer_of(tower.folder) for tower in of.architecture.towers}
    classes = {}
    for use in text.params.uses:
        if text.tokenizer(use.tower).size > text.params.towers[use.tower].vocab:
            continue  # the encoder has words of its own, and their tokenizer was not loaded
        place = places[use.tower]
        write_clip_tokenizer(text.tokenizer(use.tower), folder / place, use.pad, text.params.length)
        classes[place] = ("transformers", "CLIPTokenizer")
    if text.params.t5 and text.t5_tokenizer is not None:
        place = places["t5"]
        write_t5_tokenizer(text.t5_tokenizer, folder / place)
        write_json(folder / place / "tokenizer_config.json", T5_CONFIG | {"model_max_length": text.params.t5_length})
        classes[place] = ("transformers", "T5TokenizerFast")
    return classes
