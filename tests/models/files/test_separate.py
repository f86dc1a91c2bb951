"""FLUX.1 and Stable Diffusion 3 in a file per part, with some of them missing, foreign or replaced."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from models import Model
from models.families import ARCHITECTURES
from tests.models.files.tiny import FLOWS, same, settings, tensors, tiny, whole

TOWERS = {
    name: {tower.name: tower.file or tower.name for tower in each.towers}
    for name, each in ARCHITECTURES.items()
}  # and their files
FILES = {name: (name, "vae", *towers.values()) for name, towers in TOWERS.items()}
FLUX, SD3 = FILES["flux-dev"], FILES["sd3"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """Files of a miniature in the layout separate, by their names without ending; written once, no test
    changes them."""
    root = tmp_path_factory.mktemp("saved")

    def paths(family: str, *names: str) -> list[Path]:
        if not (root / family).exists():
            models.save(tiny(family), root / family, "separate")
        return [root / family / (name if name.endswith(".json") else f"{name}.safetensors") for name in names]

    return paths


Saved = Callable[..., list[Path]]


@pytest.fixture
def t5_alone(saved: Saved, tmp_path: Path) -> Path:
    """T5's weights without a tokenizer beside them."""
    (weights,) = saved("flux-dev", "t5xxl")
    return Path(shutil.copy(weights, tmp_path / "t5.safetensors"))


def notes(model: Model) -> str:
    assert model.report is not None
    return "; ".join(model.report.notes)


def refusal(*paths: Path, family: str | None = None, prediction: str | None = None) -> str:
    """The one line with which loading ends."""
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        models.load(*paths, family=family, prediction=prediction)
    return str(caught.value)


