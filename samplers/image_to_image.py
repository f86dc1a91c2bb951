"""Image to image: noise a given image part of the way, and sample from there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from diffusion import NONE, Condition, DenoiserLike, Grid, initial_noise, marginal
from samplers.sample import sample
from samplers.solver import Solver, Step


def image_to_image(
    denoiser: DenoiserLike,
    image: Tensor,
    grid: Grid,
    strength: float,
    *,
    seeds: Sequence[int],
    sampler: str | Solver = "dpmpp_2m",
    condition: Condition = NONE,
    progress: bool = False,
    watch: Callable[[Step], None] | None = None,
    **options: Any,
) -> Tensor:
    """SDEdit (Meng et al. 2022): add noise to an image and sample from there.

    image     (B, ...), or one image (1, ...) for all seeds, in the model's range
    strength  the share of the grid's steps to take, in (0, 1]; at 1 next to nothing of the image remains. It
              may start within a step, see `Grid.tail`, also for grids of few-step networks
    """
    if not image.is_floating_point():
        raise ValueError(f"an image must be floating point in the model's range, [-1, 1], not {image.dtype}")
    part = grid.tail(strength)
    noise = initial_noise(seeds, image.shape[1:], image.dtype, image.device)
    if len(image) not in (1, len(noise)):
        raise ValueError(f"{len(image)} images for {len(noise)} seeds: give one per seed, or one for all")
    options |= {"seeds": seeds, "condition": condition, "progress": progress, "watch": watch}
    return sample(sampler, denoiser, part, start=marginal(image.expand_as(noise), noise, part[0]), **options)
