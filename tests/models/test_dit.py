"""The DiT: the sizes of published nets, their outputs as diffusers computes them, its zero start, and what it refuses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from models import DiT, DiTParams

# Peebles & Xie 2023, table 1: hidden, depth, heads, and the parameters in millions (table 4) at patch size 2.
PUBLISHED = {"S": (384, 12, 6, 33), "B": (768, 12, 12, 130), "L": (1024, 24, 16, 458), "XL": (1152, 28, 16, 675)}

SMALL: dict[str, Any] = dict(in_channels=3, image_size=8, patch_size=2, hidden=32, depth=2, heads=4)
CLASSES = DiTParams(**SMALL, num_classes=10)
VARIANCE = DiTParams(**SMALL, num_classes=10, learned_variance=True)
TEXT = DiTParams(**SMALL, num_classes=None, context_dim=12, vector_dim=6)
KINDS = {"classes": CLASSES, "variance": VARIANCE, "text": TEXT}

# House names to diffusers names. A bracket [qkv] stands for as many tensors, stacked in ours. Diffusers keeps a copy of
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
    result = {}
    for name, value in state.items():
        for pattern, replacement in NAMES.items():
            name = re.sub(pattern, replacement, name)
        letters = re.search(r"\[(\w+)\]", name)
        parts = letters[1] if letters else ""
        for letter, part in zip(parts or [""], value.chunk(len(parts) or 1), strict=True):
            for block in range(depth):
                result[name.replace(f"[{parts}]", letter).replace("{block}", str(block))] = part
    return result


def randomised(network: nn.Module) -> nn.Module:
    """The network with every parameter drawn anew, at a scale that keeps activations near 1: no zero hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / (math.sqrt(p[0].numel()) if p.ndim > 1 else 2))
    return network.eval()


def inputs(p: DiTParams) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, t and the conditions for a batch of two, at times far apart; the second label is the null label."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, p.in_channels, p.image_size, p.image_size, generator=generator)
    conditions = {}
    if p.num_classes is not None:
        conditions["label"] = torch.tensor([3, p.num_classes])
    if p.context_dim is not None:
        conditions["context"] = torch.randn(2, 5, p.context_dim, generator=generator)
    if p.vector_dim is not None:
        conditions["vector"] = torch.randn(2, p.vector_dim, generator=generator)
    return x, torch.tensor([3.25, 987.6]), conditions


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameter_count_of_published_nets(size: str) -> None:
    """A published configuration has the published number of parameters, in the millions that the paper gives."""
    hidden, depth, heads, millions = PUBLISHED[size]
    with torch.device("meta"):
        network = DiT(DiTParams(hidden=hidden, depth=depth, heads=heads, learned_variance=True))
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions


def test_parameter_count_of_dit_xl_2() -> None:
    """DiT-XL/2 on 32x32 latents has the 675,129,632 numbers of the published file: parameters and position table."""
    with torch.device("meta"):
        network = DiT(DiTParams(learned_variance=True))
    assert sum(p.numel() for p in network.parameters()) == 674_834_720
    assert sum(p.numel() for p in network.state_dict().values()) == 675_129_632


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
@pytest.mark.parametrize("params", [CLASSES, VARIANCE, DiTParams(**{**SMALL, "patch_size": 4, "hidden": 24, "heads": 2}, num_classes=7)])
def test_output_and_gradient_equal_diffusers(params: DiTParams, dtype: torch.dtype, tolerance: float) -> None:
    """With the same random weights, the output and its gradient are those of diffusers, and no tensor is left over."""
    ours = randomised(DiT(params)).to(dtype)
    theirs = DiTTransformer2DModel(
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
    state["patch_in.weight"] = state["patch_in.weight"].view(params.hidden, params.in_channels, params.patch_size, params.patch_size)
    theirs.load_state_dict(translated(state, params.depth), strict=True)
    # Diffusers divides the frequencies' exponents by 127; DiT's published code, which its weights were trained with, by 128.
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    # Both tables are float64 rounded to float32, by torch and by numpy: at most the last bit differs.
    torch.testing.assert_close(theirs.pos_embed.pos_embed[0], ours.get_buffer("position"), rtol=0, atol=1e-7)
    theirs.pos_embed.pos_embed.copy_(ours.get_buffer("position"))
    x, t, given = inputs(params)
    x = x.to(dtype).requires_grad_()
    out, expected = ours(x, t, **given), theirs(x, t, class_labels=given["label"]).sample
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)  # a different one for every output
    grad, expected_grad = (torch.autograd.grad((y * weight).sum(), x)[0] for y in (out, expected))
    assert (grad - expected_grad).abs().max() <= 10 * tolerance * expected_grad.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_network_outputs_zero(kind: str) -> None:
    """Before training the output is exactly zero (adaLN-zero)."""
    x, t, given = inputs(KINDS[kind])
    assert not DiT(KINDS[kind])(x, t, **given).any()


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_blocks_are_the_identity(kind: str) -> None:
    """Before training every block hands on what it is given, cross-attention included."""
    network = DiT(KINDS[kind])
    x = torch.randn(2, 16, 32)
    for block in network.blocks:
        assert torch.equal(block(x, torch.randn(2, 32), torch.randn(2, 5, 12)), x)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_every_parameter(kind: str) -> None:
    """No parameter is without influence on the output."""
    network = randomised(DiT(KINDS[kind]))
    x, t, given = inputs(KINDS[kind])
    network(x, t, **given).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_condition_changes_the_output(kind: str) -> None:
    """Time and each condition of one sample change that sample's output, and no other's."""
    network = randomised(DiT(KINDS[kind]))
    x, t, given = inputs(KINDS[kind])
    with torch.no_grad():
        before = network(x, t, **given)
        for name, value in {"t": t, **given}.items():
            other = torch.cat([value[:1] - 1, value[1:]])
            after = network(x, **{"t": t, **given, name: other})
            assert (after[0] - before[0]).abs().max() > 1e-3, name
            torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-5)


