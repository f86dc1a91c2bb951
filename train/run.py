"""A training run from its description: what `python -m train` does, callable with a plain dictionary."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch

import models
from diffusion import build_blend, time_grid
from diffusion.messages import brief
from diffusion.noise import mix
from diffusion.outside import trust
from diffusion.spec import check_call, check_mapping, check_names, check_type, make, make_params
from models import Model
from models.files.text import read_json, write_json
from samplers.guide import class_denoiser
from samplers.provenance import provenance
from train.consistency import ConsistencyDistillation
from train.data import DATASETS, Dataset
from train.data.latents import LatentData, LatentParams
from train.data.pictures import CaptionedImages
from train.density import DENSITIES
from train.export import check_exportable, export
from train.folder import NEEDED, claimed, is_begun
from train.logbook import METRICS, Logger, WandB, read_lines
from train.loop import Training
from train.objective import DenoisingObjective, Objective
from train.pictures import Pictures
from train.settings import RunSettings
from train.state import require_same, resume_point
from train.weighting import WEIGHTINGS
from train.world import World, world

LOADING = frozenset(
    {"family", "zero_snr", "variant", "ema", "trust"}
)  # of `model`, what only a loaded one is told


def run(config: Mapping[str, Any], evaluate: Callable[[Model], Mapping[str, float]] | None = None) -> bool:
    """Train what the configuration describes (`plain-diffusion train --help`) into its folder. True when
    finished, False when interrupted.

    evaluate  called with the averaged model; its numbers are logged. A configuration describes it as
              `evaluate`
    The folder gets config.json, provenance.json, metrics.jsonl, checkpoint.safetensors and the checkpoint
    before that. ValueError or OSError, in one line, before anything is overwritten: also for a folder that
    holds something else, or where another training is at work.

    model, weights  the description of a fresh model; or files to train further, as `models.load` takes them,
                    and what it is told
           besides. The network is trained in float32 whatever the precision of its files; other parts are not
           touched.
    data   {"name": ..., ...}, or the path of a folder of images with captions, which the model's own
           autoencoder and text encoder translate as `latents` says. When such a run is finished, its folder
           also gets the whole model as a file of the layout and precision that it came in: see `export`.
    """
    trust(config)
    own = _check(config)
    if config.get("evaluate") and evaluate is None:
        raise ValueError(
            "evaluate is for the command line: from Python give what it makes, as train.run(config, evaluate)"
        )
    config = {**config, "run": str(config["run"])}
    folder, params = Path(config["run"]), own.train
    if isinstance(config["data"], str | Path) and params.on_error == "skip":
        raise ValueError(
            "train.on_error=skip is for pictures that are read step by step, and captioned ones are all "
            "read before: leave it out"
        )
    resume, progress = bool(config.get("resume")), bool(config.get("progress", True))
    begun = is_begun(folder, resume)
    with world(config.get("device")) as where:
        params.micro_batch(where.size)
        model, objective = _model_and_objective(config, params.seed, where.device)
        stored_as = next(model.network.parameters()).dtype
        model.network.float()  # updates would vanish in the rounding of half precision
        data = _data(config["data"], own.latents, model, folder)
        pictures = Pictures(own.pictures, folder) if own.pictures.every else None
        training = Training(
            model, objective, data, params, folder, where, evaluate, pictures, resume, progress
        )
        if begun:  # before whether they fit, which does not say what has changed
            _check_resumable(folder, config, model, training.settings, params.steps)
        _check_fit(model, data)
        training.check()
        if isinstance(data, LatentData):
            check_exportable(model)
        with claimed(folder, where):
            where.lead(lambda: _prepare(folder, config, resume))
            if isinstance(data, LatentData):
                data.prepare(where, progress)
            finished = training.run(_loggers(folder, config, where))
            if finished and isinstance(data, LatentData):
                where.lead(lambda: export(model, folder, stored_as))
        return finished


def _check(config: Mapping[str, Any]) -> RunSettings:
    """The settings with their defaults. ValueError for one that is unknown, missing or of the wrong kind."""
    check_names("setting", config, [each.name for each in fields(RunSettings)])
    if missing := [key for key in NEEDED if key not in config]:
        raise ValueError(f"{missing[0]} must be given: {missing[0]}=...")
    plain = {name: value for name, value in config.items() if name != "evaluate"}
    own = make_params("", RunSettings, {**plain, "run": str(config["run"])})
    model = check_mapping("model", config["model"])
    if not config.get("weights") and model.keys() & LOADING and not model.keys() & {"network", "from"}:
        raise ValueError("weights must be given: weights=FILE, the model to train further")
    if config.get("weights") and "from" in model:
        raise ValueError("weights and model.from both say what to train further: give one of them")
    return own


def _data(described: Any, latents: LatentParams, model: Model, folder: Path) -> Dataset:
    if not isinstance(described, str | Path):
        if latents != LatentParams():
            raise ValueError(
                "latents are made of a folder of images with captions: give data=FOLDER, or leave them out"
            )
        return make("data set", described, DATASETS)
    return LatentData(CaptionedImages(described, latents.max_pixels), model, latents, folder)


def _model_and_objective(
    config: Mapping[str, Any], seed: int, device: torch.device
) -> tuple[Model, Objective]:
    with torch.random.fork_rng([]):
        torch.manual_seed(mix(seed))  # so that the seed decides the initial weights
        start = {"from": config["weights"]} if config.get("weights") else {}
        return make(
            "objective",
            config["objective"],
            OBJECTIVES,
            {**start, **check_mapping("model", config["model"])},
            device,
        )


def _build_or_load(spec: Mapping[str, Any]) -> Model:
    """A fresh model from its description, or a loaded one from {"from": file, folder or a list of them, and
    `load`'s settings}."""
    parts = check_mapping("model", spec)
    if "from" not in parts:
        return models.build(parts)
    check_names("model setting", parts, ("from", "prediction", *sorted(LOADING)))
    check_type("model.from", parts["from"], Path | list[Path])
    for name in ("family", "prediction", "variant"):
        check_type(f"model.{name}", parts.get(name), str | None)
    check_type("model.zero_snr", parts.get("zero_snr"), bool | None)
    for name in ("ema", "trust"):
        check_type(f"model.{name}", parts.get(name, False), bool)
    paths = parts.pop("from")
    model = models.load(*(paths if isinstance(paths, list) else [paths]), **parts)
    model.check_finite()
    return model


def _denoising(
    spec: Mapping[str, Any],
    device: torch.device,
    weighting: dict[str, Any],
    density: dict[str, Any] | None = None,
    drop: float = 0.1,
    bound_weight: float = 0.001,
) -> tuple[Model, Objective]:
    """Predict what the model's prediction says of a noised sample: weight * |out - target|^2 (Ho et al. 2020,
    eq. 14)."""
    model = _build_or_load(spec)
    time_density = make(
        "density", {"name": "usual"} if density is None else density, DENSITIES, model.schedule
    )
    loss_weighting = make("weighting", weighting, WEIGHTINGS)
    return model, DenoisingObjective(
        model.schedule, model.prediction, time_density, loss_weighting, model.null, drop, bound_weight
    )


def _consistency(
    spec: Mapping[str, Any],
    device: torch.device,
    teacher: str,
    grid: dict[str, Any],
    solver: Literal["ddim", "heun"] = "heun",
    guidance: float = 1.0,
    clip: bool = False,
    huber: float | None = 0.03,
) -> tuple[Model, Objective]:
    """Distil a teacher into a student that maps every point of a trajectory to the same data (Song et al.
    2023, alg. 2)."""
    parts = check_mapping("model", spec)
    check_names("model setting", parts, ("from", "grid", "consistency", "trust"))
    if missing := [part for part in ("from", "consistency") if part not in parts]:
        raise ValueError(f"model.{missing[0]} must be given to distil a model")
    check_type("model.from", parts["from"], Path)
    check_type("model.trust", trusted := parts.get("trust", False), bool)
    teacher_model, student = models.load(teacher, trust=trusted), models.load(parts["from"], trust=trusted)
    teacher_model.network.to(device).requires_grad_(False)
    own: dict[str, Any] = {
        key: check_mapping(f"model.{key}", parts[key]) for key in ("grid", "consistency") if key in parts
    }
    student = Model(student.network, student.schedule, student.prediction, {**student.spec, **own})
    student.check()
    levels = time_grid(teacher_model.schedule, **check_call("objective.grid", time_grid, 1, grid))
    objective = ConsistencyDistillation(
        class_denoiser(teacher_model, guidance, clip), build_blend(own["consistency"]), levels, solver, huber
    )
    objective.kept["teacher"] = teacher_model.fingerprint
    return student, objective


OBJECTIVES: dict[str, Callable[..., tuple[Model, Objective]]] = {
    "denoising": _denoising,
    "consistency": _consistency,
}


def _check_fit(model: Model, data: Dataset) -> None:
    """ValueError where the network does not fit the data, before the first step."""
    params: Any = model.network.params
    if params.in_channels != data.shape[0]:
        remedy = (
            "; latents are made of a folder of images with captions: give data=FOLDER"
            if model.vae is not None
            else ""
        )
        raise ValueError(
            f"the data has {data.shape[0]} channels, the network "
            f"model.network.in_channels={params.in_channels}{remedy}"
        )
    size = getattr(params, "image_size", None)
    if params.out_channels not in (params.in_channels, 2 * params.in_channels):
        raise ValueError(
            f"model.network.out_channels={params.out_channels} must be {params.in_channels} as in the data, "
            "or twice it for a variance"
        )
    if params.out_channels != params.in_channels and model.schedule.rows is None:
        raise ValueError(
            "a learned variance is trained on the steps of a table: choose a schedule with steps, or "
            "out_channels=in_channels"
        )
    if size is not None and data.shape[1:] != (size, size):
        raise ValueError(
            f"the data is {data.shape[1]}x{data.shape[2]}, the network model.network.image_size={size}"
        )
    if model.num_classes != data.num_classes:
        raise ValueError(
            f"the data has num_classes={data.num_classes}, the network "
            f"model.network.num_classes={model.num_classes}"
        )


def _check_resumable(
    folder: Path, config: Mapping[str, Any], model: Model, settings: Mapping[str, Any], steps: int
) -> None:
    """ValueError for a run that differs from the saved one: in the checkpoint's model and training, or
    config.json's objective and data."""
    resume_point(folder, model, settings, steps)
    saved, _ = _records(folder)
    if saved:
        require_same(folder, saved.get("objective"), config["objective"], "objective")
        if not isinstance(
            config["data"], str | Path
        ):  # for captioned images the checkpoint's settings hold the list
            moved = {
                "folder": None,
                "max_pixels": None,
            }  # pictures may be moved, and the limit of their pixels raised
            data_was, data_now = (
                {**data, **moved} if isinstance(data, Mapping) else data
                for data in (saved["data"], config["data"])
            )
            require_same(folder, data_was, data_now, "data")


def _prepare(folder: Path, config: Mapping[str, Any], resume: bool) -> None:
    """Write config.json and provenance.json, which records the versions at the beginning of the run and at
    every resume."""
    begun = is_begun(folder, resume)  # another run may have begun and ended here in the meantime
    now: dict[str, Any] = dict(provenance())
    if begun and (first := _records(folder)[1]):
        now = {**first, "resumed": [*first.get("resumed", []), now]}
    if config.get("wandb"):
        now.setdefault("wandb", secrets.token_hex(4))
    write_json(folder / "config.json", config)
    write_json(folder / "provenance.json", now)


def _records(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json and provenance.json hold, {} where they are missing. ValueError where one, or
    metrics.jsonl, is damaged."""
    files = folder / "config.json", folder / "provenance.json"
    try:
        config, record = (read_json(file) if file.exists() else {} for file in files)
        if config and not isinstance(config.get("data"), str | Mapping):
            raise ValueError(f"{files[0]} is damaged: its data is {brief(config.get('data'))}")
        if not isinstance(record.get("resumed", []), list):
            raise ValueError(f"{files[1]} is damaged: its resumed is {brief(record['resumed'])}, not a list")
        read_lines(folder / METRICS)
    except ValueError as error:
        raise ValueError(f"{error}; the run can go on without this file: move it elsewhere") from None
    return config, record


def _loggers(folder: Path, config: Mapping[str, Any], where: World) -> list[Logger]:
    if not (config.get("wandb") and where.leads):
        return []
    run = read_json(folder / "provenance.json")["wandb"]
    return [WandB(folder, config, config.get("wandb_project", "plain-diffusion"), run)]
