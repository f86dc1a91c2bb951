"""Seeded noise. Every sample has its own seed, so that it does not depend on its batch, device or process.

The initial noise of seed k is what `torch.Generator().manual_seed(k)` draws on the CPU for one sample in
float32, so that published seeds reproduce. Noise inside a solver is keyed by (seed, step), or follows a
Brownian path of the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
MAX_SEED = 2**63 - 1


class Noise(Protocol):
    """The noise of a stochastic solver: standard normal like x, for step number `step`."""

    def __call__(self, x: Tensor, step: int) -> Tensor: ...


class NoisePath(Protocol):
    """The noise of an SDE solver: (W(stop) - W(start)) / sqrt(stop - start) like x, 0 <= start < stop.

    W is a Brownian motion.
    """

    def __call__(self, x: Tensor, start: float, stop: float) -> Tensor: ...


def initial_noise(
    seeds: Sequence[int],
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal (len(seeds), *shape), one generator per sample; drawn on the CPU in float32."""
    if not len(seeds):
        raise ValueError("noise needs at least one seed, one per sample")
    return _onto(torch.stack([_normal(seed, shape) for seed in seeds]), dtype, device)


def require_seeds(seeds: Sequence[int], x: Tensor) -> None:
    """ValueError unless there is one seed per sample."""
    if len(seeds) != len(x):
        raise ValueError(f"{len(seeds)} seeds for a batch of {len(x)}: one seed per sample is needed")


def check_seed(seed: int, n: int = 1) -> None:
    """ValueError unless `seed` and the n - 1 that follow it are valid seeds."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must lie in 0 ... 2^63 - 1, not {seed}")
    if seed + n - 1 > MAX_SEED:
        raise ValueError(f"seeds must lie in 0 ... 2^63 - 1, but {n} seeds from {seed} on do not")


class SeededNoise:
    """Noise keyed by (seed, step): sample i of a batch gets what its seed alone would get."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = [int(seed) for seed in seeds]

    def __call__(self, x: Tensor, step: int) -> Tensor:
        require_seeds(self.seeds, x)
        return initial_noise([mix(seed, step + 1) for seed in self.seeds], x.shape[1:], x.dtype, x.device)


class BrownianPath:
    """One Brownian motion W per seed on [0, inf): a seed follows the same path on every grid.

    A virtual tree: the clock is bisected down to one of 2^16 cells, and the noise of each bisection is keyed
    by (seed, place), so that nothing depends on earlier calls. Cells are 0.0005 wide in (log c) / 2, which is
    log-SNR if c is the signal-to-noise ratio. Each cell holds one point of the path, so that a step must
    leave its cell. W is drawn as the bridge W(c) / (1 + c) over c / (1 + c), which is 0 at both ends.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = [int(seed) for seed in seeds]
        self._dtype: torch.dtype | None = None
        self._known: dict[int, Tensor] = {}  # of the last call: the next one begins where it ended

    def __call__(self, x: Tensor, start: float, stop: float) -> Tensor:
        require_seeds(self.seeds, x)
        i, j = _place(start), _place(stop)
        if int(i) >= int(j):
            raise ValueError(
                "a Brownian path resolves steps of 0.001 in log(clock) within e^-32 ... e^32, but not from "
                f"{start:.9g} to {stop:.9g}: take fewer steps, or another eta or diffusion"
            )
        wide = torch.promote_types(x.dtype, torch.float32)  # half precision would be too coarse
        like = torch.empty(x.shape, dtype=wide, device="meta")
        if (self._known and next(iter(self._known.values())).shape != x.shape) or self._dtype != like.dtype:
            self._known, self._dtype = {}, like.dtype
        visited: dict[int, Tensor] = {}
        at_i, at_j = self._bridge(like, i, visited), self._bridge(like, j, visited)
        self._known = visited
        p_i, p_j = _shares(i)[1], _shares(j)[1]
        scale = math.sqrt(p_i * p_j / _gap(i, j))
        return _onto(at_j * (scale / p_j) - at_i * (scale / p_i), x.dtype, x.device)

    def _bridge(self, x: Tensor, place: float, visited: dict[int, Tensor]) -> Tensor:
        """The bridge at a place: bisect from its ends to the cell, then interpolate in the cell."""
        low, high = 0, _CELLS
        at_low = at_high = torch.zeros(x.shape, dtype=x.dtype, device="cpu")
        if place == low:
            return at_low
        while high - low > 1:
            k = (low + high) // 2
            at_k = self._known.get(k)
            if at_k is None:
                at_k = _between(low, k, high, at_low, at_high, self._draw(x, k))
            visited[k] = self._known[k] = at_k
            low, high, at_low, at_high = (k, high, at_k, at_high) if k <= place else (low, k, at_low, at_k)
        cell = _CELLS + low
        if cell not in self._known:
            self._known[cell] = self._draw(x, cell)
        visited[cell] = self._known[cell]
        return _between(low, place, high, at_low, at_high, visited[cell])

    def _draw(self, x: Tensor, key: int) -> Tensor:
        return initial_noise([mix(seed, key, _MASK) for seed in self.seeds], x.shape[1:], x.dtype)


def mix(*keys: int) -> int:
    """A well-spread 63-bit seed from integers, in order (SplitMix64's finaliser, Steele et al. 2014)."""
    state = 0
    for key in keys:
        state = (state * 0x9E3779B97F4A7C15 + (key & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def _normal(seed: int, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(int(seed))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def _onto(noise: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Copy noise from the host to the device, without making the loop wait."""
    if torch.device(device).type != "cuda":
        return noise.to(device, dtype)
    return noise.pin_memory().to(device, dtype, non_blocking=True)


_CELLS, _REACH = 2**16, 32.0  # log c lies within -32 ... 32


def _place(clock: float) -> float:
    """The position of a clock value among the cells: 0 for clock 0, _CELLS for clock inf."""
    if clock == 0:
        return 0.0
    return min(_CELLS - 1e-6, max(1e-6, (math.log(clock) / _REACH + 1) / 2 * _CELLS))


@lru_cache(2**16)
def _shares(place: float) -> tuple[float, float]:
    """c / (1 + c) and 1 / (1 + c)."""
    if place in (0, _CELLS):
        return (0.0, 1.0) if place == 0 else (1.0, 0.0)
    log_c = (2 * place / _CELLS - 1) * _REACH
    return 1 / (1 + math.exp(-log_c)), 1 / (1 + math.exp(log_c))


@lru_cache(2**16)
def _gap(i: float, j: float) -> float:
    """The increase of c / (1 + c) from place i to j, as a product, so that nothing cancels."""
    if i == 0 or j == _CELLS:
        return _shares(j)[0] if i == 0 else _shares(i)[1]
    return _shares(j)[0] * _shares(i)[1] * -math.expm1(2 * _REACH * (i - j) / _CELLS)


def _between(low: int, place: float, high: int, at_low: Tensor, at_high: Tensor, z: Tensor) -> Tensor:
    """A bridge at a place, from its values on both sides and standard normal z."""
    before, after, both = _gap(low, place), _gap(place, high), _gap(low, high)
    return at_low * (after / both) + at_high * (before / both) + z * math.sqrt(before * after / both)
