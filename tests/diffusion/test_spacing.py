"""Spacings against worked examples, their papers' formulas, and the peers that ship them.

ComfyUI is no package: its schedulers are restated here from what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from diffusion import (
    CosineVP,
    DiscreteVP,
    Grid,
    RectifiedFlow,
    Schedule,
    Shifted,
    VarianceExploding,
    time_grid,
)
from tests.peers import diffusers, k_sampling, scipy

FLOW, TABLE, VE, SVD = (
    RectifiedFlow(),
    DiscreteVP.scaled_linear(),
    VarianceExploding(),
    VarianceExploding(0.002, 700.0),
)
SD: dict[str, Any] = dict(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
)
wrong_grid: Any = time_grid  # for values that the types forbid


def t_of(grid: Grid) -> list[float]:
    return [level.t for level in grid]


def ratios(grid: Grid) -> list[float]:
    return [level.ratio for level in grid]


@pytest.mark.parametrize(
    ("schedule", "spacing", "options", "expected"),
    [
        (TABLE, "sgm_uniform", {}, [999, 749.25, 499.5, 249.75, -1]),
        (FLOW, "sgm_uniform", {}, [1, 0.75, 0.5, 0.25, 0]),
        (FLOW, "sgm_uniform", {"t_end": 0.2}, [1, 0.8, 0.6, 0.4, 0]),
        (TABLE, "simple", {}, [999, 749, 499, 249, -1]),
        (FLOW, "simple", {}, [1, 0.75, 0.5, 0.25, 0]),
        (FLOW, "simple", {"shift": 3.0}, [1, 0.9, 0.75, 0.5, 0]),
        (TABLE, "beta", {"alpha": 1.0, "beta": 1.0}, [999, 749.25, 499.5, 249.75, -1]),
        (
            FLOW,
            "beta",
            {"alpha": 0.5, "beta": 0.5},
            [math.sin(math.pi / 8 * i) ** 2 for i in (4, 3, 2, 1, 0)],
        ),
        (
            FLOW,
            "beta",
            {"alpha": 2.0, "beta": 1.0, "t_end": 0.2},
            [1, *(0.2 + 0.8 * math.sqrt(i / 4) for i in (3, 2, 1)), 0],
        ),
        (FLOW, "beta", {"alpha": 1.0, "beta": 2.0}, [1 - math.sqrt(i / 4) for i in (0, 1, 2, 3, 4)]),
        (FLOW, "linear_quadratic", {"threshold": 0.1, "linear_steps": 2}, [1, 0.95, 0.9, 0.65, 0]),
        (
            FLOW,
            "linear_quadratic",
            {"threshold": 0.1, "linear_steps": 1},
            [1, 0.9, 1 - 0.2 - 0.6 / 9, 1 - 0.3 - 2.4 / 9, 0],
        ),
        (FLOW, "linear_quadratic", {"threshold": 0.25, "linear_steps": 1}, [1, 0.75, 0.5, 0.25, 0]),
        (
            FLOW,
            "linear_quadratic",
            {"threshold": 0.1, "linear_steps": 2, "t_start": 0.5},
            [0.5, 0.475, 0.45, 0.325, 0],
        ),
        (TABLE, "turbo", {}, [999, 899, 799, 699, -1]),
        (FLOW, "turbo", {"stride": 0.2, "t_start": 0.9}, [0.9, 0.7, 0.5, 0.3, 0]),
        (TABLE, "lcm", {}, [999, 759, 499, 259, -1]),
        (FLOW, "lcm", {"taught": 10}, [1, 0.8, 0.5, 0.3, 0]),
    ],
)
def test_spacings_by_hand(
    schedule: Schedule, spacing: str, options: dict[str, Any], expected: list[float]
) -> None:
    """Four steps of each, worked out on paper. beta where its quantiles are elementary."""
    assert t_of(time_grid(schedule, 4, spacing, **options)) == pytest.approx(expected, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("spacing", ["karras", "log_snr", "linear_quadratic"])
def test_spacings_of_the_noise_are_the_same_on_every_schedule(schedule: Schedule, spacing: str) -> None:
    """Between equal sigma/alpha they visit equal sigma/alpha, whatever the schedule calls those times."""
    ends: dict[str, Any] = (
        {"t_start": 12.0} if spacing == "linear_quadratic" else {"t_start": 12.0, "t_end": 0.2}
    )
    named: dict[str, Any] = {name: float(schedule.t_from_ratio(ratio)) for name, ratio in ends.items()}
    assert ratios(time_grid(schedule, 10, spacing, **named)) == pytest.approx(
        ratios(time_grid(VE, 10, spacing, **ends)), rel=1e-11
    )


# Even in t --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 7, 20, 99, 1000])
def test_simple_is_comfyuis(steps: int) -> None:
    """Rows -(1 + int(i N / steps)) of its table: SD's own, 1000 times of a flow, shifted or not, 1000 log
    sigmas of EDM.

    Its flows have their shift within the table, which is shift=. Where i N / steps is whole it may miss that
    row by one: in floating point 19 * (1000 / 38) is 499.99..., so it takes row 500 where "every N/steps-th"
    is 499.
    """
    picked = [-(1 + int(i * (1000 / steps))) for i in range(steps)]
    t = np.arange(1, 1001) / 1000
    assert t_of(time_grid(TABLE, steps, "simple")) == [*(1000 + row for row in picked), -1]
    assert t_of(time_grid(FLOW, steps, "simple")) == pytest.approx([*t[picked], 0], rel=1e-14)
    assert t_of(time_grid(FLOW, steps, "simple", shift=3.0)) == pytest.approx(
        [*(3 * t / (1 + 2 * t))[picked], 0], rel=1e-13
    )
    edm = np.exp(np.linspace(math.log(0.002), math.log(80), 1000))
    assert ratios(time_grid(VE, steps, "simple")) == pytest.approx([*edm[picked], 0], rel=1e-12)
    assert (int(19 * (1000 / 38)), t_of(time_grid(TABLE, 38, "simple"))[19]) == (
        499,
        499,
    )  # -(1 + 499) is row 500


@pytest.mark.parametrize("shapes", [(0.6, 0.6), (0.5, 0.7), (1.3, 0.8)])
@pytest.mark.parametrize("steps", [1, 4, 13, 50])
def test_beta_is_comfyuis(steps: int, shapes: tuple[float, float]) -> None:
    """The rows rint((N-1) ppf(1 - i/steps)), where none comes twice; without `whole` the times before
    rounding, to 1e-9 of scipy's."""
    expected = 999 * scipy.stats.beta.ppf(1 - np.linspace(0, 1, steps, endpoint=False), *shapes)
    options: dict[str, Any] = dict(zip(("alpha", "beta"), shapes, strict=True))
    assert t_of(time_grid(TABLE, steps, "beta", **options)) == pytest.approx(
        [*expected, -1], rel=1e-12, abs=1e-9
    )
    assert t_of(time_grid(TABLE, steps, "beta", whole=True, **options)) == [*np.rint(expected), -1]


