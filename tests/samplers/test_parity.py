"""Parity with diffusers, step by step from equal noise, and proof by point mass where diffusers is wrong.

Its tables are float32. Where a scheduler computes in its input's dtype it is handed our float64 table, so that only the
algorithm is compared and 1e-11 can be asked for; where it computes in float32 the tolerance is float32's.
"""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from packaging.version import Version
from torch import Tensor

from diffusion import (
    EPS,
    FLOW,
    PREDICTIONS,
    CosineVP,
    Denoiser,
    DiscreteVP,
    Grid,
    RectifiedFlow,
    betas,
    flux_mu,
    initial_noise,
    marginal,
    time_grid,
)
from diffusion.oracle import PointMass
from samplers import SAMPLERS

F64 = torch.float64
SD: dict[str, Any] = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
VP, STRAIGHT = DiscreteVP.scaled_linear(), RectifiedFlow()
NOISE = initial_noise([0, 1, 2], (2, 4, 4), F64)
NAMES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


def network(x: Tensor, t: Tensor) -> Tensor:
    """A deterministic stand-in for a network, which depends on x and on the time it is told."""
    return (1.3 * x + 0.002 * t.view(-1, 1, 1, 1)).sin() + 0.5 * x


def told(t: Tensor | float) -> Tensor:
    """A peer's timestep as a batch of times."""
    return torch.as_tensor(t, dtype=F64).expand(len(NOISE))


def exactly(scheduler: Any) -> Any:
    """The scheduler with our float64 table in place of its float32 one."""
    scheduler.alphas_cumprod = VP.alpha_bar
    scheduler.final_alpha_cumprod = torch.ones((), dtype=F64) if scheduler.config.get("set_alpha_to_one", True) else VP.alpha_bar[0]
    scheduler.one = torch.ones((), dtype=F64)
    return scheduler


