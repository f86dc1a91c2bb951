"""Weights written into a prompt: "a (red:1.3) cat" is "a ", then "red" at 1.3 times its weight, then "
cat"."""

from __future__ import annotations

import re
from itertools import groupby

# What is no plain text: an escaped bracket or backslash, a weight with the bracket that ends it, a bracket.
_MARK = re.compile(r"\\[\\()\[\]]|:\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*\)|[()\[\]]")
_PARTNER = {")": "(", "]": "["}
_FACTOR = {"(": 1.1, "[": 1 / 1.1}


def parse_prompt(prompt: str) -> list[tuple[str, float]]:
    r"""The prompt in pieces and the weight of each, in order and without the brackets; neighbours of equal
    weight are one piece.

    (text)      1.1 times as heavy        (text:1.3)           1.3 times
    [text]      1/1.1 times               \( \) \[ \] \\       the character behind the backslash

    Each kind of bracket pairs up with its own, and a text weighs the product of what the pairs around it say.
    A bracket without a partner is text, and so is a weight without one: every prompt means something.
    """
    texts: list[str] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # the places in texts of brackets without a partner yet
    begins, ends = (
        dict[int, float](),
        dict[int, str](),
    )  # the places where pairs begin and what they multiply by; where each kind ends
    end = 0
    for mark in _MARK.finditer(prompt):
        texts.append(prompt[end : mark.start()])
        end = mark.end()
        bracket = mark[0][-1]
        if mark[0][0] == "\\":
            texts.append(bracket)
        elif bracket in opened:
            opened[bracket].append(len(texts))
            texts.append(bracket)
        elif waiting := opened[_PARTNER[bracket]]:
            begins[waiting.pop()] = float(mark[1]) if mark[1] else _FACTOR[_PARTNER[bracket]]
            ends[len(texts)] = _PARTNER[bracket]
        else:
            texts.append(mark[0])
    texts.append(prompt[end:])

    pieces: list[tuple[str, float]] = []
    around: dict[str, list[float]] = {
        "(": [1.0],
        "[": [1.0],
    }  # the products of the pairs of a kind around a place: within one they nest
    for i, text in enumerate(texts):
        if i in ends:
            around[ends[i]].pop()
        if i in begins:
            around[text].append(around[text][-1] * begins[i])
        elif text:
            pieces.append((text, around["("][-1] * around["["][-1]))
    return [
        ("".join(text for text, _ in run), weight)
        for weight, run in groupby(pieces, key=lambda piece: piece[1])
    ]
