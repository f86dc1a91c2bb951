"""Single files, of all parts (latent diffusion's, Stability AI's, ComfyUI's) or of one each, as their publishers write them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoints import clip_keys, native, t5_keys, taesd_keys, vae_keys
from models.checkpoints.diffusers_configs import FAMILY_KEY, SETTINGS, SETTINGS_KEY
from models.checkpoints.parts import LATENT_STATISTICS
from models.checkpoints.tensors import SAFETENSORS
from models.checkpoints.vocabulary import write_tokenizer
from models.checkpoints.written import BACKBONES, built_like, check_text, in_dtype, published, use_of
from models.checkpoints.written_schedule import write_table
from models.families import FAMILIES, Family
from models.model import Model
from models.t5 import T5
from models.text import TextEncoder
from models.tokenizer import EOS
from models.vae import VAEParams

TOWERS_LDM = {
    "sd1": {"clip_l": "cond_stage_model.transformer."},
    "sd2": {"clip_h": "cond_stage_model.model."},
    "sdxl": {"clip_l": "conditioner.embedders.0.transformer.", "clip_g": "conditioner.embedders.1.model."},
    "sdxl-refiner": {"clip_g": "conditioner.embedders.0.model."},
}
TOWERS_FLOW = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}  # as single files of flows name them
PREDICTIONS_LDM = {"eps": "epsilon", "v": "v"}  # as the metadata of single files call them
V_MARK = "v_pred"  # among the tensors


def save_ldm(model: Model, path: Path, dtype: torch.dtype | None) -> None:
    if path.suffix not in SAFETENSORS:
        raise ValueError(f"{path} is to be a single file, which readers know by its ending: name it {path.name}.safetensors")
    base = built_like(model) if model.parts.keys() - {"preview"} else ""
    prefixes = {"backbone": "model.diffusion_model.", "vae": "vae." if base.startswith("flux") else "first_stage_model.", "preview": ""}
    parts = _single_parts(model, base)
    if len(parts) > 1:  # with no place for it
        parts.pop("preview", None)
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        tensors |= _prefixed(prefixes[name] if name in prefixes else _tower_prefix(base, name), part)
    if "clip_h" in parts and use_of(model, "clip_h").blocks == (layers := model.require("text").tower("clip_h").params.layers):
        tensors |= _unused_block(TOWERS_LDM[base]["clip_h"], tensors, layers)
    tensors = in_dtype(tensors, dtype)
    if model.backbone is not None:
        tensors |= _marker_tensors(model, base)
    if model.vae is not None:
        tensors |= _latent_statistics(model.vae.params, FAMILIES[model.spec.get("family", base)])
    native.write_tensors(path, tensors, {"format": "pt", **_metadata(model)})


def save_separate(model: Model, folder: Path, dtype: torch.dtype | None) -> None:
    base = built_like(model)
    if model.backbone is not None and (marks := _marker_tensors(model, base)):
        what = "what the network predicts" if V_MARK in marks else f"the schedule {model.spec['schedule']}"
        raise ValueError(f"separate files do not say {what}: use another layout")
    if model.vae is not None and _latent_statistics(model.vae.params, FAMILIES[model.spec.get("family", base)]):
        raise ValueError("separate files do not say how latents are scaled: use another layout")
    names = {"backbone": model.spec.get("family", base), **TOWERS_FLOW}
    for name, part in _single_parts(model, base).items():
        file = folder / f"{names.get(name, name)}.safetensors"
        native.write_tensors(file, in_dtype(part, dtype), {"format": "pt", **(_metadata(model) if name == "backbone" else {})})
    if model.text is not None and model.text.t5_tokenizer is not None:
        write_tokenizer(model.text.t5_tokenizer, folder)


def _single_parts(model: Model, base: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of every part, towers by their names, as single files hold them but for what stands before their keys."""
    parts: dict[str, dict[str, Tensor]] = {}
    if model.backbone is not None:
        of = BACKBONES[type(model.backbone)]
        parts["backbone"] = published(model.backbone, of.single(model.backbone.params), of.recognise)
    if model.vae is not None:
        parts["vae"] = published(model.vae, vae_keys.ldm(model.vae.params), vae_keys.recognise)
    if model.text is not None:
        _check_words(model.text)
        check_text(model, base, set())
    for name in model.text.towers if model.text is not None else ():
        parts[name] = _single_tower(model, base, name)
    if model.preview is not None:
        parts["preview"] = published(model.preview, taesd_keys.diffusers(), taesd_keys.recognise)
    return parts


