"""CLIP's towers against OpenCLIP on the same weights, pictures and captions; and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from eval.features import clip
from eval.features.clip import CMMD, ClipFeatures, load_clip, random_clip
from eval.features.pillow import resize
from eval.features.preparation import Preparation
from eval.features.weights import sha256_of_tensors
from models.files.text import sha256_of_file
from tests.peers import open_clip

SIZES = [(64, 64), (40, 90), (97, 33), (32, 35), (9, 8), (64, 64)]
LONG = "a photograph of " + " ".join(f"cat {i}" for i in range(60))
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@pytest.fixture(scope="module", autouse=True)
def networks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Two small networks that OpenCLIP knows by name, while these tests run."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny.json").write_text(json.dumps(CONFIG))
    (folder / "tiny-quickgelu.json").write_text(json.dumps({**CONFIG, "quick_gelu": True}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [*open_clip.factory._MODEL_CONFIG_PATHS])
        patch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
        open_clip.add_model_config(folder)
        yield


@pytest.fixture(scope="module")
def tiny(networks: None) -> ClipFeatures:
    return random_clip("tiny")


@pytest.fixture(scope="module")
def weights(tiny: ClipFeatures, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small network's weights as OpenCLIP writes them."""
    path = tmp_path_factory.mktemp("weights") / "open_clip_model.safetensors"
    save_file(tiny.model.state_dict(), path)
    return path


