"""T5's encoder: its states as transformers computes them, its buckets for every distance, and weights that
float16 cannot carry."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from models import T5, T5Params
from models.layers.packed import Packed, pack
from models.networks.t5 import T5_XXL, buckets
from tests.models.small import randomised, relative_error
from tests.models.text_peers import t5_in_transformers
from tests.peers import transformers

TINY = T5Params(vocab=100, width=32, layers=3, heads=3, head_dim=8, hidden=48)


def tower(params: T5Params) -> T5:
    with torch.device("meta"):
        network = T5(params)
    return cast(T5, randomised(network.to_empty(device="cpu")))


def tokens(length: int, vocab: int = 100) -> Tensor:
    """Two texts; the second is shorter, an end and padding behind it."""
    ids = torch.randint(2, vocab, (2, length), generator=torch.Generator().manual_seed(length))
    end = length // 2
    ids[1, end:] = torch.tensor([1, *[0] * (length - end - 1)])
    return ids


def error(ours: T5, ids: Tensor) -> float:
    with torch.no_grad():
        return relative_error(ours(ids), t5_in_transformers(ours)(ids).last_hidden_state)


@pytest.mark.parametrize("length", [1, 2, 3, 17, 77, 256, 512])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_states_equal_transformers(
    length: int, dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short and long texts, padding attended to like any token; heads together narrower than the width, as in
    some published sizes.

    In float64 transformers still takes its norms' mean squares in float32, 1e-7 off: there its norms are
    given them in float64.
    """

    def exact(norm: Any, x: Tensor) -> Tensor:
        return norm.weight * (x / (x.square().mean(dim=-1, keepdim=True) + norm.variance_epsilon).sqrt())

    if dtype == torch.float64:
        monkeypatch.setattr(transformers.models.t5.modeling_t5.T5LayerNorm, "forward", exact)
    ours = tower(TINY)
    torch.nn.init.normal_(ours.relative.weight, std=2.0)  # so that a wrong bucket cannot be missed
    assert error(ours.to(dtype), tokens(length)) <= bound


@pytest.mark.parametrize("layers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_states_equal_transformers_at_published_width(layers: int) -> None:
    """XXL's width with fewer of its 24 blocks and of its tokens."""
    assert error(tower(replace(T5_XXL, vocab=100, layers=layers)), tokens(77 if layers == 1 else 512)) <= 1e-5


def test_buckets_equal_transformers() -> None:
    """For every distance, with the published numbers and others."""
    distance = torch.arange(-3000, 3001)
    for count, furthest in [(32, 128), (8, 20), (64, 512), (16, 128), (4, 2)]:
        peer = transformers.models.t5.modeling_t5.T5Attention
        theirs = peer._relative_position_bucket(distance, num_buckets=count, max_distance=furthest)
        assert torch.equal(buckets(distance, count, furthest), theirs)


def test_buckets_follow_the_paper() -> None:
    """One for each distance up to 8, then the next at 8 sqrt(2)^i, 128 and beyond in one; the other half for
    the other direction."""
    distance = torch.arange(1, 1000)
    expected = [
        d if d < 8 else min(15, 8 + math.floor(2 * math.log2(d / 8) + 1e-9)) for d in distance.tolist()
    ]
    assert buckets(-distance, 32, 128).tolist() == expected
    assert buckets(distance, 32, 128).tolist() == [16 + bucket for bucket in expected]
    assert buckets(torch.tensor([0]), 32, 128).tolist() == [0]


def heavy() -> T5:
    """Weights that both half types hold exactly, and whose MLPs give 1e5 and more, beyond float16's 65504."""
    ours = tower(replace(TINY, layers=4))
    with torch.no_grad():
        for block in ours.blocks:
            for part, scale in (("gate", 16), ("fc1", 16), ("fc2", 1000)):
                getattr(block, part).weight.mul_(scale)
        for p in ours.parameters():
            p.copy_(p.bfloat16().half())
    return ours


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_carries_states_beyond_float16(dtype: torch.dtype) -> None:
    """Results stay within eight roundings of float32's largest value.

    transformers with everything in float16 cuts such states at 65504, and is off by half.
    """
    ours, ids = heavy(), tokens(40)
    states: list[Tensor] = []
    ours.blocks[0].register_forward_hook(lambda module, args, out: states.append(out))
    with torch.no_grad():
        expected = ours(ids)
        assert states[0].abs().max() > 1e5
        cut = t5_in_transformers(heavy()).half()(ids).last_hidden_state
        assert relative_error(cut.float(), expected) > 0.5
        out = ours.to(dtype)(ids)
    assert out.dtype == dtype
    assert relative_error(out.float(), expected) <= 8 * torch.finfo(dtype).eps


def test_packed_weights_carry_them_too() -> None:
    """In float16, with every product's weight packed: as near to float32's results with the same weights."""
    ours, plain, ids = heavy(), heavy(), tokens(40)
    for name, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear):
            scale = layer.weight.detach().abs().amax(dim=1, keepdim=True) / 448  # the greatest float8 is 448
            held = Packed("fp8", (layer.weight.detach() / scale).to(torch.float8_e4m3fn), scale)
            layer.weight.data = held.dense(torch.float32)
            pack(ours, name, held)
    with torch.no_grad():
        expected = plain(ids)
        assert relative_error(ours(ids), expected) <= 1e-5
        assert relative_error(ours.half()(ids).float(), expected) <= 8 * torch.finfo(torch.float16).eps


