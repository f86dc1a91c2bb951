"""Parity with diffusers, call by call from equal noise, and proof by point mass where diffusers is wrong.

Its schedulers are read in float64 (`exactly`), so that their algorithm, tables and times are compared, and
not their rounding. Both sides ask the same stand-in for a network, and have to ask it the same, at the same
times, equally often, and to end in the same place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import Tensor

from diffusion import (
    EDM,
    EPS,
    FLOW,
    NONE,
    Condition,
    ConsistencyFunction,
    CosineVP,
    Denoiser,
    DenoiserLike,
    DiscreteVP,
    Grid,
    NoiseLevel,
    VarianceExploding,
    betas,
    flux_mu,
    initial_noise,
    lcm,
    marginal,
    time_grid,
)
from diffusion.oracle import PointMass
from samplers import SAMPLERS
from tests.conftest import PREDICTIONS
from tests.peers import diffusers
from tests.samplers.parity import F64, NOISE, STRAIGHT, VP

SD: dict[str, Any] = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
)
FLOWS: dict[str, Any] = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
NAMES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
K_DIFFUSION: list[tuple[str, str, dict[str, Any]]] = [
    ("EulerDiscreteScheduler", "euler", {}),
    ("HeunDiscreteScheduler", "heun", {"coordinate": "ratio"}),
    ("KDPM2DiscreteScheduler", "dpm2", {}),
    ("EulerAncestralDiscreteScheduler", "euler_ancestral", {}),
]
TWO_M = [("dpmpp_2m", "dpmsolver++"), ("dpmpp_2m_sde", "sde-dpmsolver++")]

Exactly = Callable[[Any], Any]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what the peers make of NumPy


class Asked:
    """A deterministic stand-in for a network, which depends on x and on the time it is told, and keeps
    both."""

    def __init__(self, wide: bool) -> None:
        """wide: with a learned variance in twice the channels."""
        self.calls: list[tuple[Tensor, float]] = []
        self.wide = wide

    def __call__(self, x: Tensor, t: Tensor, condition: Condition = NONE) -> Tensor:
        self.calls.append((x, float(t[0])))
        out = (1.3 * x + 0.002 * t.view(-1, 1, 1, 1)).sin() + 0.5 * x
        return torch.cat([out, x.cos()], 1) if self.wide else out


def agree(
    peer: Any, grid: Grid, sampler: str, make: Callable[[Asked], DenoiserLike],
    options: Mapping[str, Any] | None = None, *,
    wide: bool = False, times: Sequence[float] | None = None, **step_options: Any,
) -> None:  # fmt: skip
    """Every call of the network, its time included, and the end, to 1e-11 of what is compared.

    make   our denoiser around the stand-in
    times  what the network is told in the peer's loop, where its own times are rounded
    """
    ours, theirs = Asked(wide), Asked(wide)
    seed, same = (torch.Generator().manual_seed(3) for _ in range(2))
    draw = lambda x, *keys: torch.randn(x.shape, generator=same, dtype=x.dtype)  # noqa: E731
    noise = {
        name: draw for name in ("noise", "path") if name in inspect.signature(SAMPLERS[sampler]).parameters
    }
    *_, last = SAMPLERS[sampler](make(ours), grid.start(NOISE), grid, **noise, **(options or {}))
    x = float(getattr(peer, "init_noise_sigma", 1.0)) * NOISE
    if "generator" in inspect.signature(peer.step).parameters:
        step_options["generator"] = seed
    for t, time in zip(peer.timesteps, peer.timesteps if times is None else times, strict=True):
        scaled = peer.scale_model_input(x, t) if hasattr(peer, "scale_model_input") else x
        x = peer.step(
            theirs(scaled, torch.as_tensor(time, dtype=F64).expand(len(x))), t, x, **step_options
        ).prev_sample
    assert len(ours.calls) == len(theirs.calls)
    for (x_t, t), (x_there, t_there) in zip(ours.calls, theirs.calls, strict=True):
        assert t == pytest.approx(t_there, rel=1e-11, abs=1e-11)
        torch.testing.assert_close(x_t, x_there, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(last.x, x, rtol=1e-11, atol=1e-11)


def vp(prediction: str = "epsilon") -> Callable[[Asked], Denoiser]:
    return lambda network: Denoiser(network, VP, PREDICTIONS[NAMES[prediction]])


def consistent(prediction: str = "epsilon") -> Callable[[Asked], ConsistencyFunction]:
    return lambda network: ConsistencyFunction(vp(prediction)(network), lcm())


def flow(network: Asked) -> Denoiser:
    return Denoiser(network, STRAIGHT, replace(FLOW, network_time=lambda level: 1000 * level.t))


def flow_grid(peer: Any) -> Grid:
    """Its own levels, from unit noise as its pipelines start, though its first level holds a trace of
    data."""
    return replace(time_grid(STRAIGHT, spacing=peer.sigmas[:-1].tolist()), initial_scale=1.0)


def edm(network: Asked) -> Denoiser:
    return Denoiser(network, VarianceExploding(), EDM)


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
    """betas agree to float32's 1e-6, and so does alpha_bar, whose relative error grows with the product to
    1e-4."""
    peer = diffusers.DDPMScheduler(beta_schedule=name, **options)
    torch.testing.assert_close(peer.betas.to(F64), ours, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(peer.alphas_cumprod.to(F64), betas.alpha_bar(ours), rtol=1e-4, atol=1e-9)


def test_zero_terminal_snr_table() -> None:
    """The rescaled table agrees to float32's 1e-6, and the last row is exactly empty."""
    peer = diffusers.DDIMScheduler(**SD, rescale_betas_zero_snr=True)
    torch.testing.assert_close(
        peer.alphas_cumprod.to(F64),
        DiscreteVP.scaled_linear(zero_terminal_snr=True).alpha_bar,
        rtol=0,
        atol=1e-6,
    )


