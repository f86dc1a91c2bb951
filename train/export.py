"""A finished fine-tuning as a published model, in the layout and precision of the files it started from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import models
from models import VAE, Model
from models.families.family import to_plain
from models.layouts.single_file import tokenizer_files

FILE_NAME, FOLDER_NAME = "model.safetensors", "model"  # in a run's folder


def export(model: Model, folder: Path, dtype: torch.dtype) -> Path:
    """Write all parts of a model into a run's folder, its backbone in that dtype; the path.

    This is model.safetensors, or for the layout of diffusers the folder model/ (`_layout`).
    """
    layout = _layout(model)
    path = folder / (FOLDER_NAME if layout == "diffusers" else FILE_NAME)
    model.network.to("cpu", dtype)
    models.save(model, path, layout=layout)
    return path


def find_export(folder: Path) -> Path | None:
    """What `export` wrote into a run's folder, if it did."""
    paths = [folder / name for name in (FILE_NAME, FOLDER_NAME)]
    return next((path for path in paths if path.exists()), None)


def check_exportable(model: Model) -> None:
    """ValueError if the layout of a model's files cannot express what it is, such as its prediction.

    Call it before training: it takes a second, since it saves a miniature of the same description.
    """
    layout = _layout(model)
    if layout == "native":  # can express everything
        return
    small, params = models.miniature(model.spec["family"]), model.require("vae").params
    latents = {name: getattr(params, name) for name in ("scale", "shift", "mean", "std")}
    vae = VAE(replace(small.require("vae").params, **latents))
    own = {name: model.spec[name] for name in ("schedule", "prediction", "grid")}
    spec = {**small.spec, "vae": to_plain(vae.params), **own}
    small = Model(small.backbone, model.schedule, model.prediction, spec, vae=vae, text=small.text)
    with TemporaryDirectory() as folder:
        try:
            models.save(small, Path(folder) / FILE_NAME, layout)
        except ValueError as error:
            raise ValueError(
                f"once trained, this model could not be saved as its weights came ({error}): train a copy "
                f"in our own layout, models.save(models.load(..., prediction={model.prediction.name!r}), "
                "'copy.safetensors'), with nothing but its name"
            ) from None


def load_options(trained: Model, path: Path) -> dict[str, str]:
    """The `family` or `prediction` that `models.load` needs to load an export as the trained model."""
    options: dict[str, Any] = {}
    for name in ("family", "prediction"):
        wanted = trained.spec.get(name)
        if wanted and models.load(path, **options).spec.get(name) != wanted:
            options[name] = wanted
    return options


def _layout(model: Model) -> Any:
    """That of the model's files. Separate files become one, or a folder if they include T5's tokenizer."""
    layout = model.report.layout if model.report else "native"
    if layout in ("ldm", "separate"):
        return "diffusers" if tokenizer_files(model) else "ldm"
    return layout
