"""Schedules: the family's invariant, both ends, the inverse, published tables, shifts."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import (
    SCHEDULES,
    CosineVP,
    DiscreteVP,
    RectifiedFlow,
    Schedule,
    Shifted,
    VarianceExploding,
    betas,
    build_schedule,
)

F64 = torch.float64


def times(schedule: Schedule, n: int = 1237) -> Tensor:
    """Times over the whole range, from clean data to the noisiest, between table rows as well as on them."""
    return torch.linspace(schedule.t_data, schedule.t_max, n, dtype=F64)


def test_family_norm_is_one(schedule: Schedule) -> None:
    """alpha and sigma keep their family's norm at 1 at every time, both ends included."""
    alpha, sigma = schedule.alpha(times(schedule)), schedule.sigma(times(schedule))
    norm = {
        CosineVP: torch.hypot(alpha, sigma),
        DiscreteVP: torch.hypot(alpha, sigma),
        RectifiedFlow: alpha + sigma,
        VarianceExploding: alpha,
    }
    expected = norm[type(schedule.base if isinstance(schedule, Shifted) else schedule)]
    torch.testing.assert_close(expected, torch.ones_like(alpha), rtol=0, atol=1e-14)
    torch.testing.assert_close(schedule.family_norm(alpha, sigma), torch.ones_like(alpha), rtol=0, atol=1e-14)


def test_data_end_is_exact(schedule: Schedule) -> None:
    """At t_data a sample is its data, to the last bit."""
    assert schedule.level(schedule.t_data) == schedule.terminal == (schedule.t_data, 1.0, 0.0)


@pytest.mark.parametrize(
    "schedule",
    [
        CosineVP(),
        RectifiedFlow(),
        DiscreteVP.linear(zero_terminal_snr=True),
        Shifted(CosineVP(), 0.3),
        Shifted(RectifiedFlow(), 3),
    ],
)
def test_noise_end_is_exact(schedule: Schedule) -> None:
    """Where a schedule reaches pure noise, it is alpha 0 and sigma 1 to the last bit, and an infinite ratio
    leads back there."""
    assert schedule.level(schedule.t_max) == (schedule.t_max, 0.0, 1.0)
    assert schedule.level(schedule.t_max).half_log_snr == -math.inf
    assert float(schedule.t_from_ratio(math.inf)) == schedule.t_max


def test_noise_grows_with_time(schedule: Schedule) -> None:
    """sigma rises, alpha never rises, and their ratio rises strictly."""
    t = times(schedule)
    assert (schedule.sigma(t).diff() > 0).all()
    assert (schedule.alpha(t).diff() <= 0).all()
    assert (schedule.ratio(t)[1:] > schedule.ratio(t)[:-1]).all()


def test_ratio_and_snr_follow_from_alpha_and_sigma(schedule: Schedule) -> None:
    """ratio = sigma/alpha and snr = alpha^2/sigma^2, also where a schedule computes the ratio on its own."""
    t = times(schedule)[1:-1]
    expected = schedule.sigma(t) / schedule.alpha(t)
    torch.testing.assert_close(schedule.ratio(t), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.snr(t), expected**-2, rtol=1e-12, atol=0)


def test_time_from_ratio_inverts(schedule: Schedule) -> None:
    """t -> sigma/alpha -> t is the identity to 1e-11 of the range, from data to the noisiest time."""
    t = times(schedule)
    torch.testing.assert_close(
        schedule.t_from_ratio(schedule.ratio(t)), t, rtol=0, atol=1e-11 * schedule.t_max
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64])
def test_results_are_float64_of_the_same_shape(schedule: Schedule, dtype: torch.dtype) -> None:
    """Whatever the dtype and shape of t, coefficients are float64 of that shape."""
    t = torch.full((2, 3), 1.0, dtype=dtype)
    for value in (
        schedule.alpha(t),
        schedule.sigma(t),
        schedule.ratio(t),
        schedule.snr(t),
        schedule.t_from_ratio(torch.ones(2, 3)),
    ):
        assert value.dtype == F64
        assert value.shape == (2, 3)


