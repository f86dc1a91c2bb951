"""What a network predicts: from marks, metadata, schedulers' configurations and good guesses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from models import Model
from tests.models.files.tiny import MARK, SCHEDULER, Configured, Files, Load, notes, tiny

# of a miniature; output_blocks.11 in SD 2
LAST_BIAS = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.norm1.bias"


def spread(files: Files, std: float) -> dict[str, Tensor]:
    """The first bias of the last attention block with that standard deviation, all others with the
    opposite."""
    other = 0.2 if std < 0.09 else 0.01
    biases = {
        key: value for key, value in files("sd2").items() if key.endswith("transformer_blocks.0.norm1.bias")
    }
    assert LAST_BIAS in biases
    return {key: value / value.std() * (std if key == LAST_BIAS else other) for key, value in biases.items()}


@pytest.mark.parametrize(("std", "prediction"), [(0.089, "eps"), (0.091, "v")])
def test_sd2_is_guessed_by_the_spread_of_a_bias(
    std: float, prediction: str, load: Load, files: Files
) -> None:
    """Where nothing says what it predicts; the report says that it was guessed, from which tensor, and how to
    overrule it."""
    model = load("sd2", spread(files, std))
    assert (model.prediction.name, model.spec["family"]) == (
        prediction,
        "sd2-v" if prediction == "v" else "sd2",
    )
    assert (
        f"predicts {prediction}: guessed, {LAST_BIAS.removeprefix('model.diffusion_model.')} has the "
        "standard deviation" in notes(model)
    )
    other = load("sd2", spread(files, std), prediction="v" if prediction == "eps" else "eps")
    assert other.prediction.name != prediction
    assert "as requested" in notes(other)
    assert load("sd2", spread(files, std), family="sd2-v").prediction.name == "v"


def test_the_guess_does_not_depend_on_the_layout_nor_on_the_order_of_keys(
    files: Files, tmp_path: Path
) -> None:
    """The last block is that of the network, not of the file, where "9" comes after "11"."""
    model = models.build({**tiny("sd2").spec, "network": {**tiny("sd2").spec["network"], "blocks": 5}})
    state = {
        f"up.{i}.attention.blocks.0.norm1.bias": torch.linspace(-1, 1, 64) * (0.5 if i == 12 else 0.01)
        for i in range(7, 13)
    }
    model.network.load_state_dict(state, strict=False)
    for layout, path in (("ldm", tmp_path / "a.safetensors"), ("diffusers", tmp_path / "a")):
        models.save(Model(model.backbone, model.schedule, model.prediction, model.spec), path, layout)  # type: ignore[arg-type]
    file = tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors")
    shutil.rmtree(tmp_path / "a" / "scheduler")
    for path in (tmp_path / "a.safetensors", file):
        assert models.load(path).prediction.name == "v"
        assert "standard deviation 0.2" in notes(models.load(path))


def test_the_step_at_which_training_stopped(files: Files, tmp_path: Path) -> None:
    """875,000 is SD 2's base model, whatever the bias; another number says nothing."""
    for step, prediction in ((875_000, "eps"), (np.int64(875_000), "eps"), (140_000, "v")):
        torch.save(
            {"global_step": step, "state_dict": files("sd2") | spread(files, 0.2)}, tmp_path / "model.ckpt"
        )
        model = models.load(tmp_path / "model.ckpt")
        assert model.prediction.name == prediction
        assert ("last step of SD 2's base model" in notes(model)) == (prediction == "eps")