# First order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize(
    ("steps", "offset", "to_one", "eta"),
    [
        (13, 0, True, 0.0),
        (50, 1, False, 0.0),
        (50, 1, True, 0.0),
        (30, 1, False, 0.7),
        (20, 0, True, 1.0),
        (125, 0, True, 0.0),
    ],
)
def test_ddim_leading(
    exactly: Exactly, prediction: str, steps: int, offset: int, to_one: bool, eta: float
) -> None:
    """DDIM with leading spacing, both terminal rules, any eta and prediction."""
    peer = exactly(diffusers.DDIMScheduler)(
        **SD, clip_sample=False, set_alpha_to_one=to_one, steps_offset=offset, prediction_type=prediction
    )
    peer.set_timesteps(steps)
    grid = time_grid(
        VP, steps, "leading", offset=offset, terminal="data" if to_one else "t_min", initial="unit"
    )
    agree(peer, grid, "ddim", vp(prediction), {"eta": eta}, eta=eta)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize(
    ("variance", "ours"),
    [("fixed_small", "posterior"), ("fixed_large", "upper"), ("learned_range", "learned")],
)
@pytest.mark.parametrize("steps", [7, 50])
def test_ddpm_strided(exactly: Exactly, prediction: str, variance: str, ours: str, steps: int) -> None:
    """DDPM over strided rows, with each variance it gets right."""
    peer = exactly(diffusers.DDPMScheduler)(
        **SD, clip_sample=False, variance_type=variance, prediction_type=prediction
    )
    peer.set_timesteps(steps)
    agree(
        peer,
        time_grid(VP, steps, "leading", initial="unit"),
        "ddpm",
        vp(prediction),
        {"variance": ours},
        wide=ours == "learned",
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("spacing", "steps"), [("linspace", 10), ("linspace", 28), ("leading", 25), ("trailing", 20)]
)
@pytest.mark.parametrize(("scheduler", "sampler", "options"), K_DIFFUSION)
def test_in_sigma_over_alpha(
    exactly: Exactly,
    scheduler: str,
    sampler: str,
    options: dict[str, Any],
    spacing: str,
    steps: int,
    prediction: str,
) -> None:
    """The schedulers that came from k-diffusion, as Stable Diffusion is sampled: x / alpha there is x here.

    Step counts at which times fall on rows: between rows they interpolate sigma linearly, we (as k-diffusion)
    its logarithm. Their initial scale, which depends on the spacing, is the grid's `initial`.
    """
    peer = exactly(getattr(diffusers, scheduler))(**SD, timestep_spacing=spacing, prediction_type=prediction)
    peer.set_timesteps(steps)
    grid = time_grid(VP, steps, spacing, initial="unit" if spacing == "leading" else "noise")
    agree(peer, grid, sampler, vp(prediction), options)


