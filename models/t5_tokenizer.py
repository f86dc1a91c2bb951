"""T5's tokens: pieces of the most likely segmentation under a unigram model (Kudo 2018), from the files that published models bring along.

Text is normalised (nmt_nfkc: full-width and other compatibility forms mended, controls dropped), cut at blanks, and every word begins
with "▁". What is in no piece is the token <unk>.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from diffusion.messages import brief
from diffusion.spec import check_type
from models.files import decode_text, read_bytes
from models.tokenizer import MAX_TOKENS, AddedToken
from models.tokenizer_json import MAX_FILE, check_charsmap, check_pieces, checked_unigram, parse
from models.tokenizer_library import guarded, library

PAD, EOS, UNK = 0, 1, 2
EXTRA = 100  # <extra_id_99> ... <extra_id_0> behind the pieces of spiece.model, marks of T5's training
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # kinds of pieces


class T5Tokenizer:
    """Made by `open` or `from_json`."""

    def __init__(self, backend: Any, text: str) -> None:
        self._backend, self._json = backend, text  # a tokenizers.Tokenizer, and the tokenizer.json it is made of

    @classmethod
    def open(cls, path: str | Path) -> T5Tokenizer:
        """From a `tokenizer.json` or a `spiece.model`, told apart by what is in it. ValueError for any other file."""
        data = read_bytes(path, MAX_FILE)
        try:
            return cls.from_json(decode_text("it", data) if data.lstrip()[:1] == b"{" else _converted(data))
        except ValueError as error:
            raise ValueError(f"{path} is no tokenizer of T5, spiece.model or tokenizer.json: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> T5Tokenizer:
        """From the contents of a `tokenizer.json`. ValueError where they are not T5's."""
        check_type("a tokenizer.json", text, str)
        text = json.dumps(checked_unigram(parse(text)), ensure_ascii=False)
        backend = _backend(library().Tokenizer.from_str, text)
        first = [backend.id_to_token(i) for i in (PAD, EOS)]
        if first != ["<pad>", "</s>"]:
            raise ValueError(f"its first tokens are not T5's <pad> and </s>, but {first[0]!r} and {first[1]!r}")
        return cls(backend, text)

    @classmethod
    def of_letters(cls) -> T5Tokenizer:
        """One that spells: the printable characters of ASCII, for models too small to know words."""
        letters = ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in letters)]
        return cls.from_json(str(_from_pieces(pieces, b"").to_str()))

    def with_words(self, words: Iterable[AddedToken]) -> T5Tokenizer:
        """A tokenizer that has these words too, each as one token. ValueError unless their ids follow its own."""
        if not (added := list(words)):
            return self
        content = json.loads(self._json)
        content["added_tokens"] += [asdict(word) for word in added]
        longer = T5Tokenizer.from_json(json.dumps(content))
        for word in added:
            if (number := longer._backend.token_to_id(word.content)) != word.id:
                raise ValueError(f"its word {brief(word.content)} has the id {word.id}, where {number} comes next")
        return longer

    def knows(self, name: str) -> bool:
        """Whether that is one of its tokens."""
        return self._backend.token_to_id(name) is not None

    def to_json(self) -> str:
        """The contents of a `tokenizer.json`: those it is made of, for the library rounds scores when it reads and writes them."""
        return self._json

    @property
    def size(self) -> int:
        """One more than the greatest id."""
        return int(self._backend.get_vocab_size())

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text of any length, without EOS and padding. "</s>" and the like in it are those tokens."""
        return [token for token, _ in self.tokenize_with_ends(text)]

    def tokenize_with_ends(self, text: str) -> list[tuple[int, int]]:
        """Token ids, each with the number of characters of the text up to its end."""
        if not isinstance(text, str):
            raise ValueError(f"a prompt is a text, not {text!r}")
        encoding = guarded(self._backend.encode, text, add_special_tokens=False)
        return [(token, end) for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)]

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, normalised. ValueError for an id outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self.size:
                raise ValueError(f"{token} is no token: ids are 0 to {self.size - 1}")
        return str(guarded(self._backend.decode, list(ids), skip_special_tokens=False))


def _backend(make: Callable[..., Any], *args: Any) -> Any:
    """The library's tokenizer that `make` returns, if it reads text at all."""
    backend = guarded(make, *args)
    guarded(backend.encode, "a ½ \U0010fffd")  # a letter, one to be mended, one in no piece
    return backend


