"""From prompts to what a text-to-image network is conditioned on: towers, which of their states, and the numbers beside them."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from diffusion.condition import Condition
from diffusion.messages import brief
from diffusion.spec import check_names, check_type
from models.layers.conditioning import sinusoid
from models.networks.clip import CLIPText
from models.networks.t5 import T5
from models.text.clip_tokenizer import EOS, CLIPTokenizer, openai_tokenizer, uncleaned_tokenizer
from models.text.prompt import parse_prompt
from models.text.recipes import NUMBER_DIM, TextParams, TowerUse
from models.text.t5_tokenizer import EOS as T5_EOS
from models.text.t5_tokenizer import PAD as T5_PAD
from models.text.t5_tokenizer import T5Tokenizer

MAX_WEIGHT = 100.0  # of a word; people use up to 2
LEFT_OUT = "text encoders left out"  # how the note begins that says why there is no text, though some of its encoders are there

Numbers = Mapping[str, float | Sequence[float]]
Pieces = Sequence[tuple[str, float]]  # a prompt in pieces, each with its weight
Tokens = list[tuple[int, float]]  # token ids, each with its weight


class Encoded(NamedTuple):
    """Prompts as a network is told them, and per prompt the end of its text that is not read, "" where all is."""

    condition: Condition
    dropped: tuple[str, ...]


class TextEncoder(nn.Module):
    """Prompts through the towers of one family. Conditions have the dtype and the device of the towers, the widest dtype if they differ.

    tokenizers    by tower, the vocabulary of those of CLIP that have one of their own, such as learned words; the others read OpenAI's
    t5_tokenizer  T5's tokens, which come in a file of their own; neither is part of the state dict
    Loading and `encode` check that they fit.
    """

    def __init__(self, params: TextParams) -> None:
        super().__init__()
        self.params = params
        self.towers = nn.ModuleDict({name: CLIPText(tower) for name, tower in params.towers.items()})
        if params.t5:
            self.towers["t5"] = T5(params.t5)
        self.tokenizers: dict[str, CLIPTokenizer] = {}
        self.t5_tokenizer: T5Tokenizer | None = None

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

        A tower of CLIP reads 75 tokens at once. Longer prompts are read in chunks of 75, each with its own BOS and EOS, whose
        contexts follow each other; the vector knows the first. Shorter prompts of the batch are filled up with empty chunks.

        Families that attend to text and image together (`params.joint`) have one chunk: for them a context that is twice there is
        another context. T5 reads a prompt up to `params.t5_length` less its EOS, and CLIP its first 75 tokens.

        numbers   a value, or one per prompt, for each of `params.numbers`; sizes and crops in pixels of the image
        weighted  read weights as `parse_prompt` does: a token's row of the context becomes empty + weight * (row - empty),
                  with the row of the empty prompt at its place in the chunk. Weight 1 leaves a row bitwise as it is. T5 reads words
                  whole: where a weight ends within a token, that of its last letter counts.
        long      "chunk": as many chunks as the longest prompt needs; "cut": what is beyond `chunks` is dropped
        chunks    how many there are at least; for guidance those of prompts and negative prompts together, see `count_chunks`
        clip_skip take the state so many blocks before the one that the family takes, as in diffusers: 1 is the block before. (A1111 counts
                  from 1, that is its "clip skip 2".) Pooled outputs and T5 are as ever
        """
        check_names("way with long prompts", [long], ["chunk", "cut"])
        self.check_vocabularies()
        self._check_chunks(chunks)
        self.check_clip_skip(clip_skip)
        batch = [self._tokenize(pieces) for pieces in _parse(prompts, weighted)]
        waves = self._waves(numbers, len(batch))
        if long == "chunk":
            chunks = max(chunks, self._chunks(batch))
        context, pooled = self._read(batch, chunks, clip_skip)
        dropped = tuple(self._dropped(tokens, chunks) for tokens in batch)
        return Encoded(Condition(context, vector=self._vector(pooled, waves)), dropped)

    def count_chunks(self, prompts: Sequence[str], *, weighted: bool = False) -> int:
        """How many chunks the longest of these prompts needs, at least 1; 1 in families that have no more."""
        return self._chunks([self._tokenize_for_clip(pieces) for pieces in _parse(prompts, weighted)])

    def null(
        self, n: int, *, numbers: Numbers | None = None, like: Condition | None = None, chunks: int = 1, clip_skip: int = 0
    ) -> Condition:
        """What guidance steers away from where there is no negative prompt, n times, by the rule `params.null`.

        like    a condition of n prompts that this has to go with: gives the length of the context, and the numbers unless they are given
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
            chunks = like.context.shape[1] // p.rows
        if p.null == "zeros":
            context = torch.zeros(n, chunks * p.rows, p.context_dim, dtype=self.dtype, device=self.device)
            pooled = context.new_zeros(n, p.pooled_dim)
        else:
            context, pooled = (repeat(x, "1 ... -> n ...", n=n) for x in self._read([self._tokenize([])], chunks, clip_skip))
        return Condition(context, vector=self._vector(pooled, waves))

    @property
    def dtype(self) -> torch.dtype:
        return self.tower(self.params.uses[0].tower).token.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.tower(self.params.uses[0].tower).token.weight.device

    def tower(self, name: str) -> CLIPText:
        """One tower of CLIP by its name in `params.towers`."""
        return cast(CLIPText, self.towers[name])

    def tokenizer(self, name: str) -> CLIPTokenizer:
        """What a tower of CLIP reads: its own, or OpenAI's, as transformers reads it where another tower has its own."""
        return self.tokenizers.get(name) or (uncleaned_tokenizer() if self.tokenizers else openai_tokenizer())

    def check_vocabularies(self) -> None:
        """ValueError where a tower does not know all tokens that it would read: words, and the padding behind them."""
        towers = self.params.towers
        sizes = {name: (self.tokenizers[name].size if name in self.tokenizers else EOS + 1, of.vocab) for name, of in towers.items()}
        if self.t5_tokenizer is not None and self.params.t5:
            sizes["t5"] = (self.t5_tokenizer.size, self.params.t5.vocab)
        for name, (size, rows) in sizes.items():
            if size > rows:
                raise ValueError(f"the tokenizer of {name} has {size} tokens and this tower knows {rows}: load the one that it came with")
        for use in self.params.uses:
            if not 0 <= use.pad < (rows := towers[use.tower].vocab):
                raise ValueError(f"{use.tower} is padded with the token pad={use.pad}, and this tower knows 0 to {rows - 1}")

    def check_clip_skip(self, clip_skip: int) -> None:
        """ValueError for a clip_skip that the towers cannot follow."""
        check_type("clip_skip", clip_skip, int)
        most = min((use.blocks for use in self.params.uses if use.blocks is not None), default=0) - 1
        if most < 0 and clip_skip:
            raise ValueError("no context comes from CLIP in this family: clip_skip has no meaning, leave it out")
        if clip_skip and not 0 < clip_skip <= most:
            raise ValueError(f"clip_skip, blocks of CLIP that are left out, lies in 0 ... {most} for this model, not {clip_skip}")

    def _tokenize(self, pieces: Pieces) -> dict[str, Tokens]:
        """By tower, the tokens of a prompt."""
        tokens = self._tokenize_for_clip(pieces)
        return tokens | {"t5": _tokenize_whole(self._require_t5_tokenizer(), pieces)} if self.params.t5 else tokens

    def _tokenize_for_clip(self, pieces: Pieces) -> dict[str, Tokens]:
        """By tower of CLIP, the tokens of a prompt, each piece apart, so that a weight may end within a word."""
        readers = {name: self.tokenizer(name) for name in self.params.towers}
        return {
            name: [(token, weight) for text, weight in pieces for token in reader.expand(reader.tokenize(text))]
            for name, reader in readers.items()
        }

    def _require_t5_tokenizer(self) -> T5Tokenizer:
        if self.t5_tokenizer is None:
            raise ValueError(
                "T5 is here without its tokens: load its spiece.model or tokenizer.json too, models.load(..., 'spiece.model'); it is in "
                "tokenizer_2/ of black-forest-labs/FLUX.1-schnell, in tokenizer_3/ of stabilityai/stable-diffusion-3.5-large and in "
                "google/t5-v1_1-xxl"
            )
        return self.t5_tokenizer

    def _check_chunks(self, chunks: int) -> None:
        if chunks < 1 or (chunks > 1 and self.params.joint):
            raise ValueError(f"chunks must be {'1 for this family' if self.params.joint else 'at least 1'}, not {chunks}")

    def _chunks(self, batch: Sequence[Mapping[str, Tokens]]) -> int:
        """How many chunks the longest of some prompts needs."""
        longest = max(len(tokens) for prompt in batch for tokens in prompt.values())
        return 1 if self.params.joint else max(1, math.ceil(longest / (self.params.length - 2)))

    def _dropped(self, prompt: Mapping[str, Tokens], chunks: int) -> str:
        """The end of a prompt that is not read: by T5 where there is one, else by the tower of CLIP that drops the most."""
        ids = {name: [token for token, _ in tokens] for name, tokens in prompt.items()}
        if self.params.t5:
            return self._require_t5_tokenizer().detokenize(ids["t5"][self.params.t5_length - 1 :])
        room = chunks * (self.params.length - 2)
        return max((self.tokenizer(name).detokenize(tokens[room:]) for name, tokens in ids.items()), key=len)

    def _read(self, batch: Sequence[Mapping[str, Tokens]], chunks: int, clip_skip: int) -> tuple[Tensor, Tensor]:
        """Context (B, L, D), and pooled outputs (B, pooled_dim) of every tower in use, side by side."""
        p = self.params
        read = [self._read_clip(use, [prompt[use.tower] for prompt in batch], chunks, clip_skip) for use in p.uses]
        states, pooled = zip(*read, strict=True)
        context = rearrange(torch.cat(states, dim=-1), "(b c) l d -> b (c l) d", c=chunks)
        if p.joint:  # T5's rows, or zeros in their place, stand behind CLIP's
            if p.t5:
                behind = self._read_t5([prompt["t5"] for prompt in batch]).to(context.device)
            else:
                behind = context.new_zeros(len(batch), p.t5_length, p.context_dim)
            context = torch.cat([F.pad(context, (0, p.context_dim - p.clip_dim)), behind], dim=1) if p.clip_dim else behind
        return context, torch.cat(pooled, dim=-1)[::chunks]

    def _read_clip(self, use: TowerUse, batch: Sequence[Tokens], chunks: int, clip_skip: int) -> tuple[Tensor, Tensor]:
        """The weighted state (B * chunks, length, width or 0) and the pooled outputs (B * chunks, 0 or more) of one tower."""
        tower, tokenizer, room = self.tower(use.tower), self.tokenizer(use.tower), self.params.length - 2

        def row(tokens: Tokens) -> Tokens:
            return [(tokenizer.bos, 1.0), *tokens, (tokenizer.eos, 1.0), *[(use.pad, 1.0)] * (room - len(tokens))]

        rows = [row(tokens[i * room : (i + 1) * room]) for tokens in batch for i in range(chunks)]
        ids = _ids(rows, self.device)
        states = tower(ids)
        last = states[-1]
        pooled = tower.pool(last, ids, use.projected, tokenizer.eos) if use.pooled else last.new_empty(len(rows), 0)
        if use.blocks is None:
            return last[..., :0], pooled
        taken = use.blocks - clip_skip

        def state(states: Sequence[Tensor]) -> Tensor:
            return tower.norm(states[taken]) if use.norm else states[taken]

        return _weighted(state(states), rows, lambda: state(tower(_ids([row([])], self.device)))), pooled

    def _read_t5(self, batch: Sequence[Tokens]) -> Tensor:
        """T5's weighted states (B, t5_length, width)."""
        tower, room = cast(T5, self.towers["t5"]), self.params.t5_length - 1

        def row(tokens: Tokens) -> Tokens:
            return [*tokens[:room], (T5_EOS, 1.0), *[(T5_PAD, 1.0)] * (room - len(tokens))]

        def run(rows: Sequence[Tokens]) -> Tensor:
            return tower(_ids(rows, tower.token.weight.device))

        rows = [row(tokens) for tokens in batch]
        return _weighted(run(rows), rows, lambda: run([row([])]))

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
        waves = torch.cat(columns, dim=-1) if columns else torch.empty(n, 0)
        return waves.to(self.device, non_blocking=True)

    def _vector(self, pooled: Tensor, waves: Tensor) -> Tensor | None:
        return None if self.params.vector_dim is None else torch.cat([pooled, waves.to(pooled)], dim=-1)


