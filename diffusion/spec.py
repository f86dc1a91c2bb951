"""Makes objects from plain values (configurations, files). Errors suggest the nearest known name."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from diffusion import outside
from diffusion.messages import brief, brief_list

T = TypeVar("T")
WORDS: dict[Any, str] = {Path: "a path", int: "a whole number", float: "a number", bool: "true or false"}
WORDS |= {str: "a text", dict: "a mapping", type(None): "null"}
PLURALS: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts", Path: "paths"}


def check_names(what: str, names: Iterable[Any], known: Iterable[str]) -> None:
    """ValueError at the first name that is not known."""
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name)[:100], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {brief_list(known, most=40) or 'none'}"
            raise ValueError(f"no {what} named {brief(name)}; {outside.remedy(name) or hint}")


def check_mapping(what: str, spec: Any) -> dict[str, Any]:
    """A copy of the description as a dictionary; ValueError if it is not a mapping."""
    if not isinstance(spec, Mapping):
        raise ValueError(f"{what} must be a mapping of names to values, not {brief(spec)}")
    return dict(spec)


def check_type(what: str, value: Any, kind: Any) -> None:
    """ValueError unless a value fits an annotation. NaN and True are not numbers; a text is a valid path."""
    if not _fits(value, kind):
        raise ValueError(f"{what} must be {_in_words(kind)}, not {brief(value)}")


def check_at_least_one(params: Any, *names: str) -> None:
    """ValueError if one of these attributes is a number below 1, or a tuple with one."""
    for name in names:
        value = getattr(params, name)
        if value is not None and min(value if isinstance(value, tuple) else (value,), default=0) < 1:
            raise ValueError(f"{name} must be at least 1, not {brief(value)}")


def check_range(params: Any, *names: str, least: float = -math.inf, most: float = math.inf) -> None:
    """ValueError if one of these attributes is a number outside the range, or a tuple with one."""
    for name in names:
        value = getattr(params, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not least <= number <= most:
                raise ValueError(f"{name} must be {least:g} to {most:g}, not {brief(value)}")


def lookup(what: str, name: Any, table: Mapping[str, T]) -> T:
    """table[name], or the object behind a trusted name from outside (`diffusion.outside`)."""
    known = isinstance(name, str) and name in table
    if not known and (entry := outside.find(what, name)) is not None:
        return cast(T, entry)
    check_names(what, [name], table)
    return table[name]


def make(what: str, spec: Mapping[str, Any], table: Mapping[str, Callable[..., T]], *args: Any) -> T:
    """The entry spec["name"], called with `args` and the rest of spec: {"name": "flow"}: table["flow"]()."""
    options = check_mapping(f"the description of the {what}", spec)
    if "name" not in options:
        raise ValueError(f"the description of the {what} needs a name; known: {', '.join(table)}")
    name = options.pop("name")
    entry = lookup(what, name, table)
    return entry(*args, **check_call(f"{what} {name!r}", entry, len(args), options))


def check_call(
    what: str, function: Callable[..., Any], position: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options for a call after `position` arguments: names known, types as annotated, none missing."""
    signature = list(inspect.signature(function).parameters.values())
    positional, parameters = signature[:position], signature[position:]
    for p in positional:
        if p.name in options:
            raise ValueError(f"{p.name} is not an option of {what}: it is given elsewhere")
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        check_names(f"option of {what}", options, [p.name for p in parameters])
    kinds = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    for name, value in options.items():
        check_type(f"{name} of {what}", value, kinds.get(name, Any))
    for p in parameters:
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in options:
            raise ValueError(f"{what} needs {p.name}: give {p.name}=...")
    return dict(options)


def make_params(what: str, cls: type[T], values: Mapping[str, Any]) -> T:
    """A parameter dataclass from plain values, checked, with nested ones and with tuples for lists.

    what  goes before the names in errors: "train" gives "train.steps must be ...", "" only the names
    """
    kinds = get_type_hints(cls)
    prefix = f"{what}." if what else ""
    if isinstance(values, Mapping):
        values = {name: _build(f"{prefix}{name}", value, kinds.get(name)) for name, value in values.items()}
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]  # T is a dataclass by contract
    values = check_mapping(what or "the settings", values)
    check_names(f"{what} parameter".strip(), values, [field.name for field in fields])
    for name, value in values.items():
        check_type(f"{prefix}{name}", value, kinds[name])
    for field in fields:
        required = field.default is field.default_factory is dataclasses.MISSING
        if required and field.name not in values:
            raise ValueError(f"{prefix}{field.name} must be given")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _build(what: str, value: Any, kind: Any) -> Any:
    """The value, with each description of a parameter dataclass replaced by the dataclass."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType) and len(parts) == 2 and parts[1] is type(None):
        return None if value is None else _build(what, value, parts[0])
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and not isinstance(value, kind):
        return make_params(what, kind, value)
    if origin is tuple and dataclasses.is_dataclass(parts[0]) and isinstance(value, (list, tuple)):
        return tuple(_build(f"{what}[{i}]", item, parts[0]) for i, item in enumerate(value))
    if origin in (dict, Mapping) and dataclasses.is_dataclass(parts[1]) and isinstance(value, Mapping):
        return {name: _build(f"{what}.{name}", item, parts[1]) for name, item in value.items()}
    return value


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if origin in (tuple, list):
        inner = parts[0] if origin is list or parts[-1] is ... else None
        if not isinstance(value, (list, tuple)) or (inner is None and len(value) != len(parts)):
            return False
        each = parts if inner is None else [inner] * len(value)
        return all(_fits(item, part) for item, part in zip(value, each, strict=True))
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, Real if kind is float else Integral):
            return False
        return kind is int or _fits_float(value)
    if kind is Path:
        return isinstance(value, (str, Path))
    if isinstance(origin, type):  # dict[str, Any], Sequence[float], ...; a text is not a list of texts
        if not isinstance(value, origin) or isinstance(value, str):
            return False
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
        return all(_fits(item, parts[-1]) for item in items)
    if getattr(kind, "_is_protocol", False):
        return callable(value)
    return isinstance(value, kind) if isinstance(kind, type) and kind is not Any else True


def _fits_float(value: Any) -> bool:
    """Whether torch accepts it as a float: not NaN; within float32 or 64-bit integers; or infinite."""
    most = 2**63 if isinstance(value, Integral) else 3.4028235e38
    return bool(value == value and (abs(value) < most or abs(value) == math.inf))


def _in_words(kind: Any) -> str:
    """An annotation in words."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_in_words(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(map(str, parts))
    if origin in (tuple, list):
        count = "" if origin is list or parts[-1] is ... else f"{len(parts)} "
        return f"a list of {count}{_plural(parts[0])}"
    if isinstance(origin, type):
        if not issubclass(origin, Mapping):
            return f"a list of {_plural(parts[0])}"
        return f"a mapping to {_plural(parts[1])}" if parts[1] in PLURALS else "a mapping"
    return WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _plural(kind: Any) -> str:
    return PLURALS.get(kind, "mappings")
