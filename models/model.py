"""A model: a network with the schedule and the prediction it was trained for, and the description they are built from."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diffusion import PREDICTIONS, ConsistencyFunction, Denoiser, Prediction, Schedule, VarianceExploding, build_blend, build_schedule
from models.dit import DiT, DiTParams
from models.unet import UNet, UNetParams


@dataclass(frozen=True)
class Report:
    """Every key of the files that were loaded: taken into the network, or left out with the reason known."""

    consumed: tuple[str, ...]
    ignored: tuple[str, ...] = ()


NETWORKS: dict[str, tuple[type[nn.Module], type[Any]]] = {"unet": (UNet, UNetParams), "dit": (DiT, DiTParams)}


@dataclass
class Model:
    """What `build` makes and `load` returns.

    report  what loading took from the files and what it left, None for a fresh model
    spec    its whole description in plain values: {"network": {"name": ..., ...}, "schedule": {"name": ..., ...},
            "prediction": ...}, and "consistency": {...} for a distilled model; goes into every file that is saved
    """

    backbone: nn.Module
    schedule: Schedule
    prediction: Prediction
    spec: dict[str, Any] = field(default_factory=dict)
    report: Report | None = None

    def network_denoiser(self, network: nn.Module | None = None) -> Denoiser:
        """The plain denoiser of the backbone, or of another network in its place (one wrapped for parallel training)."""
        network = network or self.backbone
        if self.prediction.name == "edm" and isinstance(self.schedule, VarianceExploding):
            return Denoiser.edm(network, self.schedule)
        return Denoiser(network, self.schedule, self.prediction)

    def denoiser(self) -> Denoiser | ConsistencyFunction:
        """The model as solvers take it; for a distilled model its consistency function."""
        plain = self.network_denoiser()
        return ConsistencyFunction(plain, build_blend(self.spec["consistency"])) if "consistency" in self.spec else plain

    @property
    def null(self) -> dict[str, Any]:
        """What stands for "no condition", per condition the network takes that has such a value: for guidance."""
        classes = getattr(getattr(self.backbone, "params", None), "num_classes", None)
        return {} if classes is None else {"label": classes}


def build(spec: Mapping[str, Any]) -> Model:
    """A model with fresh weights from its description. Unknown names raise and name the nearest known one."""
    spec = {key: dict(value) if isinstance(value, Mapping) else value for key, value in spec.items()}
    parts = ["network", "schedule", "prediction"]
    _known("model part", spec, [*parts, "consistency"])
    if missing := [part for part in parts if part not in spec]:
        raise ValueError(f"the model's description lacks {missing[0]!r}")
    _known("prediction", [spec["prediction"]], PREDICTIONS)
    return Model(build_network(spec["network"]), build_schedule(spec["schedule"]), PREDICTIONS[spec["prediction"]], spec)


def build_network(spec: Mapping[str, Any]) -> nn.Module:
    """A network from {"name": "unet" or "dit", **parameters}; what is left out has the parameter class's default."""
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()}
    name = options.pop("name", None)
    _known("network", [name], NETWORKS)
    network, params = NETWORKS[name]
    _known(f"{name} parameter", options, [f.name for f in dataclasses.fields(params)])
    return network(params(**options))


def _known(what: str, given: Any, known: Any) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), list(known), n=1)
            raise ValueError(f"no {what} named {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"))
