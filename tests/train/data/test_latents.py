"""Latents and contexts of captioned images: those of the model's own encoders, computed once."""

from __future__ import annotations

import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not marked so

import models
from models import VAE, Model, TextEncoder
from models.files.tensors import open_tensors
from tests.train.data.test_pictures import draw
from train.data.latents import LatentData, LatentParams
from train.data.pictures import CaptionedImages
from train.data.rows import write_header, write_rows
from train.world import World

ALONE = World(0, 1, torch.device("cpu"))
CAPTIONS = ("a cat", "two dogs, very far away", "a cat")
TOLERANCE: dict[str, Any] = dict(rtol=1e-4, atol=1e-5)  # a batch of other size rounds otherwise


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images of different sizes."""
    for name, caption, size in zip("abc", CAPTIONS, ((40, 32), (32, 64), (64, 64)), strict=True):
        draw(tmp_path / "photos" / f"{name}.png", *size, caption=caption)
    return tmp_path / "photos"


def latents(photos: Path, model: Model, **params: Any) -> LatentData:
    return LatentData(
        CaptionedImages(photos),
        model,
        LatentParams(**{"size": 32, "batch_size": 2, **params}),
        photos.parent / "run",
    )


def prepared(photos: Path, model: Model, **params: Any) -> LatentData:
    data = latents(photos, model, **params)
    data.prepare(ALONE, progress=False)
    return data


@pytest.mark.parametrize("family", ["sd1", "sd2-v", "sdxl", "playground-v2.5", "sdxl-refiner", "chroma"])
def test_a_batch_is_what_the_encoders_make(photos: Path, family: str) -> None:
    """Mean and deviation of the latents in the diffusion model's units, the context, the vector with each
    image's sizes, and no prompt."""
    model = models.miniature(family)
    data = prepared(photos, model)
    assert (len(data), data.shape, data.num_classes) == (3, (model.shape[0], 4, 4), None)
    batch = data.__getitems__([2, 0, 1])
    numbers: dict[str, Any] = {
        "height": [64, 32, 64], "width": [64, 40, 32], "top": [0, 0, 16], "left": [0, 4, 0],
        "target_height": 32, "target_width": 32, "score": 6.0,
    }  # fmt: skip
    with torch.no_grad():
        images = torch.stack([data.images.read(i, 32, 32)[0] for i in (2, 0, 1)])
        distribution = model.require("vae").encode(images)
        text: TextEncoder = model.require("text")
        told, _ = text.encode(
            ["a cat", *CAPTIONS[:2]], numbers={name: numbers[name] for name in text.params.numbers}
        )
        null = text.null(3, like=told)
    wanted = {"x0": distribution.mean, "x0_std": distribution.std, **told.tensors}
    wanted |= {f"null.{name}": value for name, value in null.expand(3).tensors.items()}
    assert batch.keys() == wanted.keys()
    assert ("mask" in batch, "null.mask" in batch) == (family == "chroma",) * 2
    for name, value in wanted.items():
        torch.testing.assert_close(batch[name], value, **TOLERANCE)
    if family in ("sdxl", "playground-v2.5"):
        pooled = text.params.pooled_dim
        assert not batch["null.context"].any()
        assert not batch["null.vector"][:, :pooled].any()
        assert torch.equal(batch["null.vector"][:, pooled:], batch["vector"][:, pooled:])
    else:
        torch.testing.assert_close(
            batch["null.context"][0],
            text.encode([""], numbers=numbers_of(text)).condition.tensors["context"][0],
            **TOLERANCE,
        )


def numbers_of(text: TextEncoder) -> dict[str, float]:
    return dict.fromkeys(text.params.numbers, 8.0)


def test_half_precision_is_read_in_full_and_left_alone(photos: Path) -> None:
    """The encoders of a file in fp16 compute in float32, as they do after conversion, and are the same bits
    of fp16 afterwards."""
    half = models.miniature("sdxl").to(dtype=torch.float16)
    before = {name: value.clone() for name, value in half.state_dict().items()}
    batch = prepared(photos, half).__getitems__([0, 1])
    after = half.state_dict()
    assert all(
        torch.equal(after[name], value) and after[name].dtype == torch.float16
        for name, value in before.items()
    )
    whole = prepared(
        photos, models.miniature("sdxl").to(dtype=torch.float16).to(dtype=torch.float32)
    ).__getitems__([0, 1])
    assert all(torch.equal(batch[name], whole[name]) for name in whole)
    coarse = prepared(photos, half, precision="bf16").__getitems__([0, 1])
    differences = [
        float((coarse[name] - whole[name]).norm() / whole[name].norm())
        for name in ("x0", "context", "vector")
    ]
    assert all(1e-4 < difference < 0.05 for difference in differences)
    assert {value.dtype for value in coarse.values()} == {torch.float32}


