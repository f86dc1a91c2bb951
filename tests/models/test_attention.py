"""Attention against its formula, written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from models.layers.attention import CrossAttention, SelfAttention, attend, attention


def plain(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, one sample and one head after the other."""
    out = torch.empty_like(q)
    d = q.shape[-1] // heads
    for b in range(len(q)):
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            weight = (q[b, :, part] @ k[b, :, part].T / d**0.5).exp()
            out[b, :, part] = weight / weight.sum(-1, keepdim=True) @ v[b, :, part]
    return out


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (7, 4), (1, 9)])
def test_attention_follows_its_formula(queries: int, keys: int, heads: int) -> None:
    """The fused kernel gives softmax(q k^T / sqrt(d)) v for any lengths and number of heads."""
    q, k, v = normal(3, queries, 12), normal(3, keys, 12), normal(3, keys, 12) * 2
    torch.testing.assert_close(attention(q, k, v, heads), plain(q, k, v, heads), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
@pytest.mark.parametrize("shape", [None, (2, 3, 7, 5), (1, 3, 7, 5), (1, 1, 7, 5)])
def test_attend_scales_and_biases_the_scores(shape: tuple[int, ...] | None, scale: float | None) -> None:
    """softmax(scale * q k^T + bias) v by heads, for a bias of every sample and head or one for all; 1/sqrt(d)
    without a scale."""
    q, k, v = normal(2, 3, 7, 4), normal(2, 3, 5, 4), normal(2, 3, 5, 6)
    bias = None if shape is None else normal(*shape)
    weight = (
        (4**-0.5 if scale is None else scale) * torch.einsum("bhid,bhjd->bhij", q, k)
        + (0 if bias is None else bias)
    ).exp()
    expected = torch.einsum("bhij,bhjd->bihd", weight / weight.sum(-1, keepdim=True), v).flatten(2)
    torch.testing.assert_close(attend(q, k, v, mask=bias, scale=scale), expected, rtol=1e-12, atol=1e-12)


def test_attend_causally() -> None:
    """What a query gets is what it would get of the keys up to its own alone."""
    q, k, v = normal(1, 2, 5, 4), normal(1, 2, 5, 4) + 1, normal(1, 2, 5, 4) - 1
    for i, row in enumerate(attend(q, k, v, causal=True).unbind(1)):
        alone = attend(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1])
        torch.testing.assert_close(row, alone[:, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_stacks_query_key_value(bias: bool) -> None:
    """The fused product holds query, key and value in this order."""
    layer = SelfAttention(12, 3, qkv_bias=bias).double()
    x = normal(2, 5, 12)
    q, k, v = (
        linear(x, *pair) for pair in zip(layer.qkv.weight.chunk(3), _biases(layer.qkv.bias, 3), strict=True)
    )
    torch.testing.assert_close(layer(x), layer.out(plain(q, k, v, 3)), rtol=1e-12, atol=1e-12)
    assert (layer.qkv.bias is not None) == bias


@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_takes_key_and_value_from_the_context(bias: bool) -> None:
    """Queries come from x; the fused product holds the context's key, then its value."""
    layer = CrossAttention(12, 8, 3, bias=bias).double()
    x, context = normal(2, 5, 12), normal(2, 4, 8)
    k, v = (
        linear(context, *pair)
        for pair in zip(layer.kv.weight.chunk(2), _biases(layer.kv.bias, 2), strict=True)
    )
    torch.testing.assert_close(
        layer(x, context), layer.out(plain(layer.q(x), k, v, 3)), rtol=1e-12, atol=1e-12
    )
    assert (layer.q.bias is not None) == (layer.kv.bias is not None) == bias


def _biases(bias: Tensor | None, parts: int) -> list[Tensor | None]:
    return [None] * parts if bias is None else list(bias.chunk(parts))
