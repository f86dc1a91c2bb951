"""Prompts to image files: `plain-diffusion samplers weights=... prompt=...`, or with a plain dictionary."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import ceil, sqrt
from os.path import expanduser
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import models
from diffusion.outside import trust
from diffusion.settings import of_kind, recorded, setting
from diffusion.spec import check_at_least_one, check_call, check_names, check_type, make_params
from models import PUBLISHED, Model
from models.adapters import sha256_of_adapters
from models.device import find_device
from models.files.text import sha256_of_file
from samplers.generate import HANDOVER, generate, image_size, preview
from samplers.pictures import MAX_PIXELS, read_image, read_mask, save_png, scale_and_crop, tile
from samplers.prompting import vector_numbers
from samplers.provenance import provenance
from samplers.reference import two_scales, usual_strength
from samplers.results import (
    ImageRecord,
    Outcome,
    check_folder,
    check_sha256,
    drop_nulls,
    fill_folder,
    sibling_folder,
)
from samplers.sample import find_sampler
from samplers.settings import DrawParams
from samplers.solver import Step
from samplers.steering import IMAGE_SCALE
from samplers.usage import usage

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
PARTS = ("backbone", "vae", "text")


@dataclass(frozen=True, kw_only=True)
class TextToImageParams(DrawParams):
    """What to draw, and with which published model. None stands for the model's default."""

    weights: str | tuple[str, ...] = setting(
        ...,
        "a file, a diffusers folder, or a list of the parts: [unet.safetensors,vae.safetensors,...]; "
        "`plain-diffusion models download NAME` fetches published ones",
        kind="weights",
    )
    prompt: str = setting(
        ...,
        "everything after = is text, with its commas and brackets",
        text="text",
        heading="With weights: what to draw",
    )
    negative: str | None = setting(None, 'negative prompt; null: the family\'s own "no prompt"', text="text")
    weighted: bool = setting(False, 'true: read weights, "a (red:1.3) cat"')
    long: Literal["chunk", "cut"] = setting(
        "chunk", "prompts of more than 75 tokens: chunk (null) reads them in pieces, cut warns and cuts them"
    )
    clip_skip: int | None = setting(
        None, "number of last CLIP blocks to skip, as in diffusers: 1 is what A1111 calls 2; null: 0"
    )
    height: int | None = setting(None, "in pixels; null: the image's, or what the model was trained on")
    width: int | None = setting(None, "in pixels")
    image: str | None = setting(
        None,
        "a picture to begin from, or to edit; scaled and cropped to height and width if they are given",
        kind="picture",
    )
    mask: str | None = setting(None, "a picture of the same size, white where to paint", kind="picture")
    max_pixels: int = setting(MAX_PIXELS, f"limit of image and mask; null: {MAX_PIXELS}", kind="place")
    strength: float | None = setting(
        None, "how much of the image to change, in (0, 1]; null: 0.75, or 1 with a mask"
    )
    image_guidance: float | None = setting(
        None, "how closely a network that edits (pix2pix) keeps to its image; null: 1.5"
    )
    true_cfg: float | None = setting(
        None,
        "classifier-free guidance for networks that take guidance as an input (FLUX.1 dev, LCM); null: off",
    )
    numbers: dict[str, float] = setting(
        dict, "SDXL's height, width, top, left, target_height, target_width, score: +numbers.top=256"
    )
    family: str | None = setting(
        None,
        "if the weights do not show it: sdxl-turbo, lcm-sdxl, ... (--help family)",
        heading="With weights: the model",
    )
    prediction: str | None = setting(None, "eps or v, if the guess is wrong")
    zero_snr: bool | None = setting(
        None, "true: the schedule ends in pure noise (zero terminal SNR), if the files do not say so"
    )
    variant: str | None = setting(None, "of the files in a diffusers folder: fp16, ...")
    dtype: str | dict[str, str] | None = setting(
        None, "fp32, bf16, fp16, or by part {backbone: bf16, vae: fp32}; null: as in the files"
    )
    adapters: str | tuple[str, ...] | None = setting(
        None,
        "LoRA and its kin, each with its strength, or 1: [style.safetensors:0.7,lcm.safetensors]",
        kind="weights",
    )
    strengths: tuple[float, ...] | None = setting(
        None, "of the adapters, as pictures record them; adapters=[FILE:0.7,...] sets both"
    )
    apart: bool = setting(
        False,
        "true: adapters stay apart from the weights, as packed ones and memory=... need",
        kind="rounding",
    )
    refiner: str | tuple[str, ...] | None = setting(
        None, "weights of a second model for the last steps (SDXL's refiner)", kind="weights"
    )
    handover: float | None = setting(
        None, "share of the schedule's time after which the refiner takes over; null: 0.8"
    )
    tile: int | None = setting(None, "side of the autoencoder's tiles in latents, to save memory")
    memory: str | int | None = setting(
        None,
        "6GB: limit of this process; blocks of transformers that do not fit are read when they are needed",
        kind="place",
    )
    offload: bool = setting(False, "true: each part is on the device only while it works", kind="place")
    preview: int | None = setting(
        None, "write preview.png, the expected images, every so many steps; null: never", kind="place"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "preview")
        if self.handover is not None and self.refiner is None:
            raise ValueError("handover is for a refiner: give refiner=FILE too, or leave it out")
        adapters = _paths(self.adapters)
        if len(set(adapters)) < len(adapters):
            raise ValueError(f"adapters names a file twice ({', '.join(adapters)}): give it once")
        if self.strengths and len(self.strengths) != len(adapters):
            raise ValueError("each adapter has one strength: adapters=[FILE:0.7,FILE:1]")
        check_names("part of a model", dtypes(self), PARTS)
        check_names("dtype", dtypes(self).values(), DTYPES)

    @property
    def shared(self) -> dict[str, Any]:
        """What all images in one folder share; files by their content, wherever they are."""
        others = (*of_kind(type(self), "place", "rounding", "count", "weights", "picture"), "seed")
        return {key: value for key, value in drop_nulls(asdict(self)).items() if key not in others}

    @property
    def folder(self) -> Path:
        """`out`, or samples/PROMPT-1f2e3d4c, whose hash tells settings apart."""
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:40].strip("-") or "no-prompt"
        digest = hashlib.sha256(json.dumps(self.shared, sort_keys=True).encode()).hexdigest()
        return Path("samples") / f"{words}-{digest[:8]}" if self.out is None else Path(self.out)