def test_beta_of_diffusers_agrees_on_flows() -> None:
    """There sigma is t. It also puts the cleanest level on the grid, which makes its n + 1 levels our n and
    t_end."""
    peer = diffusers.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
    peer.set_timesteps(11)
    grid = time_grid(FLOW, 10, "beta", t_end=0.001)
    assert t_of(grid)[:-1] == pytest.approx(peer.sigmas.tolist()[:-2], rel=1e-6)
    assert peer.sigmas.tolist()[-2:] == pytest.approx([0.001, 0])


def test_beta_of_diffusers_is_no_distribution_of_time_on_tables() -> None:
    """It takes the quantiles of sigma/alpha in place of t. The paper's are symmetric in t; of its 20 steps 16
    lie in the noisier half."""
    peer = diffusers.EulerDiscreteScheduler(**SD, use_beta_sigmas=True)
    peer.alphas_cumprod = TABLE.alpha_bar.numpy()
    peer.set_timesteps(20)
    assert sum(t > 499.5 for t in peer.timesteps.tolist()) == 16
    t = t_of(time_grid(TABLE, 20, "beta"))
    assert [999 - time for time in t[1:20]] == pytest.approx(t[19:0:-1], abs=1e-9)


# Even in the noise ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 18, 50])
@pytest.mark.parametrize("rho", [3.0, 7.0])
def test_karras_and_exponential_are_k_diffusions(steps: int, rho: float) -> None:
    """Sigmas to float32's 1e-5, of EDM and of SD's range."""
    for schedule in (VE, TABLE):
        low, high = float(schedule.ratio(schedule.t_min)), float(schedule.ratio(schedule.t_max))
        theirs = k_sampling().get_sigmas_karras(steps, low, high, rho=rho).tolist()
        assert ratios(time_grid(schedule, steps, "karras", rho=rho)) == pytest.approx(theirs, rel=1e-5)
        theirs = k_sampling().get_sigmas_exponential(steps, low, high).tolist()
        assert ratios(time_grid(schedule, steps, "exponential")) == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize(("ends", "steps"), [("linspace", 10), ("linspace", 28), ("leading", 20)])