def test_level_and_levels_agree(schedule: Schedule) -> None:
    """A batch of levels holds what each level alone holds."""
    t = times(schedule, 7)
    batch = schedule.levels(t)
    alone = [schedule.level(float(value)) for value in t]
    for i, name in enumerate(("t", "alpha", "sigma")):
        assert getattr(batch, name).tolist() == [level[i] for level in alone]


@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [(DiscreteVP.scaled_linear(), 0.99915, 0.0046600), (DiscreteVP.linear(), 0.9999, 4.0358e-5)],
)
def test_published_tables(schedule: DiscreteVP, first: float, last: float) -> None:
    """alpha_bar of Stable Diffusion (1 - 0.00085 to 0.00466, sigma_max 14.61) and of DDPM (to 4.04e-5), to
    the digits in print."""
    assert float(schedule.alpha_bar[0]) == pytest.approx(first, abs=1e-12)
    assert float(schedule.alpha_bar[-1]) == pytest.approx(last, rel=1e-4)


@pytest.mark.parametrize("table", [betas.linear, betas.scaled_linear, betas.cosine, betas.sigmoid])
def test_table_rows_are_products_of_one_minus_beta(table: Callable[..., Tensor]) -> None:
    """On a row of the table alpha^2 is the plain product of 1 - beta, and sigma^2 its complement."""
    schedule = DiscreteVP.from_betas(table(steps=200))
    products = list(accumulate(table(steps=200).tolist(), lambda bar, beta: bar * (1 - beta), initial=1.0))[
        1:
    ]
    rows = torch.arange(200)
    torch.testing.assert_close(
        schedule.alpha(rows).square(), torch.tensor(products, dtype=F64), rtol=1e-12, atol=1e-15
    )
    torch.testing.assert_close(
        schedule.sigma(rows).square(), 1 - torch.tensor(products, dtype=F64), rtol=1e-12, atol=1e-15
    )


def test_between_rows_log_ratio_is_linear() -> None:
    """A quarter of the way between two rows, log(sigma/alpha) is a quarter of the way too."""
    schedule = DiscreteVP.scaled_linear()
    low, quarter, high = schedule.ratio(torch.tensor([10, 10.25, 11])).log()
    assert float(quarter) == pytest.approx(float(0.75 * low + 0.25 * high), rel=1e-14)


def test_cosine_betas_follow_cosine_squared() -> None:
    """Nichol & Dhariwal 2021, eq. 17: alpha_bar_i = f(i)/f(0), f = cos^2, wherever the cap on beta does not
    bite."""
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    expected = torch.tensor([value / f[0] for value in f[1:]], dtype=F64)
    torch.testing.assert_close(betas.alpha_bar(betas.cosine())[:990], expected[:990], rtol=1e-10, atol=0)
    assert betas.cosine().max() == 0.999


def test_sigmoid_betas_run_between_their_ends() -> None:
    """beta = start + (end - start) / (1 + exp(-x)), x from -6 to 6."""
    expected = [1e-4 + (0.02 - 1e-4) / (1 + math.exp(-(-6 + 12 * i / 9))) for i in range(10)]
    assert betas.sigmoid(steps=10).tolist() == pytest.approx(expected, rel=1e-14)


