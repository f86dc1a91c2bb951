"""`save`: a model in the layout of one's choice, the exact inverse of `load`."""

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

    layout  "native": one file of ours, which says itself what it holds; "ldm": the single file that most
            tools open, of SD and SDXL as latent diffusion wrote it, of SD 3 as Stability AI, of FLUX.1 as
            ComfyUI, with no place for a preview nor for T5's tokenizer; "diffusers": a folder with a
            sub-folder per part, which diffusers' from_pretrained opens; "separate": a folder with a file per
            part under its publisher's keys, to load together: flux-dev.safetensors, vae.safetensors,
            clip_l.safetensors, t5xxl.safetensors
    dtype   of the weights in the files; None: as they are, which packed ones (8-bit floats, GGUF's blocks)
            cannot be
    Raises OSError where the place cannot be written, ValueError for a model that readers of the layout would
    take for another.
    """
    check_names("layout", [layout], ["native", *PUBLISHED])
    check_dtype(dtype, ())
    for part in model.parts.values():
        check_not_streamed(part)
    if any(map(has_factors, model.parts.values())):
        raise ValueError("this model has adapters apart from its weights: save it adapted without apart=True")
    if any(is_packed(part) for part in model.parts.values()):
        if dtype is None:
            raise ValueError(
                "weights of this model are packed as in their files: give dtype=..., to write them unpacked"
            )
        model = model.unpacked(dtype)
    if layout == "native":
        native.save(model, path, dtype)
        return
    network: Any = model.backbone
    if network is not None and not (
        type(network) in [kind.network for kind in BACKBONES.values()] and network.params.context_dim
    ):
        kind = type(network).__name__
        raise ValueError(
            f"the layout {layout!r} is for networks that are told a text, which this {kind} is not: use "
            "layout='native'"
        )
    from models.layouts import (
        diffusers_folder,
        single_file,
    )  # here: to import this library needs no layout that is not written

    write = {
        "ldm": single_file.save_ldm,
        "diffusers": diffusers_folder.save_diffusers,
        "separate": single_file.save_separate,
    }
    write[layout](model, Path(path), dtype)
