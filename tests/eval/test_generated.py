"""Pictures that are drawn when they are asked for, and sources of all kinds by name."""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from eval.images import generated
from eval.images.generated import GeneratedPictures, generated_by, open_generated
from eval.images.open import open_source
from models.layers import blocks
from samplers import generate
from samplers.pictures import save_png, to_uint8
from samplers.run import SampleParams, run
from tests.samplers.test_run import NETWORK, saved
from train.data.folder import FolderPictures
from train.data.npz import NpzPictures
from train.data.source import Source
from train.data.tar import TarPictures

PROMPTS = ["a corgi", "a cat on a mat", "rain"]
SMALL: dict[str, Any] = {"height": 32, "width": 64, "steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of ten classes, of none, and of prompts."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    saved(place / "classes.safetensors")
    saved(place / "plain.safetensors", network={**NETWORK, "num_classes": None})
    models.save(models.miniature("sd1"), place / "sd1.safetensors", layout="ldm")
    (place / "prompts.txt").write_text("\n".join(PROMPTS))
    lines = [{"file_name": f"{i}.png", "caption": prompt} for i, prompt in enumerate(PROMPTS)]
    (place / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return place


def of_run(folder: Path, **settings: Any) -> GeneratedPictures:
    return open_generated(
        {"run": str(folder / "classes.safetensors"), "n": 12, "steps": 3, "device": "cpu", **settings}
    )


def of_prompts(folder: Path, **settings: Any) -> GeneratedPictures:
    return open_generated(
        {
            "weights": str(folder / "sd1.safetensors"),
            "prompts": str(folder / "prompts.txt"),
            **SMALL,
            **settings,
        }
    )


@pytest.mark.parametrize("of", [of_run, of_prompts])
def test_a_machine_without_a_compiler_is_noticed_first(
    of: Callable[..., GeneratedPictures], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """compile is refused before anything is drawn; with a compiler, calls are counted as without."""
    monkeypatch.setattr(blocks, "_check_compiler", lambda *_: None)
    assert of(folder, compile=True).calls == of(folder).calls

    def refuse(*_: object) -> None:
        raise ValueError("torch finds no compiler")

    monkeypatch.setattr(blocks, "_check_compiler", refuse)
    monkeypatch.setattr(generated, "calls_per_image", lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(ValueError, match="no compiler"):
        of(folder, compile=True)


def read(source: Source, indices: list[int]) -> Tensor:
    """Pictures that can be read, of one size."""
    found = [picture for picture in source.read(indices) if isinstance(picture, Tensor)]
    assert len(found) == len(indices)
    return torch.stack(found)


def refusal(open_it: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    """What is said, in one line."""
    with pytest.raises(kind) as said:
        open_it()
    assert "\n" not in str(said.value)
    return str(said.value)


def test_a_run_draws_what_the_program_saves(folder: Path, tmp_path: Path) -> None:
    """The same pixels under the same seeds and classes as python -m samplers writes to disk, to the last bit
    in the same batches."""
    wanted: dict[str, Any] = {
        "n": 12,
        "seed": 5,
        "sampler": "ddpm",
        "steps": 4,
        "guidance": 2.0,
        "batch_size": 5,
        "device": "cpu",
    }
    weights = str(folder / "classes.safetensors")
    out = run({"run": weights, "out": str(tmp_path / "out"), "progress": False, **wanted})
    written, source = FolderPictures(out / "images"), open_generated({"run": weights, **wanted})
    assert [
        f"{label}/{int(name.split()[1]):06d}.png"
        for label, name in zip(source.labels or (), source.names, strict=True)
    ] == [f"{i % 10}/{5 + i:06d}.png" for i in range(12)]
    place = {name: i for i, name in enumerate(written.names)}
    order = [place[f"{i % 10}/{5 + i:06d}.png"] for i in range(12)]
    assert torch.equal(read(source, list(range(12))), read(written, order))


@pytest.mark.parametrize("make", [of_run, of_prompts])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_picture_does_not_depend_on_the_others(
    make: Callable[..., GeneratedPictures], sampler: str, folder: Path
) -> None:
    """In any order, alone or together, in batches of any size: equal but for rounding, one of 255; and
    pictures differ from each other."""
    source = make(folder, sampler=sampler, n=5)
    whole = read(source, [0, 1, 2, 3, 4])
    assert whole.dtype == torch.uint8
    assert whole.shape[1] == 3
    small = make(folder, sampler=sampler, n=5, batch_size=1)
    for indices in ([3], [4, 0], [2, 2, 1]):
        for one in (source, small):
            assert (read(one, indices).int() - whole[indices].int()).abs().max() <= 1
    assert all((whole[i].int() - whole[j].int()).abs().max() > 8 for i in range(5) for j in range(i))
    assert source.read([]) == []


def test_prompts_are_drawn_in_turn(folder: Path) -> None:
    """Each once by default, as often as asked for otherwise, with a seed of its own each time; files and
    lists alike."""
    source = of_prompts(folder, n=5, seed=7)
    assert source.prompts == [*PROMPTS, *PROMPTS[:2]]
    assert list(source.names) == ["seed 7", "seed 8", "seed 9", "seed 10", "seed 11"]
    assert source.labels is None
    model = models.load(folder / "sd1.safetensors")
    exact = generate(model, PROMPTS[1], seeds=[11], height=32, width=64, steps=2)
    assert (read(source, [4]).int() - to_uint8(exact, low=0).int()).abs().max() <= 1
    for prompts in (PROMPTS, str(folder / "prompts.jsonl")):
        assert of_prompts(folder, prompts=prompts).prompts == PROMPTS


def test_classes_are_drawn_in_turn(folder: Path) -> None:
    """All of them, or those asked for, by name where they have names; a model without classes has no
    labels."""
    assert of_run(folder).labels == [str(i % 10) for i in range(12)]
    assert of_run(folder, labels=[3, 7], n=3).labels == ["3", "7", "3"]
    model = models.load(folder / "classes.safetensors")
    model.spec["classes"] = list("abcdefghij")
    assert generated_by(model, SampleParams(run="a run", n=3, labels=("d", 7), steps=1)).labels == [
        "d",
        "h",
        "d",
    ]
    assert (
        open_generated({"run": str(folder / "plain.safetensors"), "n": 2, "steps": 1, "device": "cpu"}).labels
        is None
    )


@pytest.mark.parametrize(
    ("settings", "calls"),
    [
        ({}, 10), ({"guidance": 0.0}, 10), ({"guidance": 1.5}, 20), ({"guidance": -1.0}, 20),
        ({"sampler": "heun"}, 19), ({"sampler": "heun", "guidance": 2.0}, 38), ({"sampler": "rk4"}, 37),
        ({"sampler": "ddpm", "guidance": 1.5}, 20), ({"sampler": "sit_sde", "guidance": 1.5}, 20),
        ({"guidance": 1.5, "guide": {"interval": [0.25, 0.75]}}, 10 + 5),  # at 0.7, 0.6, ..., 0.3
        ({"sampler": "heun", "guidance": 1.5, "guide": {"interval": [0.25, 0.75]}}, 19 + 10),
        ({"guidance": 1.5, "guide": {"zero_from": 0.95}}, 18),
        ({"guidance": 0.0, "guide": {"rule": {"name": "apg"}}}, 20),
    ],
)  # fmt: skip
def test_calls_are_counted(settings: dict[str, Any], calls: int, folder: Path) -> None:
    """As the solver makes them on the run's own grid, before anything is drawn; guidance doubles them where
    it is on, which it is not at scale 1 and 0. Seconds are those of a picture, once one is drawn.
    """
    source = of_run(folder, steps=10, **settings)
    assert source.calls == calls
    assert math.isnan(source.seconds)
    source.read([0, 1])
    assert source.seconds > 0


def test_the_first_batch_is_no_part_of_the_time(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """By a clock that gives the first batch 8 seconds and the others 1: a single batch's time is its own,
    that of more is the others'."""
    source = of_run(folder, n=5, batch_size=2)
    clock = iter([0, 8, 8, 9, 9, 10, 10, 11])
    monkeypatch.setattr("eval.images.generated.time.perf_counter", lambda: next(clock))
    source.read([0, 1])
    assert source.seconds == 4
    source.read([2, 3, 4])
    assert source.seconds == pytest.approx(2 / 3)
    source.read([0])
    assert source.seconds == pytest.approx(3 / 4)


def test_calls_of_prompts_are_counted(folder: Path) -> None:
    """The prompt and what leads away from it are two; guidance=1 needs one."""
    assert of_prompts(folder, sampler="ddim", guidance=3.0).calls == 4
    assert of_prompts(folder, sampler="heun", guidance=1.0).calls == 3
    model = models.load(folder / "sd1.safetensors")
    seen = 0

    def count(module: Any, arguments: tuple[Tensor, ...]) -> None:
        nonlocal seen
        seen += len(arguments[0])

    model.network.register_forward_pre_hook(count)
    generate(model, PROMPTS[:2], steps=2, sampler="ddim", guidance=3.0, height=32, width=64)
    assert seen == 2 * 4


def test_settings_say_all_that_pictures_depend_on(folder: Path, tmp_path: Path) -> None:
    """Plain values, completed by what the model is meant for; the same wherever files lie and however many
    are drawn at once."""
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes((folder / "classes.safetensors").read_bytes())
    whole = of_run(folder, guidance=2.0).settings
    assert whole == of_run(folder, run=str(moved), guidance=2.0, batch_size=3, n=4).settings
    assert json.loads(json.dumps(whole)) == whole
    assert (whole["sampler"], whole["steps"], whole["seed"], whole["guidance"]) == ("ddim", 3, 0, 2.0)
    assert whole["fingerprint"] == models.load(moved).fingerprint
    for other in (
        {"seed": 1},
        {"steps": 4},
        {"options": {"eta": 0.5}},
        {"grid": {"spacing": "linspace"}},
        {"labels": [3]},
    ):
        assert of_run(folder, **{"guidance": 2.0, **other}).settings != whole
    told = of_prompts(folder, max_pixels=99, offload=False).settings
    assert told["fingerprint"] == models.load(folder / "sd1.safetensors").fingerprint
    assert told == of_prompts(folder, prompts=PROMPTS).settings
    assert told != of_prompts(folder, prompts=PROMPTS[::-1]).settings
    assert (told["height"], told["width"], told["steps"]) == (32, 64, 2)


def test_pictures_that_are_not_finite_stop_the_drawing(folder: Path) -> None:
    """A model that has diverged raises, and the seed is named."""
    source = open_generated(
        {"run": str(folder / "plain.safetensors"), "n": 3, "steps": 2, "seed": 40, "device": "cpu"}
    )
    with torch.no_grad():
        next(source._model.network.parameters()).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="the first of seed 41"):
        source.read([1, 2])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "give what draws: run, a model trained here, or weights and prompts"),
        ({"run": "a", "weights": "b"}, "give what draws: run, a model trained here, or weights and prompts"),
        ({"run": "classes"}, "give the number of pictures to draw: n: 10000, say"),
        ({"run": "classes", "n": 0}, "n must be at least 1, not 0"),
        ({"run": "classes", "n": 2.5}, "n must be a whole number, not 2.5"),
        (
            {"run": "classes", "n": 2, "stesp": 3},
            "no setting of what a run draws named 'stesp'; did you mean 'steps'?",
        ),
        ({"run": "classes", "n": 2, "out": "x"}, "no setting of what a run draws named 'out'"),
        ({"run": "classes", "n": 2, "sampler": "dimm"}, "no sampler named 'dimm'; did you mean 'ddim'?"),
        (
            {"run": "classes", "n": 2, "options": {"etta": 1.0}},
            "no option of ddim named 'etta'; did you mean 'eta'?",
        ),
        ({"run": "classes", "n": 2, "labels": 10}, "label 10 is out of range: classes are 0 to 9"),
        (
            {"run": "classes", "n": 2, "seed": 2**63 - 1},
            "seeds must lie in 0 ... 2^63 - 1, but 2 seeds from 9223372036854775807 on",
        ),
        ({"run": "classes", "n": 2, "sha256": {"run": "0" * 64}}, "has changed: its SHA-256 is"),
        ({"run": "plain", "n": 2, "labels": 1}, "this model has no classes: leave labels out"),
        ({"run": "sd1", "n": 2}, "is a model that takes prompts: give weights: "),
        ({"weights": "sd1"}, "give what to draw: prompts: FILE, or a list of them"),
        ({"weights": "sd1", "prompts": []}, "prompts must be one or more, none of them empty, not []"),
        (
            {"weights": "sd1", "prompts": ["a", ""]},
            "prompts must be one or more, none of them empty, not ['a', '']",
        ),
        ({"weights": "sd1", "prompts": 5}, "prompts must be a text or a list of texts, not 5"),
        (
            {"weights": "sd1", "prompts": ["a"], "image": "a.png"},
            "no setting of what prompts draw named 'image'",
        ),
        ({"weights": "sd1", "prompts": ["a"], "height": 33}, "sides are positive multiples of"),
        ({"weights": "classes", "prompts": ["a"]}, "takes no prompts"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(spec: dict[str, Any], message: str, folder: Path) -> None:
    """Before anything is drawn, in one line, with the nearest known name."""
    files = {
        key: str(folder / f"{spec[key]}.safetensors")
        for key in ("run", "weights")
        if len(str(spec.get(key, ""))) > 1
    }
    assert message in refusal(lambda: open_generated({"device": "cpu", **spec, **files}))
    assert "no such file of prompts: none.txt" in refusal(
        lambda: of_prompts(folder, prompts="none.txt"), OSError
    )


# By name ----------------------------------------------------------------------------------------------------


def test_sources_are_opened_by_what_they_are(folder: Path, tmp_path: Path) -> None:
    """A folder, arrays, shards, a description of what draws; prompts from a file go to all that hold
    pictures."""
    pixels = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    save_png(pixels, tmp_path / "pictures" / "a.png", low=0)
    np.savez(tmp_path / "a.npz", np.zeros((1, 8, 8, 3), np.uint8))
    np.save(tmp_path / "a.npy", np.zeros((1, 8, 8, 3), np.uint8))
    with tarfile.open(tmp_path / "a-0.tar", "w") as archive:
        archive.add(tmp_path / "pictures" / "a.png", "a.png")
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    expected = {
        "pictures": FolderPictures,
        "a.npz": NpzPictures,
        "a.npy": NpzPictures,
        "a-{0..0}.tar": TarPictures,
        "a-*.tar": TarPictures,
    }
    for name, kind in expected.items():
        source = open_source(f"{tmp_path}/{name}", str(tmp_path / "prompts.txt"))
        assert isinstance(source, kind)
        assert (len(source), source.prompts) == (1, ["a prompt"])
        assert open_source(tmp_path / name).prompts is None
    assert isinstance(
        open_source({"run": str(folder / "classes.safetensors"), "n": 1, "steps": 1, "device": "cpu"}),
        GeneratedPictures,
    )


def test_sources_that_are_not_there_are_named(tmp_path: Path) -> None:
    """With the nearest name that is; and files that hold no pictures."""
    (tmp_path / "samples").mkdir()
    (tmp_path / "notes.md").write_text("")
    assert refusal(lambda: open_source(tmp_path / "sample"), OSError) == (
        f"no such folder of pictures: {tmp_path / 'sample'}; did you mean {tmp_path / 'samples'}?"
    )
    assert (
        refusal(lambda: open_source(tmp_path / "deep" / "x"), OSError)
        == f"no such folder of pictures: {tmp_path / 'deep' / 'x'}"
    )
    assert refusal(lambda: open_source(tmp_path / "notes.md")) == (
        f"{tmp_path / 'notes.md'} has no pictures: give a folder, an .npz or .npy file, or .tar files"
    )
    assert (
        refusal(lambda: open_source(tmp_path / "a.npz"), OSError)
        == f"no such file of pictures: {tmp_path / 'a.npz'}"
    )
    assert refusal(lambda: open_source(f"{tmp_path}/b.tar"), OSError) == f"no such tar file: {tmp_path}/b.tar"
    assert "give the prompts of a model that draws with its weights" in refusal(
        lambda: open_source({"run": "a"}, "prompts.txt")
    )
