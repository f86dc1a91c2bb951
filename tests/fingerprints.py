"""Fingerprints of what the library computes, to show that the redesign of `models/` changes no number. Removed when that is done.

    python -m tests.fingerprints write FILE [PATTERN ...]
    python -m tests.fingerprints compare FILE [PATTERN ...] [--tolerance 1e-5]

`write` records every result in FILE (JSON), by name. All of them are computed from files of weights in the folder beside it (FILE
without its ending, and "-weights"), in published layouts. `write` makes that folder where there is none, and otherwise takes it as it is;
`compare` only reads it. So parameters may be renamed, and modules made in another order.

`compare` computes everything again, prints each name whose result is another one and by how much, and ends with status 1 if there is any.
--tolerance compares sampled values instead of bits, relative to the largest value of the tensor: for a change that may alter rounding.
Texts and contents of files must still be equal. What is computed in bfloat16 may then differ by a few of its own roundings.

A PATTERN, as in the shell, selects names by how they begin: "sampling/flux", "*/sd3". With patterns `write` replaces those names only.

Everything runs on one thread of the CPU. The bits are the same on one machine with one version of torch; `compare` says if these differ.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import models
import samplers
from configs import compose
from diffusion import Condition
from models import Model
from models.files.text import read_json_lines
from models.networks.tiling import decode_tiled, encode_tiled
from samplers.prompting import Prompts, conditions, vector_numbers
from samplers.usage import usage
from tests.models import small
from train import run

Result = Tensor | str
Results = dict[str, Result]
Layout = Literal["native", "ldm", "diffusers", "separate"]

# How the library is called: what the redesign changes is changed here, and nowhere below ------------------------------------

RENAMED: dict[str, str] = {}  # patterns of names of parameters when weights were written, and what they are called now


def open_model(*paths: Path) -> Model:
    """A model from files. Its weights are copied, to lie in memory alike however they were loaded, which may decide the last bit."""
    model = models.load(*paths)
    for part in model.parts.values():
        for value in (*part.parameters(), *part.buffers()):
            value.data = value.data.clone()
        part.requires_grad_(False)
    return model


def inputs(params: Any, size: tuple[int, int] = (4, 8)) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, t and the conditions for a batch of two, at times far apart; the second label is the null label."""
    generator = torch.Generator().manual_seed(1)
    told: dict[str, Tensor] = {}
    whole = torch.randn(2, params.in_channels, *size, generator=generator)
    x = whole[:, : params.sample_channels]
    if "image" in params.takes:
        told["image"] = whole[:, params.sample_channels :]
    if "label" in params.takes:
        told["label"] = torch.tensor([3, params.num_classes])
    if "context" in params.takes:
        told["context"] = torch.randn(2, 154, params.context_dim, generator=generator)
    if "vector" in params.takes:
        told["vector"] = torch.randn(2, params.vector_dim, generator=generator)
    if "guidance" in params.takes:
        told["guidance"] = torch.tensor([1.75, 8.5])
    flows = isinstance(params, models.FluxParams | models.SD3Params)
    return x, torch.tensor([0.00325, 0.9876] if flows else [3.25, 987.6]), told


def call(network: nn.Module, x: Tensor, t: Tensor, told: Mapping[str, Tensor]) -> Tensor:
    """The network's output for conditions by name: label, context, vector, guidance."""
    return network(x, t, Condition(**told))


def encode(model: Model, *prompts: str, **how: Any) -> Results:
    """What the network is told of prompts, and the ends of them that it is not told."""
    return _told(*model.require("text").encode(prompts, numbers=vector_numbers(model, SIZE), **how))


def encode_nothing(model: Model, n: int, **how: Any) -> Results:
    """What it is told where there is no prompt."""
    return _told(model.require("text").null(n, numbers=vector_numbers(model, SIZE), **how), [""] * n)


def _told(condition: Condition, dropped: Sequence[str]) -> Results:
    return {**condition.given, "dropped": "\n".join(dropped)}


def encode_batch(model: Model, prompts: Sequence[str], negative: Sequence[str | None], **how: Any) -> Results:
    """What it is told of a batch for guidance, prompts and negative prompts, as `generate` does it."""
    read = conditions(model, Prompts(tuple(prompts), tuple(negative), tuple(range(len(prompts))), **how), vector_numbers(model, SIZE))
    sides = {"cond": read.condition.given, "null": read.null.given}
    return {f"{side} {name}": value for side, values in sides.items() for name, value in values.items()}


