"""A finished fine-tuning as a published model: in the layout and the precision that its weights came in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import models
from models import VAE, Model
from models.families.family import to_plain
from models.layouts.single_file import tokenizers_beside

FILE_NAME, FOLDER_NAME = "model.safetensors", "model"


def export(model: Model, folder: Path, dtype: torch.dtype) -> Path:
    """Write all parts of a model into a run's folder, its backbone in that dtype; where to.

    model.safetensors, or for the layout of diffusers the folder model/; the layout is that of the files it
    was loaded from, see `_layout`.
    """
    layout = _layout(model)
    place = folder / (FOLDER_NAME if layout == "diffusers" else FILE_NAME)
    model.network.to("cpu", dtype)
    models.save(model, place, layout=layout)
    return place


def check_exportable(model: Model) -> None:
    """ValueError where the layout that a text-to-image model came in has no words for what it is, such as its
    prediction.

    To be called before training, and in a second: what is saved, to find out, is a miniature of its
    description.
    """
    layout = _layout(model)
    if layout == "native":  # says everything
        return
    small, params = models.miniature(model.spec["family"]), model.require("vae").params
    latents = {name: getattr(params, name) for name in ("scale", "shift", "mean", "std")}
    vae = VAE(replace(small.require("vae").params, **latents))
    spec = {
        **small.spec,
        "vae": to_plain(vae.params),
        **{name: model.spec[name] for name in ("schedule", "prediction", "grid")},
    }
    with TemporaryDirectory() as folder:
        try:
            models.save(
                Model(small.backbone, model.schedule, model.prediction, spec, vae=vae, text=small.text),
                Path(folder) / FILE_NAME,
                layout,
            )
        except ValueError as error:
            raise ValueError(
                f"once trained, this model could not be saved as its weights came ({error}): train a copy "
                "in our own layout, "
                f"models.save(models.load(..., prediction={model.prediction.name!r}), 'copy.safetensors'), "
                "with nothing but its name"
            ) from None


def load_options(trained: Model, place: Path) -> dict[str, str]:
    """The options that `models.load` needs beside an export's path, `family` or `prediction`, to load the
    model that was trained."""
    options: dict[str, Any] = {}
    for name in ("family", "prediction"):
        wanted = trained.spec.get(name)
        if wanted and models.load(place, **options).spec.get(name) != wanted:
            options[name] = wanted
    return options


def _layout(model: Model) -> Any:
    """That of its files; several single files become one, or a folder where there is a tokenizer (T5's) that
    one file cannot hold."""
    layout = model.report.layout if model.report else "native"
    if layout in ("ldm", "separate"):
        return "diffusers" if tokenizers_beside(model) else "ldm"
    return layout


def find_export(folder: Path) -> Path | None:
    """What `export` wrote into a run's folder, None where it did not."""
    places = [folder / name for name in (FILE_NAME, FOLDER_NAME)]
    return next((place for place in places if place.exists()), None)
