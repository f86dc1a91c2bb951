"""From prompts to the conditions of a text-to-image network, and to what guidance leads away from."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion.spec import check_names
from models import Model, TextCondition

SCORE, NEGATIVE_SCORE = 6.0, 2.5  # of looks, out of 10: what SDXL's refiner is told of what to draw, and of what to lead away from


@dataclass(frozen=True)
class Prompts:
    """What to draw: texts, one per image, what to lead away from (None: the family's "no prompt"), and seeds.

    weighted  weights are read: "(word:1.3)"
    long      what is done with more than 75 tokens: "chunk" reads them in pieces, "cut" drops the rest with a warning that names it
    """

    texts: tuple[str, ...]
    negative: tuple[str, ...] | None
    seeds: tuple[int, ...]
    weighted: bool = False
    long: Literal["chunk", "cut"] = "chunk"

    @classmethod
    def of(
        cls,
        texts: str | Sequence[str],
        negative: str | Sequence[str] | None,
        seeds: Sequence[int] | None,
        weighted: bool = False,
        long: Literal["chunk", "cut"] = "chunk",
    ) -> Prompts:
        """With single texts repeated as often as there are images. ValueError where numbers of texts and seeds do not fit."""
        check_names("way with long prompts", [long], ["chunk", "cut"])
        given = [texts] if isinstance(texts, str) else list(texts)
        n = len(given) if seeds is None else len(seeds)
        if not given or not n:
            raise ValueError("there is nothing to draw: give at least one prompt and one seed")
        if len(given) not in (1, n):
            raise ValueError(f"{len(given)} prompts for {n} seeds: give one prompt for all, or one per seed")
        away = None if negative is None else [negative] if isinstance(negative, str) else list(negative)
        if away is not None and len(away) not in (1, n):
            raise ValueError(f"{len(away)} negative prompts for {n} images: give one for all, or one per image")
        drawn = tuple(given * n if len(given) == 1 else given)
        left = None if away is None else tuple(away * n if len(away) == 1 else away)
        return cls(drawn, left, tuple(range(n) if seeds is None else seeds), weighted, long)


def conditions(
    model: Model, prompts: Prompts, size: tuple[int, int], numbers: Mapping[str, float] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the network is told, and what stands for nothing: {"context": ..., "vector": ...} each, in the backbone's dtype.

    size     height and width of the image in pixels, which numbers are by default
    numbers  those that are not to be as usual
    """
    text = model.require("text")
    told = _numbers(text.params.numbers, size, numbers)
    texts, negative, weighted = list(prompts.texts), list(prompts.negative or ()), prompts.weighted
    chunks = 1 if prompts.long == "cut" else text.count_chunks(texts + negative, weighted=weighted)
    positive = text.encode(texts, numbers=told, weighted=weighted, long=prompts.long, chunks=chunks)
    away = {**told, "score": NEGATIVE_SCORE} if "score" in told else told
    if negative:
        null = text.encode(negative, numbers=away, weighted=weighted, long=prompts.long, chunks=chunks)
    else:
        null = text.null(len(texts), numbers=away, like=positive)
    for kind, condition in (("prompt", positive), ("negative prompt", null)):
        for i, dropped in enumerate(condition.dropped):
            if dropped:
                warnings.warn(f"{kind} {i} is longer than 75 tokens, and this was dropped: {dropped!r}", stacklevel=3)
    return _for(model, positive), _for(model, null)


def _numbers(names: Sequence[str], size: tuple[int, int], given: Mapping[str, float] | None) -> dict[str, float]:
    """A value for every number that the family's vector holds: an image not scaled and not cropped, of good looks."""
    height, width = size
    usual = {"height": height, "width": width, "top": 0, "left": 0, "target_height": height, "target_width": width, "score": SCORE}
    check_names("number", given or {}, names)
    return {name: float(value) for name, value in {**usual, **(given or {})}.items() if name in names}


def _for(model: Model, condition: TextCondition) -> dict[str, Tensor]:
    dtype = next(model.network.parameters()).dtype
    values = {"context": condition.context, "vector": condition.vector}
    return {name: value.to(dtype) for name, value in values.items() if value is not None}


def guidance_condition(model: Model, scale: float, n: int, where: torch.device) -> dict[str, Tensor]:
    """The scale as a condition, for networks that were distilled to follow it (LCM); {} for others."""
    distilled = getattr(model.network.params, "guidance_dim", None) is not None
    return {"guidance": torch.full((n,), scale, device=where)} if distilled else {}
