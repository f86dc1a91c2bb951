"""A model's family and settings, which this library adds to published layouts to load the same model again.

Both are in model_index.json or in the metadata of single files, where other readers ignore them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diffusion.spec import check_mapping, check_names
from models.families import Family
from models.files.text import parse_strict_json
from models.layouts.findings import Findings
from models.layouts.scheduler import flow_grid, scheduler, set_distilled, usual_grid
from models.model import Model

FAMILY_KEY, SETTINGS_KEY = "_family", "_settings"
SETTINGS = ("grid", "sampling", "consistency", "shape")  # entries of a description


def read_settings(found: Findings, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that this library wrote into metadata or model_index.json, for the same family."""
    if not found.backbone:
        return {}
    settings: dict[str, Any] = {}
    file, pipeline = found.backbone.file, found.pipeline
    sources: dict[str, Mapping[str, Any]] = {f"{file.path}: its metadata": file.metadata}
    sources |= {f"{pipeline.folder}: model_index.json's": pipeline.index}
    for source, content in sources.items():
        if SETTINGS_KEY not in content or content.get(FAMILY_KEY, spec["family"]) != spec["family"]:
            continue
        text = content[SETTINGS_KEY]
        try:
            value = parse_strict_json(text if isinstance(text, str) else json.dumps(text))
            new = check_mapping(SETTINGS_KEY, value)
            check_names("setting", new, SETTINGS)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source} {SETTINGS_KEY} are damaged: {error}") from None
        settings |= new
    return settings


def settings_to_write(model: Model, family: Family, sample_size: Any) -> dict[str, Any]:
    """The entries of SETTINGS that differ from what the family and a folder's other configurations say.

    sample_size  in the backbone's configuration, None without it
    """
    network: Any = model.network
    usual = family.description(network.params, model.vae.params if model.vae else None, None)
    config = scheduler(model)
    set_distilled(usual, config)
    grid = usual_grid(usual["grid"], model.spec["schedule"])
    usual["grid"] = flow_grid(config, family) if family.is_flow else grid
    if sample_size is not None:
        usual["shape"][1:] = sample_size if isinstance(sample_size, list) else [sample_size] * 2
    settings = {name: model.spec[name] for name in SETTINGS if name in model.spec}
    return {name: value for name, value in settings.items() if value != usual.get(name)}