# All of it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["flux-dev", "flux-schnell", "sd3", "sd3.5-medium"])
def test_every_layout_there_and_back(family: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """In a dtype that is asked for, and cast again when it is loaded."""
    expected = {key: value.to(dtype or value.dtype) for key, value in whole(tiny(family)).items()}
    for layout in ("native", "ldm", "diffusers", "separate"):
        path = tmp_path / (f"{layout}.safetensors" if layout in ("native", "ldm") else layout)
        models.save(tiny(family), path, layout, dtype=dtype)
        paths = sorted(path.glob("*.safetensors")) if layout == "separate" else [path]
        model = models.load(*paths)
        same(whole(model), expected)
        assert json.loads(json.dumps(settings(model))) == json.loads(json.dumps(settings(tiny(family))))
        assert model.report is not None
        assert model.report.layout == layout
        if dtype is not None:
            same(
                whole(models.load(*paths, dtype=torch.float32)),
                {key: value.float() for key, value in expected.items()},
            )


@pytest.mark.parametrize("family", FLOWS)
def test_separate_files_come_back(family: str, saved: Saved, tmp_path: Path) -> None:
    """Each part under its publisher's keys; every key is accounted for, and written again they are the same
    files."""
    paths = saved(family, *FILES[family])
    model = models.load(*paths)
    same(whole(model), whole(tiny(family)))
    assert model.report is not None
    assert (model.report.layout, model.report.missing, model.report.ignored) == ("separate", (), {})
    assert (
        len(model.report.consumed)
        == len(set(model.report.consumed))
        == sum(len(load_file(path)) for path in paths)
    )
    models.save(model, tmp_path, "separate")
    theirs = {key: value for key, value in tensors(paths[0].parent).items() if not key.startswith("preview")}
    same(tensors(tmp_path), theirs)


def test_in_any_order(saved: Saved) -> None:
    """T5's tokenizer lies beside it."""
    for order in permutations(saved("flux-dev", *FLUX)):
        model = models.load(*order)
        assert (model.spec["family"], list(model.require("text").towers)) == ("flux-dev", ["clip_l", "t5"])
        assert "t5" in model.require("text").tokenizers
        assert (
            notes(model)
            == "vae.safetensors does not say whose latents it makes: those of FLUX.1 [dev] are assumed"
        )
    for paths in (saved("sd3", *SD3), saved("sd3", *SD3[::-1])):
        same(whole(models.load(*paths)), whole(tiny("sd3")))


@pytest.mark.parametrize("projection", [None, 64, 32])
def test_flux_leaves_the_projection_of_its_clip_unused(
    projection: int | None, saved: Saved, tmp_path: Path
) -> None:
    """Whatever its width: it is kept, for it is a weight."""
    state = load_file(saved("flux-dev", "clip_l")[0])
    save_file(
        state | ({"text_projection.weight": torch.ones(projection, 64)} if projection else {}),
        tmp_path / "clip_l.safetensors",
    )
    text = models.load(
        tmp_path / "clip_l.safetensors", *saved("flux-dev", "flux-dev", "vae", "t5xxl")
    ).require("text")
    assert (text.params.vector_dim, text.towers["clip_l"].params.projection) == (64, projection)


# T5's tokenizer ---------------------------------------------------------------------------------------------


def test_the_tokenizer_is_found_or_given(saved: Saved, t5_alone: Path, tmp_path: Path) -> None:
    """Beside T5's weights; as a path, whatever its place among the others; as the folder that it lies in; in
    a folder of diffusers."""
    others, (tokenizer,) = saved("flux-dev", *FLUX[:3]), saved("flux-dev", "tokenizer.json")
    without = models.load(*others, t5_alone).require("text")
    assert "t5" not in without.tokenizers
    with pytest.raises(
        ValueError, match=r"T5 has no tokenizer: load its spiece\.model or tokenizer\.json too"
    ):
        without.encode(["a corgi"])
    models.save(tiny("flux-dev"), tmp_path / "f", "diffusers")
    for paths in (
        [*others, t5_alone, tokenizer],
        [tokenizer, *others, t5_alone],
        [*others, t5_alone, tmp_path / "f" / "tokenizer_2"],
        [tmp_path / "f"],
        [*others, tmp_path / "f" / "text_encoder_2"],
        [*others, tmp_path / "f" / "text_encoder_2" / "model.safetensors"],
    ):
        found = models.load(*paths).require("text").tokenizers["t5"]
        assert found.tokenize("a corgi") == tiny("flux-dev").require("text").tokenizer("t5").tokenize(
            "a corgi"
        )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", "it has no model"),
        (
            "tokenizer.json",
            b'{"model": {"type": "BPE"}}',
            "its model must be 'Unigram', as T5's is, not 'BPE'",
        ),
        ("spiece.model", b"abc", "it is truncated, or neither JSON nor a sentencepiece model"),
    ],
)
def test_a_wrong_tokenizer_is_refused(
    name: str, content: bytes, message: str, saved: Saved, t5_alone: Path
) -> None:
    """If it is given; if it only lies beside T5's weights it may be another model's, and is noted."""
    others, path = saved("flux-dev", *FLUX[:3]), t5_alone.parent / name
    path.write_bytes(content)
    said = f"{path} is not a spiece.model or tokenizer.json of T5: {message}"
    assert (f"{path} is a tokenizer that clip_l or t5 cannot use" if b"BPE" in content else said) in refusal(
        *others, t5_alone, path
    )
    model = models.load(*others, t5_alone)
    assert "t5" not in model.require("text").tokenizers
    assert model.report is not None
    assert [note for note in model.report.notes if said in note]


def test_a_tokenizer_without_t5_is_refused(saved: Saved) -> None:
    (tokenizer,) = saved("flux-dev", "tokenizer.json")
    assert "no text encoder reads it" in refusal(*saved("flux-dev", *FLUX[:3]), tokenizer)
    assert "load it with the weights of the text encoder that reads it" in refusal(tokenizer)


# What is missing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "names", "note"),
    [
        ("flux-dev", FLUX[:3], "text encoders left out: clip_l without t5"),
        ("flux-dev", ("flux-dev", "t5xxl"), "text encoders left out: t5 without clip_l"),
        ("sd3", ("sd3", "clip_g"), "text encoders left out: clip_g without clip_l"),
        (
            "sd3",
            ("sd3", "clip_l", "t5xxl"),
            "text encoders left out: clip_l, t5 without clip_g",
        ),
    ],
)
def test_text_encoders_that_miss_others_are_left_out(
    family: str, names: tuple[str, ...], note: str, saved: Saved
) -> None:
    """The report says so, and so does the error where a text is needed."""
    model = models.load(*saved(family, *names))
    assert model.report is not None
    assert model.text is None
    assert note in notes(model)
    assert "text" in model.report.missing
    with pytest.raises(ValueError, match=f"this model has no text .*{note}"):
        model.require("text")


