"""The configurations that diffusers and transformers want beside weights, from our descriptions; and what theirs may say to us."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusion.messages import brief
from diffusion.schedule import SCHEDULES
from diffusion.spacing import FEW_STEPS
from models.clip import CLIPTextParams
from models.families import description
from models.flux import FluxParams
from models.model import Model
from models.sd3 import HEAD_DIM, SD3Params
from models.t5 import T5Params
from models.t5_tokenizer import EOS as T5_EOS
from models.t5_tokenizer import PAD
from models.taesd import TAESDParams
from models.tokenizer import BOS, EOS, Vocabulary
from models.unet import UNetParams
from models.vae import VAEParams

PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sdxl-refiner": "StableDiffusionXLImg2ImgPipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
    "flux-fill": "FluxFillPipeline",
    "flux-canny": "FluxControlPipeline",
    **dict.fromkeys(("sd3", "sd3.5-medium", "sd3.5-large"), "StableDiffusion3Pipeline"),
}
WITH_IMAGE = {
    ("sd", 5): "StableDiffusionInpaintPipeline",
    ("sd", 4): "StableDiffusionInstructPix2PixPipeline",
    ("sdxl", 5): "StableDiffusionXLInpaintPipeline",
    ("sdxl", 4): "StableDiffusionXLInstructPix2PixPipeline",
}
VERSION_FLOW = "0.32.0"  # the oldest that knows all of FLUX.1 and Stable Diffusion 3.5
VERSION = "0.27.0"  # of diffusers, the oldest that knows all that is written; its pipeline for inpainting wants one named
# Ours in model_index.json, and in the metadata of single files, since keys and shapes do not tell all families; others pass over it.
FAMILY_KEY = "_family"
SETTINGS_KEY = "_settings"  # ours in the same places: entries of the description that nothing else there tells, in metadata as JSON
SETTINGS = ("grid", "sampling", "consistency", "shape")
MAX_SHIFT = 1000  # of a flow's times; published ones are up to 7
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}

# Settings that no shape tells, with the values that the networks here compute.
UNET_SETTINGS: dict[str, tuple[Any, ...]] = {
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
VAE_SETTINGS: dict[str, tuple[Any, ...]] = {"act_fn": ("silu", "swish"), "mid_block_add_attention": (True,)}
# Of a scheduler: which time the network is told. All else there says how to sample, and schedulers are exchanged.
SCHEDULER_SETTINGS: dict[str, tuple[Any, ...]] = {"timestep_type": ("discrete",)}
LCM_SETTINGS = {  # what a latent consistency model was distilled for: where it stands in a description, and what is usual
    "original_inference_steps": ("grid", "taught", 50),
    "timestep_scaling": ("consistency", "scaling", 10.0),
}
# Of a flow's scheduler: what the network's own time means, and what its times would be made by; what they are shifted by is read apart.
FLOW_SETTINGS: dict[str, tuple[Any, ...]] = {"invert_sigmas": (False,), "num_train_timesteps": (1000,)}
FLOW_TIMES: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}
TAESD_SETTINGS: dict[str, tuple[Any, ...]] = {
    "act_fn": ("relu",),
    "scaling_factor": (1.0,),
    "shift_factor": (None, 0.0),
    "upsample_fn": ("nearest",),
    "upsampling_scaling_factor": (2,),
}
TEXT_SETTINGS: dict[str, tuple[Any, ...]] = {"hidden_act": ("quick_gelu", "gelu"), "layer_norm_eps": (1e-5,)}


def check_settings(config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """ValueError where a config.json asks for another computation than ours: weights would fit, and results be wrong."""
    for name, values in known.items():
        if name in config and config[name] not in values:
            supported = " or ".join(map(repr, values))
            raise ValueError(f"config.json says {name}={brief(config[name])}, and this library computes with {supported}")


def unet(p: UNetParams, size: tuple[int, int]) -> dict[str, Any]:
    """For UNet2DConditionModel. `size`: height and width of the latents it was trained on."""
    if not p.middle_attention or p.attention[-1] not in (0, p.middle_attention):
        raise ValueError(
            f"in diffusers' folders the middle attends as the coarsest level does, here {p.middle_attention} and {p.attention[-1]} times"
        )
    widths = [p.channels * m for m in p.channel_mult]
    depths = [depth or 1 for depth in p.attention]
    depths[-1] = p.middle_attention  # which diffusers takes the middle's depth from
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in p.attention]
    return {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": VERSION,
        "sample_size": size[0] if size[0] == size[1] else list(size),
        "in_channels": p.in_channels,
        "out_channels": p.out_channels,
        "block_out_channels": widths,
        "down_block_types": down,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "layers_per_block": p.blocks,
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "attention_head_dim": p.heads or [p.heads_of(width) for width in widths],  # the number of heads, in spite of its name
        "cross_attention_dim": p.context_dim,
        "use_linear_projection": p.linear_projection,
        "norm_num_groups": p.groups,
        "time_cond_proj_dim": p.guidance_dim,
        "addition_embed_type": None if p.vector_dim is None else "text_time",
        "addition_time_embed_dim": None if p.vector_dim is None else 256,
        "projection_class_embeddings_input_dim": p.vector_dim,
    }


def flux(p: FluxParams) -> dict[str, Any]:
    """For FluxTransformer2DModel, which is given pixels that are packed already."""
    patch = p.patch_size**2
    return {
        "_class_name": "FluxTransformer2DModel",
        "_diffusers_version": VERSION_FLOW,
        "patch_size": 1,
        "in_channels": p.in_channels * patch,
        "out_channels": p.out_channels * patch,
        "num_layers": p.depth,
        "num_single_layers": p.depth_single,
        "attention_head_dim": p.hidden // p.heads,
        "num_attention_heads": p.heads,
        "joint_attention_dim": p.context_dim,
        "pooled_projection_dim": p.vector_dim,
        "guidance_embeds": p.guidance_dim is not None,
        "axes_dims_rope": p.axes,
    }


def sd3(p: SD3Params, size: tuple[int, int]) -> dict[str, Any]:
    """For SD3Transformer2DModel, which knows squares. `size`: height and width of the latents it was trained on."""
    return {
        "_class_name": "SD3Transformer2DModel",
        "_diffusers_version": VERSION_FLOW,
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


def vae(p: VAEParams) -> dict[str, Any]:
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


def taesd(p: TAESDParams) -> dict[str, Any]:
    """For AutoencoderTiny."""
    widths = {f"{half}_block_out_channels": [p.channels] * 4 for half in ("encoder", "decoder")}
    return {"_class_name": "AutoencoderTiny", "latent_channels": p.latent_channels, **widths}


def class_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """Library and class of the part that has this configuration."""
    return ("diffusers", config["_class_name"]) if "_class_name" in config else ("transformers", config["architectures"][0])


def text(p: CLIPTextParams, bos: int = BOS, eos: int = EOS) -> dict[str, Any]:
    """For CLIPTextModel, with projection where there is one."""
    return {
        "architectures": ["CLIPTextModel" if p.projection is None else "CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        "vocab_size": p.vocab,
        "hidden_size": p.width,
        "intermediate_size": 4 * p.width,
        "projection_dim": p.projection or p.width,
        "num_hidden_layers": p.layers,
        "num_attention_heads": p.heads,
        "max_position_embeddings": p.length,
        "hidden_act": p.activation,
        "layer_norm_eps": 1e-5,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": 1,
    }


def t5(p: T5Params) -> dict[str, Any]:
    """For T5EncoderModel."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "vocab_size": p.vocab,
        "d_model": p.width,
        "d_kv": p.head_dim,
        "d_ff": p.hidden,
        "num_layers": p.layers,
        "num_heads": p.heads,
        "relative_attention_num_buckets": p.buckets,
        "relative_attention_max_distance": p.max_distance,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
        "eos_token_id": T5_EOS,
        "decoder_start_token_id": PAD,
    }


