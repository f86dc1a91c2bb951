"""What a solver costs besides its network, against diffusers (experiment=bench_samplers)."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion import EPS, Denoiser, DiscreteVP, initial_noise, time_grid
from diffusion.settings import setting
from diffusion.spec import check_at_least_one
from eval.bench.harness import BenchParams, alternate, column
from plain_diffusion.extras import extra
from samplers import SAMPLERS

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDE = {"algorithm_type": "sde-dpmsolver++"}
FIRST = "EulerDiscreteScheduler"

# Our solver: the scheduler's name, its options, and how many of its timesteps make one step of ours.
PEERS: dict[str, tuple[str, dict[str, Any], int]] = {
    "ddim": ("DDIMScheduler", {}, 1),
    "euler": (FIRST, {}, 1),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, 1),
    "ddpm": ("DDPMScheduler", {}, 1),
    "heun": ("HeunDiscreteScheduler", {}, 2),
    "dpm2": ("KDPM2DiscreteScheduler", {}, 2),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}, 2),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}, 1),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, 1),
    "unipc": ("UniPCMultistepScheduler", {}, 1),
    "dpmpp_sde": ("DPMSolverSDEScheduler", {}, 2),
    # These two draw independent noise instead of following a Brownian path.
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", SDE, 1),
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {**SDE, "solver_order": 3}, 1),
    "consistency": ("LCMScheduler", {}, 1),
}


@dataclass(frozen=True, kw_only=True)
class Params(BenchParams):
    """What to time."""

    samplers: tuple[str, ...] = setting(tuple(PEERS), "solvers that have a counterpart")
    shape: tuple[int, ...] = setting((1, 4, 64, 64), "of the latents")
    steps: int = setting(50, "of each solver")
    rounds: int = setting(9, "each times every pair once; medians are kept", kind="place")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "shape", "steps")
        for name in self.samplers:
            if name not in PEERS:
                raise ValueError(f"no counterpart of {name!r} to time; known: {', '.join(PEERS)}")


@dataclass(frozen=True)
class Timing:
    """Microseconds per step, and the median of the rounds' ratios."""

    sampler: str = column("solver", "`{}`".format)
    ours: float = column("us a step", ".0f")
    theirs: float = column("diffusers", ".0f")
    ratio: float = column("ratio", ".2f")
    ratio_to_euler: float = column("to its Euler", ".2f")  # EulerDiscreteScheduler in the same rounds
    peer: str = column("counterpart")


@torch.inference_mode()
def measure(params: Params) -> tuple[list[Timing], dict[str, Any]]:
    """Time every pair, and diffusers' Euler with each."""
    euler = _theirs(FIRST, {}, 1, params)
    rows = []
    for name in tqdm(params.samplers, desc="timing", disable=not params.progress):
        rounds = alternate([_ours(name, params), _theirs(*PEERS[name], params), euler], params.rounds)
        times = rounds.median(0), rounds.median(1), rounds.ratio(0, 1), rounds.ratio(0, 2)
        rows.append(Timing(name, *times, PEERS[name][0]))
    return rows, {}


def _ours(name: str, params: Params) -> Callable[[], float]:
    """Measure microseconds per step of our solver with a network that costs nothing."""
    x, out = _start(params)
    grid = time_grid(DiscreteVP.scaled_linear(), params.steps)
    denoiser = Denoiser(lambda x, t, condition: out, grid.schedule, EPS)

    def once() -> float:
        start = time.perf_counter()
        for _ in SAMPLERS[name](denoiser, x, grid):
            pass
        return (time.perf_counter() - start) / grid.steps * 1e6

    return once


def _start(params: Params) -> tuple[Tensor, Tensor]:
    """The first x, and the output of the network."""
    return initial_noise([0], params.shape[1:]).expand(*params.shape), torch.zeros(params.shape)


def _theirs(
    scheduler: str, options: Mapping[str, Any], timesteps: int, params: Params
) -> Callable[[], float]:
    """Measure a scheduler of diffusers, as its pipelines call it. ValueError without diffusers."""
    with extra("bench"):
        import diffusers
    kind, settings = getattr(diffusers, scheduler), {**SD, **options}
    x, out = _start(params)
    diffusers.logging.set_verbosity_error()

    def once() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peer = kind(**settings)
            peer.set_timesteps(params.steps)
            sample: Tensor = x
            start = time.perf_counter()
            for t in peer.timesteps:
                sample = peer.step(out, t, peer.scale_model_input(sample, t)).prev_sample
            return (time.perf_counter() - start) / len(peer.timesteps) * timesteps * 1e6

    return once
