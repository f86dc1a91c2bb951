"""The benchmark of networks: what it counts, measures and writes. Nothing is asserted of the clock."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import nn
from torch._dynamo.utils import counters

from eval.bench import harness, networks
from eval.bench.networks import Params, flops
from eval.bench.pairs import PAIRS, pair_of
from models import UNetParams
from models.families import ARCHITECTURES, BACKBONES
from models.files.table import scatter
from models.layers import blocks
from tests.composing import composed
from tests.models.small import randomised, relative_error

UNET = UNetParams(
    channels=32,
    channel_mult=(1, 2),
    blocks=1,
    attention=(1, 0),
    heads=4,
    head_dim=None,
    context_dim=12,
    groups=8,
)
TINY = {name: each.tiny for name, each in ARCHITECTURES.items()}
SMALL = {
    "sd15": pair_of(UNET),
    "flux": pair_of(TINY["flux-dev"]),
    "sd3.5-medium": pair_of(TINY["sd3.5-medium"]),
}
SIZES = {
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
    "flux": 11_901_408_320,
    "sd3.5-medium": 2_243_171_520,
    "sd3.5-large": 8_056_627_520,
}


def settings(out: Path, **changes: Any) -> dict[str, Any]:
    """The experiment's own configuration on the CPU, with changes."""
    return {
        **composed("eval", "experiment=bench_networks"),
        "out": str(out),
        "progress": False,
        "device": "cpu",
        **changes,
    }


@pytest.mark.parametrize("name", PAIRS)
def test_both_sides_are_the_same_network(name: str) -> None:
    """Parameter for parameter: the same number of them, and of the published size."""
    import diffusers

    pair = PAIRS[name]
    kind, config = pair.theirs
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in n.parameters())
            for n in (pair.network(pair.params), getattr(diffusers, kind).from_config(config))
        ]
    assert sizes == [SIZES[name]] * 2


@pytest.mark.parametrize("name", SMALL)
def test_both_sides_are_asked_the_same(name: str) -> None:
    """With the same weights, the same output: what is given to ours means what is given to theirs."""
    import diffusers

    pair = SMALL[name]
    kind, config = pair.theirs
    ours, theirs = randomised(pair.network(pair.params)), getattr(diffusers, kind).from_config(config).eval()
    of = next(kind for kind in BACKBONES.values() if kind.network is type(ours))
    state = ours.state_dict()
    theirs.load_state_dict(scatter(of.diffusers(pair.params).table(state), state))
    inputs = pair.inputs(2, 16, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    told = inputs.condition.tensors
    for value in (inputs.x, told["context"], *([told["vector"]] if "vector" in told else [])):
        value.normal_(generator=generator)
    with torch.no_grad():
        expected = theirs(**pair.their_arguments(inputs), return_dict=False)[0]
        out = ours(inputs.x, inputs.t, inputs.condition)
    if expected.ndim == 3:  # tokens, as Flux's pipeline unpacks them
        expected = rearrange(expected, "b (h w) (c p q) -> b c (h p) (w q)", h=8, p=2, q=2)
    assert relative_error(out, expected) < 1e-5


@pytest.mark.parametrize(
    ("name", "layers", "blocks"),
    [
        ("flux", {"depth": 1, "depth_single": 2}, {"joint": 1, "single": 2}),
        ("sd3.5-large", {"depth": 2}, {"blocks": 2}),
    ],
)
def test_fewer_blocks_of_full_width(name: str, layers: dict[str, int], blocks: dict[str, int]) -> None:
    """The width stays, on both sides."""
    import diffusers

    pair = PAIRS[name].shortened(layers)
    with torch.device("meta"):
        ours, theirs = (
            pair.network(pair.params),
            getattr(diffusers, pair.theirs[0]).from_config(pair.theirs[1]),
        )
    assert {place: len(getattr(ours, place)) for place in blocks} == blocks
    assert pair.params.hidden == PAIRS[name].params.hidden
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_arithmetic_of_a_published_step() -> None:
    """A step of SD 1.5 at batch 2 is 1.6 TFLOP, and in proportion to the batch."""
    two = flops(Params(out=""))
    assert two == pytest.approx(1.61e12, rel=0.01)
    assert flops(Params(out="", batch=4)) == pytest.approx(2 * two, rel=1e-3)


@pytest.mark.bench
@pytest.mark.parametrize("name", SMALL)
def test_times_both_and_writes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row per dtype, with both times, their ratio and the memory."""
    monkeypatch.setitem(PAIRS, name, SMALL[name])
    monkeypatch.setattr(harness, "MATRIX", 64)
    timings = harness.run(settings(tmp_path, rounds=1, size=16, network=name))
    assert [t.dtype for t in timings] == ["fp32", "bf16"]
    for t in timings:
        assert t.ours > 0 < t.theirs
        assert t.speedup == pytest.approx(t.theirs / t.ours)
        assert t.share > 0
        assert all(math.isnan(m) or m >= 0 for m in (t.memory, t.their_memory))
    rows = (tmp_path / "bench.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["dtype", "---", "fp32", "bf16"]
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["settings"]["network"] == name
    assert written["facts"]["torch"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "sd14"}, "no network named 'sd14'; did you mean 'sd15'"),
        ({"dtypes": ["bf61"]}, "no dtype named 'bf61'; did you mean 'bf16'"),
        ({"layers": {"depth": 1}}, "layers shortens flux and sd3.5"),
        ({"network": "flux", "layers": {"deep": 1}}, "layers has no 'deep': depth"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"device": "tpu"}, "no device 'tpu' here"),
    ],
)
def test_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Before anything is measured, and nothing is written."""
    with pytest.raises(ValueError, match=message):
        harness.run(settings(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without diffusers there is nobody to compare with, and the error says how to get it."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(PAIRS, "sd15", SMALL["sd15"])
    with pytest.raises(ValueError, match=r"pip install 'plain-diffusion\[bench\]'"):
        harness.run(settings(tmp_path / "out"))


def test_compiling_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks are compiled at the first step, and stay so: a later step makes no graph, and checks nothing
    again."""
    torch._dynamo.reset()
    monkeypatch.setattr(blocks, "BACKEND", "eager")
    monkeypatch.setitem(PAIRS, "flux", SMALL["flux"])
    checked: list[nn.Module] = []
    monkeypatch.setattr(blocks, "check_compiles", checked.append)
    with (
        torch.no_grad(),
        networks._ours(
            Params(out="", network="flux", size=16, compile=True), torch.float32, torch.device("cpu")
        ) as step,
    ):
        step()
        made = counters["stats"]["unique_graphs"]
        step()
    assert made > 0
    assert counters["stats"]["unique_graphs"] == made
    assert len(checked) == 1
    torch._dynamo.reset()
