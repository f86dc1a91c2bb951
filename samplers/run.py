"""Sampling a trained run from a description: what `python -m samplers run=...` does, callable with a plain
dictionary."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
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

MAX_FOLDER_NAME = 150  # characters of a folder's, which a list of times may be longer than


@dataclass(frozen=True, kw_only=True)
class SampleParams(DrawParams):
    """What to draw with a run. None stands for what the model is meant for."""

    run: str = setting(..., "a training run's folder, or a checkpoint file", kind="weights")
    labels: int | str | tuple[int | str, ...] | None = setting(
        None,
        "classes to draw, in turn, by number or name: 3 or [3,7]; null: all of them",
        text="text",
        swept=True,
        heading="With a run",
    )
    clip: bool = setting(True, "false: do not keep estimates within [-1, 1]")
    trust: bool = setting(
        False,
        "true: import the parts of your own that the run names (mynet:Tiny), which runs that code",
        kind="place",
    )
    n: int = setting(
        100, "how many images; null: 100 of a run, 1 of a prompt", kind="count", heading="How many, and how"
    )
    guidance: float = setting(1.0, "classifier-free; 1 is off; null: the family's, and off for a run")
    batch_size: int = setting(500, "images at once; null: 500 of a run, 4 of a prompt", kind="count")

    def with_defaults(self, model: Model) -> SampleParams:
        """With the model's defaults for settings that are not given, and the hashes of its files."""
        how = usage(model, self.sampler, self.steps, self.grid)
        values = {
            **asdict(self),
            "sampler": how.sampler,
            "steps": how.steps,
            "sha256": {"run": model.fingerprint},
        }
        return SampleParams(**values)

    def folder(self, steps: int) -> Path:
        """`out`, or a folder of the run's whose name tells these settings from others: sampler, steps,
        guidance, and what is not usual."""
        if self.out is not None:
            return Path(self.out)
        told = {**self.guide, **self.grid, **self.options} | {
            name: False for name in ("clip", "ema") if not getattr(self, name)
        }
        guided = f"-guidance-{self.guidance:g}" if self.guidance != 1 else ""
        how = re.sub(r"[^\w.-]+", "-", json.dumps(told).replace('"name": ', "")).rstrip(
            "-"
        )  # -interval-0.2-0.8-rule-apg-eta-0
        name = f"{str(self.sampler).replace(':', '.')}-{steps}{guided}{how}"
        if len(name) > MAX_FOLDER_NAME:
            name = f"{name[:MAX_FOLDER_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return self.home / name

    @property
    def home(self) -> Path:
        """Where the samples of the run are, unless `out` says otherwise."""
        run = Path(self.run)
        return (run.parent if run.is_file() else run) / "samples"

    @property
    def kept(self) -> dict[str, Any]:
        """What all images in one folder have in common, the weights' file and the time of its writing
        included."""
        run = Path(self.run)
        file = (run / native.FILE_NAME if run.is_dir() else run).resolve()
        others = (*of_kind(type(self), "place", "rounding", "count", "weights"), "labels", "seed")
        same = {key: value for key, value in asdict(self).items() if key not in others}
        return {"weights": str(file), "written": file.stat().st_mtime, **same}


def run(config: Mapping[str, Any]) -> Path:
    """Sample as the configuration says (see `plain-diffusion samplers --help`); the folder of the results,
    see `fill_folder`.

    Images are named by their seeds, in a folder per class where there are classes. Images of other settings
    that are in that folder are never mixed with these: ValueError.
    """
    trust(config)
    return draw(make_params("", SampleParams, drop_nulls(config))).out


def draw(params: SampleParams, only: int | None = None) -> Outcome:
    """What `run` does, with parameters of its own; `only`: the image of that seed is saved, and those beside
    it in its batch are not."""
    model = models.load(params.run, ema=params.ema, trust=params.trust)
    if model.text is not None or getattr(model.network.params, "context_dim", None) is not None:
        raise ValueError(
            f"{params.run} is a model that takes prompts: weights={params.run} prompt=... draws with it"
        )
    wanted, params = params.sha256, params.with_defaults(model)
    check_sha256("run", params.run, params.sha256, wanted)
    device = find_device(params.device)
    model.network.to(device).eval().requires_grad_(False)
    if params.compile:
        check_compiles(model.network)
    if "noise" in params.options:
        raise ValueError("noise comes from the seeds here: samplers.sample takes another")
    check_call(str(params.sampler), find_sampler(str(params.sampler)), 3, params.options)
    denoiser = class_denoiser(model, params.guidance, params.clip, params.guide)
    grid = model.grid(params.steps, **params.grid)
    labels = label_cycle(model, params)
    out = params.folder(grid.steps)
    out = out if only is None or params.out else sibling_folder(out)
    check_folder(out, params.kept)
    about = provenance()
    settings = {key: value for key, value in asdict(params).items() if key in recorded(SampleParams)}
    settings |= {"run": str(Path(params.run).absolute()), "device": str(device), "provenance": about}
    drawn = _draw(denoiser, model.shape, grid, params, labels, model.spec.get("classes", []), settings, only)
    with compiled(model.network, params.compile):
        return Outcome(
            out,
            fill_folder(
                out,
                params.kept,
                about,
                drawn,
                columns=len(labels) if labels else ceil(sqrt(params.n)),
                low=-1,
            ),
        )


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
    """The images one after the other, on the host, drawn a batch at a time: what is drawn can be saved before
    the rest is."""
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
    """The classes to draw in turn, by number: those wanted, by number or name, or all; None for a model
    without classes."""
    count = model.num_classes
    wanted = [params.labels] if isinstance(params.labels, int | str) else params.labels
    if count is None:
        if wanted:
            raise ValueError("this model has no classes: leave labels out")
        return None
    return (
        [_class_number(label, model.spec.get("classes", []), count) for label in wanted]
        if wanted
        else list(range(count))
    )


def _class_number(label: int | str, names: list[str], count: int) -> int:
    """The number of a class that is named, or numbered already. ValueError where there is none of that name
    or number."""
    if isinstance(label, str):
        if not names:
            raise ValueError(
                f"the classes of this model have no names: labels are numbers, 0 to {count - 1}, not "
                f"{label!r}"
            )
        check_names("class", [label], names)
        return names.index(label)
    if not 0 <= label < count:
        raise ValueError(f"label {label} is out of range: classes are 0 to {count - 1}")
    if names and str(label) in names and names[label] != str(label):
        warnings.warn(
            f"label {label} is the number of class {names[label]!r}; labels=['{label}'] is the class of "
            "that name",
            stacklevel=4,
        )
    return label