@pytest.fixture
def openai(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if OpenAI had published the small network, trained with QuickGELU."""
    usual = {"mean": clip.MEAN, "std": clip.STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    registry = open_clip.pretrained._PRETRAINED
    monkeypatch.setitem(registry, "tiny", {"openai": {**usual, "quick_gelu": True}, "laion": usual})
    monkeypatch.setitem(registry, "tiny-quickgelu", {"openai": {**usual, "quick_gelu": True}})


def pictures(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in SIZES]


def pil(picture: Tensor) -> Image.Image:
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def horizontal_first(image: Image.Image, size: tuple[int, int], kernel: str) -> Image.Image:
    """Pillow's resize in the order of all versions up to 12, whatever the version."""
    return image.resize((size[1], image.height), FILTERS[kernel]).resize((size[1], size[0]), FILTERS[kernel])


@pytest.mark.parametrize("kernel", FILTERS)
@pytest.mark.parametrize("size", [(32, 32), (224, 224), (50, 31), (8, 200), (17, 5)], ids=str)
def test_resizing_is_pillows_in_every_bit(size: tuple[int, int], kernel: str) -> None:
    """Up and down, wide and tall: no pixel differs, horizontal pass first."""
    for picture in pictures():
        assert torch.equal(
            resize(picture, size, kernel), from_pil(horizontal_first(pil(picture), size, kernel))
        )


def test_resizing_in_one_call_of_pillow() -> None:
    """Pictures that are not tall are equal to one call as well, in every bit."""
    for size in [(64, 64), (40, 90), (500, 700)]:
        picture = torch.randint(
            0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
        )
        assert torch.equal(
            resize(picture, (32, 48)), from_pil(pil(picture).resize((48, 32), Image.Resampling.BICUBIC))
        )


def test_torchs_own_antialiased_resize_is_not_pillows() -> None:
    """Which is why ours exists: in one pass of floats, rounded at the end, pixels move by more than 8
    levels."""
    picture = pictures()[0]
    float_pass = torch.nn.functional.interpolate(
        picture[None].float(), (224, 224), mode="bicubic", antialias=True
    )[0]
    difference = float_pass.round().clamp(0, 255) - resize(picture, (224, 224)).float()
    assert difference.abs().max() > 8


@pytest.mark.parametrize("fit", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("kernel", ["bicubic", "bilinear"])
def test_preparation_is_openclips(fit: Any, kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to open_clip.image_transform on the same picture in Pillow, to the last bit of float32."""
    resized = Image.Image.resize

    def in_order(self: Image.Image, size: tuple[int, int], resample: Any = None, **_: Any) -> Image.Image:
        return resized(resized(self, (size[0], self.height), resample), size, resample)

    monkeypatch.setattr(Image.Image, "resize", in_order)
    ours = Preparation(32, clip.MEAN, (0.5, 0.25, 0.2), fit, kernel, fill=7)
    theirs = open_clip.image_transform(
        32, False, clip.MEAN, (0.5, 0.25, 0.2), resize_mode=fit, interpolation=kernel, fill_color=7
    )
    for picture in pictures():
        assert torch.equal(ours(picture[None])[0], theirs(pil(picture)))


def test_cmmds_preparation() -> None:
    """The centre square first, then 336 pixels: Pillow's crop and resize, and not OpenCLIP's resize and
    crop."""
    picture = torch.randint(
        0, 256, (3, 50, 91), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    cut = pil(picture).crop((20, 0, 70, 50)).resize((336, 336), Image.Resampling.BICUBIC)
    mean, std = torch.tensor(clip.MEAN)[:, None, None], torch.tensor(clip.STD)[:, None, None]
    torch.testing.assert_close(CMMD(picture[None])[0], (from_pil(cut) / 255 - mean) / std, rtol=0, atol=0)
    usual = Preparation(336, clip.MEAN, clip.STD)(picture[None])
    assert (usual - CMMD(picture[None])).abs().max() > 0.01


def test_embeddings_are_openclips(tiny: ClipFeatures, weights: Path) -> None:
    """A file loaded by OpenCLIP and by us: rows of pictures and captions within 1e-6, in the order of the
    pictures, of length 1."""
    peer = open_clip.create_model("tiny", pretrained=str(weights)).eval()
    ours = load_clip("tiny", weights)
    prompts = ["a cat", "", "ein Hund, 12 Äpfel &amp; <b>", LONG]
    landscape = [picture for picture in pictures() if picture.shape[1] <= picture.shape[2]]
    transform = open_clip.image_transform(32, is_train=False)
    with torch.inference_mode():
        image = torch.cat(
            [peer.encode_image(transform(pil(picture))[None], normalize=True) for picture in landscape]
        )
        text = peer.encode_text(open_clip.get_tokenizer("tiny")(prompts), normalize=True)
    found = ours(landscape, ["image"])["image"]
    torch.testing.assert_close(found, image, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.text(prompts).rows, text, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(landscape)))
    assert (ours.widths, found.dtype) == ({"image": 16}, torch.float32)
    assert ours.identity.weights == sha256_of_file(weights)


def test_a_row_does_not_depend_on_the_others(tiny: ClipFeatures) -> None:
    """One by one and together, of five sizes: within 1e-6. And another output is refused."""
    together = tiny(pictures(), ["image"])["image"]
    alone = torch.cat([tiny([picture], ["image"])["image"] for picture in pictures()])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="tiny, GELU gives image, not 'pool'"):
        tiny(pictures(), ["pool"])


def test_a_long_caption_keeps_its_end_and_is_said_to_be_cut(tiny: ClipFeatures) -> None:
    """76 words or more, with the start and end, are more than 77 tokens; 75 are not. What lies beyond changes
    nothing."""
    fits, long = " ".join(["cat"] * 75), " ".join(["cat"] * 76)
    assert tiny.text(["cat", fits, long, LONG, ""]).truncated == (False, False, True, True, False)
    rows = tiny.text([fits, long, long + " dog"]).rows
    torch.testing.assert_close(rows[1:], rows[:1].expand(2, -1), rtol=0, atol=1e-6)
    tokens = open_clip.get_tokenizer("tiny")([LONG])
    assert tokens[0, -1] == open_clip.SimpleTokenizer().eot_token_id
    with torch.inference_mode():
        cut = tiny.model.encode_text(
            torch.cat([tokens[:, :-1], tokens[:, 2:3]], 1), normalize=True
        )  # without its end
    assert (cut - tiny.text([LONG]).rows).abs().max() > 0.01


def test_the_stand_in_says_so(tiny: ClipFeatures) -> None:
    """Random weights are marked, the same for a seed, and named by their tensors."""
    assert tiny.identity.random
    assert (
        tiny.identity.weights
        == sha256_of_tensors(random_clip("tiny").model.state_dict())
        != random_clip("tiny", seed=1).identity.weights
    )
    assert tiny.identity.prepared.startswith(
        "shortest 32, bicubic as Pillow, mean 0.48145466/0.4578275/0.40821073"
    )


def archive(model: Any, path: Path) -> Path:
    """TorchScript in half precision with three numbers beside the weights, as OpenAI published."""
    mask = model._buffers.pop("attn_mask")
    model.attn_mask = mask  # a constant there, and no tensor of the weights
    for name in ("input_resolution", "context_length", "vocab_size"):
        model.__dict__.pop(name, None)
        model.register_buffer(name, torch.tensor(77))
    traced = torch.jit.trace(
        model.eval(), (torch.zeros(1, 3, 32, 32), torch.ones(1, 77, dtype=torch.long)), check_trace=False
    )
    traced.half().save(str(path))
    return path


@pytest.mark.filterwarnings("ignore")  # tracing is torch's past, and says so
def test_an_archive_of_openais_runs_with_quickgelu(
    openai: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its SHA-256, under the plain name as under that with -quickgelu, as OpenCLIP's own reader of such
    archives: within 1e-5."""
    path = archive(random_clip("tiny").model, tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match="is a TorchScript archive, which holds code, not OpenAI's"):
        load_clip("tiny", path)
    monkeypatch.setitem(clip.OPENAI, sha256_of_file(path), "tiny")
    peer = open_clip.load_openai_model(str(path), precision="fp32", device="cpu")
    wide = pictures()[1]
    with torch.inference_mode():
        expected = peer.encode_image(
            open_clip.image_transform(32, is_train=False)(pil(wide))[None], normalize=True
        )
    for name in ("tiny", "tiny-quickgelu"):
        ours = load_clip(name, path)
        assert ours.identity.network == "clip tiny, QuickGELU"
        torch.testing.assert_close(ours([wide], ["image"])["image"], expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="is OpenAI's tiny, not ViT-B-32"):
        load_clip("ViT-B-32", path)
    with pytest.raises(ValueError, match="its tag is openai, not laion"):
        load_clip("tiny", path, tag="laion")


def test_the_activation_is_never_guessed(openai: None, weights: Path) -> None:
    """The same file by two tags: another activation, other numbers, another identity. Without a tag it is
    refused."""
    with pytest.raises(
        ValueError, match=r"tag=\.\.\. must say which weights of tiny these are, .*: openai, laion, own"
    ):
        load_clip("tiny", weights)
    with pytest.raises(
        ValueError, match="the weights laion were trained with GELU: load them as tiny, not tiny-quickgelu"
    ):
        load_clip("tiny-quickgelu", weights, tag="laion")
    with pytest.raises(
        ValueError, match="OpenCLIP knows no weights 'x' of tiny; known are openai, laion, own"
    ):
        load_clip("tiny", weights, tag="x")
    quick, plain = load_clip("tiny", weights, tag="openai"), load_clip("tiny", weights, tag="laion")
    assert [m.identity.network for m in (quick, plain)] == ["clip tiny, QuickGELU", "clip tiny, GELU"]
    assert (quick.text(["a cat"]).rows - plain.text(["a cat"]).rows).abs().max() > 1e-4


def test_published_networks_ask_for_a_tag(weights: Path) -> None:
    """ViT-B-32 was published with both activations; ViT-L-14-336 with one, so that only its shapes are in the
    way."""
    with pytest.raises(ValueError, match="must say which weights of ViT-B-32 these are"):
        load_clip("ViT-B-32", weights)
    with pytest.raises(ValueError, match="OpenCLIP has no network 'ViT-X'"):
        load_clip("ViT-X", weights)
    with pytest.raises(ValueError, match="roberta-ViT-B-32 has a text tower of a hub"):
        load_clip("roberta-ViT-B-32", weights)


def test_weights_of_another_network_are_refused(tiny: ClipFeatures, tmp_path: Path) -> None:
    """The first tensor that is missing, unknown or of another shape is named, and a pickle that would run
    code is not opened."""
    state = tiny.model.state_dict()
    changes: list[tuple[dict[str, Tensor | None], str]] = [
        ({"visual.proj": None}, r"lacks visual.proj \(1 of \d+ tensors\)"),
        ({"visual.more": torch.zeros(1)}, "visual.more is unknown"),
        ({"visual.proj": torch.zeros(3, 4)}, r"visual.proj has shape \[3, 4\], not \[64, 16\]"),
    ]
    for change, message in changes:
        torch.save({k: v for k, v in {**state, **change}.items() if v is not None}, tmp_path / "weights.pt")
        with pytest.raises(ValueError, match=message):
            load_clip("tiny", tmp_path / "weights.pt")
    torch.save(tiny.model, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="nothing in it was run"):
        load_clip("tiny", tmp_path / "pickle.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_clip("tiny", tmp_path / "none.pt")


def test_a_training_checkpoint_loads(tiny: ClipFeatures, tmp_path: Path) -> None:
    """OpenCLIP's own, of several processes: under state_dict, each key with "module." before it."""
    state = {f"module.{key}": value for key, value in tiny.model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")
    ours = load_clip("tiny", tmp_path / "epoch_3.pt")
    assert torch.equal(ours(pictures(), ["image"])["image"], tiny(pictures(), ["image"])["image"])