def tokenizer(of: Vocabulary, pad: str, length: int) -> dict[str, Any]:
    """For CLIPTokenizer."""
    return {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": of.bos,
        "eos_token": of.eos,
        "unk_token": of.unk,
        "pad_token": pad,
        "model_max_length": length,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }


def t5_tokenizer(length: int) -> dict[str, Any]:
    """For T5TokenizerFast."""
    return {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": length}


def scheduler(model: Model) -> dict[str, Any]:
    """For a scheduler that fits schedule and prediction."""
    described = model.spec["schedule"]
    defaults = {p.name: p.default for p in inspect.signature(SCHEDULES[described["name"]]).parameters.values()}
    schedule, prediction = {"shift": 1.0, **defaults, **described}, model.prediction.name
    if schedule["name"] == "ve" and prediction == "edm":
        sigmas = {"sigma_min": schedule["sigma_min"], "sigma_max": schedule["sigma_max"], "sigma_data": 0.5}
        return {"_class_name": "EDMDPMSolverMultistepScheduler", **sigmas, "prediction_type": "epsilon", "sigma_schedule": "karras"}
    if (schedule["name"], prediction) == ("flow", "flow") and schedule["shift"] == 1:
        return _flow_scheduler(model)
    if schedule["name"] not in ("linear", "scaled_linear") or prediction not in PREDICTIONS or schedule["shift"] != 1:
        raise ValueError(f"diffusers' folders have no schedule {described} with prediction {prediction!r}: use layout='native'")
    spacing = model.spec.get("grid", {}).get("spacing")
    name = "LCMScheduler" if model.distilled else "EulerAncestralDiscreteScheduler" if spacing == "turbo" else "EulerDiscreteScheduler"
    distilled = {theirs: model.spec[part][ours] for theirs, (part, ours, _) in LCM_SETTINGS.items() if ours in model.spec.get(part, {})}
    trailing = spacing in ("trailing", "turbo")  # both begin at the noisiest row, which leading never visits
    return {
        "_class_name": name,
        "num_train_timesteps": schedule["steps"],
        "beta_start": schedule["start"],
        "beta_end": schedule["end"],
        "beta_schedule": schedule["name"],
        "prediction_type": PREDICTIONS[prediction],
        "rescale_betas_zero_snr": schedule["zero_terminal_snr"],
        "timestep_spacing": "trailing" if trailing else "leading",
        "steps_offset": 0 if trailing else 1,
        **distilled,
    }


def _flow_scheduler(model: Model) -> dict[str, Any]:
    """For FlowMatchEulerDiscreteScheduler, which shifts times by a factor, or as mu_shift does by the size of the image."""
    grid = model.spec.get("grid", {})
    if grid.get("spacing", "linspace") not in ("linspace", "mu_shift"):
        raise ValueError(f"diffusers' folders have no times {grid} for a flow: use layout='native'")
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": VERSION_FLOW,
        "num_train_timesteps": 1000,
        "shift": grid.get("shift", 1.0),
        "use_dynamic_shifting": grid.get("spacing") == "mu_shift",
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "base_shift": 0.5,
        "max_shift": 1.15,
    }


