"""Text to image, image to image and inpainting with a published model: `generate`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion import Grid
from diffusion.noise import mix
from diffusion.spec import check_call, check_type
from models import Model
from models.device import find_device
from models.layers.blocks import check_compiles, compiled
from models.networks.tiling import decode_tiled, sliced
from samplers.guide import warn_unless_followed
from samplers.image_to_image import image_to_image
from samplers.prompting import Conditions, Prompts, check_numbers, encode_prompts, vector_numbers
from samplers.reference import Reference, begins_from_image, check_reference, read_reference, usual_strength
from samplers.sample import find_sampler, sample
from samplers.solver import Solver, Step
from samplers.steering import IMAGE_SCALE, Steering
from samplers.usage import usage

HANDOVER = 0.8  # share of the schedule's time before SDXL's refiner (Podell et al. 2023, section 2.5)


def generate(
    model: Model,
    prompts: str | Sequence[str],
    *,
    # What to draw
    negative: str | Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
    # How prompts are read
    weighted: bool = False,
    long: Literal["chunk", "cut"] = "chunk",
    clip_skip: int | None = None,
    numbers: Mapping[str, float] | None = None,
    # How it is sampled
    sampler: str | Solver | None = None,
    steps: int | None = None,
    grid: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    guide: Mapping[str, Any] | None = None,
    true_cfg: float | None = None,
    # From an image
    image: Tensor | None = None,
    mask: Tensor | None = None,
    strength: float | None = None,
    image_guidance: float | None = None,
    # With a second model
    refiner: Model | None = None,
    handover: float | None = None,
    # Where it is computed, and previews
    device: torch.device | str | None = None,
    offload: bool = False,
    compile: bool = False,
    tile: int | None = None,
    watch: Callable[[Step], None] | None = None,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], float32, on the CPU. None: the model's default (`spec["sampling"]`).

    What to draw
      prompts, negative  one for all images, or one each; negative None: the family's own "no prompt"
      seeds      one per image, default 0, 1, ...; one prompt with several seeds is drawn several times
      height, width  in pixels; default: the size of `image`, or what the model was trained on
    How prompts are read
      weighted   read weights in prompts: "(word:1.3)"
      long       prompts of more than 75 tokens: "chunk" reads them in pieces, "cut" drops the rest with a
                 warning. T5 (SD 3, FLUX.1) always reads up to its own length
      clip_skip  number of last CLIP blocks to skip, also for negative prompts; default 0. Counted as in
                 diffusers, which does not skip for negative prompts; 1 is what A1111 calls 2
      numbers    of SDXL's vector: height, width, top, left, target_height, target_width, score
    How it is sampled
      sampler, steps, grid, options  as in `sample` and `time_grid`
      guidance   uncond + guidance * (cond - uncond): 1 is off; 0 follows the negative prompt alone and below
                 0 leads away from the prompt, both with a warning. For networks meant without guidance
                 (Turbo, FLUX.1 [schnell]) 0 is off too, as published; those that take it as an input (FLUX.1
                 [dev], LCM) have no negative prompt
      guide      how guidance works: `GuideParams`
      true_cfg   classifier-free guidance for networks that take `guidance` as an input, with negative
                 prompts; default 1, off
    From an image
      image      (1 or B, 3, H, W) in [0, 1] to begin from; what an editing network (pix2pix) edits; the edges
                 or depths that a network follows (FLUX.1 Canny, Depth). `read_image` reads a file
      mask       (1 or B, 1, H, W) in [0, 1], 1 where to paint; for inpainting networks, and for all others by
                 `Inpainting`
      strength   share of the grid's steps to take from the image, as in `image_to_image`; default 0.75, with
                 a mask 1. Few-step networks (Turbo, LCM) start at that share of the time and take all their
                 steps from there
      image_guidance  how closely an editing network keeps to its image, default 1.5
    With a second model
      refiner    takes over after the share `handover` of the schedule's time (SDXL's refiner), default 0.8
    Where it is computed, and previews
      device     where to compute, and where the parts stay; default: where they are. offload: each part is
                 there only while it works
      compile    compile the network's blocks with torch at the first call, for a minute or so; changes images
                 by rounding only
      tile       side of the autoencoder's tiles, in latents
      watch      called with every step; `preview` makes an image of it

    An image depends on its own prompt and seed only, except for rounding. ValueError before anything is
    computed, or if a weight is not finite; FloatingPointError if samples or images are not finite.
    """
    check_type("refiner", refiner, Model | None)
    if handover is not None and refiner is None:
        raise ValueError("handover is for a refiner: give refiner too, or leave it out")
    both = [model] if refiner is None else [model, refiner]
    for each in both:
        for part in ("backbone", "text", "vae") if each is model else ("backbone", "text"):
            each.require(part)
    how = usage(model, sampler, steps, grid, guidance)
    words = Prompts.build(prompts, negative, seeds, weighted, long, clip_skip or 0)
    check_reference(model, image, mask, strength, image_guidance, len(words.seeds))
    image_scale = IMAGE_SCALE if image_guidance is None else image_guidance
    job = _Job(
        words=words,
        size=image_size(model, height, width, image),
        numbers=numbers or {},
        steering=Steering(how.guidance, image_scale, guide, true_cfg),
        place=(None if device is None else find_device(str(device)), offload),
        compile=compile,
        sampling={"sampler": how.sampler, "watch": watch, "progress": progress, **options},
    )
    job.check(both)
    warn_unless_followed(job.steering.cfg(model), "prompt", stacklevel=2)
    check_tile(tile)
    strength = usual_strength(mask is not None) if strength is None else strength
    levels = how.levels(model, job.size)
    if begins_from_image(model, image, mask, strength):
        levels = levels.tail(strength)
    cut = levels.steps if refiner is None else _handover(levels, HANDOVER if handover is None else handover)

    with torch.no_grad(), _name_bad_weight(both):
        conditions = _encode_prompts(model, job)
        for dropped in conditions.dropped:
            text = f"a prompt is longer than the text encoder reads, and its end was dropped: {dropped!r}"
            warnings.warn(text, stacklevel=2)
        reference = Reference()
        if image is not None:
            with on_device(model.require("vae"), *job.place):
                reference = read_reference(model, image, mask, strength, tile)
        latents = _sample_base(model, job, conditions, levels[: cut + 1], reference)
        if refiner is not None:
            latents = _sample_refiner(refiner, job, levels[cut:], latents, reference)
        with on_device(model.require("vae"), *job.place) as where:

            def decoded(part: Tensor) -> Tensor:
                return _image(model, part.to(where), tile).cpu()

            return sliced(decoded, latents)


