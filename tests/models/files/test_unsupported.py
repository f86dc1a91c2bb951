"""What a layout cannot hold, and dtypes that nothing computes in, are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models import Model
from tests.models.files.tiny import Load, tiny


def changed(family: str, **spec: Any) -> Model:
    """A fresh miniature with parts of its description changed."""
    own = tiny(family).spec
    return models.build(
        {
            **own,
            **{
                key: {**own[key], **value} if isinstance(value, dict) else value
                for key, value in spec.items()
            },
        }
    )


@pytest.mark.parametrize(
    ("layout", "spec", "message"),
    [
        (
            "ldm",
            {"network": {"groups": 16}},
            r"UNet with groups=16, readers would assume 32: use layout='native'",
        ),
        (
            "ldm",
            {"network": {"heads": 4}},
            r"UNet with heads=\[4, 4\], readers would assume \[8, 8\]",
        ),
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
        ("diffusers", {"network": {"num_classes": 10}}, "cannot express a UNet with"),
        ("diffusers", {"network": {"time_factor": 1000.0}}, "UNet with time_factor=1000.0"),
        (
            "diffusers",
            {"network": {"middle_attention": 0}},
            "diffusers' middle attends as the coarsest level does",
        ),
        ("diffusers", {"schedule": {"shift": 2.0}}, "diffusers has no scheduler for .*'shift': 2.0"),
    ],
)
def test_what_a_layout_cannot_say_is_refused(
    layout: str, spec: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Rather than written, and read back as another model; our own layout holds it."""
    model = changed("sd1", **spec)
    with pytest.raises(ValueError, match=message) as refusal:
        models.save(model, tmp_path / "a.safetensors", layout)  # type: ignore[arg-type]  # one of LAYOUTS
    assert "\n" not in str(refusal.value)
    models.save(model, tmp_path / "b.safetensors")
    assert models.load(tmp_path / "b.safetensors").spec == json.loads(json.dumps(model.spec))


def test_networks_of_no_published_kind_are_refused(tmp_path: Path) -> None:
    """One that is told classes and no text, and a transformer."""
    unet = {
        "name": "unet",
        "channels": 32,
        "channel_mult": [1],
        "blocks": 1,
        "attention": [0],
        "middle_attention": 0,
        "num_classes": 10,
    }
    dit = {"name": "dit", "in_channels": 4, "image_size": 8, "hidden": 16, "depth": 1, "heads": 2}
    for network, kind in ((unet, "UNet"), (dit, "DiT")):
        model = models.build({"network": network, "schedule": {"name": "scaled_linear"}, "prediction": "eps"})
        for layout in ("ldm", "diffusers"):
            with pytest.raises(
                ValueError,
                match=f"the layout '{layout}' is for networks that take text, which this {kind} does not",
            ):
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
