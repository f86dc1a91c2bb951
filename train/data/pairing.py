"""Matches a list without names, such as lines of prompts, to pictures by the numbers in their names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from os.path import splitext
from typing import Any

from train.data.names import PICTURES, by_value

NUMBER = re.compile("([0-9]+)")
DECIMAL = re.compile(r"(?<![0-9.])([0-9]+)\.([0-9]+)(?![0-9]|\.[0-9])")  # 7.5, not 1.2.3 or 10.5.2024


def order_by_number(names: Sequence[str]) -> list[int] | None:
    """The indices of the names, sorted by the number that distinguishes them; None if that is uncertain.

    The number is in every name, no two names share it, and no other number decreases where it increases. Nor
    does any decimal: 0.25 comes before 0.5 as a scale, but after it as a version; 0.9, 0.10, 0.11 can only be
    versions. Names that differ in more than numbers (1-a-red-cat, 2-a-blue-dog) must count from 0 or 1
    without a gap, with the same characters around the number. Otherwise they may be prompts with a number,
    times of day, or hexadecimal.
    """
    if len(names) < 2:
        return list(range(len(names)))
    stems = [_stem(name) for name in names]
    pieces = [NUMBER.split(stem) for stem in stems]  # text and numbers in turn
    texts = {tuple(piece[::2]) for piece in pieces}
    for column in _columns([len(piece) // 2 for piece in pieces]):
        values = [by_value(piece[at]) for piece, at in zip(pieces, column, strict=True)]
        order = sorted(range(len(names)), key=values.__getitem__)
        around = {(piece[at - 1][-1:], piece[at + 1][:1]) for piece, at in zip(pieces, column, strict=True)}
        certain = len(texts) == 1 or (len(around) == 1 and _is_range(sorted(values)))
        if certain and len(set(values)) == len(names) and _never_goes_down([stems[i] for i in order]):
            return order
    return None


def _columns(counts: Sequence[int]) -> list[list[int]]:
    """Candidates: the k-th number from the left, and from the right. A row has its index in each name."""
    shared = range(min(counts))
    from_left = [[2 * k + 1 for _ in counts] for k in shared]
    return from_left + [[2 * (count - k) - 1 for count in counts] for k in shared]


def _never_goes_down(stems: Sequence[str]) -> bool:
    """Whether numbers and decimals, counted from either end, never decrease from one name to the next."""
    numbers = _by_position([[by_value(number) for number in NUMBER.findall(stem)] for stem in stems])
    decimals = _by_position(
        [[(by_value(number), part) for number, part in DECIMAL.findall(stem)] for stem in stems]
    )
    return all(column == sorted(column) for column in numbers) and all(
        _are_counters(column) or (values := _as_decimals(column)) == sorted(values) for column in decimals
    )


def _by_position(rows: Sequence[Sequence[Any]]) -> Iterator[list[Any]]:
    """For each k, the k-th from the left of every row that has one; then the same from the right."""
    for each in (rows, [row[::-1] for row in rows]):
        for k in range(max(map(len, each))):
            yield [row[k] for row in each if len(row) > k]


def _are_counters(column: Sequence[tuple[Any, str]]) -> bool:
    """Whether they cannot be decimals: the fractions count up (9, 10, 11), or two are equal (.1, .10)."""
    parts = sorted({part for _, part in column}, key=by_value)
    first = int(parts[0][:18])  # names may hold longer numbers than int() reads
    counting = parts == [str(first + i) for i in range(len(parts))]
    return counting or len(set(_as_decimals(column))) < len(set(column))


def _as_decimals(column: Sequence[tuple[Any, str]]) -> list[tuple[Any, str]]:
    return [(number, part.rstrip("0")) for number, part in column]


def _is_range(values: Sequence[tuple[int, str]]) -> bool:
    """Whether the values are 0, 1, 2, ... or 1, 2, 3, ..."""
    return any(list(values) == [by_value(str(first + i)) for i in range(len(values))] for first in (0, 1))


def _stem(name: str) -> str:
    stem, suffix = splitext(name)
    return stem if suffix.lower() in PICTURES else name
