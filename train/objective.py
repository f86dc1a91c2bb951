"""What a network is trained to do: a function (denoiser, batch) -> one loss per sample.

Random numbers come from torch's global generators, which the loop reseeds at every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion import BatchLevel, Denoiser, Prediction, Schedule, marginal
from diffusion.level import broadcast
from train.data import Batch
from train.density import Density
from train.variational import variational_bound
from train.weighting import Weighting


class Objective(Protocol):
    """Losses (B,) of a batch, of which the loop takes the mean. It may have `kept`: what a resumed run must share with it."""

    def __call__(self, denoiser: Denoiser, batch: Batch) -> Tensor: ...


class DenoisingObjective:
    """Predict what the prediction says from a noised sample: weight * |out - target|^2, averaged over each sample.

    density    where the times fall
    weighting  what each counts
    null, drop with probability `drop` a sample's conditions are replaced by their null values, for guidance; those of a batch come first
    bound_weight  factor of the variational bound over all steps that trains a learned variance (Nichol & Dhariwal 2021, eq. 16,
                  estimated from one step per sample, so for times drawn evenly)
    """

    def __init__(
        self,
        schedule: Schedule,
        prediction: Prediction,
        density: Density,
        weighting: Weighting,
        null: Mapping[str, Any] | None = None,
        drop: float = 0.1,
        bound_weight: float = 0.001,
    ) -> None:
        if not 0 <= drop <= 1:
            raise ValueError(f"objective.drop is a probability, within [0, 1], not {drop:g}")
        if bound_weight < 0:
            raise ValueError(f"objective.bound_weight must not be negative, like {bound_weight:g}")
        self.schedule, self.prediction, self.density, self.weighting = schedule, prediction, density, weighting
        self.null, self.drop, self.bound_weight = dict(null or {}), drop, bound_weight

    def __call__(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        x0, cond = clean(batch), conditions(batch)
        level = self.schedule.levels(self.density.sample(len(x0)))
        eps = torch.randn_like(x0)
        x_t = marginal(x0, eps, level)
        out = denoiser.output(x_t, level, **drop_conditions(cond, {**self.null, **null_conditions(batch)}, self.drop))
        bound: float | Tensor = 0.0
        if out.shape[1] == 2 * x0.shape[1]:
            out, variance = out.chunk(2, dim=1)
            x0_hat = self.prediction.estimate(x_t, out.detach(), level).x0
            bound = self.bound_weight * variational_bound(self.schedule, x0, x_t, x0_hat, variance, level)
        return self._weighted_error(out, self.prediction.target(x0, eps, level), level) + bound

    def _weighted_error(self, out: Tensor, target: Tensor, level: BatchLevel) -> Tensor:
        weight = broadcast(self.weighting(level, self.prediction), out)
        return (weight * (out - target).square()).flatten(1).mean(1)


def clean(batch: Batch) -> Tensor:
    """x0; where the data is a distribution, drawn from it anew."""
    return batch["x0"] + batch["x0_std"] * torch.randn_like(batch["x0"]) if "x0_std" in batch else batch["x0"]


def conditions(batch: Batch) -> dict[str, Tensor]:
    """All of a batch that the network is told."""
    return {name: value for name, value in batch.items() if name not in ("x0", "x0_std") and not name.startswith("null.")}


def null_conditions(batch: Batch) -> dict[str, Tensor]:
    """What the batch says that its samples are told where they go without a condition."""
    return {name.removeprefix("null."): value for name, value in batch.items() if name.startswith("null.")}


def drop_conditions(cond: dict[str, Tensor], null: Mapping[str, Any], probability: float) -> dict[str, Tensor]:
    """Replace the conditions of a random share of the samples by their null values, all of a sample's together.

    ValueError for a condition without a null value, unless the share is 0.
    """
    if not cond or probability == 0:
        return cond
    if missing := [name for name in cond if name not in null]:
        raise ValueError(
            f"objective.drop={probability:g} needs a null value of {missing[0]!r} to train without it: "
            "give DenoisingObjective null=model.null, or drop=0"
        )
    first = next(iter(cond.values()))
    dropped = (torch.rand(len(first)) < probability).to(first.device, non_blocking=True)
    return {name: torch.where(dropped.view(-1, *[1] * (value.ndim - 1)), _like(value, null[name]), value) for name, value in cond.items()}


def _like(value: Tensor, null: Any) -> Tensor:
    """A null value in the dtype and on the device of a condition. From the host it is sent: made there, it would be waited for."""
    return torch.as_tensor(null, dtype=value.dtype).to(value.device, non_blocking=True)