def test_position_matters() -> None:
    """Transposed in, it is not transposed out: rows and columns have embeddings of their own."""
    network = randomised(DiT(CLASSES))
    x, t, given = inputs(CLASSES)
    with torch.no_grad():
        out, across = network(x, t, **given), network(x.mT, t, **given).mT
    assert (out - across).abs().max() > 0.1 * out.abs().max()


def test_learned_variance_doubles_the_channels() -> None:
    """With a learned variance the output has twice the channels of x, the same size, and otherwise those of x."""
    for params, channels in ((CLASSES, 3), (VARIANCE, 6)):
        x, t, given = inputs(params)
        assert DiT(params)(x, t, **given).shape == (2, channels, 8, 8)


@pytest.mark.parametrize("kind", ["classes", "text"])
def test_compiles_as_one_graph_for_all_times(kind: str) -> None:
    """torch.compile makes one graph without a break, does not recompile as t changes, and computes the same."""
    torch._dynamo.reset()
    network = randomised(DiT(replace(KINDS[kind], depth=1)))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x, _, given = inputs(KINDS[kind])
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for t in (999.0, 875.5, 750.0, 500.0, 333.3, 250.0, 125.0, 10.0, 1.0, 0.0):
            level = torch.tensor(t).expand(2)
            torch.testing.assert_close(compiled(x, level, **given), network(x, level, **given))


@pytest.mark.parametrize("name", ["label", "context", "vector", "guidance"])
def test_refuses_a_condition_it_has_no_use_for(name: str) -> None:
    """A condition that would be ignored raises, and the error names it."""
    params = DiTParams(**SMALL, num_classes=None)
    x, t, _ = inputs(params)
    with pytest.raises(ValueError, match=f"has no use for the condition '{name}'; it takes: none"):
        DiT(params)(x, t, **{name: torch.zeros(2, dtype=torch.long)})


@pytest.mark.parametrize(("kind", "name"), [("classes", "label"), ("text", "context"), ("text", "vector")])
def test_refuses_to_do_without_a_condition(kind: str, name: str) -> None:
    """A missing condition raises, and the error names it."""
    x, t, given = inputs(KINDS[kind])
    del given[name]
    with pytest.raises(ValueError, match=f"needs the condition '{name}'"):
        DiT(KINDS[kind])(x, t, **given)


@pytest.mark.parametrize("label", [-1, 11])
def test_refuses_labels_out_of_range(label: int) -> None:
    """Classes are 0 to 9 and the null label is 10; any other label raises."""
    x, t, _ = inputs(CLASSES)
    with pytest.raises(ValueError, match=f"label {label} is out of range"):
        DiT(CLASSES)(x, t, label=torch.tensor([0, label]))


@pytest.mark.parametrize("size", [(8, 10), (16, 8), (4, 4)])
def test_refuses_any_size_but_its_own(size: tuple[int, int]) -> None:
    """The position table fixes the image size; another one raises, and the error names both."""
    _, t, given = inputs(CLASSES)
    with pytest.raises(ValueError, match=f"built for 8x8, not {size[0]}x{size[1]}"):
        DiT(CLASSES)(torch.zeros(2, 3, *size), t, **given)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(patch_size=3), "an image of 8 pixels does not divide into patches of 3"),
        (dict(heads=5), "hidden=32 must divide by heads=5 and by 4"),
        (dict(hidden=30, heads=5), "hidden=30 must divide by heads=5 and by 4"),
    ],
)
def test_refuses_parameters_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    """Parameters that contradict each other raise before there is a network."""
    with pytest.raises(ValueError, match=message):
        DiTParams(**{**SMALL, **wrong})
