"""Prompts to image files: what is drawn, where it goes, and that every image can be drawn again from what it
says of itself."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch import nn

import models
from configs import compose
from diffusion.settings import of_kind, recorded
from models.files.text import read_json
from samplers import generate, read_image, read_mask
from samplers.modes import draw_config
from samplers.pictures import read_settings, save_png
from samplers.results import Outcome
from samplers.run import SampleParams
from samplers.text_to_image import TextToImageParams, load_model, text_to_image

SMALL: dict[str, Any] = {"height": 32, "width": 64, "steps": 2, "device": "cpu"}
NETWORK = {
    "name": "dit",
    "in_channels": 1,
    "image_size": 8,
    "hidden": 16,
    "depth": 1,
    "heads": 2,
    "num_classes": 10,
}
RUN: dict[str, Any] = {
    "network": NETWORK,
    "schedule": {"name": "flow"},
    "prediction": "flow",
    "shape": [1, 8, 8],
}
PROMPT = 'A corgi, (red:1.3) and "wet" on ${grass} = [fun]'


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models and pictures."""
    folder = tmp_path_factory.mktemp("files")
    models.save(models.miniature("sd1"), folder / "sd1.safetensors", layout="ldm")
    models.save(models.miniature("sd1"), folder / "sd1", layout="diffusers")
    models.save(models.miniature("sd1", seed=1), folder / "other.safetensors", layout="ldm")
    models.save(models.miniature("sdxl"), folder / "sdxl.safetensors", layout="ldm")
    models.save(models.miniature("sdxl-refiner"), folder / "refiner.safetensors", layout="ldm")
    models.save(models.miniature("sd1", in_channels=9), folder / "inpainting.safetensors", layout="ldm")
    for name, channels in (("image", 3), ("mask", 1)):
        save_png(
            torch.rand(channels, 48, 80, generator=torch.Generator().manual_seed(channels)),
            folder / f"{name}.png",
            low=0,
        )
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results go where the program is called."""
    monkeypatch.chdir(tmp_path)


def run(**settings: Any) -> tuple[Outcome, str]:
    """As the program with these settings, paths in them as text."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    return draw_config({"progress": False, **plain})


def again(path: Path, **changes: Any) -> tuple[Outcome, str]:
    return run(**{"from": path, **changes})


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


# What is drawn, and where it goes ---------------------------------------------------------------------------


def test_images_are_those_of_generate(files: Path) -> None:
    """Three seeds in batches of two, PNGs rounded to the nearest, a sheet of all, and what the folder holds:
    as on the command line."""
    given = [
        f"weights={files}/sd1.safetensors",
        f"prompt={PROMPT}",
        "n=3",
        "seed=5",
        "batch_size=2",
        "weighted=true",
        "progress=false",
    ]
    (out, images), said = draw_config(
        compose("samplers", [*given, "height=32", "width=64", "steps=2", "device=cpu"])
    )
    assert re.fullmatch(r"samples/a-corgi-red-1-3-and-wet-on-grass-fun-[0-9a-f]{8}", str(out))
    assert images == [out / "images" / f"00000{seed}.png" for seed in (5, 6, 7)]
    assert said == ""
    model = models.load(files / "sd1.safetensors")
    for image, seed in zip(images, (5, 6, 7), strict=True):
        exact = generate(model, PROMPT, seeds=[seed], weighted=True, steps=2, height=32, width=64)[0] * 255
        with Image.open(image) as picture:
            assert np.abs(np.asarray(picture) - exact.permute(1, 2, 0).numpy()).max() <= 0.51
    with Image.open(out / "grid.png") as sheet:
        assert sheet.size == (2 * 64 + 1, 2 * 32 + 1)
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "images", "samples.json"]


def test_a_preview_is_written_while_it_draws(files: Path) -> None:
    """After every second of four steps, of the batch together; the images are those of a drawing without, in
    the same folder."""
    same = {"weights": str(files / "sd1.safetensors"), "prompt": "a cat", **SMALL, "steps": 4, "n": 2}
    (out, images), _ = run(**same, preview=2)
    assert read_settings(out / "preview.png") == {"step": 4}
    with Image.open(out / "preview.png") as shown:
        assert shown.size == (2 * 64 + 1, 32)
    before = [pixels(image) for image in images]
    (again_out, images), _ = run(**same)
    assert (again_out, [pixels(image) for image in images]) == (out, before)
    with pytest.raises(ValueError, match="preview must be at least 1"):
        run(**same, preview=0)


