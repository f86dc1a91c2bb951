"""The DiT: the sizes of published nets, their outputs as diffusers computes them, its zero start, and what it
refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from diffusion import Condition
from models import DiT, DiTParams
from models.layers.conditioning import sinusoid
from tests.models.small import CLASSES, DIT, DITS, TEXT, VARIANCE, inputs, randomised, relative_error, renamed
from tests.peers import diffusers

# Peebles & Xie 2023, table 1: hidden, depth, heads, and the parameters in millions (table 4) at patch size 2.
PUBLISHED = {
    "S": (384, 12, 6, 33),
    "B": (768, 12, 12, 130),
    "L": (1024, 24, 16, 458),
    "XL": (1152, 28, 16, 675),
}

# House names to diffusers names. Diffusers keeps a copy of
# the time and label embeddings in each block, here {block}.
NAMES = {
    r"^patch_in\.": "pos_embed.proj.",
    r"^time\.fc(\d)\.": r"transformer_blocks.{block}.norm1.emb.timestep_embedder.linear_\1.",
    r"^label\.table\.": "transformer_blocks.{block}.norm1.emb.class_embedder.embedding_table.",
    r"^modulation_out\.": "proj_out_1.",
    r"^patch_out\.": "proj_out_2.",
    r"^blocks\.": "transformer_blocks.",
    r"\.modulation\.": ".norm1.linear.",
    r"\.self_attention\.qkv\.": ".attn1.to_[qkv].",
    r"\.self_attention\.out\.": ".attn1.to_out.0.",
    r"\.mlp\.0\.": ".ff.net.0.proj.",
    r"\.mlp\.3\.": ".ff.net.2.",
}


def translated(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """A state dict under diffusers' names."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        for new, part in renamed(name, value, NAMES).items():
            result |= {new.replace("{block}", str(block)): part for block in range(depth)}
    return result


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_count_of_published_nets(size: str) -> None:
    """A published configuration has the published number of parameters, in the millions that the paper
    gives."""
    hidden, depth, heads, millions = PUBLISHED[size]
    with torch.device("meta"):
        network = DiT(DiTParams(hidden=hidden, depth=depth, heads=heads, learned_variance=True))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


def test_parameter_count_of_dit_xl_2() -> None:
    """DiT-XL/2 on 32x32 latents has the 675,129,632 numbers of the published file: parameters and position
    table."""
    with torch.device("meta"):
        network = DiT(DiTParams(learned_variance=True))
    assert sum(p.numel() for p in network.parameters()) == 674_834_720
    assert sum(p.numel() for p in network.state_dict().values()) == 675_129_632


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize(
    "params",
    [CLASSES, VARIANCE, DiTParams(**{**DIT, "patch_size": 4, "hidden": 24, "heads": 2}, num_classes=7)],
)
def test_output_and_gradient_equal_diffusers(params: DiTParams, dtype: torch.dtype, tolerance: float) -> None:
    """With the same random weights, the output and its gradient are those of diffusers, and no tensor is left
    over."""
    ours = randomised(DiT(params)).to(dtype)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=params.heads,
        attention_head_dim=params.hidden // params.heads,
        in_channels=params.in_channels,
        out_channels=params.out_channels,
        num_layers=params.depth,
        sample_size=params.image_size,
        patch_size=params.patch_size,
        num_embeds_ada_norm=params.num_classes,
        norm_eps=1e-6,
    )
    theirs = theirs.to(dtype).eval()
    state = {name: value for name, value in ours.state_dict().items() if name != "position"}
    state["patch_in.weight"] = state["patch_in.weight"].view(
        params.hidden, params.in_channels, params.patch_size, params.patch_size
    )
    theirs.load_state_dict(translated(state, params.depth), strict=True)
    # Diffusers divides the frequencies' exponents by 127; DiT's published code, which its weights were
    # trained with, by 128.
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    # Both tables are float64 rounded to float32, by torch and by numpy: at most the last bit differs.
    torch.testing.assert_close(theirs.pos_embed.pos_embed[0], ours.get_buffer("position"), rtol=0, atol=1e-7)
    theirs.pos_embed.pos_embed.copy_(ours.get_buffer("position"))
    x, t, condition = inputs(params, (8, 8))
    x = x.to(dtype).requires_grad_()
    out, expected = ours(x, t, condition), theirs(x, t, class_labels=condition.tensors["label"]).sample
    assert relative_error(out, expected) <= tolerance
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(
        dtype
    )  # a different one for every output
    grad, expected_grad = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (out, expected))
    assert relative_error(grad, expected_grad) <= 10 * tolerance


