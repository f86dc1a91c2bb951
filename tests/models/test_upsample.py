"""Upsampling against repetition and convolution, by both ways that a CPU may take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.upsample import Upsample


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "out", "transposed"),
    [
        ((2, 3), None, False),
        ((3, 4), None, True),
        ((9, 11), (18, 22), True),
        ((9, 11), (17, 22), False),
        ((4, 4), (7, 7), False),
    ],
)
def test_upsampling_is_repetition_and_convolution(
    size: tuple[int, int],
    out: tuple[int, int] | None,
    transposed: bool,
    layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In value and gradients, borders included; by a transposed convolution for whole images of at least as
    many pixels as channels."""
    taken: list[torch.Size] = []
    product = F.conv_transpose2d

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None, **settings: int) -> Tensor:
        taken.append(x.shape)
        return product(x, weight, bias, **settings)

    monkeypatch.setattr(F, "conv_transpose2d", watched)
    torch.manual_seed(0)
    layer = Upsample(12).double()
    x = torch.randn(2, 12, *size, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    ours = layer(x, None if out is None else torch.Size(out))
    assert bool(taken) == transposed
    height, width = out or (2 * size[0], 2 * size[1])
    expected = layer.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :height, :width])
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(ours)
    grads = (torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in (ours, expected))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
