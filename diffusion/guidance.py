"""Guidance: denoisers made of denoisers. Each asks for several estimates of a sample and makes one of them.

They wrap each other: AutoGuidance over ClassifierFreeGuidance, Thresholded over both. How two estimates become one is a rule
(diffusion/guidance_rules.py), and how strongly is a scale: a number, or a function of the level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion.denoiser import DenoiserLike, Wrapper
from diffusion.guidance_rules import Rule, extrapolate
from diffusion.level import BatchLevel, Level, Scalar, broadcast
from diffusion.prediction import FLOW, Estimate

Scale = float | Callable[[Level], Scalar]
"""A guidance scale: one number, or a function of the level (at a BatchLevel it may give one per sample, (B,), on the host)."""


def interval(scale: Scale, low: float, high: float) -> Callable[[Level], Scalar]:
    """`scale` where flow time sigma/(alpha + sigma) lies in [low, high], 1 elsewhere (Kynkäänniemi et al. 2024).

    Guidance harms at high noise and is not needed at low noise, and where the scale is 1 it costs one call. Flow time is in [0, 1] on
    every schedule and knows nothing of steps; the paper's noise-to-signal ratio r is flow time r/(1 + r). 0 <= low < high <= 1. As a weight
    of `ComposedGuidance`, where off is 0, give a function of the level instead.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"a guidance interval in flow time needs 0 <= low < high <= 1, not {low:g} and {high:g}")
    scale = _checked(scale)

    def limited(level: Level) -> Scalar:
        w, time = _scale_at(scale, level), level.flow_time
        if isinstance(time, Tensor):
            return torch.where((low <= time) & (time <= high), w * torch.ones_like(time), 1.0)
        return w if low <= time <= high else 1.0

    return limited


class ClassifierFreeGuidance(Wrapper):
    """uncond + scale * (cond - uncond) (Ho & Salimans 2022, in the convention where scale 1 is off).

    scale     a number, or a function of the level: `interval`, or any other schedule
    null      the unconditional input per condition name, e.g. {"label": 10} or {"context": empty_prompt}: a number, a
              tensor like one sample's condition, or a whole batch. What to lead away from may stand here: a negative prompt
    rule      how the two become one: `extrapolate` (the formula above), `rescaled()`, `zero_star`, `APG()`, or any function like them
    batched   one network call on a doubled batch; False makes two calls, for when memory is short. Same result.
    Where the scale is 1 it costs one plain call, and so does scale 0 (unconditional, by the formula above; other rules differ there).
    At any other, a condition named in `null` must be given. A tensor in `null` that is not where the samples are is copied at every call.
    """

    def __init__(
        self, denoiser: DenoiserLike, scale: Scale, null: Mapping[str, Any], *, rule: Rule = extrapolate, batched: bool = True
    ) -> None:
        super().__init__(denoiser)
        self.scale, self.null, self.rule, self.batched = _checked(scale), dict(null), rule, batched

    def __call__(self, x_t: Tensor, level: Level, /, **cond: Any) -> Estimate:
        scale = _scale_at(self.scale, level)
        if _everywhere(scale, 1):
            return self.denoiser(x_t, level, **cond)
        if missing := [name for name in self.null if name not in cond] or ["to guide towards"] * (not cond):
            raise ValueError(f"guidance needs the condition {missing[0]!r}: give it beside x and level, or as sample(..., cond={{...}})")
        null = {name: _null_like(self.null, name, value) for name, value in cond.items()}
        if _everywhere(scale, 0) and self.rule is extrapolate:
            return self.denoiser(x_t, level, **null)
        conditional, unconditional = _ask(self.denoiser, x_t, level, [cond, null], batched=self.batched)
        return self.rule(x_t, level, conditional, unconditional, scale)


