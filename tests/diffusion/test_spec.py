"""Plain values against annotations: what fits, what does not, and what is said about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion import Noise, SeededNoise
from diffusion.spec import check_call, check_names, check_type, make, make_params

FITS: list[tuple[Any, list[Any], list[Any]]] = [
    (int, [3, -1, np.int64(3)], [3.0, True, "3", None, [3]]),
    (float, [3.5, 3, np.float32(3), float("inf")], [float("nan"), False, "3", None]),
    (bool, [True], [1, "true", None]),
    (str, ["a"], [1, None, ["a"]]),
    (Path, ["a", Path("a")], [1, None]),
    (int | None, [3, None], ["3", 3.5]),
    (Literal["a", "b"], ["a"], ["c", 1]),
    (tuple[int, ...], [[1, 2], (1,), []], [[1.5], 3, "12", None]),
    (tuple[float, float], [[0.9, 1]], [[0.9], [1, 2, 3], ["a", "b"]]),
    (list[str], [["a"], []], ["a", [1]]),
    (str | list[str], ["a", ["a"]], [[1], 1]),
    (dict[str, Any], [{}, {"a": 1}], [3, "a", [1]]),
    (str | Sequence[float] | Tensor, ["karras", [1.0, 0.5], torch.ones(2)], [5, None, [1.0, None], ["a"]]),
    (Noise | None, [None, SeededNoise([0])], [3, "a"]),
    (Any, [3, None], []),
]


@pytest.mark.parametrize(("kind", "right", "wrong"), FITS, ids=[str(kind) for kind, _, _ in FITS])
def test_values_are_held_against_annotations(kind: Any, right: list[Any], wrong: list[Any]) -> None:
    """True is no number and NaN is none either; a text is no list; one line says what would be right."""
    for value in right:
        check_type("x", value, kind)
    for value in wrong:
        with pytest.raises(ValueError, match=r"^x must be .*, not "):
            check_type("x", value, kind)


@dataclass(frozen=True)
class Params:
    name: str
    sizes: tuple[int, ...] = (1,)
    options: dict[str, Any] = field(default_factory=dict)


def test_parameters_from_plain_values() -> None:
    """Lists become tuples; what is unknown, of a wrong type or missing is named with its section."""
    assert make_params("train", Params, {"name": "a", "sizes": [1, 2]}) == Params("a", (1, 2))
    for values, message in (
        ({"name": "a", "size": 1}, "no train parameter named 'size'; did you mean 'sizes'?"),
        ({"name": "a", "sizes": ["b"]}, "train.sizes must be a list of whole numbers"),
        ({}, "train.name must be given"),
        (3, "train must be a mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            make_params("train", Params, values)  # type: ignore[arg-type]  # 3 is no mapping, on purpose


def shift(base: int, factor: float, *, whole: bool = False) -> tuple[int, float, bool]:
    return base, factor, whole


@dataclass(frozen=True)
class Outer:
    inner: Params
    other: Params | None = None


def test_what_must_be_a_mapping_says_so_wherever_it_stands() -> None:
    """A description within a description, one that may be left out, and a finished object in its place."""
    values = {"name": "a"}
    params = make_params("", Params, values)
    assert make_params("", Outer, {"inner": values, "other": None}) == Outer(params)
    assert make_params("", Outer, {"inner": params}) == Outer(params)
    cases: list[dict[str, Any]] = [{"inner": 3}, {"inner": None}, {"inner": values, "other": "x"}]
    for wrong in cases:
        with pytest.raises(ValueError, match=rf"{list(wrong)[-1]} must be a mapping of names to values, not"):
            make_params("", Outer, wrong)


def test_calls_from_plain_values() -> None:
    """Options of a function after the arguments it is given otherwise."""
    assert make("shift", {"name": "a", "factor": 2}, {"a": shift}, 1) == (1, 2, False)
    for options, message in (
        ({"factor": "2"}, "factor of shift must be a number, not '2'"),
        ({}, "shift needs factor"),
        ({"factor": 2, "hole": True}, "no option of shift named 'hole'; did you mean 'whole'?"),
        ({"factor": 2, "base": 1}, "base is not an option of shift"),
    ):
        with pytest.raises(ValueError, match=message):
            check_call("shift", shift, 1, options)
    for spec, message in (
        ({"name": "b"}, "no shift named 'b'"),
        ({}, "needs a name; known: a"),
        ("a", "must be a mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            make("shift", spec, {"a": shift}, 1)  # type: ignore[arg-type]  # "a" is no mapping, on purpose
    with pytest.raises(ValueError, match="no sampler named 'x'; known: none"):
        check_names("sampler", ["x"], [])
