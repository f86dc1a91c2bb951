"""Keys of TAESD in diffusers' files, and in the publisher's two files for encoder and decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from models.files.structure import Kind, Settings, Shapes, check_settings
from models.files.table import Layout
from models.networks.taesd import TAESD, TAESDParams

CONVOLUTIONS = {rf"\.conv{i + 1}\.": f".conv.{2 * i}." for i in range(3)}
SETTINGS: Settings = {
    "act_fn": ("relu",),
    "scaling_factor": (1.0,),
    "shift_factor": (None, 0.0),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}
ORIGINAL = {"encoder": "0.weight", "decoder": "1.weight"}  # the first tensor of each file


def diffusers(params: TAESDParams) -> Layout:
    """Each half numbers its layers; the clamp before the decoder is not counted."""

    def layer(match: re.Match[str]) -> str:
        return f"{match[1]}.layers.{int(match[2]) - (match[1] == 'decoder')}."

    pattern = re.compile(r"^(encoder|decoder)\.(\d+)\.")
    return Layout("diffusers", CONVOLUTIONS, renumber=lambda name: pattern.sub(layer, name))


def original(half: str) -> Layout:
    """The encoder's file or the decoder's."""
    return Layout(f"TAESD's {half}", CONVOLUTIONS, submodule=half)


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[TAESDParams, Layout] | None:
    """Parameters and layout of a tiny autoencoder or one half of it; None for other tensors."""
    if "encoder.layers.0.weight" in shapes and "decoder.layers.0.weight" in shapes:
        check_settings(hints, SETTINGS)
        first = shapes["decoder.layers.0.weight"]
        params = TAESDParams(first[1], first[0])
        return params, diffusers(params)
    for half, key in ORIGINAL.items():
        if key in shapes and "3.conv.0.weight" in shapes and "8.conv.4.weight" in shapes:
            latents = shapes["14.weight"][0] if half == "encoder" else shapes[key][1]
            return TAESDParams(latents, shapes[key][0]), original(half)
    return None


def config(p: TAESDParams, size: tuple[int, int]) -> dict[str, Any]:
    """For AutoencoderTiny."""
    widths = {f"{half}_block_out_channels": [p.channels] * 4 for half in ("encoder", "decoder")}
    return {"_class_name": "AutoencoderTiny", "latent_channels": p.latent_channels, **widths}


# The folder is ours alone: diffusers' index has no entry for it.
PREVIEW = Kind(
    name="preview",
    part="preview",
    title="tiny autoencoder",
    network=TAESD,
    params=TAESDParams,
    recognise=recognise,
    single=diffusers,
    diffusers=diffusers,
    config=config,
    folder="preview",
)