def test_compiles_as_one_graph() -> None:
    """And again for another length, with the same results."""
    ours = tower(TINY)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.no_grad():
        for length in (5, 12):
            torch.testing.assert_close(compiled(tokens(length)), ours(tokens(length)), rtol=1e-5, atol=1e-6)


def test_parameter_count_of_the_published_encoder() -> None:
    """The published files of XXL have so many numbers, under 219 names."""
    with torch.device("meta"):
        network = T5(T5_XXL)
    assert sum(p.numel() for p in network.parameters()) == 4_762_310_656
    assert len(network.state_dict()) == 219


def test_fresh_encoder_is_as_wide_as_t5_starts() -> None:
    """Weights are normal with the deviations of T5's own initialisation, norms are one."""
    torch.manual_seed(0)
    network = T5(T5Params(vocab=2000, width=256, layers=1, heads=8, head_dim=32, hidden=512))
    stds = {
        "token.weight": 1.0,
        "relative.weight": 256**-0.5,
        "blocks.0.attention.q.weight": (256 * 32) ** -0.5,
        "blocks.0.attention.k.weight": 256**-0.5,
        "blocks.0.attention.out.weight": 256**-0.5,
        "blocks.0.gate.weight": 256**-0.5,
        "blocks.0.fc2.weight": 512**-0.5,
    }
    state = network.state_dict()
    assert {name: float(state[name].std()) for name in stds} == pytest.approx(stds, rel=0.1)
    assert all((value == 1).all() for name, value in state.items() if "norm" in name)


def test_gradient_reaches_every_parameter() -> None:
    """No parameter is without influence; of the buckets those that occur."""
    ours = tower(TINY)
    ours(tokens(300)).square().sum().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert ours.relative.weight.grad is not None
    # Bucket 16 would be a key no distance behind its query.
    assert ours.relative.weight.grad.any(dim=1).nonzero().flatten().tolist() == [
        i for i in range(32) if i != 16
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(layers=0), "layers must be at least 1, not 0"),
        (dict(buckets=30), "buckets=30 must divide by 4"),
        (dict(buckets=0), "buckets=0 must divide by 4"),
        (dict(max_distance=8), "max_distance=8 must be more than buckets / 4 = 8"),
    ],
)
def test_refuses_parameters_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    """Parameters that contradict each other raise before there is an encoder."""
    with pytest.raises(ValueError, match=message):
        replace(TINY, **wrong)


def test_refuses_tokens_without_a_batch() -> None:
    """A single row has to be a batch of one."""
    with pytest.raises(ValueError, match=r"tokens are \(B, L\), not \(5,\)"):
        tower(TINY)(torch.zeros(5, dtype=torch.long))
