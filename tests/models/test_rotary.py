"""Rotary positions against their formula, with complex numbers in float64."""

from __future__ import annotations

import pytest
import torch

from models.layers.rotary import positions, rotate, rotations

CPU = torch.device("cpu")
AXES = (4, 6, 6)


def test_text_stands_at_zero_and_comes_first() -> None:
    """(0, row, column) of every token, row by row."""
    expected = [[0, 0, 0]] * 3 + [[0, row, column] for row in range(2) for column in range(4)]
    assert positions(3, 2, 4, CPU).tolist() == expected


def test_neighbours_turn_as_complex_numbers() -> None:
    """Features (2k, 2k+1) are a + ib, times e^(i * position * theta^(-2k/d)), each axis with its own share of
    the features."""
    x = torch.randn(2, 3, 13, 16, generator=torch.Generator().manual_seed(0))
    where = torch.randint(0, 99, (13, 3), generator=torch.Generator().manual_seed(1))
    start = 0
    parts = []
    for axis, dim in enumerate(AXES):
        angle = where[:, axis, None] * 100.0 ** (-2 * torch.arange(dim // 2, dtype=torch.float64) / dim)
        pairs = torch.view_as_complex(x[..., start : start + dim].double().unflatten(-1, (-1, 2)))
        parts.append(torch.view_as_real(pairs * torch.exp(1j * angle)).flatten(-2))
        start += dim
    torch.testing.assert_close(
        rotate(x, rotations(where, AXES, 100.0)).double(), torch.cat(parts, dim=-1), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_origin_does_not_turn(dtype: torch.dtype) -> None:
    """Text tokens stay bit for bit what they are, in their dtype."""
    x = torch.randn(1, 2, 5, 16).to(dtype)
    assert torch.equal(rotate(x, rotations(torch.zeros(5, 3), AXES, 1e4)), x)


def test_products_know_distances_only() -> None:
    """q at p and k at p' give what they give when both move alike."""
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0))
    near, far = torch.tensor([[0, 3, 5]]), torch.tensor([[0, 4, 1]])

    def product(shift: torch.Tensor) -> torch.Tensor:
        near_angles, far_angles = (rotations(place + shift, AXES, 1e4) for place in (near, far))
        return (rotate(q, near_angles) * rotate(k, far_angles)).sum()

    moved = torch.tensor([[7, 20, 40]])
    torch.testing.assert_close(product(moved), product(0 * moved), rtol=0, atol=1e-5)
    assert abs(product(moved) - (q * k).sum()) > 1e-2


def test_compiled_turns_are_the_same() -> None:
    """Which are computed with real numbers there."""
    x = torch.randn(2, 3, 5, sum(AXES))
    angles = rotations(torch.arange(15.0).view(5, 3), AXES, 1e4)
    compiled = torch.compile(rotate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, angles), rotate(x, angles), rtol=0, atol=1e-6)
