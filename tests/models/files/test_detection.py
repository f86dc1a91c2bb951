"""Which family a model is of, which of its parts are used, and what is refused, where keys and shapes do not
say it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from models import Model
from models.families import sd
from models.files.table import scatter
from models.layouts.describe import describe
from models.layouts.findings import Findings
from models.layouts.parts import find_parts
from models.networks.unet import UNet
from tests.models.files.published import file_of, manifests
from tests.models.files.tiny import SCHEDULER, Configured, Files, Load, notes, same, tiny
from tests.peers import diffusers

# Families ---------------------------------------------------------------------------------------------------


def test_playground_is_known_by_its_statistics(load: Load, files: Files) -> None:
    """Latents are scaled by the numbers in the file, which are read and accounted for; one of the two alone
    is refused."""
    mean, std = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0, 8.0])
    for shape in ((4,), (1, 4, 1, 1)):
        model = load(
            "sdxl",
            {"edm_mean": mean.view(shape), "edm_std": std.view(shape).half()},
            prefix=("model.", "first_stage"),
        )
        assert (model.spec["family"], model.prediction.name) == ("playground-v2.5", "edm")
        vae = model.require("vae").params
        assert (vae.scale, vae.mean, vae.std) == (0.5, (1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0))
        assert {"edm_mean", "edm_std"} <= set(model.report.ignored)  # type: ignore[union-attr]  # there is one
    with pytest.raises(ValueError, match=r"model\.safetensors holds edm_mean without edm_std"):
        load("sdxl", {"edm_mean": mean}, prefix=("model.", "first_stage"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.ones(3), "mean has 3 values for 4 latent channels"),
        (torch.full((4,), torch.nan), "mean must be"),
        (torch.ones(100), r"holds edm_mean of shape \(100,\): it must have one number per latent channel"),
    ],
)
def test_statistics_that_cannot_be(values: Tensor, message: str, load: Load) -> None:
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{message}"):
        load("sdxl", {"edm_mean": values, "edm_std": values.clone()}, prefix=("model.", "first_stage"))


@pytest.mark.parametrize(
    ("base", "family"), [("sd2", "sd-turbo"), ("sdxl", "sdxl-turbo"), ("sdxl", "lcm-sdxl"), ("sd1", "lcm")]
)
def test_families_that_only_their_user_knows(base: str, family: str, load: Load) -> None:
    """Their files are those of the family that they were distilled from."""
    model = load(base, family=family)
    of = models.FAMILIES[family]
    assert (model.spec["family"], model.spec["grid"], model.distilled) == (
        family,
        dict(of.grid),
        of.consistency is not None,
    )
    assert f"of the family {family}, as requested" in notes(model)
    with pytest.raises(
        ValueError,
        match=rf"model\.safetensors has the architecture of {base}, so it cannot be of the family "
        r"sdxl-refiner",
    ):
        load(base, family="sdxl-refiner")
    with pytest.raises(ValueError, match="no family named 'sdxl-trubo'; did you mean 'sdxl-turbo'"):
        load(base, family="sdxl-trubo")


TRAILING = {"timestep_spacing": "trailing", "prediction_type": "epsilon"}


@pytest.mark.parametrize(
    ("family", "scheduler", "maybe"),
    [
        ("sd1", {"_class_name": "LCMScheduler"}, "lcm"),
        ("sdxl", {"_class_name": "LCMScheduler"}, "lcm-sdxl"),
        ("sd2", {"_class_name": "EulerDiscreteScheduler", **TRAILING}, "sd-turbo"),
        ("sd2", {"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING}, "sd-turbo"),
        ("sdxl", {"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING}, "sdxl-turbo"),
        ("sdxl", {"_class_name": "EulerDiscreteScheduler", **TRAILING}, ""),
        ("sd2", {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, ""),
        (
            "sd2",
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_spacing": "trailing",
                "prediction_type": "v_prediction",
            },
            "",
        ),
        ("sd1", {"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING}, ""),
    ],
)
def test_a_scheduler_does_not_tell_a_family(
    family: str, scheduler: dict[str, str], maybe: str, configured: Configured
) -> None:
    """People exchange them: the network is sampled as its own family is, and a note names the other that it
    may be."""
    folder = configured(family, SCHEDULER, **scheduler)
    (folder / "model_index.json").unlink()  # which names the family, where it is ours
    model = models.load(folder)
    own = f"{family}-v" if scheduler.get("prediction_type") == "v_prediction" else family
    assert (model.spec["family"], model.spec["sampling"]) == (own, dict(models.FAMILIES[own].sampling))
    assert (f"family='{maybe}' overrides that" in notes(model)) == bool(maybe)


@pytest.mark.parametrize(
    ("base", "index", "unet", "family"),
    [
        ("sdxl", {"_name_or_path": "stabilityai/sdxl-turbo"}, {}, "sdxl-turbo"),
        (
            "sdxl",
            {},
            {"_name_or_path": "/x/models--stabilityai--sdxl-turbo/snapshots/7115/unet"},
            "sdxl-turbo",
        ),
        ("sd2", {"_name_or_path": "stabilityai/sd-turbo"}, {}, "sd-turbo"),
        ("sd2", {"_name_or_path": "stabilityai/sdxl-turbo"}, {}, "sd2"),
        ("sdxl", {"_name_or_path": "stabilityai/sdxl-turbo-unlike"}, {}, "sdxl"),
        ("sdxl", {}, {"sample_size": 64}, "sdxl-turbo"),
        ("sdxl", {}, {"sample_size": 128}, "sdxl"),
        ("sd2", {}, {"sample_size": 64}, "sd2"),
        ("sdxl", {"_family": "lcm-sdxl"}, {}, "lcm-sdxl"),
        ("sdxl", {"_family": ["lcm-sdxl"]}, {}, "sdxl"),
        ("sdxl", {"_family": "sd1"}, {}, "sdxl"),
    ],
)
def test_what_a_folder_is_named(
    base: str, index: dict[str, Any], unet: dict[str, Any], family: str, configured: Configured
) -> None:
    """By the repository that its parts were read from, or by us; SDXL-Turbo's as published also by the size
    it was trained on."""
    scheduler = {"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING}
    folder = configured(base, SCHEDULER, **scheduler)
    for file, change in (("model_index.json", {"_family": None, **index}), ("unet/config.json", unet)):
        content = json.loads((folder / file).read_text()) | change
        (folder / file).write_text(
            json.dumps({name: value for name, value in content.items() if value is not None})
        )
    assert models.load(folder).spec["family"] == family
    assert models.load(folder, family=base).spec["family"] == base


def test_a_full_lcm_is_known_by_its_guidance(load: Load) -> None:
    """Its network takes the guidance scale."""
    assert load("lcm").spec["family"] == "lcm"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (96, (96, 96)),
        (96.0, (96, 96)),
        ([48, 80], (48, 80)),
        (None, (64, 64)),
        (0, None),
        ("96", None),
        (4096, None),
        (96.5, None),
    ],
)
def test_the_size_it_was_trained_on(
    family: str, size: Any, shape: tuple[int, int] | None, configured: Configured
) -> None:
    """From the UNet's configuration; what is no size is not used, which a note says (but for none at all)."""
    model = models.load(configured(family, "unet/config.json", sample_size=size))
    usual = (models.FAMILIES[family].size // 8,) * 2
    assert model.shape == (4, *(shape if shape and size else usual))
    assert ("it must be 1 to 256 latents a side" in notes(model)) == (shape is None and size != 0)


@pytest.mark.parametrize("family", ["sd1", "sdxl-refiner", "sd3"])
def test_the_size_of_a_saved_model_comes_back(family: str, tmp_path: Path) -> None:
    models.save(
        models.build({**tiny(family).spec, "shape": [tiny(family).shape[0], 24, 40]}), tmp_path, "diffusers"
    )
    assert models.load(tmp_path).shape[1:] == (
        24,
        40,
    )  # a transformer's config.json has one side: the folder's index keeps both


def test_a_kind_of_preconditioning_that_is_not_known_is_refused(tmp_path: Path) -> None:
    """CosXL's mark, and schedulers of flows, of cosines and of EDM with other settings: their networks would
    be taken for others."""
    models.save(models.miniature("sdxl"), tmp_path / "sdxl.safetensors", layout="ldm")
    tensors = load_file(tmp_path / "sdxl.safetensors")
    save_file({**tensors, "edm_vpred.sigma_max": torch.tensor(120.0)}, tmp_path / "cosxl.safetensors")
    with pytest.raises(ValueError, match=r"is of CosXL \(EDM with v-prediction\)"):
        models.load(tmp_path / "cosxl.safetensors")
    models.save(models.miniature("sdxl"), tmp_path / "folder", layout="diffusers")
    config = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    for scheduler in (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"},
    ):
        config.write_text(json.dumps(scheduler))
        with pytest.raises(
            ValueError,
            match=f"{scheduler['_class_name']} with settings that no known family was trained with",
        ):
            models.load(tmp_path / "folder")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl-refiner"])
def test_edm_is_known_of_networks_like_sdxls_alone(family: str, configured: Configured) -> None:
    """Playground's preconditioning, which other networks here are not called with."""
    with pytest.raises(
        ValueError, match="EDMEulerScheduler with settings that no known family was trained with"
    ):
        models.load(configured(family, SCHEDULER, _class_name="EDMEulerScheduler", prediction_type="epsilon"))


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_folder_of_ours_is_of_the_same_family_again(family: str, tmp_path: Path) -> None:
    """Also where keys and shapes do not tell it."""
    models.save(tiny(family), tmp_path, layout="diffusers")
    again, own = models.load(tmp_path).spec, tiny(family).spec
    assert [again[name] for name in ("family", "grid", "sampling")] == [
        own[name] for name in ("family", "grid", "sampling")
    ]
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.get("_settings", {}).keys() <= {"shape"}  # which FLUX.1's configuration has no place for


def test_a_turbo_folder_begins_in_noise_elsewhere_too(tmp_path: Path) -> None:
    """By the scheduler that is saved with it, which begins at the noisiest row, as ours does."""
    models.save(models.miniature("sdxl-turbo"), tmp_path, layout="diffusers")
    scheduler = diffusers.EulerAncestralDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999.0]


