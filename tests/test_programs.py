"""The three programs as a user runs them: what they write, and what one line they say about every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import models
from configs import compose
from models.files.text import read_json_lines
from samplers.pictures import save_png
from tests.forking import ENVIRONMENT, Command, forking

ROOT = Path(__file__).parents[1]
TINY = ("channels=8", "channel_mult=[1]", "attention=[0]", "middle_attention=0", "head_dim=8")
QUIET = ("device=cpu", "progress=false")
TRAIN = (
    "experiment=digits_unet", *(f"model.network.{setting}" for setting in TINY), "model.network.groups=4",
    "train.steps=4", "train.warmup=2", "train.batch_size=16", "train.log_every=2", "wandb=false", *QUIET,
)  # fmt: skip
FOLDER = ("data.name=folder", "~data.split")
IMPORTS = (
    "import hydra, open_clip, sklearn.datasets, torch._dynamo, eval.scoring, eval.compare, samplers.modes, "
    "train.run"
)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Runs `python -m program argument ...`: its exit status and all that it said on stdout and stderr."""
    with forking(tmp_path_factory.mktemp("said"), IMPORTS) as run:
        yield run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, command: Command) -> Path:
    """A tiny trained run."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    status, out, error = command("train", *TRAIN, f"run={folder}")
    assert (status, error) == (0, "")
    assert out == f"trained: {folder}   sample it: plain-diffusion samplers run={folder}\n"
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models that take prompts, pictures, and an image that was drawn."""
    folder = tmp_path_factory.mktemp("files")
    for name, model in {
        "sd1": models.miniature("sd1"),
        "sdxl": models.miniature("sdxl"),
        "lcm": models.miniature("lcm"),
        "inpainting": models.miniature("sd1", in_channels=9),
        "editing": models.miniature("sd1", in_channels=8),
    }.items():
        models.save(model, folder / f"{name}.safetensors", layout="ldm")
    models.save(
        replace(models.miniature("sd1"), vae=None, text=None, preview=None),
        folder / "unet.safetensors",
        layout="ldm",
    )
    Image.new("RGB", (64, 32)).save(folder / "image.png")
    Image.new("RGB", (64, 64)).save(folder / "square.png")
    (folder / "text.png").write_text("no picture")
    (folder / "damaged.safetensors").write_bytes((folder / "sd1.safetensors").read_bytes()[:100_000])
    gone = {"weights": [f"{folder}/gone.safetensors"], "prompt": "a", "seed": 0, "batch": {"seed": 0, "n": 1}}
    save_png(torch.zeros(3, 32, 64), folder / "moved.png", gone)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_run_folder_holds_what_repeats_it(trained: Path) -> None:
    """Config, provenance, metrics and checkpoint; the config is what compose gives Python."""
    assert sorted(contents(trained)) == [
        ".lock",
        "checkpoint.safetensors",
        "config.json",
        "metrics.jsonl",
        "provenance.json",
    ]
    assert json.loads((trained / "config.json").read_text()) == compose("train", [*TRAIN, f"run={trained}"])
    assert [line["step"] for line in read_json_lines(trained / "metrics.jsonl")] == [2, 4]
    provenance = json.loads((trained / "provenance.json").read_text())
    assert provenance["torch"] == torch.__version__
    assert "model.network.channels=8" in provenance["command"]
    assert models.load(trained).shape == (1, 8, 8)


