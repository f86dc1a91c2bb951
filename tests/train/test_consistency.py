"""Consistency distillation: what it compares, what it must not train, and that it teaches one step what many
steps do."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import models
from configs import compose
from diffusion import (
    FLOW,
    NONE,
    X0,
    BatchLevel,
    Condition,
    ConsistencyFunction,
    CosineVP,
    Denoiser,
    DenoiserLike,
    Estimate,
    Level,
    RectifiedFlow,
    VarianceExploding,
    cm,
    initial_noise,
    time_grid,
)
from diffusion.level import Scalar
from diffusion.oracle import GaussianMixture, PointMass
from models import EMA
from samplers import sample
from tests.peers import scipy
from train import TrainParams, train
from train.consistency import ConsistencyDistillation
from train.data import digits
from train.run import OBJECTIVES, run

F64 = torch.float64
SOLVERS: tuple[Literal["ddim", "heun"], ...] = ("ddim", "heun")
STD = 0.5


def plain(level: Level) -> tuple[Scalar, Scalar]:
    """The blend that leaves x0_hat as it is: f is what the network says."""
    return 0.0, 1.0


def batch(n: int, *shape: int) -> dict[str, Tensor]:
    return {"x0": initial_noise(range(n), shape, F64)}


class Watched:
    """A denoiser that remembers the levels at which it was asked."""

    def __init__(self, denoiser: DenoiserLike) -> None:
        self.denoiser, self.levels = denoiser, list[BatchLevel]()

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        assert isinstance(level, BatchLevel)
        self.levels.append(level)
        return self.denoiser(x_t, level, condition)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("huber", [None, 0.03])
def test_a_perfect_student_of_a_point_has_no_loss(
    solver: Literal["ddim", "heun"], huber: float | None
) -> None:
    """All data is one point: every step of either solver is exact, so the student that always names it has
    loss 0."""
    point = initial_noise([7], (1, 2, 2), F64)[0]
    distillation = ConsistencyDistillation(
        PointMass(point), plain, time_grid(RectifiedFlow(), 5), solver, huber
    )
    perfect = Denoiser(lambda x, t, condition: point.expand_as(x), RectifiedFlow(), X0)
    assert float(distillation(perfect, batch(64, 1, 2, 2)).abs().max()) < (1e-25 if huber is None else 1e-13)


@pytest.mark.parametrize("schedule", [CosineVP(), RectifiedFlow()], ids=["cosine_vp", "flow"])
def test_a_perfect_student_of_a_gaussian_has_no_loss(schedule: CosineVP | RectifiedFlow) -> None:
    """N(0, std^2) has the end map x std / sqrt(alpha^2 std^2 + sigma^2): on a fine grid Heun finds it to
    1e-10; 1 % off is seen."""
    teacher = GaussianMixture(torch.zeros(1, 1, 1, 1, dtype=F64), torch.tensor([STD], dtype=F64))

    def student(share: float) -> Denoiser:
        def end(x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
            level = schedule.levels(t)
            return x * (share * STD / (level.alpha**2 * STD**2 + level.sigma**2).sqrt()).view(-1, 1, 1, 1)

        return Denoiser(end, schedule, X0)

    grid = time_grid(schedule, 1000, t_end=0.002)
    data = {"x0": STD * initial_noise(range(512), (1, 1, 1), F64)}
    torch.manual_seed(0)
    distillation = ConsistencyDistillation(teacher, plain, grid, "heun", huber=None)
    assert float(distillation(student(1.0), data).mean()) < 1e-10
    # Where the target is the student itself, a common factor goes unnoticed: the pair that ends at data sees
    # it.
    last = ConsistencyDistillation(teacher, plain, grid[-2:], "heun", huber=None)
    assert float(last(student(1.0), data).mean()) < 1e-10
    assert float(last(student(1.01), data).mean()) > 1e-6


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_target_is_data(solver: Literal["ddim", "heun"]) -> None:
    """On the pair that ends at data the target is the teacher's x0, whatever the student says, and nobody is
    asked about data."""
    teacher = Watched(PointMass(torch.full((1, 2, 2), 0.25, dtype=F64)))
    asked: list[Tensor] = []

    def network(x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
        asked.append(t)
        return torch.full_like(x, 2.0)

    loss = ConsistencyDistillation(teacher, plain, time_grid(RectifiedFlow(), 1), solver, huber=None)
    torch.testing.assert_close(
        loss(Denoiser(network, RectifiedFlow(), X0), batch(4, 1, 2, 2)), torch.full((4,), 1.75**2, dtype=F64)
    )
    ConsistencyDistillation(teacher, plain, time_grid(RectifiedFlow(), 3), solver)(
        Denoiser(network, RectifiedFlow(), X0), batch(64, 1, 2, 2)
    )
    assert min(float(t.min()) for t in asked) > 0
    assert min(float(level.sigma.min()) for level in teacher.levels) > 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_target_at_sigma_min_is_the_sample(solver: Literal["ddim", "heun"]) -> None:
    """A grid that ends at cm's own sigma_min instead: f is the identity there, so the target is x_s, whatever
    the network says."""
    schedule, point = VarianceExploding(), torch.full((1, 2, 2), 0.25, dtype=F64)
    grid = time_grid(schedule, spacing=[5.0], terminal="t_min")
    distillation = ConsistencyDistillation(PointMass(point), cm(schedule.t_min), grid, solver)
    x0, eps = batch(3, 1, 2, 2)["x0"], initial_noise(range(5, 8), (1, 2, 2), F64)
    t, s = (schedule.levels(torch.full((3,), time, dtype=F64)) for time in (5.0, schedule.t_min))
    junk = ConsistencyFunction(
        Denoiser(lambda x, t, condition: (3 * x).sin(), schedule, X0), cm(schedule.t_min)
    )
    x_t = x0 + 5.0 * eps
    target = distillation._target(junk, x_t, t, s, NONE)
    torch.testing.assert_close(target, point + schedule.t_min / 5.0 * (x_t - point), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_target_gets_no_gradient(solver: Literal["ddim", "heun"]) -> None:
    """For f = w x the gradient is 2 (w x_t - w x_s) x_t with the second w held fixed, and not its derivative
    by both."""
    seen: list[Tensor] = []

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.7, dtype=F64))

        def forward(self, x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
            seen.append(x.detach())
            return self.w * x

    network, schedule = Scale(), RectifiedFlow()
    teacher = PointMass(torch.zeros(1, 2, 2, dtype=F64))
    loss = ConsistencyDistillation(teacher, plain, time_grid(schedule, 4)[:4], solver, huber=None)
    loss(Denoiser(network, schedule, X0), batch(8, 1, 2, 2)).mean().backward()
    x_t, x_s = seen
    assert network.w.grad is not None
    torch.testing.assert_close(network.w.grad, (2 * 0.7 * (x_t - x_s) * x_t).mean())
    assert float((x_t - x_s).abs().min()) > 0


def test_the_teacher_is_not_trained(tmp_path: Path) -> None:
    """Training moves the student's weights, which were the teacher's, and leaves the teacher's as they were,
    bit for bit."""
    network = dict(
        name="unet",
        in_channels=1,
        out_channels=1,
        channels=8,
        channel_mult=[1],
        blocks=1,
        attention=[0],
        middle_attention=0,
    )
    torch.manual_seed(0)
    teacher = models.build(
        {
            "network": {**network, "head_dim": 8, "groups": 4, "num_classes": 10},
            "schedule": {"name": "cosine"},
            "prediction": "v",
        }
    )
    before, student = copy.deepcopy(teacher.network.state_dict()), copy.deepcopy(teacher)
    objective = ConsistencyDistillation(teacher.denoiser(), cm(), time_grid(teacher.schedule, 4))
    train(
        student, objective, digits(), TrainParams(steps=3, batch_size=8, warmup=0), tmp_path, progress=False
    )
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.state_dict().items())
    assert all(p.grad is None for p in teacher.network.parameters())
    assert any(not torch.equal(value, before[name]) for name, value in student.network.state_dict().items())


@pytest.mark.parametrize(("clip", "limit"), [(True, 1.0), (False, math.inf)])
def test_the_teacher_is_clipped_where_asked(clip: bool, limit: float, tmp_path: Path) -> None:
    """`objective.clip` keeps the teacher's x0 in pixel range, as it is when sampled; without it, it says what
    it says."""
    network = {
        "name": "dit",
        "in_channels": 1,
        "image_size": 8,
        "hidden": 16,
        "depth": 1,
        "heads": 2,
        "num_classes": 10,
    }
    path = tmp_path / "teacher.safetensors"
    models.save(models.build({"network": network, "schedule": {"name": "flow"}, "prediction": "flow"}), path)
    spec = {"from": path, "consistency": {"name": "cm", "ratio_min": 0.002}}
    student, objective = OBJECTIVES["consistency"](
        spec, torch.device("cpu"), str(path), {"steps": 4}, solver="ddim", clip=clip
    )
    assert isinstance(objective, ConsistencyDistillation)
    x_t, level = 3 * torch.randn(4, 1, 8, 8), student.schedule.level(0.5)
    x0 = objective.teacher(x_t, level, Condition(label=torch.arange(4))).x0
    assert x0.abs().max() == pytest.approx(
        min(limit, float(x_t.abs().max())), rel=1e-6
    )  # a fresh network says 0: x0 = x_t


def test_resuming_with_another_teacher_is_refused(tmp_path: Path) -> None:
    """The path is the same, the weights there are not: the run would not be the one that was begun."""
    network = {
        "name": "dit",
        "in_channels": 1,
        "image_size": 8,
        "hidden": 16,
        "depth": 1,
        "heads": 2,
        "num_classes": 10,
    }
    path, quiet = (
        tmp_path / "teacher.safetensors",
        ["train.batch_size=8", "progress=false", "wandb=false", "resume=true"],
    )

    def go(steps: int) -> bool:
        places = [f"model.from={path}", f"run={tmp_path / 'student'}", f"train.steps={steps}"]
        return run(compose("train", ["experiment=digits_consistency", *places, *quiet]))

    for _ in range(2):
        models.save(
            models.build(
                {"network": network, "schedule": {"name": "cosine", "steps": 1000}, "prediction": "v"}
            ),
            path,
        )
        if not (tmp_path / "student").exists():
            assert go(2)
            assert go(3)
    with pytest.raises(ValueError, match=r"was trained with objective\.teacher="):
        go(4)


def test_an_unknown_solver_is_refused() -> None:
    """The teacher steps by one of two solvers."""
    wrong: Any = "rk4"
    with pytest.raises(ValueError, match="'ddim' or 'heun', not 'rk4'"):
        ConsistencyDistillation(PointMass(torch.zeros(1)), plain, time_grid(RectifiedFlow(), 4), wrong)


class MLP(nn.Module):
    """A small student for points (B, 2, 1, 1)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
        angle = t[:, None] * (math.pi / 2)
        features = torch.cat(
            [x.flatten(1), angle.sin(), angle.cos(), (4 * angle).sin(), angle.tan().log() / 4], 1
        )
        return self.layers(features).view_as(x)


