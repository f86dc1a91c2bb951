"""How the parts of a model are written in published layouts, by whichever of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import asdict
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from diffusion.spec import lookup
from models.checkpoints import diffusers_configs, flux_keys, sd3_keys, unet_keys
from models.checkpoints.table import Layout, scatter
from models.checkpoints.unet_keys import Shapes
from models.families import FAMILIES, base_of, recipe
from models.flux import Flux
from models.model import Model
from models.recipes import TowerUse
from models.sd3 import SD3
from models.unet import UNet, UNetParams

Recognise = Callable[[Shapes, Mapping[str, Any]], tuple[Any, Layout] | None]


class Backbone(NamedTuple):
    """How a kind of network is written: in its publisher's single file, and in diffusers' folders, where it has a configuration."""

    single: Callable[[Any], Layout]
    diffusers: Callable[[Any], Layout]
    recognise: Recognise
    config: Callable[[Any, tuple[int, int]], dict[str, Any]]
    folder: str = "transformer"


BACKBONES: dict[type[nn.Module], Backbone] = {
    UNet: Backbone(unet_keys.ldm, unet_keys.diffusers, unet_keys.recognise, diffusers_configs.unet, "unet"),
    Flux: Backbone(lambda _: flux_keys.bfl(), flux_keys.diffusers, flux_keys.recognise, lambda p, _: diffusers_configs.flux(p)),
    SD3: Backbone(lambda _: sd3_keys.sai(), sd3_keys.diffusers, sd3_keys.recognise, diffusers_configs.sd3),
}


def built_like(model: Model) -> str:
    """The family that the model is built like: a base in FAMILIES."""
    if family := model.spec.get("family"):
        return lookup("family", family, FAMILIES).base
    if type(model.backbone) in BACKBONES:
        return base_of(cast(Any, model.network).params)
    raise ValueError("this model is of no published family: use layout='native'")


def use_of(model: Model, name: str) -> TowerUse:
    """What the model takes from a tower of CLIP."""
    return next(use for use in model.require("text").params.uses if use.tower == name)


def check_text(model: Model, base: str, written: Set[str]) -> None:
    """ValueError if readers of a layout would encode prompts differently: its files hold only the fields `written` of the recipe."""
    p = model.require("text").params
    towers: dict[str, Any] = {**p.towers, **({"t5": p.t5} if p.t5 else {})}
    blocks = {"blocks": p.uses[0].blocks} if base == "sd2" else {}
    usual = recipe(FAMILIES[model.spec.get("family", base)], towers, **blocks)
    for name in {"null", "numbers", "t5_length"} - written:
        if (mine := getattr(p, name)) != (theirs := getattr(usual, name)):
            raise ValueError(f"files of this layout do not say {name}={mine!r} of text, readers take {theirs!r}: use layout='native'")
    for use, other in zip(p.uses, usual.uses, strict=True):
        for name in {"norm", "pooled", "pad", "blocks"} - written:
            if (mine := getattr(use, name)) != (theirs := getattr(other, name)):
                where = "'diffusers' or 'native'" if name in ("pad", "blocks") else "'native'"
                raise ValueError(
                    f"files of this layout do not say {name}={mine!r} of {use.tower}, readers take {theirs!r}: use layout={where}"
                )


def published(network: nn.Module, layout: Layout, recognise: Recognise, config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
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


def in_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    return {key: value.to(dtype or value.dtype) for key, value in tensors.items()}
