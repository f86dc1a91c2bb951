"""Keys of the KL autoencoder in latent diffusion's files ("ldm"), in diffusers, and in diffusers < 0.18."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.files.structure import ByOurNames, Kind, Settings, Shapes, by_level, check_settings
from models.files.table import Form, Layout
from models.networks.vae import VAE, VAEParams

COMMON = {r"^quant\.": "quant_conv.", r"^post_quant\.": "post_quant_conv."}
LDM = {
    **COMMON,
    r"\.middle\.0\.": ".mid.block_1.",
    r"\.middle\.1\.norm\.": ".mid.attn_1.norm.",
    r"\.middle\.1\.attention\.qkv\.": ".mid.attn_1.[q,k,v].",
    r"\.middle\.1\.attention\.out\.": ".mid.attn_1.proj_out.",
    r"\.middle\.2\.": ".mid.block_2.",
    r"\.down\.(\d+)\.\d+\.conv\.": r".down.\1.downsample.conv.",
    r"\.up\.(\d+)\.\d+\.conv\.": r".up.\1.upsample.conv.",
    r"\.(down|up)\.(\d+)\.(\d+)\.": r".\1.\2.block.\3.",
    r"\.skip\.": ".nin_shortcut.",
}
LDM_FORMS: dict[str, Form] = {r"\.attention\.": "conv"}
DIFFUSERS = {
    **COMMON,
    r"\.middle\.0\.": ".mid_block.resnets.0.",
    r"\.middle\.1\.norm\.": ".mid_block.attentions.0.group_norm.",
    r"\.middle\.1\.attention\.qkv\.": ".mid_block.attentions.0.to_[q,k,v].",
    r"\.middle\.1\.attention\.out\.": ".mid_block.attentions.0.to_out.0.",
    r"\.middle\.2\.": ".mid_block.resnets.1.",
    r"\.norm_out\.": ".conv_norm_out.",
    r"\.down\.(\d+)\.\d+\.conv\.": r".down_blocks.\1.downsamplers.0.conv.",
    r"\.up\.(\d+)\.\d+\.conv\.": r".up_blocks.\1.upsamplers.0.conv.",
    r"\.(down|up)\.(\d+)\.(\d+)\.": r".\1_blocks.\2.resnets.\3.",
    r"\.skip\.": ".conv_shortcut.",
}
LEGACY = {**DIFFUSERS, r"\.to_\[q,k,v\]\.": ".[query,key,value].", r"\.to_out\.0\.": ".proj_attn."}

SETTINGS: Settings = {"act_fn": ("silu", "swish"), "mid_block_add_attention": (True,)}
LATENT_STATISTICS = ("edm_mean", "edm_std")  # tensors per channel in Playground's file


def ldm(params: VAEParams) -> Layout:
    """Levels are numbered from the finest, also on the way up."""
    last = len(params.channel_mult) - 1
    return Layout("ldm", LDM, LDM_FORMS, lambda name: by_level(name, params.blocks, last))


def diffusers(params: VAEParams, rules: Mapping[str, str] = DIFFUSERS) -> Layout:
    """Levels are numbered in the order of computation."""
    return Layout("diffusers", rules, renumber=lambda name: by_level(name, params.blocks))


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[VAEParams, Layout] | None:
    """Parameters (except the scale of the latents) and layout of an autoencoder; None for other tensors.

    hints  of a config.json: norm_num_groups
    """
    if "encoder.conv_in.weight" not in shapes or "decoder.conv_in.weight" not in shapes:
        return None
    if "encoder.down.0.block.0.conv1.weight" in shapes:
        rules: Mapping[str, str] = LDM
    elif "encoder.down_blocks.0.resnets.0.conv1.weight" in shapes:
        check_settings(hints, SETTINGS)
        rules = LEGACY if "encoder.mid_block.attentions.0.query.weight" in shapes else DIFFUSERS
    else:
        return None
    at = ByOurNames(shapes, Layout("", rules))  # with blocks numbered within levels
    channels = at["encoder.conv_in.weight"][0]
    levels = range(at.count("encoder.down.{}.0.conv1.weight"))
    params = VAEParams(
        image_channels=at["encoder.conv_in.weight"][1],
        latent_channels=at["decoder.conv_in.weight"][1],
        channels=channels,
        channel_mult=tuple(at[f"encoder.down.{i}.0.conv1.weight"][0] // channels for i in levels),
        blocks=at.count("encoder.down.0.{}.conv1.weight"),
        groups=hints.get("norm_num_groups") or 32,
        quant_conv="quant.weight" in at,
    )
    return params, ldm(params) if rules is LDM else diffusers(params, rules)


def config(p: VAEParams, size: tuple[int, int]) -> dict[str, Any]:
    """For AutoencoderKL."""
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": p.image_channels,
        "out_channels": p.image_channels,
        "latent_channels": p.latent_channels,
        "block_out_channels": [p.channels * m for m in p.channel_mult],
        "down_block_types": ["DownEncoderBlock2D"] * len(p.channel_mult),
        "up_block_types": ["UpDecoderBlock2D"] * len(p.channel_mult),
        "layers_per_block": p.blocks,
        "norm_num_groups": p.groups,
        "use_quant_conv": p.quant_conv,
        "use_post_quant_conv": p.quant_conv,
        "scaling_factor": p.scale,
        "shift_factor": p.shift or None,
        "latents_mean": p.mean,
        "latents_std": p.std,
        "sample_size": 512,
    }


AUTOENCODER = Kind(
    name="kl",
    part="vae",
    title="autoencoder",
    network=VAE,
    params=VAEParams,
    recognise=recognise,
    single=ldm,
    diffusers=diffusers,
    config=config,
    folder="vae",
)
