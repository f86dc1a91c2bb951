"""Guidance: denoisers that combine several estimates of one sample.

They wrap each other: AutoGuidance over ClassifierFreeGuidance, Thresholded over both. A rule
(diffusion/guidance_rules.py) combines two estimates; a scale says how strongly: a number, or a function of
the level.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffusion.condition import NONE, Condition
from diffusion.denoiser import DenoiserLike, Wrapper
from diffusion.guidance_rules import Rule, extrapolate
from diffusion.level import BatchLevel, Level, Scalar, broadcast
from diffusion.prediction import FLOW, Estimate
from diffusion.spec import check_type

Scale = float | Callable[[Level], Scalar]
"""A guidance scale: a number, or a function of the level; at a BatchLevel it may return (B,) on the host."""


def interval(scale: Scale, low: float, high: float) -> Callable[[Level], Scalar]:
    """`scale` where flow time is in [low, high], else 1, which is off (Kynkäänniemi et al. 2024).

    Guidance harms at high noise and is not needed at low noise, and where it is off it costs no second call.
    Flow time sigma/(alpha + sigma) is in [0, 1] on every schedule; the paper's noise-to-signal ratio r is
    flow time r/(1 + r). 0 <= low < high <= 1. A weight of `ComposedGuidance` is off at 0: give it a function
    of the level instead.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(f"interval needs flow times 0 <= low < high <= 1, not {low:g} and {high:g}")
    scale = _checked(scale)

    def limited(level: Level) -> Scalar:
        w, time = _scale_at(scale, level), level.flow_time
        if isinstance(time, Tensor):
            return torch.where((low <= time) & (time <= high), w * torch.ones_like(time), 1.0)
        return w if low <= time <= high else 1.0

    return limited


class ClassifierFreeGuidance(Wrapper):
    """uncond + scale * (cond - uncond) (Ho & Salimans 2022, in the convention where scale 1 is off).

    scale     a number, or a function of the level, such as `interval`
    null      replaces the condition (`Condition.updated`): the label that means no class, the context of the
              empty prompt, or a negative prompt. Conditions that it lacks stay
    rule      combines the two estimates: `extrapolate` (the formula above), `rescaled()`, `zero_star`,
              `APG()`, or any function like them
    batched   True: one network call on a doubled batch; False: two calls, to save memory. The result is the
              same

    Scale 1 costs one call, and so does scale 0 with `extrapolate` (unconditional). At other scales ValueError
    if a condition that `null` replaces is missing. A null condition on another device is copied at every
    call.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        scale: Scale,
        null: Condition,
        *,
        rule: Rule = extrapolate,
        batched: bool = True,
    ) -> None:
        check_type("null", null, Condition)
        super().__init__(denoiser)
        self.scale, self.null, self.rule, self.batched = _checked(scale), null, rule, batched

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        scale = _scale_at(self.scale, level)
        if _everywhere(scale, 1):
            return self.denoiser(x_t, level, condition)
        if not self.null:
            raise ValueError("guidance needs a null condition that is not empty: null=Condition(label=...)")
        if missing := [name for name in self.null.names if name not in condition.names]:
            where = "as third argument, or as sample(..., condition=...)"
            raise ValueError(f"guidance needs the condition {missing[0]!r}: give it {where}")
        null = condition.updated(self.null)
        if _everywhere(scale, 0) and self.rule is extrapolate:
            return self.denoiser(x_t, level, null)
        conditional, unconditional = _ask(self.denoiser, x_t, level, [condition, null], batched=self.batched)
        return self.rule(x_t, level, conditional, unconditional, scale)


class AutoGuidance(Wrapper):
    """weak + scale * (good - weak): away from a worse version of the network (Karras et al. 2024).

    weak    a smaller or less trained denoiser, called with the same levels and conditions
    scale, rule  as in ClassifierFreeGuidance; at scale 1 `weak` is not called
    """

    def __init__(
        self, denoiser: DenoiserLike, weak: DenoiserLike, scale: Scale, *, rule: Rule = extrapolate
    ) -> None:
        super().__init__(denoiser)
        self.weak, self.scale, self.rule = weak, _checked(scale), rule

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        good, scale = self.denoiser(x_t, level, condition), _scale_at(self.scale, level)
        if _everywhere(scale, 1):
            return good
        return self.rule(x_t, level, good, self.weak(x_t, level, condition), scale)


class ComposedGuidance(Wrapper):
    """uncond + sum_i w_i (cond_i - uncond): several conditions at once (Liu et al. 2022, eq. 11).

    conditions  pairs (condition, weight) such as (Condition(label=three), 4.0), each condition with one row
                or one per sample. A negative weight leads away; a weight may be a function of the level. What
                one condition lacks and another has is null there
    null        as in ClassifierFreeGuidance; has at least the names of all `conditions`
    batched     True: one network call for all; False: one call each, to save memory. The result is the same

    The condition of the call goes to all of them, also the unconditional one, and must have other names.
    Conditions of weight 0 are not evaluated, nor is the unconditional one if the weights sum to 1. A null
    condition on another device is copied at every call. The learned variance is that of the first one
    evaluated.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        conditions: Sequence[tuple[Condition, Scale]],
        null: Condition,
        *,
        batched: bool = True,
    ) -> None:
        if not conditions or not all(condition for condition, _ in conditions):
            raise ValueError("composed guidance needs conditions, none empty: [(Condition(label=...), 4.0)]")
        names = {name for condition, _ in conditions for name in condition.names}
        for name in sorted(names - set(null.names)):
            raise ValueError(f"guidance needs a null value for {name!r}: give null=Condition({name}=...)")
        super().__init__(denoiser)
        self.conditions = [(condition, _checked(weight)) for condition, weight in conditions]
        self.null = null.without(set(null.names) - names)
        self.batched = batched

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        weights = [_scale_at(weight, level) for _, weight in self.conditions]
        weights.append(1 - sum(weights))  # of the unconditional estimate: the formula's terms, reordered
        tensors = [value for each, _ in self.conditions for value in each.tensors.values()]
        dtype = next((value.dtype for value in tensors if value.is_floating_point()), None)
        null = self.null.to(x_t.device, dtype).expand(len(x_t))
        if common := condition.tensors.keys() & null.tensors.keys():
            raise ValueError(f"the condition {common.pop()!r} is composed: give it to ComposedGuidance only")
        inputs = [*(null.updated(each) for each, _ in self.conditions), null]
        terms = [(w, each) for w, each in zip(weights, inputs, strict=True) if not _everywhere(w, 0)]
        conditions = [replace(each, **condition.tensors) for _, each in terms]
        estimates = _ask(self.denoiser, x_t, level, conditions, batched=self.batched)
        x0, eps = torch.zeros_like(x_t), torch.zeros_like(x_t)
        for (w, _), estimate in zip(terms, estimates, strict=True):
            x0, eps = x0 + broadcast(w, x_t) * estimate.x0, eps + broadcast(w, x_t) * estimate.eps
        return Estimate(x0, eps, estimates[0].variance)


