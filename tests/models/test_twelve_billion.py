"""FLUX.1 [dev] with T5-XXL, at the published size, in six gigabytes. `make test-slow`: two minutes on two
cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from models.families import flux, vae_keys
from models.files.table import Layout, scatter
from models.presets import published
from models.text import clip, t5
from models.text.t5_tokenizer import T5Tokenizer
from train.data.rows import write_header

PROGRAM = """
import sys, models, samplers
from eval.bench.harness import peak_resident
from models.layers.streaming import resident_bytes
before = resident_bytes()
def draw():
    model = models.load(*sys.argv[1:], memory="6GB")
    return samplers.generate(model, "a corgi", steps=1, height=128, width=128)
peak = peak_resident(draw)
print(before + peak)
"""


def write_zeros(path: Path, network: nn.Module, layout: Layout) -> None:
    """A file of zeros in bfloat16 with the network's published keys and shapes, of which the disk keeps the
    header only."""
    state = {name: value.bfloat16() for name, value in network.state_dict().items()}
    with path.open("wb") as file:
        write_header(file, scatter(layout.table(state), state), {})


@pytest.mark.slow
def test_the_whole_model_in_six_gigabytes(tmp_path: Path) -> None:
    """34 GB of weights: from loading to the image the process never has more than 6 GB in memory."""
    model = published("flux-dev")
    towers = model.require("text").towers
    parts = {
        "flux1-dev": (model.network, flux.bfl()),
        "t5xxl": (towers["t5"], t5.transformers()),
        "clip_l": (towers["clip_l"], clip.transformers()),
        "ae": (model.require("vae"), vae_keys.ldm(model.require("vae").params)),
    }
    for name, (network, layout) in parts.items():
        write_zeros(tmp_path / f"{name}.safetensors", network, layout)
    (tmp_path / "tokenizer.json").write_text(T5Tokenizer.of_ascii().to_json())
    paths = sorted(map(str, tmp_path.iterdir()))
    assert sum(Path(path).stat().st_size for path in paths) > 33e9
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *paths],
        cwd=root,
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout) < 6e9