@pytest.mark.parametrize(
    ("family", "change", "metadata", "prediction"),
    [
        ("sdxl", {}, {}, "eps"),
        ("sdxl", {"v_pred": MARK}, {}, "v"),
        ("sdxl", {}, {"modelspec.prediction_type": "v"}, "v"),
        ("sdxl", {"v_pred": MARK}, {"modelspec.prediction_type": "epsilon"}, "v"),
        ("sd2", {}, {"modelspec.prediction_type": "epsilon"}, "eps"),
        ("sd2", {}, {"modelspec.prediction_type": "v"}, "v"),
        ("sd2", {}, {"modelspec.predict_key": "epsilon"}, "eps"),
        ("sdxl", {}, {"modelspec.predict_key": "v"}, "v"),
        ("sd1", {}, {"modelspec.prediction_type": "v"}, "v"),
        ("sd1", {}, {"modelspec.title": "no prediction"}, "eps"),
    ],
)
def test_marks_and_metadata(
    family: str, change: dict[str, Tensor], metadata: dict[str, str], prediction: str, load: Load
) -> None:
    """A mark among the tensors comes before the metadata; without either it is the family's own."""
    model = load(family, change, metadata)
    assert model.prediction.name == prediction
    assert f"predicts {prediction}, as " in notes(model) or not (
        change or any("predict" in key for key in metadata)
    )
    assert model.spec["family"] == (f"{family}-v" if prediction == "v" and family != "sd1" else family)
    assert load(family, change, metadata, prediction="x0").prediction.name == "x0"
    assert set(change) <= model.report.ignored.keys()  # type: ignore[union-attr]  # there is one


def test_pure_noise_at_the_end(load: Load) -> None:
    """`ztsnr` marks a schedule that was rescaled to end in it."""
    plain, marked = load("sdxl", {"v_pred": MARK}), load("sdxl", {"v_pred": MARK, "ztsnr": MARK})
    assert float(plain.schedule.alpha(999)) > 0
    assert float(marked.schedule.alpha(999)) == 0
    assert "zero_terminal_snr=True, as a mark beside the weights says" in notes(marked)


def test_marks_are_those_of_the_network_that_is_taken(files: Files, load: Load, tmp_path: Path) -> None:
    """A file whose UNet is replaced leaves its marks behind."""
    unet = {key: value for key, value in files("sdxl").items() if key.startswith("model.")}
    save_file(unet, tmp_path / "unet.safetensors")
    save_file(files("sdxl") | {"v_pred": MARK, "ztsnr": MARK}, tmp_path / "marked.safetensors")
    model = models.load(tmp_path / "marked.safetensors", tmp_path / "unet.safetensors")
    assert (model.prediction.name, "zero_terminal_snr" in model.spec["schedule"]) == ("eps", False)
    model = models.load(tmp_path / "unet.safetensors", tmp_path / "marked.safetensors")
    assert (model.prediction.name, model.spec["schedule"]["zero_terminal_snr"]) == ("v", True)


@pytest.mark.parametrize(
    ("text", "prediction"),
    [(text, "eps") for text in ("eps", "EPSILON", "epsilon-prediction", "eps_pred", " epsilon ")]
    + [
        (text, "v")
        for text in (
            "V",
            "velocity",
            "v-prediction",
            "v_prediction",
            "vpred",
            "v-pred",
            "V Prediction",
            "v_param",
        )
    ]
    + [(text, "x0") for text in ("sample", "x_start", "x0")],
)
def test_known_spellings_are_used(text: str, prediction: str, load: Load) -> None:
    """Of a text that everybody writes as they like."""
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        assert load("sdxl", {}, {key: text}).prediction.name == prediction


@pytest.mark.parametrize("text", ["flow", "None", "unknown", "", "?", "e" * 10_000])
def test_other_texts_are_a_note(text: str, load: Load) -> None:
    """What stands beside intact weights ends nothing: the family's own is taken, or what the next source
    says."""
    model = load("sdxl", {}, {"modelspec.prediction_type": text})
    assert model.prediction.name == "eps"
    assert ("is not a known prediction: prediction=... chooses one" in notes(model)) == bool(text)
    assert len(notes(model)) < 300
    assert (
        load("sdxl", {}, {"modelspec.prediction_type": text, "modelspec.predict_key": "v"}).prediction.name
        == "v"
    )
    assert load("sdxl", {}, {"modelspec.prediction_type": text}, prediction="v").prediction.name == "v"
    with pytest.raises(ValueError, match="no prediction named 'vv'"):
        load("sdxl", prediction="vv")


