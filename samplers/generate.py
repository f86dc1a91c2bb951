"""Text to image, image to image and inpainting with a published model: `generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion import ComposedGuidance, DenoiserLike, Grid, Inpainting
from diffusion.noise import mix
from models import Model
from models.tiling import decode_tiled, sliced
from samplers.guide import guided, limited
from samplers.image_to_image import image_to_image
from samplers.prompting import Prompts, conditions, guidance_condition
from samplers.reference import Reference, check_reference, edits, read_reference
from samplers.sample import sample
from samplers.solver import Step

Device = torch.device | str | None


@torch.no_grad()
def generate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    negative: str | Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str | None = None,
    grid: Mapping[str, Any] | None = None,
    guide: Mapping[str, Any] | None = None,
    height: int | None = None,
    width: int | None = None,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    strength: float | None = None,
    image_guidance: float = 1.5,
    weighted: bool = False,
    long: Literal["chunk", "cut"] = "chunk",
    numbers: Mapping[str, float] | None = None,
    refiner: Model | None = None,
    handover: float = 0.8,
    device: Device = None,
    offload: bool = False,
    tile: int | None = None,
    watch: Callable[[Step], None] | None = None,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], float32, on the CPU. What is None is as the model is meant to be used (`model.spec["sampling"]`).

    prompts, negative  one for all images, or one each; negative None is the family's own "no prompt"
    seeds      one per image, default 0, 1, ...; one prompt with several seeds is drawn several times
    steps, sampler, grid, guidance, guide, options  as in `sample`, `time_grid` and `GuideParams`; guidance 1 is off
    height, width  in pixels; default what the model was trained on, or the size of `image`
    image      (1 or B, 3, H, W) in [0, 1] to begin from; for a network that edits (pix2pix) what it edits
    mask       (1 or B, 1, H, W) in [0, 1], 1 where to paint; by a network for inpainting, or with any other by `Inpainting`
    strength   share of the grid's steps taken from the image on, as in `image_to_image`; default 0.75, with a mask 1
    image_guidance  how closely a network that edits stays with its image
    weighted   read weights in prompts: "(word:1.3)"; long: see `Prompts`
    numbers    of SDXL's vector, where not as usual: height, width, top, left, target_height, target_width, score
    refiner    a model that takes over when the share `handover` of the schedule's time has passed (SDXL's refiner)
    device     where to compute, default where the parts are; offload: each part is there only while it works
    tile       decode in tiles of so many latents
    watch      called with every step; `preview` makes an image of one

    Raises ValueError before anything is computed; FloatingPointError for samples or images that are not finite.
    """
    usual = model.spec.get("sampling", {})
    order = _Order(
        words=Prompts.of(prompts, negative, seeds, weighted, long),
        size=image_size(model, height, width, image),
        numbers=numbers,
        scale=usual.get("guidance", 1.0) if guidance is None else guidance,
        image_scale=image_guidance,
        guide=guide,
        strength=strength if strength is not None else 0.75 if mask is None else 1.0,
        place=(device, offload),
        sampling={"sampler": sampler or usual.get("sampler", "ddim"), "watch": watch, "progress": progress, **options},
    )
    check_reference(model, image, mask, len(order.words.seeds))
    for each in (model, *([refiner] if refiner else [])):
        each.require("text"), each.network  # before anything is computed
    levels = model.grid(steps or usual.get("steps", 50), **(grid or {}))
    cut = levels.steps if refiner is None else _handover(levels, handover)
    with placed(model.require("vae"), *order.place):
        reference = read_reference(model, image, mask, order.strength)
    latents = _drawn(model, order, levels[: cut + 1], reference)
    if refiner is not None and cut < levels.steps:
        latents = _refined(refiner, order, levels[cut:], latents)
    with placed(model.require("vae"), *order.place) as where:
        return sliced(lambda z: _image(model, z.to(where), tile).cpu(), latents)


@dataclass(frozen=True)
class _Order:
    """All that is asked for, and that a model and its refiner share. See `generate`."""

    words: Prompts
    size: tuple[int, int]
    numbers: Mapping[str, float] | None
    scale: float
    image_scale: float
    guide: Mapping[str, Any] | None
    strength: float
    place: tuple[Device, bool]
    sampling: Mapping[str, Any]


@contextmanager
def placed(part: nn.Module, device: Device, offload: bool) -> Iterator[torch.device]:
    """A part on the device while it works, and, if it is to be out of the way afterwards, on the CPU again; where it is."""
    if device is not None:
        part.to(device)
    yield next(part.parameters()).device
    if offload:
        part.to("cpu")


def preview(model: Model, step: Step) -> Tensor:
    """The images (B, 3, H, W) in [0, 1] that a step expects: by TAESD where the model has it, in milliseconds, else by its autoencoder."""
    decoder = model.preview or model.require("vae")
    with torch.no_grad():
        return _in_unit_range(decoder.decode(step.x0.to(next(decoder.parameters()).device)))