@pytest.mark.learns
def test_train_sample_score(trained: Path, tmp_path: Path) -> None:
    """The whole way in processes of its own: images named by seed in class folders, each with its settings;
    figures printed and kept."""
    out = tmp_path / "samples"
    settings = ["labels=[3,7]", "n=6", "steps=2", "seed=5", "batch_size=4"]
    drawn = subprocess.run(
        [sys.executable, "-m", "samplers", f"run={trained}", f"out={out}", *settings, *QUIET],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert drawn.stdout == f"6 images in {out / 'images'}, all in {out / 'grid.png'}\n"
    named = [f"images/{label}/{seed:06d}.png" for seed, label in zip(range(5, 11), (3, 7) * 3, strict=True)]
    assert sorted(contents(out)) == sorted([*named, "grid.png", "samples.json"])
    with Image.open(out / named[1]) as image:
        assert (image.size, image.mode) == ((8, 8), "L")
        kept = json.loads(image.info["settings"])
    assert (kept["seed"], kept["labels"], kept["steps"], kept["run"]) == (6, 7, 2, str(trained))

    few = [
        f"+{setting}.held_out=0.95" for setting in ("reference", "training", "extractors.digits")
    ]  # learns and compares with few
    scored = subprocess.run(
        [sys.executable, "-m", "eval", "experiment=digits", f"samples={out / 'images'}", *few, *QUIET],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert (scored.returncode, scored.stderr) == (0, "")
    result = json.loads((out / "images.scores.json").read_text())
    assert result["samples"]["n"] == 6
    assert list(result["figures"]) == ["frechet", "kernel", "accuracy", "memorised"]
    printed = [line.split()[:2] for line in scored.stdout.splitlines()]
    assert printed == [
        *([name, f"{figure['value']:.5g}"] for name, figure in result["figures"].items()),
        ["result:", f"{out}/images.scores.json"],
    ]
    assert sorted(contents(out)) == sorted([*named, "grid.png", "samples.json", "images.scores.json"])


def test_a_finished_run_is_not_overwritten(trained: Path, command: Command) -> None:
    """Training into the same folder again is refused, and says how to go on; Weights & Biases is not even
    begun."""
    before = contents(trained)
    status, out, error = command("train", *TRAIN, "wandb=true", f"run={trained}")
    assert (status, out) == (1, "")
    assert (
        error == f"error: {trained} holds a trained run: resume=true continues it, run=... starts another\n"
    )
    assert contents(trained) == before


# program, its arguments (the run, a scratch folder and a damaged run in braces), and what the line must say
MISTAKES: dict[str, tuple[str, list[str], str]] = {
    "typo": ("train", [*TRAIN, "run={new}", "train.stepz=3"], "no setting named 'train.stepz'; did you "
                                                              "mean 'train.steps'?"),
    "typo in samplers": ("samplers", ["run={run}", "stesp=3"], "no setting named 'stesp'; did you mean "
                                                               "'steps'?"),
    "added typo": ("train", [*TRAIN, "run={new}", "+train.stepz=3"], "no train parameter named 'stepz'; "
                                                                     "did you mean 'steps'?"),
    "typo in a network": ("train", [*TRAIN, "run={new}", "+model.network.chanels=3"], "'chanels'; did you "
                                                                                      "mean 'channels'?"),
    "experiment": ("train", ["experiment=digits_unett"], "no experiment named 'digits_unett'; did you "
                                                         "mean 'digits_unet'?"),
    "no experiment": ("train", [], "must be given: "),
    "not a number": ("train", [*TRAIN, "run={new}", "train.steps=abc"], "train.steps must be a whole "
                                                                        "number, not 'abc'"),
    "no steps": ("train", [*TRAIN, "run={new}", "train.steps=0"], "train.steps must be at least 1, not 0"),
    "empty images": ("train", [*TRAIN, "run={new}", *FOLDER, "+data.folder={empty}"], "no pictures in "
                                                                                      "{empty}: expected"),
    "missing images": ("train", [*TRAIN, "run={new}", *FOLDER, "+data.folder={new}"], "no such folder of "
                                                                                      "pictures: {new}"),
    "a whole section": ("train", [*TRAIN, "run={new}", "data={{nam:folder}}"], "no setting named "
                                                                               "'data.nam'; did you mean "
                                                                               "'data.name'?"),
    "run folder": ("train", [*TRAIN, "run={file}/run"], "{file}"),
    "run is a file": ("train", [*TRAIN, "run={file}"], "{file}"),
    "architecture": ("train", [*TRAIN, "run={run}", "resume=true", "model.network.channels=16"],
        "trained with network.channels=8, not 16"),
    "shorter": ("train", [*TRAIN, "run={run}", "resume=true", "train.steps=2"], "has finished 4 steps: "
                                                                                "train.steps=2 must be"),
    "other digits": ("train", [*TRAIN, "run={run}", "resume=true", "+data.seed=5"], "trained with "
                                                                                    "data.seed=None, not 5"),
    "signs in a folder": ("train", [*TRAIN, "run={new}", *FOLDER, "+data.folder={new} (1), [a]"],
        "folder of pictures: {new} (1), [a]"),
    "another data set": ("train", [*TRAIN, "run={new}", "data={{name: folder, folder: {new}=1}}"],
        "no such folder of pictures: {new}=1"),
    "no section": ("train", [*TRAIN, "run={new}", "~train"], "train must be given"),
    "no table": ("train", [*TRAIN, "run={new}", "model.schedule.steps=-5"], "2 to 100,000 steps, not -5"),
    "a number for a folder": ("train", [*TRAIN, "run={new}", *FOLDER, "+data.folder={new}-3"], "no such "
                                                                                               "folder of "
                                                                                               "pictures: "
                                                                                               "{new}-3"),
    "objective": ("train", [*TRAIN, "run={run}", "resume=true", "objective.drop=0.5"], "trained with "
                                                                                       "drop=0.05, not 0.5"),
    "other data": ("train", [*TRAIN, "run={run}", "resume=true", "data.split=all"], "trained with "
                                                                                    "data.images=1258, "
                                                                                    "not 1797"),
    "grid": ("train", [*TRAIN, "run={new}", "model.grid={{spacing:karass}}"], "did you mean 'karras'?"),
    "classes": ("train", [*TRAIN, "run={new}", "model.network.num_classes=9"],
        "num_classes=10, the network model.network.num_classes=9"),
    "resume damaged": ("train", [*TRAIN, "run={damaged}", "resume=true"],
        "{damaged}/checkpoint.safetensors is damaged"),
    "no checkpoint": ("samplers", ["run={new}", *QUIET], "no such file or folder: {new}"),
    "empty run": ("samplers", ["run={empty}", *QUIET], "{empty} holds no model, neither a training run's "
                                                       "checkpoint nor"),
    "damaged": ("samplers", ["run={damaged}", *QUIET], "{damaged}/checkpoint.safetensors is damaged"),
    "label": ("samplers", ["run={run}", "labels=[11]", *QUIET], "11"),
    "no sampling steps": ("samplers", ["run={run}", "steps=0", *QUIET], "steps must be"),
    "no images": ("samplers", ["run={run}", "n=0", *QUIET], "n must be at least 1, not 0"),
    "empty batches": ("samplers", ["run={run}", "batch_size=0", *QUIET], "batch_size must be at least 1, "
                                                                         "not 0"),
    "times": ("samplers", ["run={run}", "grid.spacing=5", *QUIET], "spacing of the grid must be a text or "
                                                                   "a list of numbers"),
    "seed": ("samplers", ["run={run}", "seed=99999999999999999999", *QUIET], "seed must lie in 0 ... 2^63 "
                                                                             "- 1"),
    "noise": ("samplers", ["run={run}", "sampler=ddpm", "+options.noise=3", *QUIET], "noise comes from "
                                                                                     "the seeds here"),
    "rho": ("samplers", ["run={run}", "grid.spacing=karras", "grid.t_start=9", "+grid.rho=0", *QUIET],
        "must lie in [0.01, 1000], not 0"),
    "no class": ("samplers", ["run={run}", "labels=10", *QUIET], "label 10 is out of range: classes are 0 "
                                                                 "to 9"),
    "no label": ("samplers", ["run={run}", "labels=abc", *QUIET],
        "these classes have no names: labels are 0 to 9"),
    "no whole steps": ("samplers", ["run={run}", "steps=2.5", *QUIET], "steps must be a whole number or "
                                                                       "null, not 2.5"),
    "no number": ("samplers", ["run={run}", "guidance=.nan", *QUIET], "guidance must be a number"),
    "no switch": ("samplers", ["run={run}", "clip=maybe", *QUIET], "clip must be true or false, not 'maybe'"),
    "rule": ("samplers", ["run={run}", "guidance=2", "+guide.rule.name=resaled", *QUIET], "named "
                                                                                          "'resaled'; did "
                                                                                          "you mean "
                                                                                          "'rescaled'?"),
    "rule's option": ("samplers", ["run={run}", "guidance=2", "guide.rule={{name:apg,etta:0}}", *QUIET],
        "did you mean 'eta'?"),
    "rule by name only": ("samplers", ["run={run}", "guidance=2", "guide.rule=apg", *QUIET], "guide.rule "
                                                                                             "must be a "
                                                                                             "mapping or "
                                                                                             "null"),
    "interval": ("samplers", ["run={run}", "guidance=2", "guide.interval=[0.1,1.5]", *QUIET],
        "0 <= low < high <= 1, not 0.1 and 1.5"),
    "guide alone": ("samplers", ["run={run}", "guide.interval=[0.1,0.9]", *QUIET],
        "as guidance=1 is off: give guidance=2"),
    "added guide": ("samplers", ["run={run}", "+guide.intervall=3", *QUIET], "'intervall'; did you mean "
                                                                             "'interval'?"),
    "steps of the grid": ("samplers", ["run={run}", "+grid.steps=3", *QUIET], "steps is not an option of the "
                                                                              "grid: it is given elsewhere"),
    "spacing's option": ("samplers", ["run={run}", "grid.spacing=beta", "+grid.alfa=1", *QUIET], "did you "
                                                                                                 "mean "
                                                                                                 "'alpha'?"),
    "device": ("samplers", ["run={run}", "device=gpu"], "no device 'gpu' here"),
    "sampler": ("samplers", ["run={run}", "sampler=ddiim", *QUIET], "no sampler named 'ddiim'; did you "
                                                                    "mean 'ddim'?"),
    "spacing": ("samplers", ["run={run}", "grid.spacing=karass", *QUIET], "did you mean 'karras'?"),
    "sampler's option": ("samplers", ["run={run}", "+options.etta=1", *QUIET], "no option of ddim named "
                                                                               "'etta'; did you mean "
                                                                               "'eta'?"),
    "unwritable": ("samplers", ["run={run}", "out={file}/samples", "steps=1", *QUIET], "{file}"),
    "samples": ("eval", ["experiment=digits", "samples={new}"], "no such folder of pictures: {new}"),
    "empty samples": ("eval", ["experiment=digits", "samples={empty}"], "no pictures in {empty}: expected "
                                                                        "files ending in"),
    "no samples": ("eval", [], "samples must be given: samples=..."),
    "metric": ("eval", ["experiment=digits", "samples={new}", "metric=[frechett]"], "no metric named "
                                                                                    "'frechett'; did you "
                                                                                    "mean 'frechet'?"),
    "typo in eval": ("eval", ["samples={new}", "refrence=x"], "no setting named 'refrence'; did you mean "
                                                              "'reference'?"),
    "an unquoted range": ("eval", ["samples=shard-000.tar", "samples=shard-001.tar"],
        "samples is given 2 times: give it once, and quote a pattern for the shell"),
    "samples with signs": ("eval", ["samples={new} [1]=#1", "metric=inception_score"], "no such folder of "
                                                                                       "pictures: {new} "
                                                                                       "[1]=#1"),
    "samples with braces": ("eval", ["samples={new}-{{000..009}}.tar", "metric=inception_score"], "{new}-"),
    "no statistics": ("eval", ["experiment=statistics", "samples={empty}", "out={new}.npz"], "statistics are written as .safetensors: out={new}.safetensors"),  # noqa: E501
    "no results": ("eval", ["experiment=report", "out={empty}"], "{empty} has no results/*.json: "
                                                                 "plain-diffusion eval writes them"),
    "many runs": ("samplers", ["-m", "run={run}", "steps=interval(1,2)"],
        "does not list its values: give steps=1,2,3 or"),
    "no flag": ("samplers", ["--multi", "run={run}"], "no flag --multi: settings are given as name=value"),
    "evaluator": ("train", [*TRAIN, "run={new}", "evaluate={{_target_:no.such}}"], "no.such"),
    "no evaluator": ("train", [*TRAIN, "run={new}", "evaluate={{a:1}}"], "evaluate must be a _target_"),
    "less than nothing held out": ("train", [*TRAIN, "run={new}", "+data.held_out=-0.3"], "held_out is a "
                                                                                          "share of each "
                                                                                          "class"),
    "a time that is none": ("samplers", ["run={run}", "grid.spacing=[900,null]"], "must be a text or a "
                                                                                  "list of numbers"),
    "figures of too few": ("eval", ["experiment=quickstart", "n=abc"], "n must be a whole number, not 'abc'"),
    "no list of rows": ("eval", ["experiment=quickstart", "rows=abc"], "rows must be a list of mappings, "
                                                                       "not 'abc'"),
    "nothing to sample": ("samplers", ["n=3"], "say what to sample, by one of: run=FOLDER, a model "
                                               "trained here; weights=FILE prompt=TEXT"),
    "two ways": ("samplers", ["run={run}", "weights={new}"], "say what to sample, by one of: run=FOLDER"),
    "a prompt for a run": ("samplers", ["run={run}", "prompt=a cat"],
        "prompt goes with weights=FILE prompt=TEXT, a published model, and this"),
    "program": ("eval", ["experiment=quickstrat"], "no experiment named 'quickstrat'; did you mean "
                                                   "'quickstart'?"),
}  # fmt: skip


@pytest.mark.parametrize(("program", "arguments", "message"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_ends_with_one_line(
    program: str, arguments: list[str], message: str, trained: Path, tmp_path: Path, command: Command
) -> None:
    """Non-zero status, one line on stderr that says what would be right, nothing on stdout; no file is lost,
    changed or made."""
    checkpoint = (trained / "checkpoint.safetensors").read_bytes()
    places = {
        "run": trained,
        "new": tmp_path / "new",
        "empty": tmp_path / "empty",
        "damaged": tmp_path / "damaged",
        "file": tmp_path / "file",
    }
    places["empty"].mkdir()
    places["damaged"].mkdir()
    (places["damaged"] / "checkpoint.safetensors").write_bytes(checkpoint[: len(checkpoint) // 2])
    places["file"].write_text("in the way")
    before = contents(tmp_path), contents(trained)
    status, out, error = command(program, *(argument.format(**places) for argument in arguments))
    assert (status, out) == (1, ""), error
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    assert message.format(**places) in error
    assert (contents(tmp_path), contents(trained)) == before
    assert not places["new"].exists()


SMALL = ("height=32", "width=64", "steps=1", *QUIET)
SD1 = ("weights={files}/sd1.safetensors", "prompt=a cat", *SMALL)
# the arguments of `plain-diffusion samplers` (in braces the files, and a new folder for all results), and
# what the line must say
PROMPT_MISTAKES: dict[str, tuple[list[str], str]] = {
    "name": (["weights=sd15", "prompt=a cat"], "no such file or folder: sd15; `plain-diffusion models download sd15` fetches that model and says"),  # noqa: E501
    "no weights": (["weights={files}/none.safetensors", "prompt=a cat"], "no such file or folder: "
                                                                         "{files}/none.safetensors"),
    "no prompt": (["weights={files}/sd1.safetensors", *SMALL], "prompt must be given"),
    "prompt alone": (["prompt=a cat"], "say what to sample, by one of: run=FOLDER"),
    "empty list": (["weights=[]", "prompt=a cat"], "nothing to load: give at least one file or folder"),
    "empty": (["weights=", "prompt=a cat"], "weights is empty: give a path, or leave the setting out"),
    "numbers for weights": (["weights=[3]", "prompt=a cat"], "no such file or folder: 3"),
    "damaged": (["weights={files}/damaged.safetensors", "prompt=a cat"], "{files}/damaged.safetensors"),
    "no model": (["weights={files}/image.png", "prompt=a cat"], "{files}/image.png"),
    "a part": (["weights={files}/unet.safetensors", "prompt=a cat", *SMALL], "this model has no vae (it has backbone): load it with a file that holds"),  # noqa: E501
    "a run for weights": (["weights={run}", "prompt=a cat", *SMALL],
        "{run} takes no prompts: draw with run={run}"),
    "weights for a run": (["run={files}/sd1.safetensors"],
        "takes prompts: draw with weights={files}/sd1.safetensors prompt=..."),
    "labels": ([*SD1, "labels=[3]"], "labels goes with run=FOLDER, a model trained here, and this is weights=...: leave one of the two out"),  # noqa: E501
    "clip": ([*SD1, "clip=true"], "clip goes with run=FOLDER"),
    "family": ([*SD1, "family=sdxll"], "no family named 'sdxll'; did you mean 'sdxl'?"),
    "other family": ([*SD1, "family=sdxl"], "has the architecture of sd1, so it cannot be of the family "
                                            "sdxl"),
    "prediction": ([*SD1, "prediction=epsilon"], "no prediction named 'epsilon'"),
    "dtype": ([*SD1, "dtype=fp8"], "no dtype named 'fp8'"),
    "part": ([*SD1, "dtype={{unet: fp16}}"], "no part of a model named 'unet'; known: backbone, vae, text"),
    "size": ([*SD1, "height=100"], "multiples of 8, not 100x64 (height x width): 96x64 is near"),
    "half a size": ([*SD1, "height=32.5"], "height must be a whole number or null, not 32.5"),
    "sampler": ([*SD1, "sampler=eulr"], "no sampler named 'eulr'; did you mean 'euler'?"),
    "option": ([*SD1, "sampler=ddim", "+options.etta=1"], "no option of ddim named 'etta'; did you mean "
                                                          "'eta'?"),
    "spacing": ([*SD1, "grid.spacing=karass"], "did you mean 'karras'?"),
    "steps": ([*SD1, "steps=0"], "steps must be a whole number >= 1, not 0"),
    "seed": ([*SD1, "seed=-1"], "seed must lie in 0 ... 2^63 - 1, not -1"),
    "n": ([*SD1, "n=0"], "n must be at least 1, not 0"),
    "guide off": ([*SD1, "guidance=1", "guide.percentile=0.9"], "guidance=1 is off"),
    "negative off": ([*SD1, "guidance=1", "negative=ugly"], "guidance is off, which ignores negative"),
    "negative of lcm": (["weights={files}/lcm.safetensors", "prompt=a", "negative=b", *SMALL],
        "takes guidance as input"),
    "long": ([*SD1, "long=drop"], "long must be one of chunk, cut, not 'drop'"),
    "numbers": ([*SD1, "+numbers.top=3"], "this family takes no numbers besides the prompt: leave top out"),
    "number": (["weights={files}/sdxl.safetensors", "prompt=a", "+numbers.tpo=3", *SMALL], "no number "
                                                                                           "named 'tpo'; "
                                                                                           "did you mean "
                                                                                           "'top'?"),
    "handover": ([*SD1, "handover=0.5"], "handover is for a refiner: give refiner=FILE too"),
    "refiner": ([*SD1, "refiner=sdxl-refiner"], "`plain-diffusion models download sdxl-refiner` fetches "
                                                "that model"),
    "other refiner": ([*SD1, "refiner={files}/sdxl.safetensors"],
        "model and refiner differ in their latents"),
    "no image": ([*SD1, "image={files}/none.png"], "no such picture: {files}/none.png"),
    "text": ([*SD1, "image={files}/text.png"], "{files}/text.png cannot be read as a picture"),
    "mask alone": ([*SD1, "mask={files}/image.png"], "mask is for an image: give image too"),
    "mask": ([*SD1, "image={files}/image.png", "mask={files}/square.png"], "square.png is 64x64, "
                                                                           "{files}/image.png 32x64 "
                                                                           "(height x width)"),
    "strength": ([*SD1, "image={files}/image.png", "strength=0"], "strength is a share of the steps in "
                                                                  "(0, 1], not 0"),
    "inpainting": (["weights={files}/inpainting.safetensors", "prompt=a", *SMALL],
        "give it an image and a mask"),
    "editing": (["weights={files}/editing.safetensors", "prompt=a", *SMALL], "give it an image to edit"),
    "tile": ([*SD1, "tile=0"], "must be at least 1, not 0"),
    "device": ([*SD1, "device=gpu"], "no device 'gpu' here"),
    "unwritable": ([*SD1, "out={files}/text.png"], "cannot write {files}/text.png/images: "
                                                   "{files}/text.png is a file"),
    "typo": ([*SD1, "negativ=ugly"], "no setting named 'negativ'; did you mean 'negative'?"),
    "from nothing": (["from={files}/none.png"], "no such picture: {files}/none.png"),
    "from another's": (["from={files}/image.png"], "image.png has no settings: it was not drawn here"),
    "from no picture": (["from={files}/text.png"], "{files}/text.png cannot be read as a picture"),
    "from what is gone": (["from={files}/moved.png"],
        "{files}/gone.safetensors, for {files}/moved.png, does not exist: say where it is by"),
    "from with labels": (["from={files}/moved.png", "labels=3"],
        "labels goes with run=FOLDER, a model trained here, and this is weights"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), PROMPT_MISTAKES.values(), ids=list(PROMPT_MISTAKES))
def test_a_mistake_with_a_prompt_ends_with_one_line(
    arguments: list[str], message: str, files: Path, trained: Path, tmp_path: Path, command: Command
) -> None:
    """As above: status 1, one line that says what would be right, and nothing is written."""
    places = {"files": files, "run": trained}
    before = sorted(files.rglob("*"))
    new = [] if any(argument.startswith("out=") for argument in arguments) else [f"out={tmp_path / 'new'}"]
    status, out, error = command("samplers", *(argument.format(**places) for argument in arguments), *new)
    assert (status, out) == (1, ""), error
    assert error.startswith("error: "), error
    assert error.count("\n") == 1, error
    assert message.format(**places) in error
    assert sorted(files.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


def test_prompts_to_images_and_again(files: Path, tmp_path: Path) -> None:
    """In processes of their own: images and a sheet, a warning in one line for what is cut, and an image
    again to the last bit."""
    settings = [f"weights={files}/sd1.safetensors", f"prompt={'red, ' * 40}(cat)", "long=cut", "n=2", *SMALL]
    drawn = subprocess.run(
        [sys.executable, "-m", "samplers", *settings],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert drawn.returncode == 0
    dropped = ", red , red , ( cat )"  # of 83 tokens all after the 75th
    assert (
        drawn.stderr
        == f"warning: a prompt is longer than the text encoder reads, and its end was dropped: {dropped!r}\n"
    )
    (out,) = (tmp_path / "samples").iterdir()
    assert drawn.stdout == f"2 images in samples/{out.name}/images, all in samples/{out.name}/grid.png\n"
    image = f"samples/{out.name}/images/000001.png"
    again = subprocess.run(
        [sys.executable, "-m", "samplers", f"from={image}", *QUIET],
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert again.returncode == 0
    assert (
        again.stdout == f"samples/{out.name}-again/images/000001.png   the same as {image}, to the last bit\n"
    )


def test_weights_and_biases_stay_silent_without_a_login(tmp_path: Path) -> None:
    """wandb=true without a login or a network: nothing printed, nothing asked, the numbers kept offline in
    the run's folder."""
    folder, home = tmp_path / "run", tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("WANDB")}
    command = [sys.executable, "-m", "train", *TRAIN, "wandb=true", f"run={folder}"]
    run = subprocess.run(
        command,
        env={**environment, "HOME": str(home)},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"trained: {folder}   sample it: plain-diffusion samplers run={folder}\n"
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
