"""`save`: a model in the layout of one's choice, the exact inverse of `load`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from diffusion.spec import check_names, lookup
from models.checkpoints import clip_keys, diffusers_configs, flux_keys, native, sd3_keys, t5_keys, taesd_keys, unet_keys, vae_keys
from models.checkpoints.folder import PREVIEW
from models.checkpoints.parts import LATENT_STATISTICS
from models.checkpoints.table import Layout, check_dtype, scatter
from models.checkpoints.tensors import SAFETENSORS
from models.checkpoints.unet_keys import Shapes
from models.checkpoints.vocabulary import write_tokenizer
from models.families import FAMILIES, TOWERS, Family, base_of
from models.files import replacing, write_json
from models.flux import Flux
from models.model import Model
from models.packed import is_packed
from models.recipes import TowerUse
from models.sd3 import SD3
from models.streaming import is_streamed
from models.t5 import T5
from models.text import TextEncoder
from models.tokenizer import vocabulary
from models.unet import UNet, UNetParams
from models.vae import VAEParams

Recognise = Callable[[Shapes, Mapping[str, Any]], tuple[Any, Layout] | None]


class Backbone(NamedTuple):
    """How a kind of network is written: in its publisher's single file, and in diffusers' folders, where it has a configuration."""

    single: Callable[[Any], Layout]
    diffusers: Callable[[Any], Layout]
    recognise: Recognise
    config: Callable[[Any, int], dict[str, Any]]
    folder: str = "transformer"


BACKBONES: dict[type[nn.Module], Backbone] = {
    UNet: Backbone(unet_keys.ldm, unet_keys.diffusers, unet_keys.recognise, diffusers_configs.unet, "unet"),
    Flux: Backbone(lambda _: flux_keys.bfl(), flux_keys.diffusers, flux_keys.recognise, lambda p, _: diffusers_configs.flux(p)),
    SD3: Backbone(lambda _: sd3_keys.sai(), sd3_keys.diffusers, sd3_keys.recognise, diffusers_configs.sd3),
}
LAYOUTS = ("native", "ldm", "diffusers", "separate")
TOWERS_LDM = {
    "sd1": {"clip_l": "cond_stage_model.transformer."},
    "sd2": {"clip_h": "cond_stage_model.model."},
    "sdxl": {"clip_l": "conditioner.embedders.0.transformer.", "clip_g": "conditioner.embedders.1.model."},
    "sdxl-refiner": {"clip_g": "conditioner.embedders.0.model."},
}
TOWERS_FLOW = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}  # as single files of flows name them
PREDICTIONS_LDM = {"eps": "epsilon", "v": "v"}  # as the metadata of single files call them


def save(
    model: Model,
    path: str | Path,
    layout: Literal["native", "ldm", "diffusers", "separate"] = "native",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model.

    layout  "native": one file of ours, which says itself what it holds; "ldm": the single file that most tools open, of SD and SDXL as
            latent diffusion wrote it, of SD 3 as Stability AI, of FLUX.1 as ComfyUI, with no place for a preview nor for T5's tokenizer;
            "diffusers": a folder with a sub-folder per part, which diffusers' from_pretrained opens; "separate": a folder with a file per
            part under its publisher's keys, to load together: flux-dev.safetensors, vae.safetensors, clip_l.safetensors, t5xxl.safetensors
    dtype   of the weights in the files; None: as they are, which packed ones (8-bit floats, GGUF's blocks) cannot be
    Raises OSError where the place cannot be written, ValueError for a model that readers of the layout would take for another.
    """
    check_names("layout", [layout], LAYOUTS)
    check_dtype(dtype, ())
    if any(is_streamed(part) for part in model.parts.values()):
        raise ValueError("blocks of this model are in its files only: load it without memory=... to save it")
    if any(is_packed(part) for part in model.parts.values()):
        if dtype is None:
            raise ValueError("weights of this model are packed as in their files: give dtype=..., to write them unpacked")
        model = model.unpacked(dtype)
    if layout == "native":
        native.save(model, path, dtype)
        return
    params: Any = getattr(model.backbone, "params", None)
    if model.backbone is not None and (type(model.backbone) not in BACKBONES or params.context_dim is None):
        kind = type(model.backbone).__name__
        raise ValueError(f"the layout {layout!r} is for networks that are told a text, which this {kind} is not: use layout='native'")
    {"ldm": _save_ldm, "diffusers": _save_diffusers, "separate": _save_separate}[layout](model, Path(path), dtype)


