"""`save`: a model in the layout of one's choice, the exact inverse of `load`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion.spec import check_names, lookup
from models.checkpoints import clip_keys, diffusers_configs, native, taesd_keys, unet_keys, vae_keys
from models.checkpoints.folder import PREVIEW
from models.checkpoints.parts import LATENT_STATISTICS
from models.checkpoints.table import Layout, check_dtype, scatter
from models.checkpoints.tensors import SAFETENSORS
from models.checkpoints.unet_keys import Shapes
from models.clip import CLIPTextParams
from models.families import FAMILIES, base_of
from models.files import replacing, write_json
from models.model import Model
from models.tokenizer import vocabulary
from models.unet import UNet, UNetParams
from models.vae import VAEParams

Recognise = Callable[[Shapes, Mapping[str, Any]], tuple[Any, Layout] | None]
LAYOUTS = ("native", "ldm", "diffusers")
TOWERS_LDM = {
    "sd1": {"clip_l": "cond_stage_model.transformer."},
    "sd2": {"clip_h": "cond_stage_model.model."},
    "sdxl": {"clip_l": "conditioner.embedders.0.transformer.", "clip_g": "conditioner.embedders.1.model."},
    "sdxl-refiner": {"clip_g": "conditioner.embedders.0.model."},
}
PLACES = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}  # of text towers in diffusers' folders
PREDICTIONS_LDM = {"eps": "epsilon", "v": "v"}  # as the metadata of single files call them


def save(
    model: Model, path: str | Path, layout: Literal["native", "ldm", "diffusers"] = "native", dtype: torch.dtype | None = None
) -> None:
    """Write a model.

    layout  "native": one file of ours, which says itself what it holds; "ldm": the single file of SD and SDXL that most tools open,
            with no place for a preview; "diffusers": a folder with a sub-folder per part, which diffusers' from_pretrained opens
    dtype   of the weights in the files; None: as they are
    Raises OSError where the place cannot be written, ValueError for a model that readers of the layout would take for another.
    """
    check_names("layout", [layout], LAYOUTS)
    check_dtype(dtype, ())
    if layout == "native":
        native.write(path, _cast(model.state_dict(), dtype), {"model": model.spec})
        return
    if model.backbone is not None and not (isinstance(model.backbone, UNet) and model.backbone.params.context_dim):
        kind = type(model.backbone).__name__
        raise ValueError(f"the layout {layout!r} is for UNets that are told a text, which this {kind} is not: use layout='native'")
    {"ldm": _save_ldm, "diffusers": _save_diffusers}[layout](model, Path(path), dtype)


def _save_ldm(model: Model, path: Path, dtype: torch.dtype | None) -> None:
    tensors: dict[str, Tensor] = {}
    base = _base(model) if model.parts.keys() - {"preview"} else ""
    if isinstance(model.backbone, UNet):
        published = _published(model.backbone, unet_keys.ldm(model.backbone.params), unet_keys.recognise)
        tensors |= _prefixed("model.diffusion_model.", published) | _marks(model, base)
    if model.vae is not None:
        tensors |= _prefixed("first_stage_model.", _published(model.vae, vae_keys.ldm(model.vae.params), vae_keys.recognise))
        tensors |= _latent_statistics(model.vae.params, FAMILIES[model.spec.get("family", base)].scale)
    for name in model.text.towers if model.text is not None else ():
        tensors |= _tower_ldm(model, name, TOWERS_LDM[base][name])
    if model.preview is not None and not tensors:
        tensors |= _published(model.preview, taesd_keys.diffusers(), taesd_keys.recognise)
    said = {"modelspec.prediction_type": PREDICTIONS_LDM[model.prediction.name]} if model.prediction.name in PREDICTIONS_LDM else {}
    if path.suffix not in SAFETENSORS:
        raise ValueError(f"{path} is to be a single file, which readers know by its ending: name it {path.name}.safetensors")
    native.write_tensors(path, _cast(tensors, dtype), {"format": "pt", **said})


def _tower_ldm(model: Model, name: str, prefix: str) -> dict[str, Tensor]:
    assert model.text is not None
    tower = model.text.tower(name)
    if tower.params.activation != (activation := "quick_gelu" if name == "clip_l" else "gelu"):
        raise ValueError(f"readers of the layout 'ldm' compute {name} with {activation}, not {tower.params.activation}")
    layout = clip_keys.openclip() if prefix.endswith(".model.") else clip_keys.transformers()
    tensors = _prefixed(prefix, _published(tower, layout, clip_keys.recognise))
    if name == "clip_h" and _used_blocks(model, name) == tower.params.layers:
        tensors |= _unused_block(prefix, tensors, tower.params.layers)
    return tensors


def _marks(model: Model, base: str) -> dict[str, Tensor]:
    """What tells readers of single files a prediction and a schedule. ValueError where they would take it for another."""
    of = FAMILIES[model.spec.get("family", base)]
    schedule = {**of.schedule, **model.spec["schedule"]}
    ends_in_noise = schedule.pop("zero_terminal_snr", False)
    if schedule != of.schedule or model.prediction.name not in (*PREDICTIONS_LDM, of.prediction):
        raise ValueError(
            f"single files do not say schedule {model.spec['schedule']} and prediction {model.prediction.name!r}: use another layout"
        )
    v = model.prediction.name == "v" and base.startswith("sdxl")
    return {mark: torch.tensor([]) for mark, set_ in (("v_pred", v), ("ztsnr", ends_in_noise)) if set_}


def _latent_statistics(p: VAEParams, scale: float) -> dict[str, Tensor]:
    """Playground's two tensors, or none. ValueError for a scale that readers of single files would not know."""
    if (p.scale, p.shift) != (scale, 0.0):
        raise ValueError(f"single files do not say how latents are scaled, here by {p.scale:g}: use another layout")
    if p.mean is None or p.std is None:
        return {}
    return {key: torch.tensor(values)[None, :, None, None] for key, values in zip(LATENT_STATISTICS, (p.mean, p.std), strict=True)}