class AutoGuidance(Wrapper):
    """weak + scale * (good - weak): away from what a worse version of the same network says (Karras et al. 2024).

    weak    a smaller or less trained denoiser, on the same levels and given the same conditions
    scale, rule as for ClassifierFreeGuidance; where the scale is 1, the weak one is not asked
    """

    def __init__(self, denoiser: DenoiserLike, weak: DenoiserLike, scale: Scale, *, rule: Rule = extrapolate) -> None:
        super().__init__(denoiser)
        self.weak, self.scale, self.rule = weak, _checked(scale), rule

    def __call__(self, x_t: Tensor, level: Level, /, **cond: Any) -> Estimate:
        good, scale = self.denoiser(x_t, level, **cond), _scale_at(self.scale, level)
        return good if _everywhere(scale, 1) else self.rule(x_t, level, good, self.weak(x_t, level, **cond), scale)


class ComposedGuidance(Wrapper):
    """uncond + sum_i w_i (cond_i - uncond): all of several conditions at once (Liu et al. 2022, eq. 11).

    conditions  pairs (values by name, weight), e.g. [({"label": 3}, 4.0), ({"label": 5}, -1.0)]; a negative weight leads away from its
                condition, and a weight may be a function of the level. A value is a number for all samples, or a tensor with one row per
                sample, or a single row. A name that one condition leaves out and another gives is null there.
    null        as for ClassifierFreeGuidance, to which one condition is equal; a value for every name in `conditions`
    batched     one network call for all of them; False makes one call each, for when memory is short. Same result.
    Conditions given at the call go to all, the unconditional one too, and must be others. What has no share is not asked: conditions of
    weight 0, and the unconditional one where the weights sum to 1. A learned variance is that of the first one asked.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        conditions: Sequence[tuple[Mapping[str, Any], Scale]],
        null: Mapping[str, Any],
        *,
        batched: bool = True,
    ) -> None:
        if not conditions or not all(values for values, _ in conditions):
            raise ValueError("composed guidance needs at least one condition, and no empty one: [({'label': 3}, 4.0), ...]")
        if without := [name for values, _ in conditions for name, value in values.items() if value is None]:
            raise ValueError(f"the condition {without[0]!r} is None: leave it out of a pair, and it is null there")
        super().__init__(denoiser)
        self.conditions = [(dict(values), _checked(weight)) for values, weight in conditions]
        self.null, self.batched = dict(null), batched

    def __call__(self, x_t: Tensor, level: Level, /, **cond: Any) -> Estimate:
        weights = [_scale_at(weight, level) for _, weight in self.conditions]
        weights.append(1 - sum(weights))  # of the unconditional one, with the terms of the formula in another order
        asked = [(w, values) for w, values in zip(weights, self._inputs(x_t), strict=True) if not _everywhere(w, 0)]
        if taken := cond.keys() & asked[0][1].keys():
            raise ValueError(f"the condition {taken.pop()!r} is one of those composed: give it to ComposedGuidance only")
        estimates = _ask(self.denoiser, x_t, level, [{**cond, **values} for _, values in asked], batched=self.batched)
        x0, eps = torch.zeros_like(x_t), torch.zeros_like(x_t)
        for (w, _), estimate in zip(asked, estimates, strict=True):
            x0, eps = x0 + broadcast(w, x_t) * estimate.x0, eps + broadcast(w, x_t) * estimate.eps
        return Estimate(x0, eps, estimates[0].variance)

    def _inputs(self, x_t: Tensor) -> list[dict[str, Tensor]]:
        """What each condition gives to the network, and last what stands for none."""
        given = [{name: _rows(name, value, x_t) for name, value in values.items()} for values, _ in self.conditions]
        null = {name: _null_like(self.null, name, value) for values in given for name, value in values.items()}
        return [*({**null, **values} for values in given), null]


class ZeroInit(Wrapper):
    """No movement where flow time sigma/(alpha + sigma) is at least `zero_from`: velocity eps - x0 = 0, for no call.

    The other half of CFG-Zero* (Fan et al. 2025): at pure noise (flow time 1, the default) networks err by more than nothing
    does. On schedules that end below it, like that of Stable Diffusion 1, lower `zero_from`. 0 < zero_from <= 1.
    """

    def __init__(self, denoiser: DenoiserLike, zero_from: float = 1.0) -> None:
        if not 0 < zero_from <= 1:
            raise ValueError(f"zero_from is a flow time in (0, 1], not {zero_from:g}")
        super().__init__(denoiser)
        self.zero_from = zero_from

    def __call__(self, x_t: Tensor, level: Level, /, **cond: Any) -> Estimate:
        still = level.flow_time >= self.zero_from
        if bool(still.all()) if isinstance(still, Tensor) else still:
            return FLOW.estimate(x_t, torch.zeros_like(x_t), level)
        estimate = self.denoiser(x_t, level, **cond)
        if not isinstance(still, Tensor):
            return estimate
        moving = (~still).double()
        return FLOW.estimate(x_t, estimate.combine(-moving, moving), level, estimate.variance)


def _ask(denoiser: DenoiserLike, x_t: Tensor, level: Level, conditions: Sequence[Mapping[str, Tensor]], *, batched: bool) -> list[Estimate]:
    """The estimates under each condition: one call on a batch that holds every sample once per condition, or one call each."""
    if not batched:
        return [denoiser(x_t, level, **cond) for cond in conditions]
    k = len(conditions)
    levels = BatchLevel(*(torch.cat([value] * k) for value in level)) if isinstance(level, BatchLevel) else level
    joined = {name: torch.cat([cond[name] for cond in conditions]) for name in conditions[0]}
    every = denoiser(torch.cat([x_t] * k), levels, **joined)
    variances = [None] * k if every.variance is None else every.variance.chunk(k)
    return [Estimate(*parts) for parts in zip(every.x0.chunk(k), every.eps.chunk(k), variances, strict=True)]


def _null_like(nulls: Mapping[str, Any], name: str, cond: Any) -> Tensor:
    """The null value of a condition, one row per sample as the condition has."""
    if not isinstance(cond, Tensor):
        raise ValueError(f"guidance needs the condition {name!r} as a tensor with one row per sample, not {cond!r}")
    if name not in nulls:
        raise ValueError(f"guidance needs a null value for the condition {name!r}: give null={{{name!r}: ...}}")
    null = nulls[name]
    if not isinstance(null, Tensor):
        return torch.full_like(cond, null)  # nothing to copy to the device, which a sampling loop would wait for
    return null.to(cond.device, cond.dtype, non_blocking=True).expand_as(cond)


def _rows(name: str, value: Any, x_t: Tensor) -> Tensor:
    """A condition with one row per sample of x_t."""
    n = len(x_t)
    if not isinstance(value, Tensor):
        return torch.full((n,), value, device=x_t.device)
    if value.ndim and len(value) not in (1, n):
        raise ValueError(f"the condition {name!r} has {len(value)} rows for a batch of {n}: give one per sample, or one for all")
    return value.to(x_t.device, non_blocking=True).expand(n, *value.shape[1:])


def _checked(scale: Scale) -> Scale:
    """A scale; if it is a number, a finite one."""
    if not callable(scale):
        _check_finite(scale)
    return scale


def _scale_at(scale: Scale, level: Level) -> Scalar:
    w = scale(level) if callable(scale) else scale
    _check_finite(w)
    return w


def _check_finite(scale: Scalar) -> None:
    if not (bool(scale.isfinite().all()) if isinstance(scale, Tensor) else math.isfinite(scale)):
        raise ValueError(f"a guidance scale must be a finite number, not {scale}")


def _everywhere(scale: Scalar, value: float) -> bool:
    """Whether the scale is that for every sample."""
    return bool((scale == value).all()) if isinstance(scale, Tensor) else scale == value
