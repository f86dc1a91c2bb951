"""What keys and shapes do not say: predictions, schedules, families and scales, from marks, metadata, configurations and good guesses."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from diffusion import DiscreteVP, build_schedule
from models import Model
from models.checkpoints import unet_keys
from models.checkpoints.describe import describe
from models.checkpoints.findings import Findings
from models.checkpoints.parts import find_parts
from models.checkpoints.table import scatter
from models.checkpoints.tensors import open_tensors
from models.checkpoints.written_schedule import changed_schedule, write_table
from models.checkpoints.yaml_beside import read_yaml_beside
from models.unet import UNet
from tests.models.checkpoints.published import file_of, manifests
from tests.models.checkpoints.tiny import same, tiny

MARK = torch.tensor([])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Tensor]]:
    """The tensors of a miniature's single file, without marks and metadata."""
    root, made = tmp_path_factory.mktemp("files"), dict[str, dict[str, Tensor]]()

    def state(family: str) -> dict[str, Tensor]:
        if family not in made:
            models.save(tiny(family), root / f"{family}.safetensors", "ldm")
            made[family] = load_file(root / f"{family}.safetensors")
        return dict(made[family])

    return state


Files = Callable[[str], dict[str, Tensor]]


@pytest.fixture
def load(files: Files, tmp_path: Path) -> Callable[..., Model]:
    """Load the UNet of a miniature's single file, or the parts under `prefix`, with some tensors changed, and with that metadata."""

    def made(
        of: str,
        change: Mapping[str, Tensor] | None = None,
        metadata: dict[str, str] | None = None,
        prefix: str | tuple[str, ...] = "model.",
        **options: Any,
    ) -> Model:
        state = {key: value for key, value in files(of).items() if key.startswith(prefix)}
        save_file({**state, **(change or {})}, tmp_path / "model.safetensors", metadata)
        return models.load(tmp_path / "model.safetensors", **options)

    return made


Load = Callable[..., Model]


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("folders")

    def path(family: str) -> Path:
        if not (root / family).exists():
            models.save(tiny(family), root / family, "diffusers")
            for name in ("tokenizer", "tokenizer_2", "preview"):
                shutil.rmtree(root / family / name, ignore_errors=True)
        return root / family

    return path


@pytest.fixture
def configured(saved_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """The UNet's folder of a miniature, its scheduler's and that of a configuration, which is changed; a setting of None is left out."""

    def made(family: str, config: str, **settings: Any) -> Path:
        folder = tmp_path / "folder"
        for name in {"unet", "scheduler", config.split("/")[0]} - {"model_index.json"}:
            shutil.copytree(saved_folder(family) / name, folder / name)
        shutil.copy(saved_folder(family) / "model_index.json", folder)
        content = json.loads((folder / config).read_text()) | settings
        (folder / config).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
        return folder

    return made


Configured = Callable[..., Path]
SCHEDULER = "scheduler/scheduler_config.json"


def notes(model: Model) -> str:
    assert model.report is not None
    return "; ".join(model.report.notes)


# Predictions -----------------------------------------------------------------------------------------------------------

LAST_BIAS = "model.diffusion_model.output_blocks.3.1.transformer_blocks.0.norm1.bias"  # of a miniature; output_blocks.11 in SD 2


def spread(files: Files, std: float) -> dict[str, Tensor]:
    """The first bias of the last attention block with that standard deviation, all others with the opposite."""
    other = 0.2 if std < 0.09 else 0.01
    biases = {key: value for key, value in files("sd2").items() if key.endswith("transformer_blocks.0.norm1.bias")}
    assert LAST_BIAS in biases
    return {key: value / value.std() * (std if key == LAST_BIAS else other) for key, value in biases.items()}


@pytest.mark.parametrize(("std", "prediction"), [(0.089, "eps"), (0.091, "v")])
def test_sd2_is_guessed_by_the_spread_of_a_bias(std: float, prediction: str, load: Load, files: Files) -> None:
    """Where nothing says what it predicts; the report says that it was guessed, from which tensor, and how to overrule it."""
    model = load("sd2", spread(files, std))
    assert (model.prediction.name, model.spec["family"]) == (prediction, "sd2-v" if prediction == "v" else "sd2")
    assert f"predicts {prediction}: guessed, {LAST_BIAS.removeprefix('model.diffusion_model.')} has the standard deviation" in notes(model)
    other = load("sd2", spread(files, std), prediction="v" if prediction == "eps" else "eps")
    assert other.prediction.name != prediction
    assert "as asked for" in notes(other)
    assert load("sd2", spread(files, std), family="sd2-v").prediction.name == "v"


def test_the_guess_does_not_depend_on_the_layout_nor_on_the_order_of_keys(files: Files, tmp_path: Path) -> None:
    """The last block is that of the network, not of the file, where "9" comes after "11"."""
    model = models.build({**tiny("sd2").spec, "network": {**tiny("sd2").spec["network"], "blocks": 5}})
    state = {f"up.{i}.attention.blocks.0.norm1.bias": torch.linspace(-1, 1, 64) * (0.5 if i == 12 else 0.01) for i in range(7, 13)}
    model.network.load_state_dict(state, strict=False)
    for layout, path in (("ldm", tmp_path / "a.safetensors"), ("diffusers", tmp_path / "a")):
        models.save(Model(model.backbone, model.schedule, model.prediction, model.spec), path, layout)  # type: ignore[arg-type]
    file = tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors")
    for path in (tmp_path / "a.safetensors", file):
        assert models.load(path).prediction.name == "v"
        assert "standard deviation 0.2" in notes(models.load(path))


def test_the_step_at_which_training_stopped(files: Files, tmp_path: Path) -> None:
    """875,000 is SD 2's base model, whatever the bias; another number says nothing."""
    for step, prediction in ((875_000, "eps"), (np.int64(875_000), "eps"), (140_000, "v")):
        torch.save({"global_step": step, "state_dict": files("sd2") | spread(files, 0.2)}, tmp_path / "model.ckpt")
        model = models.load(tmp_path / "model.ckpt")
        assert model.prediction.name == prediction
        assert ("training stopped where" in notes(model)) == (prediction == "eps")


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
def test_marks_and_metadata(family: str, change: dict[str, Tensor], metadata: dict[str, str], prediction: str, load: Load) -> None:
    """A mark among the tensors comes before the metadata; without either it is the family's own."""
    model = load(family, change, metadata)
    assert model.prediction.name == prediction
    assert f"predicts {prediction}, as " in notes(model) or not (change or any("predict" in key for key in metadata))
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
    + [(text, "v") for text in ("V", "velocity", "v-prediction", "v_prediction", "vpred", "v-pred", "V Prediction", "v_param")]
    + [(text, "x0") for text in ("sample", "x_start", "x0")],
)
def test_known_spellings_are_used(text: str, prediction: str, load: Load) -> None:
    """Of a text that everybody writes as they like."""
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        assert load("sdxl", {}, {key: text}).prediction.name == prediction


