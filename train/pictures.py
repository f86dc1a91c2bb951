"""Samples of the averaged model during training, with the same seeds and classes or prompts every time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion import NONE, Condition
from diffusion.noise import check_seed
from diffusion.settings import setting
from diffusion.spec import check_at_least_one
from models import Model
from samplers.generate import generate
from samplers.guide import class_denoiser
from samplers.pictures import save_png, tile
from samplers.sample import find_sampler, sample
from samplers.usage import usage

FOLDER = "pictures"  # in a run's folder


@dataclass(frozen=True)
class PictureParams:
    """What to sample during training. None stands for the model's default."""

    every: int = setting(0, "steps; 0: never")
    n: int | None = setting(None, "how many; null: one per class or prompt, else 16")
    seed: int = setting(0, "of the first picture; the others count up from it")
    prompts: tuple[str, ...] = setting((), "for a text-to-image model", text="text")
    sampler: str | None = setting(None, "null: the model's own, else ddim")
    steps: int | None = setting(20, "of the sampler; null: the model's own")
    guidance: float | None = setting(None, "null: the family's, and off for a model of classes")

    def __post_init__(self) -> None:
        check_at_least_one(self, "n", "steps")
        check_seed(self.seed, self.n or 1)
        if self.every < 0:
            raise ValueError(f"pictures.every must not be negative, like {self.every}")


@dataclass(frozen=True)
class Pictures:
    """Samples a model in training, and writes the pictures as one sheet."""

    params: PictureParams
    folder: Path

    def check(self, model: Model) -> None:
        """ValueError for settings that do not fit the model."""
        how = usage(model, self.params.sampler, self.params.steps, guidance=self.params.guidance)
        find_sampler(how.sampler)
        how.levels(model)
        if model.text is not None and not self.params.prompts:
            raise ValueError("this model takes prompts: give pictures.prompts=[a cat,a dog], for example")
        if model.text is None and self.params.prompts:
            raise ValueError("pictures.prompts are for models that take prompts: leave them out")
        if model.text is None and getattr(model.network.params, "context_dim", None) is not None:
            raise ValueError("pictures need a text encoder and autoencoder: train on captioned images")

    def due(self, step: int, steps: int) -> bool:
        """Whether the model is sampled after step number `step` of `steps`."""
        return bool(self.params.every and step) and (step % self.params.every == 0 or step == steps)

    def draw(self, model: Model, step: int) -> Path:
        """Sample a model in evaluation mode; the path of the sheet, with a column per class or prompt."""
        p, classes = self.params, model.num_classes
        groups = len(p.prompts) or classes
        n = p.n or groups or 16
        seeds = range(p.seed, p.seed + n)
        how = usage(model, p.sampler, p.steps, guidance=p.guidance)
        if p.prompts:
            prompts = [p.prompts[i % len(p.prompts)] for i in range(n)]
            images = generate(
                model, prompts, seeds=seeds, sampler=how.sampler, steps=how.steps, guidance=how.guidance
            )
        else:
            device = next(model.network.parameters()).device
            condition = NONE if classes is None else Condition(label=torch.arange(n, device=device) % classes)
            denoiser = class_denoiser(model, how.guidance, clip=True)
            images = sample(
                how.sampler, denoiser, how.levels(model), shape=model.shape, seeds=seeds,
                condition=condition, device=device,
            )  # fmt: skip
            images = images.cpu().add(1).div(2).clamp(0, 1)
        path = self.folder / FOLDER / f"step-{step:07d}.png"
        sheet = tile(images, groups or 8)
        save_png(sheet, path, {"step": step}, zoom=max(1, 64 // images.shape[-1]), low=0.0)
        return path
