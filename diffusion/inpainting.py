"""Inpainting: a denoiser that knows part of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.condition import NONE, Condition
from diffusion.denoiser import DenoiserLike, Wrapper
from diffusion.level import Level
from diffusion.prediction import Estimate


class Inpainting(Wrapper):
    """x0 is the known image where the mask is 0, and the denoiser's own where it is 1; soft masks mix the
    two.

    What is known moves along its exact path under every solver, deterministic or not, and ends as it is. What
    is painted sees it only through the network (the replacement of Song et al. 2021, appendix I.2, done to x0
    instead of x_t): likely, not exactly conditional.
    """

    def __init__(self, denoiser: DenoiserLike, known: Tensor, mask: Tensor) -> None:
        """known: (B, C, H, W), or one image for all; mask: the same with 1 channel or C, in [0, 1], 1 where
        to paint."""
        super().__init__(denoiser)
        if (
            known.shape[2:] != mask.shape[2:]
            or mask.shape[1] not in (1, known.shape[1])
            or len(mask) not in (1, len(known))
        ):
            raise ValueError(
                f"a mask {tuple(mask.shape)} does not fit an image {tuple(known.shape)}: give (1 or B, 1 or "
                "C, H, W) of the same H and W"
            )
        if not known.is_floating_point():
            raise ValueError(
                f"the known image must be floating point in the model's range, not {known.dtype}"
            )
        if not ((mask >= 0) & (mask <= 1)).all():
            raise ValueError("a mask lies in [0, 1]: 1 where to paint, 0 where to keep")
        self.known, self.mask = known, mask
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        if self.known.shape[1:] != x_t.shape[1:] or len(self.known) not in (1, len(x_t)):
            raise ValueError(
                f"the known image is {tuple(self.known.shape)}, but samples are {tuple(x_t.shape)}"
            )
        known, mask = self._like(x_t)
        estimate = self.denoiser(x_t, level, condition)
        return Estimate.from_x0(x_t, known + mask * (estimate.x0 - known), level, estimate.variance)

    def _like(self, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Image and mask where the samples are; copied once, since at every call a loop would wait for the
        device."""
        key = x_t.device, x_t.dtype
        if key not in self._copies:
            self._copies[key] = self.known.to(x_t), self.mask.to(x_t)
        return self._copies[key]
