"""What the settings of sampling are, for all that treats some of them in another way than the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

# What a setting is, said once, where it is declared: field(metadata=...) of a parameter dataclass. `named` makes the lists of it.
PLACE = {"kind": "place"}  # where the work is done and its results go, which changes no pixel but for rounding
COUNT = {"kind": "count"}  # how many images, in all and at once
WEIGHTS = {"kind": "weights"}  # paths of a model
PICTURE = {"kind": "picture"}  # the path of a picture that is read


def named(params: type[Any], *kinds: Mapping[str, str]) -> tuple[str, ...]:
    """The settings of a parameter dataclass that are of these kinds."""
    return tuple(field.name for field in fields(params) if field.metadata in kinds)


def recorded(params: type[Any]) -> tuple[str, ...]:
    """The settings that an image says of itself: not where it was put, nor how many there were; but the device, which has its rounding."""
    left_out = named(params, PLACE, COUNT)
    return tuple(field.name for field in fields(params) if field.name == "device" or field.name not in left_out)
