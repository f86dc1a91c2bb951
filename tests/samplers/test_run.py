"""Sampling a saved model: what is chosen where nothing is said, and where the pictures go."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import models
from configs import compose_sweep
from diffusion import (
    APG,
    ClassifierFreeGuidance,
    Clipped,
    Condition,
    DenoiserLike,
    Rule,
    Scale,
    Thresholded,
    V,
    ZeroInit,
    build_prediction,
    extrapolate,
    interval,
    rescaled,
    zero_star,
)
from models.files.text import read_json
from samplers import sample
from samplers.pictures import tile, to_uint8
from samplers.run import run
from tests.composing import composed

NETWORK = {
    "name": "dit",
    "in_channels": 1,
    "image_size": 8,
    "hidden": 16,
    "depth": 1,
    "heads": 2,
    "num_classes": 10,
}
FLOW: dict[str, Any] = {
    "network": NETWORK,
    "schedule": {"name": "flow"},
    "prediction": "flow",
    "shape": [1, 8, 8],
}


def saved(path: Path, **parts: Any) -> Path:
    model = models.build({**FLOW, **parts})
    for p in model.network.parameters():
        nn.init.normal_(p, std=0.1)
    models.save(model, path)
    return path


def settings(path: Path, *overrides: str) -> dict[str, Any]:
    return composed("samplers", "n=3", "progress=false", "device=cpu", *overrides, run=str(path))


@pytest.mark.parametrize(
    ("parts", "sampler", "steps"),
    [({}, "ddim", 50), ({"consistency": {"name": "cm", "ratio_min": 0.002}}, "consistency", 2)],
)
def test_a_model_is_sampled_as_it_is_meant_to_be(
    parts: dict[str, Any], sampler: str, steps: int, tmp_path: Path
) -> None:
    """A distilled model takes two consistency steps, others fifty of DDIM; what was chosen stands in the
    images' settings."""
    out = run(settings(saved(tmp_path / "model.safetensors", **parts)))
    assert out == tmp_path / "samples" / f"{sampler}-{steps}"
    assert sorted(path.relative_to(out) for path in out.rglob("0*.png")) == [
        Path(f"images/{k}/{k:06d}.png") for k in range(3)
    ]
    kept = read_json(out / "samples.json")["settings"]
    assert (kept["sampler"], kept["steps"]) == (sampler, steps)


@pytest.mark.parametrize("guidance", [0, -1])
def test_guidance_that_does_not_follow_the_label_is_warned_of(guidance: float, tmp_path: Path) -> None:
    """As `generate` warns for prompts: 0 leaves the label out, and below it leads away from it."""
    path = saved(tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match=f"guidance scale {guidance} does not follow the label: 1 is off"):
        run(settings(path, "steps=1", f"guidance={guidance}"))