@pytest.mark.parametrize(
    ("option", "spacing"), [("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "exponential")]
)
@pytest.mark.parametrize(("scheduler", "sampler", "options"), K_DIFFUSION[:2])
def test_spaced_in_sigma(
    exactly: Exactly, scheduler: str, sampler: str, options: dict[str, Any], option: str, spacing: str
) -> None:
    """Karras's and exponential sigmas, with the times between rows that belong to them."""
    peer = exactly(getattr(diffusers, scheduler))(**SD, **{option: True})
    peer.set_timesteps(12)
    agree(peer, time_grid(VP, 12, spacing), sampler, vp(), options)


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
def test_flow_match_euler(
    exactly: Exactly,
    peer_options: dict[str, Any],
    mu: float | None,
    spacing: str,
    options: dict[str, Any],
    steps: int,
) -> None:
    """Flow-match Euler as the SD3 and Flux pipelines call it, shifts included."""
    peer = exactly(diffusers.FlowMatchEulerDiscreteScheduler)(**peer_options)
    peer.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    agree(peer, time_grid(STRAIGHT, steps, spacing, **options), "euler", flow)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_lcm(exactly: Exactly, prediction: str, steps: int) -> None:
    """Latent consistency models: jump, renew all noise, jump again; at the times of their training."""
    peer = exactly(diffusers.LCMScheduler)(**SD, prediction_type=prediction)
    peer.set_timesteps(steps)
    agree(peer, time_grid(VP, spacing=peer.timesteps.tolist(), initial="unit"), "lcm", consistent(prediction))


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_edm_euler(exactly: Exactly, spacing: str) -> None:
    """EDM's preconditioning around a raw network. It starts from sqrt(sigma_max^2 + 1) n, where EDM itself
    does from sigma_max n."""
    peer = exactly(diffusers.EDMEulerScheduler)(sigma_schedule=spacing)
    peer.set_timesteps(12)
    agree(peer, time_grid(VarianceExploding(), 12, spacing, initial="unit"), "euler", edm)


# Second order and above -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [2, 4, 28])
def test_flow_match_heun(exactly: Exactly, shift: float, steps: int) -> None:
    """Heun in flow time, at its own times (of which the last is shifted twice, see below)."""
    peer = exactly(diffusers.FlowMatchHeunDiscreteScheduler)(shift=shift)
    peer.set_timesteps(steps)
    agree(
        peer,
        time_grid(STRAIGHT, spacing=peer.sigmas[[0, *range(1, 2 * steps - 1, 2)]].tolist()),
        "heun",
        flow,
    )


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize(("sampler", "algorithm"), TWO_M)
@pytest.mark.parametrize(
    ("spacing", "steps", "end"),
    [
        ("linspace", 10, "zero"),
        ("linspace", 37, "zero"),
        ("leading", 19, "zero"),
        ("trailing", 20, "zero"),
        ("linspace", 20, "sigma_min"),
    ],
)
def test_dpmpp_2m(
    exactly: Exactly, sampler: str, algorithm: str, prediction: str, spacing: str, steps: int, end: str
) -> None:
    """DPM-Solver++(2M) and its SDE, to data and to the lowest row."""
    peer = exactly(diffusers.DPMSolverMultistepScheduler)(
        **SD,
        algorithm_type=algorithm,
        prediction_type=prediction,
        timestep_spacing=spacing,
        final_sigmas_type=end,
    )
    peer.set_timesteps(steps)
    grid = time_grid(
        VP, spacing=peer.timesteps.tolist(), terminal="data" if end == "zero" else "t_min", initial="unit"
    )
    agree(peer, grid, sampler, vp(prediction))


@pytest.mark.parametrize(("sampler", "algorithm"), TWO_M)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_dpmpp_2m_on_flows(exactly: Exactly, sampler: str, algorithm: str, shift: float) -> None:
    """The same on flows, as Sana is sampled, at times that are not cut to whole numbers (see below)."""
    peer = exactly(diffusers.DPMSolverMultistepScheduler)(algorithm_type=algorithm, flow_shift=shift, **FLOWS)
    peer.set_timesteps(20)
    agree(peer, flow_grid(peer), sampler, flow, times=(1000 * peer.sigmas[:-1]).tolist())


@pytest.mark.parametrize(("sampler", "algorithm"), TWO_M)
def test_edm_dpmpp_2m(exactly: Exactly, sampler: str, algorithm: str) -> None:
    """The same around EDM's raw network."""
    peer = exactly(diffusers.EDMDPMSolverMultistepScheduler)(algorithm_type=algorithm)
    peer.set_timesteps(12)
    agree(peer, time_grid(VarianceExploding(), 12, "karras", initial="unit"), sampler, edm)


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("steps", [3, 7, 15])
def test_dpmpp_2s(exactly: Exactly, prediction: str, steps: int) -> None:
    """DPM-Solver++(2S). Two of its steps are one of ours where its rows are uniform in lambda: every other
    one is halfway then."""
    peer = exactly(diffusers.DPMSolverSinglestepScheduler)(
        **SD, prediction_type=prediction, use_exponential_sigmas=True
    )
    peer.set_timesteps(steps)
    rows = time_grid(VP, steps, "log_snr", initial="unit")
    times = [level.t for level in rows[:-1]]  # which it cuts to whole numbers
    agree(
        peer, replace(rows, levels=(*rows.levels[:-1:2], rows[-1])), "dpmpp_2s", vp(prediction), times=times
    )


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize(
    ("spacing", "steps"),
    [("linspace", 2), ("linspace", 10), ("linspace", 27), ("leading", 19), ("trailing", 20)],
)
def test_unipc_to_data(exactly: Exactly, prediction: str, spacing: str, steps: int) -> None:
    """UniPC of order 2, predictor and corrector."""
    peer = exactly(diffusers.UniPCMultistepScheduler)(
        **SD, prediction_type=prediction, timestep_spacing=spacing
    )
    peer.set_timesteps(steps)
    agree(peer, time_grid(VP, spacing=peer.timesteps.tolist(), initial="unit"), "unipc", vp(prediction))


@pytest.mark.parametrize("prediction", NAMES)
@pytest.mark.parametrize("order", [2, 3])
def test_unipc_to_the_lowest_row(exactly: Exactly, prediction: str, order: int) -> None:
    """UniPC of order 2 and 3, in full to the end. (To data theirs of order 3 already lowers its order one
    step earlier.)"""
    peer = exactly(diffusers.UniPCMultistepScheduler)(
        **SD,
        prediction_type=prediction,
        solver_order=order,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
    )
    peer.set_timesteps(20)
    grid = time_grid(VP, spacing=peer.timesteps.tolist(), terminal="t_min", initial="unit")
    agree(peer, grid, "unipc", vp(prediction), {"order": order})


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_unipc_on_flows(exactly: Exactly, shift: float) -> None:
    """UniPC as Wan is sampled; it starts 1e-6 below pure noise, which has no lambda, and so do we here."""
    peer = exactly(diffusers.UniPCMultistepScheduler)(flow_shift=shift, **FLOWS)
    peer.set_timesteps(20)
    agree(peer, flow_grid(peer), "unipc", flow, times=(1000 * peer.sigmas[:-1]).tolist())


@pytest.mark.parametrize(("algorithm", "eta"), [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
def test_dpmpp_3m_until_its_parabola(exactly: Exactly, algorithm: str, eta: float) -> None:
    """Order 3, two steps and the one to data: the third estimate does not count yet, and there it is wrong,
    see test_third_order.py."""
    peer = exactly(diffusers.DPMSolverMultistepScheduler)(
        **SD, algorithm_type=algorithm, solver_order=3, solver_type="heun"
    )
    peer.set_timesteps(3)
    agree(
        peer,
        time_grid(VP, spacing=peer.timesteps.tolist(), initial="unit"),
        "dpmpp_3m_sde",
        vp(),
        {"eta": eta},
    )


# Where the peer is wrong: here, and its third order in test_third_order.py ----------------------------------
# On data that is one point the exact trajectory is alpha x0 + sigma eps with one eps throughout, so that
# there is no question who is right. Each test also fails when the peer is repaired: then move its case to the
# parity tests above.

POINT = initial_noise([7, 8, 9], (2, 4, 4), F64)
PERFECT = PointMass(POINT)


def our_error(sampler: str, grid: Grid) -> float:
    """The largest distance of our solver from the exact trajectory."""
    steps = SAMPLERS[sampler](PERFECT, marginal(POINT, NOISE, grid[0]), grid)
    return max(float((step.x - marginal(POINT, NOISE, step.level)).abs().max()) for step in steps)


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 13), ("linspace", 10), ("linspace", 50)])
def test_ddim_leaves_the_trajectory(exactly: Exactly, spacing: str, steps: int) -> None:
    """It steps to t - 1000 // steps, whatever the spacing's next time is, and misses it by over 1e-2; ours is
    exact at the same times."""
    peer = exactly(diffusers.DDIMScheduler)(**SD, clip_sample=False, timestep_spacing=spacing)
    peer.set_timesteps(steps)
    grid = time_grid(VP, spacing=[float(t) for t in peer.timesteps])
    theirs, error = marginal(POINT, NOISE, grid[0]), 0.0
    for i, t in enumerate(peer.timesteps):
        theirs = peer.step(PERFECT(theirs, grid[i]).eps, t, theirs).prev_sample
        error = max(error, float((theirs - marginal(POINT, NOISE, grid[i + 1])).abs().max()))
    assert error > 1e-2
    assert our_error("ddim", grid) <= 1e-12


def test_ddim_does_not_reach_the_data(exactly: Exactly) -> None:
    """At 13 trailing steps its last step ends on row 0 and not on data: the image keeps 1e-2 of noise; ours
    is the point."""
    peer = exactly(diffusers.DDIMScheduler)(**SD, clip_sample=False, timestep_spacing="trailing")
    peer.set_timesteps(13)
    theirs = marginal(POINT, NOISE, VP.level(999))
    for t in peer.timesteps:
        theirs = peer.step(PERFECT(theirs, VP.level(int(t))).eps, t, theirs).prev_sample
    assert float((theirs - POINT).abs().max()) > 1e-2
    assert our_error("ddim", time_grid(VP, 13, "trailing", whole=True)) <= 1e-12


def test_ddim_at_1000_steps_with_offset() -> None:
    """Stable Diffusion's offset of 1 with 1000 steps asks for row 1000: an IndexError there, and here an
    error that says so."""
    peer = diffusers.DDIMScheduler(**SD, steps_offset=1)
    peer.set_timesteps(1000)
    with pytest.raises(IndexError):
        peer.step(NOISE, peer.timesteps[0], NOISE)
    with pytest.raises(ValueError, match="use fewer steps or offset=0"):
        time_grid(VP, 1000, "leading", offset=1)


def test_ddpm_with_fixed_large_log(exactly: Exactly) -> None:
    """It takes the square root of a log variance, which is NaN; variance="upper" is the number that was
    meant."""
    peer = exactly(diffusers.DDPMScheduler)(**SD, clip_sample=False, variance_type="fixed_large_log")
    peer.set_timesteps(10)
    assert peer.step(NOISE.sin(), 900, NOISE).prev_sample.isnan().all()
    first = next(
        SAMPLERS["ddpm"](
            vp()(Asked(wide=False)), NOISE, time_grid(VP, 10, "leading", initial="unit"), variance="upper"
        )
    )
    assert first.x.isfinite().all()


@pytest.mark.skipif(
    Version(version("diffusers")) < Version("0.42"), reason="the defect of the peer came with diffusers 0.42"
)
def test_flow_match_with_explicit_timesteps() -> None:
    """Given times and shift 3 it shifts the noise but not the time it tells: 500 at 750. It ends far off;
    ours on the point."""
    times = [1000.0, 750.0, 500.0, 250.0]
    peer = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
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


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_flow_match_shifts_its_last_time_twice(exactly: Exactly, scheduler: str) -> None:
    """With shift 3 the cleanest training time, 0.001, becomes 0.003, and there 0.0089 (diffusers #13243)."""
    peer = exactly(getattr(diffusers, scheduler))(shift=3.0)
    peer.set_timesteps(10)
    once = time_grid(STRAIGHT, 10, "linspace", t_end=0.001, shift=3.0)[-2]
    assert once.sigma == pytest.approx(0.003 / 1.002)
    assert float(peer.sigmas[-2]) == pytest.approx(3 * once.sigma / (1 + 2 * once.sigma))


def trajectory_error(
    peer: Any,
    start: Tensor,
    exact: Callable[[float], NoiseLevel],
    told: Callable[[float], NoiseLevel],
    kind: str,
) -> float:
    """The largest distance of a peer from the exact trajectory, asking a perfect network that believes the
    time it is told.

    exact: the level of the peer's sigma; told: the level of the time it tells; kind: the estimate's part or
        velocity it wants
    """
    x, error = start, 0.0
    for t, sigma_s in zip(peer.timesteps, peer.sigmas[1:], strict=True):
        estimate = PERFECT(x, told(float(t)))
        x = peer.step(estimate.eps if kind == "eps" else estimate.combine(-1.0, 1.0), t, x).prev_sample
        error = max(error, float((x - marginal(POINT, NOISE, exact(float(sigma_s)))).abs().max()))
    return error


def row_of(ratio: float) -> NoiseLevel:
    return VP.level(float(VP.t_from_ratio(ratio)))


MULTISTEP = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]


