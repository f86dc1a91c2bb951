"""Every setting that diffusers' configurations have is read, told by keys and shapes, held to what is
computed here, or harmless."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

import models
from models.families import flux, sd, sd3, taesd_keys, vae_keys
from models.layouts import scheduler
from tests.models.files.tiny import tiny
from tests.peers import diffusers

KEYS = "told by keys and shapes, which must fit exactly"
TRAINING = "of training alone"
PRECISION = "in which precision a peer computes"
UNUSED = "of kinds of networks whose settings are refused"
UNET = {
    **dict.fromkeys(
        (
            "in_channels",
            "out_channels",
            "down_block_types",
            "mid_block_type",
            "up_block_types",
            "block_out_channels",
        ),
        KEYS,
    ),
    **dict.fromkeys(
        ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "use_linear_projection"),
        KEYS,
    ),
    **dict.fromkeys(
        ("reverse_transformer_layers_per_block", "encoder_hid_dim", "num_class_embeds", "time_embedding_dim"),
        KEYS,
    ),
    **dict.fromkeys(
        ("time_cond_proj_dim", "conv_in_kernel", "conv_out_kernel", "projection_class_embeddings_input_dim"),
        KEYS,
    ),
    **dict.fromkeys(("class_embeddings_concat", "addition_embed_type_num_heads"), UNUSED),
    **dict.fromkeys(("sample_size", "norm_num_groups", "attention_head_dim"), "read"),
    "dropout": TRAINING,
    "upcast_attention": PRECISION,
}
VAE = {
    **dict.fromkeys(
        (
            "in_channels",
            "out_channels",
            "down_block_types",
            "up_block_types",
            "block_out_channels",
            "layers_per_block",
        ),
        KEYS,
    ),
    **dict.fromkeys(("latent_channels", "use_quant_conv", "use_post_quant_conv"), KEYS),
    **dict.fromkeys(
        ("norm_num_groups", "scaling_factor", "shift_factor", "latents_mean", "latents_std"), "read"
    ),
    "sample_size": TRAINING,
    "force_upcast": PRECISION,
}
FLUX = {
    **dict.fromkeys(
        (
            "in_channels",
            "out_channels",
            "num_layers",
            "num_single_layers",
            "attention_head_dim",
            "num_attention_heads",
        ),
        KEYS,
    ),
    **dict.fromkeys(("joint_attention_dim", "pooled_projection_dim", "guidance_embeds"), KEYS),
    "axes_dims_rope": "read",
}
SD3 = {
    **dict.fromkeys(
        (
            "in_channels",
            "out_channels",
            "num_layers",
            "num_attention_heads",
            "joint_attention_dim",
            "caption_projection_dim",
        ),
        KEYS,
    ),
    **dict.fromkeys(("pooled_projection_dim", "pos_embed_max_size", "dual_attention_layers"), KEYS),
    "sample_size": "read",
}
TAESD = {
    **dict.fromkeys(
        ("in_channels", "out_channels", "latent_channels", "num_encoder_blocks", "num_decoder_blocks"), KEYS
    ),
    **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), KEYS),
    **dict.fromkeys(("latent_magnitude", "latent_shift"), "to store latents as pictures"),
    "force_upcast": PRECISION,
}
NETWORKS = {
    "UNet2DConditionModel": (UNET, sd.SETTINGS),
    "AutoencoderKL": (VAE, vae_keys.SETTINGS),
    "FluxTransformer2DModel": (FLUX, flux.SETTINGS),
    "SD3Transformer2DModel": (SD3, sd3.SETTINGS),
    "AutoencoderTiny": (TAESD, taesd_keys.SETTINGS),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_setting_of_a_network_is_accounted_for(name: str) -> None:
    account, checked = NETWORKS[name]
    settings = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
    assert settings <= account.keys() | checked.keys()
    assert not account.keys() & checked.keys()


# Of schedulers: what says something of the network. The rest says how to sample, which is the user's to
# choose.
READ = {
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
}
READ |= {
    "sigma_data",
    "sigma_min",
    "sigma_max",
    "shift",
    "flow_shift",
    "use_flow_sigmas",
    "use_dynamic_shifting",
    *scheduler.LCM_SETTINGS,
}
READ |= (
    scheduler.FLOW_SETTINGS.keys()
    | scheduler.SETTINGS.keys()
    | scheduler.FLOW_TIMES.keys()
    | set(scheduler.FLOW_LINE)
)
SAMPLING = {
    "algorithm_type", "clip_sample", "clip_sample_range", "corrector_order", "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final", "final_sigmas_type", "interpolation_type", "lambda_min_clipped", "lower_order_final",
    "predict_x0", "predictor_order",
    "rho", "sample_max_value", "set_alpha_to_one", "sigma_schedule", "skip_prk_steps", "solver_order",
    "solver_p", "solver_type",
    "steps_offset", "tau_func", "thresholding", "timestep_spacing", "use_lu_lambdas", "variance_type",
}  # fmt: skip
SCHEDULERS = [
    "DDIM", "DDPM", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "EDMDPMSolverMultistep",
    "EDMEuler",
    "EulerAncestralDiscrete", "EulerDiscrete", "FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete",
    "HeunDiscrete",
    "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD",
    "UniPCMultistep",
]  # fmt: skip


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_setting_of_a_scheduler_is_accounted_for(name: str) -> None:
    settings = set(inspect.signature(getattr(diffusers, f"{name}Scheduler").__init__).parameters) - {"self"}
    assert settings <= READ | SAMPLING


def folder_with(family: str, path: Path, config: str, **settings: Any) -> Path:
    models.save(tiny(family), path, "diffusers")
    content = json.loads((path / config).read_text()) | settings
    (path / config).write_text(json.dumps(content))
    return path


def test_what_a_consistency_model_was_distilled_for(tmp_path: Path) -> None:
    """Its times and its boundary, as its scheduler has them: the same times and steps as diffusers', and
    written again."""
    settings = {"original_inference_steps": 100, "timestep_scaling": 4.0}
    folder = folder_with("lcm", tmp_path / "lcm", "scheduler/scheduler_config.json", **settings)
    model = models.load(folder)
    scheduler = diffusers.LCMScheduler.from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(8)
    assert [level.t for level in model.grid(8)][:-1] == scheduler.timesteps.tolist()
    blend: Any = model.denoiser()
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(499)
    assert blend.blend(model.schedule.level(499.0)) == pytest.approx((float(skip), float(out)), rel=1e-6)
    models.save(model, tmp_path / "again", "diffusers")
    again = models.load(tmp_path / "again").spec
    assert (again["grid"], again["consistency"]) == (model.spec["grid"], model.spec["consistency"])
    for wrong in (0, -3.0):  # with which its function would be the identity everywhere, or the negative
        config = folder_with(
            "lcm", tmp_path / "lcm", "scheduler/scheduler_config.json", timestep_scaling=wrong
        )
        with pytest.raises(ValueError, match="scaling and sigma_data of lcm must be above 0"):
            models.load(config)


def test_a_consistency_model_of_pure_noise_keeps_its_times(tmp_path: Path) -> None:
    """They begin at the noisiest row in any case, and image to image takes others of them."""
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    model = models.load(folder_with("lcm", tmp_path, "scheduler/scheduler_config.json", **settings))
    assert (model.spec["grid"], float(model.schedule.alpha(999))) == (dict(models.FAMILIES["lcm"].grid), 0)


@pytest.mark.parametrize(
    ("family", "config", "settings"),
    [
        ("sd1", "scheduler/scheduler_config.json", {"timestep_type": "continuous"}),
        ("sd1", "preview/config.json", {"scaling_factor": 0.5}),
        ("sd1", "preview/config.json", {"act_fn": "silu"}),
        ("sd3", "transformer/config.json", {"attention_head_dim": 32}),
    ],
)
def test_settings_that_nothing_here_computes_with_are_refused(
    family: str, config: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"config.*{next(iter(settings))}=") as refusal:
        models.load(folder_with(family, tmp_path, config, **settings))
    assert "\n" not in str(refusal.value)
