"""Pictures drawn when they are asked for, by a model, without touching the disk."""

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
from models.layers.blocks import compiled
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

ELSEWHERE = {
    "out",
    "progress",
}  # of the settings of python -m samplers, what is not for pictures that nobody saves
ONE_EACH = {
    "prompt",
    "refiner",
    "handover",
    "image",
    "mask",
    "strength",
    "image_guidance",
}  # and what goes with one prompt at a time

Draw = Callable[[Model, Sequence[int]], Tensor]


class Drawn:
    """n pictures of a model, called "seed 0" and so on: picture i has seed + i, whoever asks for it together
    with what, but for rounding.

    settings  what all pictures depend on, the SHA-256 of the model's weights and of the prompts included, as
              plain values
    calls     network calls per picture, counted
    stamp     SHA-256 of them
    name      for a row of a table: what draws, sampler, steps and guidance
    computes  that reading them computes on the device: nothing is gained by reading ahead

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
        """draw: the pictures (B, 3 or 1, H, W), uint8, of these numbers, drawn with this model; `batch_size`:
        the most at once."""
        self._model, self._draw, self._batch_size = model, draw, batch_size
        self.settings, self.origin, self.labels, self.prompts = dict(settings), origin, labels, prompts
        self.names: Sequence[str] = [f"seed {settings['seed'] + i}" for i in range(n)]
        self.calls = calls_per_image(model, lambda counting: draw(counting, [0]))
        self.stamp = hashlib.sha256(
            json.dumps([self.settings, n, labels and list(labels)], default=str).encode()
        ).hexdigest()
        self._times: list[tuple[float, int]] = []  # seconds of each batch, and its pictures

    @property
    def name(self) -> str:
        """What draws, and how."""
        guidance = self.settings.get("guidance")
        guided = "" if guidance in (None, 1) else f", guidance {guidance:g}"
        return f"{Path(self.origin).name}, {self.settings['sampler']}, {self.settings['steps']} steps{guided}"

    @property
    def seconds(self) -> float:
        """That drawing takes per picture, text encoders and autoencoder included, as measured so far; NaN
        before the first.

        The first batch, in which a device warms up, counts only where it is the only one.
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


def drawn(spec: Mapping[str, Any], classes: Sequence[str] | None = None) -> Drawn:
    """From {"run": FOLDER, "n": ...}, a model trained here, or {"weights": FILE, "prompts": FILE or list}, a
    published one.

    The other settings are those of `plain-diffusion samplers --help`. Of a run, classes are drawn in turn, or
    these `classes`, by name; of prompts, the prompts, as often as n asks for, by default each once.
    ValueError or OSError in one line for settings that do not fit, before anything is drawn.
    """
    values = check_mapping("what is to be drawn", spec)
    if ("run" in values) == ("weights" in values):
        raise ValueError(
            "say what draws: run, a model trained here, or weights and prompts, a published model"
        )
    if classes is not None and "run" not in values:
        raise ValueError("a published model draws prompts, and no classes: leave classes out")
    return _of_run(values, classes) if "run" in values else _of_prompts(values)


def _of_run(spec: dict[str, Any], classes: Sequence[str] | None) -> Drawn:
    check_names(
        "setting of what a run draws",
        spec,
        [field.name for field in fields(SampleParams) if field.name not in ELSEWHERE],
    )
    if "n" not in spec:
        raise ValueError("say how many pictures to draw: n: 10000, say")
    params = make_params("", SampleParams, spec)
    model = models.load(params.run, ema=params.ema, trust=params.trust)
    if model.text is not None or getattr(model.network.params, "context_dim", None) is not None:
        raise ValueError(
            f"{params.run} is a model that takes prompts: weights: {params.run} and prompts: draw with it"
        )
    check_sha256("run", params.run, params.with_defaults(model).sha256, params.sha256)
    model.network.to(find_device(params.device)).eval().requires_grad_(False)
    return drawn_by(model, params, classes)


def drawn_by(model: Model, params: SampleParams, classes: Sequence[str] | None = None) -> Drawn:
    """By a model that takes no prompts, as it is and where it is, without its own folder: while it is
    trained, say.

    Of `params` what belongs to files is not looked at, but `run` as what results call it. ValueError for
    settings that do not fit.
    """
    params, device = params.with_defaults(model), next(model.network.parameters()).device
    how = usage(model, params.sampler, params.steps, params.grid, params.guidance)
    check_call(str(how.sampler), find_sampler(how.sampler), 3, params.options)
    grid = how.levels(model)
    numbers = label_cycle(model, params)
    names = [
        str(name) for name in model.spec.get("classes") or range(model.num_classes or 0)
    ]  # as a reference's class folders are called
    if classes is not None:
        check_names("class of the model", classes, names)
        numbers = [names.index(name) for name in classes]
    labels = None if numbers is None else [numbers[i % len(numbers)] for i in range(params.n)]

    def draw(model: Model, indices: Sequence[int]) -> Tensor:
        denoiser = class_denoiser(model, params.guidance, params.clip, params.guide)
        condition = (
            NONE
            if labels is None
            else Condition(label=torch.tensor([labels[i] for i in indices], device=device))
        )
        seeds = [params.seed + i for i in indices]
        with compiled(model.network, params.compile):
            run: dict[str, Any] = {
                "shape": model.shape,
                "seeds": seeds,
                "condition": condition,
                "device": device,
                **params.options,
            }
            return to_uint8(sample(how.sampler, denoiser, grid, **run))

    settings = _settings(params, grid=how.grid, steps=grid.steps, fingerprint=params.sha256["run"])
    called = None if labels is None else [names[label] for label in labels]
    return Drawn(
        model, draw, settings, n=params.n, origin=params.run, batch_size=params.batch_size, labels=called
    )


def _of_prompts(spec: dict[str, Any]) -> Drawn:
    known = [field.name for field in fields(TextToImageParams) if field.name not in ELSEWHERE | ONE_EACH]
    check_names("setting of what prompts draw", spec, [*known, "prompts"])
    given = spec.pop("prompts", None)
    if given is None:
        raise ValueError("say what to draw: prompts: FILE, or a list of them")
    check_type("prompts", given, str | Sequence[str])
    prompts = list_prompts(given) if isinstance(given, str) else list(given)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"prompts must be at least one, and none of them empty, not {str(prompts)[:80]}")
    params = make_params("", TextToImageParams, {"n": len(prompts), **spec, "prompt": "", "progress": False})
    model = load_model(params, "weights")
    params = with_defaults(params, model, None, None)
    for part, name in dtypes(params).items():
        if part in model.parts:
            model.parts[part].to(DTYPES[name])
    repeated = [prompts[i % len(prompts)] for i in range(params.n)]
    options = {**generate_arguments(params), **params.options}

    def draw(model: Model, indices: Sequence[int]) -> Tensor:
        seeds = [params.seed + i for i in indices]
        return to_uint8(generate(model, [repeated[i] for i in indices], seeds=seeds, **options), low=0.0)

    sha256 = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    settings = _settings(params, prompts=sha256, fingerprint=params.sha256["weights"])
    return Drawn(
        model,
        draw,
        settings,
        n=params.n,
        origin=", ".join(params.weights),
        batch_size=params.batch_size,
        prompts=repeated,
    )


def _settings(params: SampleParams | TextToImageParams, **more: Any) -> dict[str, Any]:
    """What pictures depend on, as plain values."""
    left = {*of_kind(type(params), "place", "rounding", "count", "weights"), *ONE_EACH, "sha256"}
    return {**{name: value for name, value in asdict(params).items() if name not in left}, **more}