def test_karras_and_exponential_are_diffusers(spacing: str, ends: str, steps: int) -> None:
    """On SD's table, sigmas to float32's 2e-7 and times to 1e-4: both go through the logarithm of sigma.

    It spaces between the first and the last time of its timestep_spacing, which with "leading" (the default
    of SD) are not the table's ends.
    """
    peer = diffusers.EulerDiscreteScheduler(
        **SD, timestep_spacing=ends, steps_offset=1, **{f"use_{spacing}_sigmas": True}
    )
    peer.alphas_cumprod = TABLE.alpha_bar.numpy()
    peer.set_timesteps(steps)
    between: dict[str, Any] = (
        {"t_start": 1000 / steps * (steps - 1) + 1, "t_end": 1.0} if ends == "leading" else {}
    )
    grid = time_grid(TABLE, steps, spacing, **between)
    assert ratios(grid) == pytest.approx(peer.sigmas.tolist(), rel=2e-7)
    assert t_of(grid)[:-1] == pytest.approx(peer.timesteps.tolist(), abs=1e-4)


def test_karras_of_diffusers_is_in_flow_time_on_flows() -> None:
    """Its flow scheduler puts flow time in for eq. 5's sigma, which is sigma/alpha: other levels, and no
    longer those of a VP model."""
    peer = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    peer.set_timesteps(10)
    in_flow_time = np.linspace(1, 0.001 ** (1 / 7), 10) ** 7
    assert peer.sigmas.tolist()[:-1] == pytest.approx(in_flow_time.tolist(), rel=1e-5)
    ours = time_grid(FLOW, 10, "karras", t_start=14 / 15, t_end=0.03 / 1.03)
    assert ratios(ours)[:-1] == pytest.approx(
        (np.linspace(14 ** (1 / 7), 0.03 ** (1 / 7), 10) ** 7).tolist(), rel=1e-12
    )


# Curves and tables ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threshold", "linear"), [(0.025, None), (0.1, None), (0.025, 2), (0.3, 5)])
@pytest.mark.parametrize("steps", [7, 30, 64])
def test_linear_quadratic_is_mochis(steps: int, threshold: float, linear: int | None) -> None:
    """diffusers' function for Mochi, which ComfyUI's is too, and its copy for LTX: to 1e-14 and float32's
    1e-6 in flow time."""
    mochi, ltx = diffusers.pipelines.mochi.pipeline_mochi, diffusers.pipelines.ltx.pipeline_ltx_condition
    if linear is not None and threshold >= 2 * linear / (steps + linear):
        with pytest.raises(ValueError, match="threshold must lie between 0 and"):
            time_grid(FLOW, steps, "linear_quadratic", threshold=threshold, linear_steps=linear)
        assert (
            np.diff([*mochi.linear_quadratic_schedule(steps, threshold, linear), 0]).max() > 0
        )  # its noise rises again
        return
    ours = t_of(time_grid(FLOW, steps, "linear_quadratic", threshold=threshold, linear_steps=linear))
    assert ours == pytest.approx([*mochi.linear_quadratic_schedule(steps, threshold, linear), 0], abs=1e-14)
    assert ours[:-1] == pytest.approx(
        ltx.linear_quadratic_schedule(steps, threshold, linear).tolist(), abs=1e-6
    )