def preview(model: Model, step: Step) -> Tensor:
    """The images (B, 3, H, W) in [0, 1] that a step expects, by TAESD if the model has it, else its VAE."""
    decoder: Any = model.preview or model.require("vae")
    with torch.no_grad():
        return _in_unit_range(decoder.decode(step.x0.to(next(decoder.parameters()).device)))


def image_size(
    model: Model, height: int | None = None, width: int | None = None, image: Tensor | None = None
) -> tuple[int, int]:
    """Height and width in pixels; default: those of the image, or what the model was trained on.

    ValueError for sizes that the networks cannot make, or that differ from the image's.
    """
    factor = model.require("vae").factor
    default = [side * factor for side in model.shape[-2:]] if image is None else image.shape[-2:]
    for name, side in (("height", height), ("width", width)):
        check_type(name, side, int | None)
    size = (default[0] if height is None else height, default[1] if width is None else width)
    wanted = f"{size[0]}x{size[1]} (height x width)"
    if image is not None and size != (default[0], default[1]):
        own = f"{default[0]}x{default[1]}"
        raise ValueError(f"the image is {own}, not {wanted}: resize it, or leave height and width out")
    params: Any = model.network.params
    if size[0] % factor or size[1] % factor or min(size) < factor:
        near = [max(factor, round(side / factor) * factor) for side in size]
        raise ValueError(
            f"this model makes images whose sides are positive multiples of {factor}, not {wanted}: "
            f"{near[0]}x{near[1]} is near"
        )
    only = getattr(params, "image_size", None)  # of networks for one size
    if only is not None and size != (only * factor, only * factor):
        side = only * factor
        raise ValueError(f"this model makes images of {side}x{side} pixels only, not {wanted}")
    largest = getattr(params, "largest", None)  # of networks with a table of positions
    if largest is not None and max(size) > largest * factor:
        raise ValueError(f"this model makes images of up to {largest * factor} pixels a side, not {wanted}")
    return size


@dataclass(frozen=True)
class _Job:
    """What a model and its refiner share of a call of `generate`, with defaults filled in."""

    words: Prompts
    size: tuple[int, int]
    numbers: Mapping[str, float]
    steering: Steering
    place: tuple[torch.device | None, bool]
    compile: bool
    sampling: Mapping[str, Any]

    def check(self, models: Sequence[Model]) -> None:
        """ValueError unless the models have the parts for it and can use every setting."""
        for model in models:
            self.steering.check(model, any(text is not None for text in self.words.negative))
        check_numbers(self.numbers, models)
        for model in models:
            model.require("text").check_clip_skip(self.words.clip_skip)
        if len(models) > 1:
            _check_refiner(*models)
        own, solver = ("sampler", "watch", "progress"), self.sampling["sampler"]
        options = {name: value for name, value in self.sampling.items() if name not in own}
        check_call(getattr(solver, "__name__", solver), find_sampler(solver), 3, options)
        if self.place[1] and self.place[0] is None:
            raise ValueError("offload needs the device on which parts work: give device='cuda'")
        for model in models if self.compile else ():
            check_compiles(model.network, self.place[0])


