"""Stable Diffusion 3, FLUX.1 and Chroma beside their counterparts in diffusers: names, and what has to be
equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from diffusion import Condition
from models.files.blank import Blank
from tests.models.small import randomised, relative_error, renamed

# House names to diffusers names, of what both networks have in common.
NAMES = {
    r"^context_in\.": "context_embedder.",
    r"^time\.fc": "time_text_embed.timestep_embedder.linear_",
    r"^guidance\.fc": "time_text_embed.guidance_embedder.linear_",
    r"^vector\.mlp\.0\.": "time_text_embed.text_embedder.linear_1.",
    r"^vector\.mlp\.2\.": "time_text_embed.text_embedder.linear_2.",
    r"^modulation_out\.": "norm_out.linear.",
    r"^patch_out\.": "proj_out.",
    r"^(joint|blocks)\.": "transformer_blocks.",
    r"\.image\.modulation\.": ".norm1.linear.",
    r"\.text\.modulation\.": ".norm1_context.linear.",
    r"\.image\.attention(2?)\.qkv\.": r".attn\1.to_[qkv].",
    r"\.image\.attention(2?)\.norm": r".attn\1.norm",
    r"\.image\.attention(2?)\.out\.": r".attn\1.to_out.0.",
    r"\.text\.attention\.qkv\.": ".attn.add_[qkv]_proj.",
    r"\.text\.attention\.norm": ".attn.norm_added",
    r"\.text\.attention\.out\.": ".attn.to_add_out.",
    r"\.image\.mlp\.0\.": ".ff.net.0.proj.",
    r"\.image\.mlp\.2\.": ".ff.net.2.",
    r"\.text\.mlp\.0\.": ".ff_context.net.0.proj.",
    r"\.text\.mlp\.2\.": ".ff_context.net.2.",
}


def translated(
    state: Mapping[str, Tensor], rules: Mapping[str, str], swapped: tuple[str, ...]
) -> dict[str, Tensor]:
    """A state dict under diffusers' names; where it says (scale, shift) and we (shift, scale), the halves are
    swapped."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.rpartition(".")[0] in swapped:
            value = torch.cat(value.chunk(2)[::-1])
        result |= renamed(name, value, {**rules, **NAMES})
    return result


def call_with_tokens(network: nn.Module, x: Tensor, t: Tensor, context: Tensor, **told: Any) -> Tensor:
    """Diffusers' FLUX.1 and Chroma take packed latents and positions: what their pipelines do stands here."""
    height, width = x.shape[-2] // 2, x.shape[-1] // 2
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    out = network(
        hidden_states=rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2),
        encoder_hidden_states=context,
        timestep=t,
        img_ids=ids.flatten(0, 1),
        txt_ids=torch.zeros(context.shape[1], 3),
        **told,
    ).sample
    return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=height, p=2, q=2)


def assert_equal_at_full_width(
    make: Callable[[], nn.Module],
    make_theirs: Callable[[], nn.Module],
    to_theirs: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    call_theirs: Callable[..., Tensor],
    inputs: tuple[Tensor, Tensor, Condition],
) -> None:
    """Outputs within 1e-5. Gigabytes: nothing is initialised twice, and both hold the same tensors."""
    with Blank():
        ours = randomised(make())
    with torch.device("meta"):
        theirs = make_theirs()
    theirs.load_state_dict(to_theirs(ours.state_dict()), strict=True, assign=True)
    x, t, condition = inputs
    with torch.no_grad():
        assert relative_error(ours(x, t, condition), call_theirs(theirs, x, t, **condition.tensors)) <= 1e-5


def assert_equal_in_value_and_gradient(
    ours: nn.Module,
    theirs: nn.Module,
    to_theirs: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    call_theirs: Callable[..., Tensor],
    inputs: tuple[Tensor, Tensor, Condition],
    tolerance: float,
) -> None:
    """Output within `tolerance`; gradients of image, text, vector and every parameter within ten times as
    much; no tensor left over."""
    theirs.load_state_dict(to_theirs(ours.state_dict()), strict=True)
    x, t, condition = inputs
    wanted = {
        "x": x,
        **{name: value for name, value in condition.tensors.items() if name in ("context", "vector")},
    }
    for value in wanted.values():
        value.requires_grad_()
    out, expected = ours(x, t, condition), call_theirs(x, t, **condition.tensors)
    assert out.shape == expected.shape
    assert relative_error(out, expected) <= tolerance

    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(
        out
    )  # a different one for every output
    grads, expected_grads = (
        torch.autograd.grad((y * weight).sum(), list(wanted.values()), retain_graph=True)
        for y in (out, expected)
    )
    for name, grad, expected_grad in zip(wanted, grads, expected_grads, strict=True):
        assert relative_error(grad, expected_grad) <= 10 * tolerance, name

    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    mine = to_theirs(
        {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in ours.named_parameters()}
    )
    for name, p in theirs.named_parameters():
        # A key's bias moves all scores of a query alike, so its gradient is zero but for rounding: the
        # layer's own size is what counts.
        size = max(
            float(mine[other].abs().max())
            for other in mine
            if other.rpartition(".")[0] == name.rpartition(".")[0]
        )
        difference = float((mine[name] - (torch.zeros_like(p) if p.grad is None else p.grad)).abs().max())
        assert difference <= 10 * tolerance * size, name
