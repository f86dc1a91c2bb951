"""T5's tokens: pieces of the most likely segmentation under a unigram model (Kudo 2018), from the files that published models bring along.

Text is normalised (nmt_nfkc: full-width and other compatibility forms mended, controls dropped), cut at blanks, and every word begins
with "▁". What is in no piece is the token <unk>.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.messages import brief
from diffusion.spec import check_type
from models.files.text import decode_text, read_bytes
from models.text.tokenizer_json import checked_unigram, model_of, parse
from models.text.vocabulary import (
    CONFIG,
    MAX_FILE,
    MAX_TOKENS,
    SPIECE,
    TRIAL,
    WHOLE,
    AddedToken,
    added_tokens,
    folders_beside,
    guarded,
    library,
    read_object,
    special_tokens,
)

if TYPE_CHECKING:
    from models.files.table import Part

PAD, EOS, UNK = 0, 1, 2
EXTRA = 100  # <extra_id_99> ... <extra_id_0> behind the pieces of spiece.model, marks of T5's training
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # kinds of pieces
CLASSES = ("T5Tokenizer", "T5TokenizerFast")  # of transformers


class T5Tokenizer:
    """Encodes texts by the content of a tokenizer.json. ValueError where that is not T5's."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._json = json.dumps(checked_unigram(content), ensure_ascii=False)
        self._backend = guarded(library().Tokenizer.from_str, self._json)
        guarded(self._backend.encode, TRIAL)
        first = [self._backend.id_to_token(i) for i in (PAD, EOS)]
        if first != ["<pad>", "</s>"]:
            raise ValueError(f"its first tokens are not T5's <pad> and </s>, but {first[0]!r} and {first[1]!r}")

    @classmethod
    def open(cls, path: str | Path) -> T5Tokenizer:
        """From a `tokenizer.json` or a `spiece.model`, told apart by what is in it. ValueError for any other file."""
        data = read_bytes(path, MAX_FILE)
        try:
            return cls.from_json(decode_text("it", data)) if data.lstrip()[:1] == b"{" else cls(_read_sentencepiece(data))
        except ValueError as error:
            raise ValueError(f"{path} is no tokenizer of T5, spiece.model or tokenizer.json: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> T5Tokenizer:
        """From the text of a `tokenizer.json`."""
        check_type("a tokenizer.json", text, str)
        return cls(parse(text))

    @classmethod
    def of_letters(cls) -> T5Tokenizer:
        """One that spells: the printable characters of ASCII, for models too small to know words."""
        letters = ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
        return cls(_describe([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in letters)]))

    def with_words(self, words: Iterable[AddedToken]) -> T5Tokenizer:
        """A tokenizer that has these words too, each as one token. ValueError unless the ids of those that are new follow its own."""
        added = [word for word in words if word.content not in self.tokens]
        if not added:
            return self
        content = json.loads(self._json)
        content["added_tokens"] += map(asdict, added)
        longer = T5Tokenizer(content)
        for word in added:
            if (number := longer.tokens[word.content]) != word.id:
                raise ValueError(f"its word {brief(word.content)} has the id {word.id}, where {number} comes next")
        return longer

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Every token's id."""
        return dict(self._backend.get_vocab())

    def describe(self) -> str:
        """In plain values, for files: see `to_json`."""
        return self._json

    def to_json(self) -> str:
        """The text of a `tokenizer.json`: the one it is made of, for the library rounds scores when it reads and writes them."""
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


def _describe(pieces: Sequence[tuple[str, float]], charsmap: bytes = b"") -> dict[str, Any]:
    """The tokenizer.json that transformers makes of pieces: the marks of T5's training behind them, words split at blanks of any kind."""
    marks = [f"<extra_id_{i}>" for i in reversed(range(EXTRA))]
    known = {piece for piece, _ in pieces}
    vocab = [*pieces, *((mark, 0.0) for mark in marks if mark not in known)]
    special = {"<pad>", "</s>", "<unk>", *marks}
    added = [AddedToken(i, name, normalized=False, special=True) for i, (name, _) in enumerate(vocab) if name in special]
    words = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    table = base64.b64encode(charsmap).decode()
    return {
        "added_tokens": list(map(asdict, added)),
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": table} if charsmap else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, words]},
        "model": {"type": "Unigram", "unk_id": UNK, "vocab": vocab, "byte_fallback": False},
    }


# ---- sentencepiece's file: a protocol buffer, of which these fields matter (sentencepiece_model.proto)

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # of the model
PIECE, SCORE, KIND = 1, 2, 3  # of a piece
MODEL_KIND, UNK_ID = 3, 40  # of the trainer: 1 is a unigram model
CHARSMAP, PREFIX, JOINED = 2, 3, 4  # of the normaliser: its table; "▁" before the text; blanks joined


def _read_sentencepiece(data: bytes) -> dict[str, Any]:
    """The tokenizer.json of a spiece.model. ValueError for what is not a model like T5's."""
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
    return _describe([(name, score) for name, score, _ in pieces], charsmap)


def _piece(data: int | bytes) -> tuple[str, float, int | bytes]:
    """The text of a piece, its score (a log-probability) and its kind."""
    fields = dict(_fields(data))
    name, score = fields.get(PIECE), fields.get(SCORE, bytes(4))
    if not isinstance(name, bytes) or not isinstance(score, bytes) or len(score) != 4:
        raise ValueError("a piece has no name or no score")
    return name.decode(), struct.unpack("<f", score)[0], fields.get(KIND, NORMAL)


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


# ---- beside weights


def is_t5(path: Path) -> bool:
    """Whether a tokenizer's file or folder is T5's kind, as far as can be seen at once: pieces with scores, and not byte pairs."""
    file = path / WHOLE if path.is_dir() else path
    if not file.is_file():
        return (path / SPIECE).is_file()
    return file.suffix != ".json" or model_of(file).get("type") != "BPE"


def find_t5_tokenizer(part: Part, given: Sequence[Path], notes: list[str]) -> T5Tokenizer | None:
    """The tokenizer of a T5: the last of the given paths, or one beside the weights; None without one.

    ValueError for one that was given and is none of T5's; one that merely lies beside the weights is then left alone, and noted.
    """
    for file in _t5_files(reversed(given)):
        return open_t5_tokenizer(file)
    for file in _t5_files(dict.fromkeys(folders_beside(part))):
        try:
            if is_t5(file):
                return open_t5_tokenizer(file)
        except ValueError as error:
            notes.append(f"left alone: {error}")
    return None


def _t5_files(places: Iterable[Path]) -> Iterator[Path]:
    """The files of T5's tokenizers among these paths, or within those that are folders."""
    for place in places:
        yield from (file for file in ([place / WHOLE, place / SPIECE] if place.is_dir() else [place]) if file.is_file())


def open_t5_tokenizer(file: Path) -> T5Tokenizer:
    """T5's tokenizer in a file, with the words that configurations beside it add: a spiece.model has no place for any."""
    tokenizer, folder = T5Tokenizer.open(file), file.parent
    try:
        config = read_object(folder / CONFIG)
        if config.get("tokenizer_class") not in (None, *CLASSES):
            return tokenizer  # a configuration of another tokenizer
        _, more = special_tokens(folder, config, {})
        return tokenizer.with_words(added_tokens(folder, config, [], more, tokenizer.tokens))
    except ValueError as error:
        raise ValueError(f"{folder}: the words beside {file.name} cannot be used: {error}") from None
