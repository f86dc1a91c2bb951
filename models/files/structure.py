"""Reads the structure of networks off names and shapes of tensors, and off config.json."""

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
"""Entries of a config.json that no shape shows, with the values that the networks here implement."""


@dataclass(frozen=True)
class ByOurNames:
    """A file's shapes by our names, for layouts without parameters. KeyError has the file's key."""

    shapes: Shapes
    layout: Layout

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return self.shapes[self._key(name)]

    def __contains__(self, name: str) -> bool:
        return self._key(name) in self.shapes

    def count(self, name: str) -> int:
        """How many values {} has in a name: the number of blocks, for "joint.{}.image.mlp.0.weight"."""
        return len(self._children.get(self._key(name.format(1_000_000)).partition(".1000000")[0], ()))

    @cached_property
    def _children(self) -> Mapping[str, set[str]]:
        """The next part of each prefix: the key "a.0.b" puts "0" under "a", and "b" under "a.0"."""
        children: dict[str, set[str]] = {}
        for key in self.shapes:
            prefix = ""
            for part in key.split("."):
                children.setdefault(prefix, set()).add(part)
                prefix = f"{prefix}.{part}" if prefix else part
        return children

    def _key(self, name: str) -> str:
        return self.layout.table([name])[name].keys[0]


def by_level(name: str, blocks: int, top: int | None = None) -> str:
    """Number a name within levels: with two blocks, encoder.down.7.conv is encoder.down.2.1.conv.

    A level has that many blocks on the way down, one more on the way up, and then a change of resolution.
    With `top`, levels on the way up count down from it.
    """

    def renumber(match: re.Match[str]) -> str:
        level, i = divmod(int(match[2]), blocks + (1 if match[1] == "down" else 2))
        return f"{match[1]}.{top - level if match[1] == 'up' and top is not None else level}.{i}."

    return re.sub(r"\b(down|up)\.(\d+)\.", renumber, name, count=1)


def check_settings(config: Mapping[str, Any], known: Settings, file: str = "config.json") -> None:
    """ValueError if a configuration requires another computation than ours: results would be wrong."""
    for name, values in known.items():
        if name in config and config[name] not in values:
            supported = " or ".join(map(repr, values))
            stated = f"{file} says {name}={brief(config[name])}"
            raise ValueError(f"{stated}, and this library computes with {supported}")


def used_blocks(stored: int, configured: Any) -> int:
    """How many blocks of a text encoder are used: those that config.json says, else all stored ones.

    ValueError if the file holds fewer.
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
    part       of the model: "backbone", "vae", "text" (one of its encoders) or "preview"
    title      what error messages call it
    network    its class
    params     the class of its parameters; a backbone's are `NetworkParams` with context_dim and vector_dim
    recognise  parameters and layout of a network from keys and shapes, and from config.json; None for another
               kind. KeyError for a missing key, ValueError, as a sentence, for anything known to be wrong
    single     the layout in single files (its publisher's or ComfyUI's), from its parameters
    diffusers  the layout in folders of diffusers or transformers
    config     config.json in such a folder, with `_class_name` (transformers: `architectures`), from its
               parameters and the height and width of its latents in training
    folder     the name of the sub-folder
    in_adapters  further layouts of its weights in adapters
    """

    name: str
    part: str
    title: str
    network: type[nn.Module]
    params: type[Any]
    recognise: Callable[[Shapes, Mapping[str, Any]], tuple[Any, Layout] | None]
    single: Callable[[Any], Layout]
    diffusers: Callable[[Any], Layout]
    config: Callable[[Any, tuple[int, int]], dict[str, Any]]
    folder: str = "transformer"
    in_adapters: tuple[Callable[[Any], Layout], ...] = ()
