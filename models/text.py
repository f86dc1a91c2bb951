"""From prompts to what a text-to-image network is conditioned on: towers, which of their states, and the numbers beside them.

A family (SD 1, SD 2, SDXL, ...) is a `TextParams`: data, no code of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from diffusion.spec import check_names, check_type
from models.clip import CLIP_G, CLIP_H, CLIP_L, CLIPText, CLIPTextParams
from models.conditioning import sinusoid
from models.prompt import parse_prompt
from models.tokenizer import BOS, EOS, detokenize, tokenize

HEAVIEST = 100.0  # weight of a word, far beyond what a network can make sense of
NUMBER_DIM = 256  # sinusoids per number (Podell et al. 2023, section 2.2)

Numbers = Mapping[str, float | Sequence[float]]
Word = tuple[int, float]  # a token and its weight


@dataclass(frozen=True)
class TowerUse:
    """What a family takes from one tower.

    tower   its name in TextParams.towers
    blocks  the context is the state after so many of its blocks
    norm    that state goes through the tower's final norm
    pad     the token behind the end of text
    pooled  the tower's pooled output goes into the vector
    """

    tower: str
    blocks: int
    norm: bool
    pad: int
    pooled: bool


@dataclass(frozen=True)
class TextParams:
    """The text side of one family of models.

    uses     contexts stand side by side along the width in this order, and so do pooled outputs in the vector
    numbers  names of the numbers behind the pooled part of the vector, 256 sinusoids each (Podell et al. 2023)
    null     what "no prompt" is: the encoded "" ("empty"), or zeros for context and pooled part ("zeros"); numbers stay
    """

    towers: Mapping[str, CLIPTextParams]
    uses: tuple[TowerUse, ...]
    numbers: tuple[str, ...] = ()
    null: Literal["empty", "zeros"] = "empty"

    def __post_init__(self) -> None:
        check_names("rule for null", [self.null], ["empty", "zeros"])
        check_names("tower", [use.tower for use in self.uses], self.towers)
        if not self.uses:
            raise ValueError("a text encoder needs at least one use of a tower")
        for use in self.uses:
            if not 0 <= use.blocks <= (layers := self.towers[use.tower].layers):
                raise ValueError(f"the tower {use.tower!r} has {layers} blocks: there is no state after {use.blocks}")
        if len(lengths := {self.towers[use.tower].length for use in self.uses}) > 1:
            raise ValueError(f"towers read {sorted(lengths)} tokens at once: contexts stand side by side, so let all read as many")

    @property
    def length(self) -> int:
        """Tokens of a chunk, BOS and EOS included."""
        return self.towers[self.uses[0].tower].length

    @property
    def context_dim(self) -> int:
        """Width of the context."""
        return sum(self.towers[use.tower].width for use in self.uses)

    @property
    def pooled_dim(self) -> int:
        """Width of the pooled part of the vector, which comes first in it."""
        towers = [self.towers[use.tower] for use in self.uses if use.pooled]
        return sum(tower.projection or tower.width for tower in towers)

    @property
    def vector_dim(self) -> int | None:
        """Width of the vector, None where the family has none."""
        return self.pooled_dim + NUMBER_DIM * len(self.numbers) or None


def sd1(clip_l: CLIPTextParams = CLIP_L) -> TextParams:
    """Stable Diffusion 1: the last state of CLIP-L through its norm, padded with EOS."""
    return TextParams({"clip_l": clip_l}, (TowerUse("clip_l", clip_l.layers, norm=True, pad=EOS, pooled=False),))


def sd2(clip_h: CLIPTextParams = CLIP_H, blocks: int = 23) -> TextParams:
    """Stable Diffusion 2: the state of OpenCLIP-H after 23 blocks through its norm, whether the tower holds 24 or only those 23."""
    return TextParams({"clip_h": clip_h}, (TowerUse("clip_h", blocks, norm=True, pad=0, pooled=False),))


def sdxl(clip_l: CLIPTextParams = CLIP_L, clip_g: CLIPTextParams = CLIP_G) -> TextParams:
    """SDXL: the last states but one of CLIP-L and OpenCLIP-bigG; bigG's pooled output and three sizes in pixels."""
    return TextParams(
        towers={"clip_l": clip_l, "clip_g": clip_g},
        uses=(
            TowerUse("clip_l", clip_l.layers - 1, norm=False, pad=EOS, pooled=False),
            TowerUse("clip_g", clip_g.layers - 1, norm=False, pad=0, pooled=True),
        ),
        numbers=("height", "width", "top", "left", "target_height", "target_width"),
        null="zeros",
    )


