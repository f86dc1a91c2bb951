"""Writes into a model's description what it is trained on, and warns of settings that have no effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusion.messages import warn
from models import Model
from train.data import Dataset
from train.density import Density


def describe(model: Model, objective: Any, data: Dataset) -> None:
    """Write into the description what a model is trained on: shape of the samples, names of classes, share of
    samples without a label."""
    model.spec["shape"] = list(data.shape)
    classes: Sequence[str] = getattr(data, "classes", ())
    if model.null:
        if classes:
            before = model.spec.get("classes", list(classes))
            if before != list(classes):
                warn(
                    f"the model's classes were {', '.join(before)}; from now on they are {', '.join(classes)}"
                )
            model.spec["classes"] = list(classes)
        if hasattr(objective, "drop"):
            model.spec["drop"] = objective.drop


def warn_of_idle_settings(params: Any, objective: Any, evaluates: bool) -> None:
    """Warn of settings that have no effect, or not the usual one, in this run."""
    for problem in _find_idle_settings(params, objective, evaluates):
        warn(problem)


def _find_idle_settings(params: Any, objective: Any, evaluates: bool) -> list[str]:
    found = []
    if params.warmup >= params.steps and params.warmup > 1:
        reached = params.learning_rate_at(params.steps - 1) / params.learning_rate
        found.append(
            f"train.warmup={params.warmup} is as long as the run of {params.steps} steps, or longer: "
            f"the learning rate only rises, to {reached:.0%} of train.learning_rate"
        )
    if evaluates and not params.evaluate_every:
        found.append(
            "evaluate is given, but train.evaluate_every=0 means never: give train.evaluate_every=1000, for "
            "example"
        )
    density = getattr(objective, "density", None)
    if isinstance(density, Density) and (gaps := density.gaps()):
        found.append(gaps)
    return found
