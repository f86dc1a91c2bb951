"""Names from outside this library, wherever it asks for one: "package.module:name", or an entry point of an
installed package.

    sampler=mysampler:alternate         the function `alternate` of mysampler.py in the working folder, or of
                                        an installed package
    model.network.name=mynet:Tiny       a class
    sampler=alternate                   where an installed package has the entry point `alternate` in the
                                        group plain_diffusion.sampler

Following such a name runs other people's code. So only names that a person wrote are followed: a program
passes its configuration to `trust`, and Python code passes the function or class itself. A name in a picture
is never followed, and one in a model's file only where the caller says trust=True of that file.
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
    """Let every text in these plain values, which a person wrote, name something outside this library."""
    _trusted.update(_texts(settings))


def provide(kind: str, what: Any, name: str | None = None) -> str:
    """Let a name stand for this function or class from now on, by default the one that imports it. Returns
    the name."""
    name = f"{what.__module__}:{what.__qualname__}" if name is None else name
    _known[kind, name] = what
    return name


def find(kind: str, name: Any) -> Any | None:
    """What a name from outside stands for; None for one that is none, or is not trusted. ValueError where it
    cannot be imported.

    kind  what is asked for, in words: "sampler", "guidance rule", ...
    """
    if not isinstance(name, str):
        return None
    if (kind, name) in _known:
        return _known[kind, name]
    if name not in _trusted:
        return None
    found = _import(kind, name) if OUTSIDE.fullmatch(name) else _entry_point(kind, name)
    if found is not None:
        _known[kind, name] = found
    return found


def remedy(name: Any) -> str:
    """For error messages: why a name that looks like one from outside is not followed; "" for others."""
    if not (isinstance(name, str) and OUTSIDE.fullmatch(name)):
        return ""
    return (
        "names of your own code are followed where you write them (command line, configuration), and in a "
        "model's file with trust=true"
    )


def _import(kind: str, name: str) -> Any:
    module, _, attributes = name.partition(":")
    try:
        found: Any = import_module(module)
        for attribute in attributes.split("."):
            found = getattr(found, attribute)
    except Exception as error:  # whatever the code of somebody else raises
        raise ValueError(
            f"the {kind} {name!r} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from error
    return found


def _entry_point(kind: str, name: str) -> Any | None:
    for entry in entry_points(group=f"{GROUP}.{kind.replace(' ', '_')}", name=name):
        try:
            return entry.load()
        except Exception as error:  # whatever the code of somebody else raises
            raise ValueError(
                f"the {kind} {name!r} ({entry.value}) cannot be imported: {one_line(error)}"
            ) from error
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
