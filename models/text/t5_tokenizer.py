"""T5's tokenizer: the most likely segmentation under a unigram model (Kudo 2018), from published files.

Text is normalised (nmt_nfkc: compatibility forms replaced, control characters dropped) and split at spaces,
and each word begins with "▁". Unknown characters become <unk>.
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

import numpy as np

from diffusion.messages import brief
from diffusion.spec import check_mapping, check_names, check_type, make_params
from models.files.text import decode_text, read_bytes
from models.text.vocabulary import (
    CONFIG,
    MAX_FILE,
    MAX_TOKEN_LENGTH,
    MAX_TOKENS,
    SPIECE,
    TRIAL,
    WHOLE,
    AddedToken,
    added_tokens,
    call_library,
    folders_beside,
    parse_tokenizer_json,
    read_model_entry,
    read_object,
    special_tokens,
    tokenizers_library,
)

if TYPE_CHECKING:
    from models.files.table import Part

PAD, EOS, UNK = 0, 1, 2
EXTRA = 100  # <extra_id_99> ... <extra_id_0> behind the pieces of spiece.model, from T5's training
NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # kinds of pieces
CLASSES = ("T5Tokenizer", "T5TokenizerFast")  # of transformers
MAX_ADDED = 10_000  # added tokens; T5 has 100
MAX_STEPS = 8  # in a sequence of normalizers or pre-tokenizers
MAX_REPLACEMENT = 100  # bytes that a normaliser replaces one character with; T5's has up to 33

MODEL = ("type", "unk_id", "vocab", "byte_fallback")
# Steps and their settings.
NORMALIZERS = {
    "Precompiled": ("precompiled_charsmap",),
    "Replace": ("pattern", "content"),
    "Strip": ("strip_left", "strip_right"),
    **dict.fromkeys(("NFC", "NFKC", "Nmt", "Lowercase"), ()),
}
PRE_TOKENIZERS = {
    # str_rep and add_prefix_space are of older versions.
    "Metaspace": ("replacement", "str_rep", "add_prefix_space", "prepend_scheme", "split"),
    "WhitespaceSplit": (),
}
# What the normalizer may replace.
REPLACEMENTS = (({"Regex": " {2,}"}, "▁"), ({"Regex": " {2,}"}, " "), ({"String": " "}, "▁"))

TEXT, END = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}
END_OF_TEXT = {
    "type": "TemplateProcessing",
    "single": [TEXT, END],
    "pair": [TEXT, END, {"Sequence": {"id": "B", "type_id": 0}}, END],
    "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
}


class T5Tokenizer:
    """Encodes texts with the content of a tokenizer.json. ValueError if that is not T5's."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._json = json.dumps(checked_unigram(content), ensure_ascii=False)
        self._backend = call_library(tokenizers_library().Tokenizer.from_str, self._json)
        call_library(self._backend.encode, TRIAL)
        pad, eos = (self._backend.id_to_token(i) for i in (PAD, EOS))
        if (pad, eos) != ("<pad>", "</s>"):
            raise ValueError(f"its first tokens must be T5's <pad> and </s>, not {pad!r} and {eos!r}")

    @classmethod
    def open(cls, path: str | Path) -> T5Tokenizer:
        """From a `tokenizer.json` or `spiece.model`, recognised by content. ValueError for other files."""
        data = read_bytes(path, MAX_FILE)
        try:
            if data.lstrip()[:1] == b"{":
                return cls.from_json(decode_text("it", data))
            return cls(_read_sentencepiece(data))
        except ValueError as error:
            raise ValueError(f"{path} is not a spiece.model or tokenizer.json of T5: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> T5Tokenizer:
        """From the text of a `tokenizer.json`."""
        check_type("a tokenizer.json", text, str)
        return cls(parse_tokenizer_json(text))

    @classmethod
    def of_ascii(cls) -> T5Tokenizer:
        """A tokenizer of the printable ASCII characters, for miniatures."""
        letters = ["▁", *map(chr, range(ord("!"), ord("~") + 1))]
        special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
        return cls(_describe([*special, *((letter, -1.0) for letter in letters)]))

    def add_tokens(self, words: Iterable[AddedToken]) -> T5Tokenizer:
        """A tokenizer with these words as additional tokens. ValueError unless their ids follow its own."""
        added = [word for word in words if word.content not in self.tokens]
        if not added:
            return self
        content = json.loads(self._json)
        content["added_tokens"] += map(asdict, added)
        longer = T5Tokenizer(content)
        for word in added:
            if (number := longer.tokens[word.content]) != word.id:
                raise ValueError(f"its word {brief(word.content)} must have the id {number}, not {word.id}")
        return longer

    @cached_property
    def tokens(self) -> dict[str, int]:
        """The id of every token."""
        return dict(self._backend.get_vocab())

    def describe(self) -> str:
        """In plain values, for files: see `to_json`."""
        return self._json

    def to_json(self) -> str:
        """The text of a `tokenizer.json`, with the original scores: the library would round them."""
        return self._json

    @property
    def size(self) -> int:
        """One more than the greatest id."""
        return int(self._backend.get_vocab_size())

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without EOS and padding. Special tokens in the text ("</s>") are parsed."""
        return [token for token, _ in self.tokenize_with_ends(text)]

    def tokenize_with_ends(self, text: str) -> list[tuple[int, int]]:
        """Token ids, each with the position of its end in the text."""
        if not isinstance(text, str):
            raise ValueError(f"a prompt is a text, not {text!r}")
        encoding = call_library(self._backend.encode, text, add_special_tokens=False)
        return [(token, end) for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True)]

    def detokenize(self, ids: Sequence[int]) -> str:
        """The normalised text of token ids. ValueError for an id outside the vocabulary."""
        for token in ids:
            if not 0 <= token < self.size:
                raise ValueError(f"{token} is not a token: ids are 0 to {self.size - 1}")
        return str(call_library(self._backend.decode, list(ids), skip_special_tokens=False))


def _describe(pieces: Sequence[tuple[str, float]], charsmap: bytes = b"") -> dict[str, Any]:
    """The tokenizer.json that transformers makes of pieces: with extra ids, and split at white space."""
    marks = [f"<extra_id_{i}>" for i in reversed(range(EXTRA))]
    known = {piece for piece, _ in pieces}
    vocab = [*pieces, *((mark, 0.0) for mark in marks if mark not in known)]
    special = {"<pad>", "</s>", "<unk>", *marks}
    numbers = {name: i for i, (name, _) in enumerate(vocab) if name in special}
    added = [AddedToken(i, name, normalized=False, special=True) for name, i in numbers.items()]
    words = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    table = base64.b64encode(charsmap).decode()
    return {
        "added_tokens": list(map(asdict, added)),
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": table} if charsmap else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, words]},
        "model": {"type": "Unigram", "unk_id": UNK, "vocab": vocab, "byte_fallback": False},
    }


# sentencepiece's file: a protocol buffer (sentencepiece_model.proto). We need these fields ------------------

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # of the model
PIECE, SCORE, KIND = 1, 2, 3  # of a piece
MODEL_KIND, UNK_ID = 3, 40  # of the trainer: 1 is a unigram model
CHARSMAP, PREFIX, JOINED = 2, 3, 4  # of the normaliser: its table; "▁" before the text; spaces merged


def _read_sentencepiece(data: bytes) -> dict[str, Any]:
    """The tokenizer.json of a spiece.model. ValueError for a model unlike T5's."""
    fields = list(islice(_fields(data), MAX_TOKENS))
    pieces = [_piece(value) for number, value in fields if number == PIECES]
    trainer, normalizer = (
        {inner: content for number, value in fields if number == which for inner, content in _fields(value)}
        for which in (TRAINER, NORMALIZER)
    )
    if not pieces:
        raise ValueError("it holds no pieces")
    other_kinds = {kind for *_, kind in pieces} - {NORMAL, UNKNOWN, CONTROL}
    if trainer.get(MODEL_KIND, 1) != 1 or trainer.get(UNK_ID, 0) != UNK or other_kinds:
        raise ValueError("this sentencepiece model is not a unigram model with <unk> as token 2, as T5's is")
    if not normalizer.get(PREFIX, 1) or not normalizer.get(JOINED, 1):
        raise ValueError("it keeps spaces as they are, but T5's merges them and adds one before the text")
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
    """Number and value of every field of a message: integers, and everything else as bytes."""
    if not isinstance(data, bytes):
        raise ValueError("it has a number in place of a message")
    start = 0
    while start < len(data):
        key, start = _varint(data, start)
        number, wire = divmod(key, 8)
        if wire == 0:
            value, start = _varint(data, start)
            yield number, value
            continue
        if wire not in (1, 2, 5):
            raise ValueError("it is neither JSON nor a sentencepiece model")
        size, start = _varint(data, start) if wire == 2 else ({1: 8, 5: 4}[wire], start)
        if start + size > len(data):
            raise ValueError("it is truncated, or neither JSON nor a sentencepiece model")
        yield number, data[start : start + size]
        start += size


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """An integer of seven bits per byte, lowest first, and its end."""
    value = 0
    for shift in range(0, 70, 7):
        if start >= len(data):
            raise ValueError("it is truncated, or neither JSON nor a sentencepiece model")
        value |= (data[start] & 127) << shift
        start += 1
        if data[start - 1] < 128:
            return value, start
    raise ValueError("it is neither JSON nor a sentencepiece model")


# tokenizer.json, checked before the package tokenizers reads it ---------------------------------------------
#
# Its steps normalise and split texts by patterns and replacements of the file's choice. Some of them multiply
# the text until memory ends, which no error handling survives. So only the steps and settings of T5's
# published files are accepted.


def checked_unigram(content: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json of checked entries only: a unigram model with steps of T5's. ValueError for another.

    Truncation, padding, post_processor and decoder of the file are replaced by T5's.
    """
    model = content["model"]
    if (kind := model.get("type")) != "Unigram":
        raise ValueError(f"its model must be 'Unigram', as T5's is, not {brief(kind)}")
    check_names("setting of its model", model, MODEL)
    _check_pieces(model.get("vocab"))
    added = content.get("added_tokens") or []
    check_type("its list of added tokens", added, list)
    if len(added) > MAX_ADDED:
        raise ValueError(f"it has {len(added):,} added tokens: at most {MAX_ADDED:,} are allowed")
    _check_steps("normalizer", "normalizers", NORMALIZERS, content.get("normalizer"))
    _check_steps("pre_tokenizer", "pretokenizers", PRE_TOKENIZERS, content.get("pre_tokenizer"))
    return {
        "version": "1.0",
        "added_tokens": [asdict(make_params("added token", AddedToken, token)) for token in added],
        "normalizer": content.get("normalizer"),
        "pre_tokenizer": content.get("pre_tokenizer"),
        "post_processor": END_OF_TEXT,
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": model,
    }


def _check_pieces(pieces: Any) -> None:
    """ValueError unless these are pieces with their scores: [["a", -1.0], ...]."""
    if not isinstance(pieces, list):
        raise ValueError(f"it is damaged: {brief(pieces)} is not a list of pieces")
    if len(pieces) > MAX_TOKENS:
        raise ValueError(f"it has {len(pieces):,} pieces: at most {MAX_TOKENS:,} are allowed")
    for piece in pieces:
        if not isinstance(piece, (list, tuple)) or len(piece) != 2 or not isinstance(piece[0], str):
            raise ValueError(f"it is damaged: {brief(piece)} is not a piece with its score")
        if not 0 < (length := len(piece[0])) <= MAX_TOKEN_LENGTH:
            raise ValueError(f"it has a piece of {length:,} characters: 1 to {MAX_TOKEN_LENGTH} are allowed")
        if isinstance(piece[1], bool) or not isinstance(piece[1], (int, float)) or not abs(piece[1]) < 1e30:
            raise ValueError(f"it is damaged: the piece {brief(piece[0])} has the score {brief(piece[1])}")


def _check_steps(slot: str, members: str, known: Mapping[str, Sequence[str]], step: Any) -> None:
    """ValueError unless a step, or each step in `members` of a sequence, has a known kind and settings."""
    if step is None:
        return
    steps = [step]
    if check_mapping(f"its {slot}", step).get("type") == "Sequence":
        check_names(f"setting of its {slot}", step, ["type", members])
        check_type(f"{members} of its {slot}", step.get(members), list)
        steps = step[members]
    if len(steps) > MAX_STEPS:
        raise ValueError(f"its {slot} has {len(steps):,} steps: at most {MAX_STEPS} are allowed")
    kinds = [check_mapping(f"a step of its {slot}", each).get("type") for each in steps]
    if (count := kinds.count("Precompiled")) > 1:  # their replacements would multiply
        raise ValueError(f"its {slot} has {count} steps 'Precompiled': one is allowed")
    for kind, each in zip(kinds, steps, strict=True):
        if not isinstance(kind, str) or kind not in known:
            raise ValueError(f"its {slot} has a step {brief(kind)}: T5's have {', '.join(known)}")
        check_names(f"setting of {kind} in its {slot}", each, ["type", *known[kind]])
        replaced, content = each.get("pattern"), each.get("content")
        if kind == "Replace" and (replaced, content) not in REPLACEMENTS:
            change = f"{brief(replaced)} with {brief(content)}"
            raise ValueError(f"its {slot} replaces {change}: T5's replaces spaces only")
        wrong = [each[name] for name in ("replacement", "str_rep") if each.get(name, "▁") != "▁"]
        if kind == "Metaspace" and wrong:
            raise ValueError(f"it writes spaces as {brief(wrong[0])}: T5's writes '▁'")
        if kind == "Precompiled":
            _check_charsmap(each.get("precompiled_charsmap"))


def _check_charsmap(text: Any) -> None:
    """ValueError unless this is a normaliser's table in base64: a tree of characters, and their replacements.

    The tree is an array of 32-bit units (darts-clone). A child's place is its parent's place XOR the parent's
    offset XOR the child's byte.
    """
    check_type("the table of its normaliser", text, str)
    try:
        table = base64.b64decode(text, validate=True)
        size = int.from_bytes(table[:4], "little")
        if len(table) < 4 or size % 4 or not 0 < size <= len(table) - 4:
            raise ValueError(f"its tree cannot have {size:,} bytes")
        units, texts = np.frombuffer(table[4 : 4 + size], dtype="<u4").astype(np.int64), table[4 + size :]
        if (longest := max(map(len, texts.split(b"\0")), default=0)) > MAX_REPLACEMENT:
            raise ValueError(f"it has replacements of {longest:,} bytes: {MAX_REPLACEMENT} are allowed")
        values = _values(units)
        starts = np.frombuffer(b"\0" + texts, dtype=np.uint8)[: len(texts) + 1]
        if values.size and (values.max() >= len(texts) or (starts[values] != 0).any()):
            raise ValueError("it points to the inside of a text, or beyond the last one")
        texts.decode()
    except ValueError as error:
        raise ValueError(f"the table of its normaliser is damaged: {error}") from None


def _values(units: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Offsets of all replacements in the tree. ValueError if the tree leaves the array."""
    labels, place, found = np.arange(1, 256), _offset(units[:1]), []
    unseen = np.ones(units.size, dtype=bool)
    while place.size:
        if (place | 255).max() >= units.size:
            raise ValueError("its tree leaves it")
        place = np.unique(place[unseen[place]])  # equal suffixes are shared
        unseen[place] = False
        below = place[:, None] ^ labels
        parent, label = np.nonzero((units[below] & 0x800000FF) == labels)
        child = below[parent, label]
        place = child ^ _offset(units[child])
        ends = place[(units[child] >> 8) & 1 == 1]
        if place.size and place.max() >= units.size:
            raise ValueError("its tree leaves it")
        found.append(units[ends] & 0x7FFFFFFF)
    return np.concatenate([np.empty(0, dtype=np.int64), *found])


def _offset(units: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return (units >> 10) << ((units & 512) >> 6)


# Files next to weights --------------------------------------------------------------------------------------


def is_t5(path: Path) -> bool:
    """Whether a tokenizer's file or folder seems to be of T5's kind: not byte pairs."""
    file = path / WHOLE if path.is_dir() else path
    if not file.is_file():
        return (path / SPIECE).is_file()
    return file.suffix != ".json" or read_model_entry(file).get("type") != "BPE"


def find_t5_tokenizer(part: Part, paths: Sequence[Path], notes: list[str]) -> T5Tokenizer | None:
    """The tokenizer of a T5: the last of `paths`, or one next to the weights; None without one.

    A tokenizer in `paths` that is not T5's is a ValueError; one next to the weights is ignored, with a note.
    """
    for file in _t5_files(reversed(paths)):
        return open_t5_tokenizer(file)
    for file in _t5_files(dict.fromkeys(folders_beside(part))):
        try:
            return open_t5_tokenizer(file)
        except ValueError as error:
            notes.append(f"left alone: {error}")
    return None


def _t5_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Files of tokenizers among these paths and in these folders."""
    for path in paths:
        files = [path / WHOLE, path / SPIECE] if path.is_dir() else [path]
        yield from (file for file in files if file.is_file())


def open_t5_tokenizer(file: Path) -> T5Tokenizer:
    """T5's tokenizer in a file, with the words that configurations in its folder add."""
    tokenizer, folder = T5Tokenizer.open(file), file.parent
    try:
        config = read_object(folder / CONFIG)
        if config.get("tokenizer_class") not in (None, *CLASSES):
            return tokenizer  # it is the configuration of another tokenizer
        _, more = special_tokens(folder, config, {})
        return tokenizer.add_tokens(added_tokens(folder, config, [], more, tokenizer.tokens))
    except ValueError as error:
        raise ValueError(f"{folder}: the words added to {file.name} cannot be used: {error}") from None
