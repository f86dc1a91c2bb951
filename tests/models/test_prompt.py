"""Weights in prompts: brackets, numbers, escapes and nesting, and a meaning for every string."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest

from models.text.prompt import parse_prompt

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("", []),
        ("a red cat, 8k: photo", [("a red cat, 8k: photo", 1.0)]),
        # The three forms.
        ("a (red) cat", [("a ", 1.0), ("red", UP), (" cat", 1.0)]),
        ("a [red] cat", [("a ", 1.0), ("red", DOWN), (" cat", 1.0)]),
        ("a (red:1.3) cat", [("a ", 1.0), ("red", 1.3), (" cat", 1.0)]),
        # Numbers as people write them.
        ("(a:0)", [("a", 0.0)]),
        ("(a:.5)", [("a", 0.5)]),
        ("(a:2.)", [("a", 2.0)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a:-1)", [("a", -1.0)]),
        ("(a:+1.5)", [("a", 1.5)]),
        ("(a:b:1.5)", [("a:b", 1.5)]),
        # Nesting multiplies; an inner number does not replace the outer one.
        ("((a))", [("a", UP * UP)]),
        ("[[a]]", [("a", DOWN * DOWN)]),
        ("(a (b:1.5) c:2)", [("a ", 2.0), ("b", 3.0), (" c", 2.0)]),
        ("(a [b] c:2)", [("a ", 2.0), ("b", 2.0 * DOWN), (" c", 2.0)]),
        ("([a])", [("a", 1.0)]),
        # Escapes.
        (r"a \(red\) cat", [("a (red) cat", 1.0)]),
        (r"\[a\] \\ b", [(r"[a] \ b", 1.0)]),
        (r"(a \(b\):1.5)", [("a (b)", 1.5)]),
        (r"\(a:1.5)", [("(a:1.5)", 1.0)]),
        (r"\\(a)", [("\\", 1.0), ("a", UP)]),
        (r"\o/", [(r"\o/", 1.0)]),
        # Brackets without a partner, and numbers that are none, are text.
        ("(a", [("(a", 1.0)]),
        ("a)", [("a)", 1.0)]),
        ("]a[", [("]a[", 1.0)]),
        ("a:1.5)", [("a:1.5)", 1.0)]),
        ("((a:1.5)", [("(", 1.0), ("a", 1.5)]),
        ("(a))", [("a", UP), (")", 1.0)]),
        ("(a:1.5.2)", [("a:1.5.2", UP)]),
        ("(a:x)", [("a:x", UP)]),
        ("(a:)", [("a:", UP)]),
        ("[a:1.5]", [("a:1.5", DOWN)]),
        # Each kind pairs up with its own.
        ("(a [b) c]", [("a ", UP), ("b", UP * DOWN), (" c", DOWN)]),
        ("(a]", [("(a]", 1.0)]),
        # Nothing between brackets is nothing.
        ("()", []),
        ("a(:2)b", [("ab", 1.0)]),
        # Neighbours of equal weight are one piece, within a word too.
        ("(re:1.0)d (ca:1)t", [("red cat", 1.0)]),
        ("(a)(b)", [("ab", UP)]),
    ],
)
def test_pieces_and_weights(prompt: str, pieces: list[tuple[str, float]]) -> None:
    """One prompt after the other, as the docstring says."""
    parsed = parse_prompt(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in pieces]
    assert [weight for _, weight in parsed] == pytest.approx([weight for _, weight in pieces], rel=1e-15)


def test_depth_is_an_exponent() -> None:
    """N brackets around a word are a weight of 1.1 to the N, however many there are."""
    for depth in (1, 7, 500):
        for prompt, factor in (
            ("(" * depth + "a" + ")" * depth, 1.1),
            ("[" * depth + "a" + "]" * depth, 1 / 1.1),
        ):
            [(text, weight)] = parse_prompt(prompt)
            assert text == "a"
            assert weight == pytest.approx(factor**depth)


@pytest.mark.parametrize(
    "prompt",
    [
        "(" * 200_000,
        "(a" * 100_000 + ")" * 100_000,
        ":" + "1" * 200_000,
        ":" + " " * 200_000,
        "[(a:1)]" * 50_000,
    ],
)
def test_long_prompts_are_read_at_once(prompt: str) -> None:
    """In time that grows with their length, and not with its square, which would be minutes."""
    begin = time.process_time()
    parse_prompt(prompt)
    assert time.process_time() - begin < 5


def test_every_string_has_a_meaning() -> None:
    """Random strings of everything that means something: no error, no empty piece, and no letter lost or
    moved."""
    draw = random.Random(0)
    symbols = [*"()[]:\\ abc", ":1.5)", ":1.", "\\(", "\\]", "((", "0.5", "é"]
    for _ in range(3000):
        prompt = "".join(draw.choices(symbols, k=draw.randrange(30)))
        pieces = parse_prompt(prompt)
        assert all(text for text, _ in pieces)
        letters = [c for text, _ in pieces for c in text if c in "abcé"]
        assert letters == [c for c in prompt if c in "abcé"], prompt
        assert all(a != b for (_, a), (_, b) in pairwise(pieces))