def test_nothing_is_computed_twice(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same encoders, images, captions and settings find the file of the first time, whatever the network;
    a copy of them too."""
    first = prepared(photos, models.miniature("sd1"))
    assert [path.name for path in (photos.parent / "run").iterdir()] == [first.file.name]

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(VAE, "encode", refuse)
    monkeypatch.setattr(TextEncoder, "encode", refuse)
    other = models.miniature("sd1")
    with torch.no_grad():
        next(other.network.parameters()).zero_()
    copy = photos.rename(photos.parent / "moved")
    second = prepared(copy, other, batch_size=1)
    batches = [data.__getitems__([1, 2]) for data in (first, second)]
    assert batches[0].keys() == batches[1].keys()
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    with pytest.raises(RuntimeError, match="call prepare first"):
        latents(copy, other).__getitems__([0])


def change(part: str, name: str) -> Callable[[Model], None]:
    def act(model: Model) -> None:
        with torch.no_grad():
            dict(model.require(part).named_parameters())[name].view(-1)[0].add_(1e-3)

    return act


CHANGES: dict[str, tuple[dict[str, Any], Callable[[Model], None]]] = {
    "size": ({"size": 64}, lambda model: None),
    "shape": ({"size": (32, 64)}, lambda model: None),
    "chunks": ({"chunks": 2}, lambda model: None),
    "precision": ({"precision": "bf16"}, lambda model: None),
    "autoencoder": ({}, change("vae", "encoder.conv_in.weight")),
    "text encoder": ({}, change("text", "towers.clip_l.position")),
    "scale of latents": ({}, lambda model: model.spec["vae"].update(scale=0.2)),
}


@pytest.mark.parametrize(("params", "act"), CHANGES.values(), ids=list(CHANGES))
def test_what_latents_depend_on_names_their_file(
    photos: Path, params: dict[str, Any], act: Callable[[Model], None]
) -> None:
    """Another size, precision, encoder or scale is another file; so are other captions (tests of the
    fingerprint)."""
    model, changed = models.miniature("sd1"), models.miniature("sd1")
    act(changed)
    assert latents(photos, model).file != latents(photos, changed, **params).file
    photos.joinpath("a.txt").write_text("a dog")
    assert latents(photos, model).file.name not in {path.name for path in photos.parent.glob("run/*")}


def test_rows_are_written_as_they_come(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the second image the first one's rows are on the disk and the last one's are not; a run that fails
    there leaves nothing behind."""
    folder, encode = photos.parent / "run", VAE.encode
    seen: list[Path] = []

    def watched(self: VAE, images: Tensor) -> Any:
        for path in folder.rglob("*/latents-*"):
            seen.append(Path(shutil.copy(path, photos.parent / f"{len(seen)}.safetensors")))
        return encode(self, images)

    monkeypatch.setattr(VAE, "encode", watched)
    data = prepared(photos, models.miniature("sd1"), batch_size=1)
    assert seen[0].stat().st_size == 0
    whole, *parts = (open_tensors(path).tensors["x0"].mapped().clone() for path in (data.file, *seen[1:]))
    assert [[torch.equal(part[i], whole[i]) for i in range(3)] for part in parts] == [
        [True, False, False],
        [True, True, False],
    ]
    data.file.unlink()

    def fails(self: VAE, images: Tensor) -> Any:
        if any(path.stat().st_size for path in folder.rglob("*/latents-*")):
            raise RuntimeError("no memory")
        return encode(self, images)

    monkeypatch.setattr(VAE, "encode", fails)
    with pytest.raises(RuntimeError, match="no memory"):
        prepared(photos, models.miniature("sd1"), batch_size=1)
    assert not list(folder.iterdir())


def test_a_file_of_rows_is_a_safetensors_file(tmp_path: Path) -> None:
    """Rows of several precisions, written in any order, as the safetensors library reads them."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(5, 3, 1, generator=generator).bfloat16(),
        "b": torch.randn(4, 7, generator=generator),
        "c": torch.ones(1, 9).half(),
    }
    with open(tmp_path / "rows.safetensors", "wb") as file:
        starts = write_header(
            file, {name: value.to("meta") for name, value in tensors.items()}, {"made from": "é"}
        )
        for name, value in tensors.items():
            for row in reversed(range(0, len(value), 2)):
                write_rows(file, starts[name], row, value[row : row + 2])
    with safe_open(tmp_path / "rows.safetensors", "pt") as read:
        assert read.metadata() == {"made from": "é"}
        assert all(torch.equal(read.get_tensor(name), value) for name, value in tensors.items())
        assert set(read.keys()) == tensors.keys()
    assert torch.equal(open_tensors(tmp_path / "rows.safetensors").tensors["b"].mapped(), tensors["b"])


def test_files_may_be_shared(photos: Path) -> None:
    """latents.folder is where they are kept, and the file says what it was made from."""
    data = prepared(photos, models.miniature("sd1"), folder=str(photos.parent / "shared"))
    assert data.file.parent == photos.parent / "shared"
    assert '"size": [32, 32]' in open_tensors(data.file).metadata["made from"]
    assert not (photos.parent / "run").exists()


def test_long_captions_are_cut_with_a_warning_or_read_in_pieces(photos: Path) -> None:
    """75 tokens by default; chunks=2 reads 150, gives every caption and "no prompt" that length, and is
    silent."""
    photos.joinpath("b.txt").write_text("word " * 100)
    model = models.miniature("sd1")
    with pytest.warns(
        UserWarning,
        match=r"1 of 3 captions are too long and were cut, first that of .*b\.png: "
        r"latents\.chunks=2 reads more",
    ):
        short = prepared(photos, model).__getitems__([0, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        long = prepared(photos, model, chunks=2).__getitems__([0, 1])
    assert [batch["context"].shape[1] for batch in (short, long)] == [77, 154]
    assert [batch["null.context"].shape[1] for batch in (short, long)] == [77, 154]
    torch.testing.assert_close(long["context"][:, :77], short["context"], **TOLERANCE)


def test_other_processes_wait_for_the_first(photos: Path) -> None:
    """One process computes; another one returns when the file is there, with the same rows."""
    model = models.miniature("sd1")
    first, second = latents(photos, model), latents(photos, model)
    store = HashStore()
    waiting = threading.Thread(
        target=second.prepare, args=(World(1, 2, torch.device("cpu"), store), False), daemon=True
    )
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    assert not first.file.exists()
    first.prepare(World(0, 2, torch.device("cpu"), store), progress=False)
    waiting.join(10)
    assert not waiting.is_alive()
    assert torch.equal(first.__getitems__([1])["x0"], second.__getitems__([1])["x0"])


def without(part: str) -> Callable[[], Model]:
    def made() -> Model:
        model = models.miniature("sd1")
        setattr(model, part, None)
        return model

    return made


def mixed() -> Model:
    model = models.miniature("sd1")
    model.text = models.miniature("sd2").text
    return model


REFUSED: dict[str, tuple[Callable[[], Model], dict[str, Any], str]] = {
    "inpainting": (
        lambda: models.miniature("sd1", in_channels=9),
        {},
        "sees 5 channels besides x, for inpainting or editing",
    ),
    "distilled": (
        lambda: models.miniature("lcm"),
        {},
        "this model is distilled, to few steps or to follow guidance",
    ),
    "told guidance": (
        lambda: models.miniature("flux-dev"),
        {},
        "this model is distilled, to few steps or to follow guidance",
    ),
    "schnell": (
        lambda: models.miniature("flux-schnell"),
        {},
        r"FLUX.1 \[schnell\] is distilled to few steps",
    ),
    "turbo": (
        lambda: models.miniature("sdxl-turbo"),
        {},
        "SDXL-Turbo is distilled to few steps.* or with model.family=sdxl its network",
    ),
    "turbo of SD 2": (
        lambda: models.miniature("sd-turbo"),
        {},
        "SD-Turbo is distilled to few steps.* or with model.family=sd2 its",
    ),
    "no autoencoder": (without("vae"), {}, "has no vae"),
    "no text encoder": (without("text"), {}, "has no text"),
    "no network": (without("backbone"), {}, "has no backbone"),
    "parts of two families": (
        mixed,
        {},
        "makes contexts of 128 and vectors of None, the network takes 64 and None",
    ),
    "size": (
        lambda: models.miniature("sd1"),
        {"size": 500},
        "multiples of 8, not 500x500 .*: 496x496 is near",
    ),
    "no size": (lambda: models.miniature("sd1"), {"size": 0}, "size must be at least 1, not 0"),
    "no batch": (lambda: models.miniature("sd1"), {"batch_size": 0}, "batch_size must be at least 1, not 0"),
    "no chunk": (lambda: models.miniature("sd1"), {"chunks": 0}, "chunks must be at least 1, not 0"),
}


@pytest.mark.parametrize(("make", "params", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_trained_is_refused(
    photos: Path, make: Callable[[], Model], params: dict[str, Any], message: str
) -> None:
    """Before anything is computed, in one line."""
    with pytest.raises(ValueError, match=message) as refusal:
        latents(photos, make(), **params)
    assert "\n" not in str(refusal.value)


def test_the_size_is_the_models_own_unless_given(photos: Path) -> None:
    """None is what the model was trained on."""
    model = models.miniature("sd1")
    assert latents(photos, model, size=None).size == (128, 128)
    assert latents(photos, model, size=(32, 64)).shape == (4, 4, 8)
