"""Inpainting: a denoiser that knows a part of the image."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.condition import NONE, Condition
from diffusion.denoiser import DenoiserLike, Wrapper
from diffusion.level import Level
from diffusion.prediction import Estimate


class Inpainting(Wrapper):
    """x0 is the known image where the mask is 0, and the denoiser's where it is 1; soft masks blend the two.

    The known part follows its exact path under every solver, and ends unchanged. The painted part depends on
    it through the network only (the replacement of Song et al. 2021, appendix I.2, applied to x0 instead of
    x_t), so that samples are plausible, but not exactly conditional.
    """

    def __init__(self, denoiser: DenoiserLike, known: Tensor, mask: Tensor) -> None:
        """known: (B or 1, C, H, W); mask: (B or 1, C or 1, H, W) in [0, 1], 1 where to paint."""
        super().__init__(denoiser)
        b, c, *size = known.shape
        if list(mask.shape[2:]) != size or mask.shape[1] not in (1, c) or len(mask) not in (1, b):
            shapes = f"a mask {tuple(mask.shape)} does not fit an image {tuple(known.shape)}"
            raise ValueError(f"{shapes}: give (1 or B, 1 or C, H, W) of the same H and W")
        if not known.is_floating_point():
            raise ValueError(f"the known image must be floating point in the model's range: {known.dtype}")
        if not ((mask >= 0) & (mask <= 1)).all():
            raise ValueError("a mask has values in [0, 1]: 1 where to paint, 0 where to keep")
        self.known, self.mask = known, mask
        self._copies: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        if self.known.shape[1:] != x_t.shape[1:] or len(self.known) not in (1, len(x_t)):
            shapes = f"{tuple(self.known.shape)}, but samples are {tuple(x_t.shape)}"
            raise ValueError(f"the known image is {shapes}")
        known, mask = self._like(x_t)
        estimate = self.denoiser(x_t, level, condition)
        return Estimate.from_x0(x_t, known + mask * (estimate.x0 - known), level, estimate.variance)

    def _like(self, x_t: Tensor) -> tuple[Tensor, Tensor]:
        """Image and mask like x_t, copied once: a copy per call would wait for the device."""
        key = x_t.device, x_t.dtype
        if key not in self._copies:
            self._copies[key] = self.known.to(x_t), self.mask.to(x_t)
        return self._copies[key]
