"""Seeded noise: published seeds, independence of the batch, keys that do not collide."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from diffusion import BrownianPath, SeededNoise, initial_noise
from diffusion.noise import mix

SHAPE = (4, 8, 8)


@pytest.mark.parametrize("seed", [0, 42, 2**40])
def test_initial_noise_is_what_torch_draws_for_one_sample(seed: int) -> None:
    """Published seeds reproduce: the noise of a seed is torch's own CPU stream of that seed, to the last
    bit."""
    expected = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(initial_noise([seed], SHAPE), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_rounds_the_same_draw(dtype: torch.dtype) -> None:
    """Noise is drawn once in float32 and then converted: a wider or narrower run starts from the same
    picture."""
    noise = initial_noise([7], SHAPE, dtype)
    assert noise.dtype == dtype
    assert torch.equal(noise, initial_noise([7], SHAPE).to(dtype))


def test_a_sample_does_not_know_its_batch() -> None:
    """Sample i of a batch has the noise of its seed alone, at the start and at every step, to the last
    bit."""
    seeds = [5, 0, 5, 9]
    x = torch.zeros(4, *SHAPE)
    for step in (0, 1, 49):
        together = SeededNoise(seeds)(x, step)
        for i, seed in enumerate(seeds):
            assert torch.equal(initial_noise(seeds, SHAPE)[i], initial_noise([seed], SHAPE)[0])
            assert torch.equal(together[i], SeededNoise([seed])(x[:1], step)[0])


def test_noise_is_a_function_of_seed_and_step() -> None:
    """Steps may be asked for in any order and twice; another seed or step gives other noise, and none is the
    initial noise."""
    x = torch.zeros(1, *SHAPE)
    draws = {(seed, step): SeededNoise([seed])(x, step) for seed in (0, 1, 2) for step in (2, 0, 1)}
    assert torch.equal(SeededNoise([0])(x, 2), draws[0, 2])
    every = [*draws.values(), *(initial_noise([seed], SHAPE) for seed in (0, 1, 2))]
    assert not any(torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])


def test_noise_takes_after_x() -> None:
    """Shape and dtype are those of x."""
    noise = SeededNoise([1, 2])(torch.zeros(2, 3, dtype=torch.float64), 0)
    assert (noise.shape, noise.dtype) == ((2, 3), torch.float64)


def test_global_random_state_is_left_alone() -> None:
    """Seeded noise neither reads nor moves torch's global generator."""
    before = torch.get_rng_state()
    initial_noise([0], SHAPE)
    SeededNoise([0])(torch.zeros(1, 2), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_seed_per_sample() -> None:
    """A batch of another size than the seeds is refused."""
    with pytest.raises(ValueError, match="2 seeds for a batch of 3"):
        SeededNoise([0, 1])(torch.zeros(3, 1), 0)


def test_mix_does_not_collide() -> None:
    """Neighbouring seeds and steps give distinct 63-bit keys, and order matters."""
    keys = {mix(seed, step) for seed in range(200) for step in range(200)}
    assert len(keys) == 200 * 200
    assert all(0 <= key < 2**63 for key in keys)


def test_mix_of_one_key_is_splitmix64() -> None:
    """The published first output of SplitMix64 from state 1234567, without its last bit."""
    assert mix(1234567) == 6457827717110365317 >> 1


def test_steps_and_seeds_are_uncorrelated_standard_normals() -> None:
    """The first draws of 60 seeds x 50 steps: mean 0, variance 1, neighbours uncorrelated, within 4 standard
    errors."""
    first = torch.stack(
        [SeededNoise(range(60))(torch.zeros(60, 1, dtype=torch.float64), step)[:, 0] for step in range(50)]
    )
    n = first.numel()
    assert abs(float(first.mean())) < 4 / math.sqrt(n)
    assert abs(float(first.square().mean()) - 1) < 4 * math.sqrt(2 / n)
    for a, b in ((first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs(float((a * b).mean())) < 4 / math.sqrt(a.numel())


# Brownian paths ---------------------------------------------------------------------------------------------

CLOCKS = [0.0, 1e-9, 0.003, 0.02, 0.7, 1.0, 1.3, 40.0, 3e5, 1e11]


def increments(path: BrownianPath, x: torch.Tensor, clocks: list[float]) -> torch.Tensor:
    """W(b) - W(a) between clocks that follow each other, (len(clocks) - 1, *x.shape)."""
    return torch.stack([path(x, a, b) * math.sqrt(b - a) for a, b in pairwise(clocks)])


def test_increments_are_standard_normal_and_independent() -> None:
    """Over 40,000 draws: mean 0, variance 1, no correlation between disjoint steps, normal tails; within 5
    standard errors."""
    n, x = 40_000, torch.zeros(2, 20_000, dtype=torch.float64)
    path = BrownianPath([3, 4])
    z = torch.stack([path(x, a, b).flatten() for a, b in pairwise(CLOCKS)])
    covariance = z @ z.T / n
    assert z.mean(1).abs().max() < 5 / math.sqrt(n)
    torch.testing.assert_close(
        covariance, torch.eye(len(z), dtype=z.dtype), rtol=0, atol=5 * math.sqrt(2 / n)
    )
    assert (z.abs() < 1.96).double().mean() == pytest.approx(0.95, abs=5 * math.sqrt(0.05 * 0.95 / z.numel()))


def test_steps_add_up_to_longer_ones() -> None:
    """W is one path: the steps between any clocks are the sum of finer ones, whatever was asked first, in
    whatever order."""
    x = torch.zeros(2, 3, 4, dtype=torch.float64)
    fine, coarse = (
        increments(BrownianPath([5, 6]), x, CLOCKS),
        increments(BrownianPath([5, 6]), x, CLOCKS[::3]),
    )
    torch.testing.assert_close(fine.view(3, 3, *x.shape).sum(1), coarse, rtol=1e-9, atol=1e-9)
    path = BrownianPath([5, 6])
    backwards = [path(x, a, b) for a, b in reversed(list(pairwise(CLOCKS)))][::-1]
    assert torch.equal(
        torch.stack(backwards), torch.stack([BrownianPath([5, 6])(x, a, b) for a, b in pairwise(CLOCKS)])
    )


def test_a_path_belongs_to_its_seed() -> None:
    """To the last bit the same alone as in a batch; another seed has another path, and none is the seed's
    other noise."""
    x = torch.zeros(3, 2, 5)
    together = BrownianPath([7, 1, 7])(x, 0.1, 0.4)
    assert torch.equal(together[0], BrownianPath([7])(x[:1], 0.1, 0.4)[0])
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert together.dtype == torch.float32


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [
        (1.0, 1.0, "resolves steps of 0.001"),
        (1.0, 1.0001, "take fewer steps"),
        (1e20, 1e22, "or another eta or diffusion"),
        (2.0, 1.0, "resolves steps"),
    ],
)
def test_a_path_runs_forwards(start: float, stop: float, message: str) -> None:
    """A step that is empty, backwards, or shorter than the path resolves is refused."""
    with pytest.raises(ValueError, match=message):
        BrownianPath([1])(torch.zeros(1, 2), start, stop)


def test_a_path_needs_a_seed_per_sample() -> None:
    """As all noise does."""
    with pytest.raises(ValueError, match="2 seeds for a batch of 3"):
        BrownianPath([1, 2])(torch.zeros(3, 2), 0.1, 0.2)


def test_half_precision_rounds_the_same_path() -> None:
    """The path itself is never held in halves, and what was asked before in another dtype or shape changes
    nothing."""
    path, x = BrownianPath([1, 2]), torch.zeros(2, 50)
    half, whole = path(x.bfloat16(), 0.1, 0.2), path(x, 0.1, 0.2)
    assert torch.equal(half, whole.bfloat16())
    assert torch.equal(whole, BrownianPath([1, 2])(x, 0.1, 0.2))
    assert path(torch.zeros(2, 3), 0.1, 0.2).shape == (2, 3)
