"""Guidance rules: each formula by an independent computation, what it must and must not change, and what
diffusers makes of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffusion
from diffusion import (
    APG,
    EPS,
    FLOW,
    X0,
    CosineVP,
    Estimate,
    Level,
    NoiseLevel,
    Prediction,
    RectifiedFlow,
    Rule,
    Schedule,
    V,
    VarianceExploding,
    build_rule,
    extrapolate,
    initial_noise,
    marginal,
    rescaled,
    zero_star,
)
from tests.peers import diffusers

F64 = torch.float64
LEVEL = RectifiedFlow().level(0.6)
X, GOOD, BAD = (
    initial_noise(range(i, i + 3), (2, 3, 2), F64) for i in (0, 10, 20)
)  # x_t and two x0, three samples of twelve values
RULES: dict[str, Callable[[], Rule]] = {
    "extrapolate": lambda: extrapolate,
    "rescaled": lambda: rescaled(0.7),
    "rescaled-flow": lambda: rescaled(1.0, space=FLOW),
    "zero_star": lambda: zero_star,
    "apg": lambda: APG(0.25, norm_limit=2.0),
    "rescaled-apg": lambda: rescaled(0.4, rule=APG(0.0, norm_limit=3.0)),
}
DESCRIPTIONS: dict[str, dict[str, Any]] = {  # of the same, for a network that predicts flow
    "extrapolate": {"name": "extrapolate"},
    "rescaled": {"name": "rescaled", "space": "v"},
    "rescaled-flow": {"name": "rescaled", "phi": 1.0},
    "zero_star": {"name": "zero_star"},
    "apg": {"name": "apg", "eta": 0.25, "norm_limit": 2},
    "rescaled-apg": {
        "name": "rescaled",
        "phi": 0.4,
        "space": "v",
        "rule": {"name": "apg", "norm_limit": 3.0},
    },
}


def pair(level: Level, x_t: Tensor = X, good: Tensor = GOOD, bad: Tensor = BAD) -> tuple[Estimate, Estimate]:
    """Two estimates that explain x_t, the good one with a learned variance."""
    return Estimate.from_x0(x_t, good, level, good.cos()), Estimate.from_x0(x_t, bad, level)


def guided(
    rule: Rule, scale: float, level: Level = LEVEL, x_t: Tensor = X, good: Tensor = GOOD, bad: Tensor = BAD
) -> Estimate:
    return rule(x_t, level, *pair(level, x_t, good, bad), scale)


def close(got: Tensor, expected: Tensor, atol: float = 1e-13) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def by_hand(formula: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Tensor:
    """formula(x_t, x0_good, x0_bad) -> x0 on one flat sample at a time, in numpy."""
    samples = [formula(*(s.flatten().numpy() for s in sample)) for sample in zip(X, GOOD, BAD, strict=True)]
    return torch.tensor(np.stack(samples), dtype=F64).view_as(X)


def noises(schedule: Schedule) -> list[NoiseLevel]:
    """Little noise, much, and the most there is: on several schedules that is pure noise."""
    return [schedule.level(share * schedule.t_max) for share in (0.2, 0.7, 1.0)]


# What all of them promise -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
def test_every_rule_is_the_good_estimate_at_scale_one_and_always_explains_x_t(
    make: Callable[[], Rule], schedule: Schedule
) -> None:
    """On every schedule up to its noisiest level; the good one's learned variance is kept."""
    for level in noises(schedule):
        good, _ = pair(level)
        size = max(
            1.0, level.alpha / level.sigma, level.sigma
        )  # of eps = (x_t - alpha x0) / sigma, and of x_t there
        off = guided(make(), 1.0, level)
        close(off.x0, good.x0, 1e-13 * size)
        close(off.eps, good.eps, 1e-13 * size)
        for scale in (0.0, 0.5, 4.0, 12.0):
            got = guided(make(), scale, level)
            close(marginal(got.x0, got.eps, level), X, 1e-13 * size * (1 + scale))
            assert got.variance is not None
            assert torch.equal(got.variance, GOOD.cos())


