"""Fine-tuning: a published model trains further on captioned images, and is saved as it came."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import models
import samplers
from configs import compose
from models import Model
from models.files.tensors import open_tensors
from models.files.text import read_json_lines
from models.layouts import native
from tests.composing import composed
from train import run
from train.__main__ import main
from train.data.latents import LatentData, LatentParams
from train.data.pictures import CaptionedImages
from train.density import Density, LogNormal, Uniform
from train.export import check_exportable
from train.objective import DenoisingObjective
from train.run import OBJECTIVES
from train.weighting import uniform
from train.world import World

CAPTIONS = (
    "a cat sleeping by the window", "two red balloons", "mountains under snow at dawn", "an old steam train",
    "green", "portrait of my grandmother, oil on canvas, 1932", "0123456789", "fish! fish! fish!",
)  # fmt: skip
QUIET = ("device=cpu", "progress=false", "wandb=false")
QUICK = (
    "train.steps=2",
    "train.warmup=0",
    "train.batch_size=2",
    "train.log_every=1",
    "latents.size=32",
    *QUIET,
)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As many threads here as in the processes that are started: sums then have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def photos(place: Path) -> Path:
    """Eight pictures, each half grey and half of one colour, with captions that have nothing to do with each
    other."""
    return paint(place / "photos", CAPTIONS)


def paint(folder: Path, captions: tuple[str, ...]) -> Path:
    folder.mkdir()
    for i, caption in enumerate(captions):
        pixels = np.full((40, 32, 3), 128, np.uint8)
        half = slice(0, 16) if i % 2 else slice(16, 32)
        pixels[:, half] = [255 * (i // 2 % 2), 255 * (i // 4), 255 * (i // 2 == 0)]
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    return folder


def small(family: str = "sd1", dtype: torch.dtype = torch.float16) -> Model:
    """A miniature whose autoencoder tells pictures apart, as real ones do: latents with a deviation of about
    1 and little noise."""
    model = models.miniature(family)
    model.preview = None
    del model.spec["preview"]
    quant = model.require("vae").quant
    with torch.no_grad():
        quant.weight[:4] *= 12
        quant.bias[:4] = 0
        quant.weight[4:] = 0
        quant.bias[4:] = -6
    return model.to(dtype=dtype)


@pytest.fixture(scope="module")
def weights(place: Path) -> Path:
    """SD 1's single file in fp16."""
    models.save(small(), place / "sd1.safetensors", layout="ldm")
    return place / "sd1.safetensors"