def draw(model: Model, prompts: str | Sequence[str] | None = None, **settings: Any) -> Results:
    """Latents after the last step, and images."""
    steps: list[samplers.Step] = []
    size = {} if "image" in settings else dict(zip(("height", "width"), SIZE, strict=True))
    settings = {"seeds": SEEDS, "steps": 3, **size, **settings}
    images = samplers.generate(model, PROMPTS if prompts is None else prompts, watch=steps.append, **settings)
    return {"latents": steps[-1].x, "images": images}


def sees(model: Model) -> dict[str, Any]:
    """What a network has to see beside the sample: a picture, and a mask if it is one for inpainting."""
    channels = model.image_channels
    return ({"image": PICTURE} if channels else {}) | ({"mask": MASK} if channels not in (0, model.shape[0]) else {})


def guided(model: Model) -> dict[str, Any]:
    """Settings for guidance away from a negative prompt."""
    return {"negative": ["ugly", ""]} | ({"guidance": 3.0, "true_cfg": 2.0} if model.embeds_guidance else {"guidance": 4.0})


def unguided(model: Model) -> dict[str, Any]:
    """Settings without classifier-free guidance."""
    return {} if model.embeds_guidance else {"guidance": 1.0}


def meant(model: Model) -> Results:
    """How a model is meant to be sampled, and what follows from its description: levels of its grid, (t, alpha, sigma) by rows."""
    how = usage(model)
    grid = torch.tensor([[float(value) for value in level] for level in how.levels(model)], dtype=torch.float64)
    return {
        "levels": grid,
        "usage": f"{how.sampler}, {how.steps} steps, guidance {how.guidance:g}, prediction {model.prediction.name}, "
        f"family {model.spec.get('family')}",
    }


def report(model: Model) -> Results:
    """The account of every key that was loaded, and the remarks on it."""
    said = model.report
    assert said is not None
    ignored = [f"ignored {key}: {why}" for key, why in sorted(said.ignored.items())]
    names = _sha256("\n".join(sorted(said.consumed)).encode())
    lines = [f"{said.layout}, {len(said.consumed)} taken, of names {names}", f"missing {', '.join(said.missing)}", *ignored]
    return {"report": "\n".join(lines), "notes": "\n".join(said.notes)}


def save_again(model: Model, place: Path, layout: Layout) -> bool:
    """Whether a model can be written in that layout; then it is."""
    try:
        models.save(model, place, layout)
    except ValueError:
        return False
    return True


def with_weights(spec: Mapping[str, Any], file: Path, place: Path) -> Path:
    """A model of our own with the stored weights, in our own layout."""
    model = models.build(spec)
    _fill(model.network, file)
    models.save(model, place)
    return place


def train(config: Mapping[str, Any]) -> Results:
    """Losses and norms of the gradient, step by step."""
    if not run(config):
        raise RuntimeError("a training was interrupted")
    lines = read_json_lines(Path(config["run"]) / "metrics.jsonl")
    return {name: torch.tensor([line[name] for line in lines], dtype=torch.float64) for name in ("loss", "grad_norm")}


# Weights -------------------------------------------------------------------------------------------------------------------

BASES = (
    "sd1", "sd2", "sdxl", "sdxl-refiner", "flux-dev", "flux-schnell", "flux-fill", "flux-canny", "sd3", "sd3.5-medium", "sd3.5-large",
)  # fmt: skip
SAME_PARTS = ("sd-turbo", "sdxl-turbo", "lcm-sdxl", "flux-dedistilled", "flux-depth", "sd3.5-large-turbo")  # as others
FAMILIES = (*BASES, "sd2-v", "lcm", "sdxl-v", "playground-v2.5", *SAME_PARTS)
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {  # networks that see a picture: the family, and what is changed of its network
    "sd1-inpaint": ("sd1", {"in_channels": 9}),
    "sd1-edit": ("sd1", {"in_channels": 8}),
    "sdxl-inpaint": ("sdxl", {"in_channels": 9, "attention": (0, 1), "middle_attention": 1}),
}
WORDS = ("sd1-words", "sdxl-words")  # whose CLIP-L has words of its own
KINDS = ("UNet, ADM", "DiT, classes", "DiT, variance", "DiT, text")
DIGITS = ("digits_unet", "digits_dit")


