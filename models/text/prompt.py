"""Weights in prompts: "a (red:1.3) cat" is "a ", then "red" with weight 1.3, then " cat"."""

from __future__ import annotations

import re
from itertools import groupby

# Marks: an escaped bracket or backslash, a weight with its closing bracket, a bracket.
_MARK = re.compile(r"\\[\\()\[\]]|:\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))\s*\)|[()\[\]]")
_PARTNER = {")": "(", "]": "["}
_FACTOR = {"(": 1.1, "[": 1 / 1.1}


def parse_prompt(prompt: str) -> list[tuple[str, float]]:
    r"""The pieces of a prompt with their weights, without brackets; neighbours of equal weight are merged.

    (text)      1.1 times the weight      (text:1.3)           1.3 times
    [text]      1/1.1 times               \( \) \[ \] \\       the character behind the backslash

    Each kind of bracket pairs up with its own, and weights of nested pairs are multiplied. A bracket or
    weight without its partner is text, so that every prompt is valid.
    """
    texts: list[str] = []
    opened: dict[str, list[int]] = {
        "(": [],
        "[": [],
    }  # places in `texts` of brackets without a partner so far
    begins: dict[int, float] = {}  # places in `texts` where pairs begin, with their factors
    ends: dict[int, str] = {}  # places where pairs end, with their opening brackets
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
        elif partners := opened[_PARTNER[bracket]]:
            begins[partners.pop()] = float(mark[1]) if mark[1] else _FACTOR[_PARTNER[bracket]]
            ends[len(texts)] = _PARTNER[bracket]
        else:
            texts.append(mark[0])
    texts.append(prompt[end:])

    pieces: list[tuple[str, float]] = []
    products: dict[str, list[float]] = {
        "(": [1.0],
        "[": [1.0],
    }  # of the open pairs of each kind, outermost first
    for i, text in enumerate(texts):
        if i in ends:
            products[ends[i]].pop()
        if i in begins:
            products[text].append(products[text][-1] * begins[i])
        elif text:
            pieces.append((text, products["("][-1] * products["["][-1]))
    runs = groupby(pieces, key=lambda piece: piece[1])
    return [("".join(text for text, _ in run), weight) for weight, run in runs]