@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
def test_every_rule_treats_samples_alone(make: Callable[[], Rule]) -> None:
    """Three samples, each at its own level and with its own scale, are what each of them is by itself."""
    schedule, times, scales = CosineVP(), [0.9, 0.5, 0.2], [1.0, 3.0, 7.5]
    levels = schedule.levels(torch.tensor(times, dtype=F64))
    batch = make()(X, levels, *pair(levels), torch.tensor(scales, dtype=F64))
    for i, (t, scale) in enumerate(zip(times, scales, strict=True)):
        one = slice(i, i + 1)
        alone = guided(make(), scale, schedule.level(t), X[one], GOOD[one], BAD[one])
        close(batch.x0[one], alone.x0)
        close(batch.eps[one], alone.eps)


@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
def test_nothing_to_lead_away_from_changes_nothing(make: Callable[[], Rule]) -> None:
    """Two equal estimates are that estimate at any scale, and so are two empty ones: no division by zero
    shows."""
    close(guided(make(), 7.5, bad=GOOD).x0, GOOD)
    nothing = torch.zeros_like(X)
    close(guided(make(), 7.5, x_t=nothing, good=nothing, bad=nothing).x0, nothing)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_a_description(name: str) -> None:
    """To the last bit; no name of the registry is without one here, and `rescaled` acts where the network
    predicts unless told."""
    built, by_hand = (guided(rule, 5.0) for rule in (build_rule(DESCRIPTIONS[name], FLOW), RULES[name]()))
    assert torch.equal(built.x0, by_hand.x0)
    assert torch.equal(built.eps, by_hand.eps)
    assert {spec["name"] for spec in DESCRIPTIONS.values()} == set(diffusion.RULES)


# Rescaling --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phi", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("space", [EPS, X0, V, FLOW], ids=lambda space: space.name)
def test_rescaled_is_the_formula(space: Prediction, phi: float, schedule: Schedule) -> None:
    """Eq. 15-16 in numpy: outputs by the definition of the prediction, solved back by a linear system."""
    for level in noises(schedule)[: 2 if space is EPS else 3]:  # eps says nothing about x0 at pure noise
        rows = {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "v": (-level.sigma, level.alpha), "flow": (-1.0, 1.0)}[
            space.name
        ]

        def formula(
            x: np.ndarray,
            good: np.ndarray,
            bad: np.ndarray,
            level: NoiseLevel = level,
            rows: tuple[float, ...] = rows,
        ) -> np.ndarray:
            x0 = bad + 5 * (good - bad)
            o_good, o = (rows[0] * x0 + rows[1] * (x - level.alpha * x0) / level.sigma for x0 in (good, x0))
            o = phi * o * o_good.std(ddof=1) / o.std(ddof=1) + (1 - phi) * o
            return np.linalg.solve(np.array([[level.alpha, level.sigma], rows]), np.stack([x, o]))[0]

        size = max(1.0, level.sigma / max(level.alpha, 1e-3)) if space is EPS else max(1.0, level.sigma)
        close(guided(rescaled(phi, space=space), 5.0, level).x0, by_hand(formula), 1e-13 * size)


def test_rescaled_keeps_the_contrast_of_the_good_output() -> None:
    """phi = 1: the standard deviation of each sample's output is that of `good`. phi = 0: the other rule,
    whichever it is."""
    good, _ = pair(LEVEL)
    full = guided(rescaled(1.0, space=FLOW), 9.0)
    close(full.combine(-1.0, 1.0).flatten(1).std(1), good.combine(-1.0, 1.0).flatten(1).std(1))
    for rule in (extrapolate, zero_star, APG(0.5)):
        close(guided(rescaled(0.0, rule=rule), 9.0).x0, guided(rule, 9.0).x0)


def test_rescaled_leaves_an_output_without_contrast() -> None:
    """An image of one colour has std 0, and so has a sample of one value: there is no contrast to lead
    back."""
    flat = torch.full_like(X, 0.5)
    close(guided(rescaled(1.0, space=X0), 3.0, good=3 * flat, bad=flat).x0, 7 * flat)
    one = (slice(None), slice(0, 1), slice(0, 1), slice(0, 1))
    close(
        guided(rescaled(1.0), 3.0, x_t=X[one], good=GOOD[one], bad=BAD[one]).x0,
        BAD[one] + 3 * (GOOD[one] - BAD[one]),
    )


