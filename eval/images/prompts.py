"""Files of prompts, and which picture each belongs to."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from diffusion.spec import check_names

KEYS = ("prompt", "text", "caption")  # the names that a prompt goes by
Listed = list[tuple[str | None, str]]  # the name of a picture, None where only the order says it, and its prompt


class Captioned:
    """A source with captions of its own, which are read when they are first asked for: most figures need none."""

    _given: Sequence[str] | None = None

    @property
    def prompts(self) -> Sequence[str] | None:
        """The caption of each picture: those that were set, or else its own; None where there are none."""
        return self._own if self._given is None else self._given

    @prompts.setter
    def prompts(self, prompts: Sequence[str] | None) -> None:
        self._given = prompts

    @cached_property
    def _own(self) -> Sequence[str] | None:
        return self._captions()

    def _captions(self) -> Sequence[str] | None:
        raise NotImplementedError


def prompts_for(prompts: str | Path | Sequence[str], names: Sequence[str]) -> list[str]:
    """One prompt per picture of these names, from a file (`read_prompts`) or as they are. ValueError where they do not fit."""
    if isinstance(prompts, (str, Path)):
        return read_prompts(prompts, names)
    _check_filled("the prompts", prompts)
    _check_number("the list of prompts", len(prompts), len(names))
    return list(prompts)


def read_prompts(path: str | Path, names: Sequence[str]) -> list[str]:
    """The prompts of pictures of these names, in their order.

    .txt           one per line, in the order of the names
    .jsonl, .json  {"file_name": "cat.png", "prompt": "a cat"}, one per line or in a list; "text" or "caption" will do for "prompt".
                   A .json file may also be {"cat.png": "a cat", ...}
    .csv           columns file_name and prompt, or prompt alone, in the order of the names

    FileNotFoundError, or ValueError in one line: pictures without a prompt, prompts without a picture, empty ones, two for one picture.
    Prompts in order are also refused where sorting by text puts 10.png before 2.png: they were most likely written in the order of the
    numbers, and every picture would silently be held against another's prompt.
    """
    path, listed = Path(path), _listed(Path(path))
    prompts = [prompt for _, prompt in listed]
    if any(name is not None for name, _ in listed):
        return _by_name(path, [(str(name), prompt) for name, prompt in listed], names)
    _check_number(str(path), len(prompts), len(names))
    _check_order(path, names)
    return prompts


def list_prompts(path: str | Path) -> list[str]:
    """All prompts of such a file, in its own order, for pictures that are yet to be drawn. Errors as from `read_prompts`."""
    return [prompt for _, prompt in _listed(Path(path))]


def _listed(path: Path) -> Listed:
    if not path.is_file():
        raise FileNotFoundError(f"no such file of prompts: {path}")
    check_names("kind of file with prompts", [path.suffix.lower()], READERS)
    listed = READERS[path.suffix.lower()](path)
    _check_filled(str(path), [prompt for _, prompt in listed])
    return listed


def _by_name(path: Path, listed: list[tuple[str, str]], names: Sequence[str]) -> list[str]:
    twice = [name for name, times in Counter(name for name, _ in listed).items() if times > 1]
    if twice:
        raise ValueError(f"{path} has {len(listed)} prompts, and more than one for {twice[0]}: keep one")
    found, there = dict(listed), set(names)
    if strange := [name for name in found if name not in there]:
        near = difflib.get_close_matches(strange[0], names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the first is {names[0]}" if names else "there are none"
        raise ValueError(f"{path} has a prompt for {strange[0]}, which is none of the {len(names)} pictures; {hint}")
    if lacking := [name for name in names if name not in found]:
        raise ValueError(f"{path} has {len(found)} prompts for {len(names)} pictures, and none for {lacking[0]}: add what is missing")
    return [found[name] for name in names]


def _check_filled(where: str, prompts: Sequence[str]) -> None:
    if empty := [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        raise ValueError(f"prompt {empty[0]} of the {len(prompts)} in {where} is empty: write one, or leave out its picture")


def _check_number(where: str, prompts: int, pictures: int) -> None:
    if prompts != pictures:
        raise ValueError(f"{where} has {prompts} prompts for {pictures} pictures: give one each, or a .jsonl file that names the pictures")


def _check_order(path: Path, names: Sequence[str]) -> None:
    """ValueError where names that differ in nothing but numbers do not come in the order of these."""
    stems = [str(Path(name).with_suffix("")) for name in names]
    numbers = [[int(digits) for digits in re.findall(r"\d+", stem)] for stem in stems]
    if len({re.sub(r"\d+", "#", stem) for stem in stems}) > 1:
        return
    for i in range(1, len(names)):
        if numbers[i] < numbers[i - 1]:
            raise ValueError(
                f"{path} names no pictures, and {names[i - 1]} comes before {names[i]}, so that the order of the prompts is in doubt: "
                'name them in a .jsonl file, {"file_name": "' + names[i] + '", "prompt": ...}'
            )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from None


def _from_txt(path: Path) -> Listed:
    lines = _text(path).split("\n")  # not splitlines, which also splits at characters within a prompt
    return [(None, line.strip()) for line in (lines[:-1] if not lines[-1].strip() else lines)]


def _from_jsonl(path: Path) -> Listed:
    lines = [(number, line) for number, line in enumerate(_text(path).split("\n"), 1) if line.strip()]
    return [_entry(f"{path}, line {number}", _json(f"{path}, line {number}", line)) for number, line in lines]


def _from_json(path: Path) -> Listed:
    content = _json(str(path), _text(path))
    if isinstance(content, Mapping) and all(isinstance(prompt, str) for prompt in content.values()):
        return [(str(name), prompt.strip()) for name, prompt in content.items()]
    if not isinstance(content, list):
        raise ValueError(f'{path} must hold {{"cat.png": "a cat", ...}} or a list of {{"file_name": "cat.png", "prompt": "a cat"}}')
    return [_entry(f"{path}, entry {number}", entry) for number, entry in enumerate(content, 1)]


def _from_csv(path: Path) -> Listed:
    rows = csv.DictReader(io.StringIO(_text(path), newline=""), restval="", strict=True)
    try:
        columns = rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
        entries = list(rows)
    except csv.Error as error:
        raise ValueError(f"{path} is no comma-separated text: {error}") from None
    if columns != ["prompt"] and not {"file_name", "prompt"} <= set(columns):
        raise ValueError(f"{path} must have the columns file_name and prompt, or prompt alone, not {', '.join(columns) or 'none'}")
    if longer := [number for number, entry in enumerate(entries, 1) if None in entry]:
        raise ValueError(f"row {longer[0]} of {path} has more than {len(columns)} columns: put quotes around prompts with commas in them")
    return [(entry.get("file_name"), entry["prompt"].strip()) for entry in entries]


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from None


def _entry(where: str, entry: Any) -> tuple[str, str]:
    keys = [key for key in KEYS if key in entry] if isinstance(entry, Mapping) else []
    if len(keys) > 1:
        raise ValueError(f"{where} has both {keys[0]} and {keys[1]}: keep one")
    if not keys or not isinstance(entry.get("file_name"), str) or not isinstance(entry[keys[0]], str):
        raise ValueError(f'{where} must be like {{"file_name": "cat.png", "prompt": "a cat"}}, not {json.dumps(entry)[:80]}')
    return entry["file_name"], entry[keys[0]].strip()


READERS: dict[str, Callable[[Path], Listed]] = {".txt": _from_txt, ".jsonl": _from_jsonl, ".json": _from_json, ".csv": _from_csv}
