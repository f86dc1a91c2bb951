"""Settings that are text or paths: taken as they stand, though Hydra's grammar would take them apart at commas, brackets, quotes or "=".

Everything behind the "=" is the text, but for: quotes around all of it, null, and a name that stands for the file or folder of that name
whatever else it looks like. Otherwise, where a setting takes them,

    [a, b]        closed at the very end, is a list, and each of its members a text
    {run: a}      closed at the very end and with a colon, is a mapping, and those of its members that are texts are taken as they stand too
    a,b           are the values of a sweep (-m); choice(a,b) are so for every text
    ${train.seed} in the folder that a program writes to is the value of that setting, ${oc.env:HOME} of the environment
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

# By the last part of their names, wherever they stand: run, model.from, data.folder, samples.run, extractors.clip.weights, ...
PATHS = (
    *("run", "weights", "from", "folder", "data", "teacher", "refiner", "image", "mask", "out"),
    *("samples", "reference", "training", "prompts", "inception", "report", "cache"),
)
ANYWHERE = (*PATHS, "prompt", "negative", "labels")
AT_THE_TOP = {"eval": ("name", "wandb"), "train": ("wandb_project",), "samplers": ()}
LISTS = ("weights", "refiner", "from", "labels")
MAPPINGS = ("samples", "reference", "training", "data")
SWEPT = ("samples", "reference", "training", "labels")  # by commas alone
NUMBERED = {"labels": r"-?\d+$", "samples": r"\[[\d\s,]+\]$"}  # numbers there are numbers
WRITTEN = {"train": "run", "samplers": "out", "eval": "out"}  # where a program's results go

_MEMBER = re.compile(
    rf"(?P<head>(?:^|[{{,])\s*(?P<name>{'|'.join(ANYWHERE)})\s*:\s*)"
    r"""(?P<value>'[^']*'|"[^"]*"|(?:\{[^{}]*\}|\[[^\]]*\]|.)+?)"""
    r"(?=\s*(?:,\s*[\w.]+\s*:|\}\s*(?:[,}\]]|$)))"
)
_ELEMENT = re.compile(r"""\s*(?:'[^']*'|"[^"]*")\s*(?=,|$)|(?:\{(?:[^{}]|\{[^{}]*\})*\}|\[[^\]]*\]|[^,])+""")


def is_text(program: str, key: str) -> bool:
    """Whether a setting is text or a path."""
    return key in AT_THE_TOP[program] or key.rpartition(".")[2] in ANYWHERE


def in_grammar(program: str, override: str, settings: Iterable[str] = ()) -> str:
    """An override as people write it, in Hydra's grammar.

    settings  the names that ${...} may refer to in the folder that is written to
    """
    key, given, value = override.partition("=")
    name = key.lstrip("+")
    if not given or name.startswith("~"):
        return override
    if not is_text(program, name):
        return f"{key}={_within(value)}" if value[:1] + value[-1:] in ("{}", "[]") else override
    return f"{key}={_value(name.rpartition('.')[2], value, settings if name == WRITTEN[program] else ())}"


def swept(program: str, key: str, values: str) -> str:
    """The values of a setting in `hydra.sweeper.params` of a file, in Hydra's grammar."""
    return in_grammar(program, f"{key}=choice({values})").partition("=")[2] if is_text(program, key) else values


def empty_path(config: Any, key: str = "") -> str | None:
    """The first setting that is an empty text in place of a path, as $UNSET leaves it; None where there is none.

    Read as a path it would be the working folder.
    """
    if isinstance(config, Mapping):
        return next((found for name, value in config.items() if (found := empty_path(value, f"{key}.{name}".strip(".")))), None)
    values = config if isinstance(config, list) else [config]
    return key if key.rpartition(".")[2] in PATHS and "" in values else None


def file_names(texts: Sequence[str]) -> list[str]:
    """A name for each of these texts that a folder may have, and no two have."""
    names = [re.sub(r"[^\w.,=+-]+", "-", text).strip("-.+")[:100] for text in texts]
    return [f"{name}-{_digest(text)}" if names.count(name) > 1 else name for name, text in zip(names, texts, strict=True)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _value(name: str, value: str, settings: Iterable[str] = ()) -> str:
    """The value of a setting that is text."""
    if value == "null" or (name in NUMBERED and re.match(NUMBERED[name], value)):
        return value
    if Path(value).name and _exists(value):
        return _quoted(value)
    if value.startswith("choice(") and value.endswith(")"):
        return ",".join(_value(name, element, settings) for element in _elements(value[len("choice(") : -1]))
    if name in MAPPINGS and _closes(value, "{}") and ":" in value:
        return _within(value)
    if name in LISTS and _closes(value, "[]"):
        return f"[{','.join(_value(name, element) for element in _elements(value[1:-1]))}]"
    if name in SWEPT and len(elements := list(_elements(value))) > 1:
        return ",".join(_value(name, element) for element in elements)
    return _quoted(_unquoted(value), settings)


def _within(value: str) -> str:
    """A mapping, or a list of them, in which the members that are text are in quotes."""
    return _MEMBER.sub(lambda found: found["head"] + _value(found["name"], found["value"]), value)


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
