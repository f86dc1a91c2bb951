"""Half precision on a CPU that only emulates it: computed in float32, said once, and nothing of it outside of
a network's call."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusion import Condition
from models import CLIPTextParams
from models.layers import half
from models.layers.blocks import BlockNetwork
from models.layers.half import HALF_DTYPES, InFloat32, with_enough_precision
from models.layers.packed import PackedLinear
from models.networks.clip import CLIPText
from models.networks.t5 import T5, T5Params
from models.networks.taesd import TAESD, TAESDParams
from models.networks.vae import VAE, VAEParams
from tests.models.small import KINDS, randomised
from tests.models.test_packed import random_packed

TEXT = CLIPTextParams(vocab=50, length=9, width=32, layers=2, heads=4, projection=16)
SMALL_T5 = T5Params(vocab=50, width=32, layers=2, heads=2, head_dim=8, hidden=64)
SMALL_VAE = VAEParams(channels=8, channel_mult=(1, 2), blocks=1, groups=4)
TOKENS = torch.arange(14).view(2, 7) % 7


@pytest.fixture(params=HALF_DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """One that this CPU emulates, whichever it is."""
    for each in HALF_DTYPES:
        monkeypatch.setitem(half.NATIVE, each, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield request.param


MODULES: dict[str, tuple[type[nn.Module], Any]] = {
    name: (kind.network, kind.params) for name, kind in KINDS.items()
}
MODULES |= {
    "clip": (CLIPText, TEXT),
    "t5": (T5, SMALL_T5),
    "vae": (VAE, SMALL_VAE),
    "taesd": (TAESD, TAESDParams()),
}


def made(name: str) -> nn.Module:
    kind, params = MODULES[name]
    return randomised(kind(params))


def out_of(network: nn.Module) -> list[Tensor]:
    """What a network makes of inputs in its own dtype."""
    dtype = next(network.parameters()).dtype
    if isinstance(network, CLIPText):
        states = network(TOKENS)
        return [*states, network.pool(states[-1], TOKENS, eos=3)]
    if isinstance(network, T5):
        return [network(TOKENS)]
    if isinstance(network, VAE | TAESD):
        return [network(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16))]
    kind = next(kind for kind in KINDS.values() if kind.params == network.params)
    x, t, condition = kind.inputs()
    told = {name: value.to(dtype) if value.ndim > 1 else value for name, value in condition.tensors.items()}
    return [network(x.to(dtype), t, Condition(**told))]


NETWORKS = [
    "UNet, SDXL",
    "UNet, ADM",
    "UNet, LCM",
    "DiT, classes",
    "Flux, dev",
    "SD 3, 3.5 medium",
    "clip",
    "t5",
    "vae",
    "taesd",
]


@pytest.mark.parametrize("name", NETWORKS)
def test_is_closer_to_float32_than_what_is_emulated(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same weights; in the dtype that is returned elsewhere; and no weight is changed."""
    narrow = made(name).to(dtype)
    wide = copy.deepcopy(narrow).float()
    before = copy.deepcopy(narrow.state_dict())
    with torch.no_grad():
        exact, ours = out_of(wide), out_of(narrow)
        monkeypatch.setitem(half.NATIVE, dtype, True)
        emulated = out_of(narrow)
    for mine, theirs, expected in zip(ours, emulated, exact, strict=True):
        assert mine.dtype == theirs.dtype
        near, far = (
            (out.double() - expected.double()).norm() / expected.double().norm() for out in (mine, theirs)
        )
        assert near <= far
        assert near <= 2 * torch.finfo(dtype).eps
    assert all(
        torch.equal(value, before[key]) and value.dtype == before[key].dtype
        for key, value in narrow.state_dict().items()
    )


def test_gradients_and_checkpointing(dtype: torch.dtype) -> None:
    """Gradients are those of float32 to rounding, in the dtype of the weights, and the same where activations
    are computed again."""
    narrow = made("DiT, text").to(dtype)
    wide = copy.deepcopy(narrow).float()
    (out,), (exact,) = out_of(narrow), out_of(wide)
    assert isinstance(narrow, BlockNetwork)
    narrow.checkpointing = True
    (again,) = out_of(narrow)
    grads = [
        torch.autograd.grad(each.float().square().mean(), list(network.parameters()))
        for network, each in ((narrow, out), (narrow, again), (wide, exact))
    ]
    for mine, recomputed, expected in zip(*grads, strict=True):
        assert torch.equal(mine, recomputed)
        assert mine.dtype == dtype
        assert (mine.double() - expected.double()).norm() <= 4 * torch.finfo(
            dtype
        ).eps * expected.double().norm()


def test_packed_weights_are_not_rounded_on_the_way(dtype: torch.dtype) -> None:
    """They are unpacked in float32, in which the layer computes."""
    weight, bias = random_packed("Q8_0", 16, 32), nn.Parameter(torch.randn(16, dtype=dtype))
    layer, x = PackedLinear(weight, bias), torch.randn(3, 32)
    with InFloat32():
        assert torch.equal(layer(x), F.linear(x, weight.dense(), bias.float()))


def test_compiles_whole_or_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One graph without a break, around which the precision is entered or within which; the same result, and
    no second compilation."""
    monkeypatch.setitem(half.NATIVE, torch.bfloat16, False)
    torch._dynamo.reset()
    kind = KINDS["DiT, text"]
    network = randomised(kind.network(replace(kind.params, depth=1))).bfloat16()
    x, t, condition = kind.inputs()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        told = condition.to(dtype=torch.bfloat16)
        expected = network(x.bfloat16(), t, told)
        whole = torch.compile(network, fullgraph=True, backend="eager")
        assert torch.equal(whole(x.bfloat16(), t, told), expected)
        network.get_submodule("blocks.0").compile(fullgraph=True, backend="eager")
        assert all(torch.equal(network(x.bfloat16(), t, told), expected) for _ in range(2))


def test_nothing_of_it_stays(dtype: torch.dtype) -> None:
    """Neither after a call nor after one that was broken off; another thread computes as ever meanwhile."""
    layer, x = nn.Linear(4, 4, dtype=dtype), torch.ones(2, 4, dtype=dtype)
    seen: list[torch.dtype] = []

    class Watching(nn.Linear):
        @with_enough_precision
        def forward(self, x: Tensor) -> Tensor:
            seen.append(layer(x).dtype)
            thread = Thread(target=lambda: seen.append(layer(x).dtype))
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        Watching(4, 4, dtype=dtype)(x)
    seen.append(layer(x).dtype)
    assert seen == [torch.float32, dtype, dtype]


def test_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, for each dtype; nothing about float32, or where the processor has instructions."""
    monkeypatch.setitem(half.NATIVE, torch.bfloat16, False)
    monkeypatch.setitem(half.NATIVE, torch.float16, True)
    half._warn_emulated.cache_clear()
    network = made("DiT, text")
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.bfloat16):
            out_of(network.to(dtype))
    (warning,) = caught
    assert "no instructions for torch.bfloat16" in str(warning.message)
    assert "\n" not in str(warning.message)
