"""Seeded noise. Every sample has a seed of its own, so that it does not depend on its batch, device or process.

The initial noise of seed k is what `torch.Generator().manual_seed(k)` draws on the CPU for one sample in float32, so
published seeds reproduce. Noise inside a solver is keyed by (seed, step).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


class Noise(Protocol):
    """Where a stochastic solver gets its noise: standard normal like x, for step number `step`."""

    def __call__(self, x: Tensor, step: int) -> Tensor: ...


def initial_noise(
    seeds: Sequence[int], shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal (len(seeds), *shape), one generator per sample. Drawn in float32 on the CPU, then converted."""
    if not len(seeds):
        raise ValueError("noise needs at least one seed, one per sample")
    noise = torch.stack([_normal(seed, shape) for seed in seeds])
    if torch.device(device).type != "cuda":
        return noise.to(device, dtype)
    return noise.pin_memory().to(device, dtype, non_blocking=True)  # queued: the loop that asked for it does not wait


class SeededNoise:
    """Noise keyed by (seed, step): sample i of a batch gets what its seed alone would get."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = [int(seed) for seed in seeds]

    def __call__(self, x: Tensor, step: int) -> Tensor:
        if len(x) != len(self.seeds):
            raise ValueError(f"{len(self.seeds)} seeds for a batch of {len(x)}: one seed per sample is needed")
        return initial_noise([mix(seed, step + 1) for seed in self.seeds], x.shape[1:], x.dtype, x.device)


def mix(*keys: int) -> int:
    """One well-spread 63-bit seed from several integers (SplitMix64's finaliser, Steele et al. 2014), order matters."""
    state = 0
    for key in keys:
        state = (state * 0x9E3779B97F4A7C15 + (key & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def _normal(seed: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(int(seed)), dtype=torch.float32, device="cpu")
