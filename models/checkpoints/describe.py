"""From the parts found in files to the description of a model: which family it is of, and what follows from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from diffusion.spec import lookup
from models.checkpoints.parts import LATENT_STATISTICS, Part
from models.checkpoints.tensors import TensorFile
from models.clip import CLIP_H, CLIPTextParams
from models.families import FAMILIES, TOWERS, Family, base_of, description, recipe
from models.text import NUMBER_DIM, TextParams
from models.unet import UNetParams

V_THRESHOLD = 0.09  # see `_predicts_v`


@dataclass
class Findings:
    """What `describe` decides from.

    parts      by kind; text towers in the order of their files
    files      every file opened
    scheduler  a pipeline's scheduler configuration
    notes      filled on the way: what was settled otherwise than by keys and shapes
    """

    backbone: Part | None
    vae: Part | None
    preview: Part | None
    towers: list[Part]
    files: list[TensorFile]
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def describe(found: Findings, family: str | None, prediction: str | None) -> tuple[dict[str, Any], dict[str, Part]]:
    """The model's description, and the text towers by name. ValueError where the family does not fit the parts."""
    base = _base(found)
    name = _family(found, base, family)
    of = lookup("family", name, FAMILIES)
    if of.base != base:
        raise ValueError(f"{found.files[0].path} is built like {base}, so it cannot be of the family {name}, which is built like {of.base}")
    towers = _towers(found, base)
    network, preview = (part.params if part else None for part in (found.backbone, found.preview))
    text = _text_params(base, towers, found)
    spec = description(name, network, _vae_params(found, of, family) if found.vae else None, text, preview)
    if prediction:
        spec["prediction"] = prediction
        found.notes.append(f"predicts {prediction}, as asked for")
    if _marked(found.files, "ztsnr") or found.scheduler.get("rescale_betas_zero_snr"):
        spec["schedule"]["zero_terminal_snr"] = True
        found.notes.append("the schedule ends in pure noise (zero terminal SNR), as a mark beside the weights says")
    return spec, towers if text else {}


def _base(found: Findings) -> str:
    """sd1, sd2, sdxl or sdxl-refiner."""
    if found.backbone:
        if not isinstance(found.backbone.params, UNetParams):
            raise ValueError(f"{found.backbone.file.path} holds a backbone that is no UNet")
        return base_of(found.backbone.params)
    widths = [part.params.width for part in found.towers]
    if len(widths) > 1:
        return "sdxl"
    return {1024: "sd2", 1280: "sdxl-refiner"}.get(widths[0], "sd1") if widths else "sd1"


def _family(found: Findings, base: str, asked: str | None) -> str:
    """The family: the one asked for, or what marks in the files and configurations say, or the plain one of that structure."""
    if asked:
        found.notes.append(f"of the family {asked}, as asked for")
        return asked
    if all(_marked(found.files, key) for key in LATENT_STATISTICS) or str(found.scheduler.get("_class_name", "")).startswith("EDM"):
        return "playground-v2.5" if base == "sdxl" else base
    embedded = found.backbone is not None and found.backbone.params.guidance_dim is not None
    if (embedded or found.scheduler.get("_class_name") == "LCMScheduler") and base in ("sd1", "sdxl"):
        return "lcm" if base == "sd1" else "lcm-sdxl"
    if base in ("sd2", "sdxl") and found.backbone and _predicts_v(found, base):
        return f"{base}-v"
    return base


