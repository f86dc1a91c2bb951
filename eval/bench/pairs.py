"""What `bench_networks` times: published networks of ours, what diffusers has in their place, and the same
inputs for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from diffusion import Condition
from models.families import ARCHITECTURES, BACKBONES
from models.layers.rotary import positions
from models.networks.unet import UNetParams


@dataclass(frozen=True)
class Given:
    """What both networks are given: x (B, C, H, W), t in our units, and the condition; all ones but for t,
    which speed does not mind."""

    x: Tensor
    t: Tensor
    condition: Condition


@dataclass(frozen=True)
class Pair:
    """A network of ours, and diffusers'.

    params  of ours
    theirs  the name of diffusers' class, and its configuration
    asked   the arguments that theirs is called with
    tokens  rows of the context
    t       a time in the middle
    """

    params: Any
    network: Callable[[Any], nn.Module]
    theirs: tuple[str, Mapping[str, Any]]
    asked: Callable[[Given], dict[str, Any]]
    tokens: int
    t: float

    def given(self, batch: int, size: int, dtype: torch.dtype, device: torch.device) -> Given:
        """Inputs for latents of size x size."""
        p = self.params
        rows = {"context": (self.tokens, p.context_dim), "vector": (p.vector_dim,)}
        told = {
            name: torch.ones(batch, *shape, dtype=dtype, device=device)
            for name, shape in rows.items()
            if name in p.takes
        }
        if "guidance" in p.takes:
            told["guidance"] = torch.full((batch,), 3.5, device=device)
        x = torch.ones(batch, p.in_channels, size, size, dtype=dtype, device=device)
        return Given(x, torch.full((batch,), self.t, device=device), Condition(**told))

    def shortened(self, layers: Mapping[str, int]) -> Pair:
        """The same with fewer blocks: {"depth": 1, "depth_single": 1}. ValueError where there are no such
        numbers."""
        if not layers:
            return self
        if isinstance(self.params, UNetParams):
            raise ValueError("layers shortens flux and sd3.5, whose blocks are alike: leave it out")
        if unknown := [
            name
            for name in layers
            if name not in ("depth", "depth_single", "dual") or not hasattr(self.params, name)
        ]:
            raise ValueError(
                f"layers has no {unknown[0]!r}: depth, and depth_single of flux or dual of sd3.5"
            )
        width = {"heads": self.params.heads or self.params.depth}  # which goes with the depth in sd3.5
        return pair_of(replace(cast(Any, self.params), **width, **layers))


def pair_of(params: Any) -> Pair:
    """A network of ours beside diffusers' of the same parameters."""
    kind = next(kind for kind in BACKBONES.values() if isinstance(params, kind.params))
    asked, tokens, t, side = {
        "unet": (_unet, 77, 500.0, 64),
        "flux": (_flux, 512, 0.5, 128),
        "sd3": (_sd3, 333, 0.5, 128),
    }[kind.name]
    config = kind.config(params, (side, side))
    return Pair(params, kind.network, (config["_class_name"], config), asked, tokens, t)


def _unet(given: Given) -> dict[str, Any]:
    added = None
    if given.condition.vector is not None:  # pooled text, and six numbers that become 256 sinusoids each
        added = {
            "text_embeds": given.condition.vector[:, : -6 * 256],
            "time_ids": given.condition.vector[:, :6],
        }
    return {
        "sample": given.x,
        "timestep": given.t,
        "encoder_hidden_states": given.condition.context,
        "added_cond_kwargs": added,
    }


def _flux(given: Given) -> dict[str, Any]:
    """Packed, and with the place of every token, which diffusers' pipelines make outside of the network."""
    packed = rearrange(given.x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2).contiguous()
    text = given.condition.tensors["context"].shape[1]
    ids = positions(text, given.x.shape[2] // 2, given.x.shape[3] // 2, given.x.device).to(given.x.dtype)
    return {
        "hidden_states": packed,
        "encoder_hidden_states": given.condition.context,
        "pooled_projections": given.condition.vector,
        "timestep": given.t,
        "guidance": given.condition.guidance,
        "img_ids": ids[text:],
        "txt_ids": ids[:text],
    }


def _sd3(given: Given) -> dict[str, Any]:
    return {
        "hidden_states": given.x,
        "timestep": 1000 * given.t,
        "encoder_hidden_states": given.condition.context,
        "pooled_projections": given.condition.vector,
    }


PAIRS = {
    name: pair_of(ARCHITECTURES[family].network)
    for name, family in {
        "sd15": "sd1",
        "sdxl": "sdxl",
        "flux": "flux-dev",
        "sd3.5-medium": "sd3.5-medium",
        "sd3.5-large": "sd3.5-large",
    }.items()
}