def test_an_image_says_what_it_was_drawn_with(files: Path) -> None:
    """All of it: settings as they came to be, weights and their SHA-256, versions, device, and the batch."""
    (_, images), _ = run(
        weights=[f"{files}/sdxl.safetensors"], refiner=files / "refiner.safetensors", prompt="a cat",
        negative="ugly, bad", n=2,
        numbers={"top": 16}, guide={"interval": [0.1, 0.9]}, dtype={"vae": "bf16"}, tile=8, clip_skip=1,
        **{**SMALL, "steps": 8},
    )  # fmt: skip
    said = read_settings(images[1])
    about, sha256 = said.pop("provenance"), said.pop("sha256")
    assert said == {
        "weights": [str(files / "sdxl.safetensors")], "refiner": [str(files / "refiner.safetensors")],
        "handover": 0.8, "ema": True,
        "dtype": {"vae": "bf16"}, "prompt": "a cat", "negative": "ugly, bad", "weighted": False,
        "long": "chunk", "height": 32, "width": 64,
        "numbers": {"height": 32, "width": 64, "top": 16, "left": 0, "target_height": 32, "target_width": 64,
            "score": 6}, "seed": 1,
        "sampler": "dpmpp_2m", "steps": 8, "grid": {"spacing": "karras"}, "guidance": 7.0,
        "guide": {"interval": [0.1, 0.9]},
        "tile": 8, "clip_skip": 1, "device": "cpu", "apart": False,
        "compile": False, "batch": {"seed": 0, "n": 2},
    }  # fmt: skip
    for name, file in (("weights", "sdxl"), ("refiner", "refiner")):
        assert sha256[name] == models.load(files / f"{file}.safetensors").fingerprint
    assert about["torch"] == torch.__version__
    assert about["model"] == "sdxl, eps, backbone fp32, vae bf16, text fp32"
    assert {"python", "numpy", "device", "git", "plain-diffusion"} <= about.keys()
    (_, same), verdict = again(images[1])
    assert verdict == f"the same as {images[1]}, to the last bit"
    assert pixels(same[0]) == pixels(images[1])


def test_settings_have_folders_of_their_own(files: Path) -> None:
    """More seeds join the images that are there, other settings go elsewhere; an `out` that holds others is
    refused, and untouched."""
    same = {"weights": str(files / "sd1.safetensors"), "prompt": "a cat", **SMALL}
    (first, _), _ = run(**same)
    (second, images), _ = run(**same, seed=1, batch_size=1)
    assert first == second
    assert sorted(path.name for path in (first / "images").iterdir()) == ["000000.png", "000001.png"]
    assert not (first / "grid.png").exists()  # of one image
    (other, _), _ = run(**same, guidance=3)
    assert other != first
    before = pixels(images[0])
    with pytest.raises(ValueError, match=r"already holds images of other settings: give another out="):
        run(**same, guidance=3, seed=1, out=first)
    assert pixels(images[0]) == before
    assert text_to_image({**same, "seed": 2}) == first


def test_nothing_said_is_as_the_model_is_meant(tmp_path: Path) -> None:
    """Size, sampler, steps, guidance: of a model of ours, which says so itself."""
    models.save(models.miniature("lcm"), tmp_path / "lcm.safetensors")
    (_, images), _ = run(weights="lcm.safetensors", prompt="a cat", device="cpu")
    said = read_settings(images[0])
    assert (said["sampler"], said["steps"], said["guidance"], said["height"], said["seed"]) == (
        "lcm",
        4,
        8.0,
        128,
        0,
    )
    assert said["grid"]["spacing"] == "lcm"


@pytest.mark.parametrize(
    ("size", "wanted"), [({"width": 64}, (128, 64)), ({"height": 48, "width": 64}, (48, 64)), ({}, (48, 80))]
)
def test_a_picture_is_made_to_cover_the_size(
    size: dict[str, int], wanted: tuple[int, int], files: Path
) -> None:
    """Image and mask: scaled and cropped alike, to what the model was trained on where only one side is
    given; without, as they are."""
    given: dict[str, Any] = {"image": files / "image.png", "mask": files / "mask.png"}
    (_, images), _ = run(
        weights=files / "inpainting.safetensors", prompt="a cat", steps=1, device="cpu", **given, **size
    )
    said = read_settings(images[0])
    assert (said["height"], said["width"], said["strength"]) == (*wanted, 1.0)
    exact = generate(
        models.load(files / "inpainting.safetensors"), "a cat", image=read_image(given["image"], wanted),
        mask=read_mask(given["mask"], wanted), steps=1,
    )  # fmt: skip
    assert float((read_image(images[0]) - exact).abs().max()) <= 0.51 / 255


