"""Guidance: what each kind asks for and what that costs, its formula, known answers for every solver, and
what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import (
    APG,
    NONE,
    X0,
    AutoGuidance,
    ClassifierFreeGuidance,
    ComposedGuidance,
    Condition,
    CosineVP,
    Denoiser,
    DenoiserLike,
    DiscreteVP,
    Estimate,
    Level,
    RectifiedFlow,
    Rule,
    Scale,
    Schedule,
    Thresholded,
    V,
    ZeroInit,
    extrapolate,
    initial_noise,
    interval,
    rescaled,
    time_grid,
    zero_star,
)
from diffusion.oracle import GaussianMixture, PointMass
from samplers import SAMPLERS, sample

F64 = torch.float64
LEVEL = RectifiedFlow().level(0.6)
X = initial_noise([0, 1, 2], (2, 2, 2), F64)
LABEL = torch.tensor([1, 5, 3])
NULL = torch.full_like(LABEL, 10)
RULES: dict[str, Callable[[], Rule]] = {
    "extrapolate": lambda: extrapolate,
    "rescaled": rescaled,
    "zero_star": lambda: zero_star,
    "apg": lambda: APG(norm_limit=2.0, momentum=-0.5),
}


def labelled(*values: int) -> Condition:
    return Condition(label=torch.tensor(values))


def close(got: Tensor, expected: Tensor, atol: float = 1e-13) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


class Counting:
    """A denoiser whose network answers by label and context, and which counts its calls."""

    def __init__(self, *, wide: bool = False) -> None:
        self.batches: list[int] = []
        self.inner = Denoiser(self.network, RectifiedFlow(), V)
        self.wide = wide

    def network(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        self.batches.append(len(x))
        shift = condition.tensors["label"].to(x)
        if condition.context is not None:
            shift = shift + condition.context.mean((1, 2))
        out = (x + shift.view(-1, 1, 1, 1)).sin()
        return torch.cat([out, out.cos()], 1) if self.wide else out

    def __call__(self, x_t: Tensor, level: Any, condition: Condition = NONE, /) -> Estimate:
        return self.inner(x_t, level, condition)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [-1.0, 0.5, 2.0, 7.5])
def test_formula(scale: float, batched: bool) -> None:
    """x0 and eps are uncond + w (cond - uncond) of two plain calls, and still explain x_t."""
    plain = Counting()
    cond, uncond = (
        plain(X, LEVEL, Condition(label=LABEL)),
        plain(X, LEVEL, Condition(label=torch.full_like(LABEL, 10))),
    )
    got = ClassifierFreeGuidance(plain, scale, labelled(10), batched=batched)(
        X, LEVEL, Condition(label=LABEL)
    )
    torch.testing.assert_close(got.x0, uncond.x0 + scale * (cond.x0 - uncond.x0), rtol=0, atol=1e-13)
    torch.testing.assert_close(got.eps, uncond.eps + scale * (cond.eps - uncond.eps), rtol=0, atol=1e-13)
    torch.testing.assert_close(LEVEL.alpha * got.x0 + LEVEL.sigma * got.eps, X, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "condition", [NONE, Condition(context=torch.ones(3, 4, 2))], ids=["nothing", "another"]
)
def test_guidance_without_its_condition_is_refused(condition: Condition) -> None:
    """Both halves would be the same, and guidance silently off at twice the cost."""
    with pytest.raises(ValueError, match="guidance needs the condition 'label'"):
        ClassifierFreeGuidance(Counting(), 3.0, labelled(10))(X, LEVEL, condition)
    with pytest.raises(ValueError, match="finite"):
        ClassifierFreeGuidance(Counting(), float("inf"), labelled(10))


def test_one_doubled_call_equals_two_calls() -> None:
    """Batched guidance makes one call on twice the batch, the other way makes two; the numbers agree, the
    learned variance too."""
    once, twice = Counting(wide=True), Counting(wide=True)
    a = ClassifierFreeGuidance(once, 3.0, labelled(10))(X, LEVEL, Condition(label=LABEL))
    b = ClassifierFreeGuidance(twice, 3.0, labelled(10), batched=False)(X, LEVEL, Condition(label=LABEL))
    assert (once.batches, twice.batches) == ([6], [3, 3])
    for name in ("x0", "eps", "variance"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-14)
    expected = Counting(wide=True)(X, LEVEL, Condition(label=LABEL)).variance
    torch.testing.assert_close(a.variance, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("scale", "label"), [(1.0, LABEL), (0.0, torch.full_like(LABEL, 10))])
def test_scale_one_and_zero_cost_one_plain_call(scale: float, label: Tensor, batched: bool) -> None:
    """w = 1 is the conditional denoiser and w = 0 the unconditional one, to the last bit, for one call of the
    plain batch."""
    counting = Counting()
    got = ClassifierFreeGuidance(counting, scale, labelled(10), batched=batched)(
        X, LEVEL, Condition(label=LABEL)
    )
    assert counting.batches == [3]
    assert torch.equal(got.x0, Counting()(X, LEVEL, Condition(label=label)).x0)


@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
def test_a_rule_is_given_what_two_plain_calls_say(make: Callable[[], Rule]) -> None:
    """Any rule, in one doubled call or in two; at scale 1 it is not asked, and at scale 0 only another than
    the formula is."""
    good, bad = (Counting()(X, LEVEL, Condition(label=label)) for label in (LABEL, NULL))
    for scale, calls in ((4.0, [6]), (0.0, [3] if make() is extrapolate else [6]), (1.0, [3])):
        once, twice = Counting(), Counting()
        expected = make()(X, LEVEL, good, bad, scale)
        got = ClassifierFreeGuidance(once, scale, labelled(10), rule=make())(X, LEVEL, Condition(label=LABEL))
        other = ClassifierFreeGuidance(twice, scale, labelled(10), rule=make(), batched=False)(
            X, LEVEL, Condition(label=LABEL)
        )
        for estimate in (got, other):
            close(estimate.x0, expected.x0)
            close(estimate.eps, expected.eps)
        assert (once.batches, twice.batches) == (calls, [3] * (sum(calls) // 3))


def test_a_negative_prompt_is_a_null_condition() -> None:
    """What to lead away from may be any condition: of one sample for all, or of each sample. Samples are led
    from it to their own."""
    prompt, negative = initial_noise([3, 4, 5], (4, 5), F64), initial_noise([6, 7, 8], (4, 5), F64)
    cond, away = (
        Counting()(X, LEVEL, Condition(label=LABEL, context=context)) for context in (prompt, negative)
    )
    got = ClassifierFreeGuidance(Counting(), 3.0, Condition(label=LABEL, context=negative))(
        X, LEVEL, Condition(label=LABEL, context=prompt)
    )
    close(got.x0, away.x0 + 3 * (cond.x0 - away.x0))
    one = ClassifierFreeGuidance(Counting(), 3.0, Condition(context=negative[1:2]))(
        X, LEVEL, Condition(label=LABEL, context=prompt)
    )
    close(one.x0[1], got.x0[1])


def test_null_of_one_sample_and_of_a_batch() -> None:
    """What guidance leads away from may be one row or a whole batch, in another dtype: the same result."""
    empty = initial_noise([9], (4, 5), F64)
    context = initial_noise([3, 4, 5], (4, 5), F64)
    one = Condition(label=torch.tensor([10], dtype=torch.int32), context=empty)
    nulls = [one, one.expand(3)]
    results = [
        ClassifierFreeGuidance(Counting(), 4.0, null)(X, LEVEL, Condition(label=LABEL, context=context)).x0
        for null in nulls
    ]
    uncond = Counting()(X, LEVEL, Condition(label=torch.full_like(LABEL, 10), context=empty.expand(3, 4, 5)))
    cond = Counting()(X, LEVEL, Condition(label=LABEL, context=context))
    for x0 in results:
        torch.testing.assert_close(x0, uncond.x0 + 4 * (cond.x0 - uncond.x0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_an_empty_null_raises(scale: float) -> None:
    """The message says how to give one; at scale 1 none is needed."""
    with pytest.raises(ValueError, match=r"not empty: null=Condition"):
        ClassifierFreeGuidance(Counting(), scale, NONE)(X, LEVEL, Condition(label=LABEL))
    ClassifierFreeGuidance(Counting(), 1.0, NONE)(X, LEVEL, Condition(label=LABEL))


def test_what_a_null_does_not_name_stays() -> None:
    """Guidance by the context alone, under the label of each sample on both sides."""
    prompt, empty = initial_noise([3, 4, 5], (4, 5), F64), initial_noise([9], (4, 5), F64)
    got = ClassifierFreeGuidance(Counting(), 4.0, Condition(context=empty))(
        X, LEVEL, Condition(label=LABEL, context=prompt)
    )
    cond, uncond = (
        Counting()(X, LEVEL, Condition(label=LABEL, context=each.expand(3, 4, 5))).x0
        for each in (prompt, empty)
    )
    close(got.x0, uncond + 4 * (cond - uncond))


# Scales that change with the level --------------------------------------------------------------------------


def test_a_scale_may_be_a_function_of_the_level() -> None:
    """Any schedule, e.g. the cosine of Wang et al. 2024: at each level it is guidance with the scale of that
    level, at its cost."""

    def cosine(level: Level) -> Any:
        return 1 + 6 * (1 + math.cos(math.pi * float(level.flow_time))) / 2

    for t, calls in ((0.1, [6]), (0.6, [6]), (1.0, [3])):
        level, counting = RectifiedFlow().level(t), Counting()
        got = ClassifierFreeGuidance(counting, cosine, labelled(10))(X, level, Condition(label=LABEL))
        constant = ClassifierFreeGuidance(Counting(), cosine(level), labelled(10))(
            X, level, Condition(label=LABEL)
        )
        assert torch.equal(got.x0, constant.x0)
        assert torch.equal(got.eps, constant.eps)
        assert counting.batches == calls


def test_interval_guides_inside_and_is_the_plain_denoiser_outside(schedule: Schedule) -> None:
    """To the last bit and for one call outside, ends included inside; it may limit another schedule, and be
    limited itself."""
    scale = interval(interval(lambda level: 5.0, 0.1, 0.6), 0.3, 0.8)
    inside = 0
    for share in (0.01, 0.2, 0.4, 0.5, 0.6, 0.8, 1.0):
        level = schedule.level(share * schedule.t_max)
        guides = 0.3 <= level.sigma / (level.alpha + level.sigma) <= 0.6
        assert scale(level) == (5.0 if guides else 1.0)
        oracle = Points({0: torch.zeros(2, 2, 2, dtype=F64), 1: torch.ones(2, 2, 2, dtype=F64)})
        got = ClassifierFreeGuidance(oracle, scale, labelled(0))(
            X, level, Condition(label=torch.ones(3, dtype=torch.long))
        )
        assert torch.equal(got.x0, torch.full_like(X, 5.0 if guides else 1.0))
        assert oracle.asked == (6 if guides else 3)
        inside += guides
    assert 0 < inside < 7
    edge = RectifiedFlow()
    assert [interval(2.0, 0.25, 0.5)(edge.level(t)) for t in (0.2499, 0.25, 0.5, 0.5001)] == [
        1.0,
        2.0,
        2.0,
        1.0,
    ]


@pytest.mark.parametrize("make", [*RULES.values(), None], ids=[*RULES, "composed"])
def test_a_level_per_sample_is_guided_by_its_own_scale(make: Callable[[], Rule] | None) -> None:
    """Distillation asks so: what a batch of levels gives is what each sample gives alone, inside the interval
    and outside."""
    schedule, times = CosineVP(), torch.tensor([0.9, 0.5, 0.2], dtype=F64)
    scale = interval(lambda level: 3.0 + level.sigma, 0.3, 0.7)
    network = Denoiser(
        lambda x, t, told: (x + told.label.to(x).view(-1, 1, 1, 1) * t.view(-1, 1, 1, 1)).sin(), schedule, V
    )
    if make is None:
        guidance: list[DenoiserLike] = [
            ComposedGuidance(network, [(labelled(n), scale), (labelled(2), -1.0)], labelled(0))
            for n in (1, 5, 3)
        ]
        per_sample = ComposedGuidance(
            network, [(Condition(label=LABEL), scale), (labelled(2), -1.0)], labelled(0)
        )
        batch = per_sample(X, schedule.levels(times))
        alone = [guidance[i](X[i : i + 1], schedule.level(float(times[i]))) for i in range(3)]
    else:
        rule = APG(norm_limit=2.0) if isinstance(make(), APG) else make()  # momentum needs one level
        guided = ClassifierFreeGuidance(network, scale, labelled(0), rule=rule)
        batch = guided(X, schedule.levels(times), Condition(label=LABEL))
        alone = [
            guided(X[i : i + 1], schedule.level(float(times[i])), Condition(label=LABEL[i : i + 1]))
            for i in range(3)
        ]
    for i in range(3):
        close(batch.x0[i], alone[i].x0[0], 1e-12)
        close(batch.eps[i], alone[i].eps[0], 1e-12)


# Autoguidance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", RULES.values(), ids=list(RULES))
def test_autoguidance_leads_away_from_a_weaker_network(make: Callable[[], Rule]) -> None:
    """The rule of both networks under the same conditions; a weak one that is as good changes nothing, and at
    scale 1 is not asked."""
    strong, weak = Counting(wide=True), Counting()
    weak.inner = Denoiser(
        lambda x, t, told: (0.5 * x - told.label.to(x).view(-1, 1, 1, 1)).cos(), RectifiedFlow(), V
    )
    good, bad = strong(X, LEVEL, Condition(label=LABEL)), weak(X, LEVEL, Condition(label=LABEL))
    got, expected = (
        AutoGuidance(strong, weak, 2.5, rule=make())(X, LEVEL, Condition(label=LABEL)),
        make()(X, LEVEL, good, bad, 2.5),
    )
    for name in ("x0", "eps", "variance"):
        close(getattr(got, name), getattr(expected, name))
    close(AutoGuidance(strong, strong, 2.5, rule=make())(X, LEVEL, Condition(label=LABEL)).x0, good.x0)
    never = AutoGuidance(strong, Points({}), interval(2.5, 0.7, 1.0), rule=make())
    assert torch.equal(never(X, LEVEL, Condition(label=LABEL)).x0, good.x0)


# Several conditions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("weights", [(2.0, 3.0), (4.0, -1.5), (0.5, 0.5), (0.0, 2.0), (0.0, 0.0)])
def test_composed_guidance_is_the_formula(weights: tuple[float, float], batched: bool) -> None:
    """uncond + sum_i w_i (cond_i - uncond) of plain calls, in x0 and eps; what has no share in the sum is not
    asked."""
    counting = Counting()
    conditions: list[tuple[Condition, Scale]] = [
        (labelled(3), weights[0]),
        (Condition(label=LABEL), weights[1]),
    ]
    got = ComposedGuidance(counting, conditions, labelled(10), batched=batched)(X, LEVEL)
    first, second, uncond = (
        Counting()(X, LEVEL, Condition(label=label)) for label in (torch.full_like(LABEL, 3), LABEL, NULL)
    )
    for name in ("x0", "eps"):
        one, two, none = (getattr(estimate, name) for estimate in (first, second, uncond))
        close(getattr(got, name), none + weights[0] * (one - none) + weights[1] * (two - none))
    k = sum(w != 0 for w in (*weights, 1 - sum(weights)))
    assert counting.batches == ([3 * k] if batched else [3] * k)


def test_one_composed_condition_is_classifier_free_guidance() -> None:
    """At any scale, for the same calls, and to the last bit where one call suffices; equal conditions add
    their weights up."""
    for scale in (-1.0, 0.0, 0.5, 1.0, 7.5):
        composing, guiding = Counting(wide=True), Counting(wide=True)
        got = ComposedGuidance(composing, [(Condition(label=LABEL), scale)], labelled(10))(X, LEVEL)
        expected = ClassifierFreeGuidance(guiding, scale, labelled(10))(X, LEVEL, Condition(label=LABEL))
        for name in ("x0", "eps", "variance"):
            close(getattr(got, name), getattr(expected, name), 0 if scale in (0, 1) else 1e-13)
        assert composing.batches == guiding.batches
    twice = ComposedGuidance(Counting(), [(labelled(3), 5.0), (labelled(3), -2.0)], labelled(10))(X, LEVEL)
    once = ComposedGuidance(Counting(), [(labelled(3), 3.0)], labelled(10))(X, LEVEL)
    close(twice.x0, once.x0)


def test_composed_conditions_of_different_names() -> None:
    """What a condition leaves out is null there. A condition is one row for all or one per sample; the call's
    own go to all."""
    prompt, empty = initial_noise([3], (4, 5), F64), initial_noise([9], (4, 5), F64)
    null = replace(labelled(10), context=empty)
    got = ComposedGuidance(Counting(), [(labelled(5), 2.0), (Condition(context=prompt), 3.0)], null)(X, LEVEL)
    both = [(torch.full_like(LABEL, 5), empty), (NULL, prompt), (NULL, empty)]
    by_label, by_context, none = (
        Counting()(X, LEVEL, Condition(label=a, context=b.expand(3, 4, 5))).x0 for a, b in both
    )
    close(got.x0, none + 2 * (by_label - none) + 3 * (by_context - none))

    shared = ComposedGuidance(Counting(), [(Condition(context=prompt), 3.0)], null)(
        X, LEVEL, Condition(label=LABEL)
    )
    by_context, none = (
        Counting()(X, LEVEL, Condition(label=LABEL, context=b.expand(3, 4, 5))).x0 for b in (prompt, empty)
    )
    close(shared.x0, none + 3 * (by_context - none))


# No movement at pure noise ----------------------------------------------------------------------------------


def test_zero_init_does_not_move_from_pure_noise(schedule: Schedule) -> None:
    """Velocity 0 and no call at flow time 1, or from where it is told; below, the denoiser itself, to the
    last bit."""
    oracle = Points({1: torch.ones(2, 2, 2, dtype=F64)})
    for share in (0.1, 0.5, 1.0):
        level = schedule.level(share * schedule.t_max)
        for zero_from in (1.0, 0.4):
            oracle.asked = 0
            got = ZeroInit(oracle, zero_from)(X, level, Condition(label=torch.ones(3, dtype=torch.long)))
            if level.sigma >= zero_from * (level.alpha + level.sigma):
                assert torch.equal(got.combine(-1.0, 1.0), torch.zeros_like(X))
                close(level.alpha * got.x0 + level.sigma * got.eps, X)
                assert oracle.asked == 0
            else:
                assert torch.equal(got.x0, torch.ones_like(X))
                assert oracle.asked == 3
    batch = ZeroInit(oracle, 0.4)(
        X,
        schedule.levels(torch.tensor([0.1, 0.5, 1.0], dtype=F64) * schedule.t_max),
        Condition(label=torch.ones(3, dtype=torch.long)),
    )
    for i, share in enumerate((0.1, 0.5, 1.0)):
        alone = ZeroInit(oracle, 0.4)(
            X[i : i + 1],
            schedule.level(share * schedule.t_max),
            Condition(label=torch.ones(1, dtype=torch.long)),
        )
        close(batch.x0[i], alone.x0[0], 1e-12)
        close(batch.eps[i], alone.eps[0], 1e-12 * max(1.0, 1 / schedule.level(share * schedule.t_max).sigma))


def test_a_first_step_of_zero_init_stays_where_it_starts() -> None:
    """In flow time a step of Euler from pure noise does nothing, and the next one starts from the same x (Fan
    et al. 2025, K = 1)."""
    grid, oracle = time_grid(RectifiedFlow(), 4), Points({1: torch.ones(2, 2, 2, dtype=F64)})
    first, second, *_ = SAMPLERS["euler"](
        lambda x, t: ZeroInit(oracle)(x, t, Condition(label=torch.ones(3, dtype=torch.long))), X, grid
    )
    assert torch.equal(first.x, X)
    close(second.x, X + (grid[2].t - grid[1].t) * (X - 1) / grid[1].t)


# Known answers, for every solver ----------------------------------------------------------------------------


class Points:
    """Each label has its point, and every sample is it; counts the samples asked about."""

    def __init__(self, points: dict[int, Tensor]) -> None:
        self.points, self.asked = points, 0

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        self.asked += len(x_t)
        return PointMass(torch.stack([self.points[int(n)] for n in condition.tensors["label"]]))(x_t, level)


NOTHING, CAT, HAT = initial_noise([30, 31, 32], (2, 2, 2), F64)
POINTS = Points({0: NOTHING, 1: CAT, 2: HAT})


def projected(eta: float, limit: float) -> Tensor:
    """Where APG at scale 4 leads from NOTHING to CAT."""
    d = (CAT - NOTHING) * min(1.0, limit / float((CAT - NOTHING).norm()))
    along = float((d * CAT).sum() / (CAT * CAT).sum()) * CAT
    return CAT + 3 * (d - along + eta * along)


def contrasted(x0: Tensor, phi: float) -> Tensor:
    """Rescaled in x0 to the contrast of CAT."""
    return (phi * CAT.std() / x0.std() + 1 - phi) * x0


def thresholded(x0: Tensor) -> Tensor:
    s = max(1.0, float(x0.abs().quantile(0.995)))
    return x0.clamp(-s, s) / s


def guide(denoiser: DenoiserLike, scale: Scale, rule: Rule = extrapolate) -> ClassifierFreeGuidance:
    return ClassifierFreeGuidance(denoiser, scale, labelled(0), rule=rule)


# A guided denoiser whose x0 is one point at every level, and the point.
FIXED: dict[str, tuple[Callable[[], DenoiserLike], Tensor]] = {
    "extrapolate": (lambda: guide(POINTS, 4.0), NOTHING + 4 * (CAT - NOTHING)),
    "interval over all": (lambda: guide(POINTS, interval(4.0, 0.0, 1.0)), NOTHING + 4 * (CAT - NOTHING)),
    "apg": (lambda: guide(POINTS, 4.0, APG(0.25, norm_limit=1.5)), projected(0.25, 1.5)),
    # The average of equal differences is at least half of one: with this limit only its direction counts,
    # which stays.
    "apg with momentum": (
        lambda: guide(POINTS, 4.0, APG(0.0, norm_limit=0.5, momentum=-0.5)),
        projected(0.0, 0.5),
    ),
    "rescaled": (
        lambda: guide(POINTS, 4.0, rescaled(0.7, space=X0)),
        contrasted(NOTHING + 4 * (CAT - NOTHING), 0.7),
    ),
    "rescaled apg": (
        lambda: guide(POINTS, 4.0, rescaled(0.7, APG(0.0, 1.5), X0)),
        contrasted(projected(0.0, 1.5), 0.7),
    ),
    "autoguidance": (lambda: AutoGuidance(POINTS, PointMass(HAT), 3.0), HAT + 3 * (CAT - HAT)),
    "autoguidance over guidance": (
        lambda: AutoGuidance(guide(POINTS, 2.0), guide(PointMass(HAT), 2.0), 3.0),
        HAT + 3 * (NOTHING + 2 * (CAT - NOTHING) - HAT),
    ),
    "thresholded": (lambda: Thresholded(guide(POINTS, 9.0)), thresholded(NOTHING + 9 * (CAT - NOTHING))),
    "composed": (
        lambda: drop(ComposedGuidance(POINTS, [(labelled(1), 3.0), (labelled(2), -1.0)], labelled(0))),
        NOTHING + 3 * (CAT - NOTHING) - (HAT - NOTHING),
    ),
    "all at once": (
        lambda: Thresholded(
            AutoGuidance(guide(POINTS, 4.0, rescaled(0.7, APG(0.0, 1.5), X0)), PointMass(HAT), 2.0)
        ),
        thresholded(HAT + 2 * (contrasted(projected(0.0, 1.5), 0.7) - HAT)),
    ),
}


def drop(denoiser: DenoiserLike) -> DenoiserLike:
    """Composed guidance has its conditions and takes none of the same name."""
    return lambda x_t, level, condition=NONE: denoiser(x_t, level)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("kind", FIXED)
def test_every_solver_ends_at_the_guided_point(kind: str, sampler: str) -> None:
    """Guidance, rules and wrappers are denoisers: any of them, one in another, works with any solver, run
    after run."""
    make, point = FIXED[kind]
    denoiser = make()
    for schedule in (RectifiedFlow(), DiscreteVP.scaled_linear()):
        for steps in (1, 5):
            got = sample(
                sampler,
                denoiser,
                time_grid(schedule, steps),
                shape=(2, 2, 2),
                seeds=[0, 1],
                dtype=F64,
                condition=Condition(label=torch.ones(2, dtype=torch.long)),
            )
            close(got, point.expand_as(got), 1e-11)


class Clouds:
    """Each label has a Gaussian of the same spread."""

    def __init__(self, mean: dict[int, float]) -> None:
        self.mean = mean

    def __call__(self, x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        estimates = [
            cloud(self.mean[int(n)])(x[None], level)
            for n, x in zip(condition.tensors["label"], x_t, strict=True)
        ]
        return Estimate(*(torch.cat(parts) for parts in zip(*estimates, strict=True)))


def cloud(mean: float) -> GaussianMixture:
    return GaussianMixture(torch.full((1, 2, 1), mean, dtype=F64), torch.tensor([0.6], dtype=F64))


CLOUDS, ONES = Clouds({0: -0.5, 1: 1.0, 2: 0.3}), Condition(label=torch.ones(2, dtype=torch.long))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance_between_two_gaussians_is_a_third(sampler: str) -> None:
    """E[x0 | x_t] is linear in the mean where the spread is equal, so guidance samples N(m_u + w (m_c - m_u),
    std) itself: each solver makes the very samples of that Gaussian from the same seeds, noise of the loop
    included.
    """
    composed = ComposedGuidance(CLOUDS, [(labelled(1), 2.0), (labelled(2), -1.5)], labelled(0))
    kinds: list[tuple[DenoiserLike, Condition, float]] = [
        (guide(CLOUDS, 3.0), ONES, -0.5 + 3 * 1.5),
        (AutoGuidance(CLOUDS, cloud(0.2), 2.0), ONES, 0.2 + 2 * 0.8),
        (composed, NONE, -0.5 + 2 * 1.5 - 1.5 * 0.8),
        (guide(CLOUDS, 3.0, APG(1.0)), ONES, -0.5 + 3 * 1.5),
    ]
    for schedule in (RectifiedFlow(), DiscreteVP.scaled_linear()):
        run = partial(sample, sampler, grid=time_grid(schedule, 6), shape=(2, 1), seeds=[0, 1], dtype=F64)
        for denoiser, condition, mean in kinds:
            close(run(denoiser, condition=condition), run(cloud(mean)), 1e-11)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interval_switches_between_two_denoisers(sampler: str) -> None:
    """Where it guides the solver asks the guided Gaussian, elsewhere the conditional one: the same samples as
    from such a pair."""

    def pair(x_t: Tensor, level: Level, condition: Condition = NONE, /) -> Estimate:
        return cloud(4.0 if 0.3 <= level.flow_time <= 0.8 else 1.0)(x_t, level)

    run = partial(sample, sampler, grid=time_grid(RectifiedFlow(), 6), shape=(2, 1), seeds=[0, 1], dtype=F64)
    close(run(guide(CLOUDS, interval(3.0, 0.3, 0.8)), condition=ONES), run(pair), 1e-11)


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_momentum_starts_anew_with_every_run_of_every_solver(sampler: str, steps: int) -> None:
    """The average follows all calls of a run, churned and repeated ones too, and none of the run before,
    finished or given up."""
    differences: list[Tensor] = []
    averages: list[Tensor] = []
    apg = APG(1.0, momentum=-0.5)

    def recorded(x_t: Tensor, level: Level, good: Estimate, bad: Estimate, scale: Any) -> Estimate:
        out = apg(x_t, level, good, bad, scale)
        differences.append(good.x0 - bad.x0)
        averages.append((out.x0 - good.x0) / (scale - 1))
        return out

    wide = GaussianMixture(torch.full((1, 2, 1), -0.5, dtype=F64), torch.tensor([1.0], dtype=F64))
    denoiser = AutoGuidance(cloud(1.0), wide, 3.0, rule=recorded)
    run = partial(
        sample, sampler, denoiser, time_grid(CosineVP(), steps), shape=(2, 1), seeds=[0, 1], dtype=F64
    )
    first = run()
    expected = torch.zeros_like(first)
    for difference, average in zip(differences, averages, strict=True):
        expected = difference - 0.5 * expected
        close(average, expected, 1e-12)
    next(iter(SAMPLERS[sampler](denoiser, X[:2, :, :1, 0], time_grid(CosineVP(), steps))))
    assert torch.equal(run(), first)


# Cost and errors --------------------------------------------------------------------------------------------


def composed(*conditions: tuple[Condition, Any], null: Condition = labelled(10)) -> ComposedGuidance:  # noqa: B008
    return ComposedGuidance(Counting(), conditions, null)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: interval(3.0, -0.1, 0.5), "0 <= low < high <= 1, not -0.1 and 0.5"),
        (lambda: interval(3.0, 0.5, 1.5), "0 <= low < high <= 1, not 0.5 and 1.5"),
        (lambda: interval(3.0, 0.5, 0.5), "0 <= low < high <= 1, not 0.5 and 0.5"),
        (lambda: interval(3.0, math.nan, 0.5), "0 <= low < high <= 1, not nan and 0.5"),
        (lambda: interval(math.nan, 0.0, 0.5), "finite number, not nan"),
        (
            lambda: guide(POINTS, lambda level: math.inf)(X, LEVEL, Condition(label=LABEL)),
            "finite number, not inf",
        ),
        (
            lambda: guide(POINTS, lambda level: torch.tensor([1.0, math.nan, 2.0]))(
                X, LEVEL, Condition(label=LABEL)
            ),
            "finite number, not tensor",
        ),
        (lambda: ClassifierFreeGuidance(POINTS, 2.0, LABEL), "null must be "),  # type: ignore[arg-type]
        (lambda: AutoGuidance(POINTS, POINTS, math.inf), "finite number, not inf"),
        (
            lambda: AutoGuidance(POINTS, POINTS, lambda level: math.nan)(
                X, LEVEL, Condition(label=torch.ones(3, dtype=torch.long))
            ),
            "finite number, not nan",
        ),
        (lambda: composed(), "needs conditions, none empty"),
        (lambda: composed((labelled(1), 2.0), (NONE, 1.0)), "needs conditions, none empty"),
        (lambda: composed((labelled(1), math.nan)), "finite number, not nan"),
        (lambda: composed((labelled(1), lambda level: math.inf))(X, LEVEL), "finite number, not inf"),
        (
            lambda: composed((labelled(1), 2.0), null=NONE),
            r"null value for 'label': give null=Condition\(label=...\)",
        ),
        (lambda: composed((labelled(1, 2), 2.0))(X, LEVEL), "condition 'label' has 2 rows for 3 samples"),
        (
            lambda: composed((labelled(1), 2.0))(X, LEVEL, Condition(label=LABEL)),
            "condition 'label' is composed",
        ),
        (lambda: ZeroInit(POINTS, 0.0), r"flow time in \(0, 1\], not 0"),
        (lambda: ZeroInit(POINTS, 1.1), r"flow time in \(0, 1\], not 1.1"),
    ],
)
def test_errors(make: Callable[[], object], message: str) -> None:
    """What cannot be meant raises, and the message says what can."""
    with pytest.raises(ValueError, match=message):
        make()
