"""Reads the small part of YAML that configurations beside weights need: mappings, lists, texts and numbers.

Aliases, merge keys and tags are refused, with which a few bytes can expand to gigabytes; so are texts that would take long to parse.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from diffusion.messages import one_line

MAX_TEXT = 2**13  # characters; published configurations have 2 kB
MAX_EVENTS = 800  # values, and ends of mappings and lists; published ones have 300
MAX_DEPTH = 16  # levels of nesting; published ones have 8
MAX_BRACKETS = 100  # [ and {; published ones have 20
WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
NUMBER = re.compile(r"[-+]?(\d{1,18}|(?=\.?\d)\d{0,99}\.?\d{0,99}(e[-+]?\d{1,4})?)", re.ASCII | re.IGNORECASE)


def read(text: str) -> Any:
    """The first document of a text, in less than 0.1 s. ValueError where it is invalid or exceeds the limits above."""
    if len(text) > MAX_TEXT:
        raise ValueError(f"more than {MAX_TEXT} characters")
    if sum(map(text.count, "[{")) > MAX_BRACKETS:  # PyYAML takes seconds for thousands of them before it says anything
        raise ValueError(f"more than {MAX_BRACKETS} brackets")
    try:
        events = _check_events(yaml.parse(text, Loader=yaml.SafeLoader))
        return _value(next(events), events) if isinstance(next(events), yaml.DocumentStartEvent) else None
    except (yaml.YAMLError, OverflowError) as error:  # the latter for "\\UFFFFFFFF"
        raise ValueError(one_line(error)) from None


def _check_events(events: Iterator[Any]) -> Iterator[Any]:
    """The events from the document's start on. ValueError for too many, too deep nesting, aliases and tags."""
    next(events)  # the stream's start
    depth = 0
    for count, event in enumerate(events):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if count > MAX_EVENTS or depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_EVENTS} values, or more than {MAX_DEPTH} levels")
        if getattr(event, "anchor", None) or getattr(event, "tag", None):
            raise ValueError("aliases and tags are not read")
        yield event


def _value(event: Any, events: Iterator[Any]) -> Any:
    if isinstance(event, yaml.ScalarEvent):
        return _scalar(event.value) if event.implicit[0] else event.value
    values: list[Any] = []
    while not isinstance(event := next(events), yaml.CollectionEndEvent):
        values.append(_value(event, events))
    if not isinstance(event, yaml.MappingEndEvent):
        return values
    names = values[::2]
    if not all(isinstance(name, str | int | float | None) for name in names) or "<<" in names:
        raise ValueError("names must be texts, and merge keys are not read")
    return dict(zip(names, values[1::2], strict=True))


def _scalar(text: str) -> Any:
    """What a text without quotes means: 1e-4 is a number, which PyYAML takes for a text."""
    if (word := text.lower()) in WORDS:
        return WORDS[word]
    if not NUMBER.fullmatch(text):
        return text
    return int(text) if text.lstrip("+-").isdigit() else float(text)
