"""Densities of training times: what is drawn has the distribution that is stated."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffusion import CosineVP, DiscreteVP, RectifiedFlow, Shifted, VarianceExploding
from tests.peers import scipy
from train.density import DENSITIES, Density, LogitNormal, LogNormal, Uniform

N, BATCHES = 16, 400


def drawn(density: Density) -> Tensor:
    """One time of each of many batches, so that they are independent."""
    torch.manual_seed(0)
    return torch.stack([density.sample(N)[k % N] for k in range(BATCHES)])


def logit(t: float | Tensor) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64).logit()


CASES: dict[str, tuple[Density, Callable[[Tensor], Tensor]]] = {
    "uniform, flow": (Uniform(RectifiedFlow()), lambda t: t),
    "uniform, ve": (Uniform(VarianceExploding(0.5, 4.5)), lambda t: (t - 0.5) / 4),
    "logit_normal": (LogitNormal(RectifiedFlow()), lambda t: torch.special.ndtr(logit(t))),
    "logit_normal, moved": (
        LogitNormal(RectifiedFlow(), 0.4, 1.7),
        lambda t: torch.special.ndtr((logit(t) - 0.4) / 1.7),
    ),
    # sigma/alpha = t/(1-t) of a flow times 3: logit(t) is moved by log 3
    "logit_normal, shifted": (
        LogitNormal(RectifiedFlow(), shift=3.0),
        lambda t: torch.special.ndtr(logit(t) - math.log(3)),
    ),
    # tan(pi t / 2) of the cosine schedule times 3
    "logit_normal, shifted cosine": (
        LogitNormal(CosineVP(), shift=3.0),
        lambda t: torch.special.ndtr(logit(((t * torch.pi / 2).tan() / 3).atan() * 2 / torch.pi)),
    ),
    "log_normal": (LogNormal(VarianceExploding()), lambda t: torch.special.ndtr((t.log() + 1.2) / 1.2)),
    "log_normal, moved": (
        LogNormal(VarianceExploding(), 0.5, 0.8),
        lambda t: torch.special.ndtr((t.log() - 0.5) / 0.8),
    ),
}


@pytest.mark.parametrize(("density", "cdf"), CASES.values(), ids=list(CASES))
def test_times_have_the_stated_distribution(density: Density, cdf: Callable[[Tensor], Tensor]) -> None:
    """Kolmogorov-Smirnov against the closed-form distribution function; times are float64 and within the
    schedule."""
    t = drawn(density)
    assert t.dtype == torch.float64
    assert density.schedule.t_min <= float(t.min())
    assert float(t.max()) <= density.schedule.t_max
    assert scipy.stats.kstest(cdf(t).numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize(("density", "cdf"), CASES.values(), ids=list(CASES))
def test_quantiles_invert_the_distribution_function(
    density: Density, cdf: Callable[[Tensor], Tensor]
) -> None:
    """cdf(quantile(u)) = u to 1e-9."""
    u = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
    torch.testing.assert_close(cdf(density.quantile(u)), u, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("density", "cdf"), CASES.values(), ids=list(CASES))
def test_a_batch_covers_the_range_evenly(density: Density, cdf: Callable[[Tensor], Tensor]) -> None:
    """Stratified: of n times one lies in each n-th of the distribution, give or take one place for the common
    offset."""
    torch.manual_seed(1)
    u = cdf(density.sample(100)).sort().values
    torch.testing.assert_close(u.diff(), torch.full((99,), 0.01, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [7, 1000])
def test_all_rows_of_a_table_are_equally_likely(rows: int) -> None:
    """On a DiscreteVP schedule times are whole, and a batch of one per row has every row once, the first and
    the last too."""
    density = Uniform(DiscreteVP.cosine(steps=rows))
    for seed in range(20):
        torch.manual_seed(seed)
        assert torch.equal(density.sample(rows).sort().values, torch.arange(rows, dtype=torch.float64))
    assert density.quantile(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [0, rows - 1]


def test_a_shifted_table_is_a_table() -> None:
    """Its times are its rows too."""
    t = Uniform(Shifted(DiscreteVP.cosine(steps=100), 2.0)).sample(100)
    assert torch.equal(t.sort().values, torch.arange(100, dtype=torch.float64))


def test_densities_refuse_schedules_they_do_not_fit() -> None:
    """Logit-normal needs [0, 1], log-normal a variance-exploding schedule."""
    assert list(DENSITIES) == ["usual", "uniform", "logit_normal", "log_normal"]
    with pytest.raises(ValueError, match=r"needs a schedule on \[0, 1\]"):
        LogitNormal(DiscreteVP.linear())
    with pytest.raises(ValueError, match="needs a variance-exploding schedule"):
        LogNormal(RectifiedFlow())
