"""Stable Diffusion 3 and 3.5 (Esser et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from models.families.family import (
    OLDEST_FLOW,
    ONE,
    TINY_CLIP,
    TINY_CLIP_L,
    TINY_T5,
    Architecture,
    Family,
    Published,
    Tower,
    euler,
)
from models.families.flux import DIFFUSERS_FORMS, DIFFUSERS_STREAMS, LATENTS
from models.files.structure import ByOurNames, Kind, Settings, Shapes, check_settings
from models.files.table import Form, Layout
from models.networks.clip import CLIP_G
from models.networks.sd3 import HEAD_DIM, SD3, SD3Params
from models.text.clip import CLIPReader
from models.text.t5 import T5Reader

if TYPE_CHECKING:
    from models.files.table import Part
    from models.text.recipes import TextParams

# The network in files ---------------------------------------------------------------------------------------

SAI = {
    r"^patch_in\.": "x_embedder.proj.",
    r"^position$": "pos_embed",
    r"^context_in\.": "context_embedder.",
    r"^vector\.": "y_embedder.",
    r"^time\.fc1\.": "t_embedder.mlp.0.",
    r"^time\.fc2\.": "t_embedder.mlp.2.",
    r"^modulation_out\.": "final_layer.adaLN_modulation.1.",
    r"^patch_out\.": "final_layer.linear.",
    r"^blocks\.(\d+)\.image\.": r"joint_blocks.\1.x_block.",
    r"^blocks\.(\d+)\.text\.": r"joint_blocks.\1.context_block.",
    r"\.modulation\.": ".adaLN_modulation.1.",
    r"\.attention(2?)\.norm_(\w)\.": r".attn\1.ln_\2.",
    r"\.attention(2?)\.out\.": r".attn\1.proj.",
    r"\.attention(2?)\.": r".attn\1.",
    r"_block\.mlp\.0\.": "_block.mlp.fc1.",
    r"_block\.mlp\.2\.": "_block.mlp.fc2.",
}
DIFFUSERS = {
    r"^patch_in\.": "pos_embed.proj.",
    r"^position$": "pos_embed.pos_embed",
    r"^context_in\.": "context_embedder.",
    r"^vector\.mlp\.0\.": "time_text_embed.text_embedder.linear_1.",
    r"^vector\.mlp\.2\.": "time_text_embed.text_embedder.linear_2.",
    r"^time\.fc(\d)\.": r"time_text_embed.timestep_embedder.linear_\1.",
    r"^modulation_out\.": "norm_out.linear.",
    r"^patch_out\.": "proj_out.",
    r"^blocks\.": "transformer_blocks.",
    **DIFFUSERS_STREAMS,
}
SETTINGS: Settings = {"attention_head_dim": (HEAD_DIM,), "patch_size": (2,), "qk_norm": (None, "rms_norm")}


def sai() -> Layout:
    return Layout("sai", SAI)


def diffusers(params: SD3Params) -> Layout:
    """Its modulations of the output and of the last block's text have scale before shift."""
    last_text: dict[str, Form] = {rf"^blocks\.{params.depth - 1}\.text\.modulation\.": "swapped"}
    return Layout("diffusers", DIFFUSERS, DIFFUSERS_FORMS | last_text)


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[SD3Params, Layout] | None:
    """Parameters and layout of a Stable Diffusion 3 with these keys and shapes; None for other tensors."""
    if any(key.startswith("joint_blocks.") for key in shapes):
        layout = sai()
    elif "pos_embed.proj.weight" in shapes and "transformer_blocks.0.attn.add_k_proj.weight" in shapes:
        check_settings(hints, SETTINGS)
        layout = diffusers(SD3Params())  # for its names
    else:
        return None
    at = ByOurNames(shapes, layout)
    hidden, channels, patch, _ = at["patch_in.weight"]
    depth = at.count("blocks.{}.image.attention.qkv.weight")
    dual = [i for i in range(depth) if f"blocks.{i}.image.attention2.qkv.weight" in at]
    if dual != list(range(len(dual))):
        raise ValueError(f"blocks {dual} of this network attend twice, which only its first blocks may do")
    params = SD3Params(
        in_channels=channels,
        out_channels=at["patch_out.weight"][0] // patch**2,
        patch_size=patch,
        depth=depth,
        heads=None if hidden == depth * HEAD_DIM else hidden // HEAD_DIM,
        context_dim=at["context_in.weight"][1],
        vector_dim=at["vector.mlp.0.weight"][1],
        positions=math.isqrt(at["position"][-2]),  # some writers leave the leading 1 out
        qk_norm="blocks.0.image.attention.norm_k.weight" in at,
        dual=len(dual),
    )
    return params, layout if layout.name == "sai" else diffusers(params)