@contextmanager
def on_device(part: nn.Module, device: torch.device | None, offload: bool) -> Iterator[torch.device]:
    """Keeps a part on the device while it works (with `offload` on the CPU otherwise); yields the device.

    On the CPU its weights remain meanwhile, because nothing changes them: they are not copied back, and
    mapped weights stay mapped.
    """
    weights = [(parameter, parameter.data.cpu()) for parameter in part.parameters()] if offload else []
    buffers = [(module, dict(module._buffers)) for module in part.modules()] if offload else []
    try:
        yield next(part.to(device).parameters()).device
    finally:
        for parameter, data in weights:
            parameter.data = data
        for module, own in buffers:  # moving has replaced them
            module._buffers |= {name: value if value is None else value.cpu() for name, value in own.items()}


@contextmanager
def _name_bad_weight(models: Sequence[Model]) -> Iterator[None]:
    """Turns a FloatingPointError into a ValueError that names the weight, if a weight is not finite.

    Loading does not read all weights, so it cannot know.
    """
    try:
        yield
    except FloatingPointError:
        for model in models:
            model.check_finite()
        raise


def _encode_prompts(model: Model, job: _Job) -> Conditions:
    """The conditions of the network, from the prompts."""
    numbers = vector_numbers(model, job.size, job.numbers)
    with on_device(model.require("text"), *job.place):
        return encode_prompts(model, job.words, numbers, job.steering.needs_null(model))


@contextmanager
def _network_on_device(network: nn.Module, job: _Job) -> Iterator[torch.device]:
    """The network on its device, compiled if wanted."""
    with on_device(network, *job.place) as where, compiled(network, job.compile):
        yield where


def _sample_base(
    model: Model, job: _Job, conditions: Conditions, levels: Grid, reference: Reference
) -> Tensor:
    """The latents at the last of the levels, from noise or from the reference."""
    with _network_on_device(model.network, job) as where:
        denoiser, condition = job.steering.denoiser(model, conditions.to(where), reference.to(where))
        run: dict[str, Any] = {**job.sampling, "seeds": job.words.seeds, "condition": condition}
        if reference.start is not None:
            return image_to_image(denoiser, reference.start.to(where), levels, 1.0, **run)
        shape = model.require("vae").latent_shape(*job.size)
        return sample(run.pop("sampler"), denoiser, levels, shape=shape, device=where, **run)


def _sample_refiner(refiner: Model, job: _Job, levels: Grid, latents: Tensor, reference: Reference) -> Tensor:
    """The latents after the refiner's levels; its noise differs from that of the first model's steps."""
    conditions = _encode_prompts(refiner, job)
    with _network_on_device(refiner.network, job) as where:
        denoiser, condition = job.steering.denoiser(refiner, conditions.to(where), reference.to(where))
        seeds = [mix(seed, 1) for seed in job.words.seeds]
        run = {**job.sampling, "seeds": seeds, "condition": condition}
        return sample(run.pop("sampler"), denoiser, levels, start=latents.to(where), **run)


def _handover(levels: Grid, share: float) -> int:
    """The number of steps before the refiner: those above the last `1 - share` of the schedule's time."""
    check_type("handover", share, float)
    if not 0 < share < 1:
        raise ValueError(f"handover is a share of the schedule's time in (0, 1), not {share:g}")
    schedule = levels.schedule
    at = schedule.t_data + (1 - share) * (schedule.t_max - schedule.t_data)
    cut = sum(level.t > at + 1e-9 for level in levels.levels[:-1])  # a step from `at` is the refiner's
    if not 0 < cut < levels.steps:
        idle = f"with handover={share:g} the {'first model' if cut == 0 else 'refiner'}"
        raise ValueError(f"{idle} has none of the {levels.steps} steps: give another, or one model only")
    return cut


def _check_refiner(model: Model, refiner: Model) -> None:
    """ValueError unless the refiner can continue what the model has begun."""
    if refiner.image_channels:
        raise ValueError("this refiner also takes an image: use a plain text-to-image model")

    def units(each: Model) -> Any:
        return None if each.vae is None else (each.vae.params.origin, each.vae.params.unit)

    same = refiner.vae is None or units(model) == units(refiner)
    if model.shape[0] != refiner.shape[0] or not same:
        raise ValueError("model and refiner differ in their latents: give a refiner of the same family")
    if refiner.spec["schedule"] != model.spec["schedule"]:
        raise ValueError("model and refiner differ in their schedules: give a refiner of the same family")


def check_tile(tile: int | None) -> None:
    """ValueError unless tile is None or at least 1."""
    check_type("tile", tile, int | None)
    if tile is not None and tile < 1:
        raise ValueError(f"tile (in latents) must be at least 1, not {tile}")


def _image(model: Model, latents: Tensor, tile: int | None) -> Tensor:
    vae = model.require("vae")
    images = vae.decode(latents) if tile is None else decode_tiled(vae, latents, tile, tile // 4)
    return _in_unit_range(images)


def _in_unit_range(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], clipped."""
    return ((images.float() + 1) / 2).clamp(0, 1)
