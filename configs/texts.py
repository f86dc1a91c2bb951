"""Settings that are text or paths: taken as they stand, though Hydra's grammar would take them apart at
commas, brackets, quotes or "=".

Everything behind the "=" is the text, but for: quotes around all of it, null, and a name that stands for the
file or folder of that name whatever else it looks like. Otherwise, where a setting takes them,

    [a, b]        closed at the very end, is a list, and each of its members a text
    {run: a}      closed at the very end and with a colon, is a mapping, and those of its members that are
                  texts are taken as they stand too
    a,b           are the values of a sweep (-m); choice(a,b) are so for every text
    ${train.seed} in the folder that a program writes to is the value of that setting, ${oc.env:HOME} of the
    environment
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

from hydra.core.override_parser.types import Quote, QuotedString

from configs.programs import PROGRAMS
from diffusion.settings import Setting

NAME = "name"  # of a row of results; within a mapping it is that of what the mapping describes
_ELEMENT = re.compile(r"""\s*(?:'[^']*'|"[^"]*")\s*(?=,|$)|(?:\{(?:[^{}]|\{[^{}]*\})*\}|\[[^\]]*\]|[^,])+""")


class Texts:
    """The settings of a program that are text, by the last part of their names, wherever they stand: run,
    model.from, samples.run, ..."""

    def __init__(self, settings: Iterable[Setting], written: str) -> None:
        """written: the setting of the folder or file that results go to."""
        text = [each for part in settings for each in part.flat if each.about.text]
        self.written, self.names = written, {each.name for each in text}
        self.paths = {each.name for each in text if each.about.text == "path"}
        self._swept = {each.name for each in text if each.about.swept}
        self._lists, self._mappings, self._numbers = (
            {each.name for each in text if _takes(each.type, *kinds)}
            for kinds in ((tuple, list), (dict,), (int,))
        )
        self._member = re.compile(
            rf"(?P<head>(?:^|[{{,])\s*(?P<name>{'|'.join(sorted(self.names - {NAME}))})\s*:\s*)"
            r"""(?P<value>'[^']*'|"[^"]*"|(?:\{[^{}]*\}|\[[^\]]*\]|.)+?)"""
            r"(?=\s*(?:,\s*[\w.]+\s*:|\}\s*(?:[,}\]]|$)))"
        )

    def __contains__(self, key: str) -> bool:
        *within, name = key.split(".")
        return name in self.names and not (within and name == NAME)

    def in_grammar(self, override: str, settings: Iterable[str] = ()) -> str:
        """An override as people write it, in Hydra's grammar.

        settings  the names that ${...} may refer to in the folder that is written to
        """
        key, given, value = override.partition("=")
        name = key.lstrip("+")
        if not given or name.startswith("~"):
            return override
        if name not in self:
            return f"{key}={self._within(value)}" if value[:1] + value[-1:] in ("{}", "[]") else override
        return (
            f"{key}={self._value(name.rpartition('.')[2], value, settings if name == self.written else ())}"
        )

    def swept(self, key: str, values: str) -> str:
        """The values of a setting in `hydra.sweeper.params` of a file, in Hydra's grammar."""
        return self.in_grammar(f"{key}=choice({values})").partition("=")[2] if key in self else values

    def empty_path(self, config: Any, key: str = "") -> str | None:
        """The first setting that is an empty text in place of a path, as $UNSET leaves it; None where there
        is none.

        Read as a path it would be the working folder.
        """
        if isinstance(config, Mapping):
            return next(
                (
                    found
                    for name, value in config.items()
                    if (found := self.empty_path(value, f"{key}.{name}".strip(".")))
                ),
                None,
            )
        values = config if isinstance(config, list) else [config]
        return key if key.rpartition(".")[2] in self.paths and "" in values else None

    def _value(self, name: str, value: str, settings: Iterable[str] = ()) -> str:
        """The value of a setting that is text."""
        number = name in self._numbers and re.fullmatch(r"-?\d+", value)
        if value == "null" or number:
            return value
        if Path(value).name and _exists(value):
            return _quoted(value)
        if value.startswith("choice(") and value.endswith(")"):
            return ",".join(
                self._value(name, element, settings) for element in _elements(value[len("choice(") : -1])
            )
        if name in self._mappings and _closes(value, "{}") and ":" in value:
            return self._within(value)
        if name in self._lists and _closes(value, "[]"):
            return f"[{','.join(self._value(name, element) for element in _elements(value[1:-1]))}]"
        if name in self._swept and len(elements := list(_elements(value))) > 1:
            return ",".join(self._value(name, element) for element in elements)
        return _quoted(_unquoted(value), settings)

    def _within(self, value: str) -> str:
        """A mapping, or a list of them, in which the members that are text are in quotes."""
        return self._member.sub(
            lambda found: found["head"] + self._value(found["name"], found["value"]), value
        )


@cache
def texts(program: str) -> Texts:
    """Those of a program, by its name."""
    return Texts(PROGRAMS[program].texts(), PROGRAMS[program].written)


def _takes(annotation: Any, *kinds: type) -> bool:
    """Whether an annotation admits one of these types."""
    return any(part in kinds or get_origin(part) in kinds for part in (annotation, *get_args(annotation)))


def file_names(texts: Sequence[str]) -> list[str]:
    """A name for each of these texts that a folder may have, and no two have."""
    names = [re.sub(r"[^\w.,=+-]+", "-", text).strip("-.+")[:100] for text in texts]
    return [
        f"{name}-{_digest(text)}" if names.count(name) > 1 else name
        for name, text in zip(names, texts, strict=True)
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _elements(text: str) -> Iterator[str]:
    """What stands between the commas, of which those in quotes, brackets and braces are none."""
    return (found[0].strip() for found in _ELEMENT.finditer(text))


def _closes(value: str, pair: str) -> bool:
    """Whether the bracket that a value begins with closes at its very end."""
    depth = 0
    for place, letter in enumerate(value):
        depth += (letter == pair[0]) - (letter == pair[1])
        if depth == 0:
            return place == len(value) - 1 > 0
    return False


def _exists(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # a text that no file could be named
        return False


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" and value.count(value[0]) == 2
    return value[1:-1] if quoted else value


def _quoted(text: str, settings: Iterable[str] = ()) -> str:
    """In quotes, in which Hydra takes nothing apart; ${ would still be OmegaConf's."""
    names = "|".join(map(re.escape, settings))
    kept = rf"(?!(?:{names})\}}|oc\.\w+:)" if names else ""
    return str(QuotedString(re.sub(rf"(\\*)\$\{{{kept}", r"\1\1\\${", text), Quote.single).with_quotes())
