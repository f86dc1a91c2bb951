"""Guidance: denoisers made of denoisers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion.denoiser import DenoiserLike, Wrapper
from diffusion.level import BatchLevel, Level
from diffusion.prediction import Estimate


class ClassifierFreeGuidance(Wrapper):
    """uncond + scale * (cond - uncond) (Ho & Salimans 2022, in the convention where scale 1 is off).

    null      the unconditional input per condition name, e.g. {"label": 10} or {"context": empty_prompt}: a number, a
              tensor like one sample's condition, or a whole batch
    batched   one network call on a doubled batch; False makes two calls, for when memory is short. Same result.
    Scale 1 costs one plain call, and so does scale 0 (unconditional). At any other, a condition named in `null` must be given.
    """

    def __init__(self, denoiser: DenoiserLike, scale: float, null: Mapping[str, Any], *, batched: bool = True) -> None:
        if not math.isfinite(scale):
            raise ValueError(f"a guidance scale must be a finite number, not {scale}")
        super().__init__(denoiser)
        self.scale, self.null, self.batched = float(scale), dict(null), batched

    def __call__(self, x_t: Tensor, level: Level, /, **cond: Any) -> Estimate:
        if self.scale == 1:
            return self.denoiser(x_t, level, **cond)
        if missing := [name for name in self.null if name not in cond] or ["to guide towards"] * (not cond):
            raise ValueError(f"guidance needs the condition {missing[0]!r}: give it beside x and level, or as sample(..., cond={{...}})")
        null = {name: self._null_like(name, value) for name, value in cond.items()}
        if self.scale == 0:
            return self.denoiser(x_t, level, **null)
        conditional, unconditional = self._both(x_t, level, cond, null)
        x0, eps = (torch.lerp(u, c, self.scale) for c, u in zip(conditional, unconditional, strict=True))
        return Estimate(x0, eps, conditional.variance)

    def _both(self, x_t: Tensor, level: Level, cond: dict[str, Any], null: dict[str, Any]) -> tuple[Estimate, Estimate]:
        if not self.batched:
            return self.denoiser(x_t, level, **cond), self.denoiser(x_t, level, **null)
        levels = BatchLevel(*(torch.cat([value, value]) for value in level)) if isinstance(level, BatchLevel) else level
        both = self.denoiser(torch.cat([x_t, x_t]), levels, **{name: torch.cat([cond[name], null[name]]) for name in cond})
        n = len(x_t)
        variance = (None, None) if both.variance is None else (both.variance[:n], both.variance[n:])
        return Estimate(both.x0[:n], both.eps[:n], variance[0]), Estimate(both.x0[n:], both.eps[n:], variance[1])

    def _null_like(self, name: str, cond: Any) -> Tensor:
        if name not in self.null:
            raise ValueError(f"guidance needs a null value for the condition {name!r}: ClassifierFreeGuidance(..., null={{{name!r}: ...}})")
        null = self.null[name]
        if not isinstance(null, Tensor):
            return torch.full_like(cond, null)  # nothing to copy to the device, which a sampling loop would wait for
        return null.to(cond).expand_as(cond)