def test_what_is_drawn_is_saved_before_the_rest_is(tmp_path: Path) -> None:
    """Where the second batch fails, the first one's images are there."""
    calls = 0

    def sampled(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise FloatingPointError("samples are not finite")
        return torch.zeros(len(kwargs["seeds"]), 1, 8, 8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("samplers.run.sample", sampled)
        with pytest.raises(FloatingPointError, match="samples are not finite"):
            run(settings(saved(tmp_path / "model.safetensors"), "batch_size=2"))
    assert len(list((tmp_path / "samples").rglob("0*.png"))) == 2


def test_a_list_of_times_may_be_the_model_s_own_grid(tmp_path: Path) -> None:
    """It has its own number of steps, which is then that of sampling too."""
    out = run(settings(saved(tmp_path / "model.safetensors", grid={"spacing": [0.9, 0.5, 0.2]})))
    assert out == tmp_path / "samples" / "ddim-3"


def test_the_model_s_grid_is_used_unless_another_spacing_is_named(tmp_path: Path) -> None:
    """Images on the model's own grid are those of the same spacing by name, and others than the default
    spacing gives."""
    own, plain = (
        saved(tmp_path / "own.safetensors", grid={"spacing": "log_snr", "t_start": 0.9, "t_end": 0.1}),
        tmp_path / "plain.safetensors",
    )
    model = models.load(own)
    model.spec["grid"] = {}
    models.save(model, plain)
    images = []
    for i, (path, spacing) in enumerate(
        [
            (own, "grid.spacing=null"),
            (own, "grid.spacing=linspace"),
            (plain, "grid.spacing=linspace"),
            (plain, "grid.spacing=null"),
        ]
    ):
        out = run(settings(path, "steps=3", f"out={tmp_path / str(i)}", spacing))
        with Image.open(out / "images" / "0" / "000000.png") as image:
            images.append(image.tobytes())
    assert images[0] != images[1] == images[2] == images[3]


def test_tiles_lie_row_by_row() -> None:
    """Each image at its place, `fill` between them and where they run out, none around them."""
    images = torch.arange(5.0)[:, None, None, None].expand(5, 2, 2, 3) / 10
    sheet = tile(images, columns=2, gap=2, fill=-1)
    assert sheet.shape == (2, 3 * 2 + 2 * 2, 2 * 3 + 2)
    for i in range(5):
        top, left = i // 2 * 4, i % 2 * 5
        assert (sheet[:, top : top + 2, left : left + 3] == i / 10).all()
    assert int((sheet == -1).sum()) == sheet.numel() - images.numel()
    assert tile(images, columns=9).shape == (2, 2, 5 * 3 + 4)
    assert tile(images, columns=2, gap=0).shape == (2, 6, 6)
    with pytest.raises(ValueError, match="at least one column"):
        tile(images[:0], 2)


def test_runs_of_a_sweep_without_out_have_a_folder_each(tmp_path: Path) -> None:
    """Whatever setting they differ in, by a name that says it; what is usual is not said."""
    path = saved(tmp_path / "model.safetensors")
    axes = [
        "clip=true,false",
        "ema=true,false",
        "sampler=ddim,euler_ancestral",
        "grid.spacing=null,trailing",
        "grid.shift=null,2",
    ]
    wanted = {key: value for key, value in settings(path).items() if key not in ("n", "steps")}
    for axis in axes:
        runs = compose_sweep(
            "samplers", [f"run={path}", "n=1", "steps=2", "progress=false", "device=cpu", axis]
        )
        assert len({run(config) for _, config in runs}) == 2, axis
    names = {folder.name for folder in (tmp_path / "samples").iterdir()}
    assert names >= {
        "ddim-2",
        "ddim-2-clip-false",
        "ddim-2-ema-false",
        "euler_ancestral-2",
        "ddim-2-spacing-trailing",
        "ddim-2-shift-2",
    }
    for eta in (0.3, 0.6):
        assert (
            run({**wanted, "n": 1, "steps": 2, "sampler": "ddim", "options": {"eta": eta}}).name
            == f"ddim-2-eta-{eta}"
        )
    times = [1 - i / 60 for i in range(60)]
    assert len(run({**wanted, "n": 1, "grid": {"spacing": times}}).name) < 200


def test_images_are_those_of_their_seeds_and_labels(tmp_path: Path) -> None:
    """Batches, classes in turn, guidance and clipping: each file is what `sample` alone makes of that seed
    and label, rounded to 8 bits."""
    model = models.load(saved(tmp_path / "model.safetensors"))
    out = run(
        settings(
            tmp_path / "model.safetensors",
            "n=5",
            "batch_size=2",
            "labels=[7,3]",
            "seed=4",
            "steps=2",
            "guidance=2",
        )
    )
    assert out.name == "ddim-2-guidance-2"
    for i, label in enumerate((7, 3, 7, 3, 7)):
        denoiser = Clipped(ClassifierFreeGuidance(model.denoiser(), 2, model.null))
        x = sample(
            "ddim",
            denoiser,
            model.grid(2),
            shape=model.shape,
            seeds=[4 + i],
            condition=Condition(label=torch.tensor([label])),
        )
        exact = (x[0, 0].clamp(-1, 1) + 1) * 127.5
        with Image.open(out / "images" / str(label) / f"{4 + i:06d}.png") as image:
            assert np.abs(np.asarray(image) - exact.numpy()).max() <= 0.501
    plain = run(
        settings(
            tmp_path / "model.safetensors", "steps=2", "guidance=2", "clip=false", f"out={tmp_path / 'plain'}"
        )
    )
    clipped = run(
        settings(tmp_path / "model.safetensors", "steps=2", "guidance=2", f"out={tmp_path / 'clipped'}")
    )
    first = Path("images/0/000000.png")
    assert Image.open(plain / first).tobytes() != Image.open(clipped / first).tobytes()


def cfg(model: models.Model, scale: Scale = 3.0, rule: Rule = extrapolate) -> DenoiserLike:
    return ClassifierFreeGuidance(model.denoiser(), scale, model.null, rule=rule)


# what the command line gives, the denoiser by hand, and what the folder is called beside sampler, steps and
# scale
GUIDES: dict[str, tuple[list[str], Callable[[models.Model], DenoiserLike], str]] = {
    "interval": (
        ["guide.interval=[0.2,0.8]"],
        lambda m: Clipped(cfg(m, interval(3.0, 0.2, 0.8))),
        "interval-0.2-0.8",
    ),
    "rescaled": (
        ["guide.rule={name: rescaled, phi: 0.5}"],
        lambda m: Clipped(cfg(m, rule=rescaled(0.5, space=build_prediction("flow")))),
        "rule-rescaled-phi-0.5",
    ),
    "rescaled in v": (
        ["guide.rule={name: rescaled, space: v, rule: {name: zero_star}}"],
        lambda m: Clipped(cfg(m, rule=rescaled(rule=zero_star, space=V))),
        "rule-rescaled-space-v-rule-zero_star",
    ),
    "apg": (
        ["+guide.rule.name=apg", "+guide.rule.norm_limit=2", "+guide.rule.momentum=-0.5"],
        lambda m: Clipped(cfg(m, rule=APG(norm_limit=2, momentum=-0.5))),
        "rule-apg-norm_limit-2-momentum--0.5",
    ),
    "percentile": (["guide.percentile=0.9"], lambda m: Thresholded(cfg(m), 0.9), "percentile-0.9"),
    "percentile of latents": (
        ["guide.percentile=0.9", "clip=false"],
        lambda m: Thresholded(cfg(m), 0.9),
        "percentile-0.9-clip-false",
    ),
    "zero": (["guide.zero_from=0.8"], lambda m: ZeroInit(Clipped(cfg(m)), 0.8), "zero_from-0.8"),
    "all": (
        [
            "guide.zero_from=1",
            "guide.rule={name:zero_star}",
            "guide.percentile=0.9",
            "guide.interval=[0,0.9]",
            "clip=false",
        ],
        lambda m: ZeroInit(Thresholded(cfg(m, interval(3.0, 0.0, 0.9), zero_star), 0.9)),
        "interval-0-0.9-rule-zero_star-percentile-0.9-zero_from-1-clip-false",
    ),
}


@pytest.mark.parametrize(("overrides", "by_hand", "name"), GUIDES.values(), ids=list(GUIDES))
def test_how_guidance_works_is_as_told(
    overrides: list[str],
    by_hand: Callable[[models.Model], DenoiserLike],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is drawn is what the same denoiser made by hand draws, to the last bit, and not plain guidance;
    the folder says which it is."""
    model = models.load(saved(tmp_path / "model.safetensors"))
    given = settings(tmp_path / "model.safetensors", "steps=4", "guidance=3", *overrides)
    drawn: list[torch.Tensor] = []

    def sampled(*args: Any, **kwargs: Any) -> torch.Tensor:
        drawn.append(sample(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr("samplers.run.sample", sampled)
    out = run(given)
    expected, plain = (
        sample(
            "ddim",
            denoiser,
            model.grid(4),
            shape=model.shape,
            seeds=range(3),
            condition=Condition(label=torch.arange(3)),
        )
        for denoiser in (by_hand(model), Clipped(cfg(model)))
    )
    assert torch.equal(torch.cat(drawn), expected)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert out.name == f"ddim-4-guidance-3-{name}"
    kept = read_json(out / "samples.json")["settings"]["guide"]
    assert kept == {key: value for key, value in given["guide"].items() if value is not None}


def test_images_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    """More seeds join the images that are there; other settings are refused, and nothing is touched."""
    saved(tmp_path / "model.safetensors")
    out = run(settings(tmp_path / "model.safetensors", "steps=1", f"out={tmp_path / 'here'}"))
    run(settings(tmp_path / "model.safetensors", "steps=1", "seed=3", f"out={out}"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert len([path for path in before if path.parent.parent.name == "images"]) == 6
    with pytest.raises(ValueError, match=r"already holds images of other settings: give another out="):
        run(settings(tmp_path / "model.safetensors", "steps=2", f"out={out}"))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="already holds images of other settings"):
        run(
            settings(
                tmp_path / "model.safetensors", "steps=1", "guidance=2", "guide.interval=[0,1]", f"out={out}"
            )
        )
    saved(tmp_path / "model.safetensors")  # the same settings, but other weights
    with pytest.raises(ValueError, match="already holds images of other settings"):
        run(settings(tmp_path / "model.safetensors", "steps=1", f"out={out}"))


def test_a_diverged_model_makes_no_black_images(tmp_path: Path) -> None:
    """Samples that are not finite are an error that names the seed, not pictures; NaN has no shade of
    grey."""
    model = models.load(saved(tmp_path / "model.safetensors"))
    with torch.no_grad():
        next(model.network.parameters()).fill_(
            1e38
        )  # finite, so that it loads; what is computed from it is not
    models.save(model, tmp_path / "lost.safetensors")
    with pytest.raises(FloatingPointError, match="3 of 3 samples are not finite, the first of seed 0"):
        run(settings(tmp_path / "lost.safetensors", "steps=1"))
    assert not list(tmp_path.rglob("*.png"))
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, math.nan]))


def test_pixels_are_rounded_to_the_nearest() -> None:
    """-1 is 0, 1 is 255, 0 lies between 127 and 128; the middle of a step goes up, what lies outside is cut
    off."""
    values = torch.tensor([-3.0, -1.0, 0.9 / 127.5 - 1, 0.4 / 127.5 - 1, 254.6 / 127.5 - 1, 1.0, 3.0])
    assert to_uint8(values).tolist() == [0, 0, 1, 0, 255, 255, 255]


def test_times_of_ones_own(tmp_path: Path) -> None:
    """A list of times is a grid too, and brings its own number of steps."""
    out = run(settings(saved(tmp_path / "model.safetensors"), "grid.spacing=[1.0,0.7,0.2]"))
    assert out.name == "ddim-3-spacing-1.0-0.7-0.2"
    assert read_json(out / "samples.json")["settings"]["grid"] == {"spacing": [1.0, 0.7, 0.2]}
