"""Samples from a trained run: `plain-diffusion samplers run=...`, or `run` with a plain dictionary."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import torch

import models
from diffusion import NONE, Condition, DenoiserLike, Grid
from diffusion.outside import trust
from diffusion.settings import of_kind, recorded, setting
from diffusion.spec import check_call, check_names, make_params
from models import Model
from models.device import find_device
from models.layers.blocks import check_compiles, compiled
from models.layouts import native
from samplers.guide import class_denoiser
from samplers.provenance import provenance
from samplers.results import (
    ImageRecord,
    Outcome,
    check_folder,
    check_sha256,
    drop_nulls,
    fill_folder,
    sibling_folder,
)
from samplers.sample import find_sampler, sample
from samplers.settings import DrawParams
from samplers.usage import usage

MAX_FOLDER_NAME = 150  # characters; a list of times may be longer


@dataclass(frozen=True, kw_only=True)
class SampleParams(DrawParams):
    """What to draw from a run. None stands for the model's default."""

    run: str = setting(..., "a training run's folder, or a checkpoint file", kind="weights")
    labels: int | str | tuple[int | str, ...] | None = setting(
        None,
        "classes to draw in turn, by number or name: 3 or [3,7]; null: all",
        text="text",
        swept=True,
        heading="With a run",
    )
    clip: bool = setting(True, "false: do not clip x0 to [-1, 1]")
    trust: bool = setting(
        False, "true: import code that the run names (mynet:Tiny), which runs that code", kind="place"
    )
    n: int = setting(
        100, "number of images; null: 100 of a run, 1 of a prompt", kind="count", heading="How many, and how"
    )
    guidance: float = setting(1.0, "guidance scale; 1 is off; null: the family's, off for a run")
    batch_size: int = setting(500, "images at once; null: 500 of a run, 4 of a prompt", kind="count")

    def with_defaults(self, model: Model) -> SampleParams:
        """With the model's defaults in place of None, and the hashes of its files."""
        how = usage(model, self.sampler, self.steps, self.grid)
        hashes = {"run": model.fingerprint}
        return replace(self, sampler=str(how.sampler), steps=how.steps, sha256=hashes)

    def folder(self, steps: int) -> Path:
        """`out`, or a folder in the run named by sampler, steps, guidance and unusual settings."""
        if self.out is not None:
            return Path(self.out)
        unusual = {**self.guide, **self.grid, **self.options}
        unusual |= {name: False for name in ("clip", "ema") if not getattr(self, name)}
        words = json.dumps(unusual).replace('"name": ', "")
        suffix = re.sub(r"[^\w.-]+", "-", words).rstrip("-")  # -interval-0.2-0.8-rule-apg-eta-0
        guidance = f"-guidance-{self.guidance:g}" if self.guidance != 1 else ""
        name = f"{str(self.sampler).replace(':', '.')}-{steps}{guidance}{suffix}"
        if len(name) > MAX_FOLDER_NAME:
            name = f"{name[:MAX_FOLDER_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return self.home / name

    @property
    def home(self) -> Path:
        """The folder of the run's samples, unless `out` says otherwise."""
        run = Path(self.run)
        return (run.parent if run.is_file() else run) / "samples"

    @property
    def shared(self) -> dict[str, Any]:
        """What all images in one folder share, with the weights' file and its modification time."""
        run = Path(self.run)
        file = (run / native.FILE_NAME if run.is_dir() else run).resolve()
        others = (*of_kind(type(self), "place", "rounding", "count", "weights"), "labels", "seed")
        same = {key: value for key, value in asdict(self).items() if key not in others}
        return {"weights": str(file), "written": file.stat().st_mtime, **same}


def run(config: Mapping[str, Any]) -> Path:
    """Samples from a configuration (`plain-diffusion samplers --help`); returns the folder (`fill_folder`).

    Images are named by seed, in a folder per class if there are classes. ValueError if the folder holds
    images of other settings.
    """
    trust(config)
    return draw(make_params("", SampleParams, drop_nulls(config))).out


