"""The image that a published network begins from, edits or completes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion.spec import check_type
from models import VAE, Model
from models.networks.tiling import encode_tiled, sliced

if TYPE_CHECKING:
    from models.families import ImageInput


@dataclass(frozen=True)
class Reference:
    """What is known of the images to make, as latents; each None, or (1 or B, ...).

    start            to begin from, with noise
    known            stays where the mask is 0
    mask             1 where to paint
    condition_image  what the network sees besides x
    """

    start: Tensor | None = None
    known: Tensor | None = None
    mask: Tensor | None = None
    condition_image: Tensor | None = None

    def to(self, where: torch.device) -> Reference:
        """A copy on another device."""
        parts = self.start, self.known, self.mask, self.condition_image
        return Reference(*(None if part is None else part.to(where) for part in parts))


def check_reference(
    model: Model,
    image: Tensor | None,
    mask: Tensor | None,
    strength: float | None,
    image_guidance: float | None,
    n: int,
) -> None:
    """ValueError unless this model can use the image, the mask and their settings, for n images."""
    check_type("strength", strength, float | None)
    if image is None:
        for name, value in (("mask", mask), ("strength", strength), ("image_guidance", image_guidance)):
            if value is not None:
                raise ValueError(f"{name} is for an image: give image too, or leave {name} out")
        if model.role is not None:
            needs = {"edit": "an image to edit", "inpaint": "an image and a mask"}
            what = needs.get(model.role, "an image of edges or depths")
            raise ValueError(f"this network sees {model.image_channels} channels besides x: give it {what}")
    if strength is not None or mask is not None:
        name = "mask" if strength is None else "strength"
        if model.role == "edit":
            advice = "image_guidance says how close to it a plain network stays"
            raise ValueError(f"this network edits the whole image: leave {name} out; {advice}")
        if model.role == "control":
            raise ValueError(f"this network draws a new image along its outlines: leave {name} out")
    if image_guidance is not None and model.role == "edit" and model.embeds_guidance:
        raise ValueError("this network takes guidance as its only input scale: leave image_guidance out")
    if image_guidance is not None and not two_scales(model):
        raise ValueError("image_guidance is for networks that edit (pix2pix): leave it out, and see strength")
    if model.role == "inpaint" and mask is None:
        raise ValueError("this network is for inpainting: give a mask, 1 where to paint")
    if strength is not None and not 0 < strength <= 1:
        raise ValueError(f"strength is a share of the steps in (0, 1], not {strength:g}")
    for name, value, channels in (("image", image, 3), ("mask", mask, 1)):
        if value is not None:
            _check_pixels(name, value, channels, n)
    if image is not None and mask is not None and image.shape[2:] != mask.shape[2:]:
        sizes = ["x".join(map(str, value.shape[2:])) for value in (mask, image)]
        both = f"the mask is {sizes[0]}, the image {sizes[1]} (height x width)"
        raise ValueError(f"{both}: give them the same size")


def _check_pixels(name: str, value: Tensor, channels: int, n: int) -> None:
    rows = "1" if n == 1 else f"1 or {n}"
    wanted = f"the {name} must be floating point ({rows}, {channels}, H, W) in [0, 1]"
    if not isinstance(value, Tensor):
        raise ValueError(f"{wanted}, not {type(value).__name__}: samplers.read_image reads a file")
    shaped = value.ndim == 4 and value.shape[1] == channels and len(value) in (1, n)
    if not shaped or not value.is_floating_point():
        raise ValueError(f"{wanted}, not {value.dtype} {tuple(value.shape)}")
    if not ((value >= 0) & (value <= 1)).all():
        raise ValueError(f"{wanted}, not in {float(value.min()):g} ... {float(value.max()):g}")


def usual_strength(masked: bool) -> float:
    """The default strength: 1 with a mask, else 0.75."""
    return 1.0 if masked else 0.75


def begins_from_image(model: Model, image: Tensor | None, mask: Tensor | None, strength: float) -> bool:
    """Whether samples begin from the noised image; with a mask only at a strength below 1."""
    return image is not None and model.role not in ("edit", "control") and (mask is None or strength < 1)


def read_reference(
    model: Model, image: Tensor, mask: Tensor | None, strength: float, tile: int | None = None
) -> Reference:
    """Encodes the image and the mask (see `check_reference`) on the autoencoder's device."""
    vae: VAE = model.require("vae")
    image = 2 * image.to(next(vae.parameters()).device, torch.float32) - 1
    latents = _encoded(vae, image, tile)
    start = latents if begins_from_image(model, image, mask, strength) else None
    make: dict[ImageInput, Callable[[], Tensor]] = {"latents": lambda: latents}
    make["unscaled"] = lambda: vae.unscaled(latents)
    small: Tensor | None = None
    if mask is not None:
        mask = mask.to(image)
        small = F.interpolate(mask, latents.shape[2:], mode="nearest")
        # Inpainting networks were trained on binary masks, and on images that are grey where to paint.
        shown, binary, pixels = image * (mask < 0.5), (small >= 0.5).to(small), (mask >= 0.5).to(mask)
        make["masked"], make["mask"] = lambda: _encoded(vae, shown, tile), lambda: binary
        make["mask_pixels"] = lambda: F.pixel_unshuffle(pixels, vae.factor)
    seen = [make[each]() for each in model.sees]
    n = max(map(len, seen), default=1)
    channels = torch.cat([each.expand(n, -1, -1, -1) for each in seen], dim=1) if seen else None
    return Reference(start, None if small is None else latents, small, channels)


def _encoded(vae: VAE, images: Tensor, tile: int | None) -> Tensor:
    """The modes of the latents, image by image."""
    if tile is None:
        return sliced(lambda image: vae.encode(image).mode, images)
    side = tile * vae.factor
    return sliced(lambda image: encode_tiled(vae, image, side, tile // 4 * vae.factor).mode, images)


def two_scales(model: Model) -> bool:
    """Whether image and prompt have a scale each: networks that edit, unless the scale is their input."""
    return model.role == "edit" and not model.embeds_guidance