def attention_by_hand(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k / sqrt(d)) v per head, (B, L, D)."""
    q, k, v = (part.unflatten(-1, (heads, -1)) for part in (q, k, v))
    weight = (torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("bhlm,bmhd->blhd", weight, v).flatten(2)


def test_text_and_vector_by_hand() -> None:
    """No peer has this network, so its formula stands here: vector into the embedding, text by attention
    between the two gates."""
    params = replace(TEXT, depth=1)
    network = randomised(DiT(params)).double()
    w = {name: value.double() for name, value in network.state_dict().items()}
    x, t, condition = inputs(params, (8, 8))
    x, context, vector = (
        x.double(),
        condition.tensors["context"].double(),
        condition.tensors["vector"].double(),
    )

    def linear(name: str, value: Tensor) -> Tensor:
        bias = w.get(f"{name}.bias")
        return value @ w[f"{name}.weight"].T + (0 if bias is None else bias)

    def normed(value: Tensor) -> Tensor:
        return (value - value.mean(-1, keepdim=True)) / (
            value.var(-1, unbiased=False, keepdim=True) + 1e-6
        ).sqrt()

    emb = linear("time.fc2", silu(linear("time.fc1", sinusoid(t, 256).double())))
    emb = silu(emb + linear("vector.mlp.2", silu(linear("vector.mlp.0", vector))))
    h = x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, 12)
    h = linear("patch_in", h) + w["position"]
    shift1, scale1, gate1, shift2, scale2, gate2 = linear("blocks.0.modulation", emb)[:, None].chunk(6, -1)
    q, k, v = linear("blocks.0.self_attention.qkv", normed(h) * (1 + scale1) + shift1).chunk(3, -1)
    h = h + gate1 * linear("blocks.0.self_attention.out", attention_by_hand(q, k, v, params.heads))
    q, (k, v) = (
        linear("blocks.0.cross_attention.q", h),
        linear("blocks.0.cross_attention.kv", context).chunk(2, -1),
    )
    h = h + linear("blocks.0.cross_attention.out", attention_by_hand(q, k, v, params.heads))
    h = h + gate2 * linear(
        "blocks.0.mlp.3",
        gelu(linear("blocks.0.mlp.0", normed(h) * (1 + scale2) + shift2), approximate="tanh"),
    )
    shift, scale = linear("modulation_out", emb)[:, None].chunk(2, -1)
    out = (
        linear("patch_out", normed(h) * (1 + scale) + shift)
        .view(2, 4, 4, 2, 2, 3)
        .permute(0, 5, 1, 3, 2, 4)
        .reshape(2, 3, 8, 8)
    )
    assert relative_error(network(x, t, Condition(context=context, vector=vector)), out) <= 1e-11


@pytest.mark.parametrize("kind", DITS)
def test_fresh_blocks_are_the_identity(kind: str) -> None:
    """Before training every block hands on what it is given, cross-attention included."""
    network = DiT(DITS[kind])
    x = torch.randn(2, 16, 32)
    for block in network.blocks:
        assert torch.equal(block(x, torch.randn(2, 32), torch.randn(2, 5, 12)), x)


def test_position_matters() -> None:
    """Transposed in, it is not transposed out: rows and columns have embeddings of their own."""
    network = randomised(DiT(CLASSES))
    x, t, condition = inputs(CLASSES, (8, 8))
    with torch.no_grad():
        out, across = network(x, t, condition), network(x.mT, t, condition).mT
    assert (out - across).abs().max() > 0.1 * out.abs().max()


def test_learned_variance_doubles_the_channels() -> None:
    """With a learned variance the output has twice the channels of x, the same size, and otherwise those of
    x."""
    for params, channels in ((CLASSES, 3), (VARIANCE, 6)):
        x, t, condition = inputs(params, (8, 8))
        assert DiT(params)(x, t, condition).shape == (2, channels, 8, 8)


@pytest.mark.parametrize("size", [(8, 10), (16, 8), (4, 4)])
def test_refuses_any_size_but_its_own(size: tuple[int, int]) -> None:
    """The position table fixes the image size; another one raises, and the error names both."""
    _, t, condition = inputs(CLASSES, (8, 8))
    with pytest.raises(ValueError, match=f"built for 8x8, not {size[0]}x{size[1]}"):
        DiT(CLASSES)(torch.zeros(2, 3, *size), t, condition)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(patch_size=3), "image_size=8 must divide by patch_size=3"),
        (dict(heads=5), "hidden=32 must divide by heads=5 and by 4"),
        (dict(hidden=30, heads=5), "hidden=30 must divide by heads=5 and by 4"),
    ],
)
def test_refuses_parameters_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    """Parameters that contradict each other raise before there is a network."""
    with pytest.raises(ValueError, match=message):
        DiTParams(**{**DIT, **wrong})
