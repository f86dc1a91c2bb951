"""Consistency distillation: a student learns to jump from any point of its teacher's trajectories to data."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion import BatchLevel, Condition, ConsistencyFunction, Denoiser, DenoiserLike, Grid, marginal
from diffusion.consistency import Blend
from diffusion.level import broadcast
from train.data import Batch
from train.objective import batch_condition, draw_x0


class ConsistencyDistillation:
    """The student's f is equal before and after a step of the teacher (Song et al. 2023, alg. 2).

    The target network is the student itself without gradient, as Song & Dhariwal 2023 found best.

    teacher  any denoiser, guided or not; it is not trained
    blend    the student's parametrisation (`cm` or `lcm`)
    grid     the levels that pairs are taken from; with its last row, the target is data itself
    solver   the teacher's step: "ddim" (one call) or "heun" (two, second order)
    huber    None: squared error. A number c: pseudo-Huber sqrt(|d|^2 + c^2 D) - c sqrt(D) over the D values
             of a sample (Song & Dhariwal 2023, section 3.3)

    `fixed_settings` is what a resumed run must share; the caller may add to it.
    """

    def __init__(
        self,
        teacher: DenoiserLike,
        blend: Blend,
        grid: Grid,
        solver: Literal["ddim", "heun"] = "heun",
        huber: float | None = 0.03,
    ) -> None:
        if solver not in ("ddim", "heun"):
            raise ValueError(f"the teacher's solver must be 'ddim' or 'heun', not {solver!r}")
        if huber is not None and not huber > 0:
            raise ValueError(f"huber must be greater than 0, or null for the squared error, not {huber:g}")
        self.teacher, self.blend, self.solver, self.huber = teacher, blend, solver, huber
        self.fixed_settings: dict[str, Any] = {}
        self.table = BatchLevel(*torch.tensor([tuple(level) for level in grid], dtype=torch.float64).T)

    def __call__(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        x0, condition = draw_x0(batch), batch_condition(batch)
        row = torch.randint(len(self.table.t) - 1, (len(x0),))
        t, s = self._levels(row), self._levels(row + 1)
        student = ConsistencyFunction(denoiser, self.blend)
        x_t = marginal(x0, torch.randn_like(x0), t)
        out = student(x_t, t, condition).x0
        with torch.no_grad():
            target = self._target(student, x_t, t, s, condition)
        return self._distance(out - target)

    @torch.no_grad()
    def _target(
        self, student: ConsistencyFunction, x_t: Tensor, t: BatchLevel, s: BatchLevel, condition: Condition
    ) -> Tensor:
        """f(x_s), where x_s is the end of the teacher's step. In the last pair, x_s itself: it is data."""
        x0, eps = self.teacher(x_t, t, condition)
        x_s = marginal(x0, eps, s)
        at_data = (s.sigma == 0).to(x_t.device, non_blocking=True).view(-1, *[1] * (x_t.ndim - 1))
        # Networks cannot be called at data: samples of the last pair use t, and their outputs are ignored.
        inside = BatchLevel(*(torch.where(s.sigma == 0, a, b) for a, b in zip(t, s, strict=True)))
        x_inside = torch.where(at_data, x_t, x_s)
        if self.solver == "heun":
            x0_next, eps_next = self.teacher(x_inside, inside, condition)
            x_inside = torch.where(at_data, x_t, self._heun(x_t, t, s, eps - x0, eps_next - x0_next))
        return torch.where(at_data, x_s, student(x_inside, inside, condition).x0)

    @staticmethod
    def _heun(x_t: Tensor, t: BatchLevel, s: BatchLevel, slope_t: Tensor, slope_s: Tensor) -> Tensor:
        """Heun's step in flow time, as in `samplers.euler`: u = x/(alpha + sigma), du/dr = eps - x0."""
        norm_t, norm_s = t.alpha + t.sigma, s.alpha + s.sigma
        dr = broadcast(s.sigma / norm_s - t.sigma / norm_t, x_t)
        return broadcast(norm_s, x_t) * (x_t / broadcast(norm_t, x_t) + dr * 0.5 * (slope_t + slope_s))

    def _levels(self, row: Tensor) -> BatchLevel:
        return BatchLevel(*(column[row] for column in self.table))

    def _distance(self, difference: Tensor) -> Tensor:
        square = difference.square().flatten(1).sum(1)
        if self.huber is None:
            return square / difference[0].numel()
        c = self.huber * math.sqrt(difference[0].numel())
        return (square + c * c).sqrt() - c
