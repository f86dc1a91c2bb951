"""A finished fine-tuning as a published model: in the layout and the precision that its weights came in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import models
from models import Model

FILE_NAME, FOLDER_NAME = "model.safetensors", "model"


def export(model: Model, folder: Path, dtype: torch.dtype) -> Path:
    """Write all parts of a model into a run's folder, its backbone in that dtype; where to.

    model.safetensors, or for the layout of diffusers the folder model/; the layout is that of the files that it was loaded from.
    """
    layout: Any = model.report.layout if model.report else "native"
    place = folder / (FOLDER_NAME if layout == "diffusers" else FILE_NAME)
    model.network.to("cpu", dtype)
    models.save(model, place, layout=layout)
    return place


def telling(trained: Model, place: Path) -> dict[str, str]:
    """What `models.load` must be told beside an export's path, `family` or `prediction`, to make of it the model that was trained."""
    told: dict[str, Any] = {}
    for name in ("family", "prediction"):
        wanted = trained.spec.get(name)
        if wanted and models.load(place, **told).spec.get(name) != wanted:
            told[name] = wanted
    return told


def exported(folder: Path) -> Path | None:
    """What `export` wrote into a run's folder, None where it did not."""
    places = [folder / name for name in (FILE_NAME, FOLDER_NAME)]
    return next((place for place in places if place.exists()), None)