@pytest.mark.parametrize("text", ["flow", "None", "unknown", "", "?", "e" * 10_000])
def test_other_texts_are_a_note(text: str, load: Load) -> None:
    """What stands beside intact weights ends nothing: the family's own is taken, or what the next source says."""
    model = load("sdxl", {}, {"modelspec.prediction_type": text})
    assert model.prediction.name == "eps"
    assert ("names no prediction known here: prediction=... chooses one" in notes(model)) == bool(text)
    assert len(notes(model)) < 300
    assert load("sdxl", {}, {"modelspec.prediction_type": text, "modelspec.predict_key": "v"}).prediction.name == "v"
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
def test_scheduler_configurations_say_the_prediction(family: str, said: str, prediction: str, found: str, configured: Configured) -> None:
    model = models.load(configured(family, SCHEDULER, prediction_type=said))
    assert (model.prediction.name, model.spec["family"]) == (prediction, found)
    assert f"predicts {prediction}, as its scheduler's configuration says" in notes(model)


def test_a_networks_own_mark_comes_before_a_pipelines_configuration(configured: Configured, files: Files, tmp_path: Path) -> None:
    """A v-model put in place of a folder's eps-model predicts v; what the folder says of its own is not said of another, which is noted."""
    folder = configured("sdxl", SCHEDULER, prediction_type="epsilon")
    unet = {key: value for key, value in files("sdxl").items() if key.startswith("model.")}
    save_file(unet | {"v_pred": MARK}, tmp_path / "v.safetensors")
    assert models.load(folder, tmp_path / "v.safetensors").prediction.name == "v"
    (folder / SCHEDULER).write_text(json.dumps({"prediction_type": "v_prediction"}))
    save_file(unet, tmp_path / "unmarked.safetensors")
    assert models.load(folder).prediction.name == "v"
    model = models.load(folder, tmp_path / "unmarked.safetensors")
    assert model.prediction.name == "eps"
    assert f"{folder}: not used for the backbone, which unmarked.safetensors holds: its scheduler's configuration" in notes(model)
    assert models.load(tmp_path / "unmarked.safetensors", folder).prediction.name == "v"  # whose network it is now


@pytest.mark.parametrize(("folder", "file"), [("playground-v2.5", "sdxl"), ("sd2-v", "sd2"), ("lcm-sdxl", "sdxl")])
def test_a_folder_speaks_of_its_own_network_alone(
    folder: str, file: str, saved_folder: Callable[[str], Path], files: Files, tmp_path: Path
) -> None:
    """Of whichever is taken: the later one, or the only one, where the folder is given for its text encoders."""
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


# Schedules -------------------------------------------------------------------------------------------------------------


def test_scheduler_configurations_say_the_betas(configured: Configured) -> None:
    """Other betas than the family's are taken, and noted."""
    folder = configured("sd1", SCHEDULER, beta_schedule="linear", beta_start=0.0005, beta_end=0.015, num_train_timesteps=500)
    model = models.load(folder)
    expected = {"name": "linear", "start": 0.0005, "end": 0.015, "steps": 500}
    assert model.spec["schedule"] == expected
    assert "the schedule has name=linear, start=0.0005, end=0.015, steps=500, as its scheduler's configuration says" in notes(model)
    models.save(model, folder.with_name("again"), "diffusers")
    assert models.load(folder.with_name("again")).spec["schedule"] == expected


def test_zero_terminal_snr_of_a_configuration_comes_back(configured: Configured, tmp_path: Path) -> None:
    """Through every layout."""
    model = models.load(configured("sdxl-v", SCHEDULER, rescale_betas_zero_snr=True))
    assert float(model.schedule.alpha(999)) == 0
    for layout in ("native", "ldm", "diffusers"):
        path = tmp_path / ("a" if layout == "diffusers" else f"{layout}.safetensors")
        models.save(model, path, layout)
        again = models.load(path)
        assert (again.prediction.name, float(again.schedule.alpha(999))) == ("v", 0)


@pytest.mark.parametrize("settings", [{"beta_schedule": "squaredcos_cap_v2"}, {"trained_betas": [0.1, 0.2]}])
def test_betas_of_no_family_are_refused(settings: dict[str, Any], configured: Configured) -> None:
    betas = "a list of its own" if "trained_betas" in settings else "'squaredcos_cap_v2'"
    with pytest.raises(ValueError, match=rf"scheduler_config\.json: its scheduler's configuration has the betas {betas}, which no family"):
        models.load(configured("sd1", SCHEDULER, **settings))


def test_playgrounds_schedule_comes_from_its_configuration(configured: Configured) -> None:
    """Of which prediction_type is about what comes behind EDM's preconditioning."""
    model = models.load(configured("playground-v2.5", SCHEDULER, sigma_max=70.0))
    assert (model.spec["family"], model.prediction.name) == ("playground-v2.5", "edm")
    assert model.spec["schedule"] == {"name": "ve", "sigma_min": 0.002, "sigma_max": 70.0}


def test_a_network_that_predicts_eps_does_not_begin_in_pure_noise(configured: Configured) -> None:
    """Where eps is all that there is: the schedule stays the family's own, which is noted, and images can be made."""
    folder = configured("sdxl", SCHEDULER, rescale_betas_zero_snr=True, prediction_type="epsilon")
    model = models.load(folder)
    assert "zero_terminal_snr" not in model.spec["schedule"]
    assert "zero terminal SNR is left out: a network that predicts eps cannot begin in pure noise" in notes(model)
    asked = models.load(folder, prediction="v")
    assert asked.spec["schedule"]["zero_terminal_snr"]
    assert "zero_terminal_snr=True, as its scheduler's configuration says" in notes(asked)


SD_TABLE = {"name": "scaled_linear", "start": 0.00085, "end": 0.012, "steps": 1000}
KINDS_OF_TABLES: dict[str, Callable[[Tensor], Tensor]] = {
    "alphas_cumprod": lambda alpha_bar: alpha_bar,
    "betas": lambda alpha_bar: 1 - alpha_bar / torch.cat([torch.ones(1), alpha_bar[:-1]]),
    "sqrt_alphas_cumprod": torch.sqrt,
    "denoiser.sigmas": lambda alpha_bar: (1 / alpha_bar - 1).sqrt(),
}
WRITTEN = {
    "own": SD_TABLE,
    "zero": {**SD_TABLE, "zero_terminal_snr": True},
    "linear": {**SD_TABLE, "name": "linear", "start": 1e-4, "end": 0.02},
    "linear with zero": {**SD_TABLE, "name": "linear", "start": 1e-4, "end": 0.02, "zero_terminal_snr": True},
    "other betas": {**SD_TABLE, "start": 0.0015, "end": 0.0155},
    "fewer": {**SD_TABLE, "name": "linear", "start": 0.001, "end": 0.0295, "steps": 500},
}


def alpha_bar_of(spec: Mapping[str, Any]) -> Tensor:
    schedule = build_schedule(spec)
    assert isinstance(schedule, DiscreteVP)
    return schedule.alpha_bar