@pytest.mark.parametrize("scheduler", [*MULTISTEP, "DPMSolverSinglestepScheduler"])
@pytest.mark.parametrize(
    ("option", "spacing", "at_least"),
    [("use_exponential_sigmas", "exponential", 1e-2), ("use_karras_sigmas", "karras", 2e-3)],
)
def test_the_time_told_is_not_the_time(
    exactly: Exactly, scheduler: str, option: str, spacing: str, at_least: float
) -> None:
    """Exponential sigmas tell times cut to whole numbers, Karras's rounded ones: off by 2e-2 and 4e-3. Ours
    tells them as they are."""
    peer = exactly(getattr(diffusers, scheduler))(**SD, **{option: True})
    peer.set_timesteps(20)
    grid = time_grid(VP, 20, spacing)
    assert trajectory_error(peer, marginal(POINT, NOISE, grid[0]), row_of, VP.level, "eps") > at_least
    assert our_error("dpmpp_2m", grid) <= 1e-12


@pytest.mark.parametrize("scheduler", [*MULTISTEP, "DPMSolverSinglestepScheduler"])
def test_the_time_told_on_flows_is_not_the_time(exactly: Exactly, scheduler: str) -> None:
    """Flow sigmas tell times cut to whole thousandths: off by 4e-3. Ours tells them as they are."""
    peer = exactly(getattr(diffusers, scheduler))(**FLOWS)
    peer.set_timesteps(20)
    start = marginal(POINT, NOISE, STRAIGHT.level(float(peer.sigmas[0])))
    assert trajectory_error(peer, start, STRAIGHT.level, lambda t: STRAIGHT.level(t / 1000), "flow") > 2e-3
    assert our_error("dpmpp_2m", flow_grid(peer)) <= 1e-12