def make_weights(folder: Path) -> None:
    """All files of weights; files of the same content are one."""
    there: dict[str, Path] = {}
    for name in (*FAMILIES, *OTHERS, *WORDS):
        model = _with_words(name.removesuffix("-words")) if name in WORDS else _miniature(*OTHERS.get(name, (name, {})))
        models.save(model, folder / name, layout="diffusers")
        for file in filter(Path.is_file, (folder / name).rglob("*")):
            first = there.setdefault(_sha256(file.read_bytes()), file)
            if first != file:
                file.unlink()
                os.link(first, file)
    networks = {kind: small.KINDS[kind].fresh() for kind in KINDS}
    networks |= {name: models.build(_experiment(name)["model"]).network for name in DIGITS}
    for name, network in networks.items():
        _draw_weights(network, name)
        save_file(network.state_dict(), _file(folder, name))


def _miniature(family: str, network: dict[str, Any]) -> Model:
    return _drawn(models.miniature(family, **network))


def _with_words(family: str) -> Model:
    from models.presets import TINY_TOWERS, tiny_description  # here, as below: where there are weights, this is not needed
    from models.text.clip_tokenizer import EOS, CLIPTokenizer, Vocabulary
    from models.text.vocabulary import AddedToken

    towers = {**TINY_TOWERS, "clip_l": replace(cast(models.CLIPTextParams, TINY_TOWERS["clip_l"]), vocab=EOS + 3)}
    model = models.build({**tiny_description(family, towers), "shape": [4, 16, 16]})
    added = AddedToken(EOS + 1, "<cat-toy>"), AddedToken(EOS + 2, "<cat-toy>_1")
    model.require("text").tokenizers["clip_l"] = CLIPTokenizer(Vocabulary(added=added))
    return _drawn(model)


def _drawn(model: Model) -> Model:
    """Every part and tower gets weights of its own seed, so that models share those that have the same shapes."""
    for name, part in {**model.parts, **dict(model.require("text").towers.named_children())}.items():
        _draw_weights(part, name)
    return model


def _draw_weights(part: nn.Module, name: str) -> None:
    from models.presets import randomise

    randomise(part, torch.Generator().manual_seed(int(_sha256(name.encode())[:8], 16)))


def _file(weights: Path, name: str) -> Path:
    return weights / f"{name.replace(', ', '-')}.safetensors"


def _fill(network: nn.Module, file: Path) -> None:
    """Give a network the weights of a file, under the names that they have now."""
    state = load_file(file)
    for old, new in RENAMED.items():
        state = {re.sub(old, new, name): value for name, value in state.items()}
    network.load_state_dict(state)


@lru_cache(maxsize=2)
def _opened(place: Path) -> Model:
    return open_model(place)


# What is computed ----------------------------------------------------------------------------------------------------------

SIZE = (32, 64)
SEEDS = [3, 4]
LONG = "a very long story of many words and a corgi, " * 9  # two chunks of 75 tokens
PROMPTS = ["a corgi in a field, (very) happy", LONG]
WEIGHTED = "a (red:1.5) cat on [a mat], (not a (dog:0.3):1.2)"


def _picture(channels: int, seed: int) -> Tensor:
    coarse = torch.rand(1, channels, 5, 7, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, SIZE, mode="bilinear")


PICTURE, MASK = _picture(3, 0), (_picture(1, 1) > 0.5).float()
GUIDES: dict[str, dict[str, Any]] = {
    "interval": {"interval": (0.2, 0.8)},
    "rescaled": {"rule": {"name": "rescaled", "phi": 0.6}},
    "apg": {"rule": {"name": "apg", "eta": 0.2}},
    "zero": {"rule": {"name": "zero_star"}, "zero_from": 0.9},
    "percentile": {"percentile": 0.9},
}
LAYOUTS: tuple[Layout, ...] = ("native", "ldm", "diffusers", "separate")
SAMPLERS = {"heun": {"sampler": "heun"}, "dpmpp_2m_sde": {"sampler": "dpmpp_2m_sde"}, "default": {}}


@dataclass(frozen=True)
class Case:
    """One computation: what the names of its results begin with, and the function that makes them."""

    name: str
    make: Callable[[], Results]