def draw(params: SampleParams, only: int | None = None) -> Outcome:
    """Like `run`, with parameters; only: save just the image of that seed, drawn in its batch."""
    model = models.load(params.run, ema=params.ema, trust=params.trust)
    if model.text is not None or getattr(model.network.params, "context_dim", None) is not None:
        raise ValueError(f"{params.run} takes prompts: draw with weights={params.run} prompt=...")
    wanted, params = params.sha256, params.with_defaults(model)
    check_sha256("run", params.run, params.sha256, wanted)
    device = find_device(params.device)
    model.network.to(device).eval().requires_grad_(False)
    if params.compile:
        check_compiles(model.network)
    if "noise" in params.options:
        raise ValueError("noise comes from the seeds here: samplers.sample accepts another one")
    check_call(str(params.sampler), find_sampler(str(params.sampler)), 3, params.options)
    denoiser = class_denoiser(model, params.guidance, params.clip, params.guide)
    grid = model.grid(params.steps, **params.grid)
    labels = label_cycle(model, params)
    out = params.folder(grid.steps)
    out = out if only is None or params.out else sibling_folder(out)
    check_folder(out, params.shared)
    about = provenance()
    settings = {key: value for key, value in asdict(params).items() if key in recorded(SampleParams)}
    settings |= {"run": str(Path(params.run).absolute()), "device": str(device), "provenance": about}
    classes = model.spec.get("classes", [])
    records = _draw(denoiser, model.shape, grid, params, labels, classes, settings, only)
    columns = len(labels) if labels else ceil(sqrt(params.n))
    with compiled(model.network, params.compile):
        return Outcome(out, fill_folder(out, params.shared, about, records, columns=columns, low=-1))


def _draw(
    denoiser: DenoiserLike,
    shape: tuple[int, int, int],
    grid: Grid,
    params: SampleParams,
    labels: list[int] | None,
    classes: list[str],
    settings: Mapping[str, Any],
    only: int | None,
) -> Iterator[ImageRecord]:
    """The images one by one, on the host, drawn in batches, so that each batch is saved before the next."""
    device = settings["device"]
    for first in range(0, params.n, params.batch_size):
        seeds = range(params.seed + first, params.seed + min(first + params.batch_size, params.n))
        part = None if labels is None else list(islice(cycle(labels), first, first + len(seeds)))
        condition = NONE if part is None else Condition(label=torch.tensor(part, device=device))
        images = sample(
            str(params.sampler), denoiser, grid, shape=shape, seeds=seeds, condition=condition,
            device=device, progress=params.progress, **params.options,
        ).cpu()  # fmt: skip
        batch = {"seed": seeds[0], "n": len(seeds), "labels": part and part[: len(labels or ())]}
        for i, (image, seed) in enumerate(zip(images, seeds, strict=True)):
            label = None if part is None else part[i]
            name = f"{seed:06d}" if label is None else f"{label}/{seed:06d}"
            if only in (None, seed):
                named = {} if label is None or not classes else {"class": classes[label]}
                own = {"seed": seed, "labels": label, **named, "batch": batch}
                yield ImageRecord(image, name, {**settings, **own})


def label_cycle(model: Model, params: SampleParams) -> list[int] | None:
    """The numbers of the classes to draw in turn: those wanted, or all; None for a model without classes."""
    count = model.num_classes
    wanted = [params.labels] if isinstance(params.labels, int | str) else params.labels
    if count is None:
        if wanted:
            raise ValueError("this model has no classes: leave labels out")
        return None
    names = model.spec.get("classes", [])
    return [_class_number(label, names, count) for label in wanted] if wanted else list(range(count))


def _class_number(label: int | str, names: list[str], count: int) -> int:
    """The number of a class, from its number or name. ValueError if there is none."""
    if isinstance(label, str):
        if not names:
            raise ValueError(f"these classes have no names: labels are 0 to {count - 1}, not {label!r}")
        check_names("class", [label], names)
        return names.index(label)
    if not 0 <= label < count:
        raise ValueError(f"label {label} is out of range: classes are 0 to {count - 1}")
    if names and str(label) in names and names[label] != str(label):
        text = f"label {label} is class number {label}, {names[label]!r}; labels=['{label}'] means its name"
        warnings.warn(text, stacklevel=4)
    return label