@pytest.mark.parametrize("schedule", [TABLE, CosineVP(), FLOW], ids=["table", "cosine", "flow"])
@pytest.mark.parametrize(("table", "name"), [("sd1", "StableDiffusion"), ("sdxl", "StableDiffusionXL")])
def test_align_your_steps_are_the_published_levels(schedule: Schedule, table: str, name: str) -> None:
    """Ten steps are diffusers' AysSchedules: on SD's table it too takes 14.615 for the noisiest row, and its
    times agree.

    The integer times that were published beside the sigmas are those sigmas' rows, to one row.
    """
    grid = time_grid(schedule, 10, "align_your_steps", table=table)
    assert ratios(grid) == pytest.approx(
        diffusers.schedulers.AysSchedules[f"{name}Sigmas"], rel=3e-5 if schedule is TABLE else 1e-13
    )
    if schedule is TABLE:
        peer = diffusers.EulerDiscreteScheduler(**SD)
        peer.alphas_cumprod = TABLE.alpha_bar.numpy()
        peer.set_timesteps(sigmas=diffusers.schedulers.AysSchedules[f"{name}Sigmas"])
        assert grid[0].t == pytest.approx(999, abs=1e-9)
        assert t_of(grid)[:-1] == pytest.approx(peer.timesteps.tolist(), abs=1e-4)
        assert t_of(grid)[:-1] == pytest.approx(diffusers.schedulers.AysSchedules[f"{name}Timesteps"], abs=1)


def test_align_your_steps_of_svd() -> None:
    """Video diffusion starts at 700: every schedule with that much noise has its levels, and others say that
    they have not."""
    for schedule in (SVD, FLOW, Shifted(FLOW, 3.0), DiscreteVP.scaled_linear(zero_terminal_snr=True)):
        grid = time_grid(schedule, 10, "align_your_steps", table="svd")
        assert ratios(grid) == pytest.approx(
            diffusers.schedulers.AysSchedules["StableDiffusionVideoSigmas"], rel=1e-12
        )


@pytest.mark.parametrize("steps", [1, 5, 20, 33])
def test_align_your_steps_interpolates_log_sigma(steps: int) -> None:
    """As the authors' page does, over 11 levels of which the last gives way to data: half of the steps skip
    every other level, twice as many add geometric means.
    """
    page = [700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002]
    found = ratios(time_grid(SVD, steps, "align_your_steps", table="svd"))
    expected = np.exp(np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, 11), np.log(page)))
    assert found[:-1] == pytest.approx(expected[:-1], rel=1e-12)
    if steps == 5:
        assert found[:-1] == pytest.approx(page[:-1:2], rel=1e-12)
    if steps == 20:
        assert found[1::2] == pytest.approx(
            [math.sqrt(high * low) for high, low in pairwise(page)], rel=1e-12
        )


def test_align_your_steps_ends_where_the_page_does() -> None:
    """Its last level is SD's least noise, which terminal="t_min" keeps."""
    grid = time_grid(TABLE, 10, "align_your_steps", table="sd1", terminal="t_min")
    assert grid[-1].ratio == pytest.approx(0.029, abs=5e-4)


# Shifts -----------------------------------------------------------------------------------------------------


