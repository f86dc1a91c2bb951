"""The kinds of settings of sampling, by which checks, names of folders and records treat them differently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

# A setting's kind is declared with it: field(metadata=...) of a parameter dataclass. `named` lists the settings of a kind.
PLACE = {"kind": "place"}  # where results go and what the work may take, which changes no pixel
ROUNDING = {"kind": "rounding"}  # what computes, and how: changes pixels by rounding only, and is recorded for that
COUNT = {"kind": "count"}  # how many images, in all and at once
WEIGHTS = {"kind": "weights"}  # paths of a model
PICTURE = {"kind": "picture"}  # the path of a picture that is read


def named(params: type[Any], *kinds: Mapping[str, str]) -> tuple[str, ...]:
    """The settings of a parameter dataclass that are of these kinds."""
    return tuple(field.name for field in fields(params) if field.metadata in kinds)


def recorded(params: type[Any]) -> tuple[str, ...]:
    """The settings that an image records: all but places and counts."""
    left_out = named(params, PLACE, COUNT)
    return tuple(field.name for field in fields(params) if field.name not in left_out)
