"""`sample` runs any solver by name to the end of its grid."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import NONE, BrownianPath, Condition, DenoiserLike, Estimate, Grid, Level, SeededNoise
from diffusion.noise import initial_noise, require_seeds
from diffusion.spec import check_names, check_type, lookup
from samplers.consistency import consistency
from samplers.ddim import ddim
from samplers.ddpm import ddpm
from samplers.dpm2 import dpm2
from samplers.dpmpp_2m import dpmpp_2m
from samplers.dpmpp_2m_sde import dpmpp_2m_sde
from samplers.dpmpp_2s import dpmpp_2s
from samplers.dpmpp_3m import dpmpp_3m
from samplers.dpmpp_3m_sde import dpmpp_3m_sde
from samplers.dpmpp_sde import dpmpp_sde
from samplers.edm import edm
from samplers.euler import euler
from samplers.euler_ancestral import euler_ancestral
from samplers.heun import heun
from samplers.rk4 import rk4
from samplers.sit_sde import sit_sde
from samplers.solver import Solver, Step
from samplers.unipc import unipc

SAMPLERS: dict[str, Solver] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm2": dpm2,
    "rk4": rk4,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc,
    "edm": edm,
    "sit_sde": sit_sde,
    "consistency": consistency,
    "lcm": consistency,
}


def sample(
    sampler: str | Solver,
    denoiser: DenoiserLike,
    grid: Grid,
    *,
    shape: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    start: Tensor | None = None,
    condition: Condition = NONE,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    watch: Callable[[Step], None] | None = None,
    **options: Any,
) -> Tensor:
    """Samples (B, *shape) at the grid's last level.

    sampler  a name in SAMPLERS, or a solver function
    shape    of one sample; needs seeds, one per sample, for the initial noise and the noise of stochastic
             solvers
    start    in place of shape, dtype and device: the samples at the grid's first level, used unchanged
    condition  for the network, e.g. Condition(label=tensor of (B,))
    dtype    of the samples, default float32; the network runs in its own
    device   where to sample; default: the denoiser's device
    watch    called with every finished step, for previews
    options  the solver's own (eta, variance, noise, ...); unknown ones are an error

    FloatingPointError names the first step and level at which samples are not finite: raised at that step on
    the CPU, at the end on a GPU.
    """
    check_type("condition", condition, Condition)
    solver = find_sampler(sampler)
    name = sampler if isinstance(sampler, str) else getattr(sampler, "__name__", "solver")
    known = inspect.signature(solver).parameters
    check_names(f"option of {name}", options, list(known)[3:])
    if start is None:
        if shape is None or seeds is None:
            raise ValueError("give shape and seeds, or start")
        if grid.rises:
            raise ValueError("this grid rises from data, not from noise: give start, as `invert` does")
        where: Any = device or getattr(denoiser, "device", "cpu")
        start = grid.start(initial_noise(seeds, shape, dtype or torch.float32, where))
    elif shape is not None or dtype is not None or device is not None:
        raise ValueError("start has its own shape, dtype and device: leave those out")
    elif seeds is not None:
        require_seeds(seeds, start)
    if grid.rises and {"noise", "path"} & set(known) and not (solver is ddim and not options.get("eta")):
        raise ValueError(f"{name} adds noise, but on this grid noise rises: use a deterministic solver")
    if seeds is not None:
        sources = ("noise", SeededNoise), ("path", BrownianPath)
        options = {**{name: source(seeds) for name, source in sources if name in known}, **options}

    def denoise(x_t: Tensor, level: Level) -> Estimate:
        return denoiser(x_t, level, condition) if condition else denoiser(x_t, level)

    x, sums = start, []
    with torch.no_grad():
        steps = solver(denoise, start, grid, **options)
        for step in tqdm(steps, total=grid.steps, desc=name, disable=not progress):
            x = step.x
            if watch is not None:
                watch(step)
            sums.append(x.flatten(1).sum(1, dtype=torch.float64))
            # On other devices at the end only: the loop must not wait for them.
            if x.device.type == "cpu" and not sums[-1].isfinite().all():
                break
    require_finite(torch.stack(sums), grid, seeds)
    return x


def network_calls(sampler: str | Solver, grid: Grid, **options: Any) -> int:
    """The number of denoiser calls of a solver on this grid."""
    calls = 0

    def counting(x_t: Tensor, level: Level) -> Estimate:
        nonlocal calls
        calls += 1
        return Estimate(x_t, x_t, x_t)

    for _ in find_sampler(sampler)(counting, torch.zeros(1, 1), grid, **options):
        pass
    return calls


def require_finite(sums: Tensor, grid: Grid, seeds: Sequence[int] | None) -> None:
    """FloatingPointError for the first step with a lost sample; sums: of each sample by step (steps, B)."""
    lost = ~sums.isfinite()
    if lost.any():
        i = int(lost.any(1).nonzero()[0])
        first = int(lost[-1].nonzero()[0]) if lost[-1].any() else int(lost[i].nonzero()[0])
        seed = "" if seeds is None else f", the first of seed {seeds[first]}"
        where = f"from step {i} on, at t={grid[i].t:g} (sigma/alpha {grid[i].ratio:g})"
        raise FloatingPointError(
            f"{int(lost[-1].sum())} of {sums.shape[1]} samples are not finite{seed}, {where}: "
            "the model has diverged or overflowed, or guidance is too strong"
        )


def find_sampler(sampler: str | Solver) -> Solver:
    """The solver of that name, or the function itself."""
    return lookup("sampler", sampler, SAMPLERS) if isinstance(sampler, str) else sampler
