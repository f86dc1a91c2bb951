"""CLIP's text tower: every state and the pooled output as transformers and open_clip compute them, and what
it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from models.networks.clip import CLIP_G, CLIP_H, CLIP_L, CLIPText, CLIPTextParams, quick_gelu
from models.text.clip_tokenizer import BOS, EOS
from tests.models.small import randomised, relative_error
from tests.models.text_peers import in_open_clip, in_transformers

TINY = CLIPTextParams(width=32, layers=3, heads=4)
ADDED = 49408  # the first token behind the vocabulary, as textual inversion adds them
BOUND = 1e-5


@cache
def tower(params: CLIPTextParams) -> CLIPText:
    """A tower with random weights, drawn once: those of a published width take seconds."""
    with torch.device("meta"):
        network = CLIPText(params)
    return cast(CLIPText, randomised(network.to_empty(device="cpu")))


@pytest.fixture(scope="module", autouse=True)
def _forget_towers() -> Iterator[None]:
    """They would keep a gigabyte for the tests of other files."""
    yield
    tower.cache_clear()


def rows(pad: int, *lengths: int, added: bool = False) -> Tensor:
    """BOS, random tokens, EOS, padding, 77 in all; on request an added token among them."""
    generator = torch.Generator().manual_seed(len(lengths))
    tokens = torch.full((len(lengths), 77), pad)
    for row, length in zip(tokens, lengths, strict=True):
        words = torch.randint(0, BOS, (length,), generator=generator)
        if added:
            words[length // 2] = ADDED
        row[: length + 2] = torch.tensor([BOS, *words.tolist(), EOS])
    return tokens


def transformers_errors(ours: CLIPText, tokens: Tensor, eos_token_id: int = EOS) -> dict[str, float]:
    """Relative error of every state, the normed last one, and the pooled output."""
    with torch.no_grad():
        out = in_transformers(ours, eos_token_id)(tokens, output_hidden_states=True)
        states = ours(tokens)
        assert len(states) == len(out.hidden_states) == ours.params.layers + 1
        pairs = {str(i): pair for i, pair in enumerate(zip(states, out.hidden_states, strict=True))}
        pairs["last"] = (ours.norm(states[-1]), out.last_hidden_state)
        pairs["pooled"] = (
            ours.pool(states[-1], tokens),
            out.pooler_output if ours.projection is None else out.text_embeds,
        )
    assert all(a.shape == b.shape for a, b in pairs.values())
    return {name: relative_error(*pair) for name, pair in pairs.items()}


# Published towers at their width; those of OpenCLIP with a few of their 24 and 32 blocks.
TOWERS = {
    "L": CLIP_L,
    "L with projection": replace(CLIP_L, layers=2, projection=768),
    "H": replace(CLIP_H, layers=2),
    "bigG": replace(CLIP_G, layers=2),
}


@pytest.mark.parametrize("params", TOWERS.values(), ids=TOWERS)
def test_states_and_pooled_output_equal_transformers(params: CLIPTextParams) -> None:
    """Every state, the normed last one and the pooled output; empty, short and full prompts, padded as
    published."""
    pad = EOS if params.activation == "quick_gelu" else 0
    errors = transformers_errors(
        tower(params), rows(pad, 0, 9, 75), eos_token_id=2 if params is CLIP_L else EOS
    )
    assert max(errors.values()) <= BOUND, errors


@pytest.mark.parametrize("name", ["L with projection", "H", "bigG"])
def test_states_and_pooled_output_equal_open_clip(name: str) -> None:
    """Every state, the last one without and with the final norm, and the projected pooled output."""
    ours, tokens = tower(TOWERS[name]), rows(0, 0, 9, 75)
    peer = in_open_clip(ours)
    with torch.no_grad():
        out = peer.forward_intermediates(tokens, output_fmt="NLC")
        states = ours(tokens)
        pairs = list(zip(states[1:], out["text_intermediates"], strict=True))
        penultimate = peer.forward_intermediates(
            tokens, indices=[ours.params.layers - 2], normalize_intermediates=True, output_fmt="NLC"
        )
        pairs.append((ours.norm(states[-2]), penultimate["text_intermediates"][0]))
        pairs.append((ours.pool(states[-1], tokens), peer(tokens)))
    assert max(relative_error(*pair) for pair in pairs) <= BOUND


@pytest.mark.parametrize("pad", [EOS, 0])
def test_pools_at_the_end_of_text_beside_an_added_token(pad: int) -> None:
    """A token behind the vocabulary has a greater id than EOS; the pooled output still comes from the first
    EOS, as in transformers."""
    ours, tokens = tower(replace(TINY, vocab=49409, projection=16)), rows(pad, 4, 9, 75, added=True)
    assert max(transformers_errors(ours, tokens).values()) <= BOUND
    # Peers that pool at the greatest id take the added token for the end of text.
    assert transformers_errors(ours, tokens, eos_token_id=2)["pooled"] > 0.1
    with torch.no_grad():
        assert relative_error(ours.pool(ours(tokens)[-1], tokens), in_open_clip(ours)(tokens)) > 0.1


def test_padding_does_not_reach_the_pooled_output() -> None:
    """The end of text is the first EOS: neither what pads behind it nor how much changes the pooled
    output."""
    ours = tower(TINY)
    with torch.no_grad():
        expected = None
        for tokens in (rows(EOS, 9, 3), rows(0, 9, 3), rows(5, 9, 3), rows(0, 9, 3)[:, :12]):
            pooled = ours.pool(ours(tokens)[-1], tokens)
            expected = pooled if expected is None else expected
            torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)


def test_a_token_sees_what_came_before_it() -> None:
    """Changing token 5 leaves the states of tokens 0 to 4 as they are, and changes that of each later one."""
    ours, tokens = tower(TINY), rows(0, 9)
    other = tokens.clone()
    other[0, 5] += 1
    with torch.no_grad():
        change = (ours(tokens)[-1] - ours(other)[-1]).abs().amax(dim=-1)[0]
    assert change[:5].max() <= 1e-6 < 1e-3 <= change[5:].min()


def test_quick_gelu_is_the_logistic_approximation() -> None:
    """x / (1 + exp(-1.702 x)), which is GELU to 0.021 and no closer."""
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    torch.testing.assert_close(quick_gelu(x), x / (1 + (-1.702 * x).exp()), rtol=1e-12, atol=1e-15)
    assert 0.02 < (quick_gelu(x) - torch.nn.functional.gelu(x)).abs().max() < 0.021


@pytest.mark.parametrize(
    ("params", "count"), [(CLIP_L, 123_060_480), (CLIP_H, 354_032_640), (CLIP_G, 694_659_840)]
)
def test_parameter_count_of_published_towers(params: CLIPTextParams, count: int) -> None:
    """The published files have so many numbers."""
    with torch.device("meta"):
        network = CLIPText(params)
    assert sum(p.numel() for p in network.parameters()) == count


def test_fresh_tower_is_as_wide_as_clip_starts() -> None:
    """Weights are normal with the deviations of CLIP's own initialisation, biases zero."""
    torch.manual_seed(0)
    network = CLIPText(replace(CLIP_L, layers=2, projection=64))
    stds = {
        "token.weight": 0.02,
        "position": 0.01,
        "blocks.0.attention.qkv.weight": 768**-0.5,
        "blocks.0.attention.out.weight": 768**-0.5 / 2,
        "blocks.1.fc1.weight": (2 * 768) ** -0.5,
        "blocks.1.fc2.weight": 768**-0.5 / 2,
        "projection.weight": 768**-0.5,
    }
    state = network.state_dict()
    assert {name: float(state[name].std()) for name in stds} == pytest.approx(stds, rel=0.02)
    assert not any(bias.any() for name, bias in network.named_parameters() if name.endswith("bias"))


