"""What a model says of itself, when it is built, saved and loaded: the factor of its times, and the names of
its classes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from diffusion import Condition, RectifiedFlow
from models import Model
from models.families import AUTOENCODERS
from models.families.taesd_keys import PREVIEW

DIT = {
    "name": "dit",
    "in_channels": 1,
    "image_size": 8,
    "hidden": 64,
    "depth": 1,
    "heads": 2,
    "num_classes": 3,
}
UNET = {
    "name": "unet", "in_channels": 1, "out_channels": 1, "channels": 64, "channel_mult": [1], "blocks": 1,
    "attention": [0],
    "middle_attention": 0, "groups": 8, "num_classes": 3,
}  # fmt: skip
FLOW: dict[str, Any] = {"schedule": {"name": "flow"}, "prediction": "flow"}


def similarity(model: Model, low: float, high: float) -> float:
    """Cosine between what the network's time embedding is given at two times."""
    seen: list[Tensor] = []
    network: Any = model.network
    network.time.fc1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    denoiser = model.network_denoiser()
    for t in (low, high):
        denoiser(torch.zeros(1, 1, 8, 8), model.schedule.level(t), Condition(label=torch.tensor([0])))
    return float(torch.cosine_similarity(seen[0], seen[1]))


@pytest.mark.parametrize("network", [DIT, UNET], ids=["dit", "unet"])
@pytest.mark.parametrize(
    ("schedule", "prediction", "times", "factor"),
    [
        ({"name": "flow"}, "flow", (0.1, 0.9), 1000),
        ({"name": "flow", "shift": 3.0}, "v", (0.1, 0.9), 1000),
        ({"name": "cosine_vp"}, "v", (0.1, 0.9), 1000),
        ({"name": "cosine"}, "eps", (100, 900), 1),
        ({"name": "ve"}, "edm", (0.1, 10), 377.5),  # log(sigma) / 4 spans 2.65
        ({"name": "ve"}, "x0", (8, 72), 12.5),
    ],
)
def test_a_network_sees_its_times_apart(
    network: dict[str, Any],
    schedule: dict[str, Any],
    prediction: str,
    times: tuple[float, float],
    factor: float,
) -> None:
    """The factor follows from the schedule where the description leaves it out or null; with 1, a flow's
    cosine would be 0.98."""
    for given in ({}, {"time_factor": None}):
        model = models.build(
            {"network": {**network, **given}, "schedule": schedule, "prediction": prediction}
        )
        assert model.spec["network"]["time_factor"] == factor
        assert similarity(model, *times) < 0.5
    kept = models.build(
        {"network": {**network, "time_factor": 2.5}, "schedule": schedule, "prediction": prediction}
    )
    assert kept.spec["network"]["time_factor"] == 2.5


def test_files_keep_the_factor_they_were_written_with(tmp_path: Path) -> None:
    """A derived one stands in the file."""
    model = models.build({"network": DIT, **FLOW})
    models.save(model, tmp_path / "new.safetensors")
    loaded: Any = models.load(tmp_path / "new.safetensors").network
    assert loaded.time.factor == 1000


def test_an_unpacked_model_has_the_parts_of_its_own() -> None:
    """Not those that are only described, without weights."""
    model = models.miniature("sd1")
    model.text = None
    assert model.unpacked(torch.float32).parts.keys() == {"backbone", "vae", "preview"}


def test_an_autoencoder_is_of_the_kind_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one of Stable Diffusion where none is."""
    monkeypatch.setitem(AUTOENCODERS, "tiny", PREVIEW)
    for name, kind in (({}, models.VAE), ({"name": "kl"}, models.VAE), ({"name": "tiny"}, models.TAESD)):
        spec = {**FLOW, "vae": {**name, "latent_channels": 16}}
        assert type(models.build(spec, device="meta").require("vae")) is kind
    with pytest.raises(ValueError, match="no autoencoder named 'k1'"):
        models.build({**FLOW, "vae": {"name": "k1"}})


def test_classes_are_named_in_files(tmp_path: Path) -> None:
    """Their names come back; as many as the network has, all texts, each once."""
    model = models.build({"network": DIT, **FLOW, "classes": ["cat", "dog", "3"]})
    models.save(model, tmp_path / "model.safetensors")
    assert models.load(tmp_path / "model.safetensors").spec["classes"] == ["cat", "dog", "3"]
    for classes, message in {
        ("cat", "dog"): "classes names 2 classes, and the network has num_classes=3",
        ("cat", "dog", "cat"): "classes holds 'cat' twice",
        ("cat", "dog", 3): "classes must be a list of texts",
    }.items():
        with pytest.raises(ValueError, match=message):
            models.build({"network": DIT, **FLOW, "classes": list(classes)})


def test_a_description_of_another_model_is_refused() -> None:
    """A network of one's own, none at all, other parameters, another schedule or prediction: one line with
    the remedy."""
    model = models.build({"network": DIT, **FLOW})
    model.check_description()
    table = models.build({"network": DIT, "schedule": {"name": "cosine"}, "prediction": "v"})
    for other, message in (
        (
            replace(model, backbone=nn.Conv2d(1, 1, 1)),
            "its network is a Conv2d, its description makes a DiT: make it with models.build",
        ),
        (replace(model, spec={}), "could not be loaded again .*: make it with models.build"),
        (
            replace(model, spec={**model.spec, "network": {**DIT, "depth": 2}}),
            "would load as the model of its",
        ),
        (replace(model, spec={**model.spec, "prediction": "v"}), "would load as the model of its"),
        (replace(model, schedule=table.schedule), "would load as the model of its"),
    ):
        with pytest.raises(ValueError, match=message) as refusal:
            other.check_description()
        assert "\n" not in str(refusal.value)
    replace(model, schedule=RectifiedFlow()).check_description()
