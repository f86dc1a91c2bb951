"""Docstrings in this library's style, made into reStructuredText for the API reference.

They are plain text for people who read the source: paragraphs, lines "name  what it is" with a column of
                                                                             names, and formulas set apart by
four spaces. None of it has markup but `names` in backticks.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

from site_pages import public_names

ENTRY = re.compile(r"(\S.{0,40}?)\s{2,}(\S.*)")  # a name of the column and what it is
MARKUP = re.compile(r"([*|\\]|_(?!\w))")  # what reStructuredText would read as markup


def read_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """As Sphinx calls it: `lines` are changed in place. What is said of an object's class stands there
    alone."""
    if what == "data" and "\n".join(lines).strip() == (inspect.getdoc(type(obj)) or "").strip():
        lines[:] = [f"A `{type(obj).__name__}`."]
    lines[:] = restructured(lines, name.split(".")[0])


def restructured(lines: list[str], package: str) -> list[str]:
    """The lines of a docstring of that package as reStructuredText."""
    result: list[str] = []
    before = ""  # what the line before was: "", "text", "entry" or "formula"
    for line in lines:
        indented = line.startswith("  ")
        entry = None if indented else ENTRY.fullmatch(line)
        if not line.strip():
            result.append("")
            before = "formula" if before == "formula" else ""
        elif indented and before == "entry":
            result.append(f"    {_inline(line.strip(), package)}")
        elif indented and before in ("", "formula"):
            result += [line] if before == "formula" else ["::", "", line]
            before = "formula"
        elif entry is not None:
            result += [""] * (before in ("text", "formula")) + [
                _name(entry[1]),
                f"    {_inline(entry[2], package)}",
            ]
            before = "entry"
        else:
            result += [""] * (before in ("entry", "formula")) + [_inline(line.strip(), package)]
            before = "text"
    return [*result, ""]


def _name(text: str) -> str:
    """The names of an entry, as code: "shape, dtype"."""
    return f"``{text.replace('`', '')}``"


def _inline(text: str, package: str) -> str:
    """Names in backticks as code, which leads to what it names; all else as it stands."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick alone
        return MARKUP.sub(r"\\\1", text.replace("`", "'"))
    return "".join(
        _code(part, package) if i % 2 else MARKUP.sub(r"\\\1", part) for i, part in enumerate(parts)
    )


def _code(text: str, package: str) -> str:
    known = public_names()
    target = known.get((package, text)) or next(
        (path for (_, name), path in known.items() if name == text), None
    )
    return rf"\ :py:obj:`{text} <{target}>`\ " if target else rf"\ ``{text}``\ "