def config(weights: object, photos: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    return composed(
        "train", "experiment=finetune", f"weights={weights}", f"data={photos}", *overrides, run=str(folder)
    )


LEARNING = (
    "model.prediction=v", "train.steps=120", "train.batch_size=8", "train.learning_rate=3e-3",
    "train.warmup=5", "train.final=0.1",
    "train.ema=0.9", "train.precision=fp32", "train.checkpointing=false", "objective.drop=0",
    "latents.size=32", *QUIET,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(place: Path, weights: Path, photos: Path) -> Path:
    """A run that has learned its eight pictures, on the half that it predicts v."""
    assert run(config(weights, photos, place / "trained", *LEARNING))
    return place / "trained"


class Noisy(Uniform):
    """The noisiest third of all times, where only the caption tells which picture it is to become."""

    def quantile(self, u: Tensor) -> Tensor:
        return super().quantile((2 + u) / 3)


def loss(model: Model, data: LatentData, roll: int = 0) -> float:
    """The loss over noisy times and noise that are always the same; `roll` gives every picture the caption of
    another one."""
    objective, total = (
        DenoisingObjective(model.schedule, model.prediction, Noisy(model.schedule), uniform),
        0.0,
    )
    batch = data.__getitems__(range(8))
    batch["context"] = batch["context"].roll(roll, 0)
    with torch.no_grad(), torch.random.fork_rng():
        for seed in range(8):
            torch.manual_seed(seed)
            total += float(objective(model.network_denoiser(), batch).mean()) / 8
    return total


def tensors(path: Path) -> dict[str, Tensor]:
    return {key: stored.mapped().clone() for key, stored in open_tensors(path).tensors.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Bitwise, dtypes included."""
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a
    )


@pytest.mark.learns
def test_it_learns_which_picture_belongs_to_which_caption(weights: Path, photos: Path, trained: Path) -> None:
    """The loss falls below half of its start, and with each other's captions it does not."""
    start, end = models.load(weights, prediction="v", dtype=torch.float32), models.load(trained)
    data = LatentData(CaptionedImages(photos), start, LatentParams(size=32), trained)
    data.prepare(World(0, 1, torch.device("cpu")), progress=False)
    assert loss(end, data) < 0.5 * loss(start, data)
    assert loss(end, data, roll=3) > 1.5 * loss(end, data)
    assert abs(loss(start, data, roll=3) / loss(start, data) - 1) < 0.1


def test_the_file_is_as_it_came(weights: Path, trained: Path) -> None:
    """The same keys, shapes and precision; all but the network bit for bit; the network is the average that
    was trained in float32."""
    came, left = tensors(weights), tensors(trained / "model.safetensors")
    assert {key: (value.shape, value.dtype) for key, value in came.items()} == {
        key: (value.shape, value.dtype) for key, value in left.items()
    }
    moved = {key for key in came if not torch.equal(came[key], left[key])}
    network = {key for key in came if key.startswith("model.diffusion_model.")}
    assert moved <= network
    assert len(moved) > 0.9 * len(network)
    kept = native.read(trained)[0]
    assert {value.dtype for key, value in kept.items() if key.startswith(("network.", "ema."))} == {
        torch.float32
    }
    again = models.load(trained / "model.safetensors").network.state_dict()
    assert same(again, {key: kept[f"ema.{key}"].half() for key in again})


def test_the_run_is_a_whole_model(trained: Path) -> None:
    """From the run's folder alone, and from the file in it, prompts become the same images, to fp16's
    rounding of the network."""
    whole, file = models.load(trained), models.load(trained / "model.safetensors", prediction="v")
    assert whole.parts.keys() == file.parts.keys() == {"backbone", "vae", "text"}
    assert whole.shape == (4, 4, 4)
    images = [
        samplers.generate(model.to(dtype=torch.float32), CAPTIONS[1], seeds=[0], steps=2, height=32, width=32)
        for model in (whole, file)
    ]
    assert float((images[0] - images[1]).abs().mean()) < 0.01
    assert float(images[0].std()) > 0.01


LAYOUTS: dict[str, tuple[str, torch.dtype]] = {
    "diffusers": ("sdxl", torch.float16),
    "ldm": ("sdxl", torch.bfloat16),
    "native": ("sd2-v", torch.float32),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back(tmp_path: Path, photos: Path, layout: Any) -> None:
    """Folder or file: the same files with the same keys and precision, parts other than the network bit for
    bit, loadable."""
    family, dtype = LAYOUTS[layout]
    source = tmp_path / "diffusers" if layout == "diffusers" else tmp_path / "one.safetensors"
    models.save(small(family, dtype), source, layout=layout)
    assert run(config(source, photos, tmp_path / "run", "train.learning_rate=1e-2", *QUICK))
    place = tmp_path / "run" / ("model" if layout == "diffusers" else "model.safetensors")
    files = (
        sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
        if source.is_dir()
        else [Path()]
    )
    assert files == (
        sorted(path.relative_to(place) for path in place.rglob("*") if path.is_file())
        if place.is_dir()
        else [Path()]
    )
    for file in (source / name for name in files):
        if file.suffix == ".safetensors":
            came, left = tensors(file), tensors(place / file.relative_to(source))
            shapes = [
                {key: (value.shape, value.dtype) for key, value in each.items()} for each in (came, left)
            ]
            assert shapes[0] == shapes[1]
            changed = [key for key in came if not torch.equal(came[key], left[key])]
            assert (
                all(key.startswith(("model.diffusion_model.", "network.")) for key in changed)
                or file.parent.name == "unet"
            )
    again, before = models.load(place), models.load(source)
    assert again.spec["family"] == family
    assert again.prediction.name == before.prediction.name
    assert not same(again.network.state_dict(), before.network.state_dict())


def test_what_the_files_do_not_tell_is_in_the_command(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SDXL that predicts v by request would be read as of the family sdxl-v: what is printed says otherwise,
    and loads the same."""
    models.save(small("sdxl"), tmp_path / "sdxl.safetensors", layout="ldm")
    overrides = ("model.family=sdxl", "model.prediction=v", *QUICK, "train.steps=1")
    assert main(config(tmp_path / "sdxl.safetensors", photos, tmp_path / "run", *overrides)) == 0
    file = tmp_path / "run" / "model.safetensors"
    assert (
        capsys.readouterr().out
        == f"trained: {file}   sample it: plain-diffusion samplers weights={file} family=sdxl prompt=...\n"
    )
    assert models.load(file).spec["family"] == "sdxl-v"
    trained, again = models.load(tmp_path / "run").spec, models.load(file, family="sdxl").spec
    assert {**trained, "shape": None} == {**again, "shape": None}


def test_raw_weights_and_variants_are_trained_further(tmp_path: Path) -> None:
    """What `models.load` is told of averages and of variants reaches it from a configuration: each choice
    begins with other weights."""
    averaged, raw = models.miniature("sd1", seed=0), models.miniature("sd1", seed=1)
    models.save(averaged, tmp_path / "both", layout="diffusers")
    models.save(raw, tmp_path / "raw", layout="diffusers")
    file = "diffusion_pytorch_model.safetensors"
    for variant in ("fp16", "non_ema"):
        (tmp_path / "raw" / "unet" / file).rename(
            tmp_path / "both" / "unet" / file.replace(".", f".{variant}.", 1)
        )
        models.save(raw, tmp_path / "raw", layout="diffusers")

    def starts_as(model: Model, **settings: Any) -> bool:
        built, _ = OBJECTIVES["denoising"](
            {"from": str(tmp_path / "both"), **settings}, torch.device("cpu"), {"name": "uniform"}
        )
        return same(built.network.state_dict(), model.network.state_dict())

    assert starts_as(averaged, variant=None)
    assert starts_as(raw, variant="fp16")
    assert starts_as(raw, ema=False)


@pytest.mark.parametrize(
    ("family", "kind"), [("playground-v2.5", LogNormal), ("sdxl", Uniform), ("sd2-v", Uniform)]
)
@pytest.mark.parametrize("density", ["{name: usual}", "null"])
def test_times_fall_where_the_schedule_has_them_by_default(
    place: Path, family: str, kind: type, density: str
) -> None:
    """Playground's sigmas are log-normal, as in EDM's training: half of them below exp(-1.2), not below 40.
    Others are uniform."""
    weights = place / f"{family}.safetensors"
    models.save(models.miniature(family), weights)
    settings = config(weights, place, place / "run", f"objective.density={density}")
    objective: Any = OBJECTIVES["denoising"](
        {"from": str(weights)},
        torch.device("cpu"),
        **{key: value for key, value in settings["objective"].items() if key != "name"},
    )[1]
    falls: Density = objective.density
    assert type(falls) is kind
    if kind is LogNormal:
        assert abs(float(falls.quantile(torch.tensor(0.5, dtype=torch.float64))) - math.exp(-1.2)) < 1e-9


@pytest.mark.parametrize(
    ("family", "layout"), [("sd2-v", "ldm"), ("playground-v2.5", "ldm"), ("playground-v2.5", "diffusers")]
)
def test_what_cannot_be_saved_is_found_before_training(tmp_path: Path, family: str, layout: Any) -> None:
    """Models pass in the layouts that they are published in; latents of another scale only where files say
    the scale."""
    models.save(small(family), tmp_path / "model.safetensors", layout=layout)
    model = models.load(tmp_path / "model.safetensors")
    check_exportable(model)
    params = model.require("vae").params
    model.require("vae").params = replace(params, scale=0.5 * params.scale)
    refused = pytest.raises(
        ValueError,
        match=r"once trained, this model could not be saved as its weights came .*how latents are scaled",
    )
    with nullcontext() if layout == "diffusers" else refused:
        check_exportable(model)


def test_packed_weights_are_refused_before_anything_is_written(
    photos: Path, weights: Path, tmp_path: Path
) -> None:
    """By that name, with what to do; a file of the unpacked model is trained."""
    eight = {
        name: value.to(torch.float8_e4m3fn)
        if value.ndim == 2 and name.startswith("model.") and name.endswith("weight")
        else value
        for name, value in tensors(weights).items()
    }
    save_file(eight, tmp_path / "eight.safetensors")
    packed, folder = models.load(tmp_path / "eight.safetensors"), tmp_path / "run"
    with pytest.raises(
        ValueError,
        match=r"^the backbone's weights are packed .*: train model\.unpacked\(torch\.float32\), or a file "
        r"of it, .",
    ):
        run(config(tmp_path / "eight.safetensors", photos, folder, *QUICK))
    assert not folder.exists()
    models.save(packed.unpacked(torch.float32), tmp_path / "plain.safetensors")
    assert run(config(tmp_path / "plain.safetensors", photos, folder, *QUICK, "train.steps=1"))


def test_parts_from_several_files(tmp_path: Path, photos: Path, weights: Path) -> None:
    """weights may be a list; what is saved is one."""
    other = small()
    models.save(
        Model(None, other.schedule, other.prediction, other.spec, vae=other.vae),
        tmp_path / "vae.safetensors",
        layout="ldm",
    )
    assert run(config(f"[{weights},{tmp_path / 'vae.safetensors'}]", photos, tmp_path / "run", *QUICK))
    assert tensors(tmp_path / "run" / "model.safetensors").keys() == tensors(weights).keys()


def test_resumes_bit_for_bit_in_a_new_process(
    place: Path, tmp_path: Path, photos: Path, weights: Path
) -> None:
    """6 steps at once = 3, a stop, and 3 in a new process that computes no latents: checkpoint, exported
    model, losses."""
    settings = (
        "train.steps=6", "train.batch_size=4", "train.accumulate=2", "train.warmup=2", "train.precision=bf16",
        "train.checkpointing=true",
        "train.log_every=1", "train.evaluate_every=1", "train.learning_rate=1e-3", "objective.drop=0.3",
        "objective.weighting.name=min_snr", "latents.size=32", *QUIET,
    )  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(config(weights, photos, whole, *settings))
    with pytest.raises(KeyboardInterrupt):
        run(config(weights, photos, parts, *settings, "train.save_every=2"), stop_at_third())
    assert native.read(parts)[1]["progress"]["step"] == 3
    assert not (parts / "model.safetensors").exists()
    latents = next(parts.glob("latents-*"))
    written = latents.stat().st_mtime_ns
    arguments = [
        "experiment=finetune",
        f"weights={weights}",
        f"data={photos}",
        f"run={parts}",
        *settings,
        "resume=true",
    ]
    resumed = subprocess.run(
        [sys.executable, "-m", "train", *arguments], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (resumed.returncode, resumed.stderr) == (0, "")
    file = parts / "model.safetensors"
    assert (
        resumed.stdout == f"trained: {file}   sample it: plain-diffusion samplers weights={file} prompt=...\n"
    )
    assert latents.stat().st_mtime_ns == written
    for name in ("checkpoint.safetensors", "model.safetensors"):
        assert same(tensors(whole / name), tensors(parts / name))
    losses = [
        {line["step"]: line["loss"] for line in read_json_lines(f / "metrics.jsonl") if "loss" in line}
        for f in (whole, parts)
    ]
    assert losses[0] == losses[1]
    assert list(losses[0]) == list(range(1, 7))


def stop_at_third() -> Any:
    """An evaluation that breaks off the run after its third step, which is saved."""
    seen: list[Model] = []

    def evaluate(model: Model) -> dict[str, float]:
        seen.append(model)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return {}

    return evaluate


def test_steps_too_small_for_fp16_add_up(tmp_path: Path, photos: Path, weights: Path) -> None:
    """Weights of 1 move by less than fp16's grain per step and by more in 30 steps: the trained weights are
    float32."""
    overrides = (
        "train.steps=30",
        "train.learning_rate=2e-4",
        "train.ema=0",
        "train.precision=fp32",
        "train.checkpointing=false",
    )
    assert run(config(weights, photos, tmp_path, *QUICK, *overrides))
    came, left = tensors(weights), tensors(tmp_path / "model.safetensors")
    gains = [key for key in came if key.startswith("model.diffusion_model.") and key.endswith("norm1.weight")]
    assert gains
    for key in gains:
        assert (
            float(came[key].min()) > 0.5
        )  # where values of fp16 are 2^-11 apart, and half of that rounds away
        assert float((left[key] != came[key]).float().mean()) > 0.3


def test_resuming_on_other_data_is_refused(tmp_path: Path, photos: Path, weights: Path) -> None:
    """Another caption, another size or another autoencoder: one line, before anything is computed or
    written."""
    copy = paint(tmp_path / "copy", CAPTIONS)
    folder = tmp_path / "run"
    assert run(config(weights, copy, folder, *QUICK))
    before = {path: path.read_bytes() for path in folder.rglob("*")}
    moved = copy.rename(tmp_path / "moved")
    assert run(config(weights, moved, folder, *QUICK, "resume=true"))  # the same images elsewhere

    def refused(message: str, *overrides: str, weights: Path = weights) -> None:
        with pytest.raises(ValueError, match=rf"{folder} was trained with {message}") as refusal:
            run(config(weights, moved, folder, *QUICK, "resume=true", "train.steps=3", *overrides))
        assert "\n" not in str(refusal.value)

    refused("shape=\\[4, 4, 4\\], not \\[4, 8, 8\\]", "latents.size=64")
    refused("data\\.chunks=1, not 2", "latents.chunks=2")
    refused("objective\\.drop=0\\.1, not 0\\.5", "objective.drop=0.5")
    other = small()
    with torch.no_grad():
        other.require("vae").encoder.conv_in.weight.mul_(1.1)
    models.save(other, tmp_path / "other.safetensors", layout="ldm")
    refused("data\\.encoders=", weights=tmp_path / "other.safetensors")
    models.save(small("sdxl"), tmp_path / "sdxl.safetensors", layout="ldm")
    refused("family='sd1', not 'sdxl'", weights=tmp_path / "sdxl.safetensors")
    (moved / "3.txt").write_text("an even older steam train")
    refused("data\\.captioned=")
    assert set(folder.rglob("*")) == before.keys()
    assert (folder / "checkpoint.safetensors").read_bytes() == before[folder / "checkpoint.safetensors"]
    with pytest.raises(ValueError, match="holds a trained run: resume=true"):
        run(config(weights, moved, folder, *QUICK))


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no weights": (["data={photos}"], "weights must be given: weights="),
    "no data": (["weights={weights}"], "data must be given: data="),
    "missing weights": (["weights={new}", "data={photos}"], "no such file or folder: {new}"),
    "missing data": (["weights={weights}", "data={new}"], "no such folder of pictures: {new}"),
    "images without captions": (
        ["weights={weights}", "data={bare}"],
        "1 of 1 pictures have no caption, the first is {bare}/a.png: write it into",
    ),
    "another setting": (
        ["weights={weights}", "data={photos}", "latents.sise=3"],
        "'latents.sise'; did you mean 'latents.size'?",
    ),
    "no setting": (
        ["weights={weights}", "data={photos}", "+latents.sise=3"],
        "no latents parameter named 'sise'; did you mean 'size'?",
    ),
    "three sides": (
        ["weights={weights}", "data={photos}", "latents.size=[1,2,3]"],
        "latents.size must be a whole number or a list of 2",
    ),
    "size": (
        ["weights={weights}", "data={photos}", "latents.size=30"],
        "multiples of 8, not 30x30 (height x width): 32x32 is near",
    ),
    "family": (["weights={weights}", "data={photos}", "model.family=sd4"], "no family named 'sd4'"),
    "another family": (
        ["weights={weights}", "data={photos}", "model.family=sdxl"],
        "has the architecture of sd1, so it cannot be of the family sdxl",
    ),
    "model": (
        ["weights={weights}", "data={photos}", "+model.network=unet"],
        "no model setting named 'network'",
    ),
    "a number": (["weights=3", "data={photos}"], "no such file or folder: 3"),
    "digits": (
        ["weights={weights}", "data={{name: digits}}"],
        "latents are for a folder of captioned images: give data=FOLDER",
    ),
    "only an autoencoder": (["weights={vae}", "data={photos}"], "this model has no backbone (it has vae)"),
    "a prediction that single files have no words for": (
        ["weights={weights}", "data={photos}", "latents.size=32", "model.prediction=x0", "train.steps=1"],
        "once trained, this model could not be saved as its weights came (single files do not say",
    ),
    "no average": (
        ["weights={weights}", "data={photos}", "model.ema=3"],
        "model.ema must be true or false, not 3",
    ),
    "no variant": (
        ["weights={weights}", "data={photos}", "model.variant=16"],
        "model.variant must be a text or null, not 16",
    ),
    "weighting": (
        ["weights={weights}", "data={photos}", "objective.weighting.name=minsnr"],
        "did you mean 'min_snr'?",
    ),
    "density": (
        ["weights={weights}", "data={photos}", "objective.density.name=log_normal"],
        "needs a variance-exploding schedule",
    ),
    "two names": (
        ["weights={weights}", "data={photos}", "+model.from={new}"],
        "weights and model.from both name the model to train further",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line(
    tmp_path: Path, photos: Path, weights: Path, arguments: list[str], message: str
) -> None:
    """That says what would be right, before latents are computed and before a folder is made."""
    places = {
        "weights": weights,
        "photos": photos,
        "new": tmp_path / "new",
        "bare": tmp_path / "bare",
        "vae": tmp_path / "vae.safetensors",
    }
    places["bare"].mkdir()
    (places["bare"] / "a.png").write_bytes((photos / "0.png").read_bytes())
    model = models.miniature()
    models.save(
        Model(None, model.schedule, model.prediction, model.spec, vae=model.vae), places["vae"], layout="ldm"
    )
    given = [argument.format(**places) for argument in arguments]
    with pytest.raises((ValueError, OSError)) as mistake:
        run(compose("train", ["experiment=finetune", f"run={tmp_path / 'run'}", *QUIET, *given]))
    assert message.format(**places) in str(mistake.value)
    assert "\n" not in str(mistake.value)
    assert not (tmp_path / "run").exists()
