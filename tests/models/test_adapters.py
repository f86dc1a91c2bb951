"""Adapters against closed forms on the published tensors, and against PEFT's and diffusers' own code."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from diffusion import Condition
from models import Model
from models.adapters import adapted, load_adapter
from models.adapters.delta import Delta, Hadamard, Kronecker, LowRank, Magnitude, Scaled
from models.adapters.place import Place, places
from models.adapters.read import _groups
from models.files.blank import Blank
from models.files.stored import InMemory, TensorFile
from models.layers import streaming
from models.layers.packed import Packed, is_packed, pack
from models.layers.streaming import is_streamed
from tests.models.files.tiny import tiny
from tests.peers import diffusers, peft

F64 = torch.float64
State = dict[str, Tensor]
GENERATOR = torch.Generator()
FAMILIES = ("sd1", "sdxl", "flux-dev", "sd3.5-medium")


def flat(prefix: str) -> Callable[[str], str]:
    return lambda stem: prefix + stem.replace(".", "_")


def dotted(prefix: str) -> Callable[[str], str]:
    return lambda stem: prefix + stem


# By writer: how it names a module, whose names it uses, and what it calls down, up and alpha.
KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")
PEFT = (".lora_A.weight", ".lora_B.weight", None)
WRITERS: dict[str, tuple[Callable[[str], str], str, tuple[str, str, str | None]]] = {
    "kohya, publisher's names": (flat("lora_unet_"), "single", KOHYA),
    "kohya, diffusers' names": (flat("lora_unet_"), "diffusers", KOHYA),
    "OneTrainer": (flat("lora_transformer_"), "diffusers", KOHYA),
    "SimpleTuner": (flat("lycoris_"), "diffusers", KOHYA),
    "PEFT": (dotted("base_model.model."), "diffusers", PEFT),
    "diffusers": (dotted("unet."), "diffusers", PEFT),
    "ai-toolkit": (dotted("transformer."), "diffusers", PEFT),
    "diffusers' script": (dotted("unet."), "diffusers", (".lora.down.weight", ".lora.up.weight", None)),
    "ComfyUI": (dotted("diffusion_model."), "single", KOHYA),
    "BFL": (dotted(""), "single", PEFT),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], State]:
    """The tensors of a miniature's backbone as its publisher names them, or as diffusers does."""
    root = tmp_path_factory.mktemp("published")

    @cache
    def state(family: str, names: str) -> State:
        model = tiny(family)
        alone = Model(model.backbone, model.schedule, model.prediction, model.spec)
        alone.spec = {
            key: value for key, value in model.spec.items() if key not in ("vae", "text", "preview")
        }
        layout: Any = "separate" if names == "single" else "diffusers"
        models.save(alone, root / f"{family}-{names}", layout)
        (path,) = (root / f"{family}-{names}").rglob("*.safetensors")
        return load_file(path)

    return state


def random_lora(
    base: State, ending: tuple[str, str, str | None], named: Callable[[str], str]
) -> tuple[State, State]:
    """A LoRA of every matrix and convolution, each with its rank and alpha, every fifth without one; and by
    base key what it adds to W at strength 1, in float64."""
    generator = torch.Generator().manual_seed(0)
    file, added = State(), State()
    weights = [key for key, w in base.items() if key.endswith(".weight") and w.ndim > 1]
    for i, key in enumerate(weights):
        w, rank = base[key], 1 + i % 3
        down = torch.randn(rank, *w.shape[1:], generator=generator) / math.sqrt(w[0].numel())
        up = torch.randn(len(w), rank, *(1,) * (w.ndim - 2), generator=generator)
        stem, alpha = named(key.removesuffix(".weight")), None
        file |= {stem + ending[0]: down, stem + ending[1]: up}
        if ending[2] and i % 5:
            alpha = 0.5 + i % 4
            file[stem + ending[2]] = torch.tensor(alpha)
        product = up.to(F64).flatten(1) @ down.to(F64).flatten(1)
        added[key] = (product * ((alpha or rank) / rank)).reshape(w.shape)
    return file, added