def test_gradient_reaches_every_parameter() -> None:
    """No parameter is without influence on states and pooled output."""
    ours, tokens = tower(replace(TINY, vocab=49408, length=77, projection=8)), rows(0, 9, 75)
    ours.pool(ours(tokens)[-1], tokens).square().sum().backward()
    assert [name for name, p in ours.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(heads=5), "width=32 must divide by heads=5"),
        (dict(layers=0), "layers must be at least 1, not 0"),
        (dict(projection=0), "projection must be at least 1, not 0"),
        (dict(activation="gelu_new"), "no activation named 'gelu_new'; did you mean 'gelu'"),
    ],
)
def test_refuses_parameters_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    """Parameters that contradict each other raise before there is a tower."""
    with pytest.raises(ValueError, match=message):
        replace(TINY, **wrong)


def test_refuses_tokens_it_cannot_read() -> None:
    """More tokens than positions raise, and so does pooling where no text ends."""
    ours = tower(TINY)
    with pytest.raises(ValueError, match=r"L up to 77, not \(1, 78\): cut them"):
        ours(torch.zeros(1, 78, dtype=torch.long))
    tokens = rows(0, 9, 9)
    tokens[1, 10] = 0
    with pytest.raises(ValueError, match="no end of text"):
        ours.pool(ours(tokens)[-1], tokens)
