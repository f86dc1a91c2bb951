"""Prompts to image files: what `plain-diffusion samplers weights=... prompt=...` does, callable with a plain dictionary."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil, sqrt
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import models
from diffusion.noise import check_seed
from diffusion.spec import check_at_least_one, check_call, check_names, make_params
from models import PUBLISHED, Model
from models.device import find_device
from models.files.text import sha256_of_file
from samplers.generate import HANDOVER, generate, image_size
from samplers.pictures import MAX_PIXELS, covering, read_image, read_mask
from samplers.prompting import vector_numbers
from samplers.provenance import provenance
from samplers.reference import two_scales, usual_strength
from samplers.results import Drawn, Outcome, beside, check_folder, check_same, fill_folder, given
from samplers.sample import find_sampler
from samplers.settings import COUNT, PICTURE, PLACE, ROUNDING, WEIGHTS, named, recorded
from samplers.steering import IMAGE_SCALE
from samplers.usage import usage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
PARTS = ("backbone", "vae", "text")
ASKED = (
    "negative", "steps", "guidance", "sampler", "grid", "guide", "height", "width", "strength", "image_guidance", "true_cfg",
    "weighted", "long", "clip_skip", "numbers", "handover", "device", "offload", "compile", "tile", "progress",
)  # fmt: skip


@dataclass(frozen=True)
class TextToImageParams:
    """What to draw, and with which model: see configs/samplers. None stands for what the model is meant for.

    sha256  of the files that these settings name (of weights, as the model has them), which then have to be these
    """

    weights: str | tuple[str, ...] = field(metadata=WEIGHTS)
    prompt: str
    negative: str | None = None
    family: str | None = None
    prediction: str | None = None
    zero_snr: bool | None = None
    variant: str | None = None
    ema: bool = True
    dtype: str | dict[str, str] | None = None
    refiner: str | tuple[str, ...] | None = field(default=None, metadata=WEIGHTS)
    handover: float | None = None
    image: str | None = field(default=None, metadata=PICTURE)
    mask: str | None = field(default=None, metadata=PICTURE)
    max_pixels: int = field(default=MAX_PIXELS, metadata=PLACE)
    strength: float | None = None
    image_guidance: float | None = None
    true_cfg: float | None = None
    height: int | None = None
    width: int | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    weighted: bool = False
    long: Literal["chunk", "cut"] = "chunk"
    clip_skip: int | None = None
    n: int = field(default=1, metadata=COUNT)
    seed: int = 0
    sampler: str | None = None
    steps: int | None = None
    grid: dict[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    guide: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    tile: int | None = None
    batch_size: int = field(default=4, metadata=COUNT)
    memory: str | int | None = field(default=None, metadata=PLACE)
    offload: bool = field(default=False, metadata=PLACE)
    device: str | None = field(default=None, metadata=ROUNDING)
    compile: bool = field(default=False, metadata=ROUNDING)
    out: str | None = field(default=None, metadata=PLACE)
    progress: bool = field(default=True, metadata=PLACE)
    sha256: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_at_least_one(self, "n", "batch_size")
        check_seed(self.seed, self.n)
        check_names("file that has a SHA-256", self.sha256, named(type(self), WEIGHTS, PICTURE))
        if self.handover is not None and self.refiner is None:
            raise ValueError("handover says when a refiner takes over: give refiner=FILE too, or leave it out")
        check_names("part of a model", dtypes(self), PARTS)
        check_names("dtype", dtypes(self).values(), DTYPES)

    @property
    def kept(self) -> dict[str, Any]:
        """What all images in one folder have in common; files by what they hold, wherever they lie."""
        others = (*named(type(self), PLACE, ROUNDING, COUNT, WEIGHTS, PICTURE), "seed")
        return {key: value for key, value in given(asdict(self)).items() if key not in others}

    @property
    def folder(self) -> Path:
        """`out`, or samples/PROMPT-1f2e3d4c, whose end tells one set of settings from another."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:40].strip("-") or "no-prompt"
        digest = hashlib.sha256(json.dumps(self.kept, sort_keys=True).encode()).hexdigest()
        return Path("samples") / f"{words}-{digest[:8]}" if self.out is None else Path(self.out)


def text_to_image(config: Mapping[str, Any]) -> Path:
    """Draw as the configuration says (see configs/samplers); the folder of the results, see `fill_folder`.

    Images are named by their seeds. Images of other settings that are in that folder are never mixed with these: ValueError.
    """
    return draw(make_params("", TextToImageParams, given(config))).out


def draw(params: TextToImageParams, only: int | None = None) -> Outcome:
    """What `text_to_image` does, with parameters of its own; `only`: the image of that seed is saved, and those beside it are not."""
    model, refiner = loaded(params, "weights"), None if params.refiner is None else loaded(params, "refiner")
    image, mask = _pictures(params, model)
    params = completed(params, model, refiner, image)
    out = params.folder if only is None or params.out else beside(params.folder)
    check_folder(out, params.kept)
    for part, name in dtypes(params).items():
        for each in (model, *([] if refiner is None else [refiner])):
            if part in each.parts:
                each.parts[part].to(DTYPES[name])
    about = {**provenance(), "model": _said(model)}
    settings = {key: value for key, value in given(asdict(params)).items() if key in recorded(TextToImageParams)}
    drawn = _draw(params, {**settings, "provenance": about}, only, model, image=image, mask=mask, refiner=refiner)
    return Outcome(out, fill_folder(out, params.kept, about, drawn, columns=ceil(sqrt(params.n)), low=0))