@pytest.mark.parametrize("scheduler", MULTISTEP)
def test_multistep_at_1000_steps(scheduler: str) -> None:
    """One step for each row: it rounds 1001 times to 1000 rows, so that one comes twice, and divides by a
    step of 0: NaN."""
    peer = getattr(diffusers, scheduler)(**SD)
    peer.set_timesteps(1000)
    x = NOISE.float()
    for t in peer.timesteps:
        x = peer.step(x.sin(), t, x).prev_sample
    assert x.isnan().all()
    assert our_error("dpmpp_2m", time_grid(VP, 1000)) <= 1e-12


def test_cosine_table_with_karras_sigmas() -> None:
    """Its first times are one row, of which it takes the second: it starts a step late and runs off the end
    (diffusers #12771)."""
    peer = diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True)
    peer.set_timesteps(20)
    assert (peer.timesteps[0] == peer.timesteps[1]).all()
    for t in peer.timesteps[:-1]:
        peer.step(NOISE, t, NOISE)
    with pytest.raises(IndexError):
        peer.step(NOISE, peer.timesteps[-1], NOISE)
    assert our_error("dpmpp_2m", time_grid(DiscreteVP.cosine(), 20, "karras")) <= 1e-12


@pytest.mark.parametrize(
    ("scheduler", "option"),
    [
        *((scheduler, "use_exponential_sigmas") for scheduler in MULTISTEP),
        ("DPMSolverMultistepScheduler", "use_karras_sigmas"),
    ],
)
def test_flows_spaced_in_sigma(scheduler: str, option: str) -> None:
    """It takes sigma / alpha of a VP table for a flow's sigma, and starts at 14.6, where alpha = 1 - sigma <
    0. Ours stays on the flow."""
    peer = getattr(diffusers, scheduler)(**{**SD, **FLOWS, option: True})
    peer.set_timesteps(10)
    assert float(peer.sigmas[0]) == pytest.approx(float(VP.ratio(999)), rel=1e-3)
    assert our_error("dpmpp_2m", time_grid(STRAIGHT, 10, "karras", t_start=0.999, t_end=0.001)) <= 1e-12