def cases(weights: Path, scratch: Path) -> Iterator[Case]:
    """Everything that is computed. Cases of the same files stand together."""
    for kind in KINDS:
        yield Case(f"network/{kind}", partial(_kind, _file(weights, kind), kind))
    for name in (*FAMILIES, *OTHERS):
        if name in (*BASES, "lcm", "lcm-sdxl", *OTHERS):
            yield Case(f"network/{name}", partial(_backbone, weights / name))
        if name in ("sd1", "sdxl", "playground-v2.5", "flux-dev", "sd3"):  # with scales of their own
            yield Case(f"autoencoder/{name}", partial(_autoencoder, weights / name))
        yield Case(f"meant/{name}", partial(_of, weights / name, meant))
        for sampler in SAMPLERS:
            yield Case(f"sampling/{name}/{sampler}/plain", partial(_sampling, weights / name, sampler, unguided))
            if name != "flux-schnell":
                yield Case(f"sampling/{name}/{sampler}/guided", partial(_sampling, weights / name, sampler, guided))
    yield from _text_cases(weights)
    yield from _mode_cases(weights)
    for name in (*FAMILIES, *OTHERS, *WORDS):
        for layout in LAYOUTS if name not in SAME_PARTS else ("ldm", "diffusers"):
            yield Case(f"layout/{name}/{layout}", partial(_layout, weights / name, layout, scratch))
        yield Case(f"layout/{name}/bare", partial(_bare, weights / name, scratch))
    yield from _training_cases(weights, scratch)


def _of(place: Path, what: Callable[..., Results], *args: Any, **settings: Any) -> Results:
    """What a function makes of a stored model."""
    return what(_opened(place), *args, **settings)


def _kind(file: Path, kind: str) -> Results:
    network = small.KINDS[kind].fresh()
    _fill(network, file)
    return _forward_and_back(network.eval(), small.KINDS[kind].size)


def _forward_and_back(network: Any, size: tuple[int, int] = (4, 8)) -> Results:
    """A network's output, and the gradients of its mean square by the sample and by what is told of it."""
    x, t, told = inputs(network.params, size)
    leaves = {"x": x.requires_grad_(), **{name: value.requires_grad_() for name, value in told.items() if value.is_floating_point()}}
    with torch.enable_grad():
        out = call(network, x, t, told)
        gradients = torch.autograd.grad(out.square().mean(), list(leaves.values()))
    return {"out": out.detach(), **{f"gradient of {name}": value for name, value in zip(leaves, gradients, strict=True)}}


def _backbone(place: Path) -> Results:
    """A family's network, in float32 with gradients and in bfloat16."""
    network: Any = _opened(place).network
    results = _forward_and_back(network)
    x, t, told = inputs(network.params)
    half = {name: value if name == "guidance" else value.bfloat16() for name, value in told.items()}
    with torch.no_grad():
        results["bfloat16"] = call(copy.deepcopy(network).bfloat16(), x.bfloat16(), t, half)
    return results


def _autoencoder(place: Path) -> Results:
    """Both ways, with gradients, in tiles, and the tiny one's."""
    model = _opened(place)
    vae, tiny = model.require("vae"), model.require("preview")
    with torch.enable_grad():
        image = (2 * PICTURE - 1).requires_grad_()
        latents = vae.encode(image)
        (gradient,) = torch.autograd.grad(vae.decode(latents.mode).square().mean(), image)
    z = latents.mode.detach()
    with torch.no_grad():
        return {
            "mean": latents.mean.detach(),
            "std": latents.std.detach(),
            "decoded": vae.decode(z),
            "gradient": gradient,
            "encoded in tiles": encode_tiled(vae, image.detach(), 32, 16).mean,
            "decoded in tiles": decode_tiled(vae, z, 4, 2),
            "tiny encoded": tiny.encode(image.detach()),
            "tiny decoded": tiny.decode(z),
        }


def _sampling(place: Path, sampler: str, how: Callable[[Model], dict[str, Any]]) -> Results:
    model = _opened(place)
    return draw(model, **SAMPLERS[sampler], **how(model), **sees(model))


