"""From prompts to conditions: a family's text encoders, and numbers such as the image size."""

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
from models.text.reader import Pieces, Reading, Tokens
from models.text.recipes import NUMBER_DIM, TextParams

MAX_WEIGHT = 100.0  # of a word; usual weights are up to 2
LEFT_OUT = "text encoders left out"  # the beginning of a note: some text encoders are there, but not all

Numbers = Mapping[str, float | Sequence[float]]


class Encoded(NamedTuple):
    """The condition of prompts, and for each prompt the end of its text that was cut off, or ""."""

    condition: Condition
    dropped: tuple[str, ...]


class TextEncoder(nn.Module):
    """The text encoders of one family. Conditions have their device, and their widest dtype.

    towers      their networks, by name
    tokenizers  those that came with the weights, by name; not in the state dict
    """

    def __init__(self, params: TextParams) -> None:
        super().__init__()
        self.params = params
        networks = {name: reader.NETWORK.network(reader.network) for name, reader in params.readers.items()}
        self.towers = nn.ModuleDict(networks)
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
        """The condition of a batch of prompts; its context has `params.rows` rows per chunk.

        CLIP reads 75 tokens at once. Longer prompts are read in chunks of 75, each with its own BOS and EOS,
        and the contexts of the chunks are concatenated. The vector is that of the first chunk. Shorter
        prompts of the batch get empty chunks. SD 3 and FLUX.1 have one chunk (`params.chunked`): T5 reads as
        many tokens as its length less EOS, and CLIP the first 75.

        numbers   a value, or one per prompt, for each of `params.numbers`; sizes and crops in pixels
        weighted  parse weights (`parse_prompt`): a token's row of the context becomes empty + weight * (row -
                  empty), where `empty` is the empty prompt's row at the same place. If a weight ends within a
                  token of T5, the token has the weight of its last letter
        long      "chunk": as many chunks as the longest prompt needs; "cut": at most `chunks`
        chunks    minimum number of chunks; guidance needs as many for prompts and negative prompts
                  (`count_chunks`)
        clip_skip take the context this many blocks before the family's block, as in diffusers: 1 is A1111's
        "clip
                  skip 2". It does not change pooled outputs and T5
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
        """Number of chunks that the longest of these prompts needs; 1 in families without chunks."""
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
        """The unconditional condition for guidance without negative prompts, n times, by `params.null`.

        like    a condition of n prompts, whose context length and numbers it takes (numbers=... comes first)
        chunks  length of the context without `like`
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
                rows = like.context.shape[1]
                raise ValueError(f"a context of this family has a multiple of {p.rows} rows, not {rows}")
        if p.null == "zeros":
            context = self._table.new_zeros(n, chunks * p.rows, p.context_dim)
            pooled = [context.new_zeros(n, p.pooled_dim)] if p.pooled_dim else []
            return Condition(context, vector=self._vector(pooled, waves))
        return self._condition([self._tokenize([])], chunks, clip_skip, waves)

    @property
    def _table(self) -> Tensor:
        """The first text encoder's token table: the dtype and device of conditions of numbers and zeros."""
        first: Any = self.towers[next(iter(self.params.readers))]
        return cast(Tensor, first.token.weight)

    def tokenizer(self, name: str) -> Any:
        """The tokenizer of a text encoder, its own or the default. ValueError if there is none."""
        return self.params.readers[name].tokenizer(self.tokenizers.get(name))

    @property
    def learned_words(self) -> dict[str, Any]:
        """The learned words of each text encoder, in plain values."""
        readers = self.params.readers
        words = {name: readers[name].learned_words(own) for name, own in self.tokenizers.items()}
        return {name: each for name, each in words.items() if each is not None}

    def check(self) -> None:
        """ValueError if a network lacks tokens of its tokenizer, or its padding token."""
        for name, reader in self.params.readers.items():
            reader.check(name, self.tokenizers.get(name))

    def check_clip_skip(self, clip_skip: int) -> None:
        """ValueError for a clip_skip that is too large for the text encoders."""
        check_type("clip_skip", clip_skip, int)
        limits = (reader.max_clip_skip for reader in self.params.readers.values())
        most = min((limit for limit in limits if limit is not None), default=-1)
        if most < 0 and clip_skip:
            raise ValueError("no context comes from CLIP in this family: leave clip_skip out")
        if clip_skip and not 0 < clip_skip <= most:
            raise ValueError(f"clip_skip must be 0 to {most} for this model, not {clip_skip}")

    def _tokenize(self, pieces: Pieces) -> dict[str, Tokens]:
        """The tokens of a prompt, by reader."""
        readers = self.params.readers
        return {name: reader.tokenize(self.tokenizer(name), pieces) for name, reader in readers.items()}

    def _check_chunks(self, chunks: int) -> None:
        if chunks < 1 or (chunks > 1 and not self.params.chunked):
            allowed = "at least 1" if self.params.chunked else "1 for this family"
            raise ValueError(f"chunks must be {allowed}, not {chunks}")

    def _chunks(self, batch: Sequence[Mapping[str, Tokens]]) -> int:
        """Number of chunks that the longest prompt needs."""
        if not self.params.chunked:
            return 1
        sizes = {name: reader.chunk_tokens for name, reader in self.params.readers.items()}
        return max(
            1, *(math.ceil(len(each) / sizes[name]) for prompt in batch for name, each in prompt.items())
        )

    def _dropped(self, prompt: Mapping[str, Tokens], chunks: int) -> str:
        """The longest text that a reader of the last group, which reads the most, cuts off a prompt."""

        def end(name: str) -> str:
            tokens = prompt[name][chunks * self.params.readers[name].chunk_tokens :]
            return str(self.tokenizer(name).detokenize([token for token, _ in tokens]))

        return max(map(end, self.params.groups[-1]), key=len)

    def _condition(
        self, batch: Sequence[Mapping[str, Tokens]], chunks: int, clip_skip: int, waves: Tensor
    ) -> Condition:
        """The joined outputs of all readers; a single prompt is repeated for all rows of `waves`."""
        p = self.params

        def read(name: str) -> Reading:
            tokens = [prompt[name] for prompt in batch]
            return p.readers[name].read(self.towers[name], self.tokenizer(name), tokens, chunks, clip_skip)

        outputs = {name: read(name) for name in p.readers}
        states = [torch.cat([outputs[name].states for name in group], dim=-1) for group in p.groups]
        masks = [_combine_masks(*(outputs[name].mask for name in group)) for group in p.groups]
        context = states[0]
        if p.zeros:
            states, masks = [*states, context.new_zeros(len(batch), p.zeros, p.context_dim)], [*masks, None]
        if len(states) > 1:
            padded = [F.pad(each, (0, p.context_dim - each.shape[-1])).to(context.device) for each in states]
            context = torch.cat(padded, dim=1)
        n = len(waves)
        pooled = [each.pooled.expand(n, -1) for each in outputs.values() if each.pooled is not None]
        condition = Condition(context, _concatenate_masks(masks, states)).expand(n)
        return replace(condition, vector=self._vector(pooled, waves))

    def _waves(self, numbers: Numbers | None, n: int) -> Tensor:
        """The sinusoids (n, 256 * len(params.numbers)) of the numbers, in float32."""
        names, numbers = self.params.numbers, numbers or {}
        check_names("number", numbers, names)
        if missing := [name for name in names if name not in numbers]:
            remedy = f"give numbers={{{missing[0]!r}: ...}} too"
            raise ValueError(f"this family takes the numbers {', '.join(names)}: {remedy}")
        columns = []
        for name in names:
            check_type(name, numbers[name], float | Sequence[float])
            column = torch.as_tensor(numbers[name], dtype=torch.float32)
            if column.ndim and (count := len(column)) != n:
                raise ValueError(f"{name} has {count} values for {n} prompts: give one, or one per prompt")
            columns.append(sinusoid(column.expand(n), NUMBER_DIM))
        waves = torch.cat(columns, dim=-1) if columns else torch.empty(n, 0)
        return waves.to(self._table.device, non_blocking=True)

    def _vector(self, pooled: Sequence[Tensor], waves: Tensor) -> Tensor | None:
        """Pooled outputs (B, P), then the waves of the numbers; None if the family has neither."""
        if not pooled:
            return waves.to(self._table) if self.params.numbers else None
        outputs = torch.cat(list(pooled), dim=-1)
        return torch.cat([outputs, waves.to(outputs)], dim=-1)