@pytest.mark.parametrize(
    ("scheduler", "options", "at_least"),
    [("EulerDiscreteScheduler", SD, 1.0), ("EDMEulerScheduler", {}, 0.1)],
)
def test_churn_comes_after_the_network_has_looked(
    exactly: Exactly, scheduler: str, options: dict[str, Any], at_least: float
) -> None:
    """Noise is added to x in `step`, when the output is already there, of x without it: x0 of a point is off.
    `edm` adds it first."""
    peer, error = exactly(getattr(diffusers, scheduler))(**options), 0.0
    for i in range(10):
        peer.set_timesteps(10)
        peer.set_begin_index(i)
        t, sigma = peer.timesteps[i], float(peer.sigmas[i])
        x = POINT + sigma * NOISE
        peer.scale_model_input(x, t)
        out = (
            NOISE
            if scheduler == "EulerDiscreteScheduler"
            else PREDICTIONS["edm"].target(POINT, NOISE, NoiseLevel(0.0, 1.0, sigma))
        )
        off = (
            peer.step(
                out, t, x, s_churn=10.0, generator=torch.Generator().manual_seed(3)
            ).pred_original_sample
            - POINT
        )
        error = max(error, float(off.abs().max()))
    assert error > at_least


def test_churn_on_flows_keeps_alpha(exactly: Exactly) -> None:
    """It raises a flow's sigma and leaves alpha: two points, from equal noise, are 0.61 apart where the
    level's alpha is 0.22."""
    ends = []
    for point in (POINT, torch.zeros_like(POINT)):
        peer = exactly(diffusers.FlowMatchHeunDiscreteScheduler)()
        peer.set_timesteps(10)
        same, x = torch.Generator().manual_seed(3), marginal(point, NOISE, STRAIGHT.level(1.0))
        for t in peer.timesteps[:3]:
            estimate = PointMass(point)(x, STRAIGHT.level(float(t) / 1000))
            x = peer.step(estimate.combine(-1.0, 1.0), t, x, s_churn=10.0, generator=same).prev_sample
        ends.append(x)
    left = (ends[0] - ends[1]) / POINT
    assert float((left - (1 - peer.sigmas[3])).abs().min()) > 0.1


