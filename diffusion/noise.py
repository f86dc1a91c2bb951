"""Seeded noise. Every sample has a seed of its own, so that it does not depend on its batch, device or process.

The initial noise of seed k is what `torch.Generator().manual_seed(k)` draws on the CPU for one sample in float32, so
published seeds reproduce. Noise inside a solver is keyed by (seed, step), or follows a Brownian motion that belongs to the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


class Noise(Protocol):
    """Where a stochastic solver gets its noise: standard normal like x, for step number `step`."""

    def __call__(self, x: Tensor, step: int) -> Tensor: ...


class Path(Protocol):
    """Where an SDE solver gets its noise: (W(stop) - W(start)) / sqrt(stop - start) like x, W a Brownian motion, 0 <= start < stop."""

    def __call__(self, x: Tensor, start: float, stop: float) -> Tensor: ...


def initial_noise(
    seeds: Sequence[int], shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Standard normal (len(seeds), *shape), one generator per sample. Drawn in float32 on the CPU, then converted."""
    if not len(seeds):
        raise ValueError("noise needs at least one seed, one per sample")
    return _onto(torch.stack([_normal(seed, shape) for seed in seeds]), dtype, device)


class SeededNoise:
    """Noise keyed by (seed, step): sample i of a batch gets what its seed alone would get."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = [int(seed) for seed in seeds]

    def __call__(self, x: Tensor, step: int) -> Tensor:
        if len(x) != len(self.seeds):
            raise ValueError(f"{len(self.seeds)} seeds for a batch of {len(x)}: one seed per sample is needed")
        return initial_noise([mix(seed, step + 1) for seed in self.seeds], x.shape[1:], x.dtype, x.device)


class BrownianPath:
    """One Brownian motion W per seed, on all of [0, inf): the same seed on a finer grid follows the same path, ever more closely.

    A virtual tree: W is bisected until the point asked for is reached, each bisection with noise keyed by (seed, point), so that
    nothing depends on what was asked before. It is drawn as the bridge B = W(c) / (1 + c) over p = 1 / (1 + c), both ends 0, and
    bisected in r = 1 / (1 + sqrt(c)), flow time where c is the signal-to-noise ratio. Clocks are rounded to 2^-22 in r.
    """

    DEPTH = 22

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = [int(seed) for seed in seeds]
        self._known: dict[int, Tensor] = {}  # of the last call, whose end is where the next one begins

    def __call__(self, x: Tensor, start: float, stop: float) -> Tensor:
        if len(x) != len(self.seeds):
            raise ValueError(f"{len(self.seeds)} seeds for a batch of {len(x)}: one seed per sample is needed")
        i, j = (max(1, round(2**self.DEPTH / (1 + math.sqrt(clock)))) for clock in (start, stop))
        if i <= j:
            raise ValueError(
                f"a Brownian path from clock {start:.9g} to {stop:.9g}: times must rise, by more than it can resolve; take fewer steps"
            )
        visited: dict[int, Tensor] = {}
        bridge_i, bridge_j = self._bridge(x, i, visited), self._bridge(x, j, visited)
        self._known = visited
        p_i, p_j = _complement(i, self.DEPTH), _complement(j, self.DEPTH)
        scale = math.sqrt(p_i * p_j / _gap(i, j, self.DEPTH))
        return _onto(bridge_j * (scale / p_j) - bridge_i * (scale / p_i), x.dtype, x.device)

    def _bridge(self, x: Tensor, point: int, visited: dict[int, Tensor]) -> Tensor:
        """The bridge at r = point / 2^DEPTH, on the CPU, from its ends down."""
        low, high = 0, 2**self.DEPTH
        at_low = at_high = middle = torch.zeros(x.shape, dtype=x.dtype, device="cpu")
        if point == high:
            return at_high
        while True:
            k = (low + high) // 2
            if k not in self._known:
                below, above, all_ = _gap(k, low, self.DEPTH), _gap(high, k, self.DEPTH), _gap(high, low, self.DEPTH)
                z = initial_noise([mix(seed, k, _MASK) for seed in self.seeds], x.shape[1:], x.dtype)
                middle = at_low * (above / all_) + at_high * (below / all_) + z * math.sqrt(below * above / all_)
            else:
                middle = self._known[k]
            self._known[k] = visited[k] = middle
            if k == point:
                return middle
            low, high, at_low, at_high = (k, high, middle, at_high) if k < point else (low, k, at_low, middle)


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


def _onto(noise: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Noise drawn on the host where it is needed; the loop that asked for it does not wait for the device."""
    if torch.device(device).type != "cuda":
        return noise.to(device, dtype)
    return noise.pin_memory().to(device, dtype, non_blocking=True)


def _complement(k: int, depth: int) -> float:
    """p = 1 / (1 + c) = r^2 / (r^2 + (1 - r)^2) at r = k / 2^depth."""
    return k**2 / (k**2 + (2**depth - k) ** 2)


def _gap(k: int, m: int, depth: int) -> float:
    """p(k) - p(m) for k > m, from whole numbers: nothing cancels."""
    n = 2**depth
    return n * (k - m) * (n * (k + m) - 2 * k * m) / ((k**2 + (n - k) ** 2) * (m**2 + (n - m) ** 2))