@pytest.mark.parametrize(
    ("name", "options", "ours"),
    [
        ("linear", {"beta_start": 1e-4, "beta_end": 0.02}, betas.linear()),
        ("scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}, betas.scaled_linear()),
        ("squaredcos_cap_v2", {}, betas.cosine()),
        ("sigmoid", {"beta_start": 1e-4, "beta_end": 0.02}, betas.sigmoid()),
    ],
)
def test_tables(name: str, options: dict[str, float], ours: Tensor) -> None:
    """betas agree to float32's 1e-6, and so does alpha_bar, whose relative error grows with the product to 1e-4."""
    peer = DDPMScheduler(beta_schedule=name, **options)
    torch.testing.assert_close(peer.betas.to(F64), ours, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(peer.alphas_cumprod.to(F64), betas.alpha_bar(ours), rtol=1e-4, atol=1e-9)


def test_zero_terminal_snr_table() -> None:
    """The rescaled table agrees to float32's 1e-6, and the last row is exactly empty."""
    peer = DDIMScheduler(**SD, rescale_betas_zero_snr=True)
    torch.testing.assert_close(peer.alphas_cumprod.to(F64), DiscreteVP.scaled_linear(zero_terminal_snr=True).alpha_bar, rtol=0, atol=1e-6)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize(
    ("steps", "offset", "to_one", "eta"),
    [(13, 0, True, 0.0), (50, 1, False, 0.0), (50, 1, True, 0.0), (30, 1, False, 0.7), (20, 0, True, 1.0), (125, 0, True, 0.0)],
)
def test_ddim_leading(prediction: str, steps: int, offset: int, to_one: bool, eta: float) -> None:
    """DDIM with leading spacing, both terminal rules, any eta and prediction: every step to 1e-11."""
    peer = exactly(DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=to_one, steps_offset=offset, prediction_type=prediction))
    peer.set_timesteps(steps)
    grid = time_grid(VP, steps, "leading", offset=offset, terminal="data" if to_one else "t_min", initial="unit")
    denoiser, x = Denoiser(network, VP, PREDICTIONS[NAMES[prediction]]), grid.start(NOISE)
    assert peer.init_noise_sigma == grid.initial_scale
    assert [level.t for level in grid.levels[:-1]] == peer.timesteps.tolist()
    theirs, z = x, NOISE.flip(0)
    for step, t in zip(SAMPLERS["ddim"](denoiser, x, grid, eta=eta, noise=lambda x, i: z), peer.timesteps, strict=True):
        theirs = peer.step(network(theirs, told(t)), t, theirs, eta=eta, variance_noise=z if eta > 0 else None).prev_sample
        torch.testing.assert_close(step.x, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize(("variance", "ours"), [("fixed_small", "posterior"), ("fixed_large", "upper"), ("learned_range", "learned")])
@pytest.mark.parametrize("steps", [7, 50])
def test_ddpm_strided(prediction: str, variance: str, ours: str, steps: int) -> None:
    """DDPM over strided rows, with each variance it gets right: every step to 1e-10 from the same noise."""

    def wide(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([network(x, t), x.cos()], 1) if ours == "learned" else network(x, t)

    peer = exactly(DDPMScheduler(**SD, clip_sample=False, variance_type=variance, prediction_type=prediction))
    peer.set_timesteps(steps)
    grid = time_grid(VP, steps, "leading", initial="unit")
    denoiser, x = Denoiser(wide, VP, PREDICTIONS[NAMES[prediction]]), grid.start(NOISE)
    generator, same, theirs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3), x
    steps_of_ours = SAMPLERS["ddpm"](
        denoiser, x, grid, variance=ours, noise=lambda x, i: torch.randn(x.shape, generator=generator, dtype=x.dtype)
    )
    for step, t in zip(steps_of_ours, peer.timesteps, strict=True):
        theirs = peer.step(wide(theirs, told(t)), t, theirs, generator=same).prev_sample
        torch.testing.assert_close(step.x, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("linspace", 28), ("leading", 25), ("trailing", 20)])
def test_euler_discrete(prediction: str, spacing: str, steps: int) -> None:
    """Euler in sigma/alpha, as Stable Diffusion XL is sampled: x / alpha there is x here, every step to float32's 2e-5.

    Step counts at which times fall on rows: between rows it interpolates sigma linearly, we (as k-diffusion) its logarithm.
    Its initial scale, which depends on the spacing, is the grid's `initial`.
    """
    peer = EulerDiscreteScheduler(**SD, timestep_spacing=spacing, prediction_type=prediction)
    peer.set_timesteps(steps)
    grid = time_grid(VP, steps, spacing, initial="unit" if spacing == "leading" else "noise")
    denoiser = Denoiser(network, VP, PREDICTIONS[NAMES[prediction]])
    theirs = peer.init_noise_sigma * NOISE
    assert [level.t for level in grid.levels[:-1]] == pytest.approx(peer.timesteps.tolist(), abs=1e-3)
    torch.testing.assert_close(grid.start(NOISE), theirs.to(F64) * grid[0].alpha, rtol=2e-5, atol=2e-5)
    for step, t in zip(SAMPLERS["euler"](denoiser, grid.start(NOISE), grid), peer.timesteps, strict=True):
        out = network(peer.scale_model_input(theirs, t).to(F64), told(t))
        theirs = peer.step(out, t, theirs).prev_sample
        torch.testing.assert_close(step.x, theirs * step.level.alpha, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("peer_options", "mu", "spacing", "options"),
    [
        ({"shift": 1.0}, None, "linspace", {}),
        ({"shift": 3.0}, None, "linspace", {"shift": 3.0}),
        ({"use_dynamic_shifting": True}, flux_mu(1024), "mu_shift", {"mu": flux_mu(1024)}),
    ],
    ids=["plain", "sd3", "flux"],
)
@pytest.mark.parametrize("steps", [4, 28])
def test_flow_match_euler(peer_options: dict[str, Any], mu: float | None, spacing: str, options: dict[str, Any], steps: int) -> None:
    """Flow-match Euler as the SD3 and Flux pipelines call it, shifts included: times to 1e-6, every step to float32's 2e-5."""
    peer = FlowMatchEulerDiscreteScheduler(**peer_options)
    peer.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    grid = time_grid(STRAIGHT, steps, spacing, **options)
    assert [level.t for level in grid] == pytest.approx(peer.sigmas.tolist(), abs=1e-6)
    theirs = NOISE
    denoiser = Denoiser(lambda x, t: network(x, 1000 * t), STRAIGHT, FLOW)
    for step, t in zip(SAMPLERS["euler"](denoiser, grid.start(NOISE), grid), peer.timesteps, strict=True):
        theirs = peer.step(network(theirs, told(t)), t, theirs).prev_sample
        torch.testing.assert_close(step.x, theirs, rtol=2e-5, atol=2e-5)


# Where the peer is wrong -----------------------------------------------------------------------------------------------
# On data that is one point the exact trajectory is alpha x0 + sigma eps with one eps throughout, so that there is no
# question who is right. Each test also fails when the peer is repaired: then move its case to the parity tests above.

POINT = initial_noise([7, 8, 9], (2, 4, 4), F64)
PERFECT = PointMass(POINT)


def our_error(sampler: str, grid: Grid) -> float:
    """The largest distance of our solver from the exact trajectory."""
    steps = SAMPLERS[sampler](PERFECT, marginal(POINT, NOISE, grid[0]), grid)
    return max(float((step.x - marginal(POINT, NOISE, step.level)).abs().max()) for step in steps)


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 13), ("linspace", 10), ("linspace", 50)])
def test_ddim_of_diffusers_leaves_the_trajectory(spacing: str, steps: int) -> None:
    """It steps to t - 1000 // steps, whatever the spacing's next time is, and misses it by over 1e-2; ours is exact at the same times."""
    peer = exactly(DDIMScheduler(**SD, clip_sample=False, timestep_spacing=spacing))
    peer.set_timesteps(steps)
    grid = time_grid(VP, spacing=[float(t) for t in peer.timesteps])
    theirs, error = marginal(POINT, NOISE, grid[0]), 0.0
    for i, t in enumerate(peer.timesteps):
        theirs = peer.step(PERFECT(theirs, grid[i]).eps, t, theirs).prev_sample
        error = max(error, float((theirs - marginal(POINT, NOISE, grid[i + 1])).abs().max()))
    assert error > 1e-2
    assert our_error("ddim", grid) <= 1e-12


