"""Stable Diffusion 3: the sizes of published nets, output and gradients as diffusers computes them, and what
it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import SD3, SD3Params
from tests.models.joint_peers import (
    assert_equal_at_full_width,
    assert_equal_in_value_and_gradient,
    translated,
)
from tests.models.small import MEDIUM, MMDIT, SD3S, inputs, randomised
from tests.peers import diffusers

# The numbers in the published files, position table included.
PUBLISHED = {
    "3.0": (SD3Params(), 2_084_951_104),
    "3.5 large": (SD3Params(depth=38, qk_norm=True), 8_146_280_768),
    "3.5 medium": (SD3Params(positions=384, qk_norm=True, dual=13), 2_469_663_936),
}
NAMES = {r"^patch_in\.": "pos_embed.proj.", r"^position$": "pos_embed.pos_embed"}


def to_diffusers(params: SD3Params, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return translated(state, NAMES, swapped=("modulation_out", f"blocks.{params.depth - 1}.text.modulation"))


def peer(p: SD3Params) -> diffusers.SD3Transformer2DModel:
    return diffusers.SD3Transformer2DModel(
        sample_size=128,
        patch_size=p.patch_size,
        in_channels=p.in_channels,
        num_layers=p.depth,
        num_attention_heads=p.hidden // 64,
        joint_attention_dim=p.context_dim,
        caption_projection_dim=p.hidden,
        pooled_projection_dim=p.vector_dim,
        out_channels=p.out_channels,
        pos_embed_max_size=p.positions,
        dual_attention_layers=tuple(range(p.dual)),
        qk_norm="rms_norm" if p.qk_norm else None,
    ).eval()


def call_peer(
    network: diffusers.SD3Transformer2DModel, x: Tensor, t: Tensor, context: Tensor, vector: Tensor
) -> Tensor:
    return network(
        hidden_states=x, encoder_hidden_states=context, pooled_projections=vector, timestep=1000 * t
    ).sample


def assert_equals_diffusers(
    params: SD3Params, size: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    ours, theirs = randomised(SD3(params)).to(dtype), peer(params).to(dtype)
    x, t, condition = inputs(params, size)
    to_theirs, call = partial(to_diffusers, params), partial(call_peer, theirs)
    assert_equal_in_value_and_gradient(
        ours, theirs, to_theirs, call, (x.to(dtype), t.to(dtype), condition.to(dtype=dtype)), tolerance
    )


@pytest.mark.parametrize("kind", PUBLISHED)
def test_size_of_published_nets(kind: str) -> None:
    """A published configuration has as many numbers as the published file."""
    params, count = PUBLISHED[kind]
    with torch.device("meta"):
        assert sum(value.numel() for value in SD3(params).state_dict().values()) == count


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("size", [(8, 12), (14, 6), (24, 24)])
@pytest.mark.parametrize("kind", SD3S)
def test_output_and_gradients_equal_diffusers(
    kind: str, size: tuple[int, int], dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same random weights; every kind of block, and even, odd and whole cuts of the position
    table."""
    if dtype == torch.float64:  # which diffusers' own norm rounds to float32
        monkeypatch.setattr(diffusers.models.normalization, "RMSNorm", nn.RMSNorm)
    assert_equals_diffusers(SD3S[kind], size, dtype, tolerance)


@pytest.mark.parametrize("kind", PUBLISHED)
def test_equals_diffusers_at_full_width(kind: str) -> None:
    """Two blocks, one with a text stream as all but the last have it, in the published size."""
    params = PUBLISHED[kind][0]
    params = replace(params, heads=params.depth, depth=2, dual=min(params.dual, 1))
    to_theirs = partial(to_diffusers, params)
    assert_equal_at_full_width(
        lambda: SD3(params), lambda: peer(params), to_theirs, call_peer, inputs(params, (8, 12))
    )


@pytest.mark.parametrize("positions", [12, 192])
def test_position_table_equals_diffusers(positions: int) -> None:
    """Coordinates run from 0 to 64. Diffusers divides them in float32, which moves the angle by up to 64 *
    2^-24."""
    params = replace(SD3S["3.0"], positions=positions)
    table, expected = SD3(params).get_buffer("position"), peer(params).pos_embed.pos_embed
    torch.testing.assert_close(table, expected, rtol=0, atol=64 * 2**-24 + 1e-7)


def test_fresh_blocks_are_the_identity() -> None:
    """Before training every block hands on what it is given, and the last its text whatever comes."""
    network = SD3(MEDIUM)
    text, image, emb = torch.randn(2, 5, 128), torch.randn(2, 6, 128), torch.randn(2, 128)
    for block in network.blocks:
        assert all(map(torch.equal, block(text, image, emb), (text, image)))


def test_refuses_images_it_has_no_positions_for() -> None:
    """Beyond the table on either side raises, and the error names both sizes."""
    for size in ((26, 8), (8, 26)):
        x, t, condition = inputs(MEDIUM, size)
        with pytest.raises(ValueError, match=f"positions for 24x24 latents, not for {size[0]}x{size[1]}"):
            SD3(MEDIUM)(x, t, condition)


@pytest.mark.parametrize("size", [(7, 12), (8, 5), (7, 7), (1, 1)])
def test_half_patches_are_filled_up_and_cut_again(size: tuple[int, int]) -> None:
    """With the first row and column, as ComfyUI does it; diffusers' pipeline makes no such images."""
    network = randomised(SD3(MEDIUM))
    x, t, condition = inputs(MEDIUM, size)
    whole = torch.cat([x, x[:, :, : size[0] % 2]], dim=2)
    whole = torch.cat([whole, whole[..., : size[1] % 2]], dim=3)
    assert torch.equal(network(x, t, condition), network(whole, t, condition)[..., : size[0], : size[1]])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(dual=3), "dual=3 must be 0 to depth=2"),
        (dict(depth=0), "depth must be at least 1"),
        (dict(heads=0), "heads must be at least 1"),
    ],
)
def test_refuses_parameters_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    """Parameters that contradict each other raise before there is a network."""
    with pytest.raises(ValueError, match=message):
        SD3Params(**{**MMDIT, **wrong})