@pytest.mark.parametrize("key", KINDS_OF_TABLES)
@pytest.mark.parametrize("name", WRITTEN)
def test_a_table_among_the_tensors_is_the_schedule(name: str, key: str, load: Load, tmp_path: Path) -> None:
    """What its network was trained with, in whichever form; saved again, it is read again. The family's own is nothing to speak of."""
    table = alpha_bar_of(WRITTEN[name])
    model = load("sd1", {key: KINDS_OF_TABLES[key](table).float()}, prediction="v")
    torch.testing.assert_close(alpha_bar_of(model.spec["schedule"]), table, rtol=2e-6, atol=1e-7)
    assert (f"as its table {key} says" in notes(model)) == (name != "own")
    assert model.spec["grid"] == ({"spacing": "trailing"} if "zero" in name else {"spacing": "karras"})
    if key == "alphas_cumprod":
        for layout in ("native", "ldm", "diffusers"):
            path = tmp_path / ("folder" if layout == "diffusers" else f"{layout}.safetensors")
            models.save(model, path, layout, torch.float16)
            torch.testing.assert_close(alpha_bar_of(models.load(path).spec["schedule"]), table, rtol=2e-6, atol=1e-7)


def schedule_in(tensors: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """What a table in a file changes in SD 1's schedule."""
    save_file(tensors, folder / "table.safetensors")
    return changed_schedule(open_tensors(folder / "table.safetensors"), SD_TABLE, [])[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_a_rounded_table_is_known_by_all_its_rows(name: str, zero: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    for start, end in ((0.001, 0.015), (0.00085, 0.012), (1e-4, 0.02), (0.0015, 0.0195), (0.00085, 0.0125)):
        spec = {"name": name, "start": start, "end": end, "steps": 1000, "zero_terminal_snr": zero}
        for key in ("alphas_cumprod", "sqrt_alphas_cumprod"):
            found = schedule_in({key: KINDS_OF_TABLES[key](alpha_bar_of(spec)).to(dtype)}, tmp_path)
            assert {**SD_TABLE, "zero_terminal_snr": False, **found} == spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["cosine", "sigmoid"])
def test_a_rounded_table_of_another_kind_is_refused(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither linear nor scaled_linear"):
        schedule_in({"alphas_cumprod": alpha_bar_of({"name": name}).to(dtype)}, tmp_path)


@pytest.mark.parametrize(("start", "end"), [(0.001, 0.015), (0.0012345, 0.01234567), (0.00085, 0.012000001), (0.02, 0.001)])
@pytest.mark.parametrize("zero", [False, True])
def test_a_table_that_is_written_is_read_again(start: float, end: float, zero: bool, tmp_path: Path) -> None:
    schedule = build_schedule({"name": "linear", "start": start, "end": end, "steps": 1000, "zero_terminal_snr": zero})
    assert isinstance(schedule, DiscreteVP)
    again = {**SD_TABLE, **schedule_in(write_table(schedule, SD_TABLE), tmp_path)}
    torch.testing.assert_close(alpha_bar_of(again), schedule.alpha_bar, rtol=1e-6, atol=1e-9)


def test_tables_that_contradict_each_other_are_noted(load: Load) -> None:
    table, other = alpha_bar_of(SD_TABLE), alpha_bar_of(WRITTEN["linear"])
    for betas, contradiction in ((table, False), (other, True)):
        tables = {"alphas_cumprod": table.half(), "betas": KINDS_OF_TABLES["betas"](betas).half()}
        model = load("sd1", tables)
        assert model.spec["schedule"] == SD_TABLE
        assert ("holds betas of another noise schedule than alphas_cumprod" in notes(model)) == contradiction


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_table_in_another_precision_is_the_same(dtype: torch.dtype, load: Load) -> None:
    """And one in a file of Playground's, which samples on EDM's levels, is of no use there."""
    table = {"alphas_cumprod": alpha_bar_of(SD_TABLE).to(dtype)}
    assert "table" not in notes(load("sd2", table, prediction="eps"))
    assert load("sdxl", table | {"edm_mean": torch.ones(4), "edm_std": torch.ones(4)}).spec["schedule"]["name"] == "ve"


@pytest.mark.parametrize(
    "table",
    [
        alpha_bar_of({"name": "cosine"}),
        torch.full((1000,), torch.nan),
        torch.ones(3, 3),
        torch.ones(1),
        torch.arange(1000),
        torch.ones(1000),
    ],
    ids=["cosine", "nan", "square", "one", "numbers", "ones"],
)
def test_a_table_of_no_schedule_here_is_refused(table: Tensor, load: Load) -> None:
    with pytest.raises(ValueError, match=r"model\.safetensors holds alphas_cumprod.*") as refusal:
        load("sd1", {"alphas_cumprod": table})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_pure_noise_as_asked_for(family: str, load: Load, tmp_path: Path) -> None:
    """zero_snr=True where a file does not say it, zero_snr=False where it says it wrongly; kept in every layout."""
    model = load(family, prediction="v", zero_snr=True)
    assert (float(model.schedule.alpha(999)), model.spec["grid"]) == (0, {"spacing": "trailing"})
    for layout in ("native", "ldm", "diffusers"):
        path = tmp_path / ("folder" if layout == "diffusers" else f"{layout}.safetensors")
        models.save(model, path, layout)
        again = models.load(path)
        assert (again.prediction.name, float(again.schedule.alpha(999))) == ("v", 0)
        if layout != "native":
            assert float(models.load(path, zero_snr=False).schedule.alpha(999)) > 0
    with pytest.raises(ValueError, match="zero_snr needs a network that predicts v"):
        load(family, prediction="eps", zero_snr=True)
    with pytest.raises(ValueError, match="describes a whole model itself"):
        models.load(tmp_path / "native.safetensors", zero_snr=True)


@pytest.mark.parametrize("zero_snr", [True, False])
def test_pure_noise_of_no_table(zero_snr: bool, load: Load) -> None:
    with pytest.raises(ValueError, match="the schedule 've' has none"):
        load("sdxl", family="playground-v2.5", zero_snr=zero_snr)


@pytest.mark.parametrize("zero_snr", [0, 1, "false", 1.0])
def test_pure_noise_is_true_or_false(zero_snr: Any, load: Load) -> None:
    with pytest.raises(ValueError, match="zero_snr must be true or false"):
        load("sd1", zero_snr=zero_snr)


# Configurations of latent diffusion ------------------------------------------------------------------------------------

V_YAML = """
model:
  base_learning_rate: 1.0e-4
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 0.00085
    linear_end: 0.0120
    timesteps: 1000
"""
SGM_YAML = """
model:
  params:
    scale_factor: 0.13025
    denoiser_config: {params: {scaling_config: {target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling}}}
"""


@pytest.mark.parametrize(
    ("family", "text", "spec"),
    [
        ("sd2", V_YAML, {"family": "sd2-v", "prediction": "v", "schedule": SD_TABLE}),
        ("sd1", V_YAML.replace('"v"', "eps"), {"family": "sd1", "prediction": "eps", "schedule": SD_TABLE}),
        ("sd1", V_YAML.replace("0.0120", "0.0200"), {"prediction": "v", "schedule": {**SD_TABLE, "end": 0.02}}),
        ("sdxl", SGM_YAML, {"family": "sdxl-v", "prediction": "v", "schedule": SD_TABLE}),
        ("sdxl", SGM_YAML.replace("VScaling", "EpsScaling"), {"family": "sdxl", "prediction": "eps"}),
    ],
)
@pytest.mark.parametrize("ending", [".yaml", ".yml"])
def test_a_configuration_beside_a_file(family: str, text: str, spec: dict[str, Any], ending: str, load: Load, tmp_path: Path) -> None:
    """model.yaml beside model.safetensors, as Stable Diffusion 2 is published: what it predicts, and its betas."""
    (tmp_path / "model").with_suffix(ending).write_text(text)
    (tmp_path / "other.yaml").write_text(V_YAML)
    model = load(family)
    assert {name: model.spec[name] for name in spec} == spec
    assert f"as model{ending}, beside model.safetensors, says" in notes(model)
    assert load(family, prediction="x0").prediction.name == "x0"


@pytest.mark.parametrize(
    "text", ["", "{", "model: 3", "a: &a [1]\nb: *c", "- 1", "[" * 10_000, "#" * 70_000, "!!python/object/apply:os.system [ls]", "\x00"]
)
def test_a_configuration_that_is_none(text: str, load: Load, tmp_path: Path) -> None:
    """A note: the weights are intact. It runs nothing, whatever it says."""
    (tmp_path / "model.yaml").write_text(text)
    model = load("sd1")
    assert model.prediction.name == "eps"
    assert "model.yaml, beside model.safetensors, is not used" in notes(model)
    assert "\n" not in notes(model)


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 {x: 1}\n" + "".join(f"a{i + 1}: &a{i + 1}\n  <<: [{','.join([f'*a{i}'] * 10)}]\n" for i in range(9)),
        "[" * 30_000,
        "[" * 8000,
        "{a: " * 2000,
        "- " * 4000,
        "a: b\n" * 1600,
        'a: "\\UFFFFFFFF"',
        V_YAML + "    first_stage_config: &x {a: *x}",
    ],
    ids=["merge keys", "large", "brackets", "braces", "dashes", "pairs", "character", "endless"],
)
def test_hostile_yaml_is_noted_at_once(text: str, tmp_path: Path) -> None:
    found: list[str] = []
    (tmp_path / "m.yaml").write_text(text)
    start = time.process_time()
    assert read_yaml_beside(tmp_path / "m.ckpt", found)[1] == {}
    assert time.process_time() - start < 1  # it takes a tenth of that, and took minutes
    assert len(found) == 1
    assert found[0].startswith("m.yaml, beside m.ckpt, is not used")
    assert len(found[0]) < 300


@pytest.mark.parametrize(
    ("setting", "note"),
    [
        ("timesteps: '1000'", "timesteps='1000'"),
        ("timesteps: 1000000000", "timesteps=1000000000"),
        ("scale_factor: null", "scale_factor=None"),
        ("scale_factor: 0", "scale_factor=0"),
        ("scale_factor: .nan", "scale_factor='.nan'"),
        ("beta_schedule: cosine", "beta_schedule='cosine'"),
        ("beta_schedule: [1]", r"beta_schedule=[1]"),
        ("beta_schedule: {a: 1}", "beta_schedule={'a': 1}"),
        ("linear_start: -1", "linear_start=-1"),
        ("linear_start: 2020-01-01", "linear_start='2020-01-01'"),
        ("parameterization: [v]", "parameterization=['v']"),
        ("linear_start: 0.9\n    linear_end: 0.95", "has a schedule"),
    ],
)
def test_a_setting_of_a_configuration_that_cannot_be_is_noted(setting: str, note: str, load: Load, tmp_path: Path) -> None:
    """With the file's name; the others are used."""
    name = setting.partition(":")[0]
    rest = "" if name == "parameterization" else "    parameterization: v\n"
    (tmp_path / "model.yaml").write_text(f"model:\n  params:\n    {setting}\n{rest}")
    model = load("sd1", prefix=("model.", "first_stage"))
    assert model.prediction.name == ("v" if rest else "eps")
    assert model.spec["schedule"] == SD_TABLE
    assert model.require("vae").params.scale == 0.18215
    assert any(line.startswith("model.yaml, beside model.safetensors, has") and note in line for line in notes(model).split("; "))


def test_numbers_of_configurations(load: Load, tmp_path: Path) -> None:
    """1e-3 is a number, as OmegaConf has it; a round scale is not Playground's in a file that is not built like it."""
    (tmp_path / "model.yaml").write_text("model:\n  params:\n    linear_start: 1e-3\n    timesteps: 500\n    scale_factor: 0.5\n")
    model = load("sd1", prefix=("model.", "first_stage"))
    assert model.spec["schedule"] == {**SD_TABLE, "start": 1e-3, "steps": 500}
    assert model.require("vae").params.scale == 0.5
    assert "latents are scaled by 0.5, as model.yaml, beside model.safetensors, says" in notes(model)


# Families --------------------------------------------------------------------------------------------------------------


def test_playground_is_known_by_its_statistics(load: Load, files: Files) -> None:
    """Latents are scaled by the numbers in the file, which are read and accounted for; one of the two alone is refused."""
    mean, std = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0, 7.0, 8.0])
    for shape in ((4,), (1, 4, 1, 1)):
        model = load("sdxl", {"edm_mean": mean.view(shape), "edm_std": std.view(shape).half()}, prefix=("model.", "first_stage"))
        assert (model.spec["family"], model.prediction.name) == ("playground-v2.5", "edm")
        vae = model.require("vae").params
        assert (vae.scale, vae.mean, vae.std) == (0.5, (1.0, 2.0, 3.0, 4.0), (5.0, 6.0, 7.0, 8.0))
        assert {"edm_mean", "edm_std"} <= set(model.report.consumed)  # type: ignore[union-attr]  # there is one
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


