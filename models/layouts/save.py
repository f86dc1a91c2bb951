"""`save`: writes a model in the layout of your choice, the exact inverse of `load`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from diffusion.spec import check_names
from models.families import BACKBONES
from models.files.table import check_dtype
from models.layers.beside import has_factors
from models.layers.packed import is_packed
from models.layers.streaming import check_not_streamed
from models.layouts import native
from models.model import Model

PUBLISHED = ("ldm", "diffusers", "separate")


def save(
    model: Model,
    path: str | Path,
    layout: Literal["native", "ldm", "diffusers", "separate"] = "native",
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model.

    layout  "native": our own format, one file that describes its contents; "ldm": the single file that most
            tools open, as latent diffusion wrote it (SD and SDXL), Stability AI (SD 3) or ComfyUI (FLUX.1),
            without the preview and T5's tokenizer; "diffusers": a folder with a sub-folder per part, which
            diffusers' from_pretrained opens; "separate": a folder with a file per part under its publisher's
            keys, to load together: flux-dev.safetensors, vae.safetensors, clip_l.safetensors, ...
    dtype   of the weights in the files, by default their own; packed ones (8-bit floats, GGUF's blocks) need
            one

    Raises OSError if the path cannot be written, ValueError for a model that readers of the layout would
    misread.
    """
    check_names("layout", [layout], ["native", *PUBLISHED])
    check_dtype(dtype, ())
    for part in model.parts.values():
        check_not_streamed(part)
    if any(map(has_factors, model.parts.values())):
        raise ValueError("this model has adapters apart from its weights: save it adapted without apart=True")
    if any(is_packed(part) for part in model.parts.values()):
        if dtype is None:
            raise ValueError("this model has packed weights: choose dtype=... to write them unpacked")
        model = model.unpacked(dtype)
    if layout == "native":
        native.save(model, path, dtype)
        return
    network: Any = model.backbone
    known = type(network) in [kind.network for kind in BACKBONES.values()]
    if network is not None and not (known and network.params.context_dim):
        takes = f"networks that take text, which this {type(network).__name__} does not"
        raise ValueError(f"the layout {layout!r} is for {takes}: use layout='native'")
    from models.layouts import diffusers_folder, single_file  # here: importing this library imports no layout

    write = {
        "ldm": single_file.save_ldm,
        "diffusers": diffusers_folder.save_diffusers,
        "separate": single_file.save_separate,
    }
    write[layout](model, Path(path), dtype)