@pytest.mark.parametrize("space", [EPS, V, FLOW], ids=lambda space: space.name)
def test_rescaled_equals_diffusers(space: Prediction) -> None:
    """Its rescale_noise_cfg on the network output of the same prediction."""
    good, bad = pair(LEVEL)
    out_good, out_bad = (space.target(estimate.x0, estimate.eps, LEVEL) for estimate in (good, bad))
    rescale = diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion.rescale_noise_cfg
    theirs = rescale(out_bad + 6 * (out_good - out_bad), out_good, guidance_rescale=0.7)
    ours = guided(rescaled(0.7, space=space), 6.0)
    close(space.target(ours.x0, ours.eps, LEVEL), theirs)


# CFG-Zero* --------------------------------------------------------------------------------------------------


def test_zero_star_is_the_formula(schedule: Schedule) -> None:
    """s by least squares, then the velocity, then x0 = (x_t - sigma v) / (alpha + sigma), at every level up
    to pure noise."""
    for level in noises(schedule):

        def formula(
            x: np.ndarray, good: np.ndarray, bad: np.ndarray, level: NoiseLevel = level
        ) -> np.ndarray:
            v_good, v_bad = ((x - level.alpha * x0) / level.sigma - x0 for x0 in (good, bad))
            s = np.linalg.lstsq(v_bad[:, None], v_good, rcond=None)[0]
            v = s * v_bad + 4 * (v_good - s * v_bad)
            return (x - level.sigma * v) / (level.alpha + level.sigma)

        close(guided(zero_star, 4.0, level).x0, by_hand(formula), 1e-13 * max(1.0, 1 / level.sigma))


def test_zero_star_corrects_directions_only() -> None:
    """Where v_bad is v_good times a number, guidance does nothing; where v_good - v_bad is across v_bad, s =
    1 and it is CFG."""
    good, bad = pair(LEVEL)
    v_good, v_bad = good.combine(-1.0, 1.0), bad.combine(-1.0, 1.0)
    close(zero_star(X, LEVEL, good, FLOW.estimate(X, -3 * v_good, LEVEL), 7.0).x0, good.x0)
    across = v_good - (v_good * v_bad).sum((1, 2, 3), True) / v_bad.square().sum((1, 2, 3), True) * v_bad
    aside = FLOW.estimate(X, v_bad + across, LEVEL)
    close(zero_star(X, LEVEL, aside, bad, 7.0).x0, extrapolate(X, LEVEL, aside, bad, 7.0).x0)
    still = FLOW.estimate(X, torch.zeros_like(X), LEVEL)  # s is 0/0, and s v_bad is 0 whatever it is
    close(zero_star(X, LEVEL, good, still, 7.0).combine(-1.0, 1.0), 7 * v_good)


def test_zero_star_knows_no_schedule(schedule: Schedule) -> None:
    """At equal flow time, x_t rescaled to match, the same two x0 and eps make the same guided x0 and eps on
    every schedule."""
    level = schedule.level(0.6 * schedule.t_max)
    flow = RectifiedFlow().level(level.flow_time)
    size = max(1.0, 1 / flow.sigma)
    here, there = (guided(zero_star, 5.0, at, X * (at.alpha + at.sigma)) for at in (level, flow))
    close(here.x0, there.x0, 1e-12 * size)
    close(here.eps, there.eps, 1e-12 * size)


def test_zero_star_equals_diffusers() -> None:
    """Its guider past the first steps, on velocities; it computes s in float32."""
    good, bad = pair(LEVEL)
    peer = diffusers.guiders.ClassifierFreeZeroStarGuidance(guidance_scale=5.0, zero_init_steps=0)
    peer.set_state(3, 10, torch.tensor(600))
    theirs = peer.forward(good.combine(-1.0, 1.0), bad.combine(-1.0, 1.0)).pred
    close(guided(zero_star, 5.0).combine(-1.0, 1.0), theirs, 2e-6)


