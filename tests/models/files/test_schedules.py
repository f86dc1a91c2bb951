"""The noise schedule of a model: from schedulers' configurations, tables among the tensors, and as asked
for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import models
from diffusion import DiscreteVP, build_schedule
from models.files.tensors import open_tensors
from models.layouts.schedule_table import changed_schedule, write_table
from tests.models.files.tiny import SCHEDULER, SD_TABLE, Configured, Load, notes


def test_scheduler_configurations_say_the_betas(configured: Configured) -> None:
    """Other betas than the family's are taken, and noted."""
    folder = configured(
        "sd1", SCHEDULER, beta_schedule="linear", beta_start=0.0005, beta_end=0.015, num_train_timesteps=500
    )
    model = models.load(folder)
    expected = {"name": "linear", "start": 0.0005, "end": 0.015, "steps": 500}
    assert model.spec["schedule"] == expected
    assert (
        "the schedule has name=linear, start=0.0005, end=0.015, steps=500, as its scheduler's configuration "
        "says" in notes(model)
    )
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
    with pytest.raises(
        ValueError,
        match=rf"scheduler_config\.json: its scheduler's configuration has the betas {betas}, which no "
        r"known family",
    ):
        models.load(configured("sd1", SCHEDULER, **settings))


def test_playgrounds_schedule_comes_from_its_configuration(configured: Configured) -> None:
    """Of which prediction_type is about what comes behind EDM's preconditioning."""
    model = models.load(configured("playground-v2.5", SCHEDULER, sigma_max=70.0))
    assert (model.spec["family"], model.prediction.name) == ("playground-v2.5", "edm")
    assert model.spec["schedule"] == {"name": "ve", "sigma_min": 0.002, "sigma_max": 70.0}


def test_a_network_that_predicts_eps_does_not_begin_in_pure_noise(configured: Configured) -> None:
    """Where eps is all that there is: the schedule stays the family's own, which is noted, and images can be
    made."""
    folder = configured("sdxl", SCHEDULER, rescale_betas_zero_snr=True, prediction_type="epsilon")
    model = models.load(folder)
    assert "zero_terminal_snr" not in model.spec["schedule"]
    assert "zero terminal SNR is left out: a network that predicts eps cannot begin in pure noise" in notes(
        model
    )
    asked = models.load(folder, prediction="v")
    assert asked.spec["schedule"]["zero_terminal_snr"]
    assert "zero_terminal_snr=True, as its scheduler's configuration says" in notes(asked)


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
    """What its network was trained with, in whichever form; saved again, it is read again. The family's own
    is nothing to speak of."""
    table = alpha_bar_of(WRITTEN[name])
    model = load("sd1", {key: KINDS_OF_TABLES[key](table).float()}, prediction="v")
    torch.testing.assert_close(alpha_bar_of(model.spec["schedule"]), table, rtol=2e-6, atol=1e-7)
    assert (f"as its table {key} says" in notes(model)) == (name != "own")
    assert model.spec["grid"] == ({"spacing": "trailing"} if "zero" in name else {"spacing": "karras"})
    if key == "alphas_cumprod":
        for layout in ("native", "ldm", "diffusers"):
            path = tmp_path / ("folder" if layout == "diffusers" else f"{layout}.safetensors")
            models.save(model, path, layout, torch.float16)
            torch.testing.assert_close(
                alpha_bar_of(models.load(path).spec["schedule"]), table, rtol=2e-6, atol=1e-7
            )


def schedule_in(tensors: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """What a table in a file changes in SD 1's schedule."""
    save_file(tensors, folder / "table.safetensors")
    return changed_schedule(open_tensors(folder / "table.safetensors"), SD_TABLE, [])[1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_a_rounded_table_is_known_by_all_its_rows(
    name: str, zero: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
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


@pytest.mark.parametrize(
    ("start", "end"), [(0.001, 0.015), (0.0012345, 0.01234567), (0.00085, 0.012000001), (0.02, 0.001)]
)
@pytest.mark.parametrize("zero", [False, True])
def test_a_table_that_is_written_is_read_again(start: float, end: float, zero: bool, tmp_path: Path) -> None:
    schedule = build_schedule(
        {"name": "linear", "start": start, "end": end, "steps": 1000, "zero_terminal_snr": zero}
    )
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
    assert (
        load("sdxl", table | {"edm_mean": torch.ones(4), "edm_std": torch.ones(4)}).spec["schedule"]["name"]
        == "ve"
    )


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
    """zero_snr=True where a file does not say it, zero_snr=False where it says it wrongly; kept in every
    layout."""
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
    with pytest.raises(ValueError, match="describes a whole model"):
        models.load(tmp_path / "native.safetensors", zero_snr=True)


@pytest.mark.parametrize("zero_snr", [True, False])
def test_pure_noise_of_no_table(zero_snr: bool, load: Load) -> None:
    with pytest.raises(ValueError, match="which 've' does not have"):
        load("sdxl", family="playground-v2.5", zero_snr=zero_snr)


@pytest.mark.parametrize("zero_snr", [0, 1, "false", 1.0])
def test_pure_noise_is_true_or_false(zero_snr: Any, load: Load) -> None:
    with pytest.raises(ValueError, match="zero_snr must be true or false"):
        load("sd1", zero_snr=zero_snr)
