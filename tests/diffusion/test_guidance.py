"""Classifier-free guidance: its formula, what it costs, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import ClassifierFreeGuidance, Denoiser, Estimate, RectifiedFlow, V, initial_noise

F64 = torch.float64
LEVEL = RectifiedFlow().level(0.6)
X = initial_noise([0, 1, 2], (2, 2, 2), F64)
LABEL = torch.tensor([1, 5, 3])


class Counting:
    """A denoiser whose network answers by label and context, and which counts its calls."""

    def __init__(self, *, wide: bool = False) -> None:
        self.batches: list[int] = []
        self.inner = Denoiser(self.network, RectifiedFlow(), V)
        self.wide = wide

    def network(self, x: Tensor, t: Tensor, label: Tensor, context: Tensor | None = None) -> Tensor:
        self.batches.append(len(x))
        shift = label.to(x) if context is None else label.to(x) + context.mean((1, 2))
        out = (x + shift.view(-1, 1, 1, 1)).sin()
        return torch.cat([out, out.cos()], 1) if self.wide else out

    def __call__(self, x_t: Tensor, level: Any, /, **cond: Any) -> Estimate:
        return self.inner(x_t, level, **cond)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("scale", [-1.0, 0.5, 2.0, 7.5])
def test_formula(scale: float, batched: bool) -> None:
    """x0 and eps are uncond + w (cond - uncond) of two plain calls, and still explain x_t."""
    plain = Counting()
    cond, uncond = plain(X, LEVEL, label=LABEL), plain(X, LEVEL, label=torch.full_like(LABEL, 10))
    got = ClassifierFreeGuidance(plain, scale, {"label": 10}, batched=batched)(X, LEVEL, label=LABEL)
    torch.testing.assert_close(got.x0, uncond.x0 + scale * (cond.x0 - uncond.x0), rtol=0, atol=1e-13)
    torch.testing.assert_close(got.eps, uncond.eps + scale * (cond.eps - uncond.eps), rtol=0, atol=1e-13)
    torch.testing.assert_close(LEVEL.alpha * got.x0 + LEVEL.sigma * got.eps, X, rtol=0, atol=1e-13)


@pytest.mark.parametrize("cond", [{}, {"context": torch.ones(3, 4, 2)}])
def test_guidance_without_its_condition_is_refused(cond: dict[str, Tensor]) -> None:
    """Both halves would be the same, and guidance silently off at twice the cost."""
    with pytest.raises(ValueError, match="guidance needs the condition 'label'"):
        ClassifierFreeGuidance(Counting(), 3.0, {"label": 10})(X, LEVEL, **cond)
    with pytest.raises(ValueError, match="finite"):
        ClassifierFreeGuidance(Counting(), float("inf"), {"label": 10})


def test_one_doubled_call_equals_two_calls() -> None:
    """Batched guidance makes one call on twice the batch, the other way makes two; the numbers agree, the learned variance too."""
    once, twice = Counting(wide=True), Counting(wide=True)
    a = ClassifierFreeGuidance(once, 3.0, {"label": 10})(X, LEVEL, label=LABEL)
    b = ClassifierFreeGuidance(twice, 3.0, {"label": 10}, batched=False)(X, LEVEL, label=LABEL)
    assert (once.batches, twice.batches) == ([6], [3, 3])
    for name in ("x0", "eps", "variance"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-14)
    expected = Counting(wide=True)(X, LEVEL, label=LABEL).variance
    torch.testing.assert_close(a.variance, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(("scale", "label"), [(1.0, LABEL), (0.0, torch.full_like(LABEL, 10))])
def test_scale_one_and_zero_cost_one_plain_call(scale: float, label: Tensor, batched: bool) -> None:
    """w = 1 is the conditional denoiser and w = 0 the unconditional one, to the last bit, for one call of the plain batch."""
    counting = Counting()
    got = ClassifierFreeGuidance(counting, scale, {"label": 10}, batched=batched)(X, LEVEL, label=LABEL)
    assert counting.batches == [3]
    assert torch.equal(got.x0, Counting()(X, LEVEL, label=label).x0)


def test_null_of_one_sample_and_of_a_batch() -> None:
    """The unconditional input may be a number, one sample's tensor, or a whole batch: the same result."""
    empty = initial_noise([9], (4, 5), F64)[0]
    context = initial_noise([3, 4, 5], (4, 5), F64)
    nulls: list[dict[str, Any]] = [
        {"label": 10, "context": empty},
        {"label": torch.tensor(10), "context": empty[None]},
        {"label": torch.full_like(LABEL, 10), "context": empty.expand(3, 4, 5)},
    ]
    results = [ClassifierFreeGuidance(Counting(), 4.0, null)(X, LEVEL, label=LABEL, context=context).x0 for null in nulls]
    uncond = Counting()(X, LEVEL, label=torch.full_like(LABEL, 10), context=empty.expand(3, 4, 5))
    cond = Counting()(X, LEVEL, label=LABEL, context=context)
    for x0 in results:
        torch.testing.assert_close(x0, uncond.x0 + 4 * (cond.x0 - uncond.x0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_a_condition_without_a_null_value_raises(scale: float) -> None:
    """The message names the condition and how to give its null value; at scale 1 none is needed."""
    with pytest.raises(ValueError, match=r"null value for the condition 'label'"):
        ClassifierFreeGuidance(Counting(), scale, {})(X, LEVEL, label=LABEL)
    ClassifierFreeGuidance(Counting(), 1.0, {})(X, LEVEL, label=LABEL)
