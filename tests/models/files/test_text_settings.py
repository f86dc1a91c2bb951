"""What a folder's configurations say of its text encoders: how many blocks are used, which, and what no
prompt is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import models
import samplers
from models.presets import miniature
from tests.models.files.pipelines import NUMBERS
from tests.peers import diffusers

pytestmark = pytest.mark.usefixtures("quietly")


def changed(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def opened(family: str, folder: Path) -> Any:
    models.save(miniature(family), folder, layout="diffusers")
    return diffusers.DiffusionPipeline.from_pretrained(folder)


def encoded(pipe: Any, prompt: str, **settings: Any) -> Tensor:
    also = {"prompt_2": None, "prompt_3": None} if hasattr(pipe, "text_encoder_3") else {}
    how = {
        "device": "cpu",
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": False,
        **also,
        **settings,
    }
    return cast(Tensor, pipe.encode_prompt(prompt, **how)[0])


FEWER = [
    ("sd1", "text_encoder", 2),
    ("sd2", "text_encoder", 1),
    ("sdxl", "text_encoder_2", 2),
    ("sd3", "text_encoder_3", 1),
]


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize(("family", "tower", "blocks"), FEWER)
def test_blocks_are_as_many_as_config_says(
    family: str, tower: str, blocks: int, written: bool, tmp_path: Path
) -> None:
    """Clip skip baked into a folder: the weights were saved without the last block, or only config.json was
    edited, and they are there. So is a T5 that was cut."""
    models.save(miniature(family), tmp_path / "m", layout="diffusers")
    key = "num_layers" if tower == "text_encoder_3" else "num_hidden_layers"
    changed(tmp_path / "m" / tower / "config.json", **{key: blocks})
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m")
    if written:
        getattr(pipe, tower).save_pretrained(tmp_path / "m" / tower)
    model = models.load(tmp_path / "m")
    numbers = NUMBERS if family == "sdxl" else None
    assert torch.allclose(
        model.require("text").encode(["a cat"], numbers=numbers).condition.context,
        encoded(pipe, "a cat"),
        atol=1e-5,
    )
    assert model.report is not None
    assert any("config.json" in reason for reason in model.report.ignored.values()) != written
    models.save(model, tmp_path / "again", layout="diffusers")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(encoded(again, "a cat"), encoded(pipe, "a cat"))
    changed(tmp_path / "m" / tower / "config.json", **{key: 9})
    with pytest.raises(ValueError, match=r"config\.json says 9 blocks, and the file holds [123]"):
        models.load(tmp_path / "m")


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl", "sd3"])
def test_clip_skip_is_that_of_diffusers(family: str, tmp_path: Path) -> None:
    """The state before the usual one, as its pipelines take it; here for negative prompts and no prompt
    too."""
    pipe, text = opened(family, tmp_path / "m"), miniature(family).require("text")
    if not hasattr(pipe.text_encoder, "text_model"):
        vars(pipe.text_encoder)["text_model"] = (
            pipe.text_encoder
        )  # by the name that diffusers 0.42 knows it by, before transformers 5
    numbers = NUMBERS if family == "sdxl" else None
    skips = [0, 1] if family != "sd1" else [0, 1, 2]
    for skip in skips:
        ours = text.encode(["a cat"], numbers=numbers, clip_skip=skip).condition
        assert torch.allclose(ours.context, encoded(pipe, "a cat", clip_skip=skip), atol=1e-5)
        if family != "sdxl":
            assert torch.allclose(
                text.null(1, clip_skip=skip).context, encoded(pipe, "", clip_skip=skip), atol=1e-5
            )
    for wrong in (skips[-1] + 1, -1, 99):
        with pytest.raises(ValueError, match=rf"must be 0 to {skips[-1]} for this model, not {wrong}"):
            text.encode(["a cat"], numbers=numbers, clip_skip=wrong)


def test_clip_skip_changes_pictures_and_has_no_meaning_without_clips_context() -> None:
    """Prompts and negative prompts alike; FLUX.1 takes only CLIP's pooled output."""
    model = miniature("sd1")
    how: dict[str, Any] = dict(steps=2, height=16, width=16)
    plain, off, skipped = (samplers.generate(model, "a cat", clip_skip=skip, **how) for skip in (None, 0, 1))
    assert torch.equal(plain, off)
    assert not torch.equal(plain, skipped)
    alike = samplers.generate(model, "a cat", negative="", clip_skip=1, **how)
    assert torch.equal(skipped, alike)
    with pytest.raises(ValueError, match="no context comes from CLIP"):
        samplers.generate(miniature("flux-dev"), "a cat", clip_skip=1, **how)
    with pytest.raises(ValueError, match=r"clip_skip must be 0 to 2 for this model, not 3"):
        samplers.generate(model, "a cat", clip_skip=3, **how)


