"""`tokenizer.json`, the file of the package tokenizers, checked before that package sees it.

It describes a small machine: steps that normalise and split the text, with patterns and replacements of the file's choice. Some of these
multiply the text until memory ends, which no error handling survives, so only steps are let through that T5's published files consist of.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.spec import check_type

LARGEST_FILE = 2**26  # bytes; T5's has 2.4 million
MOST_TOKENS, LONGEST_TOKEN = 1_000_000, 200  # published T5s have 32,100, of up to 16 characters
MOST_ADDED = 10_000
MOST_STEPS = 8  # in a sequence
LONGEST_REPLACEMENT = 100  # bytes that stand for one character in the table of a normaliser; 33 in T5's
REPLACED = (({"Regex": " {2,}"}, "▁"), ({"Regex": " {2,}"}, " "), ({"String": " "}, "▁"))  # blanks, the only pattern in these files


def read_text(path: Path) -> str:
    """A file's text. ValueError for one that is too large to be a tokenizer's, or is no text."""
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ValueError(f"{path.name} has {size:,} bytes, and no known tokenizer's has over {LARGEST_FILE:,}")
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is no text: {error}") from None


def parse(text: str) -> dict[str, Any]:
    """Its content, which describes some model. ValueError where it does not, or is damaged."""
    try:
        content = json.loads(text)
        content["model"].keys()
    except (AttributeError, KeyError, TypeError, RecursionError, ValueError) as error:
        raise ValueError(f"it describes no model ({type(error).__name__}: {error})") from None
    return dict(content)


def check_unigram(content: Mapping[str, Any]) -> None:
    """ValueError unless a tokenizer.json describes a unigram model with steps that T5's have."""
    model = content["model"]
    if (kind := model.get("type")) != "Unigram":
        raise ValueError(f"it holds the model {kind!r:.80}, where T5's is 'Unigram'")
    check_pieces(model.get("vocab"))
    for slot, known in STEPS.items():
        _check_steps(slot, content.get(slot), known)
    _check_added(content.get("added_tokens") or [])


def check_pieces(pieces: Any) -> None:
    """ValueError unless these are pieces with their scores: [["a", -1.0], ...]."""
    if not isinstance(pieces, list):
        raise ValueError(f"it is damaged: {pieces!r:.80} is not a list of pieces")
    if len(pieces) > MOST_TOKENS:
        raise ValueError(f"it has {len(pieces):,} pieces: known ones have up to {MOST_TOKENS:,}")
    for piece in pieces:
        if not isinstance(piece, (list, tuple)) or len(piece) != 2 or not isinstance(piece[0], str):
            raise ValueError(f"it is damaged: {piece!r:.80} is not a piece with its score")
        if not 0 < len(piece[0]) <= LONGEST_TOKEN:
            raise ValueError(f"it has a piece of {len(piece[0]):,} characters: known ones have 1 to {LONGEST_TOKEN}")
        if isinstance(piece[1], bool) or not isinstance(piece[1], (int, float)) or not abs(piece[1]) < 1e30:
            raise ValueError(f"it is damaged: the piece {piece[0]!r:.80} has the score {piece[1]!r:.80}")


def check_charsmap(table: bytes) -> None:
    """ValueError unless this is the table of a normaliser: a tree of characters to be replaced, and the texts that replace them.

    The tree is an array of 32-bit units (darts-clone): a child lies at its parent's place XOR an offset XOR the child's byte.
    """
    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 or size % 4 or not 0 < size <= len(table) - 4:
        raise ValueError("the table of its normaliser is damaged")
    units, texts = np.frombuffer(table[4 : 4 + size], dtype="<u4").astype(np.int64), table[4 + size :]
    if (longest := max(map(len, texts.split(b"\0")), default=0)) > LONGEST_REPLACEMENT:
        raise ValueError(f"its normaliser replaces characters by up to {longest:,} bytes: known ones by up to {LONGEST_REPLACEMENT}")
    values = _values(units)
    starts = np.frombuffer(b"\0" + texts, dtype=np.uint8)[: len(texts) + 1]
    if values.size and (values.max() >= len(texts) or (starts[values] != 0).any()):
        raise ValueError("the table of its normaliser is damaged: it points into a text, or behind the last")
    try:
        texts.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the table of its normaliser is damaged: {error}") from None