@pytest.mark.parametrize(
    ("family", "said", "prediction", "found"),
    [
        ("sd2", "v_prediction", "v", "sd2-v"),
        ("sd2", "epsilon", "eps", "sd2"),
        ("sd1", "v_prediction", "v", "sd1"),
        ("sd1", "sample", "x0", "sd1"),
        ("sdxl", "v_prediction", "v", "sdxl-v"),
        ("sdxl-refiner", "v_prediction", "v", "sdxl-refiner"),
    ],
)
def test_scheduler_configurations_say_the_prediction(
    family: str, said: str, prediction: str, found: str, configured: Configured
) -> None:
    model = models.load(configured(family, SCHEDULER, prediction_type=said))
    assert (model.prediction.name, model.spec["family"]) == (prediction, found)
    assert f"predicts {prediction}, as its scheduler's configuration says" in notes(model)


def test_a_networks_own_mark_comes_before_a_pipelines_configuration(
    configured: Configured, files: Files, tmp_path: Path
) -> None:
    """A v-model put in place of a folder's eps-model predicts v; what the folder says of its own is not said
    of another, which is noted."""
    folder = configured("sdxl", SCHEDULER, prediction_type="epsilon")
    unet = {key: value for key, value in files("sdxl").items() if key.startswith("model.")}
    save_file(unet | {"v_pred": MARK}, tmp_path / "v.safetensors")
    assert models.load(folder, tmp_path / "v.safetensors").prediction.name == "v"
    (folder / SCHEDULER).write_text(json.dumps({"prediction_type": "v_prediction"}))
    save_file(unet, tmp_path / "unmarked.safetensors")
    assert models.load(folder).prediction.name == "v"
    model = models.load(folder, tmp_path / "unmarked.safetensors")
    assert model.prediction.name == "eps"
    assert (
        f"{folder}: not used for the backbone, which is in unmarked.safetensors: its scheduler's "
        "configuration" in notes(model)
    )
    assert (
        models.load(tmp_path / "unmarked.safetensors", folder).prediction.name == "v"
    )  # whose network it is now


@pytest.mark.parametrize(
    ("folder", "file"), [("playground-v2.5", "sdxl"), ("sd2-v", "sd2"), ("lcm-sdxl", "sdxl")]
)
def test_a_folder_speaks_of_its_own_network_alone(
    folder: str, file: str, saved_folder: Callable[[str], Path], files: Files, tmp_path: Path
) -> None:
    """Of whichever is taken: the later one, or the only one, where the folder is given for its text
    encoders."""
    there, other = saved_folder(folder), tmp_path / "other.safetensors"
    save_file(files(file), other)
    alone = models.load(other)
    for paths, of in (((there, other), alone), ((other, there), models.load(there))):
        model = models.load(*paths)
        assert [model.spec.get(key) for key in ("family", "schedule", "grid")] == [
            of.spec.get(key) for key in ("family", "schedule", "grid")
        ]
        assert model.prediction.name == of.prediction.name
        assert ("not used for the backbone" in notes(model)) == (of is alone)
    shutil.copytree(there, tmp_path / "text", ignore=shutil.ignore_patterns("unet", "vae"))
    for paths in ((tmp_path / "text", other), (other, tmp_path / "text")):
        assert models.load(*paths).spec["family"] == alone.spec["family"]


def test_a_part_of_a_folder_alone_is_as_its_scheduler_says(configured: Configured, tmp_path: Path) -> None:
    """Folders of parts, or a file in one, in place of the whole: a pipeline's configuration is about them,
    and about no other network."""
    folder = configured("sdxl", SCHEDULER, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    (file,) = (folder / "unet").glob("*.safetensors")
    models.save(tiny("sdxl"), tmp_path / "base", "diffusers")
    for paths in ([folder / "unet"], [file], [tmp_path / "base", folder / "unet"]):
        model = models.load(*paths)
        assert (model.prediction.name, model.spec["schedule"].get("zero_terminal_snr")) == ("v", True)
    assert models.load(folder, tmp_path / "base" / "unet").prediction.name == "eps"
    shutil.copy(file, tmp_path / "unet.safetensors")
    assert models.load(tmp_path / "unet.safetensors").prediction.name == "eps"
