"""Reads the structure of networks off the names and shapes of tensors, and what a config.json says that no
tensor shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from diffusion.messages import brief
from models.files.table import Layout

Shapes = Mapping[str, tuple[int, ...]]
Settings = Mapping[str, tuple[Any, ...]]
"""Entries of a config.json that no shape tells, with the values that the networks here compute."""


@dataclass(frozen=True)
class ByOurNames:
    """The shapes of a file's tensors by our names for them, where the layout needs no parameters for these.
    KeyError has the file's key."""

    shapes: Shapes
    layout: Layout

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self.shapes[self._key(name)]

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self.shapes

    def count(self, name: str) -> int:
        """How many there are in the place of {} in a name: of the blocks, for
        "joint.{}.image.mlp.0.weight"."""
        return len(self._places.get(self._key(name.format(1_000_000)).partition(".1000000")[0], ()))

    @cached_property
    def _places(self) -> Mapping[str, set[str]]:
        """What follows each beginning of a key: "a.0.b" puts "0" under "a", and "b" under "a.0"."""
        places: dict[str, set[str]] = {}
        for key in self.shapes:
            place = ""
            for part in key.split("."):
                places.setdefault(place, set()).add(part)
                place = f"{place}.{part}" if place else part
        return places

    def _key(self, name: str) -> str:
        return self.layout.table([name])[name].keys[0]


def by_level(name: str, blocks: int, top: int | None = None) -> str:
    """One of our names with the place in its level: encoder.down.7.conv is encoder.down.2.1.conv where levels
    have two blocks.

    They have so many on the way down, one more on the way up, and then what changes the resolution. With
    `top`, levels on the way up count down from it.
    """

    def numbered(match: re.Match[str]) -> str:
        level, i = divmod(int(match[2]), blocks + (1 if match[1] == "down" else 2))
        return f"{match[1]}.{top - level if match[1] == 'up' and top is not None else level}.{i}."

    return re.sub(r"\b(down|up)\.(\d+)\.", numbered, name, count=1)


def check_settings(config: Mapping[str, Any], known: Settings, file: str = "config.json") -> None:
    """ValueError where a configuration asks for another computation than ours: weights would fit, and results
    be wrong."""
    for name, values in known.items():
        if name in config and config[name] not in values:
            supported = " or ".join(map(repr, values))
            raise ValueError(
                f"{file} says {name}={brief(config[name])}, and this library computes with {supported}"
            )


def used_blocks(stored: int, configured: Any) -> int:
    """How many blocks of a text encoder are used: all that are stored, or the first ones, as many as its
    config.json says.

    ValueError where the file holds fewer than that.
    """
    if configured is None:
        return stored
    if type(configured) is not int or not 0 < configured <= stored:
        raise ValueError(f"config.json says {brief(configured)} blocks, and the file holds {stored}")
    return configured


@dataclass(frozen=True, eq=False, kw_only=True)
class Kind:
    """One kind of network, and how files hold it.

    name       of a backbone, in a model's description: {"network": {"name": "unet", ...}}
    part       of a model that it is: "backbone", "vae", "text" (one of its encoders) or "preview"
    words      what people call it, for error messages
    network    its class
    params     the class of its parameters; a backbone's are `NetworkParams` with context_dim and vector_dim
    recognise  the parameters and the layout of a network with these keys and shapes, None where it is none;
               beside them, what a config.json says. KeyError for a key that lacks, ValueError in a sentence
               for what is known to be wrong
    single     how single files hold it, its publisher's or ComfyUI's, by its parameters
    diffusers  how a diffusers (or transformers) folder holds it
    config     the config.json there, with `_class_name`, or `architectures` of transformers, by its
               parameters and the height and width of the latents that it was trained on
    folder     the name of that folder
    in_adapters  further ways in which adapters name its weights, by its parameters
    """

    name: str
    part: str
    words: str
    network: type[nn.Module]
    params: type[Any]
    recognise: Callable[[Shapes, Mapping[str, Any]], tuple[Any, Layout] | None]
    single: Callable[[Any], Layout]
    diffusers: Callable[[Any], Layout]
    config: Callable[[Any, tuple[int, int]], dict[str, Any]]
    folder: str = "transformer"
    in_adapters: tuple[Callable[[Any], Layout], ...] = ()
