"""Training objectives: functions (denoiser, batch) -> one loss per sample.

Random numbers come from torch's global generators, which the loop reseeds at every step.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Protocol

import torch
from torch import Tensor

from diffusion import NONE, BatchLevel, Condition, Denoiser, Prediction, Schedule, marginal
from diffusion.level import broadcast
from diffusion.spec import check_names
from train.data import Batch
from train.density import Density
from train.variational import variational_bound
from train.weighting import Weighting


class Objective(Protocol):
    """Losses (B,) of a batch; the loop takes their mean.

    It may have `fixed_settings`, a mapping of what a resumed run must share with it.
    """

    def __call__(self, denoiser: Denoiser, batch: Batch) -> Tensor: ...


class DenoisingObjective:
    """Predict the target of a noised sample: weight * |out - target|^2, averaged over each sample.

    density       distribution of the times
    weighting     weight of each sample
    null, drop    all conditions of a sample are replaced by null ones with probability `drop`, as guidance
                  needs it. null.* of a batch take precedence over `null`
    bound_weight  factor of the variational bound, which trains a learned variance (Nichol & Dhariwal 2021,
                  eq. 16). It is estimated from one step per sample, so density must be uniform
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: Prediction,
        density: Density,
        weighting: Weighting,
        null: Condition = NONE,
        drop: float = 0.1,
        bound_weight: float = 0.001,
    ) -> None:
        if not 0 <= drop <= 1:
            raise ValueError(f"objective.drop is a probability within [0, 1], not {drop:g}")
        if bound_weight < 0:
            raise ValueError(f"objective.bound_weight must not be negative, like {bound_weight:g}")
        self.schedule, self.prediction = schedule, prediction
        self.density, self.weighting = density, weighting
        self.null, self.drop, self.bound_weight = null, drop, bound_weight

    def __call__(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        x0 = draw_x0(batch)
        level = self.schedule.levels(self.density.sample(len(x0)))
        eps = torch.randn_like(x0)
        x_t = marginal(x0, eps, level)
        own = batch_null_condition(batch)
        null = replace(self.null.expand(len(x0)).without(own.names), **own.tensors)
        out = denoiser.output(x_t, level, drop_condition(batch_condition(batch), null, self.drop))
        bound: float | Tensor = 0.0
        if out.shape[1] == 2 * x0.shape[1]:
            out, variance = out.chunk(2, dim=1)
            x0_hat = self.prediction.estimate(x_t, out.detach(), level).x0
            bound = self.bound_weight * variational_bound(self.schedule, x0, x_t, x0_hat, variance, level)
        return self._weighted_error(out, self.prediction.target(x0, eps, level), level) + bound

    def _weighted_error(self, out: Tensor, target: Tensor, level: BatchLevel) -> Tensor:
        weight = broadcast(self.weighting(level, self.prediction), out)
        return (weight * (out - target).square()).flatten(1).mean(1)


def draw_x0(batch: Batch) -> Tensor:
    """x0 of a batch, or a new sample of it if the data is a distribution."""
    return batch["x0"] + batch["x0_std"] * torch.randn_like(batch["x0"]) if "x0_std" in batch else batch["x0"]


def batch_condition(batch: Batch) -> Condition:
    """The conditions of a batch."""
    others = {name: value for name, value in batch.items() if name not in ("x0", "x0_std")}
    return _condition({name: value for name, value in others.items() if not name.startswith("null.")})


def batch_null_condition(batch: Batch) -> Condition:
    """The null conditions of a batch, from its entries null.*."""
    return _condition(
        {name.removeprefix("null."): value for name, value in batch.items() if name.startswith("null.")}
    )


def _condition(values: Batch) -> Condition:
    """A condition of these tensors. ValueError for an unknown name."""
    check_names("entry of a batch", values, [field.name for field in fields(Condition)])
    return Condition(**values)


def drop_condition(condition: Condition, null: Condition, probability: float) -> Condition:
    """Replace all conditions of a random share of the samples by null ones.

    ValueError for a condition without a null value, unless the share is 0.
    """
    if not condition or probability == 0:
        return condition
    if missing := [name for name in condition.names if name not in null.names]:
        raise ValueError(
            f"objective.drop={probability:g} needs a null value of {missing[0]!r} to train without it: "
            "give DenoisingObjective null=model.null, or drop=0"
        )
    keep = (torch.rand(len(condition)) >= probability).to(condition.device, non_blocking=True)
    return condition.where(keep, null)
