"""Euler ancestral, as users of Stable Diffusion know it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from diffusion import DenoiserLike, Grid, Noise
from samplers.ddim import ddim
from samplers.solver import Step


def euler_ancestral(
    denoiser: DenoiserLike, x: Tensor, grid: Grid, *, eta: float = 1.0, noise: Noise | None = None
) -> Iterator[Step]:
    """Euler ancestral (k-diffusion): Euler to sigma_down, then noise up to sigma_s. The same as `ddim`.

    sigma_up^2 = eta^2 tau sigma_s^2 and sigma_down^2 = sigma_s^2 - sigma_up^2 are shares of the noise
    variance, and so right for flows too. eta = 1 is DDPM. noise defaults to seeds 0 ... B-1.
    """
    yield from ddim(denoiser, x, grid, eta=eta, noise=noise)
