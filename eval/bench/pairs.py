"""The pairs that `bench_networks` times: our published networks, diffusers' ones, and inputs for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from diffusion import Condition
from models.families import ARCHITECTURES, BACKBONES
from models.layers.rotary import positions
from models.networks.unet import UNetParams


@dataclass(frozen=True)
class Inputs:
    """Inputs of both networks: x (B, C, H, W) and the condition, all ones, and t in our units."""

    x: Tensor
    t: Tensor
    condition: Condition


@dataclass(frozen=True)
class Pair:
    """Our network, built from `params`, and diffusers'.

    theirs           name of diffusers' class, and its configuration
    their_arguments  the arguments that theirs is called with
    tokens           rows of the context
    t                a time in the middle
    """

    params: Any
    network: Callable[[Any], nn.Module]
    theirs: tuple[str, Mapping[str, Any]]
    their_arguments: Callable[[Inputs], dict[str, Any]]
    tokens: int
    t: float

    def inputs(self, batch: int, size: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        """Inputs for latents of size x size."""
        p = self.params
        shapes = {"context": (self.tokens, p.context_dim), "vector": (p.vector_dim,)}
        ones = partial(torch.ones, dtype=dtype, device=device)
        condition = {name: ones(batch, *shape) for name, shape in shapes.items() if name in p.takes}
        if "guidance" in p.takes:
            condition["guidance"] = torch.full((batch,), 3.5, device=device)
        t = torch.full((batch,), self.t, device=device)
        return Inputs(ones(batch, p.in_channels, size, size), t, Condition(**condition))

    def shortened(self, layers: Mapping[str, int]) -> Pair:
        """The same with fewer blocks: {"depth": 1, "depth_single": 1}. ValueError for unknown names."""
        if not layers:
            return self
        if isinstance(self.params, UNetParams):
            raise ValueError("layers shortens flux and sd3.5, whose blocks are alike: leave it out")
        for name in layers:
            if name not in ("depth", "depth_single", "dual") or not hasattr(self.params, name):
                raise ValueError(f"layers has no {name!r}: depth, and depth_single of flux or dual of sd3.5")
        width = {"heads": self.params.heads or self.params.depth}  # sd3.5's width follows from the depth
        return pair_of(replace(cast(Any, self.params), **width, **layers))


def pair_of(params: Any) -> Pair:
    """Our network and diffusers' of the same parameters."""
    kind = next(kind for kind in BACKBONES.values() if isinstance(params, kind.params))
    arguments, tokens, t, side = {
        "unet": (_unet, 77, 500.0, 64),
        "flux": (_flux, 512, 0.5, 128),
        "sd3": (_sd3, 333, 0.5, 128),
    }[kind.name]
    config = kind.config(params, (side, side))
    return Pair(params, kind.network, (config["_class_name"], config), arguments, tokens, t)


def _unet(inputs: Inputs) -> dict[str, Any]:
    added = None
    if inputs.condition.vector is not None:  # pooled text, and six numbers that become 256 sinusoids each
        added = {
            "text_embeds": inputs.condition.vector[:, : -6 * 256],
            "time_ids": inputs.condition.vector[:, :6],
        }
    return {
        "sample": inputs.x,
        "timestep": inputs.t,
        "encoder_hidden_states": inputs.condition.context,
        "added_cond_kwargs": added,
    }


def _flux(inputs: Inputs) -> dict[str, Any]:
    """Packed, with the position of every token; diffusers' pipelines make both outside of the network."""
    packed = rearrange(inputs.x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2).contiguous()
    text = inputs.condition.tensors["context"].shape[1]
    ids = positions(text, inputs.x.shape[2] // 2, inputs.x.shape[3] // 2, inputs.x.device).to(inputs.x.dtype)
    return {
        "hidden_states": packed,
        "encoder_hidden_states": inputs.condition.context,
        "pooled_projections": inputs.condition.vector,
        "timestep": inputs.t,
        "guidance": inputs.condition.guidance,
        "img_ids": ids[text:],
        "txt_ids": ids[:text],
    }


def _sd3(inputs: Inputs) -> dict[str, Any]:
    return {
        "hidden_states": inputs.x,
        "timestep": 1000 * inputs.t,
        "encoder_hidden_states": inputs.condition.context,
        "pooled_projections": inputs.condition.vector,
    }


FAMILIES = {"sd15": "sd1", "sdxl": "sdxl", "flux": "flux-dev"}
FAMILIES |= {name: name for name in ("sd3.5-medium", "sd3.5-large")}
PAIRS = {name: pair_of(ARCHITECTURES[family].network) for name, family in FAMILIES.items()}