# Adaptive projected guidance --------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("limit", [1.5, math.inf])
def test_apg_is_the_formula(eta: float, limit: float) -> None:
    """Alg. 1 in numpy: shorten the difference, split it by an orthonormal basis whose first vector is
    x0_good, add it up."""

    def formula(x: np.ndarray, good: np.ndarray, bad: np.ndarray) -> np.ndarray:
        d = (good - bad) * min(1.0, limit / np.linalg.norm(good - bad))
        basis = np.linalg.qr(np.column_stack([good, np.eye(len(good))[:, 1:]]))[0]
        parts = basis * (basis.T @ d)  # one per column
        return good + (8.0 - 1) * (parts[:, 1:].sum(1) + eta * parts[:, 0])

    close(guided(APG(eta, limit), 8.0).x0, by_hand(formula))


def test_apg_without_its_three_parts_is_plain_guidance() -> None:
    """eta = 1, no limit, no momentum. Without the parallel part no x0 grows along itself; a limit bounds what
    is added."""
    for scale in (0.0, 3.0):
        plain, apg = guided(extrapolate, scale), guided(APG(1.0), scale)
        close(apg.x0, plain.x0)
        close(apg.eps, plain.eps)
    added = guided(APG(0.0), 9.0).x0 - GOOD
    close((added * GOOD).sum((1, 2, 3)), torch.zeros(3, dtype=F64), 1e-12)
    close(
        (guided(APG(1.0, norm_limit=0.75), 9.0).x0 - GOOD).flatten(1).norm(dim=1),
        torch.full((3,), 8 * 0.75, dtype=F64),
    )


def test_apg_around_a_good_x0_of_zero() -> None:
    """Nothing is parallel to nothing: the whole difference is kept."""
    nothing = torch.zeros_like(X)
    close(guided(APG(0.0), 3.0, good=nothing).x0, -2 * BAD)


@pytest.mark.parametrize("momentum", [None, -0.5])
def test_apg_equals_diffusers_where_it_follows_the_paper(momentum: float | None) -> None:
    """Its `normalized_guidance` in the original formulation, given x0 and the scale less one, over the steps
    of a run."""
    peer = diffusers.guiders.adaptive_projected_guidance
    ours, buffer = (
        APG(0.25, norm_limit=4.0, momentum=momentum or 0.0),
        None if momentum is None else peer.MomentumBuffer(momentum),
    )
    for step, t in enumerate((1.0, 0.8, 0.5, 0.1)):
        good, bad = GOOD.roll(step, 0) * t, BAD * t
        theirs = peer.normalized_guidance(
            good, bad, 6.0 - 1, buffer, 0.25, 4.0, use_original_formulation=True
        )
        close(guided(ours, 6.0, RectifiedFlow().level(t), good=good, bad=bad).x0, theirs)


def test_apg_of_diffusers_by_default_is_not_the_papers() -> None:
    """It adds w times the projected difference to the bad estimate: as w falls to 1 the parallel part of
    `good` is missing, and at 1, where it is switched off, jumps in. The paper's rule is `good` there.
    """
    peer = diffusers.guiders.AdaptiveProjectedGuidance(
        guidance_scale=1 + 1e-6, eta=0.0, adaptive_projected_guidance_rescale=0.0
    )
    peer.set_state(3, 10, torch.tensor(600))
    parallel = ((GOOD - BAD) * GOOD).sum((1, 2, 3), True) / GOOD.square().sum((1, 2, 3), True) * GOOD
    close(peer.forward(GOOD, BAD).pred, GOOD - parallel, 1e-5)
    assert parallel.abs().amax() > 0.5
    close(guided(APG(0.0), 1 + 1e-6).x0, GOOD, 1e-5)


def average(ratios: list[float], momentum: float = -0.5) -> list[float]:
    """What takes the place of d = 1 at each of these noise-to-signal ratios: eta = 1 and scale 2 give good +
    average."""
    rule, ones = APG(1.0, momentum=momentum), torch.ones(1, 1, dtype=F64)
    levels = [NoiseLevel(r, 1.0, r) if r < math.inf else NoiseLevel(1.0, 0.0, 1.0) for r in ratios]
    return [float(guided(rule, 2.0, level, ones, 3 * ones, 2 * ones).x0) - 3 for level in levels]