def flow_grid(config: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The grid that a flow's scheduler means, {} where it says nothing: schedulers are exchanged. ValueError for a shift that is none."""
    flow = str(config.get("_class_name")).startswith("FlowMatch")
    if config.get("use_dynamic_shifting") and (flow or config.get("use_flow_sigmas")):
        return {"spacing": "mu_shift"}
    shift = config.get("shift", 1.0) if flow else config.get("flow_shift", 1.0) if config.get("use_flow_sigmas") else None
    if shift is None or (shift == 1 and not flow):  # by default, where the scheduler was made for others
        return {}
    if not isinstance(shift, int | float) or not 0 < shift < MAX_SHIFT:
        raise ValueError(f"shift={brief(shift)} is not a number in (0, {MAX_SHIFT})")
    least = shift / (1000 + shift - 1)  # the time that the scheduler's first of a thousand rows is shifted to
    return {"spacing": "linspace"} | ({"t_end": least} if base.startswith("sd3") else {}) | ({"shift": shift} if shift != 1 else {})


def usual_grid(grid: Mapping[str, Any], schedule: Mapping[str, Any]) -> dict[str, Any]:
    """A family's grid on a schedule: pure noise, if that ends in it, is left out by spacings but trailing and those for few steps (Lin et
    al. 2024, section 3.3)."""
    begins_there = not schedule.get("zero_terminal_snr") or grid.get("spacing") in FEW_STEPS
    return dict(grid) if begins_there else {"spacing": "trailing"}


def own_settings(model: Model, base: str, sample_size: Any) -> dict[str, Any]:
    """The entries of SETTINGS that a folder's other configurations do not say, which readers would take from the family.

    sample_size  in the backbone's configuration, None where it has none
    """
    network: Any = model.network
    usual = description(model.spec.get("family", base), network.params, model.vae.params if model.vae else None, None)
    config = scheduler(model)
    for theirs, (part, ours, value) in LCM_SETTINGS.items():
        if config.get(theirs, value) != value:
            usual[part][ours] = config[theirs]
    flow = model.prediction.name == "flow"
    usual["grid"] = flow_grid(config, base) if flow else usual_grid(usual["grid"], model.spec["schedule"])
    if sample_size is not None:
        usual["shape"][1:] = sample_size if isinstance(sample_size, list) else [sample_size] * 2
    return {name: model.spec[name] for name in SETTINGS if name in model.spec and model.spec[name] != usual.get(name)}


def index(model: Model, base: str, parts: dict[str, tuple[str, str]], sample_size: Any) -> dict[str, Any]:
    """model_index.json: the pipeline's class and that of every part, as (library, class); sample_size as in `own_settings`."""
    named: dict[str, Any] = {FAMILY_KEY: model.spec["family"]} if "family" in model.spec else {}
    if own := own_settings(model, base, sample_size):
        named[SETTINGS_KEY] = own
    if base.startswith(("flux", "sd3")):
        unused = {name: [None, None] for name in ("text_encoder_3", "tokenizer_3") if base.startswith("sd3") and name not in parts}
        present = {part: list(what) for part, what in parts.items()}
        return {"_class_name": PIPELINES[base], "_diffusers_version": VERSION_FLOW, **named, **unused, **present}
    kind = "sdxl" if base.startswith("sdxl") else "sd"
    name = WITH_IMAGE.get((kind, model.image_channels), PIPELINES[base])
    if model.spec.get("family") == "lcm":
        name = "LatentConsistencyModelPipeline"
    extra: dict[str, Any] = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    if kind == "sdxl":
        extra = {"force_zeros_for_empty_prompt": (base == "sdxl") if model.text is None else model.text.params.null == "zeros"}
        absent = ["text_encoder", "tokenizer"] if base == "sdxl-refiner" else []
        extra |= {part: [None, None] for part in absent} | ({"requires_aesthetics_score": True} if absent else {})
    return {"_class_name": name, "_diffusers_version": VERSION, **named, **extra, **{part: list(what) for part, what in parts.items()}}
