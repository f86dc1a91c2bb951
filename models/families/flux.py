"""FLUX.1 (Black Forest Labs 2024): [dev], [schnell], Fill, Canny and Depth, and de-distilled [dev]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.families.family import (
    OLDEST_FLOW,
    ONE,
    TINY_CLIP_L,
    TINY_T5,
    Architecture,
    Family,
    Published,
    Tower,
    euler,
)
from models.files.structure import ByOurNames, Kind, Settings, Shapes, check_settings
from models.files.table import Form, Layout
from models.networks.clip import CLIP_L
from models.networks.flux import Flux, FluxParams, TrunkParams
from models.networks.vae import VAEParams
from models.text.clip import CLIPReader
from models.text.t5 import T5Reader

# The network in files ---------------------------------------------------------------------------------------

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
# Blocks of two streams, with the same names in diffusers' FLUX.1 and Stable Diffusion 3.
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
# XLabs' adapters name the attention processors: 1 of the image, 2 of the text; a single block's qkv alone.
XLABS = {
    r"^joint\.(\d+)\.image\.attention\.(qkv|out)\.": r"double_blocks.\1.processor.\g<2>1.",
    r"^joint\.(\d+)\.text\.attention\.(qkv|out)\.": r"double_blocks.\1.processor.\g<2>2.",
    r"^single\.(\d+)\.qkv_mlp\.": r"single_blocks.\1.processor.[qkv,mlp].",
    r"^single\.(\d+)\.out\.": r"single_blocks.\1.processor.out.",
    r"\.processor\.out": ".processor.proj",
}
SETTINGS: Settings = {"patch_size": (1,)}  # diffusers packs pixels outside the network


def bfl() -> Layout:
    return Layout("bfl", BFL)


def diffusers(params: TrunkParams) -> Layout:
    """Single blocks have four linear layers there in place of qkv_mlp."""
    hidden = params.hidden
    shares = {r"\.qkv_mlp\.": (hidden, hidden, hidden, int(hidden * params.mlp_ratio))}
    return Layout("diffusers", DIFFUSERS | DIFFUSERS_STREAMS, DIFFUSERS_FORMS, shares=shares)


def xlabs(params: FluxParams) -> Layout:
    """How XLabs' adapters name layers."""
    mlp = int(params.hidden * params.mlp_ratio)
    return Layout("x-flux", XLABS, shares={r"\.qkv_mlp\.": (3 * params.hidden, mlp)})


def recognise(shapes: Shapes, hints: Mapping[str, Any]) -> tuple[FluxParams, Layout] | None:
    """Parameters and layout of a FLUX.1 network with these keys and shapes; None for other tensors.

    hints  of a config.json: axes_dims_rope
    """
    layout = find_layout(shapes, hints)
    has_vector = any(key.startswith(("vector_in.", "time_text_embed.")) for key in shapes)  # Chroma has none
    if layout is None or not has_vector:
        return None
    at = ByOurNames(shapes, layout)
    guidance_dim = at["guidance.fc1.weight"][1] if any("guidance_" in key for key in shapes) else None
    vector_dim = at["vector.mlp.0.weight"][1]
    params = FluxParams(**trunk(at, hints), vector_dim=vector_dim, guidance_dim=guidance_dim)
    return params, bfl() if layout.name == "bfl" else diffusers(params)


def find_layout(shapes: Shapes, hints: Mapping[str, Any]) -> Layout | None:
    """The layout of FLUX.1's blocks, or a derived network's, in these keys; None for other tensors."""
    if "img_in.weight" in shapes or any(key.startswith("double_blocks.") for key in shapes):
        return bfl()
    if "x_embedder.weight" in shapes and "transformer_blocks.0.attn.add_k_proj.weight" in shapes:
        check_settings(hints, SETTINGS)
        return diffusers(TrunkParams())  # for its names
    return None