def moved(base: State, added: State, strength: float) -> State:
    return {
        key: (w.to(F64) + strength * added[key]).to(w.dtype) if key in added else w for key, w in base.items()
    }


def close(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], of: str = "network.") -> None:
    assert ours.keys() == theirs.keys()
    odd = [
        key
        for key in ours
        if key.startswith(of) and not torch.allclose(ours[key], theirs[key], rtol=1e-6, atol=1e-6)
    ]
    assert odd == []


Base = Callable[[str, str], tuple[Model, State, Path]]


@pytest.fixture(scope="module")
def base(published: Callable[[str, str], State], tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The backbone alone, loaded from the tensors of `published`, with these and their file."""
    root = tmp_path_factory.mktemp("bases")

    @cache
    def model(family: str, names: str) -> tuple[Model, State, Path]:
        save_file(published(family, names), root / f"{family}-{names}.safetensors")
        path = root / f"{family}-{names}.safetensors"
        return models.load(path, family=family), published(family, names), path

    return model


# Every family's names of either kind, and every writer with one family.
PAIRS = [(writer, family) for writer in list(WRITERS)[:2] for family in FAMILIES]
PAIRS += [(writer, FAMILIES[i % len(FAMILIES)]) for i, writer in enumerate(list(WRITERS)[2:])]


@pytest.mark.parametrize(("writer", "family"), PAIRS)
def test_a_lora_of_every_writer(family: str, writer: str, base: Base, tmp_path: Path) -> None:
    """Merged into the published tensors in float64, and loaded, it is the same, on either layout's base."""
    named, names, ending = WRITERS[writer]
    model, tensors, _ = base(family, names)
    lora, added = random_lora(tensors, ending, named)
    save_file(lora, tmp_path / "lora.safetensors")
    save_file(moved(tensors, added, 0.7), tmp_path / "merged.safetensors")
    merged = models.load(tmp_path / "merged.safetensors", family=family).state_dict()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for start in (model, base(family, "single")[0]):
        close(adapted(start, {tmp_path / "lora.safetensors": 0.7}).state_dict(), merged)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_xlabs_names_attention_processors(base: Base, tmp_path: Path) -> None:
    """1 is the image's, 2 the text's; of a single block's first product the rows of query, key and value."""
    model, tensors, _ = base("flux-dev", "single")
    lora, added = State(), State()
    for stem, key in {
        "double_blocks.0.processor.qkv_lora1": "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.processor.proj_lora2": "double_blocks.0.txt_attn.proj.weight",
        "single_blocks.0.processor.qkv_lora": "single_blocks.0.linear1.weight",
        "single_blocks.0.processor.proj_lora": "single_blocks.0.linear2.weight",
    }.items():
        rows = 3 * tensors[key].shape[1] if "linear1" in key else len(tensors[key])
        down, up = torch.randn(2, tensors[key].shape[1]), torch.randn(rows, 2)
        lora |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        added[key] = torch.zeros(tensors[key].shape, dtype=F64)
        added[key][:rows] = up.to(F64) @ down.to(F64)
    save_file(lora, tmp_path / "lora.safetensors")
    save_file(moved(tensors, added, 1.0), tmp_path / "merged.safetensors")
    merged = models.load(tmp_path / "merged.safetensors", family="flux-dev").state_dict()
    close(adapted(model, {tmp_path / "lora.safetensors": 1.0}).state_dict(), merged)


TOWERS: dict[str, dict[str, tuple[str, ...]]] = {
    "sd1": {"text_encoder": ("lora_te_", "lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.")},
    "sdxl": {
        "text_encoder": ("lora_te1_", "text_encoder."),
        "text_encoder_2": ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer."),
    },
    "flux-dev": {
        "text_encoder": ("lora_te1_",),
        "text_encoder_2": ("lora_te3_", "lora_te2_", "text_encoder_2.", "text_encoders.t5xxl.transformer."),
    },
}


@pytest.mark.parametrize("family", TOWERS)
def test_text_encoders_of_every_writer(family: str, tmp_path: Path) -> None:
    """With a strength of their own."""
    models.save(tiny(family), tmp_path / "base", "diffusers")
    model = models.load(tmp_path / "base")
    for folder, prefixes in TOWERS[family].items():
        file = tmp_path / "base" / folder / "model.safetensors"
        tensors = load_file(file)
        layers = {key: value for key, value in tensors.items() if not re.search("embed|shared|relative", key)}
        _, added = random_lora(layers, KOHYA, str)
        save_file(moved(tensors, added, 0.5), file, {"format": "pt"})
        merged = models.load(tmp_path / "base").state_dict()
        save_file(tensors, file, {"format": "pt"})
        for prefix in prefixes:
            named = flat(prefix) if prefix.endswith("_") else dotted(prefix)
            save_file(random_lora(layers, KOHYA, named)[0], tmp_path / "lora.safetensors")
            ours = adapted(model, {tmp_path / "lora.safetensors": {"text": 0.5}})
            close(ours.state_dict(), merged, "text.")


# Kinds, against other code ----------------------------------------------------------------------------------

LAYERS: dict[str, Callable[[], Any]] = {
    "linear": lambda: torch.nn.Linear(12, 8, bias=False),
    "convolution": lambda: torch.nn.Conv2d(6, 8, 3, bias=False),
}


def made(kind: str) -> tuple[Any, Tensor]:
    """A layer, and its weight in float64."""
    layer = LAYERS[kind]()
    return layer, next(layer.parameters()).detach().double().clone()


def peft_merged(layer: Any, config: Any) -> tuple[State, Tensor]:
    """The tensors of PEFT's adapter of one layer, drawn at random, and the weight that it merges."""
    model = peft.get_peft_model(torch.nn.Sequential(copy.deepcopy(layer)).double(), config)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "base_layer" not in name:
            torch.nn.init.normal_(p, std=0.5, generator=generator)
    state = {
        key.rpartition("0.")[2]: value.clone() for key, value in peft.get_peft_model_state_dict(model).items()
    }
    merged: Any = model.merge_and_unload()
    return state, merged[0].weight.detach()


def same_change(delta: Delta, w: Tensor, merged: Tensor) -> None:
    torch.testing.assert_close(w + delta.difference(w), merged, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_lora_and_dora_are_pefts(kind: str) -> None:
    layer, w = made(kind)
    state, merged = peft_merged(layer, peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"]))
    same_change(LowRank(state["lora_A.weight"], state["lora_B.weight"], 0.5), w, merged)
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"], use_dora=True)
    state, merged = peft_merged(layer, config)
    inner = LowRank(state["lora_A.weight"], state["lora_B.weight"], 0.5)
    same_change(Magnitude(inner, state["lora_magnitude_vector"]), w, merged)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("effective", [False, True])
def test_loha_and_lokr_are_pefts(kind: str, effective: bool) -> None:
    layer, w = made(kind)
    options: dict[str, Any] = dict(r=4, alpha=2, target_modules=["0"], use_effective_conv2d=effective)
    state, merged = peft_merged(layer, peft.LoHaConfig(**options))
    sides = [
        tuple(state[f"hada_{name}"] for name in (f"w{i}_a", f"w{i}_b", f"t{i}") if f"hada_{name}" in state)
        for i in (1, 2)
    ]
    same_change(Hadamard(sides[0], sides[1], 0.5), w, merged)
    layer, w = made(kind)
    state, merged = peft_merged(layer, peft.LoKrConfig(**options, decompose_both=False))
    first = (state["lokr_w1"],)
    second = tuple(state[f"lokr_{name}"] for name in ("w2", "w2_a", "w2_b", "t2") if f"lokr_{name}" in state)
    same_change(Kronecker(first, second, 0.5), w, merged)


def test_dora_of_columns_and_ia3_by_hand() -> None:
    w, up, down = (torch.randn(*shape, dtype=F64) for shape in ((4, 4), (4, 2), (2, 4)))
    inner, m = LowRank(down, up), torch.rand(1, 4, dtype=F64)
    v = w + up @ down
    same_change(Magnitude(inner, m, 1), w, m * v / v.square().sum(0, keepdim=True).sqrt())
    same_change(Magnitude(inner, m.T), w, m.T * v / v.square().sum(1, keepdim=True).sqrt())
    same_change(Scaled(m), w, w * (1 + m))


# Bad input --------------------------------------------------------------------------------------------------


def refusal(model: Model, path: Path) -> str:
    """What is said of a file; no weight is touched by it."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        adapted(model, {path: 1.0})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    text = str(error.value)
    assert "\n" not in text
    assert str(path) in text
    return text


X = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
BAD: dict[str, tuple[Callable[[State], State], str]] = {
    "ghost": (lambda lora: {**lora, "lora_unet_ghost.lora_down.weight": torch.ones(1, 4)}, "lora_unet_ghost"),
    "half": (lambda lora: {k: v for k, v in lora.items() if k != f"{X}.lora_up.weight"}, f"{X}.lora_down"),
    "ranks": (lambda lora: {**lora, f"{X}.lora_up.weight": torch.ones(32, 7)}, "the rank of its two factors"),
    "sizes": (lambda lora: {**lora, f"{X}.lora_down.weight": torch.ones(1, 7)}, "a weight of [32, 7]"),
    "nan": (lambda lora: {**lora, f"{X}.lora_up.weight": torch.full((32, 1), math.nan)}, "not finite"),
    "integers": (lambda lora: {**lora, f"{X}.lora_up.weight": torch.ones(32, 1, dtype=torch.int32)}, "int32"),
    "alphas": (lambda lora: {**lora, f"{X}.alpha": torch.ones(3)}, "alpha has 3 values"),
    "twice": (
        lambda lora: {**lora, f"{X.replace('lora_unet', 'lycoris')}.diff": torch.ones(32, 32)},
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight twice",
    ),
    "oft": (lambda lora: {**lora, f"{X}.oft_blocks": torch.ones(4, 4, 4)}, "OFT"),
    "lllite": (lambda lora: {"lllite_unet_a.down.0.weight": torch.ones(4, 4)}, "ControlNet-LLLite"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused_in_a_line(case: str, base: Base, tmp_path: Path) -> None:
    change, expected = BAD[case]
    model, tensors, _ = base("sd1", "diffusers")
    named = flat("lora_unet_")
    lora, _ = random_lora(tensors, KOHYA, named)
    save_file(change(lora), tmp_path / "lora.safetensors")
    assert expected in refusal(model, tmp_path / "lora.safetensors")


def test_adapters_of_other_models_and_whole_checkpoints(base: Base, tmp_path: Path) -> None:
    """The message says what the file looks made for, without metadata."""
    model, _, path = base("sd1", "diffusers")
    assert "models.load" in refusal(model, path)
    for family, names, words in (
        ("flux-dev", "single", "FLUX.1"),
        ("sd3.5-medium", "diffusers", "Stable Diffusion 3"),
    ):
        lora, _ = random_lora(base(family, names)[1], KOHYA, flat("lora_unet_"))
        save_file(lora, tmp_path / "lora.safetensors")
        text = refusal(model, tmp_path / "lora.safetensors")
        assert re.search(f"does not fit Stable Diffusion 1.*looks made for {words}", text)
    with pytest.raises(FileNotFoundError):
        adapted(model, {tmp_path / "nothing.safetensors": 1.0})


def test_what_fits_is_taken_on_request(base: Base, tmp_path: Path) -> None:
    model, tensors, _ = base("sd1", "diffusers")
    lora, added = random_lora(tensors, KOHYA, flat("lora_unet_"))
    lora |= {"lora_unet_ghost.lora_down.weight": torch.ones(1, 4), "lora_unet_ghost.alpha": torch.ones(())}
    save_file(lora, tmp_path / "lora.safetensors")
    adapter = load_adapter(tmp_path / "lora.safetensors", model, strict=False)
    assert len(adapter.deltas) == len(added)
    assert "left out: 1" in adapter.notes[0]


def test_strength_0_and_taking_off_is_the_base(base: Base, tmp_path: Path) -> None:
    """Bitwise, in any order, in bf16; two adapters add up, whatever their order."""
    _, tensors, path = base("sd1", "diffusers")
    lora, _ = random_lora(tensors, KOHYA, flat("lora_unet_"))
    save_file(lora, tmp_path / "a.safetensors")
    save_file(
        {key: -2 * value for key, value in lora.items() if "up" in key or "down" in key}, tmp_path / "b.sft"
    )
    half = models.load(path, family="sd1", dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in half.state_dict().items()}
    both = [{tmp_path / "a.safetensors": 0.5, tmp_path / "b.sft": 1.5}]
    both.append(dict(reversed(both[0].items())))
    first, second = (adapted(half, each).state_dict() for each in both)
    off = adapted(half, {tmp_path / "a.safetensors": 0.0}).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())
    assert all(torch.equal(off[name], value) for name, value in before.items())
    close(first, second)
    report = adapted(half, both[0]).report
    assert report is not None
    assert f"adapted by {tmp_path / 'a.safetensors'} at 0.5" in str(report)
    assert "adapted" not in str(half.report)
    with pytest.raises(ValueError, match=r"strength of a\.safetensors"):
        adapted(half, {tmp_path / "a.safetensors": "strong"})  # type: ignore[dict-item]


# Apart ------------------------------------------------------------------------------------------------------


def outputs(network: Any) -> Tensor:
    """What a backbone makes of a batch of two at different times."""
    params, generator = network.params, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    condition = Condition(
        context=draw(5, params.context_dim),
        vector=None if params.vector_dim is None else draw(params.vector_dim),
        guidance=torch.tensor([3.5, 1.0]) if "guidance" in params.takes else None,
    )
    with torch.no_grad():
        return network(draw(params.in_channels, 8, 8), torch.tensor([0.3, 0.9]), condition)


@pytest.mark.parametrize("family", FAMILIES)
def test_apart_computes_what_is_merged(family: str, base: Base, tmp_path: Path) -> None:
    """Two adapters of all layers, convolutions and modulations too; the weights are the base's own."""
    model, tensors, _ = base(family, "single")
    for i, name in enumerate("ab"):
        lora, _ = random_lora({key: w / (1 + i) for key, w in tensors.items()}, KOHYA, flat("lora_unet_"))
        save_file({key: value * 0.5 for key, value in lora.items()}, tmp_path / f"{name}.safetensors")
    adapters = {tmp_path / "a.safetensors": 0.7, tmp_path / "b.safetensors": -0.2}
    merged, apart = adapted(model, adapters).network, adapted(model, adapters, apart=True).network
    assert (outputs(merged) - outputs(model.network)).abs().max() > 0.1
    torch.testing.assert_close(outputs(apart), outputs(merged), rtol=1e-5, atol=2e-5)
    own, theirs = dict(apart.named_parameters()), dict(model.network.named_parameters())
    assert all(own[name] is theirs[name] for name in theirs)
    again = adapted(model, adapters, apart=True)
    for use in (lambda: adapted(again, adapters), lambda: models.save(again, tmp_path / "no.safetensors")):
        with pytest.raises(ValueError, match="adapters apart"):
            use()


def test_packed_weights_take_adapters_apart(base: Base, tmp_path: Path) -> None:
    """Exactly, and without being unpacked; a change that needs their values is refused by its name."""
    model, tensors, _ = base("flux-dev", "single")
    packed = dataclasses.replace(model, backbone=copy.deepcopy(model.network))
    for name, layer in list(packed.network.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            pack(
                packed.network,
                name,
                Packed("fp8", layer.weight.detach().to(torch.float8_e4m3fn), torch.ones(())),
            )
    lora, _ = random_lora(tensors, KOHYA, flat("lora_unet_"))
    save_file(lora, tmp_path / "lora.safetensors")
    path = {tmp_path / "lora.safetensors": 0.1}
    merged = adapted(packed.unpacked(torch.float32), path).network
    apart = adapted(packed, path, apart=True).network
    assert is_packed(apart)
    torch.testing.assert_close(outputs(apart), outputs(merged), rtol=1e-5, atol=2e-5)
    with pytest.raises(ValueError, match="is packed: apart=True"):
        adapted(packed, path)
    key = next(key for key, w in tensors.items() if w.ndim == 2)
    save_file({key.replace(".weight", ".diff"): torch.ones_like(tensors[key])}, tmp_path / "full.safetensors")
    with pytest.raises(ValueError, match="is packed: Added needs its values"):
        adapted(packed, {tmp_path / "full.safetensors": 1.0}, apart=True)


def test_streamed_models_take_adapters_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of which blocks come and go computes what the whole one does, bit for bit; so does its base."""
    large = models.miniature("flux-dev", depth=3, depth_single=3, hidden=256, heads=2, axes=(16, 56, 56))
    models.save(large, tmp_path / "base", "separate")
    (path,) = tmp_path.glob("base/flux-dev*")
    model = models.load(path, family="flux-dev")
    lora, _ = random_lora(load_file(path), KOHYA, flat("lora_unet_"))
    save_file(lora, tmp_path / "lora.safetensors")
    monkeypatch.setattr(streaming, "resident_bytes", lambda: 0)
    with pytest.raises(ValueError, match="give at least") as error:
        models.load(path, family="flux-dev", memory="1KB")
    least = str(error.value).rsplit(" ", 1)[-1]
    streamed = models.load(path, family="flux-dev", memory=least)
    assert is_streamed(streamed.network)
    adapter = {tmp_path / "lora.safetensors": 0.3}
    ours, whole = (adapted(each, adapter, apart=True).network for each in (streamed, model))
    for network, other in ((ours, whole), (streamed.network, model.network), (ours, whole)):
        assert torch.equal(outputs(network), outputs(other))
    with pytest.raises(ValueError, match="apart=True"):
        adapted(streamed, adapter)
    before = outputs(ours.to(dtype=torch.bfloat16).to(dtype=torch.float32))
    assert not torch.equal(before, outputs(whole))


# Published adapters -----------------------------------------------------------------------------------------

OF = {"sd15": "sd1", "lcm_lora_sd15": "sd1", "sdxl": "sdxl", "lcm_lora_sdxl": "sdxl", "flux1": "flux-dev"}
OF |= {"sd35_large": "sd3.5-large"}


@cache
def manifests() -> dict[str, dict[str, list[int]]]:
    """Keys and shapes of published adapters, by who wrote them."""
    with gzip.open(Path(__file__).with_name("adapters.json.gz"), "rt") as file:
        found: dict[str, dict[str, list[int]]] = json.load(file)
    return found


@cache
def published_places(family: str) -> dict[str, dict[str, Place]]:
    with Blank():
        return places(models.published(family))


@pytest.mark.parametrize("name", manifests())
def test_published_adapters_map_without_remainder(name: str) -> None:
    """Every module is one of the published model's, and changes it at its shape."""
    family = next(family for begin, family in OF.items() if name.startswith(begin))
    blank = {
        key: InMemory.from_tensor(Path("a"), key, torch.empty(shape, device="meta"))
        for key, shape in manifests()[name].items()
    }
    groups, rest = _groups(TensorFile(Path(name), blank))
    assert [stored.key for stored in rest if not stored.key.startswith("bundle_emb.")] == []
    unknown = [stem for stem in groups if stem not in published_places(family)]
    assert unknown == []
    for stem, group in groups.items():
        if {"down", "up"} <= group.keys() and not (
            stem == "img_in" and "canny_depth" in name
        ):  # is made wider
            weight = torch.empty(published_places(family)[stem]["weight"].shape, device="meta")
            factors = {leaf: torch.empty(stored.shape, device="meta") for leaf, stored in group.items()}
            change = LowRank(factors["down"], factors["up"], mid=factors.get("mid"))
            assert change.difference(weight).shape == weight.shape


def test_folders_of_peft(tmp_path: Path) -> None:
    """Ranks and alphas by pattern, and rank-stabilised scales, as PEFT merges them; its config counts."""
    models.save(tiny("sd1"), tmp_path / "base", "diffusers")
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base" / "unet")
    config = peft.LoraConfig(
        r=4, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"],
        init_lora_weights=False, use_rslora=True,
        rank_pattern={"attn2.to_k": 3, "conv1": 2}, alpha_pattern={"to_out.0": 7, "attn1.to_v": 1},
    )  # fmt: skip
    wrapped = peft.get_peft_model(unet, config)
    wrapped.save_pretrained(tmp_path / "adapter")
    model = models.load(tmp_path / "base")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "base" / "unet")
    merged = models.load(tmp_path / "base").state_dict()
    close(adapted(model, {tmp_path / "adapter": 1.0}).state_dict(), merged)
    alone = adapted(model, {tmp_path / "adapter" / "adapter_model.safetensors": 1.0}).state_dict()
    assert any(not torch.allclose(alone[name], merged[name], atol=1e-4) for name in merged)
    for config, message in {
        '{"peft_type": "VERA"}': "peft_type 'VERA'",
        '{"lora_alpha": "strong"}': "lora_alpha must be a number",
        '{"alpha_pattern": {"(": 1}}': "cannot be read",
        '{"alpha_pattern": [1]}': "alpha_pattern must be",
    }.items():
        (tmp_path / "adapter" / "adapter_config.json").write_text(config)
        with pytest.raises(ValueError, match=message):
            adapted(model, {tmp_path / "adapter": 1.0})


def test_names_of_old_diffusers_and_its_metadata(base: Base, tmp_path: Path) -> None:
    """Attention processors of 2023 stand for their layers; diffusers may write alpha to the header."""
    model, tensors, _ = base("sd1", "diffusers")
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    lora, added = State(), State()
    for old, key in {"to_q": f"{stem}.to_q.weight", "to_out": f"{stem}.to_out.0.weight"}.items():
        down, up = torch.randn(2, tensors[key].shape[1]), torch.randn(len(tensors[key]), 2)
        lora |= {
            f"unet.{stem}.processor.{old}_lora.down.weight": down,
            f"unet.{stem}.processor.{old}_lora.up.weight": up,
        }
        added[key] = up.to(F64) @ down.to(F64)
    save_file(lora, tmp_path / "lora.safetensors")
    settings = {"unet.r": 2, "unet.lora_alpha": 3, "unet.alpha_pattern": {}}
    save_file(lora, tmp_path / "alpha.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    for name, scale in {"lora": 1.0, "alpha": 1.5}.items():
        save_file(moved(tensors, added, scale), tmp_path / "merged.safetensors")
        merged = models.load(tmp_path / "merged.safetensors", family="sd1").state_dict()
        close(adapted(model, {tmp_path / f"{name}.safetensors": 1.0}).state_dict(), merged)


def test_an_sdxl_lora_on_sd1_is_told_so(tmp_path: Path) -> None:
    """By the width of the context where names fit, and by its second text encoder; or the rest is taken."""
    key, second = (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k",
        "lora_te2_text_model_encoder_layers_0",
    )
    wide = {f"{key}.lora_down.weight": torch.ones(1, 2048), f"{key}.lora_up.weight": torch.ones(640, 1)}
    fits = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    wide |= {f"{fits}.lora_down.weight": torch.ones(1, 768), f"{fits}.lora_up.weight": torch.ones(3072, 1)}
    q = f"{second}_self_attn_q_proj"
    towers = {f"{q}.lora_down.weight": torch.ones(1, 1280), f"{q}.lora_up.weight": torch.ones(1280, 1)}
    with Blank():
        sd1 = models.published("sd1")
    for name, lora in {"wide": wide, "towers": towers}.items():
        save_file(lora, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=r"does not fit .*it looks made for Stable Diffusion XL$"):
            load_adapter(tmp_path / f"{name}.safetensors", sd1)
    rest = load_adapter(tmp_path / "wide.safetensors", sd1, strict=False)
    assert [place.key for place in rest.deltas] == ["text_model.encoder.layers.0.mlp.fc1.weight"]
    assert "left out: 1" in rest.notes[0]
