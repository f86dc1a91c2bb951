"""Writes single files as their publishers do: one with all parts, or one per part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.families import Family, Tower
from models.families.vae_keys import LATENT_STATISTICS
from models.files.tensors import SAFETENSORS
from models.files.text import write_text
from models.layouts import native
from models.layouts.export import check_text, family_of_model, in_dtype, kinds_of, published
from models.layouts.own_settings import FAMILY_KEY, SETTINGS, SETTINGS_KEY
from models.layouts.parts import BACKBONE
from models.layouts.schedule_table import write_table
from models.layouts.scheduler import SNR_MARK, V_MARK
from models.model import Model
from models.networks.vae import VAEParams
from models.text.encoder import TextEncoder
from models.text.vocabulary import WHOLE

PREDICTIONS_LDM = {"eps": "epsilon", "v": "v"}  # in the metadata of single files


def save_ldm(model: Model, path: Path, dtype: torch.dtype | None) -> None:
    if path.suffix not in SAFETENSORS:
        raise ValueError(
            f"a single file is recognised by its ending: name it {path.name}.safetensors, not {path}"
        )
    prefixes = {"backbone": BACKBONE, "preview": ""}
    towers: tuple[Tower, ...] = ()
    if family := family_of_model(model) if model.parts.keys() - {"preview"} else None:
        towers = tuple(family.architecture.towers)
        prefixes |= {"vae": family.architecture.vae_prefix, **{tower.name: tower.prefix for tower in towers}}
    parts = _single_parts(model, family)
    if len(parts) > 1:  # single files have no preview
        parts.pop("preview", None)
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        tensors |= {prefixes[name] + key: value for key, value in part.items()}
    for tower in towers:
        if tower.unused and tower.name in parts:
            tensors |= _unused_block(model, tower, tensors)
    tensors = in_dtype(tensors, dtype)
    if family and model.backbone is not None:
        tensors |= _marker_tensors(model, family)
    if family and model.vae is not None:
        tensors |= _latent_statistics(model.vae.params, family.vae)
    native.write_tensors(path, tensors, {"format": "pt", **_metadata(model)})


def save_separate(model: Model, folder: Path, dtype: torch.dtype | None) -> None:
    family = family_of_model(model)
    if model.backbone is not None and (marks := _marker_tensors(model, family)):
        what = "what the network predicts" if V_MARK in marks else f"the schedule {model.spec['schedule']}"
        raise ValueError(f"separate files do not say {what}: use another layout")
    if model.vae is not None and _latent_statistics(model.vae.params, family.vae):
        raise ValueError("separate files do not say how latents are scaled: use another layout")
    names = {tower.name: tower.file for tower in family.architecture.towers if tower.file}
    names["backbone"] = family.name
    for name, tensors in _single_parts(model, family).items():
        metadata = _metadata(model) if name == "backbone" else {}
        file = folder / f"{names.get(name, name)}.safetensors"
        native.write_tensors(file, in_dtype(tensors, dtype), {"format": "pt", **metadata})
    for text in tokenizer_files(model):
        write_text(folder / WHOLE, text)


def tokenizer_files(model: Model) -> list[str]:
    """The tokenizer.json files to be written next to single files of text encoders."""
    if model.text is None:
        return []
    readers, tokenizers = model.text.params.readers, model.text.tokenizers
    texts = [readers[name].tokenizer_json(tokenizer) for name, tokenizer in tokenizers.items()]
    return [text for text in texts if text is not None]


def _single_parts(model: Model, family: Family | None) -> dict[str, dict[str, Tensor]]:
    """The tensors of every part and text encoder, with the keys of single files but no prefixes."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, kind in kinds_of(model).items():
        network = model.require(name)
        parts[name] = published(network, kind.single(network.params), kind)
    if family and model.text is not None:
        check_text(model, family, {})
        for tower in family.architecture.towers:
            if tower.name in model.text.towers:
                parts[tower.name] = _single_tower(model.text, tower)
    return parts


def _single_tower(text: TextEncoder, tower: Tower) -> dict[str, Tensor]:
    reader = text.params.readers[tower.name]
    if reason := reader.single_file_problem(tower.name, text.tokenizers.get(tower.name), tower.reader):
        raise ValueError(reason)
    layout = tower.layout or reader.NETWORK.single(reader.network)
    return published(text.towers[tower.name], layout, reader.NETWORK)


def _metadata(model: Model) -> dict[str, str]:
    """The metadata of single files: the prediction, and settings that only this library reads."""
    metadata: dict[str, str] = {}
    if "family" in model.spec:
        settings = {key: model.spec[key] for key in SETTINGS if key in model.spec}
        metadata = {FAMILY_KEY: model.spec["family"], SETTINGS_KEY: native.as_text("model", settings)}
    if name := PREDICTIONS_LDM.get(model.prediction.name):
        metadata["modelspec.prediction_type"] = name
    return metadata


def _marker_tensors(model: Model, family: Family) -> dict[str, Tensor]:
    """Tensors that show readers prediction and schedule. ValueError if readers would assume others."""
    schedule, prediction = {**family.schedule, **model.spec["schedule"]}, model.prediction.name
    ends_in_noise = schedule.pop("zero_terminal_snr", False)
    usual = schedule == family.schedule
    table = {} if usual else write_table(model.schedule, family.schedule)
    if not (usual or table) or prediction not in (*PREDICTIONS_LDM, family.prediction):
        what = f"schedule {model.spec['schedule']} and prediction {prediction!r}"
        raise ValueError(f"single files do not say {what}: use another layout")
    if (grid := model.spec.get("grid", family.grid)) != family.grid and prediction == "flow":
        raise ValueError(
            f"single files do not say the time grid, here {grid}: use layout='diffusers' or 'native'"
        )
    marks = [V_MARK] * (family.architecture.marks_v and prediction == "v") + [SNR_MARK] * ends_in_noise
    return table | {mark: torch.tensor([]) for mark in marks}


def _latent_statistics(p: Any, usual: Any) -> dict[str, Tensor]:
    """Mean and standard deviation of latents, if used. ValueError for a scale unknown to readers."""
    if not isinstance(p, VAEParams):
        return {}
    if (p.scale, p.shift) != (usual.scale, usual.shift):
        scaled = f"how latents are scaled, here by {p.scale:g}"
        raise ValueError(f"single files do not say {scaled}: use another layout")
    if p.mean is None or p.std is None:
        return {}
    statistics = zip(LATENT_STATISTICS, (p.mean, p.std), strict=True)
    return {key: torch.tensor(values)[None, :, None, None] for key, values in statistics}


def _unused_block(model: Model, tower: Tower, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Zeros for the last block of an encoder, which is never used but which readers of this layout expect."""
    reader: Any = model.require("text").params.readers[tower.name]
    layers = reader.network.layers
    if reader.skip:
        return {}
    last, new = (f"{tower.prefix}transformer.resblocks.{i}." for i in (layers - 1, layers))
    block = {key: value for key, value in tensors.items() if key.startswith(last)}
    return {key.replace(last, new): torch.zeros_like(value) for key, value in block.items()}
