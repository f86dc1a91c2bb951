"""Which picture each entry of a list without names belongs to: certain, or not at all."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from os.path import basename, splitext
from typing import Any

from train.listing import PICTURES

WORDS = 6  # letters of a name that are no accident where a prompt begins with them


def find_doubt(names: Sequence[str]) -> tuple[str, str] | None:
    """Two pictures that one order puts this way and another one that way; None where all orders of the names agree.

    The orders are that of the source, those of the names as text (by code points, and as `ls` and file managers sort), and that of each
    number which differs from picture to picture, be it in all names or in some. Numbers that come back (cat-1, cat-2, dog-1) leave in
    doubt whether the list follows the names or the numbers.
    """
    numbers = [_numbers(name) for name in names]
    for column in _columns(numbers):
        own, by_value = list(column), sorted(column, key=column.__getitem__)
        if own != by_value and len(set(column.values())) == len(column):
            return _first_difference(names, own, by_value)
    own = list(range(len(names)))
    for key in TEXT_ORDERS:
        by_text = sorted(own, key=lambda i, key=key: key(names[i]))  # type: ignore[misc]
        if by_text != own:
            return _first_difference(names, own, by_text)
    numbered = [i for i in own if numbers[i]]
    first = {tuple(numbers[i]): i for i in reversed(numbered)}
    if 1 < len(first) < len(numbered):
        return next((names[first[tuple(numbers[i])]], names[i]) for i in numbered if first[tuple(numbers[i])] != i)
    return None


def order_by_number(names: Sequence[str]) -> list[int] | None:
    """The pictures in the order of a number that each name has, from some first one on without a gap; None where none or several tell."""
    found: list[int] | None = None
    for column in _columns([_numbers(name) for name in names]):
        values = sorted(column.values())
        if len(column) == len(names) and values == list(range(values[0], values[0] + len(values))):
            order = sorted(column, key=column.__getitem__)
            if found not in (None, order):
                return None
            found = order
    return found


def find_contradiction(names: Sequence[str], prompts: Sequence[str]) -> tuple[str, str] | None:
    """A picture whose name has the words of another prompt than its own, and that prompt; None where there is none."""
    said, named = [_words(prompt) for prompt in prompts], [_words(basename(_stem(name))) for name in names]
    by_words = sorted(zip(said, prompts, strict=True))
    if len(set(named)) == 1:
        return None
    for name, words, own in zip(names, named, said, strict=True):
        place = bisect_left(by_words, (words, ""))
        if len(words) >= WORDS and not own.startswith(words) and place < len(by_words) and by_words[place][0].startswith(words):
            return name, by_words[place][1]
    return None


def _stem(name: str) -> str:
    stem, suffix = splitext(name)
    return stem if suffix.lower() in PICTURES else name


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", _stem(name))]


def _words(text: str) -> str:
    """Its letters."""
    return re.sub(r"[\W\d_]+", "", text).casefold()


def _columns(numbers: Sequence[Sequence[int]]) -> Iterator[dict[int, int]]:
    """The first, second, ... number of each name that has one, and the last, the last but one, ...; by the name's place."""
    for k in range(max(map(len, numbers), default=0)):
        for place in (k, -k - 1):
            yield {i: each[place] for i, each in enumerate(numbers) if len(each) > k}


def _natural(name: str, ignored: str = "") -> list[list[tuple[str, int]]]:
    """A sort key: folder by folder, 2 before 10, whatever the case."""
    pieces = [re.findall(r"(\D*)(\d*)", part)[:-1] for part in _stem(name).casefold().split("/")]
    return [[(re.sub(ignored, "", text) if ignored else text, int(digits or -1)) for text, digits in part] for part in pieces]


def _without_punctuation(name: str) -> list[list[tuple[str, int]]]:
    return _natural(name, r"[\W_]+")


TEXT_ORDERS: tuple[Callable[[str], Any], ...] = (str, _natural, _without_punctuation)


def _first_difference(names: Sequence[str], one: Sequence[int], other: Sequence[int]) -> tuple[str, str]:
    a, b = next(pair for pair in zip(one, other, strict=True) if pair[0] != pair[1])
    return names[a], names[b]