def refiner(clip_g: CLIPTextParams = CLIP_G) -> TextParams:
    """SDXL's refiner: bigG alone, and an aesthetic score (6.0 for the prompt, 2.5 for its negative) in place of the target size."""
    return TextParams(
        towers={"clip_g": clip_g},
        uses=(TowerUse("clip_g", clip_g.layers - 1, norm=False, pad=0, pooled=True),),
        numbers=("height", "width", "top", "left", "score"),
    )


@dataclass(frozen=True, eq=False)
class TextCondition:
    """What a network is told: context (B, L, D), vector (B, V) or None; and per prompt the text it is not told, "" if it is told all."""

    context: Tensor
    vector: Tensor | None
    dropped: tuple[str, ...]


class TextEncoder(nn.Module):
    """Prompts through the towers of one family. Conditions have the dtype and the device of the towers."""

    def __init__(self, params: TextParams) -> None:
        super().__init__()
        self.params = params
        self.towers = nn.ModuleDict({name: CLIPText(tower) for name, tower in params.towers.items()})

    def encode(
        self,
        prompts: Sequence[str],
        *,
        numbers: Numbers | None = None,
        weighted: bool = False,
        long: Literal["chunk", "cut"] = "chunk",
        chunks: int = 1,
    ) -> TextCondition:
        """The condition of a batch of prompts, L = 77 times the number of chunks.

        A tower reads 75 tokens at once. Longer prompts are read in chunks of 75, each with its own BOS and EOS, whose
        contexts follow each other; the vector knows the first. Shorter prompts of the batch are filled up with empty chunks.

        numbers   a value, or one per prompt, for each of `params.numbers`; sizes and crops in pixels of the image
        weighted  read weights as `parse_prompt` does: a token's row of the context becomes empty + weight * (row - empty),
                  with the row of the empty prompt at its place in the chunk. Weight 1 leaves a row bitwise as it is.
        long      "chunk": as many chunks as the longest prompt needs; "cut": what is beyond `chunks` is dropped
        chunks    how many there are at least; for guidance those of prompts and negative prompts together, see `count_chunks`
        """
        check_names("way with long prompts", [long], ["chunk", "cut"])
        if chunks < 1:
            raise ValueError(f"chunks must be at least 1, not {chunks}")
        batch = _words(prompts, weighted)
        waves = self._waves(numbers, len(batch))
        if long == "chunk":
            chunks = max(chunks, *map(self._chunks, batch))
        kept = chunks * (self.params.length - 2)
        context, pooled = self._read(batch, chunks)
        return self._condition(context, pooled, waves, tuple(detokenize([token for token, _ in words[kept:]]) for words in batch))

    def count_chunks(self, prompts: Sequence[str], *, weighted: bool = False) -> int:
        """How many chunks the longest of these prompts needs, at least 1."""
        return max(map(self._chunks, _words(prompts, weighted)))

    def null(self, n: int, *, numbers: Numbers | None = None, like: TextCondition | None = None) -> TextCondition:
        """What guidance steers away from where there is no negative prompt, n times, by the rule `params.null`.

        like  a condition of n prompts that this has to go with: gives the length of the context, and the numbers unless they are given
        """
        p = self.params
        if like is not None and len(like.context) != n:
            raise ValueError(f"null conditions for {n} prompts cannot be like a condition for {len(like.context)}")
        given = like.vector[:, p.pooled_dim :] if like is not None and like.vector is not None and numbers is None else None
        waves = self._waves(numbers, n) if given is None else given
        chunks = 1 if like is None else like.context.shape[1] // p.length
        if p.null == "zeros":
            context = torch.zeros(n, chunks * p.length, p.context_dim, dtype=self.dtype, device=self.device)
            return self._condition(context, context.new_zeros(n, p.pooled_dim), waves, ("",) * n)
        context, pooled = (repeat(x, "1 ... -> n ...", n=n) for x in self._read([[]], chunks))
        return self._condition(context, pooled, waves, ("",) * n)

    @property
    def dtype(self) -> torch.dtype:
        return self.tower(self.params.uses[0].tower).token.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.tower(self.params.uses[0].tower).token.weight.device

    def tower(self, name: str) -> CLIPText:
        """One tower by its name in `params.towers`."""
        return cast(CLIPText, self.towers[name])

    def _chunks(self, words: Sequence[Word]) -> int:
        return max(1, -(-len(words) // (self.params.length - 2)))

    def _read(self, batch: Sequence[Sequence[Word]], chunks: int) -> tuple[Tensor, Tensor]:
        """Context (B, chunks * length, D) and pooled outputs (B, pooled_dim) of every tower in use, side by side."""
        states, pooled = zip(*(self._use(use, batch, chunks) for use in self.params.uses), strict=True)
        context = rearrange(torch.cat(states, dim=-1), "(b c) l d -> b (c l) d", c=chunks)
        return context, torch.cat(pooled, dim=-1)[::chunks]

    def _use(self, use: TowerUse, batch: Sequence[Sequence[Word]], chunks: int) -> tuple[Tensor, Tensor]:
        """The weighted state (B * chunks, length, width) and the pooled outputs (B * chunks, 0 or more) of one tower."""
        rows = [row for words in batch for row in _rows(words, chunks, self.params.length, use.pad)]
        state, pooled = self._run(use, rows)
        weights = torch.tensor([[weight for _, weight in row] for row in rows])
        if (weights != 1).any():
            empty, _ = self._run(use, _rows([], 1, self.params.length, use.pad))
            # A lerp rather than its formula: at weight 1 it is exact.
            state = torch.lerp(empty, state, weights.to(state)[..., None])
        return state, pooled

    def _run(self, use: TowerUse, rows: Sequence[Sequence[Word]]) -> tuple[Tensor, Tensor]:
        tower = self.tower(use.tower)
        tokens = torch.tensor([[token for token, _ in row] for row in rows], device=self.device)
        states = tower(tokens)
        state = states[use.blocks]
        pooled = tower.pool(states[-1], tokens) if use.pooled else state.new_empty(len(rows), 0)
        return tower.norm(state) if use.norm else state, pooled

    def _waves(self, numbers: Numbers | None, n: int) -> Tensor:
        """The sinusoids (n, 256 * len(params.numbers)) of the numbers, in float32."""
        names, given = self.params.numbers, numbers or {}
        check_names("number", given, names)
        if missing := [name for name in names if name not in given]:
            raise ValueError(f"this family is told the numbers {', '.join(names)}: give numbers={{{missing[0]!r}: ...}} too")
        columns = []
        for name in names:
            check_type(name, given[name], float | Sequence[float])
            column = torch.as_tensor(given[name], dtype=torch.float32)
            if column.ndim and len(column) != n:
                raise ValueError(f"{name} has {len(column)} values for {n} prompts: give one for all, or one per prompt")
            columns.append(sinusoid(column.expand(n), NUMBER_DIM))
        return torch.cat(columns, dim=-1) if columns else torch.empty(n, 0)

    def _condition(self, context: Tensor, pooled: Tensor, waves: Tensor, dropped: tuple[str, ...]) -> TextCondition:
        vector = None if self.params.vector_dim is None else torch.cat([pooled, waves.to(pooled)], dim=-1)
        return TextCondition(context, vector, dropped)


def _words(prompts: Sequence[str], weighted: bool) -> list[list[Word]]:
    """Every prompt as tokens with their weights. Pieces are tokenised one by one, so a weight may end within a word.

    ValueError for a weight beyond HEAVIEST.
    """
    check_type("prompts", prompts, Sequence[str])
    if not len(prompts):
        raise ValueError("there is no prompt: give at least one, [''] for none")
    pieces = [parse_prompt(prompt) if weighted else [(prompt, 1.0)] for prompt in prompts]
    for prompt, parts in zip(prompts, pieces, strict=True):
        heaviest = max((weight for _, weight in parts), key=abs, default=0.0)
        if abs(heaviest) > HEAVIEST:
            raise ValueError(f"words weigh up to {HEAVIEST:g} times the usual, not {heaviest:g}, in the prompt {prompt!r:.80}")
    return [[(token, weight) for text, weight in parts for token in tokenize(text)] for parts in pieces]


def _rows(words: Sequence[Word], chunks: int, length: int, pad: int) -> list[list[Word]]:
    """One row of `length` per chunk: BOS, its words, EOS, padding."""
    room = length - 2
    parts = [words[i * room : (i + 1) * room] for i in range(chunks)]
    return [[(BOS, 1.0), *part, (EOS, 1.0), *[(pad, 1.0)] * (room - len(part))] for part in parts]