def test_dtype_family_and_prediction(files: Path) -> None:
    """They reach the model; the SHA-256 is that of the files all the same."""
    same = {"weights": str(files / "sd1.safetensors"), "prompt": "a cat", **SMALL, "steps": 1}
    plain = read_settings(run(**same)[0].images[0])
    assert plain["provenance"]["model"] == "sd1, eps, backbone fp32, vae fp32, text fp32"
    for change, model in (
        ({"dtype": "bf16"}, "sd1, eps, backbone bf16, vae bf16, text bf16"),
        ({"dtype": {"backbone": "bf16"}}, "sd1, eps, backbone bf16, vae fp32, text fp32"),
        ({"family": "lcm", "prediction": "v"}, "lcm, v, backbone fp32, vae fp32, text fp32"),
    ):
        said = read_settings(run(**same, **change)[0].images[0])
        assert said["provenance"]["model"] == model
        assert said["sha256"] == plain["sha256"]


def test_a_text_is_taken_as_it_stands() -> None:
    """Commas, brackets, quotes, dollars and equal signs; quotes around all of it are the shell's; a list is a
    list."""
    composed = compose(
        "samplers",
        [
            f"prompt={PROMPT}",
            "negative='it is bad'",
            "image=my (cat) [1].png",
            "weights=[a.st, b.st]",
            "out=3",
        ],
    )
    assert composed["prompt"] == PROMPT
    assert composed["negative"] == "it is bad"
    assert (composed["image"], composed["weights"], composed["out"]) == (
        "my (cat) [1].png",
        ["a.st", "b.st"],
        "3",
    )
    assert compose("samplers", ["prompt=", "mask=null"])["prompt"] == ""
    assert compose("samplers", ["prompt=", "mask=null"])["mask"] is None
    assert compose("samplers", ["weights=a, b"])["weights"] == "a, b"


# Flows ------------------------------------------------------------------------------------------------------

FLOWS: dict[str, dict[str, Any]] = {
    "flux-dev": {"negative": "ugly", "true_cfg": 2.0, "guidance": 3.0},
    "flux-schnell": {},
    "flux-canny": {"image": "{}/image.png"},
    "flux-fill": {"image": "{}/image.png", "mask": "{}/mask.png", "strength": 0.6},
    "sd3.5-medium": {"negative": "ugly", "weighted": True},
}


@pytest.mark.parametrize(("family", "settings"), FLOWS.items(), ids=list(FLOWS))
def test_flows_are_drawn_from_any_files(
    family: str, settings: dict[str, Any], files: Path, tmp_path: Path
) -> None:
    """One call for files of their own and T5's tokenizer beside them, for a single file, and for a folder;
    each can be drawn again."""
    model = models.miniature(family)
    models.save(model, tmp_path / "separate", layout="separate")
    models.save(model, tmp_path / "folder", layout="diffusers")
    models.save(model, tmp_path / "single.safetensors", layout="ldm")
    parts = sorted(str(path) for path in (tmp_path / "separate").glob("*.safetensors"))
    tokens = tmp_path / "separate" / "tokenizer.json"
    assert (len(parts), tokens.exists()) == (5 if family.startswith("flux") else 6, True)  # with TAESD
    given = {
        name: value.format(files) if isinstance(value, str) else value for name, value in settings.items()
    }
    size: dict[str, Any] = {} if "image" in given else {"height": 48, "width": 80}
    # In float64: a product with a single row rounds, on some processors, by where in memory the file puts its
    # weights.
    given |= {"prompt": "a (red:1.3) cat", "steps": 2, "n": 2, "device": "cpu", "dtype": "fp64", **size}
    single = [str(tmp_path / "single.safetensors"), str(tokens)]
    (_, images), _ = run(weights=parts, **given)
    assert pixels(images[0]) != pixels(images[1])
    for changes in ({}, {"weights": single}, {"weights": str(tmp_path / "folder")}):
        (_, once_more), said = again(images[1], **changes)
        assert said == f"the same as {images[1]}, to the last bit"
        assert pixels(once_more[0]) == pixels(images[1])
    about = read_settings(images[1])
    assert (about["height"], about["width"], about["sampler"], about["seed"]) == (48, 80, "euler", 1)
    assert about["guidance"] == given.get("guidance", models.FAMILIES[family].sampling["guidance"])
    assert (about.get("true_cfg"), about.get("strength")) == (given.get("true_cfg"), given.get("strength"))
    direct = {name: value for name, value in settings.items() if name not in ("image", "mask")} | size
    for name, read in (("image", read_image), ("mask", read_mask)):
        if name in given:
            direct[name] = read(given[name])
    exact = generate(model, "a (red:1.3) cat", seeds=[0, 1], steps=2, **direct)
    assert all(
        float((read_image(path) - image).abs().max()) <= 0.51 / 255
        for path, image in zip(images, exact, strict=True)
    )


