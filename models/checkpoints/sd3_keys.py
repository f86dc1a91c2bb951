"""Stable Diffusion 3 and 3.5 as their publisher has them ("sai"), and as diffusers has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from models.checkpoints.diffusers_configs import check_settings
from models.checkpoints.flux_keys import DIFFUSERS_FORMS, DIFFUSERS_STREAMS
from models.checkpoints.table import Form, Layout
from models.checkpoints.unet_keys import Shapes, beginnings, count
from models.sd3 import HEAD_DIM, SD3Params

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
SETTINGS: dict[str, tuple[Any, ...]] = {"attention_head_dim": (HEAD_DIM,), "patch_size": (2,), "qk_norm": (None, "rms_norm")}


def sai() -> Layout:
    return Layout("sai", SAI)


def diffusers(params: SD3Params) -> Layout:
    """There the modulation behind the network, and that of the last block's text, are scale before shift."""
    forms: dict[str, Form] = {**DIFFUSERS_FORMS, rf"^blocks\.{params.depth - 1}\.text\.modulation\.": "swapped"}
    return Layout("diffusers", DIFFUSERS, forms)


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[SD3Params, Layout] | None:
    """Parameters and layout of a network of Stable Diffusion 3 with these keys and shapes; None where it is none."""
    if any(key.startswith("joint_blocks.") for key in shapes):
        names = ("x_embedder.proj.weight", "pos_embed", "context_embedder.weight", "y_embedder.mlp.0.weight", "final_layer.linear.weight")
        return _params(shapes, names, ("joint_blocks", "x_block.attn.ln_k.weight", "x_block.attn2.qkv.weight")), sai()
    if "pos_embed.proj.weight" in shapes and "transformer_blocks.0.attn.add_k_proj.weight" in shapes:
        check_settings(hints, SETTINGS)
        text = "time_text_embed.text_embedder.linear_1.weight"
        names = ("pos_embed.proj.weight", "pos_embed.pos_embed", "context_embedder.weight", text, "proj_out.weight")
        params = _params(shapes, names, ("transformer_blocks", "attn.norm_k.weight", "attn2.to_k.weight"))
        return params, diffusers(params)
    return None


def _params(shapes: Shapes, names: tuple[str, ...], blocks: tuple[str, str, str]) -> SD3Params:
    patch_in, position, context_in, vector_in, patch_out = names
    block, norm, second = blocks
    hidden, channels, patch, _ = shapes[patch_in]
    depth = count(beginnings(shapes), block)
    dual = [i for i in range(depth) if f"{block}.{i}.{second}" in shapes]
    if dual != list(range(len(dual))):
        raise ValueError(f"the blocks {dual} of this network attend twice: known are those at its beginning")
    return SD3Params(
        in_channels=channels,
        out_channels=shapes[patch_out][0] // patch**2,
        patch_size=patch,
        depth=depth,
        heads=None if hidden == depth * HEAD_DIM else hidden // HEAD_DIM,
        context_dim=shapes[context_in][1],
        vector_dim=shapes[vector_in][1],
        positions=math.isqrt(shapes[position][-2]),  # some writers leave the leading 1 out
        qk_norm=f"{block}.0.{norm}" in shapes,
        dual=len(dual),
    )