@pytest.mark.parametrize(("base", "family"), [("sd2", "sd-turbo"), ("sdxl", "sdxl-turbo"), ("sdxl", "lcm-sdxl"), ("sd1", "lcm")])
def test_families_that_only_their_user_knows(base: str, family: str, load: Load) -> None:
    """Their files are those of the family that they were distilled from."""
    model = load(base, family=family)
    of = models.FAMILIES[family]
    assert (model.spec["family"], model.spec["grid"], model.distilled) == (family, dict(of.grid), of.consistency is not None)
    assert f"of the family {family}, as asked for" in notes(model)
    with pytest.raises(ValueError, match=rf"model\.safetensors is built like {base}, so it cannot be of the family sdxl-refiner"):
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
        ("sd2", {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing", "prediction_type": "v_prediction"}, ""),
        ("sd1", {"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING}, ""),
    ],
)
def test_a_scheduler_does_not_tell_a_family(family: str, scheduler: dict[str, str], maybe: str, configured: Configured) -> None:
    """People exchange them: the network is sampled as its own family is, and a note names the other that it may be."""
    folder = configured(family, SCHEDULER, **scheduler)
    (folder / "model_index.json").unlink()  # which names the family, where it is ours
    model = models.load(folder)
    own = f"{family}-v" if scheduler.get("prediction_type") == "v_prediction" else family
    assert (model.spec["family"], model.spec["sampling"]) == (own, dict(models.FAMILIES[own].sampling))
    assert (f"family='{maybe}' is for one" in notes(model)) == bool(maybe)


@pytest.mark.parametrize(
    ("base", "index", "unet", "family"),
    [
        ("sdxl", {"_name_or_path": "stabilityai/sdxl-turbo"}, {}, "sdxl-turbo"),
        ("sdxl", {}, {"_name_or_path": "/x/models--stabilityai--sdxl-turbo/snapshots/7115/unet"}, "sdxl-turbo"),
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
def test_what_a_folder_is_named(base: str, index: dict[str, Any], unet: dict[str, Any], family: str, configured: Configured) -> None:
    """By the repository that its parts were read from, or by us; SDXL-Turbo's as published also by the size it was trained on."""
    scheduler = {"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING}
    folder = configured(base, SCHEDULER, **scheduler)
    for file, change in (("model_index.json", {"_family": None, **index}), ("unet/config.json", unet)):
        content = json.loads((folder / file).read_text()) | change
        (folder / file).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    assert models.load(folder).spec["family"] == family
    assert models.load(folder, family=base).spec["family"] == base


def test_a_full_lcm_is_known_by_its_guidance(load: Load) -> None:
    """Its network takes the guidance scale."""
    assert load("lcm").spec["family"] == "lcm"


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize(
    ("size", "shape"),
    [(96, (96, 96)), (96.0, (96, 96)), ([48, 80], (48, 80)), (None, (64, 64)), (0, None), ("96", None), (4096, None), (96.5, None)],
)
def test_the_size_it_was_trained_on(family: str, size: Any, shape: tuple[int, int] | None, configured: Configured) -> None:
    """From the UNet's configuration; what is no size is not used, which a note says (but for none at all)."""
    model = models.load(configured(family, "unet/config.json", sample_size=size))
    usual = (models.FAMILIES[family].size // 8,) * 2
    assert model.shape == (4, *(shape if shape and size else usual))
    assert ("and not 1 to 256 latents a side" in notes(model)) == (shape is None and size != 0)


@pytest.mark.parametrize("family", ["sd1", "sdxl-refiner", "sd3"])
def test_the_size_of_a_saved_model_comes_back(family: str, tmp_path: Path) -> None:
    models.save(models.build({**tiny(family).spec, "shape": [tiny(family).shape[0], 24, 40]}), tmp_path, "diffusers")
    assert models.load(tmp_path).shape[1:] == ((40, 40) if family == "sd3" else (24, 40))  # in diffusers a transformer's is square


# Settings that no shape tells ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        ("unet/config.json", {"act_fn": "gelu"}, "config.json says act_fn='gelu'"),
        ("unet/config.json", {"flip_sin_to_cos": False}, "config.json says flip_sin_to_cos=False"),
        ("unet/config.json", {"resnet_time_scale_shift": "scale_shift"}, "config.json says resnet_time_scale_shift="),
        ("unet/config.json", {"norm_num_groups": 7}, "does not divide into groups=7"),
        ("unet/config.json", {"norm_num_groups": "many"}, "a setting of an odd kind"),
        ("unet/config.json", {"attention_head_dim": [3, 5]}, r"attention_head_dim \[3, 5\] fixes neither"),
        ("unet/config.json", {"attention_head_dim": [1, 2, 3]}, r"attention_head_dim \[1, 2, 3\] is neither a number nor"),
        ("unet/config.json", {"attention_head_dim": "8"}, "attention_head_dim '8' is neither a number nor"),
        ("unet/config.json", {"attention_head_dim": [0, 0]}, "a setting of an odd kind"),
        ("unet/config.json", {"attention_head_dim": 7}, "do not divide into heads"),
        ("vae/config.json", {"act_fn": "relu"}, "config.json says act_fn='relu'"),
        ("vae/config.json", {"scaling_factor": "big"}, "its latents cannot be scaled as its configuration says: scale must be a number"),
        ("vae/config.json", {"scaling_factor": -1.0}, "its latents cannot be scaled as its configuration says: scale must be above 0"),
        ("vae/config.json", {"latents_mean": [1, 2], "latents_std": [1, 2]}, "mean has 2 values for 4 latent channels"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "config.json says hidden_act='relu'"),
        ("text_encoder/config.json", {"num_attention_heads": 5}, "width=64 must divide by heads=5"),
        ("text_encoder/config.json", {"num_attention_heads": [1]}, "a setting of an odd kind"),
        (SCHEDULER, {"beta_start": "small"}, "start of schedule 'scaled_linear' must be a number"),
        (SCHEDULER, {"beta_end": 3.0}, "betas must lie in"),
        (SCHEDULER, {"beta_start": -1.0}, "betas must lie in"),
        *(
            (SCHEDULER, {"num_train_timesteps": n}, "has num_train_timesteps=.*, and not 2 ... 100000")
            for n in (1, 10**6, 10**12, "1000", 2.5)
        ),
        (SCHEDULER, {"prediction_type": "flow_prediction"}, "as its scheduler's configuration has it, named 'flow_prediction'"),
        (SCHEDULER, {"prediction_type": ["epsilon"]}, "as its scheduler's configuration has it, named"),
    ],
)
def test_other_settings_are_refused(config: str, settings: dict[str, Any], message: str, configured: Configured) -> None:
    """In one line that names the file, before there is a network that computes something else."""
    with pytest.raises(ValueError, match=message) as refusal:
        models.load(configured("sd1", config, **settings))
    assert "folder" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_cosxl_is_refused(load: Load) -> None:
    """Its times are EDM's, which no family here is told."""
    with pytest.raises(ValueError, match=r"model\.safetensors holds edm_vpred\.sigma_max: it is CosXL's kind"):
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
        (ValueError, FileNotFoundError), match=rf"{config} (is damaged|holds no JSON object)|folder holds no model"
    ) as refusal:
        models.load(folder)
    assert "\n" not in str(refusal.value)


# Scales ----------------------------------------------------------------------------------------------------------------


def test_the_scale_of_latents(files: Files, configured: Configured, load: Load, tmp_path: Path) -> None:
    """From the configuration beside the autoencoder, else from the family, which an autoencoder alone does not tell: noted."""
    folder = configured("sdxl", "vae/config.json", scaling_factor=0.25)
    assert models.load(folder).require("vae").params.scale == 0.25
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"  # alone, but named as there
    assert models.load(file).require("vae").params.scale == 0.25
    shutil.copy(file, folder / "vae" / "another.safetensors")
    assert models.load(folder / "vae" / "another.safetensors").require("vae").params.scale == 0.18215
    assert load("sdxl", prefix=("model.", "first_stage")).require("vae").params.scale == 0.13025
    save_file({key: value for key, value in files("sdxl").items() if key.startswith("first_stage")}, tmp_path / "vae.safetensors")
    alone = models.load(tmp_path / "vae.safetensors")
    assert alone.require("vae").params.scale == 0.18215
    assert "latents are scaled by 0.18215, as in Stable Diffusion 1.x: family=... chooses another one's" in notes(alone)
    named = models.load(tmp_path / "vae.safetensors", family="sd1")
    assert "latents are scaled" not in notes(named)


@pytest.mark.parametrize(
    ("family", "config", "other"),
    [
        ("sdxl", {"scaling_factor": 0.18215}, "Stable Diffusion 1.x"),
        ("sdxl", {"scaling_factor": None}, "Stable Diffusion 1.x"),  # as its class has it by default
        ("sdxl", {"scaling_factor": 0.5}, "Playground v2.5"),
        ("sd1", {"scaling_factor": 0.13025}, "Stable Diffusion XL"),
        ("sd2", {"scaling_factor": 0.13025}, "Stable Diffusion XL"),
        ("playground-v2.5", {"scaling_factor": 0.13025, "latents_mean": None, "latents_std": None}, "Stable Diffusion XL"),
        ("sd1", {"scaling_factor": None}, None),
        ("sd2", {"scaling_factor": 0.18215}, None),
    ],
)
def test_an_autoencoder_of_another_family_is_refused(
    family: str, config: dict[str, Any], other: str | None, configured: Configured
) -> None:
    """Shapes are the same, and pictures would be wrong."""
    folder = configured(family, "vae/config.json", **config)
    if other is None:
        assert models.load(folder).require("vae").params.scale == models.FAMILIES[family].scale
        return
    with pytest.raises(ValueError, match=rf"vae/.*safetensors is the autoencoder of {other}, as its config\.json says") as refusal:
        models.load(folder)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=f"is the autoencoder of {other}"):
        models.load(folder / "vae", family=family)
    models.load(folder / "vae")


@pytest.mark.parametrize(("shift", "noted"), [(0.0, False), (None, False), (0.1, True)])
def test_a_shift_of_ones_own_is_noted(shift: float | None, noted: bool, configured: Configured) -> None:
    model = models.load(configured("sdxl", "vae/config.json", shift_factor=shift))
    assert model.require("vae").params.shift == (shift or 0)
    assert ("latents are shifted by 0.1, as its config.json says, and not by 0" in notes(model)) == noted


def test_an_autoencoder_beside_another_network_is_refused(files: Files, tmp_path: Path) -> None:
    """Its file says nothing of its latents, but holds the network that they were made for, which another file replaces."""
    parts = {
        family: {key: v for key, v in files(family).items() if key.startswith(("model.", "first_stage"))} for family in ("sd1", "sdxl")
    }
    for family, other in (("sd1", "sdxl"), ("sdxl", "sd1")):
        save_file(parts[other], tmp_path / "both.safetensors")
        save_file({k: v for k, v in parts[family].items() if k.startswith("model.")}, tmp_path / "unet.safetensors")
        with pytest.raises(
            ValueError, match=rf"both\.safetensors is the autoencoder of {models.FAMILIES[other].title}, as the network beside"
        ):
            models.load(tmp_path / "both.safetensors", tmp_path / "unet.safetensors")
        assert models.load(tmp_path / "unet.safetensors", tmp_path / "both.safetensors").spec["family"] == other


def test_an_autoencoder_that_says_nothing_is_noted(files: Files, tmp_path: Path) -> None:
    for name, prefix in (("unet", "model."), ("vae", "first_stage")):
        save_file({k: v for k, v in files("sdxl").items() if k.startswith(prefix)}, tmp_path / f"{name}.safetensors")
    model = models.load(tmp_path / "unet.safetensors", tmp_path / "vae.safetensors")
    assert "vae.safetensors does not say whose latents it makes: they are taken for those of Stable Diffusion XL" in notes(model)
    assert "whose latents" not in notes(models.load(tmp_path / "vae.safetensors", family="sdxl"))


@pytest.mark.parametrize(("scale", "note"), [(0.13025, False), (0.9, True)])
def test_a_scale_among_the_tensors(scale: float, note: bool, load: Load) -> None:
    """Latent diffusion's buffer, where the scale was measured at the start of training; or in the configuration beside the file."""
    model = load("sdxl", {"scale_factor": torch.tensor(scale).half()}, prefix=("model.", "first_stage"))
    assert model.require("vae").params.scale == pytest.approx(scale, rel=1e-3)
    assert ("as scale_factor says, and not by 0.13025" in notes(model)) == note
    with pytest.raises(ValueError, match=r"is the autoencoder of Stable Diffusion 1\.x, as scale_factor says"):
        load("sdxl", {"scale_factor": torch.tensor(0.18215)}, prefix=("model.", "first_stage"))


def test_a_scale_in_the_configuration_beside_a_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(SGM_YAML.replace("0.13025", "0.7"))
    assert load("sdxl", prefix=("model.", "first_stage")).require("vae").params.scale == 0.7


# Parts that do not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "part", "to", "message"),
    [
        ("sd2", "cond_stage_model.", "sd1", "the UNet takes a context of 64 numbers, and the text encoders make 128"),
        ("sd1", "cond_stage_model.", "sd2", "the UNet takes a context of 128 numbers, and the text encoders make 64"),
        ("sd1", "cond_stage_model.", "sdxl-refiner", "the UNet takes a context of 128 numbers, and the text encoders make 64"),
    ],
)
def test_parts_of_different_families_are_refused(of: str, part: str, to: str, message: str, files: Files, tmp_path: Path) -> None:
    save_file({key: value for key, value in files(of).items() if key.startswith(part)}, tmp_path / "part.safetensors")
    save_file({key: value for key, value in files(to).items() if key.startswith("model.")}, tmp_path / "unet.safetensors")
    for paths in (
        [tmp_path / "part.safetensors", tmp_path / "unet.safetensors"],
        [tmp_path / "unet.safetensors", tmp_path / "part.safetensors"],
    ):
        with pytest.raises(ValueError, match=rf"part\.safetensors does not go with .*unet\.safetensors: {message}"):
            models.load(*paths)


def test_an_autoencoder_with_other_latents_is_refused(files: Files, tmp_path: Path) -> None:
    vae = models.build({**tiny("sd1").spec, "vae": {**tiny("sd1").spec["vae"], "latent_channels": 8}}).require("vae")
    made = Model(None, tiny("sd1").schedule, tiny("sd1").prediction, {"family": "sd1"}, vae=vae)
    models.save(made, tmp_path / "vae", "diffusers")
    save_file(files("sd1"), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not go with .*model\.safetensors: the UNet's samples have 4 channels, and its latents 8"):
        models.load(tmp_path / "model.safetensors", tmp_path / "vae")


def test_one_of_two_towers_is_left_out(files: Files, tmp_path: Path) -> None:
    """SDXL needs both; the report says which one is missing, and the model has no text."""
    without = {key: value for key, value in files("sdxl").items() if not key.startswith("conditioner.embedders.1.")}
    save_file(without, tmp_path / "model.safetensors")
    model = models.load(tmp_path / "model.safetensors")
    assert model.text is None
    assert "text encoders left out: clip_l is there, but clip_g is not" in notes(model)
    assert model.report is not None
    assert model.report.missing == ("text",)
    left_out = {key for key, why in model.report.ignored.items() if why == "a text encoder of no use without the other"}
    assert left_out == {key for key in without if key.startswith("conditioner.")}


def test_unclip_is_no_sdxl(tmp_path: Path) -> None:
    """SD 2.1 unCLIP's UNet takes a vector too, but attends at the finest level."""
    model = models.build({**tiny("sd2").spec, "network": {**tiny("sd2").spec["network"], "vector_dim": 2048}})
    network = model.network
    assert isinstance(network, UNet)
    state = network.state_dict()
    save_file(scatter(unet_keys.ldm(network.params).table(state), state), tmp_path / "unclip.safetensors")
    with pytest.raises(ValueError, match=r"unclip\.safetensors holds a UNet like SD 2\.1 unCLIP's, which this library does not know"):
        models.load(tmp_path / "unclip.safetensors")


# Saving what a layout cannot say ---------------------------------------------------------------------------------------


def changed(family: str, **spec: Any) -> Model:
    """A fresh miniature with parts of its description changed."""
    own = tiny(family).spec
    return models.build({**own, **{key: {**own[key], **value} if isinstance(value, dict) else value for key, value in spec.items()}})


@pytest.mark.parametrize(
    ("layout", "spec", "message"),
    [
        ("ldm", {"network": {"groups": 16}}, r"UNet with groups=16, and readers would take it for 32: use layout='native'"),
        ("ldm", {"network": {"heads": 4}}, r"UNet with heads=\[4, 4\], and readers would take it for \[8, 8\]"),
        ("ldm", {"vae": {"groups": 16}}, "VAE with groups=16"),
        ("ldm", {"vae": {"scale": 0.3}}, "single files do not say how latents are scaled, here by 0.3"),
        ("ldm", {"prediction": "x0"}, "single files do not say schedule .* and prediction 'x0'"),
        ("ldm", {"schedule": {"shift": 2.0}}, "single files do not say schedule"),
        ("separate", {"schedule": {"end": 0.02}}, "separate files do not say the schedule .*'end': 0.02"),
        (
            "separate",
            {"schedule": {"zero_terminal_snr": True}, "grid": {"spacing": "trailing"}, "prediction": "v"},
            "separate files do not say the schedule .*zero_terminal",
        ),
        ("ldm", {"network": {"scale_shift": True}}, "UNet with scale_shift=True"),
        ("diffusers", {"network": {"scale_shift": True}}, "UNet with scale_shift=True"),
        ("diffusers", {"network": {"num_classes": 10}}, "has no words for a UNet with"),
        ("diffusers", {"network": {"time_factor": 1000.0}}, "UNet with time_factor=1000.0"),
        ("diffusers", {"network": {"middle_attention": 0}}, "in diffusers' folders the middle attends as the coarsest level does"),
        ("diffusers", {"schedule": {"shift": 2.0}}, "diffusers' folders have no schedule .*'shift': 2.0"),
    ],
)
def test_what_a_layout_cannot_say_is_refused(layout: str, spec: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Rather than written, and read back as another model; our own layout holds it."""
    model = changed("sd1", **spec)
    with pytest.raises(ValueError, match=message) as refusal:
        models.save(model, tmp_path / "a.safetensors", layout)  # type: ignore[arg-type]  # one of LAYOUTS
    assert "\n" not in str(refusal.value)
    models.save(model, tmp_path / "b.safetensors")
    assert models.load(tmp_path / "b.safetensors").spec == json.loads(json.dumps(model.spec))


def test_networks_of_no_published_kind_are_refused(tmp_path: Path) -> None:
    """One that is told classes and no text, and a transformer."""
    unet = {"name": "unet", "channels": 32, "channel_mult": [1], "blocks": 1, "attention": [0], "middle_attention": 0, "num_classes": 10}
    dit = {"name": "dit", "in_channels": 4, "image_size": 8, "hidden": 16, "depth": 1, "heads": 2}
    for network, kind in ((unet, "UNet"), (dit, "DiT")):
        model = models.build({"network": network, "schedule": {"name": "scaled_linear"}, "prediction": "eps"})
        for layout in ("ldm", "diffusers"):
            with pytest.raises(ValueError, match=f"the layout '{layout}' is for networks that are told a text, which this {kind} is not"):
                models.save(model, tmp_path / "a", layout)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "float16", {"vae": torch.int32}])
def test_dtypes_that_nothing_computes_in(dtype: Any, load: Load, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"networks compute in torch\.float32, "):
        load("sd1", dtype=dtype)
    if not isinstance(dtype, dict):
        with pytest.raises(ValueError, match=r"networks compute in torch\.float32, "):
            models.save(tiny("sd1"), tmp_path / "a.safetensors", dtype=dtype)
    with pytest.raises(ValueError, match="no part named 'unet'; known: backbone, vae, text, preview"):
        load("sd1", dtype={"unet": torch.float16})


def test_a_kind_of_preconditioning_that_is_not_known_is_refused(tmp_path: Path) -> None:
    """CosXL's mark, and schedulers of flows, of cosines and of EDM with other settings: their networks would be taken for others."""
    models.save(models.miniature("sdxl"), tmp_path / "sdxl.safetensors", layout="ldm")
    tensors = load_file(tmp_path / "sdxl.safetensors")
    save_file({**tensors, "edm_vpred.sigma_max": torch.tensor(120.0)}, tmp_path / "cosxl.safetensors")
    with pytest.raises(ValueError, match="CosXL's kind, EDM with v-prediction"):
        models.load(tmp_path / "cosxl.safetensors")
    models.save(models.miniature("sdxl"), tmp_path / "folder", layout="diffusers")
    config = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    for scheduler in (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
        {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "prediction_type": "v_prediction"},
    ):
        config.write_text(json.dumps(scheduler))
        with pytest.raises(ValueError, match=f"{scheduler['_class_name']} with settings that no family here was trained with"):
            models.load(tmp_path / "folder")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl-refiner"])
def test_edm_is_known_of_networks_like_sdxls_alone(family: str, configured: Configured) -> None:
    """Playground's preconditioning, which other networks here are not called with."""
    with pytest.raises(ValueError, match="EDMEulerScheduler with settings that no family here was trained with"):
        models.load(configured(family, SCHEDULER, _class_name="EDMEulerScheduler", prediction_type="epsilon"))


@pytest.mark.parametrize("family", models.FAMILIES)
def test_a_folder_of_ours_is_of_the_same_family_again(family: str, tmp_path: Path) -> None:
    """Also where keys and shapes do not tell it."""
    models.save(tiny(family), tmp_path, layout="diffusers")
    again, own = models.load(tmp_path).spec, tiny(family).spec
    assert [again[name] for name in ("family", "grid", "sampling")] == [own[name] for name in ("family", "grid", "sampling")]
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index.get("_settings", {}).keys() <= {"shape"}  # which FLUX.1's configuration has no place for


def test_a_turbo_folder_begins_in_noise_elsewhere_too(tmp_path: Path) -> None:
    """By the scheduler that is saved with it, which begins at the noisiest row, as ours does."""
    models.save(models.miniature("sdxl-turbo"), tmp_path, layout="diffusers")
    scheduler = diffusers.EulerAncestralDiscreteScheduler.from_pretrained(tmp_path / "scheduler")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [999.0]


SHIFTED = {"spacing": "linspace", "shift": 2.0, "t_end": 2 / 1001}
FLOW_PREDICTION: dict[str, Any] = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    ("scheduler", "grid", "noted"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0), SHIFTED, ""),
        (diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0), SHIFTED, "FlowMatchHeun"),
        (diffusers.FlowMatchLCMScheduler(shift=2.0), SHIFTED, "FlowMatchLCM"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, use_karras_sigmas=True), SHIFTED, "use_karras_sigmas=True"),
        (diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, shift_terminal=0.02), SHIFTED, "shift_terminal=0.02"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=2.0), {"spacing": "mu_shift"}, "max_shift=2.0"),
        (diffusers.UniPCMultistepScheduler(**FLOW_PREDICTION, flow_shift=2.0), SHIFTED, "UniPC"),
        (diffusers.DPMSolverMultistepScheduler(**FLOW_PREDICTION, flow_shift=2.0), SHIFTED, "DPMSolver"),
        (diffusers.UniPCMultistepScheduler(**FLOW_PREDICTION), None, "UniPC"),
        (diffusers.EulerDiscreteScheduler(), None, "EulerDiscrete"),
    ],
)
def test_flows_open_with_any_scheduler(scheduler: Any, grid: dict[str, Any] | None, noted: str, tmp_path: Path) -> None:
    """Which says how they were sampled, and not what they are: its shift is kept, the rest is noted."""
    for family in ("sd3", "flux-dev"):
        model = models.load(configured_flow(family, scheduler, tmp_path / family))
        own = dict(models.FAMILIES[family].grid)
        expected = own if grid is None else {k: v for k, v in grid.items() if k != "t_end" or family == "sd3"}
        assert (model.spec["grid"], model.spec["sampling"]) == (expected, dict(models.FAMILIES[family].sampling))
        assert ("is not used: times are the family's" in notes(model)) == bool(noted)
        assert noted in notes(model)


