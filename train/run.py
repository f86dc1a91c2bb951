"""A training run from its configuration: what `plain-diffusion train` does, called with a dictionary."""

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
from train.folder import NEEDED, claim, has_checkpoint
from train.logbook import METRICS, Logger, TensorBoard, WandB, read_metrics
from train.loop import Training
from train.objective import DenoisingObjective, Objective
from train.pictures import Pictures
from train.settings import RunSettings
from train.state import require_same, resume_point
from train.weighting import WEIGHTINGS
from train.world import world

# Entries of `model` that only loading takes
LOADING = frozenset({"family", "zero_snr", "variant", "ema", "trust"})


def run(config: Mapping[str, Any], evaluate: Callable[[Model], Mapping[str, float]] | None = None) -> bool:
    """Train as the configuration says (`plain-diffusion train --help`). False if it was interrupted.

    The folder gets config.json, provenance.json, metrics.jsonl, checkpoint.safetensors and the checkpoint
    before that. ValueError or OSError, in one line, before anything is overwritten, also for a folder that
    holds something else or is used by another training.

    model     the description of a fresh model; or with `weights`, files to train further, the options of
              `models.load`. The network is trained in float32; other parts are not touched
    data      {"name": ..., ...}; or the path of captioned images, which the model's own autoencoder and text
              encoder encode as `latents` says. When finished, such a run also writes the whole model in the
              layout and precision of its files (`export`)
    evaluate  called with the averaged model; its numbers are logged
    """
    trust(config)
    settings = _check(config)
    if config.get("evaluate") and evaluate is None:
        raise ValueError("config's evaluate is for the command line: train.run(config, evaluate)")
    config = {**config, "run": str(config["run"])}
    folder, params = Path(config["run"]), settings.train
    if isinstance(config["data"], str | Path) and params.on_error == "skip":
        raise ValueError("train.on_error=skip is not for captioned images: leave it out")
    resume, progress = bool(config.get("resume")), bool(config.get("progress", True))
    begun = has_checkpoint(folder, resume)
    with world(config.get("device")) as where:
        params.micro_batch(where.size)
        model, objective = _make_model_and_objective(config, params.seed, where.device)
        file_dtype = next(model.network.parameters()).dtype
        model.network.float()  # updates would vanish in the rounding of half precision
        data = _make_data(config["data"], settings.latents, model, folder)
        pictures = Pictures(settings.pictures, folder) if settings.pictures.every else None
        training = Training(
            model, objective, data, params, folder, where, evaluate, pictures, resume, progress
        )
        if begun:  # before _check_fit, whose message does not say which setting has changed
            _check_resumable(folder, config, model, training.settings, params.steps)
        _check_fit(model, data)
        training.check()
        if isinstance(data, LatentData):
            check_exportable(model)
        loggers: list[Logger] = [TensorBoard(folder)] if settings.tensorboard else []
        with claim(folder, where):
            where.on_leader(lambda: _write_records(folder, config, resume))
            if isinstance(data, LatentData):
                data.prepare(where, progress)
            if config.get("wandb") and where.leads:
                id = read_json(folder / "provenance.json")["wandb"]
                loggers.append(WandB(folder, config, settings.wandb_project, id))
            finished = training.run(loggers)
            if finished and isinstance(data, LatentData):
                where.on_leader(lambda: export(model, folder, file_dtype))
        return finished


def _check(config: Mapping[str, Any]) -> RunSettings:
    """The settings with their defaults. ValueError for an unknown or missing one, or one of a wrong type."""
    check_names("setting", config, [each.name for each in fields(RunSettings)])
    if missing := [key for key in NEEDED if key not in config]:
        raise ValueError(f"{missing[0]} must be given: {missing[0]}=...")
    plain = {name: value for name, value in config.items() if name != "evaluate"}
    settings = make_params("", RunSettings, {**plain, "run": str(config["run"])})
    model = check_mapping("model", config["model"])
    if not config.get("weights") and model.keys() & LOADING and not model.keys() & {"network", "from"}:
        raise ValueError("weights must be given: weights=FILE names the model to train further")
    if config.get("weights") and "from" in model:
        raise ValueError("weights and model.from both name the model to train further: give one of them")
    return settings


def _make_data(data: Any, latents: LatentParams, model: Model, folder: Path) -> Dataset:
    if isinstance(data, str | Path):
        return LatentData(CaptionedImages(data, latents.max_pixels), model, latents, folder)
    if latents != LatentParams():
        raise ValueError("latents are for a folder of captioned images: give data=FOLDER, or leave them out")
    return make("data set", data, DATASETS)


def _make_model_and_objective(
    config: Mapping[str, Any], seed: int, device: torch.device
) -> tuple[Model, Objective]:
    spec = check_mapping("model", config["model"])
    if config.get("weights"):
        spec = {"from": config["weights"], **spec}
    with torch.random.fork_rng([]):
        torch.manual_seed(mix(seed))  # so that the seed decides the initial weights
        return make("objective", config["objective"], OBJECTIVES, spec, device)