def split_strengths(config: Mapping[str, Any]) -> dict[str, Any]:
    """adapters=[style.safetensors:0.7] as adapters and strengths: files may move, strengths change images."""
    given = config.get("adapters")
    if not given or config.get("strengths"):
        return dict(config)
    check_type("adapters", given, str | list[str])
    each_given = [given] if isinstance(given, str) else given
    pairs = [re.fullmatch(r"(.*?)(?::([+-]?(?:\d+\.?\d*|\.\d+)))?", each, re.DOTALL) for each in each_given]
    found = [(pair[1], float(pair[2] or 1)) for pair in pairs if pair]
    return {**config, "adapters": [path for path, _ in found], "strengths": [value for _, value in found]}


def text_to_image(config: Mapping[str, Any]) -> Path:
    """Draws from a configuration (`plain-diffusion samplers --help`); returns the folder (`fill_folder`).

    Images are named by seed. ValueError if the folder holds images of other settings.
    """
    trust(config)
    return draw(make_params("", TextToImageParams, split_strengths(drop_nulls(config)))).out


def draw(params: TextToImageParams, only: int | None = None) -> Outcome:
    """Like `text_to_image`, with parameters; only: save just the image of that seed, drawn in its batch."""
    model = load_model(params, "weights")
    refiner = None if params.refiner is None else load_model(params, "refiner")
    image, mask = _pictures(params, model)
    params = with_defaults(params, model, refiner, image)
    if params.adapters:
        model = models.adapted(
            model, dict(zip(params.adapters, params.strengths or (), strict=True)), apart=params.apart
        )
    out = params.folder if only is None or params.out else sibling_folder(params.folder)
    check_folder(out, params.shared)
    for part, name in dtypes(params).items():
        for each in (model, *([] if refiner is None else [refiner])):
            if part in each.parts:
                each.parts[part].to(DTYPES[name])
    about = {**provenance(), "model": _describe(model)}
    names = recorded(TextToImageParams)
    settings = {key: value for key, value in drop_nulls(asdict(params)).items() if key in names}
    settings["provenance"] = about
    watch = None if params.preview is None else partial(_show, model, out / "preview.png", params.preview)
    given = {"image": image, "mask": mask, "refiner": refiner, "watch": watch}
    records = _draw(params, settings, only, model, **given)
    return Outcome(out, fill_folder(out, params.shared, about, records, columns=ceil(sqrt(params.n)), low=0))


def _draw(
    params: TextToImageParams, settings: Mapping[str, Any], only: int | None, model: Model, **given: Any
) -> Iterator[ImageRecord]:
    """The images one by one, drawn in batches, so that each batch is saved before the next."""
    for first in range(0, params.n, params.batch_size):
        seeds = range(params.seed + first, params.seed + min(first + params.batch_size, params.n))
        how = {**given, **generate_arguments(params), **params.options}
        images = generate(model, params.prompt, seeds=seeds, **how)
        batch = {"seed": seeds[0], "n": len(seeds)}
        for image, seed in zip(images, seeds, strict=True):
            if only in (None, seed):
                yield ImageRecord(image, f"{seed:06d}", {**settings, "seed": seed, "batch": batch})


def _show(model: Model, path: Path, every: int, step: Step) -> None:
    """Writes what the model expects of a batch, every so many steps."""
    if (step.i + 1) % every == 0:
        images = preview(model, step).cpu()
        save_png(tile(images, ceil(sqrt(len(images)))), path, {"step": step.i + 1}, low=0.0)


READ_BEFORE = {*of_kind(TextToImageParams, "weights", "picture"), "options"}
GENERATE_NAMES = inspect.signature(generate).parameters.keys() - READ_BEFORE


