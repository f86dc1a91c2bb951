"""The extractors by name, and where their weights are.

Each is imported when it is built: open_clip and timm take five seconds to import.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from diffusion.settings import setting
from diffusion.spec import check_names, make, make_params
from eval.features.extractor import Extractor
from models.download import path_in_cache
from train.data import digits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANDOM = "random"  # in place of a path: random weights


@dataclass(frozen=True)
class Tower:
    """A network and its weights."""

    name: str = setting(..., "of the network")
    weights: str | None = setting(None, 'a path, or "random"', text="path")
    tag: str | None = setting(None, "open_clip's tag of the weights, if needed")


@dataclass(frozen=True)
class ExtractorParams:
    """Where the weights of each extractor are."""

    inception: str | None = setting(
        None, "null: where `plain-diffusion models download inception` puts it", text="path"
    )
    clip: Tower = setting(lambda: Tower("ViT-L-14"), "any model of open_clip's, for CLIP scores")
    cmmd: Tower = setting(lambda: Tower("ViT-L-14-336"), "the one of the CMMD paper")
    dinov2: Tower = setting(lambda: Tower("vit_large_patch14_dinov2"), "by timm's name")
    digits: dict[str, Any] = setting(
        lambda: {"name": "digits", "split": "train"}, "what the classifier of digits learns from"
    )


@dataclass(frozen=True)
class Known:
    """An extractor that can be built.

    main    the output that distances compare
    make    (parameters, protocol, dtype of the network) -> extractor; its docstring says which one
    dtypes  that its network computes in, by their names in DTYPES
    """

    main: str
    make: Callable[[ExtractorParams, str, torch.dtype], Extractor]
    dtypes: tuple[str, ...] = ("fp32",)

    def __str__(self) -> str:
        return f"{self.make.__doc__} Distances compare its output {self.main}."


def build(name: str, params: ExtractorParams, protocol: str, dtype: torch.dtype) -> Extractor:
    """The extractor of that name. ValueError or OSError if its weights are missing or wrong."""
    check_dtype(name, dtype)
    return _built(name, json.dumps(asdict(params)), protocol, dtype)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """ValueError for an unknown extractor, or one whose network does not compute in that dtype."""
    check_names("extractor", [name], EXTRACTORS)
    known = EXTRACTORS[name].dtypes
    if dtype not in [DTYPES[each] for each in known]:
        other = str(dtype).removeprefix("torch.")
        raise ValueError(f"{name} computes in {' and '.join(known)} only, not {other}: leave dtype out")


@lru_cache(maxsize=4)
def _built(name: str, params: str, protocol: str, dtype: torch.dtype) -> Extractor:
    """Cached for the runs of a sweep."""
    found = make_params("extractors", ExtractorParams, json.loads(params))
    return EXTRACTORS[name].make(found, protocol, dtype)


def _inception(params: ExtractorParams, protocol: str, dtype: torch.dtype) -> Extractor:
    """Inception v3 of the FID, with the resize of the protocol."""
    from eval.features.inception import load_inception, random_inception

    if params.inception == RANDOM:
        return random_inception(protocol, dtype=dtype)
    path = params.inception or path_in_cache("inception")
    if params.inception is None and not path_in_cache("inception").exists():
        raise ValueError(
            "Inception's weights are not here: `plain-diffusion models download inception` fetches them, "
            "extractors.inception=FILE names them, extractors.inception=random is a trial without"
        )
    return load_inception(path, protocol, dtype=dtype)


def _clip(params: ExtractorParams, protocol: str, dtype: torch.dtype) -> Extractor:
    """A CLIP model of open_clip's, prepared as it was trained."""
    from eval.features.clip import load_clip, random_clip

    tower = params.clip
    if tower.weights == RANDOM:
        return random_clip(tower.name)
    return load_clip(tower.name, _weights("clip", tower), tower.tag)


def _cmmd(params: ExtractorParams, protocol: str, dtype: torch.dtype) -> Extractor:
    """CLIP ViT-L/14 at 336 pixels, prepared as by CMMD's authors (Jayasumana et al. 2024)."""
    from eval.features.clip import CMMD, load_clip, random_clip

    tower = params.cmmd
    if tower.weights == RANDOM:
        return random_clip(tower.name, preparation=CMMD)
    return load_clip(tower.name, _weights("cmmd", tower), tower.tag, CMMD)


def _dinov2(params: ExtractorParams, protocol: str, dtype: torch.dtype) -> Extractor:
    """DINOv2, from timm (Oquab et al. 2023)."""
    from eval.features.dinov2 import load_dinov2, random_dinov2

    tower = params.dinov2
    if tower.weights == RANDOM:
        return random_dinov2(tower.name)
    return load_dinov2(_weights("dinov2", tower), tower.name)


def _digits(params: ExtractorParams, protocol: str, dtype: torch.dtype) -> Extractor:
    """A classifier of 8x8 digits, trained when it is needed, in seconds."""
    from eval.features.digits import DigitFeatures, train_classifier

    return DigitFeatures(train_classifier(make("data set", params.digits, {"digits": digits})))


def _weights(which: str, tower: Tower) -> str:
    if tower.weights is None:
        raise ValueError(
            f"{tower.name} needs weights: extractors.{which}.weights=FILE, or random for a trial"
        )
    return tower.weights


EXTRACTORS = {
    "inception": Known("pool", _inception, dtypes=("fp32", "bf16")),
    "clip": Known("image", _clip),
    "cmmd": Known("image", _cmmd),
    "dinov2": Known("cls", _dinov2),
    "digits": Known("features", _digits),
}