def wasserstein(x: Tensor, y: Tensor) -> float:
    """The 2-Wasserstein distance of two sets of equally many points, by the best of all assignments."""
    cost = torch.cdist(x.flatten(1).double(), y.flatten(1).double()).square()
    return math.sqrt(float(cost[scipy.optimize.linear_sum_assignment(cost.numpy())].mean()))


@pytest.mark.learns
def test_one_step_learns_what_many_steps_do() -> None:
    """Four Gaussians in the plane: distilled, one step is at least 5 times closer to the data than the
    teacher's one step."""
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).view(4, 1, 2, 1, 1)
    teacher, schedule = GaussianMixture(signs[:, 0], torch.full((4,), 0.25)), RectifiedFlow()
    grid, blend, steps = time_grid(schedule, 18, t_start=0.98), cm(0.002, 1.0), 1000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # As many points in each corner, on both sides: otherwise chance alone would be a good part of the
        # distance.
        start = (torch.randn(125, 2, 1, 1).abs() * signs).flatten(0, 1)
        real = (signs + 0.25 * torch.randn(4, 125, 2, 1, 1)).flatten(0, 1)
        network = MLP()
        ema, optimizer = EMA(network, 0.99), torch.optim.Adam(network.parameters())
        objective, student = (
            ConsistencyDistillation(teacher, blend, grid, "heun", huber=0.03),
            Denoiser(network, schedule, FLOW),
        )
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = 4e-3 * 0.5 * (1 + math.cos(math.pi * step / steps))
            objective(student, {"x0": teacher.sample(256)}).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(network)
        ema.copy_to(network)
    one = time_grid(schedule, spacing=[0.98])

    def distance(denoiser: DenoiserLike) -> float:
        return wasserstein(sample("consistency", denoiser, one, start=one.start(start)), real)

    assert distance(ConsistencyFunction(student, blend)) < distance(teacher) / 5
