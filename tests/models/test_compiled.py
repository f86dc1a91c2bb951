"""Networks whose blocks are compiled: as many graphs as there are kinds of blocks, which serve every later
call."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from models import DiT, UNet, UNetParams
from models.layers import blocks, half
from models.layers.blocks import check_compiles, compiled
from models.layers.packed import pack
from models.layers.streaming import Prefetcher, Streamed
from tests.models.small import KINDS, UNET, Kind, randomised
from tests.models.test_packed import random_packed

LEVELS = Kind(UNet, UNetParams(**UNET, attention=(0, 0), middle_attention=1, context_dim=12), (8, 12))


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are made, and then run as they stand: what a compiler makes of them is torch's affair."""
    torch._dynamo.reset()
    monkeypatch.setattr(blocks, "BACKEND", "eager")
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [(KINDS["DiT, text"], 1), (KINDS["Flux, dev"], 2), (KINDS["Chroma"], 2), (LEVELS, 10)],
    ids=["DiT", "Flux", "Chroma", "UNet"],
)
def test_one_graph_for_each_kind_of_block(kind: Kind, kinds: int) -> None:
    """Without a break; none is made for other times, prompts, scales of guidance, batches and sizes. Results
    are the plain network's."""
    network = randomised(kind.fresh())
    check_compiles(network)  # which makes a graph of its own
    before, sizes = graphs(), [(8, 12), (8, 8), (6, 10)] if kind.network is not DiT else [kind.size] * 3
    with torch.no_grad():
        for batch, size in zip((2, 4, 3), sizes, strict=True):
            x, t, condition = replace(kind, size=size).inputs()
            given = (
                torch.cat([x, x])[:batch],
                torch.cat([t / batch, t])[:batch],
                condition[[0, 1, 1, 0][:batch]],
            )
            with compiled(network):
                out = network(*given)
            assert graphs() - before == kinds
            torch.testing.assert_close(out, network(*given))
    assert not torch._dynamo.utils.counters["graph_break"]


def test_packed_and_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights are unpacked within the graph, which computes in float32 where half precision is
    emulated: the same, bitwise."""
    monkeypatch.setitem(half.NATIVE, torch.bfloat16, False)
    kind = KINDS["DiT, text"]
    network = randomised(kind.fresh()).bfloat16()
    for i in range(2):
        pack(network, f"blocks.{i}.mlp.0", random_packed("fp8", 128, 32))
    x, t, condition = kind.inputs()
    given = (x.bfloat16(), t, condition.to(dtype=torch.bfloat16))
    check_compiles(network)
    before = graphs()
    with torch.no_grad(), compiled(network):
        outs = [network(*given) for _ in range(2)]
    assert graphs() - before == 1
    with torch.no_grad():
        assert all(torch.equal(out, network(*given)) for out in outs)


def test_what_cannot_be_compiled_is_refused() -> None:
    """In one line: a network that has no blocks, and one with streamed blocks."""
    with pytest.raises(ValueError, match="compile needs a BlockNetwork, which Linear is not"):
        check_compiles(nn.Linear(1, 1))
    network = KINDS["DiT, text"].fresh()
    block = network.get_submodule("blocks.0")
    network.set_submodule("blocks.0", Streamed(block, {}, Prefetcher(0), []))
    with pytest.raises(ValueError, match=r"load it without memory=\.\.\."):
        check_compiles(network)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be installed is said before anything is computed."""
    monkeypatch.setattr(blocks, "BACKEND", "inductor")
    from torch._inductor import config  # takes seconds

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(
        ValueError, match=r"no working compiler for cpu here \(.*\): install g\+\+ and Python's headers"
    ):
        check_compiles(KINDS["DiT, text"].fresh())