def test_ddim_of_diffusers_does_not_reach_the_data() -> None:
    """At 13 trailing steps its last step ends on row 0 and not on data: the image keeps 1e-2 of noise; ours is the point."""
    peer = exactly(DDIMScheduler(**SD, clip_sample=False, timestep_spacing="trailing"))
    peer.set_timesteps(13)
    theirs = marginal(POINT, NOISE, VP.level(999))
    for t in peer.timesteps:
        theirs = peer.step(PERFECT(theirs, VP.level(int(t))).eps, t, theirs).prev_sample
    assert float((theirs - POINT).abs().max()) > 1e-2
    assert our_error("ddim", time_grid(VP, 13, "trailing", whole=True)) <= 1e-12


def test_ddim_of_diffusers_at_1000_steps_with_offset() -> None:
    """Stable Diffusion's offset of 1 with 1000 steps asks for row 1000: an IndexError there, and here an error that says so."""
    peer = DDIMScheduler(**SD, steps_offset=1)
    peer.set_timesteps(1000)
    with pytest.raises(IndexError):
        peer.step(NOISE, peer.timesteps[0], NOISE)
    with pytest.raises(ValueError, match="use fewer steps or offset=0"):
        time_grid(VP, 1000, "leading", offset=1)


def test_ddpm_of_diffusers_with_fixed_large_log() -> None:
    """It takes the square root of a log variance, which is NaN; variance="upper" is the number that was meant."""
    peer = exactly(DDPMScheduler(**SD, clip_sample=False, variance_type="fixed_large_log"))
    peer.set_timesteps(10)
    grid = time_grid(VP, 10, "leading", initial="unit")
    assert peer.step(network(NOISE, told(900)), 900, NOISE).prev_sample.isnan().all()
    first = next(SAMPLERS["ddpm"](Denoiser(network, VP, EPS), NOISE, grid, variance="upper"))
    assert first.x.isfinite().all()


@pytest.mark.skipif(Version(diffusers.__version__) < Version("0.42"), reason="the defect of the peer came with diffusers 0.42")
def test_flow_match_of_diffusers_with_explicit_timesteps() -> None:
    """Given times and shift 3 it shifts the noise but not the time it tells: 500 at 750. It ends far off; ours on the point."""
    times = [1000.0, 750.0, 500.0, 250.0]
    peer = FlowMatchEulerDiscreteScheduler(shift=3.0)
    peer.set_timesteps(timesteps=times)
    assert peer.timesteps[2] == 500
    assert float(peer.sigmas[2]) == 0.75
    theirs = NOISE
    for t in peer.timesteps:
        x0, eps = PERFECT(theirs, STRAIGHT.level(float(t) / 1000))
        theirs = peer.step(eps - x0, t, theirs).prev_sample
    assert float((theirs - POINT).abs().max()) > 0.1
    grid = time_grid(STRAIGHT, spacing=[t / 1000 for t in times], shift=3.0)
    assert [level.t for level in grid] == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-12)
    assert our_error("euler", grid) <= 1e-12


def test_v_at_zero_terminal_snr() -> None:
    """From exact pure noise v-prediction starts without a clamp: ours stays on the trajectory on tables and in continuous time."""
    for schedule in (DiscreteVP.scaled_linear(zero_terminal_snr=True), CosineVP()):
        assert our_error("ddim", time_grid(schedule, 13, "trailing")) <= 1e-12
