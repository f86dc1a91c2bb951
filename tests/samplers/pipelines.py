"""The pipelines of diffusers on our miniatures: opened from what `models.save` writes, which proves that
diffusers opens it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

import models
import samplers
from diffusion import SeededNoise, initial_noise
from models import presets
from models.families import FAMILIES
from models.families.family import to_plain
from models.text.t5_tokenizer import T5Tokenizer
from tests.peers import diffusers

SEEDS = [3, 4]
STEPS = 10
HEIGHT, WIDTH = 32, 64
NOISE = initial_noise(SEEDS, (4, HEIGHT // 8, WIDTH // 8))
PROMPTS = ["a corgi in a field, (very) happy", "an owl"]
NEGATIVE = ["ugly", "blurry, and (out of focus"]
SD: dict[str, Any] = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
)


class Drawn(NamedTuple):
    """The latents after every step, and the images (B, 3, H, W) in [0, 1]."""

    latents: list[Tensor]
    images: Tensor


def ours(model: models.Model, prompts: Sequence[str] = PROMPTS, **settings: Any) -> Drawn:
    """What `generate` makes of both seeds, 32x64 pixels unless another size is given."""
    latents: list[Tensor] = []
    size: dict[str, Any] = {} if "image" in settings else {"height": HEIGHT, "width": WIDTH}
    return Drawn(
        latents,
        samplers.generate(
            model, prompts, seeds=SEEDS, watch=lambda step: latents.append(step.x), **{**size, **settings}
        ),
    )


def theirs(pipe: Any, prompts: Sequence[str] = PROMPTS, **settings: Any) -> Drawn:
    """What a pipeline makes of the same noise."""
    latents: list[Tensor] = []

    def keep(pipe: Any, i: int, t: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
        latents.append(values["latents"])
        return values

    images = pipe(prompt=list(prompts), output_type="pt", callback_on_step_end=keep, **settings).images
    return Drawn(latents, images)


def theirs_packed(pipe: Any, height: int = HEIGHT, width: int = WIDTH, **settings: Any) -> Drawn:
    """The same of FLUX.1's pipelines, whose latents are tokens: (B, tokens, 4 C), packed row by row, and in
    each (c p q)."""
    drawn = theirs(pipe, height=height, width=width, **settings)
    return Drawn(
        [rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", h=height // 16, p=2, q=2) for x in drawn.latents],
        drawn.images,
    )


def packed(latents: Tensor) -> Tensor:
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)


def opened(model: models.Model, folder: Path, pipeline: str, scheduler: Any = None, **parts: Any) -> Any:
    """A pipeline from the model saved in diffusers' layout; with a scheduler in place of the one that is
    saved."""
    models.save(model, folder, layout="diffusers")
    pipe = getattr(diffusers, pipeline).from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe


def turned(pipe: Any, pipeline: str) -> Any:
    """Another pipeline of the same parts."""
    other = getattr(diffusers, pipeline).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other


def stable_diffusion_3(family: str, t5: bool = True, seed: int = 0) -> models.Model:
    """A miniature as diffusers' folders have it: its CLIP-L has a projection, without which their pipeline
    fails; on request without T5."""
    tiny = presets.tiny_description(family, presets.TINY_TOWERS)
    towers = {**presets.TINY_TOWERS, "clip_l": replace(presets.TINY_TOWERS["clip_l"], projection=64)}
    width = towers["t5"].width
    if not t5:
        del towers["t5"]
    text = FAMILIES[family].text_params(towers).replace_reader("clip_l", projected=True)
    text = text if t5 else replace(text, width=width)
    model = models.build({**tiny, "text": to_plain(text), "shape": [16, 16, 16]})
    if t5:
        model.require("text").tokenizers["t5"] = T5Tokenizer.of_ascii()
    generator = torch.Generator().manual_seed(seed)
    for part in model.parts.values():
        presets.randomise(part, generator)
    return model


def error(a: Tensor, b: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((a - b).norm() / b.norm())


# A scheduler, and the sampler and grid that are the same of ours. STEPS is such that all times
# lie on rows.


def ddim(prediction: str) -> tuple[Any, dict[str, Any]]:
    peer = diffusers.DDIMScheduler(
        **SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction
    )
    return peer, {
        "sampler": "ddim",
        "steps": STEPS,
        "grid": {"spacing": "leading", "offset": 1.0, "terminal": "t_min", "initial": "unit"},
    }


def euler(prediction: str) -> tuple[Any, dict[str, Any]]:
    peer = diffusers.EulerDiscreteScheduler(
        **SD, timestep_spacing="leading", steps_offset=1, prediction_type=prediction
    )
    return peer, {
        "sampler": "euler",
        "steps": STEPS,
        "grid": {"spacing": "leading", "offset": 1.0, "initial": "unit"},
    }


def dpmpp_2m(prediction: str) -> tuple[Any, dict[str, Any]]:
    peer = diffusers.DPMSolverMultistepScheduler(**SD, prediction_type=prediction)
    peer.set_timesteps(STEPS)
    return peer, {
        "sampler": "dpmpp_2m",
        "grid": {"spacing": [float(t) for t in peer.timesteps], "initial": "unit"},
    }


def turbo() -> Any:
    """The first of ten trailing steps, and from there to data, as the authors of SDXL-Turbo do it (999, 899,
    799, 699)."""

    class Turbo(diffusers.EulerAncestralDiscreteScheduler):  # type: ignore[misc]  # diffusers is not annotated
        def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
            super().set_timesteps(10, device=device)
            timesteps, sigmas = vars(self)["timesteps"], vars(self)["sigmas"]
            self.timesteps, self.sigmas = (
                timesteps[:num_inference_steps],
                torch.cat([sigmas[:num_inference_steps], torch.zeros(1)]),
            )

    return Turbo(**SD, timestep_spacing="trailing")


class InTurn:
    """`randn_tensor` as the schedulers import it, with the noise of our seeds, step after step."""

    def __init__(self) -> None:
        self.noise, self.step = SeededNoise(SEEDS), 0

    def __call__(self, shape: Sequence[int], **_: Any) -> Tensor:
        self.step += 1
        return self.noise(torch.empty(*shape), self.step - 1)


def generators() -> list[torch.Generator]:
    """Of which the first thing that each draws is our initial noise."""
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def picture(channels: int, seed: int) -> Tensor:
    """An image, or a mask, (1, channels, H, W) in [0, 1], with edges that lie anywhere."""
    coarse = torch.rand(1, channels, 5, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")
