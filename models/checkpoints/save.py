"""`save`: a model in the layout of one's choice, the exact inverse of `load`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion.spec import check_names, lookup
from models.checkpoints import clip_keys, diffusers_configs, native, taesd_keys, unet_keys, vae_keys
from models.checkpoints.parts import LATENT_STATISTICS
from models.checkpoints.table import Layout, scatter
from models.clip import CLIPTextParams
from models.families import FAMILIES, base_of
from models.files import replacing, write_json
from models.model import Model
from models.tokenizer import vocabulary
from models.unet import UNet

LAYOUTS = ("native", "ldm", "diffusers")
TOWERS_LDM = {
    "sd1": {"clip_l": "cond_stage_model.transformer."},
    "sd2": {"clip_h": "cond_stage_model.model."},
    "sdxl": {"clip_l": "conditioner.embedders.0.transformer.", "clip_g": "conditioner.embedders.1.model."},
    "sdxl-refiner": {"clip_g": "conditioner.embedders.0.model."},
}


def save(
    model: Model, path: str | Path, layout: Literal["native", "ldm", "diffusers"] = "native", dtype: torch.dtype | None = None
) -> None:
    """Write a model.

    layout  "native": one file of ours, which says itself what it holds; "ldm": the single file of SD and SDXL that most tools open;
            "diffusers": a folder with a sub-folder per part, which diffusers' from_pretrained opens
    dtype   of the weights in the files; None: as they are
    Raises OSError where the place cannot be written, ValueError for a model that the layout has no names for.
    """
    check_names("layout", [layout], LAYOUTS)
    if layout == "native":
        native.write(path, _cast(model.state_dict(), dtype), {"model": model.spec})
        return
    if model.backbone is not None and not isinstance(model.backbone, UNet):
        raise ValueError(
            f"the layout {layout!r} is for published UNets, and this model's backbone is a {type(model.backbone).__name__}: use 'native'"
        )
    {"ldm": _save_ldm, "diffusers": _save_diffusers}[layout](model, Path(path), dtype)


def _save_ldm(model: Model, path: Path, dtype: torch.dtype | None) -> None:
    tensors: dict[str, Tensor] = {}
    if isinstance(model.backbone, UNet):
        tensors |= _published("model.diffusion_model.", unet_keys.ldm(model.backbone.params), model.backbone)
    if model.vae is not None:
        tensors |= _published("first_stage_model.", vae_keys.ldm(model.vae.params), model.vae)
        if model.vae.params.mean is not None:
            statistics = zip(LATENT_STATISTICS, (model.vae.params.mean, model.vae.params.std), strict=True)
            tensors |= {key: torch.tensor(values)[None, :, None, None] for key, values in statistics}
    if model.text is not None:
        for name, prefix in TOWERS_LDM[_base(model)].items():
            tower = model.text.tower(name)
            layout = clip_keys.openclip() if prefix.endswith(".model.") else clip_keys.transformers()
            tensors |= _published(prefix, layout, tower)
            if name == "clip_h" and _used_blocks(model, name) == tower.params.layers:
                tensors |= _unused_block(prefix, tensors, tower.params.layers)
    if model.preview is not None and len(model.parts) == 1:
        tensors |= _published("", taesd_keys.diffusers(), model.preview)
    said = {"eps": "epsilon"}.get(model.prediction.name, model.prediction.name)
    native.write_tensors(path, _cast(tensors, dtype), {"format": "pt", "modelspec.prediction_type": said})


def _unused_block(prefix: str, tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """OpenCLIP's last block, which SD 2 has no use for and diffusers' folders lack, as zeros: readers of this layout count on it."""
    last, new = f"{prefix}transformer.resblocks.{layers - 1}.", f"{prefix}transformer.resblocks.{layers}."
    return {key.replace(last, new): torch.zeros_like(value) for key, value in tensors.items() if key.startswith(last)}


def _save_diffusers(model: Model, folder: Path, dtype: torch.dtype | None) -> None:
    parts: dict[str, tuple[str, str]] = {}
    writing: list[tuple[str, str, dict[str, Any], dict[str, Tensor]]] = []  # sub-folder, file, config, tensors
    weights = "diffusion_pytorch_model.safetensors"
    if isinstance(model.backbone, UNet):
        p = model.backbone.params
        writing.append(
            ("unet", weights, diffusers_configs.unet(p, model.shape[-1]), _published("", unet_keys.diffusers(p), model.backbone))
        )
        parts |= {"unet": ("diffusers", "UNet2DConditionModel")}
    if model.vae is not None:
        v = model.vae.params
        writing.append(("vae", weights, diffusers_configs.vae(v), _published("", vae_keys.diffusers(v), model.vae)))
        parts |= {"vae": ("diffusers", "AutoencoderKL")}
    for use in model.text.params.uses if model.text is not None else ():
        place = "text_encoder_2" if use.tower == "clip_g" else "text_encoder"
        params, tensors = _text_tower(model, use.tower)
        writing.append((place, "model.safetensors", diffusers_configs.text(params), tensors))
        parts |= {place: ("transformers", diffusers_configs.text_class(params))}
        parts |= {place.replace("text_encoder", "tokenizer"): ("transformers", "CLIPTokenizer")}
        _save_tokenizer(folder / place.replace("text_encoder", "tokenizer"), use.pad, params.length)
    if model.preview is not None and not parts:
        tiny = _published("", taesd_keys.diffusers(), model.preview)
        writing.append(("", weights, diffusers_configs.taesd(model.preview.params), tiny))
    for place, file, config, tensors in writing:
        native.write_tensors(folder / place / file, _cast(tensors, dtype), {"format": "pt"})
        write_json(folder / place / "config.json", config)
    if "unet" in parts:
        config = diffusers_configs.scheduler(model)
        write_json(folder / "scheduler" / "scheduler_config.json", config)
        parts |= {"scheduler": ("diffusers", config["_class_name"])}
        write_json(folder / "model_index.json", diffusers_configs.index(model, _base(model), parts))


def _text_tower(model: Model, name: str) -> tuple[CLIPTextParams, dict[str, Tensor]]:
    """A tower as diffusers' folders have it: SD 2's ends with the last block that is used, and only SDXL's second has a projection."""
    assert model.text is not None
    tower = model.text.tower(name)
    params, state = tower.params, tower.state_dict()
    used = _used_blocks(model, name) if name == "clip_h" else params.layers
    params = replace(params, layers=used, projection=params.projection if name == "clip_g" else None)
    unused = tuple(f"blocks.{i}." for i in range(used, tower.params.layers)) + ("projection.",) * (params.projection is None)
    state = {key: value for key, value in state.items() if not key.startswith(unused)}
    return params, scatter(clip_keys.transformers().table(state), state)


def _used_blocks(model: Model, name: str) -> int:
    assert model.text is not None
    return next(use.blocks for use in model.text.params.uses if use.tower == name)


def _save_tokenizer(folder: Path, pad: int, length: int) -> None:
    ids, merges = vocabulary()
    write_json(folder / "vocab.json", ids)
    with replacing(folder / "merges.txt") as temporary:
        temporary.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    name = {number: token for token, number in ids.items()}[pad]
    write_json(folder / "tokenizer_config.json", diffusers_configs.tokenizer(name, length))


def _base(model: Model) -> str:
    """sd1, sd2, sdxl or sdxl-refiner."""
    if family := model.spec.get("family"):
        return lookup("family", family, FAMILIES).base
    if isinstance(model.backbone, UNet):
        return base_of(model.backbone.params)
    raise ValueError("this model is of no published family: use layout='native'")


def _published(prefix: str, layout: Layout, network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    return {prefix + key: value for key, value in scatter(layout.table(state), state).items()}


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {key: value.to(dtype or value.dtype) for key, value in tensors.items()}
