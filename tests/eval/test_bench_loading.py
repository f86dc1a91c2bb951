"""The benchmark of loading: what it makes, measures and writes. Nothing is asserted of the clock."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from eval.bench import harness, loading
from tests.composing import composed


def settings(out: Path, **changes: Any) -> dict[str, Any]:
    """The experiment's own configuration, of a miniature, with changes."""
    config = composed("eval", "experiment=bench_loading")
    return {
        **config,
        "out": str(out),
        "progress": False,
        "miniature": True,
        "rounds": 1,
        "folder": str(out.parent),
        **changes,
    }


def test_times_both_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row per dtype, with both times, their ratio and the memory; the file itself is gone again.

    Our first load has a process of its own as every one does outside this test; of the others each would
    import diffusers anew.
    """
    alone = harness.process
    calls: list[tuple[str, ...]] = []

    def process(module: str, side: str, *arguments: str) -> str:
        calls.append((side, *arguments[2:]))
        if side == "ours" and sum(call[0] == "ours" for call in calls) == 1:
            return alone(module, side, *arguments)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            loading.SIDES[side](*arguments)
        return said.getvalue()

    monkeypatch.setattr(loading, "process", process)
    timings = harness.run(settings(tmp_path / "out", family="sd1"))
    assert [t.dtype for t in timings] == ["default", "fp16"]
    for t in timings:
        assert 0 < t.ours < t.touched
        assert 0 < t.theirs < t.theirs_touched
        assert t.speedup == pytest.approx(t.theirs / t.ours)
        assert t.speedup_touched == pytest.approx(t.theirs_touched / t.touched)
        assert all(math.isnan(m) or m > 0 for m in (t.memory, t.theirs_memory))
    rows = (tmp_path / "out" / "bench.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == ["dtype", "---", "default", "fp16"]
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert written["settings"]["family"] == "sd1"
    assert written["bytes"] > 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert calls == [
        ("make", "fp16", "True"),
        *((side, dtype) for dtype in ("default", "fp16") for side in ("ours", "theirs")),
    ]


def test_both_sides_hold_the_same(tmp_path: Path) -> None:
    """Value for value, of the file that is timed."""
    from diffusers import StableDiffusionPipeline

    loading.make(str(tmp_path), "sd1", "fp16", "True")
    ours = models.load(tmp_path / "model.safetensors")
    theirs = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(tmp_path / "configs")
    )
    pairs = (
        (ours.network, theirs.unet),
        (ours.require("vae"), theirs.vae),
        (ours.require("text"), theirs.text_encoder),
    )
    for sides in pairs:
        values = [
            torch.cat([p.detach().double().flatten() for p in side.parameters()]).sort()[0] for side in sides
        ]
        assert torch.equal(*values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "sdlx"}, "no family with a pipeline of diffusers' named 'sdlx'; did you mean 'sdxl'"),
        ({"dtypes": ["bf61"]}, "no dtype named 'bf61'; did you mean 'bf16'"),
        ({"stored": "default"}, "no dtype named 'default'"),
        ({"rounds": 0}, "rounds must be at least 1"),
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
    with pytest.raises(ValueError, match=r"pip install 'plain-diffusion\[bench\]'"):
        harness.run(settings(tmp_path / "out"))
