"""What this library adds to published layouts, so that a model comes back as it was: its family, and settings
that have no other place.

Both stand in model_index.json or in the metadata of single files, where other readers ignore them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diffusion.spec import check_mapping, check_names
from models.families import Family
from models.layouts import native
from models.layouts.findings import Findings
from models.layouts.scheduler import flow_grid, scheduler, set_distilled, usual_grid
from models.model import Model

FAMILY_KEY, SETTINGS_KEY = "_family", "_settings"
SETTINGS = ("grid", "sampling", "consistency", "shape")  # entries of a description


def read_settings(found: Findings, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that this library wrote into the backbone's metadata or into model_index.json, without those
    for another family."""
    if not found.backbone:
        return {}
    written: dict[str, Any] = {}
    file, pipeline = found.backbone.file, found.pipeline
    places: dict[str, Mapping[str, Any]] = {f"{file.path}: its metadata": file.metadata}
    places |= {f"{pipeline.folder}: model_index.json's": pipeline.index}
    for where, content in places.items():
        if SETTINGS_KEY not in content or content.get(FAMILY_KEY, spec["family"]) != spec["family"]:
            continue
        text = content[SETTINGS_KEY]
        try:
            settings = check_mapping(
                SETTINGS_KEY, native.parsed("model", text if isinstance(text, str) else json.dumps(text))
            )
            check_names("setting", settings, SETTINGS)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} {SETTINGS_KEY} are damaged: {error}") from None
        written |= settings
    return written


def untold_settings(model: Model, of: Family, sample_size: Any) -> dict[str, Any]:
    """The entries of SETTINGS that would not come back from the family and a folder's other configurations.

    sample_size  in the backbone's configuration, None where it has none
    """
    network: Any = model.network
    usual = of.description(network.params, model.vae.params if model.vae else None, None)
    config = scheduler(model)
    set_distilled(usual, config)
    usual["grid"] = flow_grid(config, of) if of.is_flow else usual_grid(usual["grid"], model.spec["schedule"])
    if sample_size is not None:
        usual["shape"][1:] = sample_size if isinstance(sample_size, list) else [sample_size] * 2
    return {
        name: model.spec[name]
        for name in SETTINGS
        if name in model.spec and model.spec[name] != usual.get(name)
    }