def _predicts_v(found: Findings, base: str) -> bool:
    """Whether the network predicts v: said by a scheduler configuration or a mark, else, for SD 2, guessed, which is noted.

    The guess is the one that other tools use: the last attention block's first bias is spread wider in v-models than in eps-models; and
    the step at which training stopped is that of SD 2's base model.
    """
    if said := found.scheduler.get("prediction_type"):
        found.notes.append(f"predicts {'v' if said == 'v_prediction' else 'eps'}, as its scheduler's configuration says")
        return said == "v_prediction"
    if any(_marked(found.files, key) for key in ("v_pred", "edm_vpred.sigma_max")):
        found.notes.append("predicts v, as a mark beside the weights says")
        return True
    for file in found.files:
        if said := file.metadata.get("modelspec.prediction_type"):
            found.notes.append(f"predicts {'v' if said == 'v' else 'eps'}, as the file's metadata says")
            return said == "v"
    if base != "sd2" or not found.backbone:
        return False
    if any(file.numbers.get("global_step") == 875_000 for file in found.files):
        found.notes.append("predicts eps, since its training stopped where SD 2's base model's did; prediction='v' overrides that")
        return False
    key = next(key for key in reversed(list(found.backbone.stored)) if key.endswith("transformer_blocks.0.norm1.bias"))
    bias = torch.empty(found.backbone.stored[key].shape)
    found.backbone.stored[key].read_into(bias)
    spread = float(bias.std())
    guess = "v" if spread > V_THRESHOLD else "eps"
    found.notes.append(f"predicts {guess}: guessed, {key} has the standard deviation {spread:.3f}; prediction=... overrides that")
    return guess == "v"


def _marked(files: list[TensorFile], key: str) -> bool:
    return any(key in file.tensors for file in files)


def _vae_params(found: Findings, of: Family, asked: str | None) -> Any:
    """With the scale of the latents, which no tensor tells: from a configuration or Playground's tensors, else the family's."""
    part = found.vae
    assert part is not None
    if not found.backbone and not asked and "scaling_factor" not in part.hints:
        found.notes.append(f"latents are scaled by {of.scale:g}, as in {of.title}: family=... chooses another one's")
    scale, mean, std = of.scale, of.mean, of.std
    for file in found.files:
        if all(key in file.tensors for key in LATENT_STATISTICS):
            mean, std = (_numbers(file, key) for key in LATENT_STATISTICS)
    if part.hints.get("scaling_factor"):
        scale = float(part.hints["scaling_factor"])
        mean, std = (tuple(part.hints[key]) if part.hints.get(key) else None for key in ("latents_mean", "latents_std"))
    return replace(part.params, scale=scale, mean=mean, std=std)


def _numbers(file: TensorFile, key: str) -> tuple[float, ...]:
    values = torch.empty(file.tensors[key].shape)
    file.tensors[key].read_into(values)
    return tuple(round(value, 6) for value in values.flatten().tolist())


def _towers(found: Findings, base: str) -> dict[str, Part]:
    """The text towers by name. SDXL's two are told apart by their projection, which only the one for the pooled vector needs."""
    names = TOWERS[base]
    if len(found.towers) > len(names):
        raise ValueError(f"{found.towers[-1].file.path} holds one text encoder too many: {base} has {len(names)}")
    if base != "sdxl":
        return dict(zip(names, found.towers, strict=False))
    named = {}
    vector = found.backbone.params.vector_dim if found.backbone else None
    for part in found.towers:
        params = part.params
        pooled = params.projection is not None and (params.width != 768 if vector is None else params.projection == vector - 6 * NUMBER_DIM)
        if (name := "clip_g" if pooled else "clip_l") in named:
            raise ValueError(f"{part.file.path} holds a second {name}: SDXL has one CLIP-L and one OpenCLIP bigG")
        named[name] = part
    return named


def _text_params(base: str, towers: Mapping[str, Part], found: Findings) -> TextParams | None:
    """The family's recipe for its towers, None where one of them is not there."""
    if missing := [name for name in TOWERS[base] if name not in towers]:
        if towers:
            found.notes.append(f"text encoders left out: {', '.join(towers)} is there, but {', '.join(missing)} is not")
        return None
    params = {name: _activated(name, towers[name]) for name in TOWERS[base]}
    return recipe(base, params, _sd2_blocks(found.towers[0]) if base == "sd2" else 0)


def _sd2_blocks(part: Part) -> int:
    """The last state but one: OpenCLIP's layout holds all 24 blocks, the last of them unused, diffusers' only the 23."""
    layers: int = part.params.layers
    return layers - 1 if part.layout.name == "openclip" or layers == CLIP_H.layers else layers


def _activated(name: str, part: Part) -> CLIPTextParams:
    """OpenCLIP's towers have gelu in every layout; a tower of OpenAI's has quick_gelu. A config.json has the last word."""
    params: CLIPTextParams = part.params
    if "hidden_act" in part.hints:
        return params
    return replace(params, activation="quick_gelu" if name == "clip_l" else "gelu")
