"""Builds guidance from a description in plain values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusion import ClassifierFreeGuidance, Clipped, Condition, DenoiserLike, Prediction, Thresholded
from diffusion.guidance import ZeroInit, interval
from diffusion.guidance_rules import build_rule, extrapolate
from diffusion.settings import setting
from diffusion.spec import make_params
from models import Model


@dataclass(frozen=True)
class GuideParams:
    """How guidance works, besides its scale. All None: the plain formula at every level."""

    interval: tuple[float, float] | None = setting(
        None, "guide only in this interval of flow time sigma / (alpha + sigma), e.g. [0.2,0.8]"
    )
    rule: dict[str, Any] | None = setting(
        None,
        "{name: rescaled, phi: 0.7}, {name: apg, eta: 0}, {name: zero_star}, ... (--help rule); "
        "in a shell 'guide.rule={name: apg, eta: 0}', or +guide.rule.name=apg +guide.rule.eta=0",
    )
    percentile: float | None = setting(
        None, "dynamic thresholding at this quantile of |x0|, e.g. 0.995, for pixels in [-1, 1]"
    )
    zero_from: float | None = setting(
        None, "zero velocity at this flow time and above; 1 (pure noise) with rule zero_star is CFG-Zero*"
    )


def add_guidance(
    denoiser: DenoiserLike,
    scale: float,
    null: Condition,
    prediction: Prediction,
    guide: Mapping[str, Any] | None = None,
) -> DenoiserLike:
    """The denoiser with guidance away from `null`, without the limits on x0 (`limit_x0`)."""
    how = make_params("guide", GuideParams, guide or {})
    if scale == 1:
        if how != GuideParams():
            raise ValueError("guide has no effect, as guidance=1 is off: give guidance=2, or leave it out")
        return denoiser
    strength = scale if how.interval is None else interval(scale, *how.interval)
    rule = extrapolate if how.rule is None else build_rule(how.rule, prediction)
    return ClassifierFreeGuidance(denoiser, strength, null, rule=rule)


def limit_x0(denoiser: DenoiserLike, clip: bool, guide: Mapping[str, Any] | None = None) -> DenoiserLike:
    """The denoiser with the limits of `guide` on x0 (percentile, zero_from), and the pixel range (clip)."""
    how = make_params("guide", GuideParams, guide or {})
    if how.percentile is not None:
        denoiser = Thresholded(denoiser, how.percentile)
    if clip:
        denoiser = Clipped(denoiser)
    # Not clipped: the x0 of a zero velocity is a share of the noise.
    return denoiser if how.zero_from is None else ZeroInit(denoiser, how.zero_from)


def warn_unless_followed(scale: float, condition: str, stacklevel: int) -> None:
    """Warns if a guidance scale ignores the condition (0) or leads away from it (below 0)."""
    if scale <= 0:
        text = f"guidance scale {scale:g} does not follow the {condition}: 1 is off, and follows it alone"
        warnings.warn(text, stacklevel=stacklevel + 1)


def class_denoiser(
    model: Model, guidance: float, clip: bool, guide: Mapping[str, Any] | None = None
) -> DenoiserLike:
    """The denoiser of a class-conditional model, with guidance and limits."""
    if guidance != 1 and not model.null:
        raise ValueError(f"guidance={guidance:g} needs classes, and this model has none: leave guidance at 1")
    if guidance != 1 and model.spec.get("drop") == 0:
        warnings.warn(
            f"guidance={guidance:g} needs estimates without a label, but this model was trained with drop=0: "
            "leave guidance at 1, or train with objective.drop=0.1",
            stacklevel=2,
        )
    warn_unless_followed(guidance, "label", stacklevel=2)
    denoiser = add_guidance(model.denoiser(), guidance, model.null, model.prediction, guide)
    return limit_x0(denoiser, clip, guide)
