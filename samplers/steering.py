"""The denoiser of a text-to-image network, steered by a prompt, an image, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffusion import NONE, ComposedGuidance, Condition, DenoiserLike, Inpainting
from diffusion.spec import check_type
from models import Model
from samplers.guide import add_guidance, limit_x0
from samplers.prompting import Conditions
from samplers.reference import Reference, two_scales

IMAGE_SCALE = 1.5  # of networks that edit, as published (Brooks et al. 2023)


@dataclass(frozen=True)
class Steering:
    """How strongly to steer, and how.

    scale        of classifier-free guidance, 1 is off; an input of networks that were distilled to follow it
    image_scale  towards the image, for networks that edit
    guide        see `GuideParams`
    true_cfg     the scale of classifier-free guidance for networks that take `scale` as an input; None or 1
                 is off
    """

    scale: float
    image_scale: float = IMAGE_SCALE
    guide: Mapping[str, Any] | None = None
    true_cfg: float | None = None

    def check(self, model: Model, negative: bool) -> None:
        """ValueError for settings that this model cannot use; negative: there are negative prompts."""
        check_type("guidance", self.scale, float)
        check_type("image_guidance", self.image_scale, float)
        check_type("true_cfg", self.true_cfg, float | None)
        rule = any(value is not None for value in (self.guide or {}).values())
        if self.true_cfg is not None and not model.embeds_guidance:
            raise ValueError("true_cfg is for networks that take guidance as an input: leave it out here")
        if self.scale != 1 and model.family is not None and not model.family.guided:
            raise ValueError(f"{model.family.title} was distilled to draw without guidance: leave it out")
        if model.embeds_guidance and self.scale < 0:
            raise ValueError(
                f"this network was distilled for positive guidance: guidance={self.scale:g} is not possible"
            )
        if two_scales(model):
            if rule:
                raise ValueError("a network that edits has guidance and image_guidance only: leave guide out")
            return
        if self.cfg(model) == 1 and (rule or negative) and model.embeds_guidance:
            name = "guide" if rule else "negative"
            raise ValueError(f"this network takes guidance as input: leave {name} out, or give true_cfg=2")
        if negative and self.cfg(model) == 1:
            raise ValueError(
                "guidance is off, which ignores negative: give guidance=2, or leave negative out"
            )
        self._towards_prompt(model, NONE)  # checks the guide

    def denoiser(
        self, model: Model, conditions: Conditions, reference: Reference
    ) -> tuple[DenoiserLike, Condition]:
        """The denoiser and its condition, on the network's device, one row per sample."""
        condition, null, n = conditions.condition, conditions.null, len(conditions.condition)
        if model.image_channels and reference.condition_image is not None:
            image = reference.condition_image.expand(n, -1, -1, -1)
            if two_scales(model):
                return self._towards_both(model, condition, null, image), NONE
            condition = replace(condition, image=image)
        if model.embeds_guidance:
            condition = replace(condition, guidance=torch.full((n,), self.scale, device=condition.device))
        denoiser = self._towards_prompt(model, null)
        if reference.known is not None and reference.mask is not None and not model.image_channels:
            known, mask = (value.expand(n, -1, -1, -1) for value in (reference.known, reference.mask))
            denoiser = Inpainting(denoiser, known, mask)
        return denoiser, condition

    def needs_null(self, model: Model) -> bool:
        """Whether a null condition is needed."""
        return two_scales(model) or self.cfg(model) != 1

    def _towards_prompt(self, model: Model, null: Condition) -> DenoiserLike:
        denoiser = add_guidance(model.denoiser(), self.cfg(model), null, model.prediction, self.guide)
        return limit_x0(denoiser, False, self.guide)

    def cfg(self, model: Model) -> float:
        """The scale of classifier-free guidance."""
        return self.scale if not model.embeds_guidance else 1.0 if self.true_cfg is None else self.true_cfg

    def _towards_both(
        self, model: Model, condition: Condition, null: Condition, image: Tensor
    ) -> DenoiserLike:
        """One scale towards the image, one from there towards the prompt (Brooks et al. 2023, eq. 3)."""
        scales = [(null, self.image_scale - self.scale), (condition, self.scale)]
        terms = [(replace(each, image=image), scale) for each, scale in scales]
        return ComposedGuidance(model.denoiser(), terms, replace(null, image=torch.zeros_like(image)))