def test_lcm_with_strength_ends_in_noise(exactly: Exactly) -> None:
    """Given times of its own and a strength, it takes the number of times before the strength for that of
    steps: the last adds noise."""
    peer = exactly(diffusers.LCMScheduler)(**SD)
    peer.set_timesteps(timesteps=[999, 759, 499, 259], strength=0.5)
    x = marginal(POINT, NOISE, VP.level(499))
    for t in peer.timesteps:
        x = peer.step(
            PERFECT(x, VP.level(int(t))).eps, t, x, generator=torch.Generator().manual_seed(3)
        ).prev_sample
    assert float((x - POINT).abs().max()) > 0.5
    grid = time_grid(VP, spacing=[999, 759, 499, 259])[2:]
    denoiser = ConsistencyFunction(
        Denoiser(lambda x, t, condition: PERFECT(x, VP.level(float(t[0]))).eps, VP, EPS), lcm()
    )
    *_, last = SAMPLERS["lcm"](denoiser, marginal(POINT, NOISE, grid[0]), grid)
    torch.testing.assert_close(
        last.x, POINT, rtol=0, atol=1e-5
    )  # its blend keeps 0.0025 / t^2 of x, as it must


@pytest.mark.parametrize("scheduler", [*MULTISTEP, "EulerDiscreteScheduler"])
def test_zero_terminal_snr_is_clamped(exactly: Exactly, scheduler: str) -> None:
    """Its last row is 2^-12 of data and not pure noise: v-prediction starts 6e-4 off. Ours starts exactly."""
    table = DiscreteVP.scaled_linear(zero_terminal_snr=True)
    peer = exactly(getattr(diffusers, scheduler))(
        **SD, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    peer.set_timesteps(13)
    t = peer.timesteps[0]
    ve = float(peer.init_noise_sigma)
    x = peer.scale_model_input(ve * NOISE, t)
    estimate = PERFECT(x, table.level(float(t)))
    v = PREDICTIONS["v"].target(estimate.x0, estimate.eps, table.level(float(t)))
    s = table.level(float(peer.timesteps[1]))
    reached = peer.step(v, t, ve * NOISE).prev_sample * (s.alpha if ve > 1 else 1.0)
    assert float((reached - marginal(POINT, NOISE, s)).abs().max()) > 1e-4
    for sampler in ("ddim", "euler", "dpmpp_2m", "unipc"):
        assert our_error(sampler, time_grid(table, 13, "trailing")) <= 1e-12


def test_v_at_zero_terminal_snr() -> None:
    """From exact pure noise v-prediction starts without a clamp: ours stays on the trajectory on tables and
    in continuous time."""
    for schedule in (DiscreteVP.scaled_linear(zero_terminal_snr=True), CosineVP()):
        assert our_error("ddim", time_grid(schedule, 13, "trailing")) <= 1e-12
