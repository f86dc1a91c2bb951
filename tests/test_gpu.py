"""What must hold on a GPU too: the same images from the same seeds, and training in every precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import models
from configs import compose
from diffusion import Condition
from models.files.text import read_json_lines
from models.layers import streaming
from models.layers.packed import BLOCKS, PackedLinear
from samplers import SAMPLERS, generate, sample
from tests.models.test_packed import random_packed
from train.run import run

pytestmark = pytest.mark.gpu
SMALL = ("train.batch_size=64", "train.log_every=20", "train.save_every=20", "wandb=false", "progress=false")


def settings(experiment: str, folder: Path, *overrides: str) -> dict[str, Any]:
    return compose("train", [f"experiment={experiment}", f"run={folder}", *SMALL, *overrides])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("experiment", ["digits_unet", "digits_dit"])
def test_a_seed_gives_the_same_image_on_every_device(experiment: str, sampler: str, tmp_path: Path) -> None:
    """Noise is drawn on the CPU and keyed by seed and step, so that devices differ by rounding only."""
    assert run(settings(experiment, tmp_path, "train.steps=20", "device=cpu"))
    images = []
    for device in ("cpu", "cuda"):
        model = models.load(tmp_path)
        model.network.to(device).requires_grad_(False)
        label = torch.arange(4, device=device)
        images.append(
            sample(
                sampler,
                model.denoiser(),
                model.grid(4),
                shape=model.shape,
                seeds=range(4),
                condition=Condition(label=label),
                device=device,
            )
        )
    assert images[1].device.type == "cuda"
    torch.testing.assert_close(images[1].cpu(), images[0], rtol=0, atol=1e-2 * float(images[0].abs().max()))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.learns
def test_training_learns_in_every_precision(precision: str, tmp_path: Path) -> None:
    """The loss falls, resuming goes on, and weights stay float32."""
    for steps in (100, 200):
        assert run(
            settings(
                "digits_dit",
                tmp_path,
                f"train.precision={precision}",
                f"train.steps={steps}",
                "device=cuda",
                "resume=true",
            )
        )
    losses = [line["loss"] for line in read_json_lines(tmp_path / "metrics.jsonl")]
    assert len(losses) == 10
    assert losses[-1] < 0.8 * losses[0]
    assert {p.dtype for p in models.load(tmp_path).network.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["fp8", "fp8 of rows", *BLOCKS])
def test_packed_weights_are_the_same_on_a_gpu(kind: str) -> None:
    """Unpacked there to the last bit as on a CPU, and products in every precision near to those of the
    unpacked weight."""
    weight = random_packed(kind, 96, 512)
    layer = PackedLinear(weight).cuda()
    assert torch.equal(layer.dense().cpu(), weight.dense())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(5, 512, device="cuda", dtype=dtype)
        assert torch.equal(layer(x), torch.nn.functional.linear(x, weight.dense(dtype).cuda()))


@pytest.mark.parametrize("family", ["flux-dev", "sd3.5-medium"])
def test_streamed_networks_on_a_gpu(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that come and go through pinned memory give the same images, to the last bit, as those that
    stay: pass after pass."""
    monkeypatch.setattr(streaming, "resident_bytes", lambda: 0)
    models.save(models.miniature(family), tmp_path, "separate", dtype=torch.bfloat16)
    paths = [path for path in sorted(tmp_path.iterdir()) if "preview" not in path.name]
    with pytest.raises(ValueError, match="at least") as refused:
        models.load(*paths, memory=1)
    settings: dict[str, Any] = {"steps": 3, "seeds": [0, 1], "height": 64, "width": 64, "device": "cuda"}
    streamed, whole = models.load(*paths, memory=str(refused.value).split()[-1]), models.load(*paths)
    assert streaming.is_streamed(streamed.network)
    for _ in range(2):
        assert torch.equal(generate(streamed, "a corgi", **settings), generate(whole, "a corgi", **settings))