def _draw(params: TextToImageParams, settings: Mapping[str, Any], only: int | None, model: Model, **given: Any) -> Iterator[Drawn]:
    """The images one after the other, drawn a batch at a time: what is drawn can be saved before the rest is."""
    asked = {name: value for name in ASKED if (value := getattr(params, name)) is not None}
    for first in range(0, params.n, params.batch_size):
        seeds = range(params.seed + first, params.seed + min(first + params.batch_size, params.n))
        images = generate(model, params.prompt, seeds=seeds, **given, **asked, **params.options)
        for image, seed in zip(images, seeds, strict=True):
            if only in (None, seed):
                yield Drawn(image, f"{seed:06d}", {**settings, "seed": seed, "batch": {"seed": seeds[0], "n": len(seeds)}})


def loaded(params: TextToImageParams, key: Literal["weights", "refiner"]) -> Model:
    """A model in the dtype of its files."""
    paths = _paths(getattr(params, key))
    for path in paths:
        if path in PUBLISHED and not Path(path).exists():
            how = f" (sample it with family={PUBLISHED[path].family})" if PUBLISHED[path].family else ""
            raise FileNotFoundError(
                f"no such file or folder: {path}; `plain-diffusion models download {path}` fetches that model and says where to{how}"
            )
    options = {name: getattr(params, name) for name in ("family", "prediction", "zero_snr")} if key == "weights" else {}
    model = models.load(*paths, ema=params.ema, variant=params.variant, memory=params.memory, **options)
    if model.text is None and getattr(model.network.params, "context_dim", None) is None:
        raise ValueError(f"{paths[0]} is a model that takes no prompts: run={paths[0]} samples it")
    return model


def _paths(given: str | Sequence[str] | None) -> list[str]:
    """Absolute, where such files are there; names of files that are not, as they are."""
    paths = [expanduser(path) for path in ([given] if isinstance(given, str) else given or [])]
    return [str(Path(path).absolute()) if path and Path(path).exists() else path for path in paths]


def _pictures(params: TextToImageParams, model: Model) -> tuple[Tensor | None, Tensor | None]:
    """The image and the mask, made to cover the size that is asked for, if one is."""
    image = None if params.image is None else read_image(params.image, max_pixels=params.max_pixels)
    mask = None if params.mask is None else read_mask(params.mask, max_pixels=params.max_pixels)
    if image is None or mask is None or image.shape[2:] == mask.shape[2:]:
        size = None if params.height is None and params.width is None else image_size(model, params.height, params.width)
        return None if image is None else covering(image, size), None if mask is None else covering(mask, size)
    sizes = ["x".join(map(str, picture.shape[2:])) for picture in (mask, image)]
    raise ValueError(f"{params.mask} is {sizes[0]}, {params.image} {sizes[1]} (height x width): a mask has the size of its image")


def completed(params: TextToImageParams, model: Model, refiner: Model | None, image: Tensor | None) -> TextToImageParams:
    """With the models' defaults for settings that are not given, and the hashes of the files. ValueError if given hashes differ."""
    height, width = image_size(model, params.height, params.width, image)
    how = usage(model, params.sampler, params.steps, params.grid, params.guidance)
    how.levels(model)  # mistakes here and in the options are found before the weights are read for their SHA-256
    check_call(how.sampler, find_sampler(how.sampler), 3, params.options)
    numbers = {**({} if refiner is None else vector_numbers(refiner, (height, width))), **vector_numbers(model, (height, width))}
    strength, image_guidance = params.strength, params.image_guidance
    if image is not None and two_scales(model):
        image_guidance = IMAGE_SCALE if image_guidance is None else image_guidance
    elif image is not None and strength is None and model.role not in ("edit", "control"):
        strength = usual_strength(params.mask is not None)
    files: dict[str, Any] = {name: str(Path(path).absolute()) for name in ("image", "mask") if (path := getattr(params, name)) is not None}
    sha256 = {name: sha256_of_file(path) for name, path in files.items()}
    sha256 |= {name: each.fingerprint for name, each in (("weights", model), ("refiner", refiner)) if each is not None}
    for name in params.sha256:
        check_same(name, ", ".join(_paths(getattr(params, name))), sha256, params.sha256)
    return replace(
        params, weights=tuple(_paths(params.weights)), refiner=None if refiner is None else tuple(_paths(params.refiner)), **files,
        sha256=sha256, height=height, width=width, sampler=how.sampler, steps=how.steps, grid=how.grid, guidance=how.guidance,
        numbers={**numbers, **params.numbers}, strength=strength, image_guidance=image_guidance,
        handover=HANDOVER if refiner is not None and params.handover is None else params.handover, device=str(find_device(params.device)),
    )  # fmt: skip


def dtypes(params: TextToImageParams) -> dict[str, str]:
    """The dtype of every part whose dtype is not that of its file."""
    return dict.fromkeys(PARTS, params.dtype) if isinstance(params.dtype, str) else params.dtype or {}


def _said(model: Model) -> str:
    """Which family, what it predicts, and in what it computes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtypes = {name: next(part.parameters()).dtype for name, part in model.parts.items() if name in PARTS}
    family = model.spec.get("family", "no published family")
    return f"{family}, {model.prediction.name}, " + ", ".join(f"{name} {names.get(dtype, dtype)}" for name, dtype in dtypes.items())
