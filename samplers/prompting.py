"""From prompts to the condition and null condition of a text-to-image network."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, cast

import torch

from diffusion import NONE, Condition
from diffusion.noise import check_seed
from diffusion.spec import check_names, check_type
from models import Model, TextEncoder
from models.text.encoder import Encoded

MAX_CHUNKS = (
    60  # of 75 tokens: the most to which the prompts of a batch are repeated, so that they are equally long
)
SCORE, NEGATIVE_SCORE = 6.0, 2.5  # aesthetic scores out of 10 for SDXL's refiner: of the prompt, and of null


@dataclass(frozen=True)
class Prompts:
    """What to draw, one per image: texts, negative prompts (None: the family's "no prompt") and seeds.

    weighted   read weights: "(word:1.3)"
    clip_skip  CLIP blocks to skip, see `TextEncoder.encode`
    long       prompts of more than 75 tokens: "chunk" reads them in pieces, "cut" drops the rest; T5 reads up
               to its own length in both
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
        """Repeats single texts for all images. ValueError if numbers of texts and seeds differ."""
        check_names("way with long prompts", [long], ["chunk", "cut"])
        check_type("prompts", texts, str | Sequence[str])
        check_type("negative", negative, str | Sequence[str] | None)
        check_type("seeds", seeds, Sequence[int] | None)
        prompts = [texts] if isinstance(texts, str) else list(texts)
        n = len(prompts) if seeds is None else len(seeds)
        if not prompts or not n:
            raise ValueError("there is nothing to draw: give at least one prompt and one seed")
        if len(prompts) not in (1, n):
            raise ValueError(f"{len(prompts)} prompts for {n} seeds: give one prompt, or one per seed")
        for seed in seeds or ():
            check_seed(seed)
        single = negative is None or isinstance(negative, str)
        negatives = cast("list[str | None]", [negative] if single else list(negative or ()))
        if len(negatives) not in (1, n):
            raise ValueError(f"{len(negatives)} negative prompts for {n} images: give one, or one per image")
        prompts = prompts * n if len(prompts) == 1 else prompts
        negatives = negatives * n if len(negatives) == 1 else negatives
        seeds = tuple(range(n) if seeds is None else seeds)
        return cls(tuple(prompts), tuple(negatives), seeds, weighted, long, clip_skip)


@dataclass(frozen=True)
class Conditions:
    """The condition and null condition of each image, B rows each; null is empty without guidance.

    dropped  the ends of prompts that are too long
    """

    condition: Condition
    null: Condition
    dropped: tuple[str, ...]

    def to(self, device: torch.device) -> Conditions:
        """A copy on another device."""
        return Conditions(self.condition.to(device), self.null.to(device), self.dropped)


def encode_prompts(
    model: Model, prompts: Prompts, numbers: Mapping[str, float], away: bool = True
) -> Conditions:
    """The encoded prompts, in the backbone's dtype; numbers: of the family's vector; away: encode null too.

    Each prompt is encoded on its own, in as many chunks as it and its negative prompt need, and then repeated
    until all have one length: attention over a context and over the same context twice is equal. Networks
    that attend to text and image together have one fixed length instead. So no image depends on the others in
    its batch. Equal prompts are encoded once.
    """
    text: TextEncoder = model.require("text")
    null_numbers = {**numbers, "score": NEGATIVE_SCORE} if "score" in numbers else numbers
    pairs = list(zip(prompts.texts, prompts.negative, strict=True))
    chunks = {pair: _chunks(text, pair, prompts) for pair in pairs}
    length = _common_length(chunks.values())
    dtype = next(model.network.parameters()).dtype

    @cache
    def read(side: int, prompt: str | None, chunks: int) -> Encoded:
        how: dict[str, Any] = {"numbers": (numbers, null_numbers)[side], "chunks": chunks}
        how |= {"clip_skip": prompts.clip_skip}
        if prompt is None:
            return Encoded(text.null(1, **how), ("",))
        return text.encode([prompt], weighted=prompts.weighted, long=prompts.long, **how)

    def rows(side: int) -> Condition:
        encoded = [(read(side, pair[side], chunks[pair]).condition, length // chunks[pair]) for pair in pairs]
        return Condition.cat([_repeated(condition, times) for condition, times in encoded]).to(dtype=dtype)

    condition, null = rows(0), rows(1) if away else NONE
    ends = [read(side, pair[side], n).dropped[0] for pair, n in chunks.items() for side in range(1 + away)]
    return Conditions(condition, null, tuple(dict.fromkeys(filter(None, ends))))


def _repeated(condition: Condition, times: int) -> Condition:
    """The condition with its context repeated."""
    if times == 1 or condition.context is None:
        return condition
    mask = None if condition.mask is None else condition.mask.repeat(1, times)
    return replace(condition, context=condition.context.repeat(1, times, 1), mask=mask)


def _common_length(chunks: Collection[int]) -> int:
    """The number of chunks that all prompts are repeated to. ValueError if it is far above the longest."""
    length, longest = math.lcm(*chunks), max(chunks)
    if length > max(MAX_CHUNKS, longest):
        lengths = ", ".join(map(str, sorted(set(chunks))))
        raise ValueError(
            f"prompts of {lengths} pieces of 75 tokens in one batch would all be read as {length} pieces: "
            "draw prompts of one length together"
        )
    return length


def _chunks(text: TextEncoder, pair: tuple[str, str | None], prompts: Prompts) -> int:
    if prompts.long == "cut":
        return 1
    return text.count_chunks([side for side in pair if side is not None], weighted=prompts.weighted)


def vector_numbers(
    model: Model, size: tuple[int, int], numbers: Mapping[str, float] | None = None
) -> dict[str, float]:
    """A value for every number of the family's vector; {} if it has none.

    By default an image of that size in pixels, neither scaled nor cropped, with a high score. Names that the
    family does not have are left out.
    """
    height, width = size
    default = {"height": height, "width": width, "top": 0, "left": 0, "score": SCORE}
    every = {**default, "target_height": height, "target_width": width, **(numbers or {})}
    return {name: float(every[name]) for name in model.require("text").params.numbers}


def check_numbers(numbers: Mapping[str, float], models: Sequence[Model]) -> None:
    """ValueError unless each name is a number that one of the models takes."""
    known = list(dict.fromkeys(name for model in models for name in model.require("text").params.numbers))
    if numbers and not known:
        raise ValueError(f"this family takes no numbers besides the prompt: leave {next(iter(numbers))} out")
    check_names("number", numbers, known)
    for name, value in numbers.items():
        check_type(f"the number {name}", value, float)
