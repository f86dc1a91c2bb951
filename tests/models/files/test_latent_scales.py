"""How an autoencoder's latents are scaled, and whose latents they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import models
from tests.models.files.tiny import Configured, Files, Load, notes


def test_the_scale_of_latents(files: Files, configured: Configured, load: Load, tmp_path: Path) -> None:
    """From the configuration beside the autoencoder, else from the family, which an autoencoder alone does
    not tell: noted."""
    folder = configured("sdxl", "vae/config.json", scaling_factor=0.25)
    assert models.load(folder).require("vae").params.scale == 0.25
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"  # alone, but named as there
    assert models.load(file).require("vae").params.scale == 0.25
    shutil.copy(file, folder / "vae" / "another.safetensors")
    assert models.load(folder / "vae" / "another.safetensors").require("vae").params.scale == 0.18215
    assert load("sdxl", prefix=("model.", "first_stage")).require("vae").params.scale == 0.13025
    save_file(
        {key: value for key, value in files("sdxl").items() if key.startswith("first_stage")},
        tmp_path / "vae.safetensors",
    )
    alone = models.load(tmp_path / "vae.safetensors")
    assert alone.require("vae").params.scale == 0.18215
    assert (
        "latents are scaled by 0.18215, as in Stable Diffusion 1.x: family=... chooses another one"
        in notes(alone)
    )
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
        (
            "playground-v2.5",
            {"scaling_factor": 0.13025, "latents_mean": None, "latents_std": None},
            "Stable Diffusion XL",
        ),
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
        assert models.load(folder).require("vae").params.scale == models.FAMILIES[family].vae.scale
        return
    with pytest.raises(
        ValueError, match=rf"vae/.*safetensors is the autoencoder of {other}, as its config\.json says"
    ) as refusal:
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
    """Its file says nothing of its latents, but holds the network that they were made for, which another file
    replaces."""
    parts = {
        family: {key: v for key, v in files(family).items() if key.startswith(("model.", "first_stage"))}
        for family in ("sd1", "sdxl")
    }
    for family, other in (("sd1", "sdxl"), ("sdxl", "sd1")):
        save_file(parts[other], tmp_path / "both.safetensors")
        save_file(
            {k: v for k, v in parts[family].items() if k.startswith("model.")}, tmp_path / "unet.safetensors"
        )
        with pytest.raises(
            ValueError,
            match=rf"both\.safetensors is the autoencoder of {models.FAMILIES[other].title}, as the "
            r"network in the same file",
        ):
            models.load(tmp_path / "both.safetensors", tmp_path / "unet.safetensors")
        assert (
            models.load(tmp_path / "unet.safetensors", tmp_path / "both.safetensors").spec["family"] == other
        )


def test_an_autoencoder_that_says_nothing_is_noted(files: Files, tmp_path: Path) -> None:
    for name, prefix in (("unet", "model."), ("vae", "first_stage")):
        save_file(
            {k: v for k, v in files("sdxl").items() if k.startswith(prefix)}, tmp_path / f"{name}.safetensors"
        )
    model = models.load(tmp_path / "unet.safetensors", tmp_path / "vae.safetensors")
    assert (
        "vae.safetensors does not say whose latents it makes: those of Stable Diffusion XL are assumed"
        in notes(model)
    )
    assert "whose latents" not in notes(models.load(tmp_path / "vae.safetensors", family="sdxl"))


@pytest.mark.parametrize(("scale", "note"), [(0.13025, False), (0.9, True)])
def test_a_scale_among_the_tensors(scale: float, note: bool, load: Load) -> None:
    """Latent diffusion's buffer, where the scale was measured at the start of training; or in the
    configuration beside the file."""
    model = load("sdxl", {"scale_factor": torch.tensor(scale).half()}, prefix=("model.", "first_stage"))
    assert model.require("vae").params.scale == pytest.approx(scale, rel=1e-3)
    assert ("as scale_factor says, and not by 0.13025" in notes(model)) == note
    with pytest.raises(
        ValueError, match=r"is the autoencoder of Stable Diffusion 1\.x, as scale_factor says"
    ):
        load("sdxl", {"scale_factor": torch.tensor(0.18215)}, prefix=("model.", "first_stage"))
