"""Stable Diffusion XL, its refiner (Podell et al. 2023), and derived models: Turbo, LCM, Playground v2.5."""

from __future__ import annotations

from typing import Any

from models.families.family import ONE, TINY_CLIP, TINY_CLIP_L, Architecture, Family, Published, Role, Tower
from models.families.sd import BETAS, KARRAS, LCM, RAIL_PP, ROLES, STABILITY, TURBO, TURBO_SCHEDULER, UNET
from models.networks.clip import CLIP_G, CLIP_L
from models.networks.unet import UNetParams
from models.networks.vae import VAEParams
from models.text.clip import CLIPReader, openclip
from models.text.recipes import NUMBER_DIM

# Families ---------------------------------------------------------------------------------------------------


def _is_refiner(p: UNetParams) -> bool:
    """Whether the vector holds a pooled text as wide as the context, and five numbers."""
    return p.vector_dim is not None and p.vector_dim == (p.context_dim or 0) + 5 * NUMBER_DIM


PIPELINES: dict[Role | None, str] = {
    None: "StableDiffusionXLPipeline",
    "inpaint": "StableDiffusionXLInpaintPipeline",
    "edit": "StableDiffusionXLInstructPix2PixPipeline",
}

LATENTS = VAEParams(scale=0.13025)
CLIP_L_READER = CLIPReader(CLIP_L, skip=1, norm=False)
BIGG = CLIPReader(CLIP_G, skip=1, norm=False, pad=0, pooled=True)
TINY: dict[str, Any] = {"channels": 64, "blocks": 1, "linear_projection": True}

SDXL = Architecture(
    name="sdxl",
    kind=UNET,
    network=UNetParams(
        channel_mult=(1, 2, 4),
        attention=(0, 2, 10),
        middle_attention=10,
        context_dim=2048,
        vector_dim=2816,
        linear_projection=True,
    ),
    tiny=UNetParams(**TINY, channel_mult=(1, 2), attention=(0, 2), middle_attention=2),
    # SD 2.1 unCLIP has a vector too, but attends at its finest level.
    matches=lambda p: p.vector_dim is not None and not _is_refiner(p) and not p.attention[0],
    towers=(
        Tower("clip_l", CLIP_L_READER, TINY_CLIP_L, "conditioner.embedders.0.transformer."),
        Tower("clip_g", BIGG, TINY_CLIP, "conditioner.embedders.1.model.", "text_encoder_2", openclip()),
    ),
    join={"numbers": ("height", "width", "top", "left", "target_height", "target_width"), "null": "zeros"},
    vae=LATENTS,
    roles=ROLES,
    pipelines=PIPELINES,
    marks_v=True,
)
REFINER = Architecture(
    name="sdxl-refiner",
    kind=UNET,
    network=UNetParams(
        channels=384,
        attention=(0, 4, 4, 0),
        middle_attention=4,
        context_dim=1280,
        vector_dim=2560,
        linear_projection=True,
    ),
    tiny=UNetParams(**TINY, channel_mult=(1, 2, 2), attention=(0, 1, 0)),
    matches=_is_refiner,
    towers=(
        Tower("clip_g", BIGG, TINY_CLIP, "conditioner.embedders.0.model.", "text_encoder_2", openclip()),
    ),
    # An aesthetic score (6.0 for the prompt, 2.5 for the negative prompt) in place of the target size.
    join={"numbers": ("height", "width", "top", "left", "score")},
    vae=LATENTS,
    roles=ROLES,
    pipelines={**PIPELINES, None: "StableDiffusionXLImg2ImgPipeline"},
    index={"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True},
    marks_v=True,
)
ARCHITECTURES = (SDXL, REFINER)

MULTISTEP: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 30, "guidance": 7.0}
PLAIN: dict[str, Any] = {"size": 1024, "schedule": BETAS, "grid": KARRAS, "sampling": MULTISTEP}
V: dict[str, Any] = {**PLAIN, "prediction": "v"}
TURBO_XL: dict[str, Any] = {**TURBO, "schedulers": (TURBO_SCHEDULER,), "sample_size": 64}
PLAYGROUND = "Playground v2.5 Community"
FAMILIES = (
    Family("sdxl", "Stable Diffusion XL", SDXL, RAIL_PP, **PLAIN, table="sdxl"),
    Family("sdxl-v", "Stable Diffusion XL with v-prediction", SDXL, RAIL_PP, **V, table="sdxl"),
    Family("sdxl-refiner", "Stable Diffusion XL refiner", REFINER, RAIL_PP, **PLAIN),
    Family("sdxl-turbo", "SDXL-Turbo", SDXL, STABILITY, size=512, **TURBO_XL),
    Family("lcm-sdxl", "LCM of Stable Diffusion XL", SDXL, RAIL_PP, size=1024, **LCM),
    Family(
        "playground-v2.5",
        "Playground v2.5",
        SDXL,
        PLAYGROUND,
        size=1024,
        latents={
            "scale": 0.5,
            "mean": (-1.6574, 1.886, -1.383, 2.5155),
            "std": (8.4927, 5.9022, 6.5498, 5.2299),
        },
        schedule={"name": "ve", "sigma_min": 0.002, "sigma_max": 80.0},
        prediction="edm",
        grid={"spacing": "karras", "initial": "unit"},
        sampling={"sampler": "dpmpp_2m", "steps": 30, "guidance": 3.0},
    ),
)

PUBLISHED = {
    "sdxl": Published(
        "stabilityai/stable-diffusion-xl-base-1.0",
        ("sd_xl_base_1.0.safetensors",),
        "462165984030d82259a11f4367a4eed129e94a7b",
        RAIL_PP,
    ),
    "sdxl-refiner": Published(
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        ("sd_xl_refiner_1.0.safetensors",),
        "5d4cfe854c9a9a87939ff3653551c2b3c99a4356",
        RAIL_PP,
    ),
    "sdxl-turbo": Published(
        "stabilityai/sdxl-turbo",
        ("sd_xl_turbo_1.0_fp16.safetensors",),
        "71153311d3dbb46851df1931d3ca6e939de83304",
        STABILITY,
        "sdxl-turbo",
    ),
    "playground-v2.5": Published(
        "playgroundai/playground-v2.5-1024px-aesthetic",
        ("playground-v2.5-1024px-aesthetic.fp16.safetensors",),
        "1e032f13f2fe6db2dc49947dbdbd196e753de573",
        PLAYGROUND,
    ),
    "taesdxl": Published("madebyollin/taesdxl", ONE, "b20258aaef75ef61e659c1e0f14f251cf0ad153e", "MIT"),
    "sdxl-vae-fp16-fix": Published(
        "madebyollin/sdxl-vae-fp16-fix", ONE, "207b116dae70ace3637169f1ddd2434b91b3a8cd", "MIT", "sdxl"
    ),
}