def _text_cases(weights: Path) -> Iterator[Case]:
    for name in (*BASES, "sdxl-turbo", *WORDS):
        place = weights / name
        word = ", a <Cat-Toy>! and <cat-toy>" if name in WORDS else ""
        prompts = {"short": "a Corgi's café &amp; 35MM" + word, "empty": "", "long": LONG + word, "very long": LONG * 3, "marks": WEIGHTED}
        for kind, prompt in prompts.items():
            yield Case(f"text/{name}/{kind}", partial(_of, place, encode, prompt))
        weighted = WEIGHTED + word.replace("<cat-toy>", "(<cat-toy>:1.4)")
        yield Case(f"text/{name}/weighted", partial(_of, place, encode, weighted, f"({LONG}:0.8) {weighted}", weighted=True))
        yield Case(f"text/{name}/cut", partial(_of, place, encode, LONG, "an owl", long="cut"))
        yield Case(f"text/{name}/nothing", partial(_of, place, encode_nothing, 2))
        yield Case(f"text/{name}/batch", partial(_of, place, encode_batch, [LONG, "an owl", ""], ["ugly", None, LONG * 2]))
        if not name.startswith("flux"):
            yield Case(f"text/{name}/clip skip", partial(_of, place, encode, "a corgi", LONG, clip_skip=1))
            yield Case(f"text/{name}/nothing, clip skip", partial(_of, place, encode_nothing, 2, clip_skip=1))
        if not name.startswith(("flux", "sd3")):
            yield Case(f"text/{name}/chunks", partial(_of, place, encode, "a corgi", chunks=3))
            yield Case(f"text/{name}/nothing, chunks", partial(_of, place, encode_nothing, 2, chunks=2))
    parts = [weights / "sd3" / part for part in ("transformer", "vae", "text_encoder", "text_encoder_2")]
    yield Case("text/sd3 without T5/long", lambda: encode(open_model(*parts), LONG, "an owl"))
    yield Case("text/sd3 without T5/nothing", lambda: encode_nothing(open_model(*parts), 2))


def _mode_cases(weights: Path) -> Iterator[Case]:
    """All that `generate` can do besides: from images, with masks, refined, led by other rules; and previews."""

    def drawn(name: str, of: str, **settings: Any) -> Case:
        return Case(f"modes/{of}/{name}", partial(_of, weights / of, draw, **settings))

    mixed: dict[str, Any] = {"image": PICTURE, "mask": MASK}
    for of in ("sd1", "sdxl", "lcm", "sdxl-turbo", "playground-v2.5", "flux-dev", "flux-schnell", "sd3", "sd3.5-medium"):
        yield drawn("from an image", of, image=PICTURE, strength=0.6, steps=4)
        yield drawn("masked", of, **mixed)
        yield drawn("masked from an image", of, strength=0.7, steps=4, **mixed)
        yield Case(f"modes/{of}/previews", partial(_of, weights / of, _previews))
    for of in ("sd1-inpaint", "sdxl-inpaint", "flux-fill"):
        yield drawn("inpainted from an image", of, strength=0.7, steps=4, **mixed)
    for image_guidance in (1.0, 2.5):
        yield drawn(f"edited, image guidance {image_guidance}", "sd1-edit", image=PICTURE, image_guidance=image_guidance)
    for name, guide in GUIDES.items():
        yield drawn(f"guide {name}", "sd1", guidance=4.0, guide=guide)
        yield drawn(f"guide {name}", "flux-dev", true_cfg=2.0, guide=guide)
    for of in ("sd1", "sdxl", "sd3"):
        yield drawn("weighted", of, prompts=WEIGHTED, weighted=True)
        yield drawn("clip skip", of, clip_skip=1)
        yield drawn("tiles", of, tile=4, image=PICTURE, strength=0.6)
    yield drawn("cut", "sd1", long="cut")
    yield drawn("numbers", "sdxl", numbers={"height": 500, "top": 20})
    yield drawn("an aesthetic score", "sdxl-refiner", numbers={"score": 3.0})
    for name, settings in {"plain": {}, "from an image": {"image": PICTURE, "strength": 0.9}, "masked": mixed}.items():
        yield Case(f"modes/sdxl/refined, {name}", partial(_refined, weights, settings))
    for of in ("sd1", "sdxl", "flux-dev", "sd3"):
        yield Case(f"modes/{of}/bfloat16", partial(_in_half, weights / of))


