"""Pictures that a model draws when they are read, without touching the disk."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from diffusion import NONE, Condition
from diffusion.settings import of_kind
from diffusion.spec import check_call, check_mapping, check_names, check_type, make_params
from eval.images.calls import calls_per_image
from models import Model
from models.device import find_device
from models.layers.blocks import check_compiles, compiled
from samplers.generate import generate
from samplers.guide import class_denoiser
from samplers.pictures import to_uint8
from samplers.results import check_sha256
from samplers.run import SampleParams, label_cycle
from samplers.sample import find_sampler, sample
from samplers.text_to_image import (
    DTYPES,
    TextToImageParams,
    dtypes,
    generate_arguments,
    load_model,
    with_defaults,
)
from samplers.usage import usage
from train.data.captions import list_prompts
from train.data.source import Unreadable

FILES = {"out", "progress"}  # settings of the samplers for pictures that are saved
ONE_PROMPT = {
    "prompt",
    "refiner",
    "handover",
    "image",
    "mask",
    "strength",
    "image_guidance",
}  # for one prompt

Draw = Callable[[Model, Sequence[int]], Tensor]


class GeneratedPictures:
    """n pictures of a model, "seed 0" and so on: picture i has seed + i in any batch, but for rounding.

    settings  what the pictures depend on, with the SHA-256 of weights and prompts, as plain values
    calls     network calls per picture
    stamp     SHA-256 of settings, number and classes
    computes  reading computes on the device: reading ahead gains nothing

    FloatingPointError, which names the seed, for pictures that are not finite.
    """

    computes = True

    def __init__(
        self,
        model: Model,
        draw: Draw,
        settings: Mapping[str, Any],
        *,
        n: int,
        origin: str,
        batch_size: int,
        labels: Sequence[str] | None = None,
        prompts: Sequence[str] | None = None,
    ) -> None:
        """draw: model, numbers -> uint8 pictures (B, 3 or 1, H, W), at most `batch_size` at once."""
        self._model, self._draw, self._batch_size = model, draw, batch_size
        self.settings, self.origin, self.labels, self.prompts = dict(settings), origin, labels, prompts
        self.names: Sequence[str] = [f"seed {settings['seed'] + i}" for i in range(n)]
        self.calls = calls_per_image(model, lambda counting: draw(counting, [0]))
        content = json.dumps([self.settings, n, labels and list(labels)], default=str)
        self.stamp = hashlib.sha256(content.encode()).hexdigest()
        self._times: list[tuple[float, int]] = []  # seconds of each batch, and its pictures

    @property
    def name(self) -> str:
        """Of a row of a table: the model, sampler, steps and guidance."""
        guidance = self.settings.get("guidance")
        guided = "" if guidance in (None, 1) else f", guidance {guidance:g}"
        return f"{Path(self.origin).name}, {self.settings['sampler']}, {self.settings['steps']} steps{guided}"

    @property
    def seconds(self) -> float:
        """Per picture so far, with text encoders and autoencoder; NaN before the first picture.

        The first batch, in which a device warms up, counts only if there is no other.
        """
        timed = self._times[1:] or self._times
        return sum(seconds for seconds, _ in timed) / sum(count for _, count in timed) if timed else math.nan

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int]) -> list[Tensor | Unreadable]:
        """See `Source`."""
        found: list[Tensor | Unreadable] = []
        for first in range(0, len(indices), self._batch_size):
            start = time.perf_counter()
            images = self._draw(self._model, indices[first : first + self._batch_size]).cpu()
            self._times.append((time.perf_counter() - start, len(images)))
            found += list(images.expand(-1, 3, -1, -1))
        return found


def open_generated(spec: Mapping[str, Any], classes: Sequence[str] | None = None) -> GeneratedPictures:
    """Pictures of {"run": FOLDER, "n": ...}, trained here, or {"weights": FILE, "prompts": FILE or list}.

    Other settings are those of `plain-diffusion samplers --help`. A run draws its classes in turn, or these
    `classes`; a published model draws the prompts in turn, by default each once. ValueError or OSError for
    settings that do not fit, before anything is drawn.
    """
    values = check_mapping("what is to be drawn", spec)
    if ("run" in values) == ("weights" in values):
        raise ValueError(
            "give what draws: run, a model trained here, or weights and prompts, a published model"
        )
    if classes is not None and "run" not in values:
        raise ValueError("a published model draws prompts, not classes: leave classes out")
    return _from_run(values, classes) if "run" in values else _from_prompts(values)


def _from_run(spec: dict[str, Any], classes: Sequence[str] | None) -> GeneratedPictures:
    known = [field.name for field in fields(SampleParams) if field.name not in FILES]
    check_names("setting of what a run draws", spec, known)
    if "n" not in spec:
        raise ValueError("give the number of pictures to draw: n: 10000, say")
    params = make_params("", SampleParams, spec)
    model = models.load(params.run, ema=params.ema, trust=params.trust)
    if model.text is not None or getattr(model.network.params, "context_dim", None) is not None:
        raise ValueError(
            f"{params.run} is a model that takes prompts: give weights: {params.run} and prompts"
        )
    check_sha256("run", params.run, params.with_defaults(model).sha256, params.sha256)
    model.network.to(find_device(params.device)).eval().requires_grad_(False)
    return generated_by(model, params, classes)


def generated_by(
    model: Model, params: SampleParams, classes: Sequence[str] | None = None
) -> GeneratedPictures:
    """Pictures of a model in memory that takes no prompts, during training, say.

    `params.run` is its name in results; other settings of files are ignored. ValueError for settings that do
    not fit.
    """
    params, device = params.with_defaults(model), next(model.network.parameters()).device
    how = usage(model, params.sampler, params.steps, params.grid, params.guidance)
    check_call(str(how.sampler), find_sampler(how.sampler), 3, params.options)
    if params.compile:
        check_compiles(model.network)
    grid = how.levels(model)
    numbers = label_cycle(model, params)
    names = [str(name) for name in model.spec.get("classes") or range(model.num_classes or 0)]
    if classes is not None:
        check_names("class of the model", classes, names)
        numbers = [names.index(name) for name in classes]
    labels = None if numbers is None else [numbers[i % len(numbers)] for i in range(params.n)]

    def draw(model: Model, indices: Sequence[int]) -> Tensor:
        denoiser = class_denoiser(model, params.guidance, params.clip, params.guide)
        condition = NONE
        if labels is not None:
            condition = Condition(label=torch.tensor([labels[i] for i in indices], device=device))
        seeds = [params.seed + i for i in indices]
        what: dict[str, Any] = {"shape": model.shape, "seeds": seeds, "condition": condition}
        with compiled(model.network, params.compile):
            return to_uint8(sample(how.sampler, denoiser, grid, device=device, **what, **params.options))

    settings = _settings(params, grid=how.grid, steps=grid.steps, fingerprint=params.sha256["run"])
    shown = None if labels is None else [names[label] for label in labels]
    size: dict[str, Any] = {"n": params.n, "batch_size": params.batch_size}
    return GeneratedPictures(model, draw, settings, origin=params.run, labels=shown, **size)


def _from_prompts(spec: dict[str, Any]) -> GeneratedPictures:
    known = [field.name for field in fields(TextToImageParams) if field.name not in FILES | ONE_PROMPT]
    check_names("setting of what prompts draw", spec, [*known, "prompts"])
    value = spec.pop("prompts", None)
    if value is None:
        raise ValueError("give what to draw: prompts: FILE, or a list of them")
    check_type("prompts", value, str | Sequence[str])
    prompts = list_prompts(value) if isinstance(value, str) else list(value)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"prompts must be one or more, none of them empty, not {str(prompts)[:80]}")
    params = make_params("", TextToImageParams, {"n": len(prompts), **spec, "prompt": "", "progress": False})
    model = load_model(params, "weights")
    params = with_defaults(params, model, None, None)
    for part, name in dtypes(params).items():
        if part in model.parts:
            model.parts[part].to(DTYPES[name])
    if params.compile:
        check_compiles(model.network, find_device(params.device))
    repeated = [prompts[i % len(prompts)] for i in range(params.n)]
    options = {**generate_arguments(params), **params.options}

    def draw(model: Model, indices: Sequence[int]) -> Tensor:
        seeds = [params.seed + i for i in indices]
        return to_uint8(generate(model, [repeated[i] for i in indices], seeds=seeds, **options), low=0.0)

    sha256 = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    settings = _settings(params, prompts=sha256, fingerprint=params.sha256["weights"])
    size: dict[str, Any] = {"n": params.n, "batch_size": params.batch_size}
    return GeneratedPictures(
        model, draw, settings, origin=", ".join(params.weights), prompts=repeated, **size
    )


def _settings(params: SampleParams | TextToImageParams, **more: Any) -> dict[str, Any]:
    """What pictures depend on, as plain values."""
    left = {*of_kind(type(params), "place", "rounding", "count", "weights"), *ONE_PROMPT, "sha256"}
    return {**{name: value for name, value in asdict(params).items() if name not in left}, **more}