def test_zero_terminal_snr_keeps_the_first_row_and_empties_the_last() -> None:
    """Lin et al. 2024, alg. 1: sqrt(alpha_bar) is an affine function of the old one; first row kept, last row
    0."""
    old, new = (DiscreteVP.scaled_linear(zero_terminal_snr=z).alpha_bar.sqrt() for z in (False, True))
    assert new[-1] == 0
    assert float(new[0]) == pytest.approx(float(old[0]), rel=1e-15)
    slope = new.diff() / old.diff()
    torch.testing.assert_close(slope, slope[:1].expand_as(slope), rtol=1e-9, atol=0)


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_shifted_flow_is_the_published_formula(factor: float) -> None:
    """Esser et al. 2024, eq. 23: t' = factor t / (1 + (factor - 1) t), for the schedule and for the times of
    a grid alike."""
    t = times(RectifiedFlow())
    expected = factor * t / (1 + (factor - 1) * t)
    torch.testing.assert_close(Shifted(RectifiedFlow(), factor).sigma(t), expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(RectifiedFlow().shift_t(t, factor), expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("base", [DiscreteVP.linear(), CosineVP(), RectifiedFlow()])
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_shift_lowers_log_snr_by_twice_its_logarithm(base: Schedule, factor: float) -> None:
    """Hoogeboom et al. 2023: log SNR falls by 2 log(factor) at every time, on every family."""
    t = times(base)[1:-1]
    drop = base.snr(t).log() - Shifted(base, factor).snr(t).log()
    torch.testing.assert_close(drop, torch.full_like(drop, 2 * math.log(factor)), rtol=0, atol=1e-11)


def test_shift_of_times_multiplies_the_ratio(schedule: Schedule) -> None:
    """ratio(shift_t(t, f)) = f ratio(t), and shifting by 1 changes nothing."""
    t = times(schedule)[1:600]
    torch.testing.assert_close(
        schedule.ratio(schedule.shift_t(t, 1.5)), 1.5 * schedule.ratio(t), rtol=1e-10, atol=0
    )
    assert torch.equal(schedule.shift_t(t, 1), t)


def test_half_log_snr_at_both_ends() -> None:
    """lambda = log(alpha/sigma): +inf at data, 0 where both are equal, -inf at pure noise."""
    flow = RectifiedFlow()
    assert [flow.level(t).half_log_snr for t in (0, 0.5, 1)] == [math.inf, 0.0, -math.inf]
    assert flow.level(0.25).half_log_snr == pytest.approx(math.log(3), rel=1e-15)
    assert [flow.level(t).ratio for t in (0, 0.5, 1)] == [0.0, 1.0, math.inf]


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ({"name": "flow"}, RectifiedFlow),
        ({"name": "flow", "shift": 3.0}, Shifted),
        ({"name": "linear", "steps": 10}, DiscreteVP),
    ],
)
def test_build_schedule(spec: dict[str, Any], kind: type[Schedule]) -> None:
    """A description builds the schedule it names, and is left as it was."""
    before = dict(spec)
    schedule = build_schedule(spec)
    assert type(schedule) is kind
    assert spec == before
    assert schedule.t_max == (9 if kind is DiscreteVP else 1)


def test_every_named_schedule_builds() -> None:
    """Each name in SCHEDULES is a description of its own."""
    assert all(isinstance(build_schedule({"name": name}), Schedule) for name in SCHEDULES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DiscreteVP(torch.tensor([0.9, 0.9])), "decrease strictly"),
        (lambda: DiscreteVP(torch.tensor([1.0, 0.5])), "decrease strictly"),
        (lambda: DiscreteVP(torch.tensor([0.9])), "at least 2 rows"),
        (lambda: DiscreteVP.from_betas(torch.tensor([0.1, 1.5])), "betas must lie in"),
        (lambda: VarianceExploding(2.0, 1.0), "sigma_min < sigma_max"),
        (lambda: Shifted(RectifiedFlow(), 0.0), "positive"),
        (lambda: Shifted(VarianceExploding(), 2.0), "other sigma_min"),
        (lambda: RectifiedFlow().shift_t(0.5, -1.0), "positive"),
        (lambda: RectifiedFlow().alpha(1.5), r"\[0, 1\]"),
        (lambda: CosineVP().sigma(-0.1), r"\[0, 1\]"),
        (lambda: DiscreteVP.linear().alpha(999.5), r"\[-1, 999\]"),
        (lambda: DiscreteVP.linear().t_from_ratio(1e9), r"\[-1, 999\]"),
        (lambda: build_schedule({"name": "lineal"}), "no schedule named 'lineal'.*'?linear"),
        (lambda: build_schedule({"name": "linear", "step": 10}), "schedule 'linear'.*step"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    """What cannot be meant raises, and says why."""
    with pytest.raises(ValueError, match=message):
        make()
