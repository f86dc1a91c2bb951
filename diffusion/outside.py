"""Names from outside this library: "package.module:name", or an entry point of an installed package.

    sampler=mysampler:alternate     the function `alternate` of mysampler.py in the working folder, or
    installed
    model.network.name=mynet:Tiny   a class
    sampler=alternate               the entry point `alternate` of the group plain_diffusion.sampler

Importing such a name runs other people's code. So only names that a person wrote are imported: programs pass
their configuration to `trust`, and Python code passes the function or class itself. A name in a picture is
never imported, and one in a model's file only with trust=True.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from diffusion.messages import one_line

GROUP = "plain_diffusion"
OUTSIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*(\.\w+)*")
_trusted: set[str] = set()
_known: dict[tuple[str, str], Any] = {}


def trust(settings: Any) -> None:
    """Allow every text in these plain values, which a person wrote, as a name from outside."""
    _trusted.update(_texts(settings))


def provide(kind: str, entry: Any, name: str | None = None) -> str:
    """Register a function or class under a name, by default its import path, and return the name."""
    name = f"{entry.__module__}:{entry.__qualname__}" if name is None else name
    _known[kind, name] = entry
    return name


def find(kind: str, name: Any) -> Any | None:
    """The object behind a trusted name from outside, or None. ValueError if its import fails.

    kind  the registry, in words: "sampler", "guidance rule", ...
    """
    if not isinstance(name, str):
        return None
    if (kind, name) in _known:
        return _known[kind, name]
    if name not in _trusted:
        return None
    entry = _import(kind, name) if OUTSIDE.fullmatch(name) else _entry_point(kind, name)
    if entry is not None:
        _known[kind, name] = entry
    return entry


def remedy(name: Any) -> str:
    """For error messages: why a name from outside is not imported; "" for other names."""
    if not (isinstance(name, str) and OUTSIDE.fullmatch(name)):
        return ""
    return "it is your own code: trust=true imports and runs it where a run or a file names it"


def _import(kind: str, name: str) -> Any:
    module, _, attributes = name.partition(":")
    try:
        entry: Any = import_module(module)
        for attribute in attributes.split("."):
            entry = getattr(entry, attribute)
    except Exception as error:  # other people's code may raise anything
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"the {kind} {name!r} cannot be imported: {reason}") from error
    return entry


def _entry_point(kind: str, name: str) -> Any | None:
    for entry in entry_points(group=f"{GROUP}.{kind.replace(' ', '_')}", name=name):
        try:
            return entry.load()
        except Exception as error:
            reason = f"({entry.value}) cannot be imported: {one_line(error)}"
            raise ValueError(f"the {kind} {name!r} {reason}") from error
    return None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts(inner)
