"""A training run from its description: what `python -m train` does, callable with a plain dictionary."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import models
from diffusion import build_blend, time_grid
from diffusion.noise import mix
from diffusion.spec import check_names, lookup, make, make_params
from models import Model
from models.checkpoints import native
from models.files import read_json, write_json
from samplers.provenance import provenance
from samplers.run import steered
from train.consistency import ConsistencyDistillation
from train.data import DATASETS, Dataset
from train.density import DENSITIES
from train.logbook import Logger, WandB
from train.loop import TrainParams, train
from train.objective import DenoisingObjective, Objective
from train.state import require_same, resume_point
from train.weighting import WEIGHTINGS
from train.world import World, world

KEYS = ("run", "data", "model", "objective", "train", "resume", "device", "progress", "evaluate", "wandb", "wandb_project")


def run(config: Mapping[str, Any], evaluate: Callable[[Model], Mapping[str, float]] | None = None) -> bool:
    """Train what the configuration describes (see configs/train) into its folder. True when finished, False when interrupted.

    The folder gets config.json, provenance.json, metrics.jsonl and checkpoint.safetensors. Raises ValueError or OSError,
    in one line, before anything is overwritten.
    """
    check_names("setting", config, KEYS)
    folder, params = Path(config["run"]), make_params("train", TrainParams, config["train"])
    data = make("data set", config["data"], DATASETS)
    model, objective = _model_and_objective(config, params.seed)
    _check_fit(model, data)
    model.spec["shape"] = list(data.shape)
    resume = bool(config.get("resume", False))
    if (folder / native.FILE_NAME).exists():
        if not resume:
            raise ValueError(f"{folder} already holds a trained run: resume=true goes on with it, run=... starts another")
        _check_resumable(folder, config, model, params, data)
    with world(config.get("device")) as where:
        if where.leads:
            _prepare(folder, config)
        return train(
            model,
            objective,
            data,
            params,
            folder,
            world=where,
            loggers=_loggers(folder, config, where),
            evaluate=evaluate,
            resume=resume,
            progress=bool(config.get("progress", True)),
        )


def _model_and_objective(config: Mapping[str, Any], seed: int) -> tuple[Model, Objective]:
    settings = dict(config["objective"])
    kind = lookup("objective", settings.pop("name", None), OBJECTIVES)
    with torch.random.fork_rng():
        torch.manual_seed(mix(seed))  # the weights a run starts from are its seed's
        return kind(config["model"], settings)


def _denoising(spec: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Model, Objective]:
    check_names("objective setting", settings, ("density", "weighting", "drop", "bound_weight"))
    model = models.build(spec)
    density = make("density", settings["density"], DENSITIES, model.schedule)
    weighting = make("weighting", settings["weighting"], WEIGHTINGS)
    rest = {key: settings[key] for key in ("drop", "bound_weight") if key in settings}
    return model, DenoisingObjective(model.schedule, model.prediction, density, weighting, model.null, **rest)


def _consistency(spec: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Model, Objective]:
    check_names("model setting", spec, ("from", "grid", "consistency"))
    check_names("objective setting", settings, ("teacher", "grid", "solver", "guidance", "clip", "huber"))
    teacher = models.load(settings["teacher"])
    teacher.backbone.requires_grad_(False).eval()
    student = models.load(spec["from"])
    own = {key: dict(spec[key]) for key in ("grid", "consistency") if key in spec}
    student = Model(copy.deepcopy(student.backbone), student.schedule, student.prediction, {**student.spec, **own})
    grid = time_grid(teacher.schedule, **settings["grid"])
    shown = steered(teacher, settings.get("guidance", 1.0), settings.get("clip", False))
    rest = {key: settings[key] for key in ("solver", "huber") if key in settings}
    return student, ConsistencyDistillation(shown, build_blend(spec["consistency"]), grid, **rest)


OBJECTIVES: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[Model, Objective]]] = {
    "denoising": _denoising,
    "consistency": _consistency,
}


def _check_fit(model: Model, data: Dataset) -> None:
    """Raise where the network and the data cannot belong together, before the first step finds out."""
    params: Any = model.backbone.params
    if params.in_channels != data.shape[0]:
        raise ValueError(f"the data has {data.shape[0]} channels, the network model.network.in_channels={params.in_channels}")
    size = getattr(params, "image_size", None)
    if size is not None and data.shape[1:] != (size, size):
        raise ValueError(f"the data is {data.shape[1]}x{data.shape[2]}, the network model.network.image_size={size}")
    if params.num_classes != data.num_classes:
        raise ValueError(f"the data has num_classes={data.num_classes}, the network model.network.num_classes={params.num_classes}")


def _check_resumable(folder: Path, config: Mapping[str, Any], model: Model, params: TrainParams, data: Dataset) -> None:
    """Refuse what cannot go on before config.json is rewritten: the checkpoint knows its model and training, config.json its objective."""
    resume_point(folder, model.spec, params.kept(data), params.steps)
    if (before := folder / "config.json").exists():
        require_same(folder, read_json(before).get("objective"), config["objective"], "objective")


def _prepare(folder: Path, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write to the run folder {folder}")
    for name, content in (("config.json", config), ("provenance.json", provenance())):
        write_json(folder / name, content)


def _loggers(folder: Path, config: Mapping[str, Any], where: World) -> list[Logger]:
    wanted = config.get("wandb") and where.leads
    return [WandB(folder, config, config.get("wandb_project", "plain-diffusion"))] if wanted else []
