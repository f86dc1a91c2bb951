"""Chroma: the size of the published net, output and gradients as diffusers computes them, with all of the
text or some of it masked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from diffusion import Condition
from models import Chroma, ChromaParams
from tests.models import test_flux
from tests.models.joint_peers import (
    assert_equal_at_full_width,
    assert_equal_in_value_and_gradient,
    call_with_tokens,
)
from tests.models.small import CHROMA, inputs, randomised, renamed
from tests.peers import diffusers

NAMES = {
    r"^approximator\.fc_in\.": "distilled_guidance_layer.in_proj.",
    r"^approximator\.out\.": "distilled_guidance_layer.out_proj.",
    r"^approximator\.blocks\.(\d+)\.fc": r"distilled_guidance_layer.layers.\1.linear_",
    r"^approximator\.blocks\.(\d+)\.norm\.": r"distilled_guidance_layer.norms.\1.",
}
MASK = torch.arange(5) < torch.tensor([[2], [4]])


def to_diffusers(params: ChromaParams, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under diffusers' names."""
    return test_flux.to_diffusers(
        params,
        {key: part for name, value in state.items() for key, part in renamed(name, value, NAMES).items()},
    )


def peer(p: ChromaParams) -> diffusers.ChromaTransformer2DModel:
    network = diffusers.ChromaTransformer2DModel(
        in_channels=p.in_channels * p.patch_size**2,
        num_layers=p.depth,
        num_single_layers=p.depth_single,
        attention_head_dim=p.hidden // p.heads,
        num_attention_heads=p.heads,
        joint_attention_dim=p.context_dim,
        axes_dims_rope=p.axes,
        approximator_num_channels=p.waves,
        approximator_hidden_dim=p.width_approximator,
        approximator_layers=p.depth_approximator,
    ).eval()
    table = network.time_text_embed
    with torch.device("cpu"):  # it is no part of the state dict, so it must not be on the meta device
        network.time_text_embed = type(table)(p.waves // 4, len(table.mod_proj))
    for norm in network.distilled_guidance_layer.norms:
        norm.eps = 1e-6  # as its author's code has it; theirs is what the dtype resolves, 1e-7 in float32
    return network


def call_peer(
    network: diffusers.ChromaTransformer2DModel,
    x: Tensor,
    t: Tensor,
    context: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Its mask is of text and image, and bool: what is not bool, as in its pipelines, it adds to the
    scores."""
    pixels = x.shape[-2] * x.shape[-1] // 4
    whole = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), pixels)], dim=1)
    return call_with_tokens(network, x, t, context, attention_mask=whole)


def test_parameter_count_of_the_published_net() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Chroma(ChromaParams()).parameters()) == 8_899_983_424


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("size", [(8, 12), (14, 4)])
def test_output_and_gradients_equal_diffusers(
    size: tuple[int, int],
    dtype: torch.dtype,
    tolerance: float,
    mask: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the same random weights."""
    if dtype == torch.float64:  # which diffusers rounds to float32 before it turns
        monkeypatch.setattr(
            diffusers.models.transformers.transformer_flux, "apply_rotary_emb", test_flux.turned
        )
    ours, theirs = randomised(Chroma(CHROMA)).to(dtype), peer(CHROMA).to(dtype)
    x, t, condition = inputs(CHROMA, size)
    told = replace(condition.to(dtype=dtype), mask=mask)
    to_theirs, call = partial(to_diffusers, CHROMA), partial(call_peer, theirs)
    assert_equal_in_value_and_gradient(
        ours, theirs, to_theirs, call, (x.to(dtype), t.to(dtype), told), tolerance
    )


@pytest.mark.slow
def test_equals_diffusers_at_full_width() -> None:
    """A block of each sort in the published size."""
    params = replace(ChromaParams(), depth=1, depth_single=1, depth_approximator=1)
    x, t, condition = inputs(params, (8, 12))
    told = (x, t, replace(condition, mask=MASK))
    assert_equal_at_full_width(
        lambda: Chroma(params), lambda: peer(params), partial(to_diffusers, params), call_peer, told
    )


@pytest.mark.parametrize("size", [(7, 12), (1, 1)])
def test_a_batch_equals_its_samples_alone(size: tuple[int, int]) -> None:
    """Each with the tokens that its mask leaves, and no mask: what is masked has no influence."""
    network = randomised(Chroma(CHROMA))
    x, t, condition = inputs(CHROMA, size)
    assert condition.context is not None
    with torch.no_grad():
        together = network(x, t, replace(condition, mask=MASK))
        alone = [
            network(x[i : i + 1], t[i : i + 1], Condition(condition.context[i : i + 1, : MASK[i].sum()]))
            for i in range(2)
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_refuses_waves_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="waves=60 must divide by 8"):
        replace(CHROMA, waves=60)