class ZeroInit(Wrapper):
    """Velocity eps - x0 = 0, without a network call, where flow time is at least `zero_from`.

    The other half of CFG-Zero* (Fan et al. 2025): at pure noise (flow time 1, the default) the error of
    networks is larger than that of a zero velocity. For schedules that end below 1, like that of Stable
    Diffusion 1, lower `zero_from`. 0 < zero_from <= 1.
    """

    def __init__(self, denoiser: DenoiserLike, zero_from: float = 1.0) -> None:
        if not 0 < zero_from <= 1:
            raise ValueError(f"zero_from is a flow time in (0, 1], not {zero_from:g}")
        super().__init__(denoiser)
        self.zero_from = zero_from

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        still = level.flow_time >= self.zero_from
        if bool(still.all()) if isinstance(still, Tensor) else still:
            return FLOW.estimate(x_t, torch.zeros_like(x_t), level)
        estimate = self.denoiser(x_t, level, condition)
        if not isinstance(still, Tensor):
            return estimate
        moving = (~still).double()
        return FLOW.estimate(x_t, estimate.combine(-moving, moving), level, estimate.variance)


def _ask(
    denoiser: DenoiserLike, x_t: Tensor, level: Level, conditions: Sequence[Condition], *, batched: bool
) -> list[Estimate]:
    """One estimate per condition, by one call on a batch with all of them, or by one call each."""
    if not batched:
        return [denoiser(x_t, level, condition) for condition in conditions]
    k = len(conditions)
    if isinstance(level, BatchLevel):
        level = BatchLevel(*(torch.cat([value] * k) for value in level))
    joint = denoiser(torch.cat([x_t] * k), level, Condition.cat(conditions))
    variances = [None] * k if joint.variance is None else joint.variance.chunk(k)
    return [Estimate(*parts) for parts in zip(joint.x0.chunk(k), joint.eps.chunk(k), variances, strict=True)]


def _checked(scale: Scale) -> Scale:
    """The scale. ValueError for a number that is not finite."""
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
    """Whether the scale is `value` for every sample."""
    return bool((scale == value).all()) if isinstance(scale, Tensor) else scale == value
