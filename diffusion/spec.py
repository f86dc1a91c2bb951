"""From descriptions in plain values, as configs and files hold them, to objects. What is unknown is named, with the nearest known."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def check_names(what: str, given: Iterable[Any], known: Iterable[str]) -> None:
    """Raise ValueError at the first given name that is not known."""
    known = list(known)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"
            raise ValueError(f"no {what} named {name!r}; {hint}")


def lookup(what: str, name: Any, table: Mapping[str, T]) -> T:
    """table[name], or ValueError that names the nearest entry."""
    check_names(what, [name], table)
    return table[name]


def make(what: str, spec: Mapping[str, Any], table: Mapping[str, Callable[..., T]], *args: Any) -> T:
    """Call the entry that spec["name"] names with `args` and the rest of spec as keywords. {"name": "flow"} -> table["flow"]()."""
    options = dict(spec)
    if "name" not in options:
        raise ValueError(f"the description of a {what} needs a name; known: {', '.join(table)}")
    name = options.pop("name")
    entry = lookup(what, name, table)
    check_names(f"option of {what} {name!r}", options, list(inspect.signature(entry).parameters)[len(args) :])
    try:
        return entry(*args, **options)
    except TypeError as error:
        raise ValueError(f"{what} {name!r}: {error}") from None


def make_params(what: str, cls: type[T], values: Mapping[str, Any]) -> T:
    """A parameter dataclass from plain values: names checked, lists made tuples, types held to those of the defaults."""
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # T is a dataclass by contract
    check_names(f"{what} parameter", values, fields)
    plain = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in plain.items():
        default = fields[name].default
        accepted = (int, float) if isinstance(default, float) else type(default)
        if default is None or default is dataclasses.MISSING or (value is None and "None" in str(fields[name].type)):
            continue
        if not isinstance(value, accepted) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise ValueError(f"{what}.{name} must be of type {type(default).__name__}, like {default!r}, not {value!r}")
    return cls(**plain)
