"""FLUX.1: the sizes of published nets, output and gradients as diffusers computes them, and what it
refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from models import Flux, FluxParams
from models.networks.flux import TrunkParams
from tests.models.joint_peers import (
    assert_equal_at_full_width,
    assert_equal_in_value_and_gradient,
    call_with_tokens,
    translated,
)
from tests.models.small import DEV, FILL, FLUX, FLUXES, SCHNELL, beside, inputs, randomised
from tests.peers import diffusers

# The parameters of the published files.
PUBLISHED = {
    "dev": (FluxParams(), 11_901_408_320),
    "schnell": (FluxParams(guidance_dim=None), 11_891_178_560),
    "Fill": (FluxParams(in_channels=96), 11_902_391_360),
    "Canny": (FluxParams(in_channels=32), 11_901_604_928),
}
NAMES = {
    r"^patch_in\.": "x_embedder.",
    r"^single\.(\d+)\.modulation\.": r"single_transformer_blocks.\1.norm.linear.",
    r"^single\.(\d+)\.norm": r"single_transformer_blocks.\1.attn.norm",
    r"^single\.(\d+)\.out\.": r"single_transformer_blocks.\1.proj_out.",
    r"^single\.(\d+)\.qkv\.": r"single_transformer_blocks.\1.attn.to_[qkv].",
    r"^single\.(\d+)\.mlp\.": r"single_transformer_blocks.\1.proj_mlp.",
}


def to_diffusers(params: TrunkParams, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under diffusers' names, where a single block's one product is four."""
    parts: dict[str, Tensor] = {}
    for name, value in state.items():
        if "qkv_mlp" in name:
            parts[name.replace("qkv_mlp", "qkv")] = value[: 3 * params.hidden]
            parts[name.replace("qkv_mlp", "mlp")] = value[3 * params.hidden :]
        else:
            parts[name] = value
    return translated(parts, NAMES, swapped=("modulation_out",))


def peer(p: FluxParams) -> diffusers.FluxTransformer2DModel:
    return diffusers.FluxTransformer2DModel(
        in_channels=p.in_channels * p.patch_size**2,
        out_channels=p.out_channels * p.patch_size**2,
        num_layers=p.depth,
        num_single_layers=p.depth_single,
        attention_head_dim=p.hidden // p.heads,
        num_attention_heads=p.heads,
        joint_attention_dim=p.context_dim,
        pooled_projection_dim=p.vector_dim,
        guidance_embeds=p.guidance_dim is not None,
        axes_dims_rope=p.axes,
    ).eval()


def call_peer(
    network: diffusers.FluxTransformer2DModel,
    x: Tensor,
    t: Tensor,
    context: Tensor,
    vector: Tensor,
    guidance: Tensor | None = None,
    image: Tensor | None = None,
) -> Tensor:
    return call_with_tokens(
        network, beside(x, image), t, context, pooled_projections=vector, guidance=guidance
    )


def turned(x: Tensor, cos_sin: tuple[Tensor, Tensor], sequence_dim: int) -> Tensor:
    """What diffusers computes in float32, x (B, L, H, d), in the dtype of x."""
    assert sequence_dim == 1
    cos, sin = (table[:, None] for table in cos_sin)
    across = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(3)
    return x * cos + across * sin


def assert_equals_diffusers(
    params: FluxParams, size: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    ours, theirs = randomised(Flux(params)).to(dtype), peer(params).to(dtype)
    x, t, condition = inputs(params, size)
    to_theirs, call = partial(to_diffusers, params), partial(call_peer, theirs)
    assert_equal_in_value_and_gradient(
        ours, theirs, to_theirs, call, (x.to(dtype), t.to(dtype), condition.to(dtype=dtype)), tolerance
    )


@pytest.mark.parametrize("kind", PUBLISHED)
def test_parameter_count_of_published_nets(kind: str) -> None:
    """A published configuration has the published number of parameters."""
    params, count = PUBLISHED[kind]
    with torch.device("meta"):
        assert sum(p.numel() for p in Flux(params).parameters()) == count


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("size", [(8, 12), (14, 4)])
@pytest.mark.parametrize("kind", FLUXES)
def test_output_and_gradients_equal_diffusers(
    kind: str, size: tuple[int, int], dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same random weights; with and without guidance, and with more channels in than out."""
    if dtype == torch.float64:  # which diffusers rounds to float32 before it turns
        monkeypatch.setattr(diffusers.models.transformers.transformer_flux, "apply_rotary_emb", turned)
    assert_equals_diffusers(FLUXES[kind], size, dtype, tolerance)


@pytest.mark.parametrize(
    "kind", [kind if kind == "dev" else pytest.param(kind, marks=pytest.mark.slow) for kind in PUBLISHED]
)
def test_equals_diffusers_at_full_width(kind: str) -> None:
    """A block of each sort in the published size."""
    params = replace(PUBLISHED[kind][0], depth=1, depth_single=1)
    to_theirs = partial(to_diffusers, params)
    assert_equal_at_full_width(
        lambda: Flux(params), lambda: peer(params), to_theirs, call_peer, inputs(params, (8, 12))
    )


def test_position_matters() -> None:
    """Transposed in, it is not transposed out: rows and columns turn features of their own."""
    network = randomised(Flux(SCHNELL))
    x, t, condition = inputs(SCHNELL, (8, 8))
    with torch.no_grad():
        out, across = network(x, t, condition), network(x.mT, t, condition).mT
    assert (out - across).abs().max() > 0.01 * out.abs().max()


def test_fresh_blocks_are_the_identity() -> None:
    """Before training every block hands on what it is given."""
    network = Flux(DEV)
    text, image, emb, turns = (
        torch.randn(2, 5, 48),
        torch.randn(2, 6, 48),
        torch.randn(2, 48),
        torch.randn(11, 8, 2),
    )
    for block in network.joint:
        assert all(map(torch.equal, block(text, image, emb, turns), (text, image)))
    for block in network.single:
        assert torch.equal(block(image, emb, turns[:6]), image)


def test_output_has_its_own_channels() -> None:
    """What an inpainting net is given beside x is not in its output."""
    x, t, condition = inputs(FILL, (8, 12))
    assert beside(x, condition.image).shape[1] == 10
    assert Flux(FILL)(x, t, condition).shape == (2, 3, 8, 12)


@pytest.mark.parametrize("size", [(7, 12), (8, 5), (7, 7), (1, 1)])
def test_half_patches_are_filled_up_and_cut_again(size: tuple[int, int]) -> None:
    """With the first row and column, as ComfyUI does it; diffusers' pipeline makes no such images."""
    network = randomised(Flux(DEV))
    x, t, condition = inputs(DEV, size)
    whole = torch.cat([x, x[:, :, : size[0] % 2]], dim=2)
    whole = torch.cat([whole, whole[..., : size[1] % 2]], dim=3)
    assert torch.equal(network(x, t, condition), network(whole, t, condition)[..., : size[0], : size[1]])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(axes=(4, 6, 5)), "axes are three even numbers"),
        (dict(axes=(8, 8)), "axes are three even numbers"),
        (dict(heads=4), "hidden=48 must be heads=4 times the sum of axes="),
        (dict(depth_single=0), "depth_single must be at least 1"),
    ],
)
def test_refuses_parameters_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    """Parameters that contradict each other raise before there is a network."""
    with pytest.raises(ValueError, match=message):
        FluxParams(**{**FLUX, **wrong})
