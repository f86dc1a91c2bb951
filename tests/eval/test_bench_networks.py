"""The benchmark of networks: what it counts, measures and writes. Nothing is asserted of the clock."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import configs
from eval import bench_networks
from eval.bench_networks import PAIRS, BenchParams, Pair, flops
from models import UNet, UNetParams

SMALL = Pair(
    UNetParams(channels=32, channel_mult=(1, 2), blocks=1, attention=(1, 0), heads=4, head_dim=None, context_dim=12, groups=8),
    {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
    },
)


def settings(out: Path, **changes: Any) -> dict[str, Any]:
    """The experiment's own configuration on the CPU, with changes."""
    overrides = ["experiment=bench_networks"]
    return {**configs.compose("eval", overrides), "out": str(out), "progress": False, "device": "cpu", **changes}


@pytest.mark.parametrize("name", PAIRS)
def test_both_sides_are_the_same_network(name: str) -> None:
    """Parameter for parameter: the same number of them, and of the published size."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        sizes = [sum(p.numel() for p in n.parameters()) for n in (UNet(PAIRS[name].ours), UNet2DConditionModel(**PAIRS[name].theirs))]
    assert sizes == [{"sd15": 859_520_964, "sdxl": 2_567_463_684}[name]] * 2


def test_arithmetic_of_a_published_step() -> None:
    """A step of SD 1.5 at batch 2 is 1.6 TFLOP, and in proportion to the batch."""
    two = flops(BenchParams(out=""))
    assert two == pytest.approx(1.61e12, rel=0.01)
    assert flops(BenchParams(out="", batch=4)) == pytest.approx(2 * two, rel=1e-3)


def test_times_both_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row per dtype, with both times, their ratio and the memory."""
    monkeypatch.setitem(PAIRS, "sd15", SMALL)
    timings = bench_networks.run(settings(tmp_path, rounds=1, size=16))
    assert [t.dtype for t in timings] == ["fp32", "bf16"]
    for t in timings:
        assert t.ours > 0 < t.theirs
        assert t.speedup == pytest.approx(t.theirs / t.ours)
        assert t.share > 0
        assert all(math.isnan(m) or m >= 0 for m in (t.memory, t.their_memory))
    rows = (tmp_path / "bench.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["dtype", "---", "fp32", "bf16"]
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["settings"]["network"] == "sd15"
    assert written["facts"]["torch"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "sd14"}, "no network named 'sd14'; did you mean 'sd15'"),
        ({"dtypes": ["bf61"]}, "no dtype named 'bf61'; did you mean 'bf16'"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"device": "tpu"}, "no device 'tpu' here"),
    ],
)
def test_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Before anything is measured, and nothing is written."""
    with pytest.raises(ValueError, match=message):
        bench_networks.run(settings(tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without diffusers there is nobody to compare with, and the error says how to get it."""
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(PAIRS, "sd15", SMALL)
    with pytest.raises(ValueError, match="not installed: pip install diffusers"):
        bench_networks.run(settings(tmp_path / "out"))
