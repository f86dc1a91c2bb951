"""The UNet as latent diffusion's own files have it ("ldm": SD and SDXL single files) and as diffusers has it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from diffusion.messages import brief
from models.checkpoints.diffusers_configs import UNET_SETTINGS, check_settings
from models.checkpoints.table import Layout
from models.unet import UNetParams

Shapes = Mapping[str, tuple[int, ...]]
Tree = Mapping[str, set[str]]
"""What follows each beginning of a key: "a.0.b" puts "0" under "a", and "b" under "a.0"."""

TRANSFORMER = {
    r"\.blocks\.(\d+)\.": r".transformer_blocks.\1.",
    r"\.self_attention\.qkv\.": ".attn1.to_[q,k,v].",
    r"\.self_attention\.out\.": ".attn1.to_out.0.",
    r"\.cross_attention\.q\.": ".attn2.to_q.",
    r"\.cross_attention\.kv\.": ".attn2.to_[k,v].",
    r"\.cross_attention\.out\.": ".attn2.to_out.0.",
    r"\.feed_forward\.proj_in\.": ".ff.net.0.proj.",
    r"\.feed_forward\.proj_out\.": ".ff.net.2.",
}
LDM = {
    r"^conv_in\.": "input_blocks.0.0.",
    r"^time\.fc1\.": "time_embed.0.",
    r"^time\.fc2\.": "time_embed.2.",
    r"^guidance\.": "time_embed.cond_proj.",
    r"^vector\.mlp\.": "label_emb.0.",
    r"^middle\.0\.res\.": "middle_block.0.res.",
    r"^middle\.0\.attention\.": "middle_block.1.",
    r"^middle\.1\.res\.": "middle_block.2.res.",
    r"^norm_out\.": "out.0.",
    r"^conv_out\.": "out.2.",
    r"\.res\.norm1\.": ".in_layers.0.",
    r"\.res\.conv1\.": ".in_layers.2.",
    r"\.res\.emb\.": ".emb_layers.1.",
    r"\.res\.norm2\.": ".out_layers.0.",
    r"\.res\.conv2\.": ".out_layers.3.",
    r"\.res\.skip\.": ".skip_connection.",
    **TRANSFORMER,
}
DIFFUSERS = {
    r"^time\.fc(\d)\.": r"time_embedding.linear_\1.",
    r"^guidance\.": "time_embedding.cond_proj.",
    r"^vector\.mlp\.0\.": "add_embedding.linear_1.",
    r"^vector\.mlp\.2\.": "add_embedding.linear_2.",
    r"^middle\.(\d)\.res\.": r"mid_block.resnets.\1.",
    r"^middle\.0\.attention\.": "mid_block.attentions.0.",
    r"^(down|up)\.(\d+)\.(\d+)\.res\.": r"\1_blocks.\2.resnets.\3.",
    r"^(down|up)\.(\d+)\.(\d+)\.attention\.": r"\1_blocks.\2.attentions.\3.",
    r"^down\.(\d+)\.\d+\.conv\.": r"down_blocks.\1.downsamplers.0.conv.",
    r"^up\.(\d+)\.\d+\.conv\.": r"up_blocks.\1.upsamplers.0.conv.",
    r"^norm_out\.": "conv_norm_out.",
    r"(resnets\.\d+)\.emb\.": r"\1.time_emb_proj.",
    r"(resnets\.\d+)\.skip\.": r"\1.conv_shortcut.",
    **TRANSFORMER,
}


def ldm(params: UNetParams) -> Layout:
    """One flat list on each side; what doubles the resolution comes last in the block before it."""
    stage = params.blocks + 2  # a level's blocks on the way up, and its upsampling

    def number(name: str) -> str:
        side, _, rest = name.partition(".")
        if side not in ("down", "up"):
            return name
        index, _, rest = rest.partition(".")
        i = int(index)
        if side == "down":
            block, place = i + 1, 0
        else:
            level, j = divmod(i, stage)
            block = level * (params.blocks + 1) + min(j, params.blocks)
            place = 1 + bool(params.attention[-1 - level])
        part, _, leaf = rest.partition(".")
        inside = {"res": "0.res", "attention": "1", "conv": "0.op" if side == "down" else f"{place}.conv"}[part]
        return f"{'input' if side == 'down' else 'output'}_blocks.{block}.{inside}.{leaf}"

    return Layout("ldm", LDM, number=number)


def diffusers(params: UNetParams) -> Layout:
    """Level by level."""
    stage = {"down": params.blocks + 1, "up": params.blocks + 2}

    def by_level(match: re.Match[str]) -> str:
        level, i = divmod(int(match[2]), stage[match[1]])
        return f"{match[1]}.{level}.{i}."

    return Layout("diffusers", DIFFUSERS, number=lambda name: re.sub(r"^(down|up)\.(\d+)\.", by_level, name))


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[UNetParams, Layout] | None:
    """Parameters and layout of a UNet with these keys and shapes; None where it is none.

    hints  what keys and shapes do not say and a config.json beside them may: attention_head_dim, norm_num_groups
    """
    if "input_blocks.0.0.weight" in shapes and "out.2.weight" in shapes:
        tree = beginnings(shapes)
        names = ("input_blocks.0.0", "out.2", "label_emb.0.0", "time_embed")
        params = _params(shapes, _ldm_levels(shapes, tree), names, depth(tree, "middle_block.1"), hints)
        return params, ldm(params)
    if "conv_in.weight" in shapes and "down_blocks.0.resnets.0.time_emb_proj.weight" in shapes:
        tree = beginnings(shapes)
        check_settings(hints, UNET_SETTINGS)
        names = ("conv_in", "conv_out", "add_embedding.linear_1", "time_embedding")
        params = _params(shapes, _diffusers_levels(shapes, tree), names, depth(tree, "mid_block.attentions.0"), hints)
        return params, diffusers(params)
    return None


Level = list[tuple[int, int]]
"""The residual blocks of a level on the way down: width, and depth of the transformer after it."""


def _params(shapes: Shapes, levels: list[Level], names: tuple[str, ...], middle: int, hints: Mapping[str, Any]) -> UNetParams:
    conv_in, conv_out, vector, time = names
    channels = shapes[f"{conv_in}.weight"][0]
    if any(level[0][0] % channels or len(set(level)) > 1 or len(level) != len(levels[0]) for level in levels):
        raise ValueError(f"the blocks of this UNet differ within a level or between levels, which none that is known does: {levels}")
    context = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None)
    linear = any(key.endswith("proj_in.weight") and len(shape) == 2 for key, shape in shapes.items())
    heads, head_dim = _heads(hints, linear, [level[0][0] for level in levels])
    return UNetParams(
        in_channels=shapes[f"{conv_in}.weight"][1],
        out_channels=shapes[f"{conv_out}.weight"][0],
        channels=channels,
        channel_mult=tuple(level[0][0] // channels for level in levels),
        blocks=len(levels[0]),
        attention=tuple(level[0][1] for level in levels),
        middle_attention=middle,
        heads=heads,
        head_dim=head_dim,
        linear_projection=linear,
        context_dim=context,
        vector_dim=shapes[f"{vector}.weight"][1] if f"{vector}.weight" in shapes else None,
        guidance_dim=shapes[f"{time}.cond_proj.weight"][1] if f"{time}.cond_proj.weight" in shapes else None,
        groups=hints.get("norm_num_groups") or 32,
    )


def _heads(hints: Mapping[str, Any], linear: bool, widths: list[int]) -> tuple[int | None, int | None]:
    """heads and head_dim, of which one is None. No tensor's shape tells: SD 1 has 8 heads, SD 2 and later heads of 64 channels.

    A diffusers configuration gives, under the name attention_head_dim, the number of heads, per level or for all.
    """
    given = hints.get("attention_head_dim")
    if given is None:
        return (None, 64) if linear else (8, None)
    if isinstance(given, int):
        return given, None
    if len(given) != len(widths):
        raise ValueError(f"attention_head_dim {brief(given)} is neither a number nor one for each of {len(widths)} levels")
    dims = {width // heads for width, heads in zip(widths, given, strict=True)}
    if len(set(given)) == 1:
        return given[0], None
    if len(dims) > 1:
        raise ValueError(f"attention_head_dim {brief(given)} fixes neither the number of heads nor their width over all levels")
    return None, dims.pop()


def _ldm_levels(shapes: Shapes, tree: Tree) -> list[Level]:
    levels: list[Level] = [[]]
    for i in range(1, count(tree, "input_blocks")):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append([])
        else:
            levels[-1].append((shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0], depth(tree, f"input_blocks.{i}.1")))
    return levels


def _diffusers_levels(shapes: Shapes, tree: Tree) -> list[Level]:
    return [
        [
            (shapes[f"down_blocks.{i}.resnets.{j}.conv2.weight"][0], depth(tree, f"down_blocks.{i}.attentions.{j}"))
            for j in range(count(tree, f"down_blocks.{i}.resnets"))
        ]
        for i in range(count(tree, "down_blocks"))
    ]


def depth(tree: Tree, place: str) -> int:
    return count(tree, f"{place}.transformer_blocks")


def count(tree: Tree, place: str) -> int:
    """How many numbered things stand in a place."""
    return len(tree.get(place, ()))


def beginnings(keys: Iterable[str]) -> Tree:
    """All places in these keys."""
    tree: dict[str, set[str]] = {}
    for key in keys:
        place = ""
        for part in key.split("."):
            tree.setdefault(place, set()).add(part)
            place = f"{place}.{part}" if place else part
    return tree
