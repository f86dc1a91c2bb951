"""Chroma1 (Lodestone Rock 2025): FLUX.1 [schnell] without modulation layers and CLIP, trained further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.families import flux
from models.families.family import TINY_T5, Architecture, Family, Published, Tower, euler
from models.families.flux import APACHE, FLOW, LATENTS
from models.files.structure import ByOurNames, Kind, Shapes
from models.files.table import Layout
from models.networks.chroma import Chroma, ChromaParams
from models.text.t5 import T5Reader

# The network in files: FLUX.1's names, and those of the approximator ----------------------------------------

OLDEST = "0.34.0"  # the oldest diffusers that reads it
PLACE = "distilled_guidance_layer"
APPROXIMATOR = {r"^approximator\.fc_in\.": f"{PLACE}.in_proj.", r"^approximator\.out\.": f"{PLACE}.out_proj."}
BFL = {
    **APPROXIMATOR,
    r"^approximator\.blocks\.(\d+)\.fc1\.": rf"{PLACE}.layers.\1.in_layer.",
    r"^approximator\.blocks\.(\d+)\.fc2\.": rf"{PLACE}.layers.\1.out_layer.",
    r"^approximator\.blocks\.(\d+)\.norm\.weight$": rf"{PLACE}.norms.\1.scale",
}
DIFFUSERS = {
    **APPROXIMATOR,
    r"^approximator\.blocks\.(\d+)\.fc(\d)\.": rf"{PLACE}.layers.\1.linear_\2.",
    r"^approximator\.blocks\.(\d+)\.norm\.": rf"{PLACE}.norms.\1.",
}


def _with(rules: Mapping[str, str], layout: Layout) -> Layout:
    return replace(layout, rules={**rules, **layout.rules})


def bfl() -> Layout:
    return _with(BFL, flux.bfl())


def diffusers(params: ChromaParams) -> Layout:
    return _with(DIFFUSERS, flux.diffusers(params))


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[ChromaParams, Layout] | None:
    """Parameters and layout of a Chroma with these keys and shapes; None for other tensors."""
    blocks = flux.find_layout(shapes, hints) if any(key.startswith(f"{PLACE}.") for key in shapes) else None
    if blocks is None:
        return None
    layout = bfl() if blocks.name == "bfl" else diffusers(ChromaParams())  # for its names
    at = ByOurNames(shapes, layout)
    width, waves = at["approximator.fc_in.weight"]
    depth, trunk = at.count("approximator.blocks.{}.fc1.weight"), flux.trunk(at, hints)
    params = ChromaParams(**trunk, waves=waves, width_approximator=width, depth_approximator=depth)
    return params, layout if layout.name == "bfl" else diffusers(params)


def config(p: ChromaParams, size: tuple[int, int]) -> dict[str, Any]:
    """For ChromaTransformer2DModel."""
    own = {
        "approximator_num_channels": p.waves,
        "approximator_hidden_dim": p.width_approximator,
        "approximator_layers": p.depth_approximator,
    }
    names = {"_class_name": "ChromaTransformer2DModel", "_diffusers_version": OLDEST}
    return {**names, **flux.trunk_config(p, own)}


CHROMA = Kind(
    name="chroma",
    part="backbone",
    title="Chroma transformer",
    network=Chroma,
    params=ChromaParams,
    recognise=recognise,
    single=lambda _: bfl(),
    diffusers=diffusers,
    config=config,
)

# Family -----------------------------------------------------------------------------------------------------

HD = Architecture(
    name="chroma",
    kind=CHROMA,
    network=ChromaParams(),
    tiny=ChromaParams(**flux.TINY_TRUNK, width_approximator=64, depth_approximator=2),
    matches=lambda p: True,
    towers=(Tower("t5", T5Reader(masked=True), TINY_T5, "text_encoders.t5xxl.transformer.", file="t5xxl"),),
    vae=LATENTS,
    pipelines={None: "ChromaPipeline"},
    diffusers=OLDEST,
    vae_prefix="vae.",
)
ARCHITECTURES = (HD,)
GRID = {"spacing": "linspace", "shift": 3.0}
FAMILIES = (Family("chroma", "Chroma1-HD", HD, APACHE, **FLOW, grid=GRID, sampling=euler(40, 3.0)),)
PUBLISHED = {
    "chroma": Published(
        "lodestones/Chroma1-HD",
        (
            "Chroma1-HD.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model-00001-of-00002.safetensors",
            "text_encoder/model-00002-of-00002.safetensors",
            "text_encoder/model.safetensors.index.json",
            "tokenizer/spiece.model",
        ),
        licence=APACHE,
    )
}