def _drawn(model: Model, order: _Order, levels: Grid, reference: Reference) -> Tensor:
    """The latents at the last of the levels, from noise or from the reference."""
    with placed(model.require("text"), *order.place):
        cond, null = conditions(model, order.words, order.size, order.numbers)
    with placed(model.network, *order.place) as where:
        denoiser, cond = _denoiser(model, order, reference, _on(where, cond), _on(where, null))
        run: dict[str, Any] = {**order.sampling, "seeds": order.words.seeds, "cond": cond}
        if reference.start is not None:
            return image_to_image(denoiser, reference.start.to(where), levels, order.strength, **run)
        shape = model.require("vae").latent_shape(*order.size)
        return sample(run.pop("sampler"), denoiser, levels, shape=shape, device=where, **run)


def _refined(refiner: Model, order: _Order, levels: Grid, latents: Tensor) -> Tensor:
    """The latents at the end of the levels, from those at their beginning; with other noise on the way than the first model's steps."""
    seeds = tuple(mix(seed, 1) for seed in order.words.seeds)
    with placed(refiner.require("text"), *order.place):
        cond, null = conditions(refiner, order.words, order.size)
    with placed(refiner.network, *order.place) as where:
        denoiser, cond = _denoiser(refiner, order, Reference(), _on(where, cond), _on(where, null))
        run = {**order.sampling, "seeds": seeds, "cond": cond}
        return sample(run.pop("sampler"), denoiser, levels, start=latents.to(where), **run)


def _denoiser(
    model: Model, order: _Order, reference: Reference, cond: dict[str, Tensor], null: dict[str, Tensor]
) -> tuple[DenoiserLike, dict[str, Tensor]]:
    """The denoiser, guided as the family is, and the conditions to call it with."""
    denoiser: DenoiserLike = model.denoiser()
    where, n = next(iter(cond.values())).device, len(order.words.seeds)
    if reference.beside is not None:
        beside = reference.beside.to(where).expand(n, -1, -1, -1)
        if edits(model):
            return _edit_guided(denoiser, order, cond, null, beside), {}
        cond, null = {**cond, "image": beside}, {**null, "image": beside}
    if embedded := guidance_condition(model, order.scale, n, where):
        cond, scale = {**cond, **embedded}, 1.0
    else:
        scale = order.scale
    denoiser = limited(guided(denoiser, scale, null, model.prediction, order.guide), False, order.guide)
    if reference.known is not None and reference.mask is not None:
        denoiser = Inpainting(denoiser, reference.known.to(where), reference.mask.to(where))
    return denoiser, cond


def _edit_guided(denoiser: DenoiserLike, order: _Order, cond: dict[str, Tensor], null: dict[str, Tensor], image: Tensor) -> DenoiserLike:
    """Two scales, one towards the image and one from there towards the prompt (Brooks et al. 2023, eq. 3)."""
    seen = [({"image": image}, order.image_scale - order.scale), ({**cond, "image": image}, order.scale)]
    return ComposedGuidance(denoiser, seen, {**null, "image": torch.zeros_like(image)})


def _handover(levels: Grid, share: float) -> int:
    """The number of steps before the refiner's first: those whose time lies above the last `1 - share` of the schedule's."""
    if not 0 < share <= 1:
        raise ValueError(f"the refiner takes over at a share of the schedule's time in (0, 1], not {share:g}")
    schedule = levels.schedule
    at = schedule.t_data + (1 - share) * (schedule.t_max - schedule.t_data)
    return max(1, sum(level.t >= at for level in levels[:-1]))


def image_size(model: Model, height: int | None, width: int | None, image: Tensor | None = None) -> tuple[int, int]:
    """Height and width in pixels; None is what the model was trained on. ValueError where the networks cannot make that size."""
    factor = model.require("vae").factor
    usual = (image.shape[-2], image.shape[-1]) if image is not None else (model.shape[-2] * factor, model.shape[-1] * factor)
    size = (height or usual[0], width or usual[1])
    if image is not None and size != usual:
        raise ValueError(
            f"the image is {usual[0]}x{usual[1]}, but {size[0]}x{size[1]} was asked for: resize it, or leave height and width out"
        )
    step = factor * 2 ** (len(model.network.params.channel_mult) - 1)
    if size[0] % step or size[1] % step or min(size) < step:
        near = [max(step, round(side / step) * step) for side in size]
        raise ValueError(
            f"this model makes images whose sides are multiples of {step}, not {size[0]}x{size[1]}: {near[0]}x{near[1]} is near"
        )
    return size


def _on(where: torch.device, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(where) for name, value in values.items()}


def _image(model: Model, latents: Tensor, tile: int | None) -> Tensor:
    vae = model.require("vae")
    return _in_unit_range(vae.decode(latents) if tile is None else decode_tiled(vae, latents, tile, tile // 4))


def _in_unit_range(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], what lies outside cut off."""
    return ((images.float() + 1) / 2).clamp(0, 1)