def test_stable_diffusion_3_does_without_t5(saved: Saved) -> None:
    """Zeros stand in its place; that is noted."""
    model = models.load(*saved("sd3", *SD3[:4]))
    assert list(model.require("text").towers) == ["clip_l", "clip_g"]
    assert notes(model).startswith(
        "without the text encoder t5, which is optional; vae.safetensors does not say whose"
    )
    assert model.require("text").params.context_dim == model.network.params.context_dim  # type: ignore[union-attr]  # SD3's


@pytest.mark.parametrize(
    "of", [("model.", "first_stage_model."), ("model.", "first_stage_model.", "text_encoders.clip"), ("",)]
)
def test_single_files_of_stable_diffusion_3(of: tuple[str, ...], saved: Saved, tmp_path: Path) -> None:
    """As published: without text encoders, with CLIP's, with all; and what else lies in such files."""
    models.save(tiny("sd3"), tmp_path / "all.safetensors", "ldm")
    state = {
        key: value for key, value in load_file(tmp_path / "all.safetensors").items() if key.startswith(of)
    }
    extra: dict[str, Tensor] = {
        f"text_encoders.{name}.logit_scale": torch.ones(()) for name in ("clip_l", "clip_g", "t5xxl")
    }
    extra |= {
        "text_encoders.clip_l.text_projection": torch.eye(64),
        "text_encoders.clip_g.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_encoders.t5xxl.transformer.encoder.embed_tokens.weight": torch.ones(2, 2),
    }
    save_file(state | extra, tmp_path / "a.safetensors")
    model = models.load(tmp_path / "a.safetensors")
    assert model.report is not None
    assert model.report.ignored.keys() == extra.keys()
    towers = [name for name, file in TOWERS["sd3"].items() if any(file in key for key in state)]
    assert list(model.text.towers if model.text else []) == towers
    left_out = tuple(f"text.towers.{name}." for name in TOWERS["sd3"] if name not in towers)
    same(
        whole(model),
        {key: value for key, value in whole(tiny("sd3")).items() if not key.startswith(left_out)},
    )
    with_text = models.load(tmp_path / "a.safetensors", *saved("sd3", *SD3[2:]))
    same(whole(with_text), whole(tiny("sd3")))


# Parts alone, and parts of others ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", [None, "flux-schnell", "sd3", "sd3.5-medium", "sd3.5-large-turbo"])
def test_an_autoencoder_alone(family: str | None, saved: Saved) -> None:
    """Of 16 channels it is FLUX.1's, unless one says that it is Stable Diffusion 3's: shapes are the same,
    the latents' scale is not."""
    model = models.load(*saved("sd3", "vae"), family=family)
    of = models.FAMILIES[family or "flux-dev"]
    assert (model.require("vae").params.scale, model.require("vae").params.shift) == (
        of.vae.scale,
        of.vae.shift,
    )
    assert ("family=... chooses another one" in notes(model)) == (family is None)


def test_text_encoders_alone(saved: Saved) -> None:
    """Those of Stable Diffusion 3 are SDXL's too, without T5; T5 alone is Chroma's, and of no use for
    FLUX.1."""
    clips = saved("sd3", "clip_l", "clip_g")
    assert models.load(*clips).spec["family"] == "sdxl"
    assert (
        models.load(*clips, family="sd3").spec["family"]
        == models.load(*clips, *saved("sd3", "vae")).spec["family"]
        == "sd3"
    )
    assert models.load(*clips, *saved("sd3", "t5xxl")).spec["family"] == "sd3"
    assert models.load(*saved("flux-dev", "clip_l", "t5xxl")).spec["family"] == "flux-dev"
    alone = models.load(*saved("flux-dev", "t5xxl"))
    assert alone.spec["family"] == "chroma"
    assert "prompts are read as in Chroma1-HD: family=... chooses another one" in notes(alone)
    said = refusal(*saved("flux-dev", "t5xxl"), family="flux-dev")
    assert "t5xxl.safetensors holds only a T5 text encoder: load clip_l and t5 together" in said


