"""An image to begin from, to edit or to complete, as a published network needs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models import VAE, Model


@dataclass(frozen=True)
class Reference:
    """What is known of the images to make, as latents; each None, or (1 or B, ...).

    start   to begin from, with noise
    known   what stays where the mask is 0, for networks that do not see it themselves
    mask    1 where to paint
    beside  what the network sees beside x
    """

    start: Tensor | None = None
    known: Tensor | None = None
    mask: Tensor | None = None
    beside: Tensor | None = None


def check_reference(model: Model, image: Tensor | None, mask: Tensor | None, n: int) -> None:
    """ValueError unless image and mask are what this model has a use for, for n images."""
    if mask is not None and image is None:
        raise ValueError("a mask says which part of an image to paint: give the image too")
    if model.image_channels and image is None:
        what = "image to edit" if edits(model) else "image and a mask"
        raise ValueError(f"this network sees {model.image_channels} channels beside x: give an {what}")
    if model.image_channels and not edits(model) and mask is None:
        raise ValueError("this network is for inpainting: give a mask, 1 where to paint")
    for name, value, channels in (("image", image, 3), ("mask", mask, 1)):
        if value is None:
            continue
        if value.ndim != 4 or value.shape[1] != channels or len(value) not in (1, n) or not value.is_floating_point():
            raise ValueError(
                f"the {name} must be floating point (1 or {n}, {channels}, H, W) in [0, 1], not {value.dtype} {tuple(value.shape)}"
            )
        if not ((value >= 0) & (value <= 1)).all():
            raise ValueError(f"the {name} must lie in [0, 1], not {float(value.min()):g} to {float(value.max()):g}")
    if image is not None and mask is not None and image.shape[2:] != mask.shape[2:]:
        raise ValueError(f"the mask is {tuple(mask.shape[2:])}, the image {tuple(image.shape[2:])}: give them the same size")


def read_reference(model: Model, image: Tensor | None, mask: Tensor | None, strength: float) -> Reference:
    """Image and mask, checked before. What is completed begins from the image only at a strength below 1, what is edited never does."""
    if image is None:
        return Reference()
    vae: VAE = model.require("vae")
    image = 2 * image.to(next(vae.parameters()).device) - 1
    latents = vae.encode(image).mode
    if edits(model):  # pix2pix was trained on latents in the autoencoder's own units (Brooks et al. 2023, in their code)
        return Reference(beside=vae.unscaled(latents))
    if mask is None:
        return Reference(start=latents)
    mask = mask.to(image)
    start, small = latents if strength < 1 else None, F.interpolate(mask, latents.shape[2:], mode="nearest")
    if not model.image_channels:
        return Reference(start, latents, small)
    small, shown = (small >= 0.5).to(small), vae.encode(image * (mask < 0.5)).mode
    n = max(len(small), len(shown))
    return Reference(start, beside=torch.cat([small.expand(n, -1, -1, -1), shown.expand(n, -1, -1, -1)], dim=1))


def edits(model: Model) -> bool:
    """Whether the network sees an image to edit beside x, as many channels as x has, and not one to complete."""
    return model.image_channels == model.shape[0]
