"""How guidance works, from a description in plain values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusion import (
    ClassifierFreeGuidance,
    Clipped,
    Condition,
    DenoiserLike,
    Prediction,
    Thresholded,
    ZeroInit,
    build_rule,
    extrapolate,
    interval,
)
from diffusion.settings import setting
from diffusion.spec import make_params
from models import Model


@dataclass(frozen=True)
class GuideParams:
    """How guidance works, beside its scale. None throughout is the plain formula at every level."""

    interval: tuple[float, float] | None = setting(
        None, "guide only where flow time sigma / (alpha + sigma) lies within, e.g. [0.2,0.8]"
    )
    rule: dict[str, Any] | None = setting(
        None,
        "{name: rescaled, phi: 0.7}, {name: apg, eta: 0, norm_limit: 15, momentum: -0.5}, {name: zero_star} "
        "(--help rule); in a shell "
        "'guide.rule={name: apg, eta: 0}', or +guide.rule.name=apg +guide.rule.eta=0",
    )
    percentile: float | None = setting(
        None,
        "dynamic thresholding: divide each x0 by this quantile of its |x0|, if above 1, and cut what "
        "exceeds 1; e.g. 0.995",
    )
    zero_from: float | None = setting(
        None, "no movement at this flow time and above; 1, pure noise, with the rule zero_star is CFG-Zero*"
    )


def add_guidance(
    denoiser: DenoiserLike,
    scale: float,
    null: Condition,
    prediction: Prediction,
    guide: Mapping[str, Any] | None = None,
) -> DenoiserLike:
    """The denoiser led away from `null` as `guide` describes (GuideParams), but for what is done to x0
    afterwards (`limit_x0`)."""
    how = make_params("guide", GuideParams, guide or {})
    if scale == 1:
        if how != GuideParams():
            raise ValueError(
                "guide says how guidance works, but guidance=1 is off: give guidance=2, say, or leave out "
                "what is under guide"
            )
        return denoiser
    strength = scale if how.interval is None else interval(scale, *how.interval)
    rule = extrapolate if how.rule is None else build_rule(how.rule, prediction)
    return ClassifierFreeGuidance(denoiser, strength, null, rule=rule)


def limit_x0(denoiser: DenoiserLike, clip: bool, guide: Mapping[str, Any] | None = None) -> DenoiserLike:
    """The denoiser with the limits of `guide` on its x0: percentile, pixel range (clip), zero_from."""
    how = make_params("guide", GuideParams, guide or {})
    if how.percentile is not None:
        denoiser = Thresholded(denoiser, how.percentile)
    if clip:
        denoiser = Clipped(denoiser)
    return (
        denoiser if how.zero_from is None else ZeroInit(denoiser, how.zero_from)
    )  # not clipped: there its x0 is a share of the noise


def warn_unless_followed(scale: float, condition: str, stacklevel: int) -> None:
    """A warning for a scale of guidance that leaves the condition (a prompt, a label) out, 0, or leads away
    from it, below 0."""
    if scale <= 0:
        text = (
            f"{scale:g} as the scale of guidance does not follow the {condition}: 1 is off, and follows it "
            "alone"
        )
        warnings.warn(text, stacklevel=stacklevel + 1)


def class_denoiser(
    model: Model, guidance: float, clip: bool, guide: Mapping[str, Any] | None = None
) -> DenoiserLike:
    """The denoiser of a class-conditional model, with guidance and limits."""
    if guidance != 1 and not model.null:
        raise ValueError(
            f"guidance={guidance:g} needs a conditional model, and this one has no classes: leave guidance "
            "at 1"
        )
    if guidance != 1 and model.spec.get("drop") == 0:
        warnings.warn(
            f"guidance={guidance:g} leads away from samples without a label, and this model was trained "
            "with drop=0, never without: "
            "leave guidance at 1, or train with objective.drop=0.1",
            stacklevel=2,
        )
    warn_unless_followed(guidance, "label", stacklevel=2)
    denoiser = add_guidance(model.denoiser(), guidance, model.null, model.prediction, guide)
    return limit_x0(denoiser, clip, guide)
