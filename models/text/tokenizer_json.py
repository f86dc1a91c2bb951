"""`tokenizer.json`, the file of the package tokenizers, checked before that package sees it.

It describes a small machine: steps that normalise and split the text, with patterns and replacements of the file's choice. Some of these
multiply the text until memory ends, which no error handling survives. So only the steps and settings that T5's published files consist of
reach the package.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.messages import brief
from diffusion.spec import check_mapping, check_names, check_type, make_params
from models.files.text import parse_json, read_text
from models.text.vocabulary import MAX_FILE, MAX_TOKEN_LENGTH, MAX_TOKENS, AddedToken

MAX_ADDED = 10_000  # added tokens; T5 has 100
MAX_STEPS = 8  # of a sequence of normalizers or pre-tokenizers
MAX_REPLACEMENT = 100  # bytes that a normaliser replaces one character by; T5's has up to 33

MODEL = ("type", "unk_id", "vocab", "byte_fallback")
# Kinds of steps, and their settings.
NORMALIZERS = {
    "Precompiled": ("precompiled_charsmap",),
    "Replace": ("pattern", "content"),
    "Strip": ("strip_left", "strip_right"),
    **dict.fromkeys(("NFC", "NFKC", "Nmt", "Lowercase"), ()),
}
PRE_TOKENIZERS = {
    "Metaspace": ("replacement", "str_rep", "add_prefix_space", "prepend_scheme", "split"),  # the second and third of older versions
    "WhitespaceSplit": (),
}
BLANKS = (({"Regex": " {2,}"}, "▁"), ({"Regex": " {2,}"}, " "), ({"String": " "}, "▁"))  # what the normalizer replaces, and by what

TEXT, END = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "</s>", "type_id": 0}}
END_OF_TEXT = {
    "type": "TemplateProcessing",
    "single": [TEXT, END],
    "pair": [TEXT, END, {"Sequence": {"id": "B", "type_id": 0}}, END],
    "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
}


def parse(text: str) -> dict[str, Any]:
    """The content of the file. ValueError if it is damaged or describes no model."""
    try:
        content = parse_json(text)
        content["model"].keys()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it describes no model ({type(error).__name__}: {error})") from None
    return dict(content)


def model_of(file: Path) -> dict[str, Any]:
    """What a tokenizer.json says of its model, {} where it is damaged or describes none."""
    try:
        return dict(parse(read_text(file, MAX_FILE))["model"])
    except ValueError:
        return {}


def checked_unigram(content: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json made of what was checked alone: a unigram model, with steps that T5's have. ValueError for another.

    What is done with tokens after that is T5's: truncation, padding, post_processor and decoder of the file are left out.
    """
    model = content["model"]
    if (kind := model.get("type")) != "Unigram":
        raise ValueError(f"it holds the model {brief(kind)}, where T5's is 'Unigram'")
    check_names("setting of its model", model, MODEL)
    _check_pieces(model.get("vocab"))
    added = content.get("added_tokens") or []
    check_type("its list of added tokens", added, list)
    if len(added) > MAX_ADDED:
        raise ValueError(f"it has {len(added):,} added tokens: known ones have up to {MAX_ADDED:,}")
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
        raise ValueError(f"it has {len(pieces):,} pieces: known ones have up to {MAX_TOKENS:,}")
    for piece in pieces:
        if not isinstance(piece, (list, tuple)) or len(piece) != 2 or not isinstance(piece[0], str):
            raise ValueError(f"it is damaged: {brief(piece)} is not a piece with its score")
        if not 0 < len(piece[0]) <= MAX_TOKEN_LENGTH:
            raise ValueError(f"it has a piece of {len(piece[0]):,} characters: known ones have 1 to {MAX_TOKEN_LENGTH}")
        if isinstance(piece[1], bool) or not isinstance(piece[1], (int, float)) or not abs(piece[1]) < 1e30:
            raise ValueError(f"it is damaged: the piece {brief(piece[0])} has the score {brief(piece[1])}")


def _check_steps(slot: str, members: str, known: Mapping[str, Sequence[str]], step: Any) -> None:
    """ValueError unless a step is of a known kind with known settings, or a sequence of such steps in its entry `members`."""
    if step is None:
        return
    steps = [step]
    if check_mapping(f"its {slot}", step).get("type") == "Sequence":
        check_names(f"setting of its {slot}", step, ["type", members])
        check_type(f"{members} of its {slot}", step.get(members), list)
        steps = step[members]
    if len(steps) > MAX_STEPS:
        raise ValueError(f"its {slot} has {len(steps):,} steps: known ones have up to {MAX_STEPS}")
    kinds = [check_mapping(f"a step of its {slot}", each).get("type") for each in steps]
    if kinds.count("Precompiled") > 1:  # their replacements would multiply
        raise ValueError(f"its {slot} has {kinds.count('Precompiled')} steps 'Precompiled': known ones have one")
    for kind, each in zip(kinds, steps, strict=True):
        if not isinstance(kind, str) or kind not in known:
            raise ValueError(f"its {slot} has a step {brief(kind)}: T5's have {', '.join(known)}")
        check_names(f"setting of {kind} in its {slot}", each, ["type", *known[kind]])
        if kind == "Replace" and (each.get("pattern"), each.get("content")) not in BLANKS:
            raise ValueError(f"its {slot} replaces {brief(each.get('pattern'))} by {brief(each.get('content'))}: T5's only join blanks")
        if kind == "Metaspace" and (wrong := [each[name] for name in ("replacement", "str_rep") if each.get(name, "▁") != "▁"]):
            raise ValueError(f"it writes blanks as {brief(wrong[0])}, where T5's writes '▁'")
        if kind == "Precompiled":
            _check_charsmap(each.get("precompiled_charsmap"))


def _check_charsmap(text: Any) -> None:
    """ValueError unless this is the table of a normaliser in base64: a tree of characters to be replaced, and the texts that replace them.

    The tree is an array of 32-bit units (darts-clone): a child lies at its parent's place XOR an offset XOR the child's byte.
    """
    check_type("the table of its normaliser", text, str)
    try:
        table = base64.b64decode(text, validate=True)
        size = int.from_bytes(table[:4], "little")
        if len(table) < 4 or size % 4 or not 0 < size <= len(table) - 4:
            raise ValueError(f"its tree cannot have {size:,} bytes")
        units, texts = np.frombuffer(table[4 : 4 + size], dtype="<u4").astype(np.int64), table[4 + size :]
        if (longest := max(map(len, texts.split(b"\0")), default=0)) > MAX_REPLACEMENT:
            raise ValueError(f"it replaces characters by up to {longest:,} bytes, and known ones by up to {MAX_REPLACEMENT}")
        values = _values(units)
        starts = np.frombuffer(b"\0" + texts, dtype=np.uint8)[: len(texts) + 1]
        if values.size and (values.max() >= len(texts) or (starts[values] != 0).any()):
            raise ValueError("it points into a text, or behind the last")
        texts.decode()
    except ValueError as error:
        raise ValueError(f"the table of its normaliser is damaged: {error}") from None


def _values(units: np.ndarray[Any, np.dtype[np.int64]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The offsets of the replacements of all characters in the tree. ValueError if the tree leads out of the array."""
    labels, place, found = np.arange(1, 256), _offset(units[:1]), []
    unseen = np.ones(units.size, dtype=bool)
    while place.size:
        if (place | 255).max() >= units.size:
            raise ValueError("its tree leaves it")
        place = np.unique(place[unseen[place]])  # equal ends are shared
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