SHIFTED = {"spacing": "linspace", "shift": 2.0, "t_end": 2 / 1001}
OWN_LINE = {"spacing": "mu_shift", "line": [256, 0.5, 4096, 0.9]}
FLOW_PREDICTION: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    ("scheduler", "settings", "grid", "noted"),
    [
        ("FlowMatchEulerDiscreteScheduler", dict(shift=2.0), SHIFTED, ""),
        ("FlowMatchHeunDiscreteScheduler", dict(shift=2.0), SHIFTED, "FlowMatchHeun"),
        ("FlowMatchLCMScheduler", dict(shift=2.0), SHIFTED, "FlowMatchLCM"),
        (
            "FlowMatchEulerDiscreteScheduler",
            dict(shift=2.0, use_karras_sigmas=True),
            SHIFTED,
            "use_karras_sigmas=True",
        ),
        (
            "FlowMatchEulerDiscreteScheduler",
            dict(shift=2.0, shift_terminal=0.02),
            SHIFTED,
            "shift_terminal=0.02",
        ),
        ("FlowMatchEulerDiscreteScheduler", dict(use_dynamic_shifting=True), {"spacing": "mu_shift"}, ""),
        ("FlowMatchEulerDiscreteScheduler", dict(use_dynamic_shifting=True, max_shift=0.9), OWN_LINE, ""),
        ("UniPCMultistepScheduler", {**FLOW_PREDICTION, "flow_shift": 2.0}, SHIFTED, "UniPC"),
        ("DPMSolverMultistepScheduler", {**FLOW_PREDICTION, "flow_shift": 2.0}, SHIFTED, "DPMSolver"),
        ("UniPCMultistepScheduler", FLOW_PREDICTION, None, "UniPC"),
        ("EulerDiscreteScheduler", {}, None, "EulerDiscrete"),
    ],
)
def test_flows_open_with_any_scheduler(
    scheduler: str, settings: dict[str, Any], grid: dict[str, Any] | None, noted: str, tmp_path: Path
) -> None:
    """Which says how they were sampled, and not what they are: its shift is kept, the rest is noted."""
    for family in ("sd3", "flux-dev"):
        model = models.load(
            configured_flow(family, getattr(diffusers, scheduler)(**settings), tmp_path / family)
        )
        own = dict(models.FAMILIES[family].grid)
        expected = own if grid is None else {k: v for k, v in grid.items() if k != "t_end" or family == "sd3"}
        assert (model.spec["grid"], model.spec["sampling"]) == (
            expected,
            dict(models.FAMILIES[family].sampling),
        )
        assert ("is not used: times and their shift are the family's" in notes(model)) == bool(noted)
        assert noted in notes(model)


