"""Settings are declared once: fields of a parameter dataclass with a default, a comment and a kind.

    steps: int = setting(1000, "optimiser steps")
    device: str | None = setting(None, "null: a GPU if there is one", kind="rounding")

The checks of configurations (`make_params`), --help, the quoting of the command line, what a picture records,
and the names of folders and cache keys all derive from these fields.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from itertools import chain
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

LINE, WIDE = 110, 34  # characters of a line of --help, and at most of a name with its default
Kind = Literal["pixels", "rounding", "place", "count", "weights", "picture"]
"""What a setting changes in the results.

pixels    their content
rounding  rounding errors only: device, compilation
place     nothing: where results go, what memory the work may take
count     how many there are, in all and at once
weights, picture  a path of weights, or of a picture to read: the content counts, not the path
"""


@dataclass(frozen=True)
class About:
    """What is known of a setting besides its type.

    text     "text" or "path": taken literally on the command line, with its commas, brackets and "="
    heading  on the --help page, of this setting and those after it
    members  of a mapping that accepts other keys too: a dataclass of its usual ones
    swept    a text whose commas separate the values of a sweep
    """

    comment: str = ""
    kind: Kind = "pixels"
    text: Literal["", "text", "path"] = ""
    heading: str = ""
    members: type[Any] | None = None
    swept: bool = False


def setting(
    default: Any,
    comment: str,
    *,
    kind: Kind = "pixels",
    text: Literal["", "text", "path"] = "",
    heading: str = "",
    members: type[Any] | None = None,
    swept: bool = False,
) -> Any:
    """A field of a parameter dataclass, see `About`. ... is required; a callable makes fresh defaults."""
    text = text or ("path" if kind in ("weights", "picture") else "")
    metadata = {"about": About(comment, kind, text, heading, members, swept)}
    if default is ...:
        return field(metadata=metadata)
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """A setting as a program shows it.

    default  as plain values; "???" if required
    type     its annotation
    inner    the settings within it
    """

    name: str
    default: Any
    about: About
    type: Any = Any
    inner: tuple[Setting, ...] = ()

    @property
    def flat(self) -> Iterator[Setting]:
        """This setting and all within it."""
        yield self
        for each in self.inner:
            yield from each.flat


def settings(params: type[Any]) -> tuple[Setting, ...]:
    """All settings of a parameter dataclass: its own first, then those of its base."""
    kinds = get_type_hints(params)
    shared = {each.name for base in params.__bases__ if is_dataclass(base) for each in fields(base)}
    own_first = sorted(fields(params), key=lambda each: each.name in shared)
    return tuple(_setting(each, kinds[each.name]) for each in own_first)


def about(each: Field[Any]) -> About:
    """What a field declares; an empty `About` if it does not use `setting`."""
    metadata: About = each.metadata.get("about", About())
    return metadata


def _setting(each: Field[Any], kind: Any) -> Setting:
    own = about(each)
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    nested = [part for part in parts if isinstance(part, type) and is_dataclass(part)]
    members = own.members or next(iter(nested), None)
    inner: tuple[Setting, ...] = settings(members) if members else ()
    default, factory = each.default, cast(Any, each.default_factory)
    if default is MISSING:
        default = "???" if factory is MISSING else factory()
    if is_dataclass(default):
        inner = tuple(replace(part, default=_plain(getattr(default, part.name))) for part in inner)
    return Setting(each.name, _plain(default), own, kind, inner)


def merged(*several: Iterable[Setting]) -> tuple[Setting, ...]:
    """The settings of several groups; the first of each name counts."""
    first: dict[str, Setting] = {}
    for each in chain(*several):
        first.setdefault(each.name, each)
    return tuple(first.values())


def with_null_defaults(group: Iterable[Setting]) -> tuple[Setting, ...]:
    """The same settings with null defaults, for a program that fills in missing values elsewhere."""

    def without(each: Setting) -> Setting:
        default = each.default if isinstance(each.default, dict) else None
        return replace(each, default=default, inner=with_null_defaults(each.inner))

    return tuple(map(without, group))


def with_values(group: Iterable[Setting], config: Mapping[str, Any]) -> tuple[Setting, ...]:
    """The settings with the values of a configuration in place of defaults, and those that only it has."""
    known = {each.name: each for each in group}
    found = []
    for name in [*known, *(name for name in config if name not in known)]:
        each = known.get(name, Setting(name, None, About()))
        value = config.get(name, each.default)
        inner = with_values(each.inner, value) if isinstance(value, Mapping) and value else ()
        found.append(replace(each, default=value, inner=inner))
    return tuple(found)


def values(group: Iterable[Setting]) -> dict[str, Any]:
    """The defaults, by name."""
    return {each.name: values(each.inner) if each.inner else each.default for each in group}


def of_kind(params: type[Any], *kinds: Kind) -> tuple[str, ...]:
    """The names of a dataclass's settings of these kinds."""
    return tuple(each.name for each in fields(params) if about(each).kind in kinds)


def recorded(params: type[Any]) -> tuple[str, ...]:
    """The names of the settings that a picture records: all but places and counts."""
    left_out = of_kind(params, "place", "count")
    return tuple(each.name for each in fields(params) if each.name not in left_out)


def find(group: Iterable[Setting], key: str, prefix: str = "") -> dict[str, Setting]:
    """The settings of a name by their full names: for "seed", or "train.seed", {"train.seed": ...}."""
    matches: dict[str, Setting] = {}
    for each in group:
        name = f"{prefix}{each.name}"
        matches |= {name: each} if f".{name}".endswith(f".{key}") else {}
        matches |= find(each.inner, key, f"{name}.")
    return matches


def page(group: Iterable[Setting], indent: str = "") -> str:
    """Settings with defaults and comments, in YAML's form: what --help prints."""
    group, lines = tuple(group), list[str]()
    blocks = [each.default if _is_block(each.default) else [] for each in group]
    alone = [bool(each.inner or block) for each, block in zip(group, blocks, strict=True)]
    defaults = ["" if name else f" {as_yaml(each.default)}" for each, name in zip(group, alone, strict=True)]
    heads = [f"{indent}{each.name}:{default}" for each, default in zip(group, defaults, strict=True)]
    column = 2 + max((len(head) for head in heads if len(head) <= WIDE), default=WIDE)
    for each, head, block in zip(group, heads, blocks, strict=True):
        if each.about.heading:
            lines += [""] * bool(lines) + [f"# {each.about.heading} ".ljust(LINE, "-")]
        if len(head) + 2 > column and each.about.comment:
            lines.append(head)
            head = ""
        for line in textwrap.wrap(each.about.comment, LINE - column - 2, break_on_hyphens=False) or [""]:
            lines.append(f"{head.ljust(column)}# {line}" if line else head)
            head = ""
        if each.inner:
            lines.append(page(each.inner, f"{indent}  "))
        lines += [f"{indent}  - {as_yaml(item)}" for item in block]
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _is_block(value: Any) -> bool:
    """Whether a value is a list of mappings, which needs a line for each."""
    return isinstance(value, list) and any(isinstance(item, Mapping) for item in value)


def as_yaml(value: Any) -> str:
    """A plain value as YAML writes it, on one line."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {as_yaml(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, str) and re.search(r"[,:#{}\[\]\n]", value):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:g}" if isinstance(value, float) else str(value)
