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

# the share of the schedule's time after which SDXL's refiner was trained to take over (Podell et al. 2023,
# section 2.5)
HANDOVER = 0.8


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
    # Where it is computed, and what is seen of it
    device: torch.device | str | None = None,
    offload: bool = False,
    compile: bool = False,
    tile: int | None = None,
    watch: Callable[[Step], None] | None = None,
    progress: bool = False,
    **options: Any,
) -> Tensor:
    """Images (B, 3, H, W) in [0, 1], float32, on the CPU. What is None is as the model is meant to be used
    (`model.spec["sampling"]`).

    What to draw
      prompts, negative  one for all images, or one each; negative None is the family's own "no prompt"
      seeds      one per image, default 0, 1, ...; one prompt with several seeds is drawn several times
      height, width  in pixels; default what the model was trained on, or the size of `image`
    How prompts are read
      weighted   read weights in prompts: "(word:1.3)"
      long       of more than 75 tokens: "chunk" reads them in pieces, "cut" drops the rest with a warning
                 that names it. Where T5 reads too (SD 3, FLUX.1), it reads up to its length, and what is
                 beyond is dropped
      clip_skip  blocks of CLIP that are left out before the one that is read, for prompts, negative prompts
                 and none; default 0. As in diffusers, which leaves negative prompts as they are; 1 is what
                 A1111 calls 2
      numbers    of SDXL's vector, where not as usual: height, width, top, left, target_height, target_width,
                 score
    How it is sampled
      sampler, steps, grid, options  as in `sample` and `time_grid`
      guidance   uncond + guidance * (cond - uncond): 1 is off, the prompt alone is followed; 0 follows the
                 negative prompt alone, and below 0 leads away from the prompt, both with a warning. For
                 networks meant without guidance (Turbo, FLUX.1 [schnell]) 0 is off too, as published; those
                 that take it as an input (FLUX.1 [dev], LCM) know no negative one
      guide      how guidance works: `GuideParams`
      true_cfg   classifier-free guidance on top, for networks that take `guidance` as an input (FLUX.1 [dev],
                 LCM); default 1, off. It is what leads away from their negative prompt
    From an image
      image      (1 or B, 3, H, W) in [0, 1] to begin from; for a network that edits (pix2pix) what it edits,
                 for one that follows edges or depths (FLUX.1 Canny, Depth) a picture of these. `read_image`
                 reads a file
      mask       (1 or B, 1, H, W) in [0, 1], 1 where to paint; by a network for inpainting, or with any other
                 by `Inpainting`
      strength   share of the grid's steps taken from the image on, as in `image_to_image`; default 0.75, with
                 a mask 1. Few-step networks (Turbo, LCM) begin at that share of the time, and take all their
                 steps from there
      image_guidance  how closely a network that edits stays with its image, default 1.5
    With a second model
      refiner    takes over when the share `handover` of the schedule's time has passed (SDXL's refiner),
                 default 0.8
    Where it is computed, and what is seen of it
      device     where to compute, and where the parts stay; default where they are. offload: each is there
                 only while it works
      compile    torch compiles the network's blocks at their first call, which takes a minute or so and
                 changes images by rounding only
      tile       the autoencoder works in tiles of so many latents
      watch      called with every step; `preview` makes an image of one

    An image depends on its own prompt and seed, not on the others in its batch, but for rounding. Raises
    ValueError before anything is computed, or where a weight is not finite; FloatingPointError for samples or
    images that are not.
    """
    check_type("refiner", refiner, Model | None)
    if handover is not None and refiner is None:
        raise ValueError("handover says when a refiner takes over: give refiner too, or leave it out")
    both = [model] if refiner is None else [model, refiner]
    for each in both:
        for part in ("backbone", "text", "vae") if each is model else ("backbone", "text"):
            each.require(part)
    how = usage(model, sampler, steps, grid, guidance)
    words = Prompts.build(prompts, negative, seeds, weighted, long, clip_skip or 0)
    check_reference(model, image, mask, strength, image_guidance, len(words.seeds))
    job = _Job(
        words=words,
        size=image_size(model, height, width, image),
        numbers=numbers or {},
        steering=Steering(
            how.guidance, IMAGE_SCALE if image_guidance is None else image_guidance, guide, true_cfg
        ),
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
            warnings.warn(
                f"a prompt is longer than the text encoder reads, and its end was dropped: {dropped!r}",
                stacklevel=2,
            )
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
    """The images (B, 3, H, W) in [0, 1] that a step expects: by TAESD where the model has it, in
    milliseconds, else by its autoencoder."""
    decoder: Any = model.preview or model.require("vae")
    with torch.no_grad():
        return _in_unit_range(decoder.decode(step.x0.to(next(decoder.parameters()).device)))


def image_size(
    model: Model, height: int | None = None, width: int | None = None, image: Tensor | None = None
) -> tuple[int, int]:
    """Height and width in pixels, where not given those of the image, or what the model was trained on.

    ValueError where the networks cannot make that size, or the image has another.
    """
    factor = model.require("vae").factor
    usual = (
        (image.shape[-2], image.shape[-1])
        if image is not None
        else (model.shape[-2] * factor, model.shape[-1] * factor)
    )
    for name, side in (("height", height), ("width", width)):
        check_type(name, side, int | None)
    size = (usual[0] if height is None else height, usual[1] if width is None else width)
    if image is not None and size != usual:
        raise ValueError(
            f"the image is {usual[0]}x{usual[1]}, but {size[0]}x{size[1]} (height x width) was asked for: "
            "resize it, or leave these out"
        )
    params: Any = model.network.params
    if size[0] % factor or size[1] % factor or min(size) < factor:
        near = [max(factor, round(side / factor) * factor) for side in size]
        raise ValueError(
            f"this model makes images whose sides are multiples of {factor}, not {size[0]}x{size[1]} "
            "(height x width): "
            f"{near[0]}x{near[1]} is near"
        )
    only = getattr(params, "image_size", None)  # of networks for one size
    if only is not None and size != (only * factor, only * factor):
        raise ValueError(
            f"this model makes images of {only * factor}x{only * factor} pixels alone, not "
            f"{size[0]}x{size[1]} (height x width)"
        )
    largest = getattr(params, "largest", None)  # of networks with a table of positions
    if largest is not None and max(size) > largest * factor:
        raise ValueError(
            f"this model makes images of up to {largest * factor} pixels a side, not {size[0]}x{size[1]} "
            "(height x width)"
        )
    return size


@dataclass(frozen=True)
class _Job:
    """What is asked for, and what a model and its refiner share. See `generate`; nothing is left open
    here."""

    words: Prompts
    size: tuple[int, int]
    numbers: Mapping[str, float]
    steering: Steering
    place: tuple[torch.device | None, bool]
    compile: bool
    sampling: Mapping[str, Any]

    def check(self, models: Sequence[Model]) -> None:
        """ValueError unless the models have the parts for it, and a use for all of it."""
        for model in models:
            self.steering.check(model, any(text is not None for text in self.words.negative))
        check_numbers(self.numbers, models)
        for model in models:
            model.require("text").check_clip_skip(self.words.clip_skip)
        if len(models) > 1:
            _check_refiner(*models)
        own = ("sampler", "watch", "progress")
        solver, options = (
            self.sampling["sampler"],
            {name: value for name, value in self.sampling.items() if name not in own},
        )
        check_call(getattr(solver, "__name__", solver), find_sampler(solver), 3, options)
        if self.place[1] and self.place[0] is None:
            raise ValueError(
                "offload keeps parts on the CPU while others work elsewhere: say where, device='cuda'"
            )
        for model in models if self.compile else ():
            check_compiles(model.network, self.place[0])


@contextmanager
def on_device(part: nn.Module, device: torch.device | None, offload: bool) -> Iterator[torch.device]:
    """A part on the device while it works, and, if it is to be out of the way afterwards, on the CPU again;
    where it is.

    On the CPU its weights stay meanwhile, as nothing changes them: they are not copied back, and mapped ones
    stay mapped.
    """
    weights = [(parameter, parameter.data.cpu()) for parameter in part.parameters()] if offload else []
    tables = (
        [(module, dict(module._buffers)) for module in part.modules() if module._buffers] if offload else []
    )
    try:
        yield next(part.to(device).parameters()).device
    finally:
        for parameter, data in weights:
            parameter.data = data
        for module, buffers in tables:  # which moving has replaced
            module._buffers |= {
                name: value if value is None else value.cpu() for name, value in buffers.items()
            }


@contextmanager
def _name_bad_weight(models: Sequence[Model]) -> Iterator[None]:
    """ValueError that names the weight where what is computed is not finite because one is not: loading does
    not read all of them."""
    try:
        yield
    except FloatingPointError:
        for model in models:
            model.check_finite()
        raise


def _encode_prompts(model: Model, job: _Job) -> Conditions:
    """The conditions of the network: its prompts, encoded."""
    with on_device(model.require("text"), *job.place):
        return encode_prompts(
            model,
            job.words,
            vector_numbers(model, job.size, job.numbers),
            job.steering.needs_null(model),
        )


@contextmanager
def _network_on_device(network: nn.Module, job: _Job) -> Iterator[torch.device]:
    """The network where it computes, and compiled if it is to be."""
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
    """The latents at the end of the levels, from those at their beginning; with other noise on the way than
    the first model's steps."""
    conditions = _encode_prompts(refiner, job)
    with _network_on_device(refiner.network, job) as where:
        denoiser, condition = job.steering.denoiser(refiner, conditions.to(where), reference.to(where))
        run = {
            **job.sampling,
            "seeds": [mix(seed, 1) for seed in job.words.seeds],
            "condition": condition,
        }
        return sample(run.pop("sampler"), denoiser, levels, start=latents.to(where), **run)


def _handover(levels: Grid, share: float) -> int:
    """The number of steps before the refiner's first: those whose time lies above the last `1 - share` of the
    schedule's."""
    check_type("handover", share, float)
    if not 0 < share < 1:
        raise ValueError(
            "handover, the share of the schedule's time after which the refiner takes over, lies in (0, "
            f"1), not {share:g}"
        )
    schedule = levels.schedule
    at = schedule.t_data + (1 - share) * (schedule.t_max - schedule.t_data)
    cut = sum(
        level.t > at + 1e-9 for level in levels.levels[:-1]
    )  # a step that begins there is the refiner's
    if not 0 < cut < levels.steps:
        who = "first model" if cut == 0 else "refiner"
        raise ValueError(
            f"with handover={share:g} the {who} has none of the {levels.steps} steps to do: give another, "
            "or one model only"
        )
    return cut


def _check_refiner(model: Model, refiner: Model) -> None:
    """ValueError unless a refiner can go on with what the model has begun."""
    if refiner.image_channels:
        raise ValueError("this refiner sees an image beside x: refine with a plain model")
    units = [
        (each.shape[0], None if each.vae is None else (each.vae.params.origin, each.vae.params.unit))
        for each in (model, refiner)
    ]
    if units[0][0] != units[1][0] or (units[1][1] is not None and units[0][1] != units[1][1]):
        raise ValueError("model and refiner have latents of other units: give a refiner of the same family")
    if refiner.spec["schedule"] != model.spec["schedule"]:
        raise ValueError(
            "model and refiner were trained on other schedules: give a refiner of the same family"
        )


def check_tile(tile: int | None) -> None:
    """ValueError unless tile is None or a side that tiles may have."""
    check_type("tile", tile, int | None)
    if tile is not None and tile < 1:
        raise ValueError(f"tile, the side of a tile in latents, must be at least 1, not {tile}")


def _image(model: Model, latents: Tensor, tile: int | None) -> Tensor:
    vae = model.require("vae")
    return _in_unit_range(
        vae.decode(latents) if tile is None else decode_tiled(vae, latents, tile, tile // 4)
    )


def _in_unit_range(images: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], what lies outside cut off."""
    return ((images.float() + 1) / 2).clamp(0, 1)
