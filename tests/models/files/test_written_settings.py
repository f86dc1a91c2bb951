"""What neither keys nor shapes tell comes back from every layout, or is refused; what cannot be known is
noted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import models
from models import FAMILIES, Model
from models.layouts import native
from models.layouts.scheduler import flow_grid
from models.networks.clip import CLIPTextParams
from models.presets import TINY_TOWERS, randomise, tiny_description
from tests.models.files.tiny import tiny
from tests.peers import diffusers

SETTINGS = ("family", "prediction", "schedule", "grid", "sampling", "consistency", "shape")
NOT_SEPARATE = ("sdxl-v", "playground-v2.5")  # whose marks and statistics are tensors of a whole file


def saved(model: Model, folder: Path, layout: Any) -> list[Path]:
    """The paths to load."""
    models.save(model, path := folder / ("model.safetensors" if layout == "ldm" else "model"), layout)
    return sorted(path.iterdir()) if layout == "separate" else [path]


def notes_of(*paths: Path) -> tuple[str, ...]:
    report = models.load(*paths).report
    return report.notes if report else ()


def settings(model: Model) -> dict[str, Any]:
    return {name: model.spec[name] for name in SETTINGS if name in model.spec}


@pytest.mark.parametrize("layout", ["ldm", "separate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_from_single_files(family: str, layout: str, tmp_path: Path) -> None:
    model = tiny(family)
    if layout == "separate" and family in NOT_SEPARATE:
        with pytest.raises(ValueError, match="separate files do not say"):
            saved(model, tmp_path, layout)
        return
    assert settings(models.load(*saved(model, tmp_path, layout))) == settings(model)


HEUN = {"sampler": "heun", "steps": 9, "guidance": 3.0}
OWN: dict[str, dict[str, Any]] = {
    "sd1": {"grid": {"spacing": "trailing"}, "sampling": HEUN, "shape": [4, 24, 40]},
    "lcm": {
        "grid": {"spacing": "lcm", "initial": "unit", "taught": 100},
        "sampling": {"sampler": "lcm", "steps": 2, "guidance": 1.0},
    },
    "flux-dev": {
        "grid": {"spacing": "mu_shift", "line": [256, 0.5, 8192, 0.9], "mu": 0.7},
        "sampling": {"sampler": "heun", "steps": 9, "guidance": 3.0},
        "shape": [16, 8, 12],
    },
    "sd3": {"grid": {"spacing": "linspace", "shift": 2.0}, "shape": [16, 16, 24]},
}
SINGLE = [("sd1", "ldm"), ("sd1", "separate")]  # of flows, which single files have no words for, see _marks


@pytest.mark.parametrize(("family", "layout"), [*SINGLE, *((family, "diffusers") for family in OWN)])
def test_settings_of_ones_own_come_back(family: str, layout: str, tmp_path: Path) -> None:
    """What differs from the family's and is in no other configuration; diffusers opens the folder as ever."""
    usual = tiny(family)
    spec = {**usual.spec, **OWN[family]}
    model = Model(usual.network, usual.schedule, usual.prediction, spec, vae=usual.vae, text=usual.text)
    paths = saved(model, tmp_path, layout)
    assert settings(models.load(*paths)) == settings(model)
    if layout == "diffusers":
        index = json.loads((paths[0] / "model_index.json").read_text())
        assert set(index["_settings"]) <= set(OWN[family])
        diffusers.DiffusionPipeline.from_pretrained(paths[0])
    if family == "sd1":
        assert models.load(*paths, family="lcm").spec["grid"] == dict(FAMILIES["lcm"].grid)


def test_a_folders_configurations_that_are_edited_later_count(tmp_path: Path) -> None:
    """For what they say is not written twice."""
    model, grid = (
        tiny("sd3"),
        flow_grid({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0}, FAMILIES["sd3"]),
    )
    spec = {**model.spec, "grid": grid, "shape": [16, 24, 24]}
    [folder] = saved(Model(model.network, model.schedule, model.prediction, spec), tmp_path, "diffusers")
    assert settings(models.load(folder)) == settings(
        Model(model.network, model.schedule, model.prediction, spec)
    )
    for file, change in (
        ("scheduler/scheduler_config.json", {"shift": 5.0}),
        ("transformer/config.json", {"sample_size": 8}),
    ):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    changed = models.load(folder).spec
    assert (changed["grid"]["shift"], changed["shape"]) == (5.0, [16, 8, 8])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "_settings are damaged"),
        ("[1]", "_settings are damaged"),
        (json.dumps({"network": {}}), "_settings are damaged: .*network"),
        (json.dumps({"shape": [4, -1, 8]}), "shape"),
        (json.dumps({"shape": 4}), "shape"),
        (json.dumps({"grid": 4}), "grid"),
        (json.dumps({"sampling": {"sampler": []}}), "sampl"),
        (json.dumps({"consistency": None}), "consistency"),
        ('{"sampling": {"steps": Infinity}}', "_settings are damaged"),
    ],
)
def test_damaged_settings_are_refused(metadata: str, message: str, tmp_path: Path) -> None:
    [path] = saved(tiny("sd1"), tmp_path, "ldm")
    native.write_tensors(
        damaged := tmp_path / "damaged.safetensors",
        load_file(path),
        {"_family": "sd1", "_settings": metadata},
    )
    with pytest.raises(ValueError, match=message) as refusal:
        models.load(damaged)
    assert "damaged.safetensors" in str(refusal.value)
    assert "\n" not in str(refusal.value)


# Vocabularies -----------------------------------------------------------------------------------------------


def with_words(family: str, words: int) -> Model:
    """A miniature whose towers of CLIP know so many words."""
    towers = {
        name: replace(tower, vocab=words) if isinstance(tower, CLIPTextParams) else tower
        for name, tower in TINY_TOWERS.items()
    }
    model = models.build(tiny_description(family, towers))
    for part in model.parts.values():
        randomise(part, torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("layout", ["native", "ldm", "diffusers", "separate"])
def test_a_tower_of_fewer_words_is_refused_when_loading(layout: str, tmp_path: Path) -> None:
    """Without a tokenizer of its own: OpenAI's has 49408 tokens, and its end of text would be none of the
    tower's."""
    paths = saved(with_words("sd1", 49407), tmp_path, layout)
    with pytest.raises(ValueError, match=r"49407 tokens.*49408|49408 tokens.* 49407") as refusal:
        models.load(*paths)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("pad", [49408, -1])
def test_padding_that_is_no_token_is_refused_when_loading(pad: int, tmp_path: Path) -> None:
    model = tiny("sd1")
    [path] = saved(model, tmp_path, "native")
    tensors, metadata = native.read(path)
    metadata["model"]["text"]["readers"]["clip_l"]["pad"] = pad
    native.write(file := tmp_path / "padded.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=f"padded.safetensors.*clip_l.*pad={pad}.*0 to 49407"):
        models.load(file)


# A preview --------------------------------------------------------------------------------------------------


def test_the_family_of_a_preview_is_noted(tmp_path: Path) -> None:
    """SD 1's and SDXL's TAESD have the same keys and shapes; in a folder saved with its model it is that
    model's."""
    model = tiny("sdxl")
    models.save(model, tmp_path / "folder", "diffusers")
    assert not any("latents it decodes" in note for note in notes_of(tmp_path / "folder"))
    notes = notes_of(*saved(model, tmp_path, "ldm"), tmp_path / "folder" / "preview")
    assert any("latents it decodes" in note and "Stable Diffusion XL" in note for note in notes)