def _build_or_load(spec: Mapping[str, Any]) -> Model:
    """A fresh model from its description, or one from {"from": its files, and options of `models.load`}."""
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
    """Predict the target of a noised sample: weight * |out - target|^2 (Ho et al. 2020, eq. 14)."""
    model = _build_or_load(spec)
    times = make("density", {"name": "usual"} if density is None else density, DENSITIES, model.schedule)
    weights = make("weighting", weighting, WEIGHTINGS)
    return model, DenoisingObjective(
        model.schedule, model.prediction, times, weights, model.null, drop, bound_weight
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
    """Distil a teacher into a student that jumps from any noise level to data (Song et al. 2023, alg. 2)."""
    parts = check_mapping("model", spec)
    check_names("model setting", parts, ("from", "grid", "consistency", "trust"))
    if missing := [part for part in ("from", "consistency") if part not in parts]:
        raise ValueError(f"model.{missing[0]} must be given to distil a model")
    check_type("model.from", parts["from"], Path)
    check_type("model.trust", trusted := parts.get("trust", False), bool)
    teacher_model, student = models.load(teacher, trust=trusted), models.load(parts["from"], trust=trusted)
    teacher_model.network.to(device).requires_grad_(False)
    changes: dict[str, Any] = {
        key: check_mapping(f"model.{key}", parts[key]) for key in ("grid", "consistency") if key in parts
    }
    student = Model(student.network, student.schedule, student.prediction, {**student.spec, **changes})
    student.check()
    levels = time_grid(teacher_model.schedule, **check_call("objective.grid", time_grid, 1, grid))
    denoiser, blend = class_denoiser(teacher_model, guidance, clip), build_blend(changes["consistency"])
    objective = ConsistencyDistillation(denoiser, blend, levels, solver, huber)
    objective.fixed_settings["teacher"] = teacher_model.fingerprint
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
            "; latents are for a folder of captioned images: give data=FOLDER"
            if model.vae is not None
            else ""
        )
        raise ValueError(
            f"the data has {data.shape[0]} channels, the network "
            f"model.network.in_channels={params.in_channels}{remedy}"
        )
    if params.out_channels not in (params.in_channels, 2 * params.in_channels):
        raise ValueError(
            f"model.network.out_channels={params.out_channels} must be {params.in_channels}, as in the data, "
            "or twice that, to learn a variance"
        )
    if params.out_channels != params.in_channels and model.schedule.rows is None:
        raise ValueError("a learned variance needs a schedule with steps, else out_channels=in_channels")
    size = getattr(params, "image_size", None)
    if size is not None and data.shape[1:] != (size, size):
        raise ValueError(f"the data is {data.shape[1]}x{data.shape[2]}, model.network.image_size={size}")
    if model.num_classes != data.num_classes:
        raise ValueError(
            f"the data has num_classes={data.num_classes}, the network "
            f"model.network.num_classes={model.num_classes}"
        )


def _check_resumable(
    folder: Path, config: Mapping[str, Any], model: Model, settings: Mapping[str, Any], steps: int
) -> None:
    """ValueError unless the model, settings, objective and data are those of the saved run."""
    resume_point(folder, model, settings, steps)
    saved, _ = _read_records(folder)
    if not saved:
        return
    require_same(folder, saved.get("objective"), config["objective"], "objective")
    if not isinstance(
        config["data"], str | Path
    ):  # captioned images: the checkpoint's settings have the list
        free = {"folder": None, "max_pixels": None}  # pictures may move, and their limit of pixels may rise
        before, now = (
            {**data, **free} if isinstance(data, Mapping) else data
            for data in (saved["data"], config["data"])
        )
        require_same(folder, before, now, "data")


def _write_records(folder: Path, config: Mapping[str, Any], resume: bool) -> None:
    """Write config.json, and provenance.json: the versions at the start of the run and at every resume."""
    begun = has_checkpoint(folder, resume)  # another run may have begun and ended here in the meantime
    now: dict[str, Any] = dict(provenance())
    if begun and (first := _read_records(folder)[1]):
        now = {**first, "resumed": [*first.get("resumed", []), now]}
    if config.get("wandb"):
        now.setdefault("wandb", secrets.token_hex(4))
    write_json(folder / "config.json", config)
    write_json(folder / "provenance.json", now)


def _read_records(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json and provenance.json, {} if missing. ValueError if they or metrics.jsonl are damaged."""
    files = folder / "config.json", folder / "provenance.json"
    try:
        config, record = (read_json(file) if file.exists() else {} for file in files)
        if config and not isinstance(config.get("data"), str | Mapping):
            raise ValueError(f"{files[0]} is damaged: its data is {brief(config.get('data'))}")
        if not isinstance(record.get("resumed", []), list):
            raise ValueError(f"{files[1]} is damaged: its resumed is {brief(record['resumed'])}, not a list")
        read_metrics(folder / METRICS)
    except ValueError as error:
        raise ValueError(f"{error}; the run can go on without this file: move it elsewhere") from None
    return config, record
