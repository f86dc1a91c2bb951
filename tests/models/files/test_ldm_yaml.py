"""Latent diffusion's configuration beside a file of weights."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from models.layouts.ldm_yaml import read_ldm_yaml
from tests.models.files.tiny import SD_TABLE, Load, notes

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
    denoiser_config:
      params: {scaling_config: {target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling}}
"""


@pytest.mark.parametrize(
    ("family", "text", "spec"),
    [
        ("sd2", V_YAML, {"family": "sd2-v", "prediction": "v", "schedule": SD_TABLE}),
        ("sd1", V_YAML.replace('"v"', "eps"), {"family": "sd1", "prediction": "eps", "schedule": SD_TABLE}),
        (
            "sd1",
            V_YAML.replace("0.0120", "0.0200"),
            {"prediction": "v", "schedule": {**SD_TABLE, "end": 0.02}},
        ),
        ("sdxl", SGM_YAML, {"family": "sdxl-v", "prediction": "v", "schedule": SD_TABLE}),
        ("sdxl", SGM_YAML.replace("VScaling", "EpsScaling"), {"family": "sdxl", "prediction": "eps"}),
    ],
)
@pytest.mark.parametrize("ending", [".yaml", ".yml"])
def test_a_configuration_beside_a_file(
    family: str, text: str, spec: dict[str, Any], ending: str, load: Load, tmp_path: Path
) -> None:
    """model.yaml beside model.safetensors, as Stable Diffusion 2 is published: what it predicts, and its
    betas."""
    (tmp_path / "model").with_suffix(ending).write_text(text)
    (tmp_path / "other.yaml").write_text(V_YAML)
    model = load(family)
    assert {name: model.spec[name] for name in spec} == spec
    assert f"as model{ending}, beside model.safetensors, says" in notes(model)
    assert load(family, prediction="x0").prediction.name == "x0"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "model: 3",
        "a: &a [1]\nb: *c",
        "- 1",
        "[" * 10_000,
        "#" * 70_000,
        "!!python/object/apply:os.system [ls]",
        "\x00",
    ],
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
        "a0: &a0 {x: 1}\n"
        + "".join(f"a{i + 1}: &a{i + 1}\n  <<: [{','.join([f'*a{i}'] * 10)}]\n" for i in range(9)),
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
    assert read_ldm_yaml(tmp_path / "m.ckpt", found)[1] == {}
    assert time.process_time() - start < 1  # it takes a tenth of that, and took minutes
    assert len(found) == 1
    assert found[0].startswith("m.yaml, beside m.ckpt, is not used")
    assert len(found[0]) < 300


@pytest.mark.parametrize(
    ("setting", "note"),
    [
        ("timesteps: 1000.5", "timesteps='1000.5'"),
        ("timesteps: 1000000000", "has a schedule"),
        ("scale_factor: null", "scale_factor='null'"),
        ("scale_factor: 0", "scale_factor='0'"),
        ("scale_factor: .nan", "scale_factor='.nan'"),
        ("beta_schedule: cosine", "has a schedule"),
        ("beta_schedule: [1]", "beta_schedule=['1']"),
        ("beta_schedule: {a: 1}", "beta_schedule={'a': '1'}"),
        ("linear_start: -1", "linear_start='-1'"),
        ("linear_start: 2020-01-01", "linear_start='2020-01-01'"),
        ("parameterization: [v]", "parameterization=['v']"),
        ("linear_start: 0.9\n    linear_end: 0.95", "has a schedule"),
    ],
)
def test_a_setting_of_a_configuration_that_cannot_be_is_noted(
    setting: str, note: str, load: Load, tmp_path: Path
) -> None:
    """With the file's name; the others are used."""
    name = setting.partition(":")[0]
    rest = "" if name == "parameterization" else "    parameterization: v\n"
    (tmp_path / "model.yaml").write_text(f"model:\n  params:\n    {setting}\n{rest}")
    model = load("sd1", prefix=("model.", "first_stage"))
    assert model.prediction.name == ("v" if rest else "eps")
    assert model.spec["schedule"] == SD_TABLE
    assert model.require("vae").params.scale == 0.18215
    assert any(
        line.startswith("model.yaml, beside model.safetensors, has") and note in line
        for line in notes(model).split("; ")
    )


def test_numbers_of_configurations(load: Load, tmp_path: Path) -> None:
    """1e-3 is a number, as OmegaConf has it; a round scale is not Playground's in a file that is not built
    like it."""
    (tmp_path / "model.yaml").write_text(
        "model:\n  params:\n    linear_start: 1e-3\n    timesteps: 500\n    scale_factor: 0.5\n"
    )
    model = load("sd1", prefix=("model.", "first_stage"))
    assert model.spec["schedule"] == {**SD_TABLE, "start": 1e-3, "steps": 500}
    assert model.require("vae").params.scale == 0.5
    assert "latents are scaled by 0.5, as model.yaml, beside model.safetensors, says" in notes(model)


def test_a_scale_in_the_configuration_beside_a_file(load: Load, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(SGM_YAML.replace("0.13025", "0.7"))
    assert load("sdxl", prefix=("model.", "first_stage")).require("vae").params.scale == 0.7