def configured_flow(family: str, scheduler: Any, folder: Path) -> Path:
    """The transformer of a miniature in a folder with that scheduler."""
    spec = {
        name: tiny(family).spec[name] for name in ("family", "network", "schedule", "prediction", "shape")
    }
    models.save(models.build(spec), folder, "diffusers")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize(
    "settings", [{"invert_sigmas": True}, {"num_train_timesteps": 500}, {"shift": "3"}, {"shift": -1.0}]
)
def test_a_flow_whose_network_knows_other_times_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = configured_flow("sd3", diffusers.FlowMatchEulerDiscreteScheduler(), tmp_path)
    config = json.loads((folder / SCHEDULER).read_text())
    (folder / SCHEDULER).write_text(json.dumps(config | settings))
    with pytest.raises(ValueError, match=rf"scheduler_config\.json:? .*{next(iter(settings))}=") as refusal:
        models.load(folder)
    assert "\n" not in str(refusal.value)


# Settings that no shape shows -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ("unet/config.json", {"act_fn": "gelu"}, "config.json says act_fn='gelu'"),
        ("unet/config.json", {"flip_sin_to_cos": False}, "config.json says flip_sin_to_cos=False"),
        (
            "unet/config.json",
            {"resnet_time_scale_shift": "scale_shift"},
            "config.json says resnet_time_scale_shift=",
        ),
        ("unet/config.json", {"norm_num_groups": 7}, "does not divide into groups=7"),
        ("unet/config.json", {"norm_num_groups": "many"}, "a wrong setting in config"),
        (
            "unet/config.json",
            {"attention_head_dim": [3, 5]},
            r"attention_head_dim \[3, 5\] gives neither equal numbers",
        ),
        (
            "unet/config.json",
            {"attention_head_dim": [1, 2, 3]},
            r"attention_head_dim \[1, 2, 3\] is neither a number nor",
        ),
        ("unet/config.json", {"attention_head_dim": "8"}, "attention_head_dim '8' is neither a number nor"),
        ("unet/config.json", {"attention_head_dim": [0, 0]}, "a wrong setting in config"),
        ("unet/config.json", {"attention_head_dim": 7}, "do not divide into heads"),
        ("vae/config.json", {"act_fn": "relu"}, "config.json says act_fn='relu'"),
        (
            "vae/config.json",
            {"scaling_factor": "big"},
            "its latents cannot be scaled as its configuration says: scale must be a number",
        ),
        (
            "vae/config.json",
            {"scaling_factor": -1.0},
            "its latents cannot be scaled as its configuration says: scale must be above 0",
        ),
        (
            "vae/config.json",
            {"latents_mean": [1, 2], "latents_std": [1, 2]},
            "mean has 2 values for 4 latent channels",
        ),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "config.json says hidden_act='relu'"),
        ("text_encoder/config.json", {"num_attention_heads": 5}, "width=64 must divide by heads=5"),
        ("text_encoder/config.json", {"num_attention_heads": [1]}, "a wrong setting in config"),
        (SCHEDULER, {"beta_start": "small"}, "start of schedule 'scaled_linear' must be a number"),
        (SCHEDULER, {"beta_end": 3.0}, "betas must lie in"),
        (SCHEDULER, {"beta_start": -1.0}, "betas must lie in"),
        *(
            (SCHEDULER, {"num_train_timesteps": n}, "has num_train_timesteps=.*, and not 2 ... 100000")
            for n in (1, 10**6, 10**12, "1000", 2.5)
        ),
        (
            SCHEDULER,
            {"prediction_type": "flow_prediction"},
            "as its scheduler's configuration has it, named 'flow_prediction'",
        ),
        (SCHEDULER, {"prediction_type": ["epsilon"]}, "as its scheduler's configuration has it, named"),
    ],
)
def test_other_settings_are_refused(
    config: str, settings: dict[str, Any], message: str, configured: Configured
) -> None:
    """In one line that names the file, before there is a network that computes something else."""
    with pytest.raises(ValueError, match=message) as refusal:
        models.load(configured("sd1", config, **settings))
    assert "folder" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_cosxl_is_refused(load: Load) -> None:
    """Its times are EDM's, which no family here is told."""
    with pytest.raises(ValueError, match=r"model\.safetensors holds edm_vpred\.sigma_max, .* is of CosXL"):
        load("sdxl", {"edm_vpred.sigma_max": torch.tensor(120.0)})