# Once more --------------------------------------------------------------------------------------------------

AGAIN: dict[str, dict[str, Any]] = {
    "noise on the way": {"weights": "{}/sd1.safetensors", "n": 3, "batch_size": 2, "seed": 2,
        "sampler": "dpmpp_sde", "weighted": True},
    "guided": {"weights": "{}/sd1", "negative": "ugly", "guide": {"rule": {"name": "apg", "eta": 0.5}},
        "dtype": {"text": "bf16"}, "n": 2},
    "painted": {
        "weights": "{}/inpainting.safetensors", "image": "{}/image.png", "mask": "{}/mask.png",
        "strength": 0.7, "n": 2, "tile": 4,
        "grid": {"spacing": [900, 500, 100]}, "steps": None, "offload": True, "options": {"eta": 0.5},
        "sampler": "ddim",
    },
}  # fmt: skip


@pytest.mark.parametrize("settings", AGAIN.values(), ids=list(AGAIN))
def test_the_same_to_the_last_bit(settings: dict[str, Any], files: Path) -> None:
    """The second image of a batch, in that batch: its pixels are the same bytes. The first one stays where it
    is."""
    placed = {
        name: value.format(files) if isinstance(value, str) else value for name, value in settings.items()
    }
    (out, images), _ = run(prompt="a (red:1.3) cat", **{**SMALL, **placed})
    before = images[1].read_bytes()
    (there, once_more), said = again(images[1])
    assert said == f"the same as {images[1]}, to the last bit"
    assert once_more == [out.with_name(f"{out.name}-again") / "images" / images[1].name]
    assert pixels(once_more[0]) == pixels(images[1])
    assert images[1].read_bytes() == before
    old, new = read_settings(images[1]), read_settings(once_more[0])
    old.pop("provenance"), new.pop("provenance")
    assert new == old
    assert sorted(path.name for path in there.iterdir()) == ["images", "samples.json"]