def _refined(weights: Path, settings: Mapping[str, Any]) -> Results:
    refiner = _opened(weights / "sdxl-refiner")
    return draw(_opened(weights / "sdxl"), refiner=refiner, handover=0.5, steps=6, grid={"spacing": "linspace"}, **settings)


def _in_half(place: Path) -> Results:
    return draw(open_model(place).to(dtype=torch.bfloat16), steps=2)


def _previews(model: Model) -> Results:
    """Of the first step: by the tiny autoencoder, and by the large one where there is no other."""
    steps: list[samplers.Step] = []
    samplers.generate(model, PROMPTS, seeds=SEEDS, steps=1, height=SIZE[0], width=SIZE[1], watch=steps.append)
    return {"tiny": samplers.preview(model, steps[0]), "large": samplers.preview(replace(model, preview=None), steps[0])}


def _layout(source: Path, layout: Layout, scratch: Path) -> Results:
    """What a model's files hold, what is loaded of them, and whether they are the same when that is saved again."""
    first, second = _empty(scratch / "first"), _empty(scratch / "second")
    end = "model.safetensors" if layout in ("native", "ldm") else "model"
    if not save_again(_opened(source), first / end, layout):
        return {"files": "refused"}
    paths = sorted((first / end).glob("*.safetensors")) if layout == "separate" else [first / end]
    if layout == "ldm":  # which has no place for the tokenizer of T5
        paths += source.glob("tokenizer*/tokenizer.json")
    loaded = open_model(*paths)
    if not save_again(loaded, second / end, layout):
        raise RuntimeError(f"what was loaded cannot be saved again in the layout {layout}")
    found, again = (content(folder / end, layout) for folder in (first, second))
    same = {name: "the same" if again[name] == found[name] else again[name] for name in found}
    results: Results = {**found, **{f"{name}, saved again": text for name, text in same.items()}, **report(loaded)}
    with torch.no_grad():
        results["network"] = call(loaded.network, *inputs(cast(Any, loaded.network).params))
        results |= {f"prompt, {name}": value for name, value in encode(loaded, WEIGHTED, "a <cat-toy>", weighted=True).items()}
    return results


def content(place: Path, layout: str) -> dict[str, str]:
    """The tensors of a file or folder, and what else it says; of our own layout the tensors without their names, which may change."""
    tensors, settings = [], []
    for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
        name = str(file.relative_to(place.parent))
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                settings.append(f"{name} {json.dumps(opened.metadata(), sort_keys=True)}")
                tensors += [f"{name} {key} {_brief(opened.get_tensor(key))}" for key in sorted(opened.keys())]
        elif file.is_file():
            text = file.read_text(encoding="utf-8")
            settings.append(f"{name} {' '.join(text.split()) if len(text) < 10_000 else _sha256(text.encode())}")
    if layout == "native":
        return {"files": "\n".join(sorted(line.split(" ", 2)[2] for line in tensors))}
    return {"files": "\n".join(tensors), "settings": "\n".join(settings)}


def _bare(source: Path, scratch: Path) -> Results:
    """What is found out of a single file that says nothing of itself."""
    first, place = scratch / "first.safetensors", scratch / "bare.safetensors"
    if not save_again(_opened(source), first, "ldm"):
        return {"usage": "refused"}
    save_file(load_file(first), place)
    try:
        model = open_model(place)
    except ValueError:
        return {"usage": "refused by load"}
    return {**meant(model), **report(model)}


def _training_cases(weights: Path, scratch: Path) -> Iterator[Case]:
    for name in DIGITS:
        yield Case(f"training/{name}", partial(_digits, _file(weights, name), name, scratch))
    yield Case("training/digits_consistency", partial(_consistency, _file(weights, "digits_unet"), scratch))
    for family in ("sd1", "playground-v2.5", "flux-dedistilled", "sd3"):
        yield Case(f"training/finetune {family}", partial(_finetune, weights / family, scratch))


TRAIN = ("train.steps=20", "train.warmup=4", "train.log_every=1", "train.save_every=20", "device=cpu", "progress=false", "wandb=false")


