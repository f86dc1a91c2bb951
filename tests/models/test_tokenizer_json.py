"""Crafted tokenizer.json files, some of which end the process once the library has them: each is one line
before that."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from models import T5Tokenizer
from models.text.t5_tokenizer import EOS
from models.text.vocabulary import call_library

HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "multiplies": (
        {"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}},
        "replaces spaces only",
    ),
    "within a sequence": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a"}]}},
        "'Prepend'",
    ),
    "a pattern": ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}}, "'Split'"),
    "a table": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////fw=="}}, "damaged"),
    "a decoy before the members": (
        {
            "normalizer": {
                "type": "Sequence",
                "x": [],
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}],
            }
        },
        "no setting of its normalizer named 'x'",
    ),
    "members of another slot": (
        {"pre_tokenizer": {"type": "Sequence", "normalizers": [], "pretokenizers": [{"type": "ByteLevel"}]}},
        "no setting of its pre_tokenizer named 'normalizers'",
    ),
    "no members": ({"normalizer": {"type": "Sequence"}}, "must be list"),
    "a sequence within": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": []}]}},
        "'Sequence'",
    ),
    "tables upon tables": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Precompiled"}] * 2}},
        "2 steps 'Precompiled'",
    ),
    "a setting more": (
        {"normalizer": {"type": "NFC", "content": "a" * 99}},
        "no setting of NFC in its normalizer named 'content'",
    ),
    "no kind": ({"normalizer": {"type": ["NFC"]}}, r"a step \['NFC'\]"),
    "an added token far away": ({"added_tokens": [{"id": 10**12, "content": "a"}]}, "ids are 0 to 999,999"),
    "an added token without a name": (
        {"added_tokens": [{"id": 1, "content": ""}]},
        "an added token of 0 characters",
    ),
    "an added token with a setting more": (
        {"added_tokens": [{"id": 1, "content": "a", "x": 1}]},
        "no added token parameter named 'x'",
    ),
    "a long piece": ({"model": {"type": "Unigram", "vocab": [["a" * 10**6, 0.0]]}}, "1,000,000 characters"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_crafted_files_are_refused_in_one_line(kind: str) -> None:
    """By the kinds and parameters of their steps."""
    changes, message = HOSTILE[kind]
    with pytest.raises(ValueError, match=message) as caught:
        T5Tokenizer.from_json(json.dumps({**json.loads(T5Tokenizer.of_ascii().to_json()), **changes}))
    assert "\n" not in str(caught.value)


def test_what_follows_the_tokens_is_not_the_files() -> None:
    """Neither a post_processor with a token that is not there, at which the library panics, nor a decoder,
    truncation and padding."""
    text = T5Tokenizer.of_ascii().to_json()
    odd = {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}],
            "special_tokens": {},
        },
        "decoder": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10**6},
        "truncation": {"max_length": 1, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {
            "strategy": {"Fixed": 10**12},
            "direction": "Right",
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    }
    tokenizer = T5Tokenizer.from_json(json.dumps({**json.loads(text), **odd}))
    assert tokenizer.to_json() == text
    assert tokenizer.detokenize(tokenizer.tokenize("a cat")) == "a cat"
    assert Tokenizer.from_str(text).encode("a cat").ids == [*tokenizer.tokenize("a cat"), EOS]


def test_only_failures_of_the_library_are_damage() -> None:
    """What stops the program, as a signal's handler does, goes through."""

    class Stop(BaseException):
        pass

    def fail(error: BaseException) -> None:
        raise error

    for error in (Stop(), KeyboardInterrupt(), MemoryError()):
        with pytest.raises(type(error)):
            call_library(fail, error)
    failures: tuple[BaseException, ...] = (
        TypeError("two\nlines"),
        type("PanicException", (BaseException,), {})("two\nlines"),
    )
    for failure in failures:
        with pytest.raises(ValueError, match=r"damaged \(two lines\)"):
            call_library(fail, failure)