def _values(units: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Where the replacements begin, of all characters in the tree. ValueError where it leads out of the array."""
    labels, place, found = np.arange(1, 256), _offset(units[:1]), []
    unseen = np.ones(units.size, dtype=bool)
    while place.size:
        if (place | 255).max() >= units.size:
            raise ValueError("the table of its normaliser is damaged: its tree leaves it")
        place = np.unique(place[unseen[place]])  # equal ends are shared
        unseen[place] = False
        below = place[:, None] ^ labels
        parent, label = np.nonzero((units[below] & 0x800000FF) == labels)
        child = below[parent, label]
        place = child ^ _offset(units[child])
        ends = place[(units[child] >> 8) & 1 == 1]
        if place.size and place.max() >= units.size:
            raise ValueError("the table of its normaliser is damaged: its tree leaves it")
        found.append(units[ends] & 0x7FFFFFFF)
    return np.concatenate([np.empty(0, dtype=np.int64), *found])


def _offset(units: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return (units >> 10) << ((units & 512) >> 6)


def _check_steps(slot: str, step: Any, known: Mapping[str, Callable[[Mapping[str, Any]], None]]) -> None:
    """ValueError unless a step is one of the known, or a sequence of these."""
    if step is None:
        return
    check_type(f"its {slot}", step, dict)
    if step.get("type") == "Sequence":
        members = next((value for value in step.values() if isinstance(value, list)), [])
        if len(members) > MOST_STEPS:
            raise ValueError(f"its {slot} has {len(members):,} steps: known ones have up to {MOST_STEPS}")
    else:
        members = [step]
    for member in members:
        check_type(f"a step of its {slot}", member, dict)
        if (kind := member.get("type")) not in known:
            raise ValueError(f"its {slot} has a step {kind!r:.80}: T5's have {', '.join(known)}")
        known[kind](member)


def _check_nothing(step: Mapping[str, Any]) -> None:
    """A step that can do no harm, whatever it says."""


def _check_replace(step: Mapping[str, Any]) -> None:
    if (step.get("pattern"), step.get("content")) not in REPLACED:
        raise ValueError(f"its normalizer replaces {step.get('pattern')!r:.80} by {step.get('content')!r:.80}: T5's only join blanks")


def _check_precompiled(step: Mapping[str, Any]) -> None:
    table = step.get("precompiled_charsmap")
    check_type("precompiled_charsmap of its normalizer", table, str)
    try:
        check_charsmap(base64.b64decode(str(table), validate=True))
    except ValueError as error:
        raise ValueError(f"precompiled_charsmap of its normalizer: {error}") from None


def _check_metaspace(step: Mapping[str, Any]) -> None:
    for name in ("replacement", "str_rep"):
        if name in step and step[name] != "▁":
            raise ValueError(f"it writes blanks as {step[name]!r:.80}, where T5's writes '▁'")


def _check_template(step: Mapping[str, Any]) -> None:
    if any(isinstance(step.get(part), list) and len(step[part]) > MOST_STEPS for part in ("single", "pair")):
        raise ValueError("its post_processor is longer than any known one")


STEPS: dict[str, dict[str, Callable[[Mapping[str, Any]], None]]] = {
    "normalizer": {"Precompiled": _check_precompiled, "Replace": _check_replace}
    | dict.fromkeys(("Strip", "NFC", "NFKC", "Nmt", "Lowercase"), _check_nothing),
    "pre_tokenizer": {"Metaspace": _check_metaspace, "WhitespaceSplit": _check_nothing},
    "post_processor": {"TemplateProcessing": _check_template},
    "decoder": {"Metaspace": _check_metaspace},
}


def _check_added(tokens: Any) -> None:
    check_type("its list of added tokens", tokens, list)
    if len(tokens) > MOST_ADDED:
        raise ValueError(f"it has {len(tokens):,} added tokens: known ones have up to {MOST_ADDED:,}")
    for token in tokens:
        check_type("an added token", token, dict)
        content, number = token.get("content"), token.get("id")
        sound = isinstance(content, str) and 0 < len(content) <= LONGEST_TOKEN and type(number) is int and 0 <= number < MOST_TOKENS
        if not sound:
            raise ValueError(f"its added token {content!r:.80} has the id {number!r:.80}, and one of these cannot be")
