"""From prompts to what a text-to-image network is conditioned on: the readers of a family, joined, and the
numbers beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.condition import Condition
from diffusion.messages import brief
from diffusion.spec import check_names, check_type
from models.layers.conditioning import sinusoid
from models.text.prompt import parse_prompt
from models.text.reader import Pieces, Tokens
from models.text.recipes import NUMBER_DIM, TextParams

MAX_WEIGHT = 100.0  # of a word; people use up to 2
# how the note begins that says why there is no text, though some of its encoders are there
LEFT_OUT = "text encoders left out"

Numbers = Mapping[str, float | Sequence[float]]


class Encoded(NamedTuple):
    """Prompts as a network is told them, and per prompt the end of its text that is not read, "" where all
    is."""

    condition: Condition
    dropped: tuple[str, ...]


class TextEncoder(nn.Module):
    """Prompts through the text encoders of one family. Conditions have their dtype and device, the widest
    dtype if they differ.

    towers      their networks, by name
    tokenizers  of those that have one of their own; no part of the state dict
    """

    def __init__(self, params: TextParams) -> None:
        super().__init__()
        self.params = params
        self.towers = nn.ModuleDict(
            {name: reader.NETWORK.network(reader.network) for name, reader in params.readers.items()}
        )
        self.tokenizers: dict[str, Any] = {}

    def encode(
        self,
        prompts: Sequence[str],
        *,
        numbers: Numbers | None = None,
        weighted: bool = False,
        long: Literal["chunk", "cut"] = "chunk",
        chunks: int = 1,
        clip_skip: int = 0,
    ) -> Encoded:
        """A batch of prompts; the context has `params.rows` rows times the number of chunks.

        A tower of CLIP reads 75 tokens at once. Longer prompts are read in chunks of 75, each with its own
        BOS and EOS, whose contexts follow each other; the vector knows the first. Shorter prompts of the
        batch are filled up with empty chunks.

        Families that attend to text and image together have one chunk (`params.chunked`). T5 reads a prompt
        up to its length less its EOS, and CLIP its first 75 tokens.

        numbers   a value, or one per prompt, for each of `params.numbers`; sizes and crops in pixels of the
                  image
        weighted  read weights as `parse_prompt` does: a token's row of the context becomes empty + weight *
                  (row - empty), with the row of the empty prompt at its place in the chunk. Weight 1 leaves a
                  row bitwise as it is. T5 reads words whole: where a weight ends within a token, that of its
                  last letter counts.
        long      "chunk": as many chunks as the longest prompt needs; "cut": what is beyond `chunks` is
                  dropped
        chunks    how many there are at least; for guidance those of prompts and negative prompts together,
                  see `count_chunks`
        clip_skip take the state so many blocks before the one that the family takes, as in diffusers: 1 is
        the block before. (A1111 counts
                  from 1, that is its "clip skip 2".) Pooled outputs and T5 are as ever
        """
        check_names("way with long prompts", [long], ["chunk", "cut"])
        self.check()
        self._check_chunks(chunks)
        self.check_clip_skip(clip_skip)
        batch = [self._tokenize(pieces) for pieces in _parse(prompts, weighted)]
        waves = self._waves(numbers, len(batch))
        if long == "chunk":
            chunks = max(chunks, self._chunks(batch))
        dropped = tuple(self._dropped(tokens, chunks) for tokens in batch)
        return Encoded(self._condition(batch, chunks, clip_skip, waves), dropped)

    def count_chunks(self, prompts: Sequence[str], *, weighted: bool = False) -> int:
        """How many chunks the longest of these prompts needs, at least 1; 1 in families that have no more."""
        if not self.params.chunked:
            return 1
        return self._chunks([self._tokenize(pieces) for pieces in _parse(prompts, weighted)])

    def null(
        self,
        n: int,
        *,
        numbers: Numbers | None = None,
        like: Condition | None = None,
        chunks: int = 1,
        clip_skip: int = 0,
    ) -> Condition:
        """What guidance steers away from where there is no negative prompt, n times, by the rule
        `params.null`.

        like    a condition of n prompts that this has to go with: gives the length of the context, and the
                numbers unless they are given
        chunks  the length of the context where there is no `like`
        clip_skip  as in `encode`
        """
        p = self.params
        self.check_clip_skip(clip_skip)
        self._check_chunks(chunks)
        if like is not None and len(like) != n:
            raise ValueError(f"null conditions for {n} prompts cannot be like a condition for {len(like)}")
        if like is not None and like.vector is not None and numbers is None:
            waves = like.vector[:, p.pooled_dim :]
        else:
            waves = self._waves(numbers, n)
        if like is not None and like.context is not None:
            chunks, rest = divmod(like.context.shape[1], p.rows)
            if rest or not chunks:
                raise ValueError(
                    f"a context of this family has {p.rows} rows, or a multiple of them, not "
                    f"{like.context.shape[1]}"
                )
        if p.null == "zeros":
            context = self._table.new_zeros(n, chunks * p.rows, p.context_dim)
            pooled = [context.new_zeros(n, p.pooled_dim)] if p.pooled_dim else []
            return Condition(context, vector=self._vector(pooled, waves))
        return self._condition([self._tokenize([])], chunks, clip_skip, waves)

    @property
    def _table(self) -> Tensor:
        """The tokens of the first text encoder, whose dtype and device conditions have that are not read."""
        first: Any = self.towers[next(iter(self.params.readers))]
        return cast(Tensor, first.token.weight)

    def tokenizer(self, name: str) -> Any:
        """What a text encoder reads texts with: its own, or one in its place. ValueError that says what to
        load where there is none."""
        return self.params.readers[name].tokenizer(self.tokenizers.get(name))

    @property
    def learned_words(self) -> dict[str, Any]:
        """By text encoder, the words of its own that images depend on, in plain values."""
        words = {name: self.params.readers[name].learned_words(own) for name, own in self.tokenizers.items()}
        return {name: each for name, each in words.items() if each is not None}

    def check(self) -> None:
        """ValueError where a network does not know all tokens that it would read: words, and the padding
        behind them."""
        for name, reader in self.params.readers.items():
            reader.check(name, self.tokenizers.get(name))

    def check_clip_skip(self, clip_skip: int) -> None:
        """ValueError for a clip_skip that the text encoders cannot follow."""
        check_type("clip_skip", clip_skip, int)
        most = min(
            (
                blocks
                for reader in self.params.readers.values()
                if (blocks := reader.max_clip_skip) is not None
            ),
            default=-1,
        )
        if most < 0 and clip_skip:
            raise ValueError(
                "no context comes from CLIP in this family: clip_skip has no meaning, leave it out"
            )
        if clip_skip and not 0 < clip_skip <= most:
            raise ValueError(
                f"clip_skip, blocks of CLIP that are left out, lies in 0 ... {most} for this model, not "
                f"{clip_skip}"
            )

    def _tokenize(self, pieces: Pieces) -> dict[str, Tokens]:
        """By reader, the tokens of a prompt."""
        return {
            name: reader.tokenize(self.tokenizer(name), pieces)
            for name, reader in self.params.readers.items()
        }

    def _check_chunks(self, chunks: int) -> None:
        if chunks < 1 or (chunks > 1 and not self.params.chunked):
            raise ValueError(
                f"chunks must be {'at least 1' if self.params.chunked else '1 for this family'}, not {chunks}"
            )

    def _chunks(self, batch: Sequence[Mapping[str, Tokens]]) -> int:
        """How many chunks the longest of some prompts needs."""
        if not self.params.chunked:
            return 1
        return max(
            1,
            *(
                math.ceil(len(tokens) / self.params.readers[name].chunk_tokens)
                for prompt in batch
                for name, tokens in prompt.items()
            ),
        )

    def _dropped(self, prompt: Mapping[str, Tokens], chunks: int) -> str:
        """The end of a prompt that is not read by those whose rows stand last, which read the most; of
        several the longest end."""
        ends = {
            name: prompt[name][chunks * self.params.readers[name].chunk_tokens :]
            for name in self.params.groups[-1]
        }
        return max(
            (self.tokenizer(name).detokenize([token for token, _ in end]) for name, end in ends.items()),
            key=len,
        )

    def _condition(
        self, batch: Sequence[Mapping[str, Tokens]], chunks: int, clip_skip: int, waves: Tensor
    ) -> Condition:
        """What the readers give of prompts, joined; one prompt serves all rows of `waves`."""
        p = self.params
        read = {
            name: reader.read(
                self.towers[name], self.tokenizer(name), [prompt[name] for prompt in batch], chunks, clip_skip
            )
            for name, reader in p.readers.items()
        }
        states = [torch.cat([read[name].states for name in group], dim=-1) for group in p.groups]
        masks = [_both(*(read[name].mask for name in group)) for group in p.groups]
        context = states[0]
        if p.zeros:
            states, masks = [*states, context.new_zeros(len(batch), p.zeros, p.context_dim)], [*masks, None]
        if len(states) > 1:
            context = torch.cat(
                [F.pad(each, (0, p.context_dim - each.shape[-1])).to(context.device) for each in states],
                dim=1,
            )
        n = len(waves)
        pooled = [each.pooled.expand(n, -1) for each in read.values() if each.pooled is not None]
        return replace(
            Condition(context, _joined(masks, states)).expand(n), vector=self._vector(pooled, waves)
        )

    def _waves(self, numbers: Numbers | None, n: int) -> Tensor:
        """The sinusoids (n, 256 * len(params.numbers)) of the numbers, in float32."""
        names, given = self.params.numbers, numbers or {}
        check_names("number", given, names)
        if missing := [name for name in names if name not in given]:
            raise ValueError(
                f"this family is told the numbers {', '.join(names)}: give numbers={{{missing[0]!r}: ...}} "
                "too"
            )
        columns = []
        for name in names:
            check_type(name, given[name], float | Sequence[float])
            column = torch.as_tensor(given[name], dtype=torch.float32)
            if column.ndim and len(column) != n:
                raise ValueError(
                    f"{name} has {len(column)} values for {n} prompts: give one for all, or one per prompt"
                )
            columns.append(sinusoid(column.expand(n), NUMBER_DIM))
        waves = torch.cat(columns, dim=-1) if columns else torch.empty(n, 0)
        return waves.to(self._table.device, non_blocking=True)

    def _vector(self, pooled: Sequence[Tensor], waves: Tensor) -> Tensor | None:
        """Pooled outputs, each (B, P), and behind them the waves of the numbers; None where the family has
        neither."""
        if not pooled:
            return waves.to(self._table) if self.params.numbers else None
        side_by_side = torch.cat(list(pooled), dim=-1)
        return torch.cat([side_by_side, waves.to(side_by_side)], dim=-1)


def _parse(prompts: Sequence[str], weighted: bool) -> list[Pieces]:
    """Every prompt in pieces with their weights. ValueError for a weight beyond MAX_WEIGHT."""
    check_type("prompts", prompts, Sequence[str])
    if not len(prompts):
        raise ValueError("there is no prompt: give at least one, [''] for none")
    parsed: list[Pieces] = [parse_prompt(prompt) if weighted else [(prompt, 1.0)] for prompt in prompts]
    for prompt, pieces in zip(prompts, parsed, strict=True):
        heaviest = max((weight for _, weight in pieces), key=abs, default=0.0)
        if abs(heaviest) > MAX_WEIGHT:
            raise ValueError(
                f"words weigh up to {MAX_WEIGHT:g} times the usual, not {heaviest:g}, in the prompt "
                f"{brief(prompt)}"
            )
    return parsed


def _both(*masks: Tensor | None) -> Tensor | None:
    """Rows that stand side by side are there where all of their parts are."""
    there = [mask for mask in masks if mask is not None]
    return torch.stack(there).all(0) if there else None


def _joined(masks: Sequence[Tensor | None], states: Sequence[Tensor]) -> Tensor | None:
    """One mask of rows (B, L, D) that follow each other, None where all are attended to."""
    if all(mask is None for mask in masks):
        return None
    there = [
        each.new_ones(each.shape[:2], dtype=torch.bool) if mask is None else mask
        for mask, each in zip(masks, states, strict=True)
    ]
    return torch.cat([mask.to(there[0].device) for mask in there], dim=1)
