"""Crafted tokenizer.json files, some of which end the process once the library has them: each is one line before that."""

from __future__ import annotations

import json
from typing import Any

import pytest

from models import T5Tokenizer

HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "multiplies": ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 99}}, "only join blanks"),
    "within a sequence": ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "a"}]}}, "'Prepend'"),
    "a pattern": ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a+)+$"}}}, "'Split'"),
    "a table": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////fw=="}}, "damaged"),
    "a long piece": ({"model": {"type": "Unigram", "vocab": [["a" * 10**6, 0.0]]}}, "1,000,000 characters"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_crafted_files_are_refused_in_one_line(kind: str) -> None:
    """By the kinds and parameters of their steps."""
    changes, message = HOSTILE[kind]
    with pytest.raises(ValueError, match=message) as caught:
        T5Tokenizer.from_json(json.dumps({**json.loads(T5Tokenizer.of_letters().to_json()), **changes}))
    assert "\n" not in str(caught.value)