@pytest.mark.parametrize("family", ["sdxl", "sdxl-refiner"])
@pytest.mark.parametrize("zeros", [True, False, None])
def test_no_prompt_is_what_model_index_says(family: str, zeros: bool | None, tmp_path: Path) -> None:
    """Zeros or the encoded \"\", for context and pooled part; kept by our own file and by diffusers'
    folders."""
    models.save(miniature(family), tmp_path / "m", layout="diffusers")
    file, key = tmp_path / "m/model_index.json", "force_zeros_for_empty_prompt"
    index = {name: value for name, value in json.loads(file.read_text()).items() if name != key}
    file.write_text(json.dumps(index | ({} if zeros is None else {key: zeros})))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m")
    _, negative, _, pooled = pipe.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
    model = models.load(tmp_path / "m")
    models.save(model, tmp_path / "native.safetensors")
    models.save(model, tmp_path / "again", layout="diffusers")
    for each in (model, models.load(tmp_path / "native.safetensors"), models.load(tmp_path / "again")):
        text = each.require("text")
        null = text.null(1, numbers=dict.fromkeys(text.params.numbers, 1.0))
        assert torch.allclose(null.context, negative, atol=1e-5)
        assert torch.allclose(null.vector[:, : pooled.shape[1]], pooled, atol=1e-5)
    if model.require("text").params.null != miniature(family).require("text").params.null:
        with pytest.raises(ValueError, match=r"do not say null='(empty|zeros)' of text"):
            models.save(model, tmp_path / "m.safetensors", layout="ldm")


def test_no_prompt_is_what_the_text_encoders_folder_says(tmp_path: Path) -> None:
    """And not what the folder says that another network is from; in whichever class of pipeline."""
    for name, zeros, kind in (("zeros", True, "StableDiffusionXLPipeline"), ("empty", False, "OurPipeline")):
        models.save(miniature("sdxl"), tmp_path / name, layout="diffusers")
        changed(tmp_path / name / "model_index.json", force_zeros_for_empty_prompt=zeros, _class_name=kind)
    models.save(miniature("sdxl"), tmp_path / "unet", layout="separate")
    unet = tmp_path / "unet/sdxl.safetensors"
    for paths, null in ((("zeros", "empty"), "empty"), (("empty", "zeros"), "zeros")):
        assert models.load(*(tmp_path / name for name in paths)).require("text").params.null == null
        assert models.load(tmp_path / paths[1], unet).require("text").params.null == null


def test_padding_is_what_the_folder_says(tmp_path: Path) -> None:
    """The second tokenizer of SDXL pads with "!", unless its files name another token."""
    models.save(miniature("sdxl"), tmp_path / "m", layout="diffusers")
    config = tmp_path / "m/tokenizer_2/tokenizer_config.json"
    told = json.loads(config.read_text())
    del told["pad_token"]
    config.write_text(json.dumps(told))
    (config.parent / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    pipe, model = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m"), models.load(tmp_path / "m")
    ours = model.require("text").encode(["a cat"], numbers=NUMBERS).condition.context
    assert torch.allclose(ours, encoded(pipe, "a cat"), atol=1e-5)
    for each, pads in ((miniature("sdxl"), [49407, 0]), (model, [49407, 49407])):
        assert [reader.pad for reader in each.require("text").params.readers.values()] == pads


def test_an_end_of_text_that_the_tokenizer_does_not_write_is_refused(tmp_path: Path) -> None:
    """The pooled output is read there."""
    models.save(miniature("sdxl"), tmp_path / "m", layout="diffusers")
    changed(
        tmp_path / "m/text_encoder_2/config.json", eos_token_id=2
    )  # of older configurations, which means the same
    models.load(tmp_path / "m")
    changed(tmp_path / "m/text_encoder_2/config.json", eos_token_id=5)
    with pytest.raises(ValueError, match="eos_token_id=5, and its tokenizer ends texts with 49407"):
        models.load(tmp_path / "m")


def test_longer_towers_read_as_many_tokens_as_their_tokenizer_says(tmp_path: Path) -> None:
    """A LongCLIP has 248 positions; how many are read is model_max_length, which is 77 in some folders and
    248 in others."""
    from dataclasses import replace

    from models.networks.clip import CLIPTextParams
    from models.presets import TINY_TOWERS, randomise, tiny_description

    towers = {**TINY_TOWERS, "clip_l": replace(cast(CLIPTextParams, TINY_TOWERS["clip_l"]), length=248)}
    model = models.build({**tiny_description("sd1", towers), "shape": [4, 16, 16]})
    for part in model.parts.values():
        randomise(part, torch.Generator().manual_seed(0))
    models.save(model, tmp_path / "m", layout="diffusers")
    for length in (248, 77):
        changed(tmp_path / "m/tokenizer/tokenizer_config.json", model_max_length=length)
        ours = models.load(tmp_path / "m")
        right = encoded(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "m"), "a cat " * 20)
        assert ours.require("text").encode(["a cat " * 20]).condition.context.shape == (1, length, 64)
        assert torch.allclose(
            ours.require("text").encode(["a cat " * 20]).condition.context, right, atol=1e-5
        )
    models.save(ours, tmp_path / "again", layout="diffusers")
    assert models.load(tmp_path / "again").spec["text"] == ours.spec["text"]
