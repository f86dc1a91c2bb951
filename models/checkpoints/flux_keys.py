"""FLUX.1 as its publisher has it ("bfl"), and as diffusers has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.checkpoints.diffusers_configs import check_settings
from models.checkpoints.table import Form, Layout
from models.checkpoints.unet_keys import Shapes, beginnings, count
from models.flux import FluxParams

BFL = {
    r"^patch_in\.": "img_in.",
    r"^context_in\.": "txt_in.",
    r"^vector\.mlp\.0\.": "vector_in.in_layer.",
    r"^vector\.mlp\.2\.": "vector_in.out_layer.",
    r"^(time|guidance)\.fc1\.": r"\1_in.in_layer.",
    r"^(time|guidance)\.fc2\.": r"\1_in.out_layer.",
    r"^modulation_out\.": "final_layer.adaLN_modulation.1.",
    r"^patch_out\.": "final_layer.linear.",
    r"^joint\.(\d+)\.image\.": r"double_blocks.\1.img_",
    r"^joint\.(\d+)\.text\.": r"double_blocks.\1.txt_",
    r"(img|txt)_modulation\.": r"\1_mod.lin.",
    r"(img|txt)_attention\.": r"\1_attn.",
    r"^single\.(\d+)\.modulation\.": r"single_blocks.\1.modulation.lin.",
    r"^single\.(\d+)\.qkv_mlp\.": r"single_blocks.\1.linear1.",
    r"^single\.(\d+)\.out\.": r"single_blocks.\1.linear2.",
    r"^single\.": "single_blocks.",
    r"\.norm_q\.weight$": ".norm.query_norm.scale",
    r"\.norm_k\.weight$": ".norm.key_norm.scale",
    r"_attn\.out\.": "_attn.proj.",
}
DIFFUSERS = {
    r"^patch_in\.": "x_embedder.",
    r"^context_in\.": "context_embedder.",
    r"^vector\.mlp\.0\.": "time_text_embed.text_embedder.linear_1.",
    r"^vector\.mlp\.2\.": "time_text_embed.text_embedder.linear_2.",
    r"^time\.fc(\d)\.": r"time_text_embed.timestep_embedder.linear_\1.",
    r"^guidance\.fc(\d)\.": r"time_text_embed.guidance_embedder.linear_\1.",
    r"^modulation_out\.": "norm_out.linear.",
    r"^patch_out\.": "proj_out.",
    r"^joint\.": "transformer_blocks.",
    r"^single\.(\d+)\.modulation\.": r"single_transformer_blocks.\1.norm.linear.",
    r"^single\.(\d+)\.qkv_mlp\.": r"single_transformer_blocks.\1.[attn.to_q,attn.to_k,attn.to_v,proj_mlp].",
    r"^single\.(\d+)\.out\.": r"single_transformer_blocks.\1.proj_out.",
    r"^single\.(\d+)\.": r"single_transformer_blocks.\1.attn.",
}
# The blocks of two streams, which diffusers names alike in FLUX.1 and Stable Diffusion 3.
DIFFUSERS_STREAMS = {
    r"\.image\.modulation\.": ".norm1.linear.",
    r"\.text\.modulation\.": ".norm1_context.linear.",
    r"\.image\.attention(2?)\.qkv\.": r".attn\1.to_[q,k,v].",
    r"\.image\.attention(2?)\.out\.": r".attn\1.to_out.0.",
    r"\.image\.attention(2?)\.": r".attn\1.",
    r"\.text\.attention\.qkv\.": ".attn.add_[q,k,v]_proj.",
    r"\.text\.attention\.out\.": ".attn.to_add_out.",
    r"\.text\.attention\.norm_": ".attn.norm_added_",
    r"\.image\.mlp\.0\.": ".ff.net.0.proj.",
    r"\.image\.mlp\.2\.": ".ff.net.2.",
    r"\.text\.mlp\.0\.": ".ff_context.net.0.proj.",
    r"\.text\.mlp\.2\.": ".ff_context.net.2.",
}
DIFFUSERS_FORMS: dict[str, Form] = {r"^modulation_out\.": "swapped"}  # scale before shift
SETTINGS: dict[str, tuple[Any, ...]] = {"patch_size": (1,)}  # diffusers packs pixels outside of its network


def bfl() -> Layout:
    return Layout("bfl", BFL)


def diffusers(params: FluxParams) -> Layout:
    """The one product of a single block is four there, of which the MLP's is the largest."""
    return Layout(
        "diffusers",
        DIFFUSERS | DIFFUSERS_STREAMS,
        DIFFUSERS_FORMS,
        shares={r"\.qkv_mlp\.": (params.hidden, params.hidden, params.hidden, int(params.hidden * params.mlp_ratio))},
    )


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[FluxParams, Layout] | None:
    """Parameters and layout of a FLUX.1 network with these keys and shapes; None where it is none.

    hints  what keys and shapes do not say and a config.json beside them may: axes_dims_rope
    """
    if "img_in.weight" in shapes or any(key.startswith("double_blocks.") for key in shapes):
        names = ("img_in", "txt_in", "vector_in.in_layer", "guidance_in.in_layer", "final_layer.linear")
        blocks = ("double_blocks", "single_blocks", "img_mlp.0", "img_attn.norm.key_norm.scale")
        return _params(shapes, names, blocks, hints), bfl()
    if "x_embedder.weight" in shapes and "transformer_blocks.0.attn.add_k_proj.weight" in shapes:
        check_settings(hints, SETTINGS)
        embedders = "time_text_embed.text_embedder.linear_1", "time_text_embed.guidance_embedder.linear_1"
        names = ("x_embedder", "context_embedder", *embedders, "proj_out")
        blocks = ("transformer_blocks", "single_transformer_blocks", "ff.net.0.proj", "attn.norm_k.weight")
        params = _params(shapes, names, blocks, hints)
        return params, diffusers(params)
    return None


def _params(shapes: Shapes, names: tuple[str, ...], blocks: tuple[str, ...], hints: Mapping[str, Any]) -> FluxParams:
    patch_in, context_in, vector_in, guidance_in, patch_out = names
    double, single, mlp, norm = blocks
    tree = beginnings(shapes)
    guided = any(key.startswith(f"{guidance_in}.") for key in shapes)
    hidden, values = shapes[f"{patch_in}.weight"]
    head_dim = shapes[f"{double}.0.{norm}"][0]
    patch = FluxParams.patch_size**2
    return FluxParams(
        in_channels=values // patch,
        out_channels=shapes[f"{patch_out}.weight"][0] // patch,
        hidden=hidden,
        heads=hidden // head_dim,
        depth=count(tree, double),
        depth_single=count(tree, single),
        context_dim=shapes[f"{context_in}.weight"][1],
        vector_dim=shapes[f"{vector_in}.weight"][1],
        guidance_dim=shapes[f"{guidance_in}.weight"][1] if guided else None,
        axes=tuple(hints.get("axes_dims_rope") or (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)),  # published: 16, 56, 56 of 128
        mlp_ratio=shapes[f"{double}.0.{mlp}.weight"][0] / hidden,
    )