def config(p: SD3Params, size: tuple[int, int]) -> dict[str, Any]:
    """For SD3Transformer2DModel, which knows only squares. `size`: of the latents in training."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": OLDEST_FLOW,
        "sample_size": max(size),
        "patch_size": p.patch_size,
        "in_channels": p.in_channels,
        "out_channels": p.out_channels,
        "num_layers": p.depth,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": p.hidden // HEAD_DIM,
        "joint_attention_dim": p.context_dim,
        "caption_projection_dim": p.hidden,
        "pooled_projection_dim": p.vector_dim,
        "pos_embed_max_size": p.positions,
        "qk_norm": "rms_norm" if p.qk_norm else None,
        "dual_attention_layers": tuple(range(p.dual)),
    }


MMDIT = Kind(
    name="sd3",
    part="backbone",
    title="Stable Diffusion 3 transformer",
    network=SD3,
    params=SD3Params,
    recognise=recognise,
    single=lambda _: sai(),
    diffusers=diffusers,
    config=config,
)

# What files show --------------------------------------------------------------------------------------------


def _projection_in_files(
    text: TextParams, towers: Mapping[str, Part], network: SD3Params | None
) -> TextParams:
    """CLIP-L's pooled output is projected in diffusers' folders, but not in Stability AI's files."""
    clip_l = towers["clip_l"]
    has_class = "CLIPTextModelWithProjection" in clip_l.hints.get("architectures", ())
    text = text.replace_reader("clip_l", projected=has_class and clip_l.params.projection is not None)
    return replace(text, width=network.context_dim) if network and text.width else text


# Families ---------------------------------------------------------------------------------------------------

BEFORE_LAST = CLIPReader(skip=1, norm=False, pooled=True)
READ_L, READ_G = replace(BEFORE_LAST, projected=False), replace(BEFORE_LAST, network=CLIP_G, pad=0)
IN_L, IN_G, IN_T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
TOWERS = (
    Tower("clip_l", READ_L, TINY_CLIP_L, IN_L, identity=True),
    Tower("clip_g", READ_G, TINY_CLIP, IN_G, "text_encoder_2"),
    Tower("t5", T5Reader(length=256), TINY_T5, IN_T5, "text_encoder_3", file="t5xxl", optional=True),
)
SD3_MEDIUM = Architecture(
    name="sd3",
    kind=MMDIT,
    network=SD3Params(),
    tiny=SD3Params(depth=2, positions=32),
    matches=lambda p: not p.dual and not p.qk_norm,
    towers=TOWERS,
    join={"behind": ("t5",)},
    adapt_text=_projection_in_files,
    vae=replace(LATENTS, scale=1.5305, shift=0.0609),
    pipelines={None: "StableDiffusion3Pipeline"},
    diffusers=OLDEST_FLOW,
)
SD35_MEDIUM = replace(
    SD3_MEDIUM,
    name="sd3.5-medium",
    network=SD3Params(positions=384, qk_norm=True, dual=13),
    tiny=SD3Params(depth=3, positions=32, qk_norm=True, dual=1),
    matches=lambda p: p.dual > 0,
)
SD35_LARGE = replace(
    SD3_MEDIUM,
    name="sd3.5-large",
    network=SD3Params(depth=38, qk_norm=True),
    tiny=SD3Params(depth=3, positions=32, qk_norm=True),
    matches=lambda p: not p.dual and p.qk_norm,
)
ARCHITECTURES = (SD3_MEDIUM, SD35_MEDIUM, SD35_LARGE)

COMMUNITY = "Stability AI Community"
FLOW: dict[str, Any] = {
    "licence": COMMUNITY,
    "size": 1024,
    "schedule": {"name": "flow"},
    "prediction": "flow",
    # The publisher shifts times twice: first 1 ... 0.001, then even steps from 1 to the shifted 0.001.
    "grid": {"spacing": "linspace", "t_end": 0.003 / 1.002, "shift": 3.0},
}
FAMILIES = (
    Family("sd3", "Stable Diffusion 3 Medium", SD3_MEDIUM, **FLOW, sampling=euler(28, 7.0)),
    Family("sd3.5-medium", "Stable Diffusion 3.5 Medium", SD35_MEDIUM, **FLOW, sampling=euler(40, 4.5)),
    Family("sd3.5-large", "Stable Diffusion 3.5 Large", SD35_LARGE, **FLOW, sampling=euler(28, 3.5)),
    Family(
        "sd3.5-large-turbo", "Stable Diffusion 3.5 Large Turbo", SD35_LARGE, **FLOW, sampling=euler(4, 1.0)
    ),
)

CLIPS = ("text_encoders/clip_l.safetensors", "text_encoders/clip_g.safetensors")
ENCODERS = (*CLIPS, "text_encoders/t5xxl_fp16.safetensors", "tokenizer_3/tokenizer.json")


def _published(name: str, files: tuple[str, ...], family: str = "") -> Published:
    return Published(f"stabilityai/stable-diffusion-{name}", files, licence=COMMUNITY, family=family)


PUBLISHED = {
    # Without T5: this repository has no tokenizer for it.
    "sd3-medium": _published("3-medium", ("sd3_medium.safetensors", *CLIPS)),
    "sd3.5-medium": _published("3.5-medium", ("sd3.5_medium.safetensors", *ENCODERS)),
    "sd3.5-large": _published("3.5-large", ("sd3.5_large.safetensors", *ENCODERS)),
    "sd3.5-large-turbo": _published(
        "3.5-large-turbo", ("sd3.5_large_turbo.safetensors", *ENCODERS), "sd3.5-large-turbo"
    ),
    "taesd3": Published("madebyollin/taesd3", ONE, licence="MIT"),
}
