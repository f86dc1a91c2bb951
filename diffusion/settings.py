"""Settings, each declared once: as a field of a parameter dataclass, with its default, its comment, and what
follows from what it is.

    steps: int = setting(1000, "optimiser steps")
    device: str | None = setting(None, "null takes a GPU where there is one", kind="rounding")

From these fields derive the checks of a configuration (`make_params`), the pages of --help, the quoting of
the command line, what a picture records, and the names of folders and keys of caches.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from itertools import chain
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

LINE, WIDE = 140, 34  # characters of a line on the page of --help, and of what stands before the comments
Kind = Literal["pixels", "rounding", "place", "count", "weights", "picture"]
"""What a setting changes.

pixels    what comes out
rounding  by rounding only: what computes, and how
place     nothing of it: where results go, and what the work may take
count     how many there are, in all and at once
weights, picture  the path of a model, of a picture that is read: what lies there counts, not where
"""


@dataclass(frozen=True)
class About:
    """What a setting is, beside its type.

    text     text or a path, taken as it stands on a command line: commas, brackets and "=" are a part of it
    heading  of the settings from here on, on the page of --help
    members  of a mapping that takes others too: a dataclass of those that it usually has
    swept    a text of which commas part the values of a sweep
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
    """A field of a parameter dataclass; see `About`. The default ... makes it required, and one that is
    called makes a fresh value."""
    own = About(
        comment, kind, text or ("path" if kind in ("weights", "picture") else ""), heading, members, swept
    )
    if default is ...:
        return field(metadata={"about": own})
    return (
        field(default_factory=default, metadata={"about": own})
        if callable(default)
        else field(default=default, metadata={"about": own})
    )


@dataclass(frozen=True)
class Setting:
    """A setting as a program shows it: its name, its default in plain values ("???" for a required one), and
    those within it.

    type  its annotation
    """

    name: str
    default: Any
    about: About
    type: Any = Any
    inner: tuple[Setting, ...] = ()

    @property
    def flat(self) -> Iterator[Setting]:
        """Itself, and all within it."""
        yield self
        for each in self.inner:
            yield from each.flat


def settings(params: type[Any]) -> tuple[Setting, ...]:
    """All settings of a parameter dataclass, its own first, then those that it shares with others by a
    base."""
    kinds = get_type_hints(params)
    shared = {each.name for base in params.__bases__ if is_dataclass(base) for each in fields(base)}
    return tuple(
        _setting(each, kinds[each.name])
        for each in sorted(fields(params), key=lambda each: each.name in shared)
    )


def about(each: Field[Any]) -> About:
    """What a field says of itself; of one that is declared without `setting`, nothing."""
    found: About = each.metadata.get("about", About())
    return found


def _setting(each: Field[Any], kind: Any) -> Setting:
    own = about(each)
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    within = own.members or next(
        (part for part in parts if isinstance(part, type) and is_dataclass(part)), None
    )
    inner: tuple[Setting, ...] = settings(within) if within else ()
    default, fresh = each.default, cast(Any, each.default_factory)
    if default is MISSING:
        default = "???" if fresh is MISSING else fresh()
    if is_dataclass(default):  # those within it as it has them
        inner = tuple(replace(part, default=_plain(getattr(default, part.name))) for part in inner)
    return Setting(each.name, _plain(default), own, kind, inner)


def merged(*several: Iterable[Setting]) -> tuple[Setting, ...]:
    """The settings of several, each name once, as it comes first."""
    found: dict[str, Setting] = {}
    for each in chain(*several):
        found.setdefault(each.name, each)
    return tuple(found.values())


def with_null_defaults(of: Iterable[Setting]) -> tuple[Setting, ...]:
    """The same with null for every default, of a program that leaves what is not given to something else."""

    def without(each: Setting) -> Setting:
        default = each.default if isinstance(each.default, dict) else None
        return replace(each, default=default, inner=with_null_defaults(each.inner))

    return tuple(map(without, of))


def values(of: Iterable[Setting]) -> dict[str, Any]:
    """Their defaults, by name."""
    return {each.name: values(each.inner) if each.inner else each.default for each in of}


def of_kind(params: type[Any], *kinds: Kind) -> tuple[str, ...]:
    """The settings of a parameter dataclass that are of these kinds."""
    return tuple(each.name for each in fields(params) if about(each).kind in kinds)


def recorded(params: type[Any]) -> tuple[str, ...]:
    """The settings that an image records: all but places and counts."""
    left_out = of_kind(params, "place", "count")
    return tuple(each.name for each in fields(params) if each.name not in left_out)


def find(of: Iterable[Setting], key: str, within: str = "") -> dict[str, Setting]:
    """The settings of that name by where they stand: for "seed", or "train.seed", {"train.seed": ...}."""
    found: dict[str, Setting] = {}
    for each in of:
        place = f"{within}{each.name}"
        found |= {place: each} if f".{place}".endswith(f".{key}") else {}
        found |= find(each.inner, key, f"{place}.")
    return found


def page(of: Iterable[Setting], indent: str = "") -> str:
    """Settings with their defaults and comments, as YAML reads: what --help prints."""
    of = tuple(of)
    heads = {
        each.name: f"{indent}{each.name}:" + ("" if each.inner else f" {_as_yaml(each.default)}")
        for each in of
    }
    column = 2 + max((len(head) for head in heads.values() if len(head) <= WIDE), default=WIDE)
    lines: list[str] = []
    for each in of:
        if each.about.heading:
            lines += ["", f"# {each.about.heading} ".ljust(LINE, "-")]
        head = heads[each.name]
        if len(head) + 2 > column and each.about.comment:
            lines.append(head)
            head = ""
        for line in textwrap.wrap(each.about.comment, LINE - column - 2) or [""]:
            lines.append(f"{head.ljust(column)}# {line}" if line else head)
            head = ""
        if each.inner:
            lines.append(page(each.inner, f"{indent}  "))
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value


def _as_yaml(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_as_yaml(inner)}' for name, inner in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
