"""Folders as diffusers opens them: a sub-folder per part, with its configuration beside its weights, and an index of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoints import clip_keys, diffusers_configs, native, t5_keys, taesd_keys, vae_keys
from models.checkpoints.clip_vocabulary import write_clip_tokenizer
from models.checkpoints.folder import PREVIEW
from models.checkpoints.table import scatter
from models.checkpoints.vocabulary import write_tokenizer
from models.checkpoints.written import BACKBONES, built_like, check_text, in_dtype, published, use_of
from models.families import TOWERS
from models.files import write_json
from models.model import Model
from models.t5 import T5
from models.text import TextEncoder


def save_diffusers(model: Model, folder: Path, dtype: torch.dtype | None) -> None:
    for place, (file, _, tensors) in _parts(model).items():
        native.write_tensors(folder / place / file, in_dtype(tensors, dtype), {"format": "pt"})
    write_configs(model, folder)


def write_configs(model: Model, folder: Path) -> None:
    """All of a diffusers folder but the weights, which the model need not have: configurations, tokenizers and the index."""
    found = _parts(model)
    classes = {place: diffusers_configs.class_of(config) for place, (_, config, _) in found.items() if place not in ("", PREVIEW)}
    for place, (_, config, _) in found.items():
        write_json(folder / place / "config.json", config)
    if model.text is not None:
        check_text(model, base := built_like(model), {"pad", "blocks"} | ({"null"} if base.startswith("sdxl") else set()))
        classes |= _save_tokenizers(model.text, folder, _places(model))
    if model.backbone is not None:
        config = diffusers_configs.scheduler(model)
        write_json(folder / "scheduler" / "scheduler_config.json", config)
        classes["scheduler"] = ("diffusers", config["_class_name"])
        size = found[BACKBONES[type(model.backbone)].folder][1].get("sample_size")
        write_json(folder / "model_index.json", diffusers_configs.index(model, built_like(model), classes, size))


def _parts(model: Model) -> dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """By sub-folder: the file of the weights, the configuration, and the tensors."""
    file = "diffusion_pytorch_model.safetensors"
    parts: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {}
    if model.backbone is not None:
        of = BACKBONES[type(model.backbone)]
        config = of.config(model.backbone.params, model.shape[1:])
        tensors = published(model.backbone, of.diffusers(model.backbone.params), of.recognise, config)
        parts[of.folder] = (file, config, tensors)
    if model.vae is not None:
        config = diffusers_configs.vae(model.vae.params)
        layout = vae_keys.diffusers(model.vae.params)
        parts["vae"] = (file, config, published(model.vae, layout, vae_keys.recognise, config))
    for name, place in _places(model).items():
        config, tensors = _text_tower(model, name)
        parts[place] = ("model.safetensors", config, tensors)
    if model.preview is not None:
        config = diffusers_configs.taesd(model.preview.params)
        tensors = published(model.preview, taesd_keys.diffusers(), taesd_keys.recognise)
        parts[PREVIEW if parts else ""] = (file, config, tensors)
    return parts


def _places(model: Model) -> dict[str, str]:
    """The sub-folder of every text tower: the first, second and third in their family's order, but for the refiner's only one."""
    if model.text is None:
        return {}
    towers = TOWERS[built_like(model)]
    numbers = {name: i + 1 + (towers == ("clip_g",)) for i, name in enumerate(towers)}
    return {name: "text_encoder" + (f"_{numbers[name]}" if numbers[name] > 1 else "") for name in model.text.towers}


def _text_tower(model: Model, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A tower as diffusers' folders have it: one that goes into no vector ends with the last block that is used, or the one behind it where
    pipelines take the last state but one. A projection is there where it is used.

    Pipelines of Stable Diffusion 3 project CLIP-L's pooled output in any case: one that goes unprojected gets the identity.
    """
    tower = model.require("text").towers[name]
    state = tower.state_dict()
    if isinstance(tower, T5):
        return diffusers_configs.t5(tower.params), scatter(t5_keys.transformers().table(state), state)
    params, use = tower.params, use_of(model, name)
    used = params.layers if use.blocks is None else use.blocks if use.norm else use.blocks + 1
    if use.pooled and used != params.layers:
        raise ValueError(f"pipelines of diffusers take another state of {name} than the one after {use.blocks} blocks: use layout='native'")
    projected = use.pooled and use.projected and params.projection is not None
    params = replace(params, layers=used, projection=params.projection if projected else None)
    unused = tuple(f"blocks.{i}." for i in range(used, tower.params.layers)) + ("projection.",) * (not projected)
    state = {key: value for key, value in state.items() if not key.startswith(unused)}
    if use.pooled and not projected and built_like(model).startswith("sd3"):
        params = replace(params, projection=params.width)
        state["projection.weight"] = torch.eye(params.width).to(state["norm.weight"])
    tokenizer = model.require("text").tokenizer(name)
    return diffusers_configs.text(params, tokenizer.bos, tokenizer.eos), scatter(clip_keys.transformers().table(state), state)


def _save_tokenizers(text: TextEncoder, folder: Path, places: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The tokenizer of every tower in its folder, and the classes that read them."""
    classes = {}
    for use in text.params.uses:
        if text.tokenizer(use.tower).size > text.params.towers[use.tower].vocab:
            continue  # the words that it knows are not known
        place = places[use.tower].replace("text_encoder", "tokenizer")
        write_clip_tokenizer(text.tokenizer(use.tower), folder / place, use.pad, text.params.length)
        classes[place] = ("transformers", "CLIPTokenizer")
    if "t5" in places and text.t5_tokenizer is not None:
        place = places["t5"].replace("text_encoder", "tokenizer")
        write_tokenizer(text.t5_tokenizer, folder / place)
        write_json(folder / place / "tokenizer_config.json", diffusers_configs.t5_tokenizer(text.params.t5_length))
        classes[place] = ("transformers", "T5TokenizerFast")
    return classes