def _save_ldm(model: Model, path: Path, dtype: torch.dtype | None) -> None:
    if path.suffix not in SAFETENSORS:
        raise ValueError(f"{path} is to be a single file, which readers know by its ending: name it {path.name}.safetensors")
    base = _base(model) if model.parts.keys() - {"preview"} else ""
    prefixes = {"backbone": "model.diffusion_model.", "vae": "vae." if base.startswith("flux") else "first_stage_model.", "preview": ""}
    parts = _single_parts(model, base)
    if len(parts) > 1:  # with no place for it
        parts.pop("preview", None)
    tensors: dict[str, Tensor] = {}
    for name, part in parts.items():
        tensors |= _prefixed(prefixes[name] if name in prefixes else _tower_prefix(base, name), part)
    if "clip_h" in parts and _use(model, "clip_h").blocks == (layers := model.require("text").tower("clip_h").params.layers):
        tensors |= _unused_block(TOWERS_LDM[base]["clip_h"], tensors, layers)
    if model.backbone is not None:
        tensors |= _marks(model, base)
    if model.vae is not None:
        tensors |= _latent_statistics(model.vae.params, FAMILIES[model.spec.get("family", base)])
    native.write_tensors(path, _cast(tensors, dtype), {"format": "pt", **_said(model)})


def _save_separate(model: Model, folder: Path, dtype: torch.dtype | None) -> None:
    base = _base(model)
    if model.backbone is not None and _marks(model, base):
        raise ValueError("separate files do not say what the network predicts: use another layout")
    if model.vae is not None and _latent_statistics(model.vae.params, FAMILIES[model.spec.get("family", base)]):
        raise ValueError("separate files do not say how latents are scaled: use another layout")
    names = {"backbone": model.spec.get("family", base), **TOWERS_FLOW}
    for name, part in _single_parts(model, base).items():
        file = folder / f"{names.get(name, name)}.safetensors"
        native.write_tensors(file, _cast(part, dtype), {"format": "pt", **(_said(model) if name == "backbone" else {})})
    if model.text is not None and model.text.t5_tokenizer is not None:
        write_tokenizer(model.text.t5_tokenizer, folder)