def _converted(data: bytes) -> str:
    """The tokenizer.json that transformers makes of a spiece.model."""
    return str(_backend(_from_pieces, *_read_sentencepiece(data)).to_str())


def _from_pieces(pieces: list[tuple[str, float]], charsmap: bytes) -> Any:
    """As transformers has it: the marks of T5's training behind the pieces, and words split at blanks of any kind."""
    kit = library()
    marks = [f"<extra_id_{i}>" for i in reversed(range(EXTRA))]
    known = {piece for piece, _ in pieces}
    backend = kit.Tokenizer(kit.models.Unigram([*pieces, *((mark, 0.0) for mark in marks if mark not in known)], unk_id=UNK))
    before, words = kit.pre_tokenizers, kit.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    if charsmap:
        backend.normalizer = kit.normalizers.Precompiled(charsmap)
    backend.pre_tokenizer = before.Sequence([before.WhitespaceSplit(), words])
    backend.add_special_tokens([kit.AddedToken(name, normalized=False) for name in ("<pad>", "</s>", "<unk>", *marks)])
    return backend


# ---- sentencepiece's file: a protocol buffer, of which these fields matter (sentencepiece_model.proto)

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # of the model
PIECE, SCORE, KIND = 1, 2, 3  # of a piece
MODEL_KIND, UNK_ID = 3, 40  # of the trainer: 1 is a unigram model
CHARSMAP, PREFIX, JOINED = 2, 3, 4  # of the normaliser: its table; "▁" before the text; blanks joined


def _read_sentencepiece(data: bytes) -> tuple[list[tuple[str, float]], bytes]:
    """Pieces with their scores (log-probabilities), and the normaliser's table. ValueError for what is not a model like T5's."""
    fields = list(islice(_fields(data), MAX_TOKENS))
    pieces = [_piece(value) for number, value in fields if number == PIECES]
    trainer, normalizer = (
        {inner: content for number, value in fields if number == which for inner, content in _fields(value)}
        for which in (TRAINER, NORMALIZER)
    )
    if not pieces:
        raise ValueError("it holds no pieces")
    if trainer.get(MODEL_KIND, 1) != 1 or trainer.get(UNK_ID, 0) != UNK or {kind for *_, kind in pieces} - {NORMAL, UNKNOWN, CONTROL}:
        raise ValueError("it is sentencepiece's, but not a unigram model with <unk> as token 2, as T5's is")
    if not normalizer.get(PREFIX, 1) or not normalizer.get(JOINED, 1):
        raise ValueError("it keeps blanks as they are, where T5's joins them and puts one before the text")
    charsmap = normalizer.get(CHARSMAP, b"")
    if not isinstance(charsmap, bytes):
        raise ValueError("its normaliser has no table")
    if charsmap:
        check_charsmap(charsmap)
    found = [(name, score) for name, score, _ in pieces]
    check_pieces(found)
    return found, charsmap


def _piece(data: int | bytes) -> tuple[str, float, int | bytes]:
    fields = dict(_fields(data))
    name, score = fields.get(PIECE), fields.get(SCORE, bytes(4))
    if not isinstance(name, bytes) or not isinstance(score, bytes) or len(score) != 4:
        raise ValueError("a piece has no name or no score")
    (value,) = struct.unpack("<f", score)
    if not math.isfinite(value):
        raise ValueError(f"a piece has the score {value}")
    return name.decode(), value, fields.get(KIND, NORMAL)


def _fields(data: int | bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of every field of a message: whole numbers, and everything else as bytes."""
    if not isinstance(data, bytes):
        raise ValueError("a number stands where a message should")
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = divmod(key, 8)
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError("it is neither JSON nor sentencepiece's")
        size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + size > len(data):
            raise ValueError("it is cut off, or neither JSON nor sentencepiece's")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A whole number, seven bits to a byte from the lowest, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError("it is cut off, or neither JSON nor sentencepiece's")
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            return value, at
    raise ValueError("it is neither JSON nor sentencepiece's")