def test_adapters_are_recorded_with_their_strengths(files: Path, tmp_path: Path) -> None:
    """On the command line FILE:STRENGTH; a picture repeats with the same files, wherever they lie."""
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    for name in ("a", "b"):
        down, up = torch.randn(2, 64, 1, 1), torch.randn(64, 2, 1, 1)
        lora = {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        save_file(lora, tmp_path / f"{name}.safetensors")
    given = [f"weights={files}/sd1.safetensors", "prompt=a cat", "adapters=[a.safetensors:0.7,b.safetensors]"]
    small = ["progress=false", "height=32", "width=64", "steps=2"]
    (_, images), _ = draw_config(compose("samplers", [*given, *small]))
    about = read_settings(images[0])
    paths = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert (about["adapters"], about["strengths"]) == (paths, [0.7, 1.0])
    model = models.load(files / "sd1.safetensors")
    strengths = dict(zip(paths, (0.7, 1.0), strict=True))
    exact = generate(models.adapted(model, strengths), "a cat", seeds=[0], steps=2, height=32, width=64)
    assert float((read_image(images[0]) - exact).abs().max()) <= 0.51 / 255
    assert again(images[0])[1].endswith("to the last bit")
    (tmp_path / "a.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(FileNotFoundError, match="adapters"):
        again(images[0])
    moved = ["moved.safetensors:0.7", "b.safetensors"]
    assert again(images[0], adapters=moved)[1].endswith("to the last bit")
    (_, (weaker,)), said = again(images[0], adapters=["moved.safetensors:.5", "b.safetensors"])
    assert (said, read_settings(weaker)["strengths"]) == ("", [0.5, 1.0])
    assert pixels(weaker) != pixels(images[0])
    for wrong, message in {"b.safetensors": "has changed", "moved.safetensors": "twice"}.items():
        with pytest.raises(ValueError, match=message):
            again(images[0], adapters=[wrong, "moved.safetensors:0.7"])


def test_with_something_changed(files: Path) -> None:
    """As if all of it had been said; the first image is still there."""
    same: dict[str, Any] = {"weights": files / "sd1.safetensors", "prompt": "a cat", "guidance": 3, **SMALL}
    (_, images), _ = run(**same, n=2, guide={"interval": [0.2, 0.9]})
    before = images[1].read_bytes()
    (out, changed), said = again(images[1], steps=3, grid={"spacing": "trailing"}, guide={"percentile": 0.9})
    assert said == ""
    (there, fresh), _ = run(
        **{**same, "steps": 3}, seed=1, guide={"percentile": 0.9}, grid={"spacing": "trailing"}
    )
    assert (out, changed) == (there, fresh)
    (_, more), _ = again(images[1], seed=7, n=2)
    assert [path.name for path in more] == ["000007.png", "000008.png"]
    assert more[0].parent == images[0].parent
    assert images[1].read_bytes() == before


def test_files_may_move_but_not_change(files: Path, tmp_path: Path) -> None:
    """The same weights elsewhere, and in another layout; other weights, or another picture, are refused."""
    weights, picture = tmp_path / "a.safetensors", tmp_path / "image.png"
    weights.write_bytes((files / "sd1.safetensors").read_bytes())
    picture.write_bytes((files / "image.png").read_bytes())
    first = run(weights=weights, prompt="a cat", image=picture, strength=0.5, **SMALL)[0].images[0]
    weights.rename(tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match=rf"{weights}, for {first}, does not exist: .*weights=\.\.\."):
        again(first)
    for moved in ("b.safetensors", files / "sd1"):
        (_, images), said = again(first, weights=moved)
        assert said == f"the same as {first}, to the last bit"
        assert pixels(images[0]) == pixels(first)
    weights.write_bytes((files / "other.safetensors").read_bytes())
    hashes = r"its SHA-256 is \w{12}\.\.\., not \w{12}\.\.\."
    with pytest.raises(ValueError, match=rf"{weights} has changed: {hashes}; weights="):
        again(first)
    with pytest.raises(ValueError, match="has changed"):
        again(first, weights=weights, steps=5)
    save_png(torch.rand(3, 48, 80), picture, low=0)
    with pytest.raises(ValueError, match=rf"{picture} has changed"):
        again(first, weights="b.safetensors")
    again(first, weights="b.safetensors", image=files / "mask.png")  # another picture, if it is named


def test_what_differs_is_said(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the pixels are not the same, by how much, and what has changed."""
    first = run(weights=files / "sd1.safetensors", prompt="a cat", **SMALL)[0].images[0]
    monkeypatch.setattr("torch.__version__", "9.9")
    monkeypatch.setattr(
        "samplers.text_to_image.generate", lambda *args, **kwargs: generate(*args, **kwargs) * 0.9
    )
    assert re.fullmatch(
        rf"not the same as {first}: it differs by up to 2\d of 255 \(torch .*, now 9\.9\)", again(first)[1]
    )


def test_an_image_is_never_its_own_copy(files: Path) -> None:
    """out= of the image itself is refused; each time, the copy goes into a folder of its own."""
    (out, images), _ = run(weights=files / "sd1.safetensors", prompt="a cat", **SMALL)
    with pytest.raises(ValueError, match="itself would be overwritten"):
        again(images[0], out=out)
    copy, other = again(images[0])[0], again(images[0])[0]
    assert (copy.out.name, other.out.name) == (f"{out.name}-again", f"{out.name}-again-2")
    assert again(copy.images[0])[0].out.name == f"{out.name}-again-3"


def test_images_of_runs_too(tmp_path: Path) -> None:
    """A trained model with classes: the image again in its batch, with its label, and with changes."""
    model = models.build(RUN)
    for p in model.network.parameters():
        nn.init.normal_(p, std=0.1)
    models.save(model, tmp_path / "run" / "checkpoint.safetensors")
    given: dict[str, Any] = {
        "run": "run",
        "device": "cpu",
        "sampler": "ddpm",
        "guidance": 2,
        "labels": [4, 9],
    }
    (out, images), _ = run(**given, n=7, batch_size=3, steps=3, seed=10)
    assert [str(path.relative_to(out / "images")) for path in images[3:5]] == ["9/000013.png", "4/000014.png"]
    said = read_settings(images[4])
    assert (said["labels"], said["seed"], said["batch"]) == (4, 14, {"seed": 13, "n": 3, "labels": [9, 4]})
    (_, same), verdict = again(images[4])
    assert verdict == f"the same as {images[4]}, to the last bit"
    assert same == [tmp_path / "run" / "samples" / f"{out.name}-again" / "images" / "4" / "000014.png"]
    assert pixels(same[0]) == pixels(images[4])
    (_, changed), _ = again(images[4], steps=5, out="changed")
    (_, fresh), _ = run(**{**given, "labels": 4}, n=1, steps=5, seed=14, out="fresh")
    assert pixels(changed[0]) == pixels(fresh[0])
    with torch.no_grad():
        next(model.network.parameters()).add_(0.1)
    models.save(model, tmp_path / "run" / "checkpoint.safetensors")
    with pytest.raises(ValueError, match=r"run has changed: its SHA-256 is .*; run=\.\.\. says where"):
        again(images[4])


def test_a_sheet_is_no_image(files: Path) -> None:
    """It shows several, of which each says more."""
    (out, _), _ = run(weights=files / "sd1.safetensors", prompt="a cat", n=2, **SMALL)
    with pytest.raises(ValueError, match=r"grid\.png does not record the settings of one image: .* images/"):
        again(out / "grid.png")
    assert read_json(out / "samples.json")["settings"] == read_settings(out / "grid.png")["settings"]


@pytest.mark.parametrize(
    "text", [None, "no JSON", "[1, 2]", '{"seed": 3}', json.dumps({"run": "x", "seed": 3})]
)
def test_an_image_that_is_not_ours(text: str | None, tmp_path: Path) -> None:
    """Without settings, or with those of another program, or with less than an image of ours says."""
    info = PngInfo()
    if text is not None:
        info.add_text("settings", text)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(ValueError, match=r"a\.png (has no settings|does not record the settings of one)"):
        again(Path("a.png"))


# What a picture may say -------------------------------------------------------------------------------------

# settings of a picture that was drawn by nobody, and a part of what is said of them
CRAFTED: dict[str, tuple[dict[str, Any], str]] = {
    "a place": ({"out": "/etc/x"}, "no setting of an image named 'out'"),
    "another place": ({"out": "../../x"}, "no setting of an image named 'out'"),
    "a place in the batch": ({"batch": {"seed": 0, "n": 1, "out": "x"}}, "no batch parameter named 'out'"),
    "how many": ({"n": 10**9}, "no setting of an image named 'n'"),
    "how many at once": ({"batch_size": 3}, "no setting of an image named 'batch_size'"),
    "memory": ({"memory": "6GB"}, "no setting of an image named 'memory'"),
    "a report": ({"report": "x.html"}, "no setting of an image named 'report'"),
    "both ways": ({"run": "x"}, "names both run and weights"),
    "a batch of many": ({"batch": {"seed": 0, "n": 10**9}}, "n=1 draws it alone"),
    "a batch of none": ({"batch": {"seed": 0, "n": 0}}, "n must be at least 1, not 0"),
    "a batch of a text": ({"batch": {"seed": 0, "n": "3"}}, "batch.n must be a whole number, not '3'"),
    "no batch": ({"batch": 3}, "batch must be a mapping"),
    "labels in the batch": ({"batch": {"seed": 0, "n": 1, "labels": [3]}}, "labels"),
    "another's seed": ({"seed": 5}, "the seed 5 is not in its batch, 1 from 0 on"),
    "seeds without end": ({"seed": 2**63 - 1, "batch": {"seed": 2**63 - 1, "n": 2}},
        "seeds must lie in 0 ... 2^63 - 1, but 2 seeds from"),
    "more bits": ({"seed": 2**70}, "has no settings"),
    "a seed of a text": ({"seed": "3"}, "seed must be a whole number, not '3'"),
    "weights of a number": ({"weights": 3}, "weights must be a text or a list of texts, not 3"),
    "weights on two lines": ({"weights": "a\nb\x1b[2J"}, "does not exist: say where it is by weights=..."),
    "weights of nobody's": ({"weights": "~nobody9/x"}, "does not exist: say where it is by weights=..."),
    "a pipe for weights": ({"weights": "{pipe}"}, "is neither a file nor a folder"),
    "a device for an image": ({"image": "/dev/zero", "strength": 0.5}, "is neither a file nor a folder"),
    "another size": ({"height": 32768}, "says height=32768, but has 32: another program changed it"),
    "no size": ({"height": "tall"}, "height must be a whole number or null, not 'tall'"),
    "a long text": ({"prompt": [["x" * 10**5]]}, "prompt must be a text, not [["),
    "a long name": ({"x" * 10**5: 1}, "no setting of an image named"),
    "steps without end": ({"steps": 10**9}, "steps"),
    "too many steps": ({"steps": 1001},
        "has steps of 1,001 steps, more than the 1,000 that a picture may ask for: give steps=..."),
    "too many times": ({"grid": {"spacing": [999 - i * 0.016 for i in range(60_000)]}, "steps": None},
        "has grid of 60,000 times"),
    "a long prompt": ({"prompt": "a " * 400_000}, "has prompt of 800,000 characters"),
    "a long negative prompt": ({"negative": "x y z " * 30_000}, "has negative of 180,000 characters"),
    "brackets": ({"prompt": "(" * 50_000, "weighted": True}, "has prompt of 50,000 characters"),
    "weights of a long name": ({"weights": "x" * 5000}, "does not exist: say where it is by weights=..."),
    "no weights": ({"weights": ""}, "does not name the file of weights: give weights=..."),
    "no steps": ({"steps": -1}, "steps must be a whole number"),
    "guidance of a list": ({"guidance": [3]}, "guidance must be a number or null, not [3]"),
    "an infinite guidance": ({"guidance": float("inf")}, "has no settings"),
    "NaN": ({"guidance": float("nan")}, "has no settings"),
    "nested without end": ({"options": [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]}, "has no settings"),
    "options of a text": ({"options": "eta"}, "options must be a mapping, not 'eta'"),
    "an option of none": ({"options": {"etta": 1}}, "no option of"),
    "a grid of a number": ({"grid": {"spacing": 3}}, "spacing"),
    "a rule of a number": ({"guidance": 3.0, "guide": {"rule": 3}}, "rule"),
    "a number beyond floats": ({"guidance": 3.0, "guide": {"rule": {"name": "apg", "norm_limit": 2**63 - 1}}},
        ""),
    "numbers of texts": ({"numbers": {"top": "x"}}, "numbers must be a mapping to numbers, not {'top': 'x'}"),
    "a SHA-256 of a number": ({"sha256": {"weights": 3}}, "sha256 must be a mapping to texts, not "
                                                          "{'weights': 3}"),
    "a SHA-256 of a place": ({"sha256": {"out": "3"}}, "no file that has a SHA-256 named 'out'"),
    "no SHA-256": ({"sha256": [3]}, "sha256 must be a mapping to texts, not [3]"),
    "a provenance of a list": ({"provenance": [1]}, "provenance must be a mapping to texts, not [1]"),
    "a provenance of numbers": ({"provenance": {"torch": 2}}, "provenance must be a mapping to texts, not "
                                                              "{'torch': 2}"),
    "another device": ({"device": "cuda:99"}, "no device 'cuda:99' here"),
    "a device of a path": ({"device": "/dev/sda"}, "no device '/dev/sda' here"),
    "an infinite tile": ({"tile": 0}, "tile"),
    "a dtype of a list": ({"dtype": {"vae": ["bf16"]}}, "dtype must be"),
}  # fmt: skip


@pytest.fixture(scope="module")
def honest(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of ours."""
    given = {"weights": str(files / "sd1.safetensors"), "prompt": "a cat", "progress": False, **SMALL}
    return draw_config({**given, "out": str(tmp_path_factory.mktemp("honest"))})[0].images[0]


def crafted(path: Path, honest: Path, says: Any) -> Path:
    """Its pixels, with something else said of them."""
    info = PngInfo()
    info.add_text("settings", json.dumps(says))
    with Image.open(honest) as picture:
        picture.save(path, pnginfo=info)
    return path


@pytest.mark.parametrize(("says", "message"), CRAFTED.values(), ids=list(CRAFTED))
def test_what_a_picture_says_is_checked(
    says: dict[str, Any], message: str, honest: Path, tmp_path: Path
) -> None:
    """One line that names it and is fit to be printed, and nothing is written; or, where all is sound, one
    image in the usual place."""
    os.mkfifo(tmp_path / "pipe")
    says = {name: str(tmp_path / "pipe") if value == "{pipe}" else value for name, value in says.items()}
    path = crafted(tmp_path / "crafted.png", honest, {**read_settings(honest), **says})
    if not message:
        (out, images), _ = again(path)
        assert (out.parent, len(images)) == (Path("samples"), 1)
        return
    with pytest.raises((ValueError, OSError), match=re.escape(message)) as error:
        again(path)
    assert str(path) in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 500
    assert sorted(place.name for place in tmp_path.iterdir()) == ["crafted.png", "pipe"]


def test_what_is_typed_is_free(honest: Path, tmp_path: Path) -> None:
    """A picture asks for no endless work by itself; a size that it does not say is its own."""
    says = read_settings(honest)
    long = crafted(tmp_path / "long.png", honest, {**says, "steps": 50_000, "prompt": "a " * 10_000})
    assert again(long, steps=1, prompt="a cat")[0].images
    sizeless = crafted(
        tmp_path / "sizeless.png",
        honest,
        {name: value for name, value in says.items() if name not in ("height", "width")},
    )
    with Image.open(again(sizeless)[0].images[0]) as new, Image.open(honest) as old:
        assert new.size == old.size
    info = PngInfo()
    info.add_text("settings", json.dumps({**says, "height": 8192, "width": 8192}))
    Image.new("RGB", (8192, 8192)).save(tmp_path / "huge.png", pnginfo=info)
    with pytest.raises(
        ValueError, match=r"huge\.png has 8192x8192 pixels, more than the 8,388,608 .* give height"
    ):
        again(tmp_path / "huge.png")
    assert again(tmp_path / "huge.png", height=32, width=32)[0].images


def test_a_picture_of_a_run_is_of_the_class_that_its_batch_says(tmp_path: Path) -> None:
    models.save(models.build(RUN), tmp_path / "run" / "checkpoint.safetensors")
    first = run(run="run", n=1, steps=1, device="cpu")[0].images[0]
    for label in ("x", 99):
        path = crafted(tmp_path / "crafted.png", first, {**read_settings(first), "labels": label})
        with pytest.raises(ValueError, match=f"says labels={label!r}, and its batch has"):
            again(path, out="here")


def test_a_picture_of_a_run_names_no_place(tmp_path: Path) -> None:
    """Away from its run's samples it says where these are, and nothing is written there unless that is asked
    for."""
    models.save(models.build(RUN), tmp_path / "run" / "checkpoint.safetensors")
    first = run(run="run", n=1, steps=1, device="cpu")[0].images[0]
    again(first)
    before = sorted((tmp_path / "run").rglob("*"))
    copy = tmp_path / "copy.png"
    copy.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=r"copy\.png is not in .*run/samples.*: give out=\.\.\."):
        again(copy)
    with pytest.raises(ValueError, match=r"give out=\.\.\."):
        again(copy, steps=2)
    assert sorted((tmp_path / "run").rglob("*")) == before
    assert again(copy, out="here")[1] == f"the same as {copy}, to the last bit"


def test_each_setting_is_declared_once() -> None:
    """What an image says of itself is all but places and numbers of images; what is a path is text to the
    command line, as it stands."""
    for params in (SampleParams, TextToImageParams):
        assert {"out", "n", "batch_size", "progress"}.isdisjoint(recorded(params))
        assert {"seed", "device", "compile", "sha256", "steps"} <= {*recorded(params)}
        for name in (*of_kind(params, "weights", "picture"), "out"):
            assert compose("samplers", [f"{name}=my (cat), 1=2"])[name] == "my (cat), 1=2"


def test_a_terminal_is_safe(honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pixels differ, what the picture says of versions is printed without control characters."""
    says = read_settings(honest)
    path = crafted(
        tmp_path / "a.png",
        honest,
        {**says, "provenance": {**says["provenance"], "torch": "\x1b[2J\n" + "9" * 10**5}},
    )
    monkeypatch.setattr(
        "samplers.text_to_image.generate", lambda *args, **kwargs: generate(*args, **kwargs) * 0.9
    )
    said = again(path)[1]
    assert said.startswith(f"not the same as {path}: it differs by up to")
    assert said.isprintable()
    assert len(said) <= 500


def test_the_limit_of_pixels_is_a_setting(files: Path) -> None:
    """Of image and mask; what it is set to changes no image, and is not recorded."""
    given: dict[str, Any] = {
        "weights": files / "sd1.safetensors",
        "prompt": "a cat",
        "image": files / "image.png",
        **SMALL,
    }
    with pytest.raises(
        ValueError,
        match=r"image\.png has 80x48 = 3,840 pixels, more than max_pixels=3,839: make it smaller, or raise",
    ):
        run(**given, max_pixels=3839)
    (_, images), _ = run(**given, max_pixels=3840)
    assert "max_pixels" not in read_settings(images[0])


def test_zero_snr_is_a_setting_of_the_weights(tmp_path: Path) -> None:
    """As family and prediction are."""
    models.save(models.miniature("sd1"), tmp_path / "a.safetensors", layout="ldm")
    settings: dict[str, Any] = {"weights": str(tmp_path / "a.safetensors"), "prompt": "", "prediction": "v"}
    for zero_snr, last in ((True, True), (None, False)):
        model = load_model(TextToImageParams(**settings, zero_snr=zero_snr), "weights")
        assert (float(model.schedule.alpha(999)) == 0) == last