def test_linear_dynamic_shift_of_diffusers_is_a_constant_shift() -> None:
    """time_shift_type="linear" multiplies sigma/alpha by mu itself, "exponential" (Flux, mu_shift) by
    e^mu."""
    for kind, options in (("linear", {"shift": 2.5}), ("exponential", {"spacing": "mu_shift", "mu": 2.5})):
        peer = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
        peer.set_timesteps(sigmas=np.linspace(1.0, 0.1, 10), mu=2.5)
        assert t_of(wrong_grid(FLOW, 10, **options)) == pytest.approx(peer.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: time_grid(FLOW, 5, "beta", alpha=0.0), r"must lie in \[0.001, 100\], not 0 and 0.6"),
        (lambda: time_grid(FLOW, 5, "beta", beta=-1.0), r"must lie in \[0.001, 100\], not 0.6 and -1"),
        (lambda: time_grid(FLOW, 5, "beta", beta=math.inf), r"must lie in \[0.001, 100\]"),
        (lambda: time_grid(FLOW, 5, "beta", gamma=1.0), "no option of beta spacing named 'gamma'"),
        (lambda: time_grid(TABLE, 200, "beta", whole=True), "noise must fall at every step"),
        (
            lambda: time_grid(FLOW, 5, "sgm_uniform", offset=1),
            "no option of sgm_uniform spacing named 'offset'",
        ),
        (
            lambda: time_grid(TABLE, 5, "simple", t_start=500),
            r"takes its levels from a table: leave t_start and t_end out",
        ),
        (lambda: time_grid(FLOW, 5, "simple", t_end=0.1), r"cut the grid itself, as in grid\[3:\]"),
        (lambda: time_grid(TABLE, 1001, "simple"), "noise must fall at every step"),
        (
            lambda: time_grid(FLOW, 5, "align_your_steps", table="sd1", t_start=0.9),
            "spacing takes its levels from a table",
        ),
        (lambda: time_grid(FLOW, 5, "align_your_steps"), "give table=sd1 \\| sdxl \\| svd"),
        (
            lambda: time_grid(FLOW, 5, "align_your_steps", table="sd15"),
            "no table of align_your_steps named 'sd15'; did you mean",
        ),
        (
            lambda: time_grid(VE, 5, "align_your_steps", table="svd"),
            "starts at sigma/alpha 700, but this schedule at 80",
        ),
        (lambda: time_grid(FLOW, 5, "linear_quadratic", t_end=0.1), "leave t_end out"),
        (lambda: time_grid(FLOW, 5, "linear_quadratic", threshold=0.0), "threshold must lie between 0 and"),
        (
            lambda: time_grid(FLOW, 4, "linear_quadratic", threshold=0.7),
            r"2 L / \(steps \+ L\) = 0.667 for L = 2 linear steps of 4",
        ),
        (
            lambda: time_grid(FLOW, 5, "linear_quadratic", linear_steps=5),
            "between 1 and steps - 1 = 4, not 5",
        ),
        (
            lambda: time_grid(FLOW, 5, "linear_quadratic", linear_steps=0),
            "between 1 and steps - 1 = 4, not 0",
        ),
        (
            lambda: wrong_grid(FLOW, 5, "linear_quadratic", linear_steps=2.5),
            "linear_steps of linear_quadratic spacing must be",
        ),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    """Options that make no sense are refused in one line."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 13, 50])
def test_lcm_is_that_of_diffusers(steps: int) -> None:
    """The rows that LCMScheduler visits, at every number of steps."""
    scheduler = diffusers.LCMScheduler(**SD)
    scheduler.set_timesteps(steps)
    assert t_of(time_grid(TABLE, steps, "lcm"))[:-1] == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("spacing", "steps", "options", "message"),
    [
        ("lcm", 51, {}, "lcm spacing has 50 times, not 51"),
        ("lcm", 12, {"t_start": 219.0}, "has 11 times, not 12"),
        ("lcm", 4, {"t_end": 100.0}, "leave t_end out"),
        ("turbo", 11, {}, "ends at t=-1: it must stay above data"),
        ("turbo", 2, {"stride": 0.0}, r"stride of turbo spacing must lie in \[1e-06, 1\]"),
        ("turbo", 1, {"stride": 5e-324}, "stride of turbo spacing"),
        ("turbo", 1, {"t_end": -math.inf}, "finite times"),
        ("lcm", 1, {"taught": 10**30}, "taught of lcm spacing must be 1 to 100000"),
        ("lcm", 1, {"taught": 0}, "taught of lcm spacing"),
        ("lcm", 1, {"t_start": math.inf}, "finite times"),
        ("karras", 1, {"rho": 1e-300}, r"rho of karras spacing must lie in \[0.01, 1000\]"),
        ("karras", 3, {"rho": 1e300}, "rho of karras spacing"),
        ("beta", 3, {"alpha": 1e-300}, "alpha and beta of beta spacing"),
        ("mu_shift", 3, {"mu": 1e5}, r"mu of mu_shift spacing must lie in \[-10, 10\]"),
        ("mu_shift", 3, {"tokens": 10**15}, "mu of mu_shift spacing must"),
        ("mu_shift", 3, {"tokens": 0}, "tokens of mu_shift spacing"),
        ("mu_shift", 3, {"line": (256, 0.5, 256, 0.9)}, "from few tokens to many"),
    ],
)
def test_options_that_make_no_grid(spacing: str, steps: int, options: dict[str, Any], message: str) -> None:
    """What a distilled model was not made for, and numbers that nothing can be computed with, are one
    line."""
    with pytest.raises(ValueError, match=message):
        time_grid(TABLE, steps, spacing, **options)


# Image to image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 10])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8, 1.0])
def test_turbo_begins_at_a_share_of_the_schedule(steps: int, share: float) -> None:
    """ComfyUI's SDTurboScheduler with denoise=share: from there in strides of a tenth, as many as are asked
    for and fit."""
    times = list(range(999, 0, -100))[10 - round(10 * share) :][:steps]
    assert t_of(time_grid(TABLE, steps, "turbo").tail(share)) == pytest.approx([*times, -1], abs=1e-9)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.25, [249, 149, 49]), (0.333, [332, 232, 132, 32]), (1e-9, [1])]
)
def test_turbo_begins_between_its_strides_too(share: float, expected: list[float]) -> None:
    assert t_of(time_grid(TABLE, 4, "turbo").tail(share))[:-1] == pytest.approx(expected, abs=1e-6)


def test_turbo_keeps_its_settings_when_it_begins_later() -> None:
    """Shift, terminal rule and stride; a share of a grid that starts lower is one of what it spans."""
    part = time_grid(FLOW, 3, "turbo", stride=0.2, shift=3.0, t_start=0.8).tail(0.5)
    assert t_of(part) == pytest.approx([3 * t / (1 + 2 * t) for t in (0.4, 0.2, 0)], abs=1e-12)
    assert t_of(time_grid(TABLE, 2, "turbo", terminal="t_min").tail(0.5)) == pytest.approx([499, 399, 0])


@pytest.mark.parametrize(
    ("steps", "strength"), [(4, 0.5), (4, 0.33), (8, 0.8), (1, 0.06), (25, 0.5), (4, 1.0)]
)
def test_lcm_begins_where_diffusers_does(steps: int, strength: float) -> None:
    """LCMScheduler's own strength: all steps are taken, of the times taught up to there."""
    scheduler = diffusers.LCMScheduler(**SD)
    scheduler.set_timesteps(steps, strength=strength)
    assert t_of(time_grid(TABLE, steps, "lcm").tail(strength))[:-1] == scheduler.timesteps.tolist()


def test_lcm_takes_no_more_steps_than_it_was_taught() -> None:
    """Where diffusers raises."""
    assert t_of(time_grid(TABLE, 8, "lcm").tail(0.06)) == [59, 39, 19, -1]