def _single_parts(model: Model, base: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of every part, towers by their names, as single files hold them but for what stands before their keys."""
    parts: dict[str, dict[str, Tensor]] = {}
    if model.backbone is not None:
        of = BACKBONES[type(model.backbone)]
        parts["backbone"] = _published(model.backbone, of.single(model.backbone.params), of.recognise)
    if model.vae is not None:
        parts["vae"] = _published(model.vae, vae_keys.ldm(model.vae.params), vae_keys.recognise)
    for name in model.text.towers if model.text is not None else ():
        parts[name] = _single_tower(model, base, name)
    if model.preview is not None:
        parts["preview"] = _published(model.preview, taesd_keys.diffusers(), taesd_keys.recognise)
    return parts


def _tower_prefix(base: str, name: str) -> str:
    return TOWERS_LDM[base][name] if base in TOWERS_LDM else f"text_encoders.{TOWERS_FLOW[name]}.transformer."


def _single_tower(model: Model, base: str, name: str) -> dict[str, Tensor]:
    tower = model.require("text").towers[name]
    if isinstance(tower, T5):
        return _published(tower, t5_keys.transformers(), t5_keys.recognise)
    if tower.params.activation != (activation := "quick_gelu" if name == "clip_l" else "gelu"):
        raise ValueError(f"readers of single files compute {name} with {activation}, not {tower.params.activation}: use another layout")
    use = _use(model, name)
    if name == "clip_l" and use.pooled and use.projected and tower.params.projection is not None:
        raise ValueError("readers of single files leave CLIP-L's pooled output as it is, here it is projected: use another layout")
    layout = clip_keys.openclip() if _tower_prefix(base, name).endswith(".model.") else clip_keys.transformers()
    return _published(tower, layout, clip_keys.recognise)


def _said(model: Model) -> dict[str, str]:
    """What single files say of the prediction beside their tensors."""
    name = PREDICTIONS_LDM.get(model.prediction.name)
    return {"modelspec.prediction_type": name} if name else {}


def _marks(model: Model, base: str) -> dict[str, Tensor]:
    """What tells readers of single files a prediction and a schedule. ValueError where they would take it for another."""
    of = FAMILIES[model.spec.get("family", base)]
    schedule = {**of.schedule, **model.spec["schedule"]}
    ends_in_noise = schedule.pop("zero_terminal_snr", False)
    if schedule != of.schedule or model.prediction.name not in (*PREDICTIONS_LDM, of.prediction):
        raise ValueError(
            f"single files do not say schedule {model.spec['schedule']} and prediction {model.prediction.name!r}: use another layout"
        )
    if (grid := model.spec.get("grid", of.grid)) != of.grid and model.prediction.name == "flow":
        raise ValueError(f"single files do not say which times are visited, here {grid}: use layout='diffusers' or 'native'")
    v = model.prediction.name == "v" and base.startswith("sdxl")
    return {mark: torch.tensor([]) for mark, set_ in (("v_pred", v), ("ztsnr", ends_in_noise)) if set_}


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
        classes |= _save_tokenizers(model.text, folder, _places(model))
    if model.backbone is not None:
        config = diffusers_configs.scheduler(model)
        write_json(folder / "scheduler" / "scheduler_config.json", config)
        classes["scheduler"] = ("diffusers", config["_class_name"])
        write_json(folder / "model_index.json", diffusers_configs.index(model, _base(model), classes))


def _diffusers_parts(model: Model) -> dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]]:
    """By sub-folder: the file of the weights, the configuration, and the tensors."""
    file = "diffusion_pytorch_model.safetensors"
    parts: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {}
    if model.backbone is not None:
        of = BACKBONES[type(model.backbone)]
        config = of.config(model.backbone.params, model.shape[-1])
        tensors = _published(model.backbone, of.diffusers(model.backbone.params), of.recognise, config)
        parts[of.folder] = (file, config, tensors)
    if model.vae is not None:
        config = diffusers_configs.vae(model.vae.params)
        layout = vae_keys.diffusers(model.vae.params)
        parts["vae"] = (file, config, _published(model.vae, layout, vae_keys.recognise, config))
    for name, place in _places(model).items():
        config, tensors = _text_tower(model, name)
        parts[place] = ("model.safetensors", config, tensors)
    if model.preview is not None:
        config = diffusers_configs.taesd(model.preview.params)
        tensors = _published(model.preview, taesd_keys.diffusers(), taesd_keys.recognise)
        parts[PREVIEW if parts else ""] = (file, config, tensors)
    return parts


def _places(model: Model) -> dict[str, str]:
    """The sub-folder of every text tower: the first, second and third in their family's order, but for the refiner's only one."""
    if model.text is None:
        return {}
    towers = TOWERS[_base(model)]
    numbers = {name: i + 1 + (towers == ("clip_g",)) for i, name in enumerate(towers)}
    return {name: "text_encoder" + (f"_{numbers[name]}" if numbers[name] > 1 else "") for name in model.text.towers}


def _text_tower(model: Model, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A tower as diffusers' folders have it: SD 2's ends with the last block that is used; a projection is there where it is used.

    Pipelines of Stable Diffusion 3 project CLIP-L's pooled output in any case: one that goes unprojected gets the identity.
    """
    tower = model.require("text").towers[name]
    state = tower.state_dict()
    if isinstance(tower, T5):
        return diffusers_configs.t5(tower.params), scatter(t5_keys.transformers().table(state), state)
    params, use = tower.params, _use(model, name)
    used = use.blocks if name == "clip_h" and use.blocks else params.layers
    projected = use.pooled and use.projected and params.projection is not None
    params = replace(params, layers=used, projection=params.projection if projected else None)
    unused = tuple(f"blocks.{i}." for i in range(used, tower.params.layers)) + ("projection.",) * (not projected)
    state = {key: value for key, value in state.items() if not key.startswith(unused)}
    if use.pooled and not projected and _base(model).startswith("sd3"):
        params = replace(params, projection=params.width)
        state["projection.weight"] = torch.eye(params.width).to(state["norm.weight"])
    return diffusers_configs.text(params), scatter(clip_keys.transformers().table(state), state)


def _use(model: Model, name: str) -> TowerUse:
    """What the model takes from a tower of CLIP."""
    return next(use for use in model.require("text").params.uses if use.tower == name)


def _save_tokenizers(text: TextEncoder, folder: Path, places: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The tokenizer of every tower in its folder, and the classes that read them."""
    classes = {}
    for use in text.params.uses:
        place = places[use.tower].replace("text_encoder", "tokenizer")
        _save_tokenizer(folder / place, use.pad, text.params.length)
        classes[place] = ("transformers", "CLIPTokenizer")
    if "t5" in places and text.t5_tokenizer is not None:
        place = places["t5"].replace("text_encoder", "tokenizer")
        write_tokenizer(text.t5_tokenizer, folder / place)
        write_json(folder / place / "tokenizer_config.json", diffusers_configs.t5_tokenizer(text.params.t5_length))
        classes[place] = ("transformers", "T5TokenizerFast")
    return classes


def _save_tokenizer(folder: Path, pad: int, length: int) -> None:
    ids, merges = vocabulary()
    texts = {"vocab.json": json.dumps(ids), "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)}
    for file, text in texts.items():
        with replacing(folder / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    name = {number: token for token, number in ids.items()}[pad]
    write_json(folder / "tokenizer_config.json", diffusers_configs.tokenizer(name, length))


def _base(model: Model) -> str:
    """The family that the model is built like: a base in FAMILIES."""
    if family := model.spec.get("family"):
        return lookup("family", family, FAMILIES).base
    if type(model.backbone) in BACKBONES:
        return base_of(cast(Any, model.network).params)
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
