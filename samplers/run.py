"""Sampling a trained run from a description: what `python -m samplers` does, callable with a plain dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from diffusion import ClassifierFreeGuidance, Clipped, DenoiserLike, Grid
from diffusion.spec import check_names
from models import Model, check_labels
from models.files import write_json
from samplers.pictures import save_png, tile
from samplers.provenance import provenance
from samplers.sample import find_sampler, sample

KEYS = (
    *("run", "out", "n", "labels", "seed"),
    *("sampler", "steps", "spacing", "guidance", "clip", "options"),
    *("ema", "batch_size", "device", "progress"),
)


def steered(model: Model, guidance: float, clip: bool) -> DenoiserLike:
    """The model's denoiser, guided towards its condition and limited to pixel range, as asked."""
    denoiser: DenoiserLike = model.denoiser()
    if guidance != 1:
        if not model.null:
            raise ValueError(f"guidance={guidance:g} needs a conditional model, and this one has no classes: leave guidance at 1")
        denoiser = ClassifierFreeGuidance(denoiser, guidance, model.null)
    return Clipped(denoiser) if clip else denoiser


def folder(config: Mapping[str, Any]) -> Path:
    """Where the images go: out, or `samples` in the run's folder."""
    run = Path(config["run"])
    return Path(config["out"] or (run.parent if run.is_file() else run) / "samples")


def run(config: Mapping[str, Any]) -> list[Path]:
    """Sample as the configuration says (see configs/samplers); the paths of the images, which `grid.png` shows together.

    Images go to out/images, in a folder per class where there are classes, named by their seeds.
    """
    check_names("setting", config, KEYS)
    for name in ("n", "batch_size"):
        if config[name] < 1:
            raise ValueError(f"{name} must be at least 1, not {config[name]}")
    model = models.load(config["run"], ema=config.get("ema", True))
    device = torch.device(config.get("device") or ("cuda" if torch.cuda.is_available() else "cpu"))
    model.backbone.to(device).eval().requires_grad_(False)
    config = {**config, "sampler": config["sampler"] or ("consistency" if model.distilled else "ddim")}
    config["steps"] = (2 if model.distilled else 50) if config["steps"] is None else config["steps"]
    find_sampler(config["sampler"])
    grid = model.grid(config["steps"], **({"spacing": config["spacing"]} if config["spacing"] else {}))
    labels = _labels(model, config.get("labels"), config["n"])
    seeds = range(config["seed"], config["seed"] + config["n"])
    out = folder(config)
    settings = {key: value for key, value in config.items() if key not in ("out", "progress", "device", "batch_size")}

    images = _draw(model, grid, config, seeds, labels, device).cpu()
    paths = []
    for i, (image, seed) in enumerate(zip(images, seeds, strict=True)):
        label = None if labels is None else labels[i]
        path = out / "images" / ("" if label is None else str(label)) / f"{seed:06d}.png"
        save_png(image, path, {**settings, "seed": seed, "labels": label})
        paths.append(path)
    save_png(tile(images[:200], columns=10), out / "grid.png", settings, zoom=max(1, 64 // images.shape[-1]))
    write_json(out / "samples.json", {"settings": settings, "provenance": provenance()})
    return paths


def _draw(
    model: Model, grid: Grid, config: Mapping[str, Any], seeds: Sequence[int], labels: list[int] | None, device: torch.device
) -> Tensor:
    """All images, a batch at a time."""
    denoiser = steered(model, config["guidance"], config["clip"])
    settings = {"device": device, "progress": config.get("progress", False), **(config.get("options") or {})}
    parts = []
    for start in range(0, len(seeds), config["batch_size"]):
        part = slice(start, start + config["batch_size"])
        cond = {} if labels is None else {"label": torch.tensor(labels[part], device=device)}
        parts.append(sample(config["sampler"], denoiser, grid, shape=model.shape, seeds=seeds[part], cond=cond, **settings))
    return torch.cat(parts)


def _labels(model: Model, wanted: Sequence[int] | None, n: int) -> list[int] | None:
    """A class per sample: those wanted, or all, in turn; None for a model without classes."""
    classes = model.null.get("label")
    if classes is None:
        if wanted:
            raise ValueError("this model has no classes: leave labels out")
        return None
    chosen = list(wanted) if wanted else list(range(classes))
    check_labels(torch.tensor(chosen), classes)
    return list(islice((label for _ in range(n) for label in chosen), n))