@pytest.mark.parametrize("config", ["unet/config.json", "vae/config.json", SCHEDULER, "model_index.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"a": 1}'])
def test_damaged_configurations(text: str, config: str, configured: Configured) -> None:
    """One line that names the configuration; an empty one says nothing, and is no error."""
    folder = configured("sd1", config)
    (folder / config).write_text(text)
    if text == '{"a": 1}':
        same(dict(models.load(folder).network.state_dict()), dict(tiny("sd1").network.state_dict()))
        return
    with pytest.raises(
        (ValueError, FileNotFoundError),
        match=rf"{config} (is damaged|does not hold a JSON object)|folder holds no model",
    ) as refusal:
        models.load(folder)
    assert "\n" not in str(refusal.value)


# Parts that do not fit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "part", "to", "message"),
    [
        (
            "sd2",
            "cond_stage_model.",
            "sd1",
            "the UNet takes a context of 64 numbers, and the text encoders make 128",
        ),
        (
            "sd1",
            "cond_stage_model.",
            "sd2",
            "the UNet takes a context of 128 numbers, and the text encoders make 64",
        ),
        (
            "sd1",
            "cond_stage_model.",
            "sdxl-refiner",
            "the UNet takes a context of 128 numbers, and the text encoders make 64",
        ),
    ],
)
def test_parts_of_different_families_are_refused(
    of: str, part: str, to: str, message: str, files: Files, tmp_path: Path
) -> None:
    save_file(
        {key: value for key, value in files(of).items() if key.startswith(part)},
        tmp_path / "part.safetensors",
    )
    save_file(
        {key: value for key, value in files(to).items() if key.startswith("model.")},
        tmp_path / "unet.safetensors",
    )
    for paths in (
        [tmp_path / "part.safetensors", tmp_path / "unet.safetensors"],
        [tmp_path / "unet.safetensors", tmp_path / "part.safetensors"],
    ):
        with pytest.raises(
            ValueError, match=rf"part\.safetensors does not fit .*unet\.safetensors: {message}"
        ):
            models.load(*paths)


def test_an_autoencoder_with_other_latents_is_refused(files: Files, tmp_path: Path) -> None:
    vae = models.build(
        {**tiny("sd1").spec, "vae": {**tiny("sd1").spec["vae"], "latent_channels": 8}}
    ).require("vae")
    made = Model(None, tiny("sd1").schedule, tiny("sd1").prediction, {"family": "sd1"}, vae=vae)
    models.save(made, tmp_path / "vae", "diffusers")
    save_file(files("sd1"), tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"does not fit .*model\.safetensors: the UNet's samples have 4 channels, and its latents 8",
    ):
        models.load(tmp_path / "model.safetensors", tmp_path / "vae")


def test_one_of_two_towers_is_left_out(files: Files, tmp_path: Path) -> None:
    """SDXL needs both; the report says which one is missing, and the model has no text."""
    without = {
        key: value for key, value in files("sdxl").items() if not key.startswith("conditioner.embedders.1.")
    }
    save_file(without, tmp_path / "model.safetensors")
    model = models.load(tmp_path / "model.safetensors")
    assert model.text is None
    assert "text encoders left out: clip_l without clip_g" in notes(model)
    assert model.report is not None
    assert model.report.missing == ("text",)
    left_out = {
        key
        for key, why in model.report.ignored.items()
        if why == "a text encoder that is not used without the other"
    }
    assert left_out == {key for key in without if key.startswith("conditioner.")}


def test_unclip_is_no_sdxl(tmp_path: Path) -> None:
    """SD 2.1 unCLIP's UNet takes a vector too, but attends at the finest level."""
    model = models.build({**tiny("sd2").spec, "network": {**tiny("sd2").spec["network"], "vector_dim": 2048}})
    network = model.network
    assert isinstance(network, UNet)
    state = network.state_dict()
    save_file(scatter(sd.ldm(network.params).table(state), state), tmp_path / "unclip.safetensors")
    with pytest.raises(
        ValueError, match=r"unclip\.safetensors holds a UNet of no known family's architecture"
    ):
        models.load(tmp_path / "unclip.safetensors")


# Averages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [True, False])
def test_of_a_trainings_unet_and_its_average_one_is_taken(
    ema: bool, saved_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """As asked for; the report says which, and why the other is left out."""
    for name in ("unet", "unet_ema"):
        shutil.copytree(saved_folder("sd1") / "unet", tmp_path / "checkpoint" / name)
    file = tmp_path / "checkpoint" / "unet_ema" / "diffusion_pytorch_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    model = models.load(tmp_path / "checkpoint", ema=ema)
    alone = models.load(tmp_path / "checkpoint" / ("unet_ema" if ema else "unet"))
    same(model.state_dict(), alone.state_dict())
    assert ("averaged weights (EMA) are loaded; ema=False loads the raw ones" in notes(model)) == ema
    reason = (
        "raw weights, replaced by averaged ones" if ema else "averaged weights, as raw ones were requested"
    )
    assert model.report is not None
    assert model.report.ignored == {"unet/" if ema else "unet_ema/": reason}


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("ema", [True, False])
def test_an_autoencoder_with_an_average_of_its_own(
    ema: bool, prefix: str, files: Files, tmp_path: Path
) -> None:
    raw = {
        key.removeprefix("first_stage_model."): value
        for key, value in files("sd1").items()
        if key.startswith("first_stage_model.")
    }
    average = {f"model_ema.{(prefix + key).replace('.', '')}": value + 1 for key, value in raw.items()}
    save_file({prefix + key: value for key, value in raw.items()} | average, tmp_path / "vae.safetensors")
    save_file(
        {key: value + 1 if ema else value for key, value in raw.items()}, tmp_path / "alone.safetensors"
    )
    model = models.load(tmp_path / "vae.safetensors", ema=ema)
    same(model.state_dict(), models.load(tmp_path / "alone.safetensors").state_dict())


# Text encoders ----------------------------------------------------------------------------------------------


def findings_of(shapes: Mapping[str, tuple[int, ...]]) -> Findings:
    """Of a file with these keys and shapes."""
    found = Findings()
    found.add(find_parts(file_of(shapes)))
    return found


@pytest.mark.parametrize("blocks", [23, 24])
def test_sd2_reads_the_state_before_the_last_of_24_blocks(blocks: int) -> None:
    """Also of a single file, as converters write it, that holds the first 23 only."""
    published = {
        key: shape for key, shape in manifests()["sd21_full_ldm"].items() if "." in key
    }  # without the schedule, which is read
    shapes = {key: shape for key, shape in published.items() if blocks == 24 or ".resblocks.23." not in key}
    findings = findings_of(shapes)
    spec, towers = describe(findings, None, "v")
    reader = spec["text"]["readers"]["clip_h"]
    assert reader["network"]["layers"] == towers["clip_h"].params.layers == blocks
    assert reader["network"]["layers"] - reader["skip"] == 23


def test_a_tower_without_its_projection_is_named() -> None:
    """At published sizes width alone tells SDXL's towers apart."""
    shapes = {
        key: shape
        for key, shape in manifests()["sdxl_base_full_sgm"].items()
        if not key.endswith("1.model.text_projection")
    }
    findings = findings_of(shapes)
    with pytest.raises(ValueError, match="holds clip_g: it lacks its text_projection"):
        describe(findings, None, None)


def test_paths_are_given_one_by_one(tmp_path: Path) -> None:
    for wrong in ([tmp_path], None, 3):
        with pytest.raises(ValueError, match=r"give paths one by one, models\.load\(\*paths\), not as"):
            models.load(wrong)  # type: ignore[arg-type]  # on purpose
