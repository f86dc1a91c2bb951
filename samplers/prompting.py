"""From prompts to the conditions of a text-to-image network, and to what guidance leads away from."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch

from diffusion import NONE, Condition
from diffusion.noise import check_seed
from diffusion.spec import check_names, check_type
from models import Model, TextEncoder
from models.text.encoder import Encoded

# of 75 tokens, to which prompts of a batch are repeated to become equally long: about the latents of an SD 1
# image
MAX_PIECES = 60
SCORE, NEGATIVE_SCORE = (
    6.0,
    2.5,
)  # of looks, out of 10: what SDXL's refiner is told of what to draw, and of what to lead away from


@dataclass(frozen=True)
class Prompts:
    """What to draw: texts, one per image, what to lead away from (None: the family's "no prompt"), and seeds.

    weighted  weights are read: "(word:1.3)"
    clip_skip  blocks of CLIP that are left out, see `TextEncoder.encode`
    long      what is done with more than 75 tokens: "chunk" reads them in pieces, "cut" drops the rest; T5
              reads as many as it can in both
    """

    texts: tuple[str, ...]
    negative: tuple[str | None, ...]
    seeds: tuple[int, ...]
    weighted: bool = False
    long: Literal["chunk", "cut"] = "chunk"
    clip_skip: int = 0

    @classmethod
    def build(
        cls,
        texts: str | Sequence[str],
        negative: str | Sequence[str] | None,
        seeds: Sequence[int] | None,
        weighted: bool = False,
        long: Literal["chunk", "cut"] = "chunk",
        clip_skip: int = 0,
    ) -> Prompts:
        """With single texts repeated as often as there are images. ValueError where numbers of texts and
        seeds do not fit."""
        check_names("way with long prompts", [long], ["chunk", "cut"])
        check_type("prompts", texts, str | Sequence[str])
        check_type("negative", negative, str | Sequence[str] | None)
        check_type("seeds", seeds, Sequence[int] | None)
        given = [texts] if isinstance(texts, str) else list(texts)
        n = len(given) if seeds is None else len(seeds)
        if not given or not n:
            raise ValueError("there is nothing to draw: give at least one prompt and one seed")
        if len(given) not in (1, n):
            raise ValueError(f"{len(given)} prompts for {n} seeds: give one prompt for all, or one per seed")
        for seed in seeds or ():
            check_seed(seed)
        away: list[str | None] = (
            [negative] if negative is None or isinstance(negative, str) else list(negative)
        )
        if len(away) not in (1, n):
            raise ValueError(
                f"{len(away)} negative prompts for {n} images: give one for all, or one per image"
            )
        drawn, left = given * n if len(given) == 1 else given, away * n if len(away) == 1 else away
        return cls(
            tuple(drawn), tuple(left), tuple(range(n) if seeds is None else seeds), weighted, long, clip_skip
        )


@dataclass(frozen=True)
class Conditions:
    """The condition of each image, and the null condition that guidance leads away from: B rows each. null is
    empty without guidance.

    dropped  the ends of prompts that are too long, which it is not told
    """

    condition: Condition
    null: Condition
    dropped: tuple[str, ...]

    def to(self, device: torch.device) -> Conditions:
        """On another device."""
        return Conditions(self.condition.to(device), self.null.to(device), self.dropped)


def encode_prompts(
    model: Model, prompts: Prompts, numbers: Mapping[str, float], away: bool = True
) -> Conditions:
    """The prompts, read, in the backbone's dtype; `numbers` are those of the family's vector; `away`: what to
    lead away from is read too.

    Each is read on its own, in as many chunks as it and its negative prompt need, and then repeated until all
    are equally long: attention over a context and over the same context twice is the same. Where a network
    attends to text and image together it is not: there all contexts have one length. So no image depends on
    what else is in its batch. What is in it twice is read once.
    """
    text: TextEncoder = model.require("text")
    told = (numbers, {**numbers, "score": NEGATIVE_SCORE} if "score" in numbers else numbers)
    pairs = list(zip(prompts.texts, prompts.negative, strict=True))
    chunks = {pair: _chunks(text, pair, prompts) for pair in pairs}
    length = _common_length(chunks.values())
    dtype = next(model.network.parameters()).dtype

    @cache
    def read(side: int, prompt: str | None, chunks: int) -> Encoded:
        if prompt is None:
            return Encoded(
                text.null(1, numbers=told[side], chunks=chunks, clip_skip=prompts.clip_skip), ("",)
            )
        how: dict[str, Any] = {
            "weighted": prompts.weighted,
            "long": prompts.long,
            "clip_skip": prompts.clip_skip,
        }
        return text.encode([prompt], numbers=told[side], chunks=chunks, **how)

    def rows(side: int) -> Condition:
        found = [(read(side, pair[side], chunks[pair]).condition, length // chunks[pair]) for pair in pairs]
        return Condition.cat([_repeated(condition, times) for condition, times in found]).to(dtype=dtype)

    condition, null = rows(0), rows(1) if away else NONE
    ends = [read(side, pair[side], n).dropped[0] for pair, n in chunks.items() for side in range(1 + away)]
    return Conditions(condition, null, tuple(dict.fromkeys(filter(None, ends))))


def _repeated(condition: Condition, times: int) -> Condition:
    """With its context so many times in a row."""
    if times == 1 or condition.context is None:
        return condition
    mask = None if condition.mask is None else condition.mask.repeat(1, times)
    return replace(condition, context=condition.context.repeat(1, times, 1), mask=mask)


def _common_length(chunks: Collection[int]) -> int:
    """The length that prompts of so many chunks are repeated to. ValueError where it is far beyond the
    longest of them."""
    length, longest = math.lcm(*chunks), max(chunks)
    if length > max(MAX_PIECES, longest):
        lengths = ", ".join(map(str, sorted(set(chunks))))
        raise ValueError(
            f"prompts of {lengths} pieces of 75 tokens in one batch would all be read as {length} pieces: "
            "draw those of a length together"
        )
    return length


def _chunks(text: TextEncoder, pair: tuple[str, str | None], prompts: Prompts) -> int:
    return (
        1
        if prompts.long == "cut"
        else text.count_chunks([side for side in pair if side is not None], weighted=prompts.weighted)
    )


def vector_numbers(
    model: Model, size: tuple[int, int], given: Mapping[str, float] | None = None
) -> dict[str, float]:
    """A value for every number that the family's vector holds, {} where it holds none: by default an image of
    that size in pixels, neither scaled nor cropped, of good looks. Names that the family does not have are
    left out.
    """
    height, width = size
    usual = {
        "height": height,
        "width": width,
        "top": 0,
        "left": 0,
        "target_height": height,
        "target_width": width,
        "score": SCORE,
    }
    return {name: float({**usual, **(given or {})}[name]) for name in model.require("text").params.numbers}


def check_numbers(given: Mapping[str, float], models: Sequence[Model]) -> None:
    """ValueError unless all of these are numbers that one of the models is told."""
    known = list(dict.fromkeys(name for model in models for name in model.require("text").params.numbers))
    if given and not known:
        raise ValueError(f"this family is told no numbers beside the prompt: leave {next(iter(given))} out")
    check_names("number", given, known)
    for name, value in given.items():
        check_type(f"the number {name}", value, float)