def _experiment(name: str, *overrides: str) -> dict[str, Any]:
    return compose("train", [f"experiment={name}", "run=elsewhere", *TRAIN, *overrides])


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _digits(file: Path, name: str, scratch: Path) -> Results:
    folder = _empty(scratch / "training")
    config = _experiment(name, "train.batch_size=32")
    start = with_weights(config["model"], file, folder / "start.safetensors")
    results = train({**config, "run": str(folder / "run"), "model": {"from": str(start)}})
    model = open_model(folder / "run")
    with torch.no_grad():
        told = Condition(label=torch.tensor([3, 7]))
        grid = model.grid(3)
        return results | {"sample": samplers.sample("ddim", model.denoiser(), grid, shape=(1, 8, 8), seeds=SEEDS, condition=told)}


def _consistency(file: Path, scratch: Path) -> Results:
    folder = _empty(scratch / "training")
    start = with_weights(_experiment("digits_unet")["model"], file, folder / "start.safetensors")
    return train({**_experiment("digits_consistency", "train.batch_size=16", f"model.from='{start}'"), "run": str(folder / "run")})


def _finetune(source: Path, scratch: Path) -> Results:
    """On six pictures; with what the network's file holds afterwards."""
    folder = _empty(scratch / "training")
    (folder / "photos").mkdir()
    for i, caption in enumerate(("a cat by the window", "two red balloons", "green", "an old steam train", "0123456789", LONG)):
        pixels = np.full((40, 32, 3), 128, np.uint8)
        pixels[:, 16 * (i % 2) : 16 + 16 * (i % 2)] = [255 * (i // 2 % 2), 255 * (i // 4), 40 * i]
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
        (folder / "photos" / f"{i}.txt").write_text(caption)
    settings = ("train.batch_size=2", "train.precision=fp32", "latents.size=32", "latents.chunks=2" if source.name == "sd1" else "")
    places = (f"weights='{source}'", f"data='{folder / 'photos'}'")
    results = train({**_experiment("finetune", *filter(None, settings), *places), "run": str(folder / "run")})
    (network,) = (path for name in ("unet", "transformer") for path in (folder / "run" / "model" / name).glob("*.safetensors"))
    state = dict(sorted(load_file(network).items()))
    return results | {"keys": "\n".join(state), "weights": torch.cat([value.flatten() for value in state.values()])}


# Records -------------------------------------------------------------------------------------------------------------------

SAMPLES = 64  # values of a tensor that are recorded, evenly spread over it
HALF = 2**-5  # tolerance for what is computed in bfloat16: four times the distance of its numbers from 1 on


def _sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _bytes(value: Tensor) -> memoryview:
    return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _brief(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)} {_sha256(_bytes(value))[:16]}"


def record(value: Result) -> dict[str, Any]:
    """What is written of a result: of a tensor its hash, and figures by which a difference can be sized."""
    if isinstance(value, str):
        return {"text": value}
    flat = value.detach().double().reshape(-1)
    where = torch.linspace(0, max(0, len(flat) - 1), min(SAMPLES, len(flat)), dtype=torch.float64).long()
    return {
        "sha256": _sha256(_bytes(value)),
        "shape": list(value.shape),
        "dtype": str(value.dtype),
        "mean": float(flat.mean()),
        "largest": float(flat.abs().max()),
        "sum": math.fsum(flat.tolist()),
        "samples": flat[where].tolist(),
    }


def difference(before: Mapping[str, Any], now: Mapping[str, Any], tolerance: float | None) -> str:
    """In which way a result is another one than before, "" where it is the same."""
    if "text" in before or "text" in now:
        return _difference_of_texts(before.get("text"), now.get("text"))
    for name in ("shape", "dtype"):
        if before[name] != now[name]:
            return f"the {name} was {before[name]}, and is {now[name]}"
    if before["sha256"] == now["sha256"]:
        return ""
    pairs = [*zip(before["samples"], now["samples"], strict=True), *((before[name], now[name]) for name in ("mean", "largest"))]
    scale = max(before["largest"], sys.float_info.min)
    relative = max(abs(a - b) for a, b in pairs) / scale
    if tolerance is not None and relative <= tolerance:  # which is not so where it is no number
        return ""
    return f"differs by {relative:.1e} of its largest value {before['largest']:.3g}; the sum was {before['sum']!r}, and is {now['sum']!r}"


def _difference_of_texts(before: str | None, now: str | None) -> str:
    if before is None or now is None:
        return "was a text, and is a tensor" if now is None else "was a tensor, and is a text"
    if before == now:
        return ""
    gone, new = ([line for line in a.splitlines() if line not in set(b.splitlines())] for a, b in ((before, now), (now, before)))
    shown = [f"    {mark} {line[:300]}" for mark, lines in (("-", gone), ("+", new)) for line in lines[:3]]
    return "\n".join([f"another text: {len(gone)} lines are gone, {len(new)} are new", *shown])


def compute(weights: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records by name. A case that fails has one record, of its error."""
    memory = Path("/dev/shm")  # where there is one: writing to disks takes as long as all else
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        for case in cases(weights, Path(scratch)):
            if not wanted(case.name):
                continue
            try:
                results = case.make()
            except Exception as error:  # so that one mistake hides no other
                results = {"error": f"{type(error).__name__}: {error}"}
            for name, value in results.items():
                yield f"{case.name}/{name}", record(value)


def machine() -> dict[str, str]:
    """What the last bits depend on besides."""
    root = Path(__file__).parents[1]
    commit, changes = (
        subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
        for command in (["rev-parse", "HEAD"], ["status", "--porcelain"])
    )
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    return {
        "commit": commit + (" and changes" if changes else ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": f"{cpu}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": str(torch.get_num_threads()),
    }


def write(file: Path, weights: Path, wanted: Callable[[str], bool]) -> int:
    """Record results, in place of those of the same cases, if there are any."""
    if not weights.exists():
        made = weights.with_name(f"{weights.name}.part")
        make_weights(_empty(made))
        made.rename(weights)
    before = json.loads(file.read_text()) if file.exists() else {"machine": machine(), "prints": {}}
    prints = dict(compute(weights, wanted))
    if failed := [f"{name}: {found['text']}" for name, found in prints.items() if name.endswith("/error")]:
        print(*failed, "nothing is written", sep="\n")
        return 1
    kept = {name: found for name, found in before["prints"].items() if not wanted(name.rpartition("/")[0])}
    content = {"machine": before["machine"] if kept else machine(), "prints": dict(sorted({**kept, **prints}.items()))}
    file.write_text(json.dumps(content, indent=0))
    print(f"{len(prints)} results are written, {len(kept)} are kept")
    return 0


def compare(file: Path, weights: Path, wanted: Callable[[str], bool], tolerance: float | None) -> int:
    """Print what is another result than the recorded one, and of a case that fails its error alone; 1 if there is any."""
    before, here = json.loads(file.read_text()), machine()
    for name, value in before["machine"].items():
        if name != "commit" and here[name] != value:
            print(f"{name} was {value}, and is {here[name]}: last bits may differ")
    expected = {name: found for name, found in before["prints"].items() if wanted(name.rpartition("/")[0])}
    counts = {"the same": 0, "different": 0, "new": 0, "missing": 0}
    seen: set[str] = set()
    for name, found in compute(weights, wanted):
        seen.add(name)
        near = max(tolerance, HALF) if tolerance is not None and "bfloat16" in name else tolerance
        text = difference(expected[name], found, near) if name in expected else f"is new {found.get('text', '')}".rstrip()
        counts["new" if name not in expected else "different" if text else "the same"] += 1
        if text:
            print(f"{name}: {text}", flush=True)
    for name in sorted(expected.keys() - seen):
        counts["missing"] += 1
        if f"{name.rpartition('/')[0]}/error" not in seen:
            print(f"{name}: is missing")
    print(f"compared with {before['machine']['commit']}: {', '.join(f'{count} {what}' for what, count in counts.items())}")
    return int(counts["the same"] < sum(counts.values()))


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fingerprints", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("action", choices=["write", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("pattern", nargs="*")
    parser.add_argument("--tolerance", type=float, help="of sampled values, in place of equal bits")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    file = asked.file.absolute()
    if asked.action == "compare" and not file.exists():
        parser.error(f"there is no {file}: write it first, with the code as it was")
    weights, began = file.with_name(f"{file.stem}-weights"), time.perf_counter()

    def wanted(case: str) -> bool:
        return not asked.pattern or any(fnmatch(case, f"{pattern}*") for pattern in asked.pattern)

    status = write(file, weights, wanted) if asked.action == "write" else compare(file, weights, wanted, asked.tolerance)
    print(f"{time.perf_counter() - began:.0f} seconds")
    return status


if __name__ == "__main__":
    sys.exit(main())