def trunk(at: ByOurNames, hints: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of all networks with FLUX.1's blocks."""
    patch = TrunkParams.patch_size**2
    hidden, values = at["patch_in.weight"]
    head_dim = at["joint.0.image.attention.norm_k.weight"][0]
    axes = (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)  # published: 16, 56, 56 of 128
    return {
        "in_channels": values // patch,
        "out_channels": at["patch_out.weight"][0] // patch,
        "hidden": hidden,
        "heads": hidden // head_dim,
        "depth": at.count("joint.{}.image.attention.norm_k.weight"),
        "depth_single": at.count("single.{}.norm_k.weight"),
        "context_dim": at["context_in.weight"][1],
        "axes": tuple(hints.get("axes_dims_rope") or axes),
        "mlp_ratio": at["joint.0.image.mlp.0.weight"][0] / hidden,
    }


def config(p: FluxParams, size: tuple[int, int]) -> dict[str, Any]:
    """For FluxTransformer2DModel."""
    own = {"pooled_projection_dim": p.vector_dim, "guidance_embeds": p.guidance_dim is not None}
    names = {"_class_name": "FluxTransformer2DModel", "_diffusers_version": OLDEST_FLOW}
    return {**names, **trunk_config(p, own)}


def trunk_config(p: TrunkParams, own: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of FLUX.1's blocks as diffusers names them, with a network's `own`."""
    patch = p.patch_size**2
    return {
        "patch_size": 1,
        "in_channels": p.in_channels * patch,
        "out_channels": p.out_channels * patch,
        "num_layers": p.depth,
        "num_single_layers": p.depth_single,
        "attention_head_dim": p.hidden // p.heads,
        "num_attention_heads": p.heads,
        "joint_attention_dim": p.context_dim,
        **own,
        "axes_dims_rope": p.axes,
    }


FLUX = Kind(
    name="flux",
    part="backbone",
    title="FLUX transformer",
    network=Flux,
    params=FluxParams,
    recognise=recognise,
    single=lambda _: bfl(),
    diffusers=diffusers,
    config=config,
    in_adapters=(xlabs,),
)

# Families ---------------------------------------------------------------------------------------------------

POOLED = CLIPReader(CLIP_L, skip=None, pooled=True, projected=False)  # T5 alone gives the context
TOWERS = (
    Tower("clip_l", POOLED, TINY_CLIP_L, "text_encoders.clip_l.transformer."),
    Tower("t5", T5Reader(), TINY_T5, "text_encoders.t5xxl.transformer.", "text_encoder_2", file="t5xxl"),
)
LATENTS = VAEParams(latent_channels=16, quant_conv=False, scale=0.3611, shift=0.1159)
TINY_TRUNK: dict[str, Any] = {"hidden": 64, "heads": 2, "depth": 2, "depth_single": 2, "axes": (4, 14, 14)}
TINY = FluxParams(**TINY_TRUNK)


def _image_channels(p: FluxParams) -> int:
    """Channels of the image condition."""
    return p.in_channels - p.out_channels


DEV = Architecture(
    name="flux-dev",
    kind=FLUX,
    network=FluxParams(),
    tiny=TINY,
    matches=lambda p: p.guidance_dim is not None and _image_channels(p) == 0,
    towers=TOWERS,
    vae=LATENTS,
    roles={"control": ("latents",), "inpaint": ("masked", "mask_pixels")},
    pipelines={None: "FluxPipeline", "control": "FluxControlPipeline", "inpaint": "FluxFillPipeline"},
    diffusers=OLDEST_FLOW,
    vae_prefix="vae.",
)
SCHNELL = replace(
    DEV,
    name="flux-schnell",
    network=FluxParams(guidance_dim=None),
    tiny=replace(TINY, guidance_dim=None),
    matches=lambda p: p.guidance_dim is None,
    note="taken for [schnell], without a guidance embedding: family='flux-dedistilled' is de-distilled [dev]",
)
FILL = replace(
    DEV,
    name="flux-fill",
    network=FluxParams(in_channels=96),
    tiny=replace(TINY, in_channels=96),
    matches=lambda p: p.guidance_dim is not None and _image_channels(p) not in (0, p.out_channels),
)
CANNY = replace(
    DEV,
    name="flux-canny",
    network=FluxParams(in_channels=32),
    tiny=replace(TINY, in_channels=32),
    matches=lambda p: p.guidance_dim is not None and _image_channels(p) == p.out_channels,
    note="taken for Canny, control by edges: control by depth is family='flux-depth'",
)
ARCHITECTURES = (DEV, SCHNELL, FILL, CANNY)

FLOW: dict[str, Any] = {"size": 1024, "schedule": {"name": "flow"}, "prediction": "flow"}
BY_SIZE: dict[str, Any] = {"spacing": "mu_shift"}
APACHE, NON_COMMERCIAL = "Apache 2.0", "FLUX.1 [dev] Non-Commercial"
DEV_LICENCE: dict[str, Any] = {"licence": NON_COMMERCIAL, **FLOW, "grid": BY_SIZE}
FAMILIES = (
    Family("flux-dev", "FLUX.1 [dev]", DEV, **DEV_LICENCE, sampling=euler(28, 3.5)),
    Family(
        "flux-schnell",
        "FLUX.1 [schnell]",
        SCHNELL,
        APACHE,
        **FLOW,
        grid={"spacing": "linspace"},
        sampling=euler(4, 1.0),
        text={"t5": {"length": 256}},
        guided=False,
    ),
    # Classifier-free guidance, as the network takes no scale.
    Family("flux-dedistilled", "FLUX.1 [dev], de-distilled", SCHNELL, **DEV_LICENCE, sampling=euler(28, 3.5)),
    Family("flux-fill", "FLUX.1 Fill [dev]", FILL, **DEV_LICENCE, sampling=euler(50, 30.0)),
    Family("flux-canny", "FLUX.1 Canny [dev]", CANNY, **DEV_LICENCE, sampling=euler(50, 30.0)),
    Family("flux-depth", "FLUX.1 Depth [dev]", CANNY, **DEV_LICENCE, sampling=euler(30, 10.0)),
)

# For `load` next to the single file: T5 in two shards with their index, and its tokenizer.
PARTS = (
    "ae.safetensors",
    "text_encoder/model.safetensors",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model-00002-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json",
    "tokenizer_2/tokenizer.json",
)


def _published(repo: str, file: str, licence: str = NON_COMMERCIAL, family: str = "") -> Published:
    return Published(f"black-forest-labs/{repo}", (file, *PARTS), licence=licence, family=family)


PUBLISHED = {
    "flux-schnell": _published("FLUX.1-schnell", "flux1-schnell.safetensors", APACHE),
    "flux-dev": _published("FLUX.1-dev", "flux1-dev.safetensors"),
    "flux-fill": _published("FLUX.1-Fill-dev", "flux1-fill-dev.safetensors"),
    "flux-canny": _published("FLUX.1-Canny-dev", "flux1-canny-dev.safetensors"),
    "flux-depth": _published("FLUX.1-Depth-dev", "flux1-depth-dev.safetensors", family="flux-depth"),
    "taef1": Published("madebyollin/taef1", ONE, licence="MIT"),
}