def test_the_other_flows_autoencoder_is_refused_where_its_configuration_tells(
    saved: Saved, tmp_path: Path
) -> None:
    """Its shapes do not."""
    for family, other, title in (
        ("flux-dev", "sd3", "Stable Diffusion 3 Medium"),
        ("sd3", "flux-dev", r"FLUX.1 [dev]"),
    ):
        models.save(tiny(other), tmp_path / other, "diffusers")
        said = refusal(*saved(family, family), tmp_path / other / "vae")
        own = models.FAMILIES[family].title
        assert f"is the autoencoder of {title}, as its config.json says, not of {own}" in said


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["flux-dev:flux-dev", "sd1:vae"],
            "the FLUX transformer's samples have 16 channels, and its latents 4",
        ),
        (
            ["sd3:sd3", "sd1:vae"],
            "the Stable Diffusion 3 transformer's samples have 16 channels, and its latents 4",
        ),
        (["sd1:sd1", "flux-dev:vae"], "the UNet's samples have 4 channels, and its latents 16"),
        (
            ["sd1:sd1", "flux-dev:t5xxl"],
            "holds a T5 text encoder, which sd1 does not use",
        ),
        (
            ["sdxl:sdxl", "flux-dev:t5xxl"],
            "holds a T5 text encoder, which sdxl does not use",
        ),
        (
            ["flux-dev:flux-dev", "flux-dev:t5xxl", "sd3:clip_g"],
            "the FLUX transformer takes a vector of 64 numbers, and the text encoders",
        ),
    ],
)
def test_parts_of_others_are_refused(files: list[str], message: str, saved: Saved) -> None:
    """In either order, in one line."""
    paths = [path for file in files for path in saved(*file.split(":"))]
    for order in (paths, paths[::-1]):
        assert message in refusal(*order)


@pytest.mark.parametrize("family", ["flux-dev", "sd3"])
def test_a_t5_of_another_width_is_refused(family: str, saved: Saved, tmp_path: Path) -> None:
    state = load_file(saved(family, "t5xxl")[0])
    for key, value in state.items():
        for dim, size in enumerate(value.shape):
            if size == 224:
                state[key] = state[key].narrow(dim, 0, 200).contiguous()
    save_file(state, tmp_path / "t5.safetensors")
    others = saved(family, *(FLUX if family == "flux-dev" else SD3)[:-1])
    assert "takes a context of 224 numbers, and the text encoders make 200" in refusal(
        *others, tmp_path / "t5.safetensors"
    )


# Families and predictions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "family"),
    [
        ("flux-canny", "flux-depth"),
        ("flux-schnell", "flux-dedistilled"),
        ("sd3.5-large", "sd3.5-large-turbo"),
    ],
)
def test_families_that_only_their_user_knows(base: str, family: str, saved: Saved) -> None:
    assert models.load(*saved(base, base)).spec["family"] == base
    model = models.load(*saved(base, base), family=family)
    assert (model.spec["family"], model.spec["sampling"]) == (family, dict(models.FAMILIES[family].sampling))


@pytest.mark.parametrize("family", ["flux-depth", "flux-schnell", "sd3", "sdxl"])
def test_a_family_that_does_not_fit_is_refused(family: str, saved: Saved) -> None:
    base = models.FAMILIES[family].architecture.name
    said = refusal(*saved("flux-dev", "flux-dev"), family=family)
    assert (
        f"has the architecture of flux-dev, so it cannot be of the family {family}, which has that of {base}"
        in said
    )


def test_autoencoders_that_do_not_fit_a_family_are_refused(saved: Saved) -> None:
    assert "cannot be of the family sdxl: its latents have 16 channels, not 4" in refusal(
        *saved("sd3", "vae"), family="sdxl"
    )
    assert "cannot be of the family sd3: its latents have 4 channels, not 16" in refusal(
        *saved("sd1", "vae"), family="sd3"
    )
    assert models.load(*saved("sd1", "vae"), family="sdxl").require("vae").params.scale == 0.13025


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize(
    ("family", "title"), [("flux-dev", "FLUX.1 [dev]"), ("sd3", "Stable Diffusion 3 Medium")]
)
def test_a_flow_predicts_flow(family: str, title: str, prediction: str, saved: Saved) -> None:
    said = refusal(*saved(family, family), prediction=prediction)
    assert f"{title} predicts flow, not '{prediction}': leave prediction out" in said
    assert models.load(*saved(family, family), prediction="flow").prediction.name == "flow"
