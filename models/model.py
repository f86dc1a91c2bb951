"""A model: a network with the schedule and the prediction it was trained for, and the description they are built from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import (
    PREDICTIONS,
    ConsistencyFunction,
    Denoiser,
    Grid,
    Prediction,
    Schedule,
    VarianceExploding,
    build_blend,
    build_schedule,
    time_grid,
)
from diffusion.spec import check_call, check_mapping, check_names, check_type, lookup, make_params
from models.dit import DiT, DiTParams
from models.unet import UNet, UNetParams


@dataclass(frozen=True)
class Report:
    """Every key of the files that were loaded: taken into the network, or left out because only training, or the raw weights, need it.

    There is no third kind: a key that is unknown, and one that is missing, raise instead.
    """

    consumed: tuple[str, ...]
    ignored: tuple[str, ...] = ()


NETWORKS: dict[str, tuple[type[nn.Module], type[Any]]] = {"unet": (UNet, UNetParams), "dit": (DiT, DiTParams)}


@dataclass
class Model:
    """What `build` makes and `load` returns.

    report  what loading took from the files and what it left, None for a fresh model
    spec    its whole description in plain values: {"network": {"name": ..., ...}, "schedule": {"name": ..., ...},
            "prediction": ...}, "shape": [C, H, W] of the samples it was trained on, "grid": {...} it is best sampled on,
            and "consistency": {...} for a distilled model; goes into every file that is saved
    """

    backbone: nn.Module
    schedule: Schedule
    prediction: Prediction
    spec: dict[str, Any] = field(default_factory=dict)
    report: Report | None = None

    def network_denoiser(self, network: Callable[..., Tensor] | None = None) -> Denoiser:
        """The plain denoiser of the backbone, or of another network in its place (one wrapped for parallel training)."""
        network = network or self.backbone
        if self.prediction.name == "edm":
            if not isinstance(self.schedule, VarianceExploding):
                raise ValueError("prediction 'edm' scales the input as EDM does, which needs schedule 've': choose it, or 'v'")
            return Denoiser.edm(network, self.schedule)
        return Denoiser(network, self.schedule, self.prediction)

    def denoiser(self) -> Denoiser | ConsistencyFunction:
        """The model as solvers take it; for a distilled model its consistency function."""
        plain = self.network_denoiser()
        return ConsistencyFunction(plain, build_blend(self.spec["consistency"])) if self.distilled else plain

    @property
    def distilled(self) -> bool:
        """Whether the denoiser is a consistency function, which one or two steps of the `consistency` sampler suffice for."""
        return "consistency" in self.spec

    def grid(self, steps: int | None, /, **settings: Any) -> Grid:
        """The time grid to sample this model on: its own, which is part of its description, or what the settings of `time_grid` say."""
        settings = settings or check_mapping("grid", self.spec.get("grid", {}))
        return time_grid(self.schedule, steps, **check_call("the grid", time_grid, 2, settings))

    def check(self) -> None:
        """ValueError where the description of denoiser or grid is wrong: now, and not when the model is first used."""
        spacing = check_mapping("grid", self.spec.get("grid", {})).get("spacing", "")
        self.denoiser(), self.grid(1 if isinstance(spacing, str) else None)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights: the same for every copy of them, wherever it lies."""
        digest = hashlib.sha256()
        for name, value in sorted(self.backbone.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the samples it was trained on. ValueError where that is not known."""
        if "shape" not in self.spec:
            raise ValueError("this model does not say what size of sample it was trained on: give a shape")
        channels, height, width = self.spec["shape"]
        return channels, height, width

    @property
    def null(self) -> dict[str, Any]:
        """What stands for "no condition", per condition the network takes that has such a value: for guidance."""
        classes = getattr(getattr(self.backbone, "params", None), "num_classes", None)
        return {} if classes is None else {"label": classes}


def build(spec: Mapping[str, Any], device: torch.device | str | None = None) -> Model:
    """A model with fresh weights from its description. Unknown names raise and name the nearest known one.

    device  where the network is made, default torch's own; "meta" makes it without weights, for those of a file
    """
    spec = {key: dict(value) if isinstance(value, Mapping) else value for key, value in check_mapping("a model", spec).items()}
    parts = ["network", "schedule", "prediction"]
    check_names("model part", spec, [*parts, "shape", "grid", "consistency"])
    if missing := [part for part in parts if part not in spec]:
        raise ValueError(f"the model's description lacks {missing[0]!r}")
    prediction = lookup("prediction", spec["prediction"], PREDICTIONS)
    if "shape" in spec:
        check_type("shape", spec["shape"], tuple[int, int, int])
    with torch.device(device or torch.get_default_device()):
        network = build_network(spec["network"])
    model = Model(network, build_schedule(spec["schedule"]), prediction, spec)
    model.check()
    return model


def build_network(spec: Mapping[str, Any]) -> nn.Module:
    """A network from {"name": "unet" or "dit", **parameters}; what is left out has the parameter class's default."""
    values = check_mapping("network", spec)
    name = values.pop("name", None)
    network, params = lookup("network", name, NETWORKS)
    return network(make_params(str(name), params, values))
