"""Quantiles of the Beta distribution: closed forms, scipy, and what holds of any of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.quantile import beta_quantile
from tests.peers import scipy

P = torch.linspace(0, 1, 201, dtype=torch.float64)
SHAPES = (0.05, 0.3, 0.6, 1.0, 1.7, 5.0, 20.0, 100.0)


@pytest.mark.parametrize(
    ("a", "b", "exact"),
    [
        (1.0, 1.0, lambda p: p),
        (2.0, 1.0, lambda p: p.sqrt()),
        (1.0, 3.0, lambda p: 1 - (1 - p) ** (1 / 3)),
        (0.5, 0.5, lambda p: (math.pi / 2 * p).sin() ** 2),
        (2.0, 2.0, lambda p: 0.5 - ((1 - 2 * p).asin() / 3).sin()),
    ],
)
def test_closed_forms(a: float, b: float, exact: Callable[[Tensor], Tensor]) -> None:
    """Power laws, the arcsine law, and the root of 3 x^2 - 2 x^3 = p."""
    torch.testing.assert_close(beta_quantile(P, a, b), exact(P), rtol=0, atol=2e-15)


@pytest.mark.parametrize(("a", "b"), list(product(SHAPES, SHAPES)))
def test_is_scipys(a: float, b: float) -> None:
    """To 1e-13, and to 1e-12 of itself towards 0, where p is tiny and x may be too."""
    np.testing.assert_allclose(
        beta_quantile(P, a, b), scipy.special.betaincinv(a, b, P.numpy()), rtol=0, atol=1e-13
    )
    small = torch.tensor([1e-12, 1e-6, 1e-3], dtype=torch.float64)
    np.testing.assert_allclose(
        beta_quantile(small, a, b), scipy.special.betaincinv(a, b, small.numpy()), rtol=1e-12, atol=1e-300
    )


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.05, 50.0), (100.0, 3.0)])
def test_inverts_the_distribution_function_and_mirrors(a: float, b: float) -> None:
    """I_x(a, b) = p for the x found, and exchanging a and b mirrors it. Both ends are exact."""
    x = beta_quantile(P, a, b)
    assert (float(x[0]), float(x[-1])) == (0, 1)
    assert (x.diff() >= 0).all()
    torch.testing.assert_close(1 - beta_quantile(1 - P, b, a), x, rtol=0, atol=1e-13)
    inside = (x > 1e-300) & (x < 1 - 1e-9)  # beyond, doubles of x lie too far apart to tell
    np.testing.assert_allclose(
        scipy.special.betainc(a, b, x[inside].numpy()), P[inside], rtol=1e-5 if b == 0.05 else 1e-10, atol=0
    )