def generate_arguments(params: TextToImageParams) -> dict[str, Any]:
    """The settings that `generate` takes unchanged; pictures, models and options are passed separately."""
    values = {name: getattr(params, name, None) for name in GENERATE_NAMES}
    return {name: value for name, value in values.items() if value is not None}


def load_model(params: TextToImageParams, key: Literal["weights", "refiner"]) -> Model:
    """A model in the dtype of its files."""
    paths = _paths(getattr(params, key))
    for path in paths:
        if path in PUBLISHED and not Path(path).exists():
            family = PUBLISHED[path].family
            how = f" (sample it with family={family})" if family else ""
            command = f"`plain-diffusion models download {path}` fetches that model and says where to"
            raise FileNotFoundError(f"no such file or folder: {path}; {command}{how}")
    names = ("family", "prediction", "zero_snr") if key == "weights" else ()
    options = {name: getattr(params, name) for name in names}
    model = models.load(*paths, ema=params.ema, variant=params.variant, memory=params.memory, **options)
    if model.text is None and getattr(model.network.params, "context_dim", None) is None:
        raise ValueError(f"{paths[0]} takes no prompts: draw with run={paths[0]}")
    return model


def _paths(files: str | Sequence[str] | None) -> list[str]:
    """Absolute paths of files that exist; others unchanged."""
    paths = [expanduser(path) for path in ([files] if isinstance(files, str) else files or [])]
    return [str(Path(path).absolute()) if path and Path(path).exists() else path for path in paths]


def _pictures(params: TextToImageParams, model: Model) -> tuple[Tensor | None, Tensor | None]:
    """The image and the mask, scaled and cropped to height and width if those are given."""
    image = None if params.image is None else read_image(params.image, max_pixels=params.max_pixels)
    mask = None if params.mask is None else read_mask(params.mask, max_pixels=params.max_pixels)
    if image is None or mask is None or image.shape[2:] == mask.shape[2:]:
        unset = params.height is None and params.width is None
        size = None if unset else image_size(model, params.height, params.width)
        image = None if image is None else scale_and_crop(image, size)
        return image, None if mask is None else scale_and_crop(mask, size)
    sizes = ["x".join(map(str, picture.shape[2:])) for picture in (mask, image)]
    both = f"{params.mask} is {sizes[0]}, {params.image} {sizes[1]} (height x width)"
    raise ValueError(f"{both}: give them the same size")


def with_defaults(
    params: TextToImageParams, model: Model, refiner: Model | None, image: Tensor | None
) -> TextToImageParams:
    """With the models' defaults in place of None, and the files' hashes, which must match given ones."""
    height, width = image_size(model, params.height, params.width, image)
    how = usage(model, params.sampler, params.steps, params.grid, params.guidance)
    how.levels(model)  # so that mistakes are found before the weights are read for their SHA-256
    check_call(str(how.sampler), find_sampler(how.sampler), 3, params.options)
    numbers = {} if refiner is None else vector_numbers(refiner, (height, width))
    numbers |= vector_numbers(model, (height, width))
    strength, image_guidance = params.strength, params.image_guidance
    if image is not None and two_scales(model):
        image_guidance = IMAGE_SCALE if image_guidance is None else image_guidance
    elif image is not None and strength is None and model.role not in ("edit", "control"):
        strength = usual_strength(params.mask is not None)
    pictures = {"image": params.image, "mask": params.mask}
    files: dict[str, Any] = {
        name: str(Path(path).absolute()) for name, path in pictures.items() if path is not None
    }
    sha256 = {name: sha256_of_file(path) for name, path in files.items()} | {"weights": model.fingerprint}
    sha256 |= {} if refiner is None else {"refiner": refiner.fingerprint}
    adapters = tuple(_paths(params.adapters))
    if adapters:
        sha256["adapters"] = sha256_of_adapters(adapters)
    for name in params.sha256:
        check_sha256(name, ", ".join(_paths(getattr(params, name))), sha256, params.sha256)
    return replace(
        params, weights=tuple(_paths(params.weights)),
        refiner=None if refiner is None else tuple(_paths(params.refiner)), **files, sha256=sha256,
        height=height, width=width, sampler=str(how.sampler), steps=how.steps, grid=how.grid,
        guidance=how.guidance, numbers={**numbers, **params.numbers}, strength=strength,
        image_guidance=image_guidance, device=str(find_device(params.device)),
        handover=HANDOVER if refiner is not None and params.handover is None else params.handover,
        adapters=adapters or None, strengths=params.strengths or (1.0,) * len(adapters) or None,
    )  # fmt: skip


def dtypes(params: TextToImageParams) -> dict[str, str]:
    """The dtype of every part that is converted."""
    return dict.fromkeys(PARTS, params.dtype) if isinstance(params.dtype, str) else params.dtype or {}


def _describe(model: Model) -> str:
    """The model's family, prediction and dtypes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtypes = {name: next(part.parameters()).dtype for name, part in model.parts.items() if name in PARTS}
    parts = [f"{name} {names.get(dtype, dtype)}" for name, dtype in dtypes.items()]
    return ", ".join([model.spec.get("family", "no published family"), model.prediction.name, *parts])
