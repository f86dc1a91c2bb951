"""Small networks of every kind, with random weights and inputs, for the tests of what all networks promise
and of each one's own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import Condition
from models import SD3, Chroma, ChromaParams, DiT, DiTParams, Flux, FluxParams, SD3Params, UNet, UNetParams
from models.networks.flux import TrunkParams

UNET: dict[str, Any] = dict(
    in_channels=3, out_channels=3, channels=32, channel_mult=(1, 2), blocks=1, head_dim=8, groups=8
)
SD1 = UNetParams(**{**UNET, "heads": 4, "head_dim": None}, attention=(1, 0), context_dim=12)
SD2 = UNetParams(**{**UNET, "blocks": 2}, attention=(1, 0), context_dim=12, linear_projection=True)
SDXL = UNetParams(
    **UNET, attention=(0, 2), middle_attention=2, context_dim=12, vector_dim=22, linear_projection=True
)
ADM = UNetParams(**UNET, attention=(0, 1), attention_kind="plain", scale_shift=True, num_classes=10)
LCM = UNetParams(**{**UNET, "heads": 4, "head_dim": None}, attention=(1, 0), context_dim=12, guidance_dim=256)

DIT: dict[str, Any] = dict(in_channels=3, image_size=8, patch_size=2, hidden=32, depth=2, heads=4)
CLASSES = DiTParams(**DIT, num_classes=10)
VARIANCE = DiTParams(**DIT, num_classes=10, learned_variance=True)
TEXT = DiTParams(**DIT, num_classes=None, context_dim=12, vector_dim=6)

TRUNK: dict[str, Any] = dict(
    out_channels=3, hidden=48, heads=3, depth=2, depth_single=2, axes=(4, 6, 6), context_dim=12
)
FLUX = {**TRUNK, "vector_dim": 6}
DEV = FluxParams(**FLUX, in_channels=3)
SCHNELL = FluxParams(**FLUX, in_channels=3, guidance_dim=None)
FILL = FluxParams(**FLUX, in_channels=10)
CHROMA = ChromaParams(**TRUNK, in_channels=3, waves=16, width_approximator=20, depth_approximator=2)

MMDIT: dict[str, Any] = dict(
    in_channels=3, out_channels=3, depth=2, context_dim=12, vector_dim=6, positions=12
)
SD3_0 = SD3Params(**MMDIT)
LARGE = SD3Params(**MMDIT, qk_norm=True)
MEDIUM = SD3Params(**MMDIT, qk_norm=True, dual=1)


@dataclass(frozen=True)
class Kind:
    """A network to make, and the size of the images it is given here."""

    network: type[nn.Module]
    params: Any
    size: tuple[int, int]

    def fresh(self) -> nn.Module:
        return self.network(self.params)

    def inputs(self) -> tuple[Tensor, Tensor, Condition]:
        return inputs(self.params, self.size)


UNETS = {"SD 1": SD1, "SD 2": SD2, "SDXL": SDXL, "ADM": ADM, "LCM": LCM}
DITS = {"classes": CLASSES, "variance": VARIANCE, "text": TEXT}
KINDS = {f"UNet, {name}": Kind(UNet, params, (8, 12)) for name, params in UNETS.items()}
KINDS |= {f"DiT, {name}": Kind(DiT, params, (8, 8)) for name, params in DITS.items()}
FLUXES = {"dev": DEV, "schnell": SCHNELL, "Fill": FILL}
SD3S = {"3.0": SD3_0, "3.5 large": LARGE, "3.5 medium": MEDIUM}
KINDS |= {f"Flux, {name}": Kind(Flux, params, (8, 12)) for name, params in FLUXES.items()}
KINDS["Chroma"] = Kind(Chroma, CHROMA, (8, 12))
KINDS |= {f"SD 3, {name}": Kind(SD3, params, (8, 12)) for name, params in SD3S.items()}


def randomised(network: nn.Module) -> nn.Module:
    """The network with every parameter drawn anew, at a scale that keeps activations near 1: no zero hides a
    mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator) / (math.sqrt(p[0].numel()) if p.ndim > 1 else 2)
            )
    return network.eval()


def inputs(params: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor, Condition]:
    """x, t and the condition of a batch of two, at times far apart; the second label is the null label."""
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(2, params.in_channels, *size, generator=generator)
    x = whole[:, : params.sample_channels]
    told: dict[str, Tensor] = {}
    if "label" in params.takes:
        told["label"] = torch.tensor([3, params.num_classes])
    if "context" in params.takes:
        told["context"] = torch.randn(2, 5, params.context_dim, generator=generator)
    if "vector" in params.takes:
        told["vector"] = torch.randn(2, params.vector_dim, generator=generator)
    if "guidance" in params.takes:
        told["guidance"] = torch.tensor([1.75, 8.5])
    if "image" in params.takes:
        told["image"] = whole[:, params.sample_channels :]
    return (
        x,
        torch.tensor([0.00325, 0.9876] if isinstance(params, TrunkParams | SD3Params) else [3.25, 987.6]),
        Condition(**told),
    )


def beside(x: Tensor, image: Tensor | None) -> Tensor:
    """All channels, as peers are given them."""
    return x if image is None else torch.cat([x, image], dim=1)


def renamed(name: str, value: Tensor, rules: Mapping[str, str]) -> dict[str, Tensor]:
    """A tensor under the name that the rules, applied in order, make of its own; [qkv] in it stands for as
    many, stacked in ours."""
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    letters = re.search(r"\[(\w+)\]", name)
    parts = letters[1] if letters else ""
    return {
        name.replace(f"[{parts}]", letter): part
        for letter, part in zip(parts or [""], value.chunk(len(parts) or 1), strict=True)
    }


def relative_error(out: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value."""
    return float(((out - expected).abs().max() / expected.abs().max()).detach())
