"""Guidance: denoisers made of denoisers. Each asks for several estimates of a sample and makes one of them.

They wrap each other: AutoGuidance over ClassifierFreeGuidance, Thresholded over both. How two estimates
become one is a rule (diffusion/guidance_rules.py), and how strongly is a scale: a number, or a function of
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
"""A guidance scale: one number, or a function of the level (at a BatchLevel it may give one per sample, (B,),
on the host)."""


def interval(scale: Scale, low: float, high: float) -> Callable[[Level], Scalar]:
    """`scale` where flow time sigma/(alpha + sigma) lies in [low, high], 1 elsewhere (Kynkäänniemi et al.
    2024).

    Guidance harms at high noise and is not needed at low noise, and where the scale is 1 it costs one call.
    Flow time is in [0, 1] on every schedule and knows nothing of steps; the paper's noise-to-signal ratio r
    is flow time r/(1 + r). 0 <= low < high <= 1. As a weight of `ComposedGuidance`, where off is 0, give a
    function of the level instead.
    """
    if not 0 <= low < high <= 1:
        raise ValueError(
            f"a guidance interval in flow time needs 0 <= low < high <= 1, not {low:g} and {high:g}"
        )
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
    null      what takes the place of the condition (`Condition.updated`): the label that means no class, the
              context of the empty prompt. What to lead away from may stand here too, such as a negative
              prompt. What it does not name stays as it is
    rule      how the two become one: `extrapolate` (the formula above), `rescaled()`, `zero_star`, `APG()`,
              or any function like them
    batched   one network call on a doubled batch; False makes two calls, for when memory is short. Same
              result.
    Where the scale is 1 it costs one plain call, and so does scale 0 (unconditional, by the formula above;
    other rules differ there). At any other, ValueError unless all that `null` names is given. A null that is
    not where the samples are is copied at every call.
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
            raise ValueError(
                "guidance leads away from a null condition, and this one is empty: give "
                "null=Condition(label=...), say"
            )
        if missing := [name for name in self.null.names if name not in condition.names]:
            raise ValueError(
                f"guidance needs the condition {missing[0]!r}: give it beside x and level, or as "
                "sample(..., condition=...)"
            )
        null = condition.updated(self.null)
        if _everywhere(scale, 0) and self.rule is extrapolate:
            return self.denoiser(x_t, level, null)
        conditional, unconditional = _ask(self.denoiser, x_t, level, [condition, null], batched=self.batched)
        return self.rule(x_t, level, conditional, unconditional, scale)


class AutoGuidance(Wrapper):
    """weak + scale * (good - weak): away from what a worse version of the same network says (Karras et al.
    2024).

    weak    a smaller or less trained denoiser, on the same levels and given the same conditions
    scale, rule as for ClassifierFreeGuidance; where the scale is 1, the weak one is not asked
    """

    def __init__(
        self, denoiser: DenoiserLike, weak: DenoiserLike, scale: Scale, *, rule: Rule = extrapolate
    ) -> None:
        super().__init__(denoiser)
        self.weak, self.scale, self.rule = weak, _checked(scale), rule

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        good, scale = self.denoiser(x_t, level, condition), _scale_at(self.scale, level)
        return (
            good
            if _everywhere(scale, 1)
            else self.rule(x_t, level, good, self.weak(x_t, level, condition), scale)
        )


class ComposedGuidance(Wrapper):
    """uncond + sum_i w_i (cond_i - uncond): all of several conditions at once (Liu et al. 2022, eq. 11).

    conditions  pairs (condition, weight), e.g. [(Condition(label=three), 4.0), (Condition(label=five),
                -1.0)], each of one row or of one per sample; a negative weight leads away from its condition,
                and a weight may be a function of the level. What one condition leaves out and another gives
                is null there
    null        as for ClassifierFreeGuidance, to which one condition is equal; it names all that `conditions`
                name
    batched     one network call for all of them; False makes one call each, for when memory is short. Same
                result.
    What is given at the call goes to all, the unconditional one too, and must be something else. A null that
    is not where the samples are is copied at every call. What has no share is not asked: conditions of weight
    0, and the unconditional one where the weights sum to 1. A learned variance is that of the first one
    asked.
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
            raise ValueError(
                "composed guidance needs at least one condition, and no empty one: [(Condition(label=...), "
                "4.0), ...]"
            )
        named = {name for condition, _ in conditions for name in condition.names}
        if missing := sorted(named - set(null.names)):
            raise ValueError(
                f"guidance needs a null value for the condition {missing[0]!r}: give "
                f"null=Condition({missing[0]}=...)"
            )
        super().__init__(denoiser)
        self.conditions = [(condition, _checked(weight)) for condition, weight in conditions]
        self.null = null.without(set(null.names) - named)
        self.batched = batched

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        weights = [_scale_at(weight, level) for _, weight in self.conditions]
        weights.append(
            1 - sum(weights)
        )  # of the unconditional one, with the terms of the formula in another order
        dtype = next(
            (
                value.dtype
                for each, _ in self.conditions
                for value in each.tensors.values()
                if value.is_floating_point()
            ),
            None,
        )
        null = self.null.to(x_t.device, dtype).expand(len(x_t))
        if taken := condition.tensors.keys() & null.tensors.keys():
            raise ValueError(
                f"the condition {taken.pop()!r} is one of those composed: give it to ComposedGuidance only"
            )
        inputs = [*(null.updated(each) for each, _ in self.conditions), null]
        asked = [
            (w, replace(each, **condition.tensors))
            for w, each in zip(weights, inputs, strict=True)
            if not _everywhere(w, 0)
        ]
        estimates = _ask(self.denoiser, x_t, level, [each for _, each in asked], batched=self.batched)
        x0, eps = torch.zeros_like(x_t), torch.zeros_like(x_t)
        for (w, _), estimate in zip(asked, estimates, strict=True):
            x0, eps = x0 + broadcast(w, x_t) * estimate.x0, eps + broadcast(w, x_t) * estimate.eps
        return Estimate(x0, eps, estimates[0].variance)


class ZeroInit(Wrapper):
    """No movement where flow time sigma/(alpha + sigma) is at least `zero_from`: velocity eps - x0 = 0, for
    no call.

    The other half of CFG-Zero* (Fan et al. 2025): at pure noise (flow time 1, the default) networks err by
    more than nothing does. On schedules that end below it, like that of Stable Diffusion 1, lower
    `zero_from`. 0 < zero_from <= 1.
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
    """The estimates under each condition: one call on a batch that holds every sample once per condition, or
    one call each."""
    if not batched:
        return [denoiser(x_t, level, condition) for condition in conditions]
    k = len(conditions)
    levels = (
        BatchLevel(*(torch.cat([value] * k) for value in level)) if isinstance(level, BatchLevel) else level
    )
    every = denoiser(torch.cat([x_t] * k), levels, Condition.cat(conditions))
    variances = [None] * k if every.variance is None else every.variance.chunk(k)
    return [Estimate(*parts) for parts in zip(every.x0.chunk(k), every.eps.chunk(k), variances, strict=True)]


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
