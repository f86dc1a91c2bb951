"""What this library adds to published layouts, so that a model comes back as it was: its family, and the settings that nothing else tells.

Both stand in model_index.json, and in the metadata of single files, where others pass over them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from diffusion.spec import check_mapping, check_names
from models.checkpoints import native
from models.checkpoints.findings import Findings
from models.checkpoints.scheduler import LCM_SETTINGS, flow_grid, scheduler, usual_grid
from models.families import Family
from models.model import Model

FAMILY_KEY, SETTINGS_KEY = "_family", "_settings"
SETTINGS = ("grid", "sampling", "consistency", "shape")  # entries of a description


def read_settings(found: Findings, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that this library wrote into the file's metadata or into model_index.json, without those for another family."""
    written: dict[str, Any] = {}
    file, index = found.backbone.file if found.backbone else None, found.pipeline.index
    places = (
        [] if file is None else [(f"{file.path}: its metadata", file.metadata), (f"{found.pipeline.folder}: model_index.json's", index)]
    )
    for where, content in places:
        if SETTINGS_KEY not in content or content.get(FAMILY_KEY, spec["family"]) != spec["family"]:
            continue
        text = content[SETTINGS_KEY]
        try:
            settings = check_mapping(SETTINGS_KEY, native.parsed("model", text if isinstance(text, str) else json.dumps(text)))
            check_names("setting", settings, SETTINGS)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} {SETTINGS_KEY} are damaged: {error}") from None
        written |= settings
    return written


def untold_settings(model: Model, of: Family, sample_size: Any) -> dict[str, Any]:
    """The entries of SETTINGS that a folder's other configurations do not say, which readers would take from the family.

    sample_size  in the backbone's configuration, None where it has none
    """
    network: Any = model.network
    usual = of.description(network.params, model.vae.params if model.vae else None, None)
    config = scheduler(model)
    for theirs, (part, ours, value) in LCM_SETTINGS.items():
        if config.get(theirs, value) != value:
            usual[part][ours] = config[theirs]
    usual["grid"] = flow_grid(config, of) if of.is_flow else usual_grid(usual["grid"], model.spec["schedule"])
    if sample_size is not None:
        usual["shape"][1:] = sample_size if isinstance(sample_size, list) else [sample_size] * 2
    return {name: model.spec[name] for name in SETTINGS if name in model.spec and model.spec[name] != usual.get(name)}