def _unused_block(prefix: str, tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """OpenCLIP's last block, which SD 2 has no use for and diffusers' folders lack, as zeros: readers of this layout count on it."""
    last, new = f"{prefix}transformer.resblocks.{layers - 1}.", f"{prefix}transformer.resblocks.{layers}."
    return {key.replace(last, new): torch.zeros_like(value) for key, value in tensors.items() if key.startswith(last)}


def _save_diffusers(model: Model, folder: Path, dtype: torch.dtype | None) -> None:
    for place, (file, _, tensors) in _diffusers_parts(model).items():
        native.write_tensors(folder / place / file, _cast(tensors, dtype), {"format": "pt"})
    write_configs(model, folder)


def write_configs(model: Model, folder: Path) -> None:
    """All of a diffusers folder but the weights, which the model need not have: configurations, tokenizers and the index."""
    found = _diffusers_parts(model)
    classes = {place: diffusers_configs.class_of(config) for place, (_, config, _) in found.items() if place not in ("", PREVIEW)}
    for place, (_, config, _) in found.items():
        write_json(folder / place / "config.json", config)
    if model.text is not None:
        for use in model.text.params.uses:
            place = PLACES[use.tower].replace("text_encoder", "tokenizer")
            _save_tokenizer(folder / place, use.pad, model.text.params.length)
            classes[place] = ("transformers", "CLIPTokenizer")
    if model.backbone is not None:
        config = diffusers_configs.scheduler(model)
        write_json(folder / "scheduler" / "scheduler_config.json", config)
        classes["scheduler"] = ("diffusers", config["_class_name"])
        write_json(folder / "model_index.json", diffusers_configs.index(model, _base(model), classes))


def _diffusers_parts(model: Model) -> dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """By sub-folder: the file of the weights, the configuration, and the tensors."""
    file = "diffusion_pytorch_model.safetensors"
    parts: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {}
    if isinstance(model.backbone, UNet):
        config = diffusers_configs.unet(model.backbone.params, model.shape[-1])
        layout = unet_keys.diffusers(model.backbone.params)
        parts["unet"] = (file, config, _published(model.backbone, layout, unet_keys.recognise, config))
    if model.vae is not None:
        config = diffusers_configs.vae(model.vae.params)
        layout = vae_keys.diffusers(model.vae.params)
        parts["vae"] = (file, config, _published(model.vae, layout, vae_keys.recognise, config))
    for use in model.text.params.uses if model.text is not None else ():
        params, tensors = _text_tower(model, use.tower)
        parts[PLACES[use.tower]] = ("model.safetensors", diffusers_configs.text(params), tensors)
    if model.preview is not None:
        config = diffusers_configs.taesd(model.preview.params)
        tensors = _published(model.preview, taesd_keys.diffusers(), taesd_keys.recognise)
        parts[PREVIEW if parts else ""] = (file, config, tensors)
    return parts


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
    texts = {"vocab.json": json.dumps(ids), "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)}
    for file, text in texts.items():
        with replacing(folder / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    name = {number: token for token, number in ids.items()}[pad]
    write_json(folder / "tokenizer_config.json", diffusers_configs.tokenizer(name, length))


def _base(model: Model) -> str:
    """sd1, sd2, sdxl or sdxl-refiner."""
    if family := model.spec.get("family"):
        return lookup("family", family, FAMILIES).base
    if isinstance(model.backbone, UNet):
        return base_of(model.backbone.params)
    raise ValueError("this model is of no published family: use layout='native'")


def _published(network: nn.Module, layout: Layout, recognise: Recognise, config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The network's tensors under their published names. ValueError unless a reader makes the same network of them."""
    state = network.state_dict()
    tensors = scatter(layout.table(state), state)
    try:
        read = recognise({key: tuple(value.shape) for key, value in tensors.items()}, config or {})
    except (KeyError, IndexError, ValueError):
        read = None
    mine, theirs = _structure(network.params), _structure(read[0]) if read else {}
    for name, value in mine.items():
        if theirs.get(name, "no network of theirs") != value:
            kind = type(network).__name__
            raise ValueError(
                f"the layout {layout.name!r} has no words for a {kind} with {name}={value}, and readers would take it for "
                f"{theirs.get(name, 'none of theirs')}: use layout='native'"
            )
    return tensors


def _structure(params: Any) -> dict[str, Any]:
    """What of a network's parameters a reader has to find out from its tensors."""
    known = asdict(params)
    for name in ("dropout", "activation", "scale", "shift", "mean", "std"):
        known.pop(name, None)
    if isinstance(params, UNetParams):  # which fix either of two
        known |= {"heads": [params.heads_of(params.channels * m) for m in params.channel_mult], "head_dim": None}
    return known


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {key: value.to(dtype or value.dtype) for key, value in tensors.items()}
