"""Writes into a model's description what it is trained on, and warns of settings that have no effect."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusion.messages import warn
from models import Model
from train.data import Dataset
from train.density import Density


def describe(model: Model, objective: Any, data: Dataset) -> None:
    """Add shape of the samples, names of classes, and share of samples without a label."""
    model.spec["shape"] = list(data.shape)
    if not model.null:
        return
    if classes := list(getattr(data, "classes", ())):
        before = model.spec.get("classes", classes)
        if before != classes:
            warn(f"the model's classes were {', '.join(before)}; from now on they are {', '.join(classes)}")
        model.spec["classes"] = classes
    if hasattr(objective, "drop"):
        model.spec["drop"] = objective.drop


def warn_of_idle_settings(params: Any, objective: Any, evaluates: bool) -> None:
    """Warn of settings that have no effect, or not the usual one, in this run."""
    for problem in _find_idle_settings(params, objective, evaluates):
        warn(problem)


def _find_idle_settings(params: Any, objective: Any, evaluates: bool) -> Iterator[str]:
    if params.warmup >= params.steps and params.warmup > 1:
        reached = params.learning_rate_at(params.steps - 1) / params.learning_rate
        yield (
            f"train.warmup={params.warmup} is as long as the run of {params.steps} steps, or longer: "
            f"the learning rate only rises, to {reached:.0%} of train.learning_rate"
        )
    if evaluates and not params.evaluate_every:
        yield "evaluate is given, but train.evaluate_every=0 means never: try train.evaluate_every=1000"
    density = getattr(objective, "density", None)
    if isinstance(density, Density) and (gaps := density.gaps()):
        yield gaps
