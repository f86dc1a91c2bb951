"""Single files, of all parts (latent diffusion's, Stability AI's, ComfyUI's) or of one each, as their
publishers write them."""

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
from models.layouts.own_settings import FAMILY_KEY, SETTINGS, SETTINGS_KEY
from models.layouts.parts import BACKBONE
from models.layouts.scheduler import SNR_MARK, V_MARK
from models.layouts.written import check_text, family_of_model, in_dtype, kinds_of, published
from models.layouts.written_schedule import write_table
from models.model import Model
from models.networks.vae import VAEParams
from models.text.encoder import TextEncoder
from models.text.vocabulary import WHOLE

PREDICTIONS_LDM = {"eps": "epsilon", "v": "v"}  # as the metadata of single files call them


def save_ldm(model: Model, path: Path, dtype: torch.dtype | None) -> None:
    if path.suffix not in SAFETENSORS:
        raise ValueError(
            f"{path} is to be a single file, which readers know by its ending: name it "
            f"{path.name}.safetensors"
        )
    of = family_of_model(model) if model.parts.keys() - {"preview"} else None
    prefixes = {"backbone": BACKBONE, "preview": ""}
    if of:
        prefixes |= {
            "vae": of.architecture.vae_prefix,
            **{tower.name: tower.prefix for tower in of.architecture.towers},
        }
    parts = _single_parts(model, of)
    if len(parts) > 1:  # with no place for it
        parts.pop("preview", None)
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        tensors |= {prefixes[name] + key: value for key, value in part.items()}
    for tower in of.architecture.towers if of else ():
        if tower.unused and tower.name in parts:
            tensors |= _unused_block(model, tower, tensors)
    tensors = in_dtype(tensors, dtype)
    if of and model.backbone is not None:
        tensors |= _marker_tensors(model, of)
    if of and model.vae is not None:
        tensors |= _latent_statistics(model.vae.params, of.vae)
    native.write_tensors(path, tensors, {"format": "pt", **_metadata(model)})


def save_separate(model: Model, folder: Path, dtype: torch.dtype | None) -> None:
    of = family_of_model(model)
    if model.backbone is not None and (marks := _marker_tensors(model, of)):
        what = "what the network predicts" if V_MARK in marks else f"the schedule {model.spec['schedule']}"
        raise ValueError(f"separate files do not say {what}: use another layout")
    if model.vae is not None and _latent_statistics(model.vae.params, of.vae):
        raise ValueError("separate files do not say how latents are scaled: use another layout")
    names = {
        "backbone": of.name,
        **{tower.name: tower.file for tower in of.architecture.towers if tower.file},
    }
    for name, part in _single_parts(model, of).items():
        file = folder / f"{names.get(name, name)}.safetensors"
        native.write_tensors(
            file, in_dtype(part, dtype), {"format": "pt", **(_metadata(model) if name == "backbone" else {})}
        )
    for text in tokenizers_beside(model):
        write_text(folder / WHOLE, text)


def tokenizers_beside(model: Model) -> list[str]:
    """The tokenizer.json files that have to lie beside single files of its text encoders."""
    if model.text is None:
        return []
    texts = [
        model.text.params.readers[name].tokenizer_json(own) for name, own in model.text.tokenizers.items()
    ]
    return [text for text in texts if text is not None]


def _single_parts(model: Model, of: Family | None) -> dict[str, dict[str, Tensor]]:
    """The tensors of every part, text encoders by their names, as single files hold them but for what stands
    before their keys."""
    networks = {name: (model.require(name), kind) for name, kind in kinds_of(model).items()}
    parts = {
        name: published(network, kind.single(network.params), kind)
        for name, (network, kind) in networks.items()
    }
    if of and model.text is not None:
        check_text(model, of, {})
        parts |= {
            tower.name: _single_tower(model.text, tower)
            for tower in of.architecture.towers
            if tower.name in model.text.towers
        }
    return parts


def _single_tower(text: TextEncoder, tower: Tower) -> dict[str, Tensor]:
    reader = text.params.readers[tower.name]
    if why := reader.single_file_problem(tower.name, text.tokenizers.get(tower.name), tower.reader):
        raise ValueError(why)
    return published(
        text.towers[tower.name], tower.layout or reader.NETWORK.single(reader.network), reader.NETWORK
    )


def _metadata(model: Model) -> dict[str, str]:
    """The metadata of single files: the prediction, and for this library the settings that no tensor
    shows."""
    name = PREDICTIONS_LDM.get(model.prediction.name)
    settings = {key: model.spec[key] for key in SETTINGS if key in model.spec}
    ours = (
        {FAMILY_KEY: model.spec["family"], SETTINGS_KEY: native.as_text("model", settings)}
        if "family" in model.spec
        else {}
    )
    return ours | ({"modelspec.prediction_type": name} if name else {})


def _marker_tensors(model: Model, of: Family) -> dict[str, Tensor]:
    """What tells readers of single files a prediction and a schedule. ValueError where they would take it for
    another."""
    schedule = {**of.schedule, **model.spec["schedule"]}
    ends_in_noise = schedule.pop("zero_terminal_snr", False)
    table = {} if schedule == of.schedule else write_table(model.schedule, of.schedule)
    if (schedule != of.schedule and not table) or model.prediction.name not in (
        *PREDICTIONS_LDM,
        of.prediction,
    ):
        raise ValueError(
            f"single files do not say schedule {model.spec['schedule']} and prediction "
            f"{model.prediction.name!r}: use another layout"
        )
    if (grid := model.spec.get("grid", of.grid)) != of.grid and model.prediction.name == "flow":
        raise ValueError(
            f"single files do not say which times are visited, here {grid}: use layout='diffusers' or "
            "'native'"
        )
    marks = [V_MARK] * (of.architecture.marks_v and model.prediction.name == "v") + [SNR_MARK] * ends_in_noise
    return table | {mark: torch.tensor([]) for mark in marks}


def _latent_statistics(p: Any, usual: Any) -> dict[str, Tensor]:
    """Mean and standard deviation of latents that are scaled by them. ValueError for a scale that readers
    would not know."""
    if not isinstance(p, VAEParams):
        return {}
    if (p.scale, p.shift) != (usual.scale, usual.shift):
        raise ValueError(
            f"single files do not say how latents are scaled, here by {p.scale:g}: use another layout"
        )
    if p.mean is None or p.std is None:
        return {}
    return {
        key: torch.tensor(values)[None, :, None, None]
        for key, values in zip(LATENT_STATISTICS, (p.mean, p.std), strict=True)
    }


def _unused_block(model: Model, tower: Tower, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The last block of an encoder that is never read, where the model lacks it, as zeros: readers of this
    layout count on it."""
    reader: Any = model.require("text").params.readers[tower.name]
    layers = reader.network.layers
    if reader.skip:
        return {}
    last, new = (f"{tower.prefix}transformer.resblocks.{i}." for i in (layers - 1, layers))
    return {
        key.replace(last, new): torch.zeros_like(value)
        for key, value in tensors.items()
        if key.startswith(last)
    }
