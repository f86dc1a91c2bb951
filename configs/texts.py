"""Settings that are text or paths are taken literally, with their commas, brackets, quotes and "=".

Everything after "=" is the text, except quotes around all of it, null, and the name of an existing file or
folder, whatever it looks like. Otherwise, if a setting takes them,

    [a, b]        is a list of texts, if closed at the very end
    {run: a}      is a mapping, if closed at the very end and with a colon; its texts are taken literally too
    a,b           are values of a sweep (-m); choice(a,b) are for every text
    ${train.seed} in the output folder is the value of that setting; ${oc.env:HOME} is of the environment
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

NAME = "name"  # at the top the text of a row; within a mapping the name of what it describes
_ELEMENT = re.compile(r"""\s*(?:'[^']*'|"[^"]*")\s*(?=,|$)|(?:\{(?:[^{}]|\{[^{}]*\})*\}|\[[^\]]*\]|[^,])+""")


class Texts:
    """The text settings of a program, by the last part of their names: run, model.from, samples.run, ..."""

    def __init__(self, settings: Iterable[Setting], output: str) -> None:
        """output: the setting of the folder or file of results."""
        text = [each for part in settings for each in part.flat if each.about.text]
        self.output, self.names = output, {each.name for each in text}
        self.paths = {each.name for each in text if each.about.text == "path"}
        self._swept = {each.name for each in text if each.about.swept}
        self._lists = {each.name for each in text if _takes(each.type, tuple, list)}
        self._mappings = {each.name for each in text if _takes(each.type, dict)}
        self._numbers = {each.name for each in text if _takes(each.type, int)}
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

        settings  the names that ${...} may refer to in the output folder
        """
        key, given, value = override.partition("=")
        name = key.lstrip("+")
        if not given or name.startswith("~"):
            return override
        if name not in self:
            return f"{key}={self._within(value)}" if value[:1] + value[-1:] in ("{}", "[]") else override
        settings = settings if name == self.output else ()
        return f"{key}={self._value(name.rpartition('.')[2], value, settings)}"

    def swept(self, key: str, values: str) -> str:
        """The values of a setting in `hydra.sweeper.params` of a file, in Hydra's grammar."""
        return self.in_grammar(f"{key}=choice({values})").partition("=")[2] if key in self else values

    def empty_path(self, config: Any, key: str = "") -> str | None:
        """The first setting whose path is an empty text, as $UNSET leaves it, or None.

        As a path it would be the working folder.
        """
        if isinstance(config, Mapping):
            inner = (self.empty_path(value, f"{key}.{name}".strip(".")) for name, value in config.items())
            return next(filter(None, inner), None)
        values = config if isinstance(config, list) else [config]
        return key if key.rpartition(".")[2] in self.paths and "" in values else None

    def _value(self, name: str, value: str, settings: Iterable[str] = ()) -> str:
        """The value of a text setting."""
        number = name in self._numbers and re.fullmatch(r"-?\d+", value)
        if value == "null" or number:
            return value
        if Path(value).name and _exists(value):
            return _quoted(value)
        if value.startswith("choice(") and value.endswith(")"):
            elements = _elements(value[len("choice(") : -1])
            return ",".join(self._value(name, element, settings) for element in elements)
        if name in self._mappings and _closes(value, "{}") and ":" in value:
            return self._within(value)
        if name in self._lists and _closes(value, "[]"):
            return f"[{','.join(self._value(name, element) for element in _elements(value[1:-1]))}]"
        if name in self._swept and len(several := list(_elements(value))) > 1:
            return ",".join(self._value(name, element) for element in several)
        return _quoted(_unquoted(value), settings)

    def _within(self, value: str) -> str:
        """A mapping, or a list of mappings, with its texts in quotes."""
        return self._member.sub(
            lambda member: member["head"] + self._value(member["name"], member["value"]), value
        )


@cache
def texts(program: str) -> Texts:
    """The text settings of a program, by its name."""
    return Texts(PROGRAMS[program].texts(), PROGRAMS[program].output)


def _takes(annotation: Any, *kinds: type) -> bool:
    """Whether an annotation admits one of these types."""
    return any(part in kinds or get_origin(part) in kinds for part in (annotation, *get_args(annotation)))


def file_names(texts: Sequence[str]) -> list[str]:
    """A different folder name for each of these texts."""
    names = [re.sub(r"[^\w.,=+-]+", "-", text).strip("-.+")[:100] for text in texts]
    pairs = zip(names, texts, strict=True)
    return [f"{name}-{_digest(text)}" if names.count(name) > 1 else name for name, text in pairs]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _elements(text: str) -> Iterator[str]:
    """The parts between commas, except those in quotes, brackets and braces."""
    return (element[0].strip() for element in _ELEMENT.finditer(text))


def _closes(value: str, pair: str) -> bool:
    """Whether the bracket at the beginning closes at the very end."""
    depth = 0
    for place, letter in enumerate(value):
        depth += (letter == pair[0]) - (letter == pair[1])
        if depth == 0:
            return place == len(value) - 1 > 0
    return False


def _exists(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):  # not a possible file name
        return False


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" and value.count(value[0]) == 2
    return value[1:-1] if quoted else value


def _quoted(text: str, settings: Iterable[str] = ()) -> str:
    """In quotes, which Hydra does not take apart; ${ would still be OmegaConf's."""
    names = "|".join(map(re.escape, settings))
    references = rf"(?!(?:{names})\}}|oc\.\w+:)" if names else ""
    escaped = re.sub(rf"(\\*)\$\{{{references}", r"\1\1\\${", text)
    return str(QuotedString(escaped, Quote.single).with_quotes())