def _parse(prompts: Sequence[str], weighted: bool) -> list[Pieces]:
    """The weighted pieces of each prompt. ValueError for a weight beyond MAX_WEIGHT."""
    check_type("prompts", prompts, Sequence[str])
    if not len(prompts):
        raise ValueError("there is no prompt: give at least one, [''] for none")
    parsed: list[Pieces] = [parse_prompt(prompt) if weighted else [(prompt, 1.0)] for prompt in prompts]
    for prompt, pieces in zip(prompts, parsed, strict=True):
        heaviest = max((weight for _, weight in pieces), key=abs, default=0.0)
        if abs(heaviest) > MAX_WEIGHT:
            limit = f"weights are at most {MAX_WEIGHT:g}"
            raise ValueError(f"{limit}, not {heaviest:g}, in the prompt {brief(prompt)}")
    return parsed


def _combine_masks(*masks: Tensor | None) -> Tensor | None:
    """The mask of states that are concatenated along the width: True where all masks are."""
    present = [mask for mask in masks if mask is not None]
    return torch.stack(present).all(0) if present else None


def _concatenate_masks(masks: Sequence[Tensor | None], states: Sequence[Tensor]) -> Tensor | None:
    """The mask of states (B, L, D) that are concatenated along the sequence; None if all masks are."""
    if all(mask is None for mask in masks):
        return None
    pairs = zip(masks, states, strict=True)
    full = [each.new_ones(each.shape[:2], dtype=torch.bool) if mask is None else mask for mask, each in pairs]
    return torch.cat([mask.to(full[0].device) for mask in full], dim=1)
