"""Sampling a trained run from a description: what `python -m samplers` does, callable with a plain dictionary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from diffusion import DenoiserLike, Grid
from diffusion.spec import check_at_least_one, check_call, make_params
from models import Model
from models.checkpoints import native
from models.device import find_device
from models.files import read_json, write_json
from samplers.guide import steered
from samplers.pictures import save_png, tile
from samplers.provenance import provenance
from samplers.sample import find_sampler, sample

SHOWN = 200  # images in the grid


@dataclass(frozen=True)
class SampleParams:
    """What to sample: see configs/samplers. None stands for what the model is meant for."""

    run: str
    out: str | None = None
    n: int = 100
    labels: int | tuple[int, ...] | None = None
    seed: int = 0
    sampler: str | None = None
    steps: int | None = None
    grid: dict[str, Any] = field(default_factory=dict)
    guidance: float = 1.0
    guide: dict[str, Any] = field(default_factory=dict)
    clip: bool = True
    options: dict[str, Any] = field(default_factory=dict)
    ema: bool = True
    batch_size: int = 500
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_at_least_one(self, "n", "batch_size")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0 ... 2^63 - 1, not {self.seed}")

    def completed(self, model: Model) -> SampleParams:
        """With the sampler and steps that the model is meant for where none are given."""
        values = asdict(self)
        values["sampler"] = self.sampler or ("consistency" if model.distilled else "ddim")
        for section in ("grid", "guide"):
            values[section] = {key: value for key, value in values[section].items() if value is not None}
        grid = values["grid"] or model.spec.get("grid", {})
        if self.steps is None and isinstance(grid.get("spacing", ""), str):  # a list of times has its own number
            values["steps"] = 2 if model.distilled else 50
        return SampleParams(**values)

    def folder(self, steps: int) -> Path:
        """`out`, or a folder of the run's that is named for sampler, steps, guidance and how that works."""
        run, guided = Path(self.run), f"-guidance-{self.guidance:g}" if self.guidance != 1 else ""
        how = re.sub(r"[^\w.-]+", "-", json.dumps(self.guide).replace('"name": ', "")).rstrip("-")  # -interval-0.2-0.8-rule-apg-eta-0
        default = (run.parent if run.is_file() else run) / "samples" / f"{self.sampler}-{steps}{guided}{how}"
        return default if self.out is None else Path(self.out)

    @property
    def kept(self) -> dict[str, Any]:
        """What all images in one folder have in common, the weights' file and the time of its writing included."""
        run = Path(self.run)
        file = (run / native.FILE_NAME if run.is_dir() else run).resolve()
        same = {key: value for key, value in asdict(self).items() if key not in ("run", "out", "n", "labels", "seed", *MACHINE)}
        return {"weights": str(file), "written": file.stat().st_mtime, **same}


MACHINE = ("batch_size", "device", "progress")


def run(config: Mapping[str, Any]) -> Path:
    """Sample as the configuration says (see configs/samplers); the folder of the results.

    images/     one PNG per image, named by its seed, in a folder per class where there are classes
    grid.png    the first 200 together
    Images of other settings that are in that folder are never mixed with these: ValueError.
    """
    params = make_params("", SampleParams, config)
    model = models.load(params.run, ema=params.ema)
    device = find_device(params.device)
    model.network.to(device).eval().requires_grad_(False)
    params = params.completed(model)
    if "noise" in params.options:
        raise ValueError("noise comes from the seeds here: samplers.sample takes another")
    check_call(str(params.sampler), find_sampler(str(params.sampler)), 3, params.options)
    denoiser = steered(model, params.guidance, params.clip, params.guide)
    grid = model.grid(params.steps, **params.grid)
    labels = _labels(model, params)
    out = params.folder(grid.steps)
    _claim(out, params)

    seeds = range(params.seed, params.seed + params.n)
    shown = []
    settings = {key: value for key, value in asdict(params).items() if key not in ("out", *MACHINE)}
    drawn = _draw(denoiser, model.shape, grid, params, seeds, labels, device)
    for i, (image, seed) in enumerate(zip(drawn, seeds, strict=True)):
        label = None if labels is None else labels[i]
        path = out / "images" / ("" if label is None else str(label)) / f"{seed:06d}.png"
        save_png(image, path, {**settings, "seed": seed, "labels": label})
        shown += [image] * (i < SHOWN)
    save_png(tile(torch.stack(shown), columns=10), out / "grid.png", settings, zoom=max(1, 64 // model.shape[-1]))
    return out


def _claim(out: Path, params: SampleParams) -> None:
    """Make the folder and write samples.json, before any work is done; refuse a folder with images of other settings."""
    record, images = out / "samples.json", out / "images"
    kept = json.loads(json.dumps(params.kept))
    if images.is_dir() and any(images.iterdir()) and (not record.exists() or read_json(record).get("settings") != kept):
        raise ValueError(f"{images} already holds images of other settings: out=... names another place for these")
    write_json(record, {"settings": kept, "provenance": provenance()})


def _draw(
    denoiser: DenoiserLike,
    shape: tuple[int, int, int],
    grid: Grid,
    params: SampleParams,
    seeds: Sequence[int],
    labels: list[int] | None,
    device: torch.device,
) -> Iterator[Tensor]:
    """The images one after the other, on the host, drawn a batch at a time: what is drawn can be saved before the rest is."""
    for start in range(0, len(seeds), params.batch_size):
        part = slice(start, start + params.batch_size)
        cond = {} if labels is None else {"label": torch.tensor(labels[part], device=device)}
        images = sample(
            str(params.sampler), denoiser, grid, shape=shape, seeds=seeds[part], cond=cond,
            device=device, progress=params.progress, **params.options,
        ).cpu()  # fmt: skip
        yield from images


def _labels(model: Model, params: SampleParams) -> list[int] | None:
    """A class per sample: those wanted, or all, in turn; None for a model without classes."""
    classes = model.null.get("label")
    wanted = [params.labels] if isinstance(params.labels, int) else params.labels
    if classes is None:
        if wanted:
            raise ValueError("this model has no classes: leave labels out")
        return None
    chosen = list(wanted) if wanted else list(range(classes))
    for label in chosen:
        if not 0 <= label < classes:
            raise ValueError(f"label {label} is out of range: classes are 0 to {classes - 1}")
    return list(islice((label for _ in range(params.n) for label in chosen), params.n))