def test_momentum_is_a_running_average_that_starts_anew_with_each_run() -> None:
    """d + momentum * average as noise falls, also from pure noise; asking twice or churning is no new run, a
    rise is."""
    close(torch.tensor(average([9.0, 5.0, 2.0, 0.1])), torch.tensor([1.0, 0.5, 0.75, 0.625]))
    close(torch.tensor(average([math.inf, 5.0, 2.0])), torch.tensor([1.0, 0.5, 0.75]))
    close(
        torch.tensor(average([9.0, 5.0, 5.0, 5.0 * 2**0.5, 4.0])),
        torch.tensor([1.0, 0.5, 0.75, 0.625, 0.6875]),
    )
    close(torch.tensor(average([9.0, 5.0, 9.0, 5.0])), torch.tensor([1.0, 0.5, 1.0, 0.5]))
    close(torch.tensor(average([9.0, 7.0, 9.0])), torch.tensor([1.0, 0.5, 1.0]))  # a run given up soon
    close(torch.tensor(average([9.0, 9.0])), torch.tensor([1.0, 1.0]))  # runs of one step
    close(torch.tensor(average([math.inf, math.inf])), torch.tensor([1.0, 1.0]))
    close(
        torch.tensor(average([9.0, 1.0, 4.0, 2.0])), torch.tensor([1.0, 0.5, 1.0, 0.5])
    )  # a run that begins lower
    close(torch.tensor(average([9.0, 5.0], momentum=0.0)), torch.tensor([1.0, 1.0]))


def test_momentum_starts_anew_with_other_samples() -> None:
    """Another shape or dtype has no past."""
    rule = APG(momentum=-0.5)
    low = RectifiedFlow().level(0.3)
    guided(rule, 4.0)
    for x_t, good, bad in ((X[:2], GOOD[:2], BAD[:2]), (X.float(), GOOD.float(), BAD.float())):
        assert torch.equal(
            guided(rule, 4.0, low, x_t, good, bad).x0, guided(APG(), 4.0, low, x_t, good, bad).x0
        )
        guided(rule, 4.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: rescaled(-0.1), r"phi must lie in \[0, 1\], not -0.1"),
        (lambda: rescaled(1.5), r"phi must lie in \[0, 1\], not 1.5"),
        (lambda: rescaled(math.nan), r"phi must lie in \[0, 1\], not nan"),
        (lambda: APG(eta=math.inf), "eta must be a finite number, not inf"),
        (lambda: APG(norm_limit=0.0), "norm_limit must be positive, not 0"),
        (lambda: APG(norm_limit=math.nan), "norm_limit must be positive, not nan"),
        (lambda: APG(momentum=1.0), r"momentum must lie in \(-1, 1\), not 1"),
        (
            lambda: build_rule({"name": "zero_sta"}, V),
            "no guidance rule named 'zero_sta'; did you mean 'zero_star'?",
        ),
        (
            lambda: build_rule({"name": "apg", "etta": 0}, V),
            "no option of guidance rule 'apg' named 'etta'; did you mean 'eta'?",
        ),
        (
            lambda: build_rule({"name": "zero_star", "space": "v"}, V),
            "no option of guidance rule 'zero_star' named 'space'; known: none",
        ),
        (
            lambda: build_rule({"name": "rescaled", "space": "epss"}, V),
            "no prediction named 'epss'; did you mean 'eps'?",
        ),
        (
            lambda: build_rule({"name": "rescaled", "rule": "apg"}, V),
            "of the guidance rule must be a mapping of names to values, not 'apg'",
        ),
        (
            lambda: build_rule({"eta": 0}, V),
            "of the guidance rule needs a name; known: extrapolate, rescaled, zero_star, apg",
        ),
        (
            lambda: guided(APG(momentum=-0.5), 2.0, VarianceExploding().levels(torch.ones(3, dtype=F64))),
            "level per sample use momentum=0",
        ),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    """A value out of range raises, and the message says which range is right."""
    with pytest.raises(ValueError, match=message):
        make()