def _parse(prompts: Sequence[str], weighted: bool) -> list[Pieces]:
    """Every prompt in pieces with their weights. ValueError for a weight beyond MAX_WEIGHT."""
    check_type("prompts", prompts, Sequence[str])
    if not len(prompts):
        raise ValueError("there is no prompt: give at least one, [''] for none")
    parsed: list[Pieces] = [parse_prompt(prompt) if weighted else [(prompt, 1.0)] for prompt in prompts]
    for prompt, pieces in zip(prompts, parsed, strict=True):
        heaviest = max((weight for _, weight in pieces), key=abs, default=0.0)
        if abs(heaviest) > MAX_WEIGHT:
            raise ValueError(f"words weigh up to {MAX_WEIGHT:g} times the usual, not {heaviest:g}, in the prompt {brief(prompt)}")
    return parsed


def _tokenize_whole(tokenizer: T5Tokenizer, pieces: Pieces) -> Tokens:
    """T5's tokens of the whole text, which would be others piece by piece, for each piece would begin a word."""
    ends = list(accumulate(len(text) for text, _ in pieces))
    tokens = tokenizer.tokenize_with_ends("".join(text for text, _ in pieces))
    return [(token, pieces[bisect_left(ends, end)][1]) for token, end in tokens]


def _ids(rows: Sequence[Tokens], device: torch.device) -> Tensor:
    return torch.tensor([[token for token, _ in row] for row in rows]).to(device, non_blocking=True)


def _weighted(states: Tensor, rows: Sequence[Tokens], empty: Callable[[], Tensor]) -> Tensor:
    """The states (B, L, D) of rows of tokens, moved by their weights from those of the empty prompt, `empty()` (1, L, D)."""
    weights = torch.tensor([[weight for _, weight in row] for row in rows])
    if (weights == 1).all():
        return states
    # A lerp rather than its formula: at weight 1 it is exact.
    return torch.lerp(empty(), states, weights.to(states.device, states.dtype, non_blocking=True)[..., None])