def configured_flow(family: str, scheduler: Any, folder: Path) -> Path:
    """The transformer of a miniature in a folder with that scheduler."""
    spec = {name: tiny(family).spec[name] for name in ("family", "network", "schedule", "prediction", "shape")}
    models.save(models.build(spec), folder, "diffusers")
    scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.parametrize("settings", [{"invert_sigmas": True}, {"num_train_timesteps": 500}, {"shift": "3"}, {"shift": -1.0}])
def test_a_flow_whose_network_knows_other_times_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = configured_flow("sd3", diffusers.FlowMatchEulerDiscreteScheduler(), tmp_path)
    config = json.loads((folder / SCHEDULER).read_text())
    (folder / SCHEDULER).write_text(json.dumps(config | settings))
    with pytest.raises(ValueError, match=rf"scheduler_config\.json: .*{next(iter(settings))}=") as refusal:
        models.load(folder)
    assert "\n" not in str(refusal.value)


# Averages --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [True, False])
def test_of_a_trainings_unet_and_its_average_one_is_taken(ema: bool, saved_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """As asked for; the report says which, and why the other is left out."""
    for name in ("unet", "unet_ema"):
        shutil.copytree(saved_folder("sd1") / "unet", tmp_path / "checkpoint" / name)
    file = tmp_path / "checkpoint" / "unet_ema" / "diffusion_pytorch_model.safetensors"
    save_file({key: value + 1 for key, value in load_file(file).items()}, file)
    model = models.load(tmp_path / "checkpoint", ema=ema)
    alone = models.load(tmp_path / "checkpoint" / ("unet_ema" if ema else "unet"))
    same(model.state_dict(), alone.state_dict())
    assert ("averaged weights (EMA) are taken; ema=False takes the raw ones" in notes(model)) == ema
    reason = "raw weights, and averaged ones are there" if ema else "averaged weights, and raw ones were asked for"
    assert model.report is not None
    assert model.report.ignored == {"unet/" if ema else "unet_ema/": reason}


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
@pytest.mark.parametrize("ema", [True, False])
def test_an_autoencoder_with_an_average_of_its_own(ema: bool, prefix: str, files: Files, tmp_path: Path) -> None:
    raw = {key.removeprefix("first_stage_model."): value for key, value in files("sd1").items() if key.startswith("first_stage_model.")}
    average = {f"model_ema.{(prefix + key).replace('.', '')}": value + 1 for key, value in raw.items()}
    save_file({prefix + key: value for key, value in raw.items()} | average, tmp_path / "vae.safetensors")
    save_file({key: value + 1 if ema else value for key, value in raw.items()}, tmp_path / "alone.safetensors")
    model = models.load(tmp_path / "vae.safetensors", ema=ema)
    same(model.state_dict(), models.load(tmp_path / "alone.safetensors").state_dict())


# Text towers -----------------------------------------------------------------------------------------------------------


def findings_of(shapes: Mapping[str, tuple[int, ...]]) -> Findings:
    """Of a file with these keys and shapes."""
    found = find_parts(file_of(shapes))
    single, towers = ([part for part in found.parts if (part.kind == "text") == text] for text in (False, True))
    return Findings(single, towers, [found.file])


@pytest.mark.parametrize("blocks", [23, 24])
def test_sd2_reads_the_state_before_the_last_of_24_blocks(blocks: int) -> None:
    """Also of a single file, as converters write it, that holds the first 23 only."""
    published = {key: shape for key, shape in manifests()["sd21_full_ldm"].items() if "." in key}  # without the schedule, which is read
    shapes = {key: shape for key, shape in published.items() if blocks == 24 or ".resblocks.23." not in key}
    findings = findings_of(shapes)
    spec, towers = describe(findings, None, "v")
    assert spec["text"]["towers"]["clip_h"]["layers"] == towers["clip_h"].params.layers == blocks
    assert [use["blocks"] for use in spec["text"]["uses"]] == [23]


def test_a_tower_without_its_projection_is_named() -> None:
    """At published sizes width alone tells SDXL's towers apart."""
    shapes = {key: shape for key, shape in manifests()["sdxl_base_full_sgm"].items() if not key.endswith("1.model.text_projection")}
    findings = findings_of(shapes)
    with pytest.raises(ValueError, match="holds OpenCLIP's bigG without its text_projection"):
        describe(findings, None, None)


def test_paths_are_given_one_by_one(tmp_path: Path) -> None:
    for wrong in ([tmp_path], None, 3):
        with pytest.raises(ValueError, match=r"paths are given one by one, models\.load\(\*paths\), and not as"):
            models.load(wrong)  # type: ignore[arg-type]  # on purpose