def _check_words(text: TextEncoder) -> None:
    """ValueError for vocabularies that single files have no place for."""
    if text.params.tokens is not None:
        raise ValueError(f"single files do not say that {text.params.tokens} tokens are read at once: use layout='diffusers' or 'native'")
    for name, tokenizer in text.tokenizers.items():
        words = ", ".join(token.content for token in tokenizer.vocabulary.added if not token.special) or "all of it"
        raise ValueError(f"single files cannot hold the own words of {name} ({words:.100}): use layout='diffusers' or 'native'")
    for name, tower in text.params.towers.items():
        if tower.vocab > EOS + 1:
            raise ValueError(f"single files do not say which {tower.vocab} tokens {name} knows: use layout='diffusers' or 'native'")


def _tower_prefix(base: str, name: str) -> str:
    return TOWERS_LDM[base][name] if base in TOWERS_LDM else f"text_encoders.{TOWERS_FLOW[name]}.transformer."


def _single_tower(model: Model, base: str, name: str) -> dict[str, Tensor]:
    tower = model.require("text").towers[name]
    if isinstance(tower, T5):
        return published(tower, t5_keys.transformers(), t5_keys.recognise)
    if tower.params.activation != (activation := "quick_gelu" if name == "clip_l" else "gelu"):
        raise ValueError(f"readers of single files compute {name} with {activation}, not {tower.params.activation}: use another layout")
    use = use_of(model, name)
    if name == "clip_l" and use.pooled and use.projected and tower.params.projection is not None:
        raise ValueError("readers of single files leave CLIP-L's pooled output as it is, here it is projected: use another layout")
    layout = clip_keys.openclip() if _tower_prefix(base, name).endswith(".model.") else clip_keys.transformers()
    return published(tower, layout, clip_keys.recognise)


def _metadata(model: Model) -> dict[str, str]:
    """The metadata of single files: the prediction, and for this library the settings that no tensor shows."""
    name = PREDICTIONS_LDM.get(model.prediction.name)
    settings = {key: model.spec[key] for key in SETTINGS if key in model.spec}
    ours = {FAMILY_KEY: model.spec["family"], SETTINGS_KEY: native.as_text("model", settings)} if "family" in model.spec else {}
    return ours | ({"modelspec.prediction_type": name} if name else {})


def _marker_tensors(model: Model, base: str) -> dict[str, Tensor]:
    """What tells readers of single files a prediction and a schedule. ValueError where they would take it for another."""
    of = FAMILIES[model.spec.get("family", base)]
    schedule = {**of.schedule, **model.spec["schedule"]}
    ends_in_noise = schedule.pop("zero_terminal_snr", False)
    table = {} if schedule == of.schedule else write_table(model.schedule, of.schedule)
    if (schedule != of.schedule and not table) or model.prediction.name not in (*PREDICTIONS_LDM, of.prediction):
        raise ValueError(
            f"single files do not say schedule {model.spec['schedule']} and prediction {model.prediction.name!r}: use another layout"
        )
    if (grid := model.spec.get("grid", of.grid)) != of.grid and model.prediction.name == "flow":
        raise ValueError(f"single files do not say which times are visited, here {grid}: use layout='diffusers' or 'native'")
    v = model.prediction.name == "v" and base.startswith("sdxl")
    return table | {mark: torch.tensor([]) for mark, set_ in ((V_MARK, v), ("ztsnr", ends_in_noise)) if set_}


def _latent_statistics(p: VAEParams, of: Family) -> dict[str, Tensor]:
    """Playground's two tensors, or none. ValueError for a scale that readers of single files would not know."""
    if (p.scale, p.shift) != (of.scale, of.shift):
        raise ValueError(f"single files do not say how latents are scaled, here by {p.scale:g}: use another layout")
    if p.mean is None or p.std is None:
        return {}
    return {key: torch.tensor(values)[None, :, None, None] for key, values in zip(LATENT_STATISTICS, (p.mean, p.std), strict=True)}


def _unused_block(prefix: str, tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """OpenCLIP's last block, which SD 2 has no use for and diffusers' folders lack, as zeros: readers of this layout count on it."""
    last, new = f"{prefix}transformer.resblocks.{layers - 1}.", f"{prefix}transformer.resblocks.{layers}."
    return {key.replace(last, new): torch.zeros_like(value) for key, value in tensors.items() if key.startswith(last)}


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}
