"""Files of captions or prompts, and which of them belongs to which picture."""

from __future__ import annotations

import csv
import difflib
import io
import json
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion.messages import one_line
from diffusion.spec import check_names
from models.files.text import read_text
from train.data.names import nfc
from train.data.pairing import order_by_number

KEYS = ("prompt", "text", "caption")  # the names of a prompt's entry
MAX_CAPTION, MAX_LIST = 2**20, 2**28  # bytes of one caption's file, and of a list of captions
MAX_COMPARED = 10_000  # names that a wrong one is compared with, to suggest the nearest
Listed = Sequence[
    tuple[str | None, str]
]  # the name of a picture, None where only the order says it, and its prompt
Prompts = str | Path | Sequence[str] | Mapping[str, str]


def prompts_for(prompts: Prompts, names: Sequence[str], files: Sequence[str] = ()) -> list[str]:
    """One prompt for each picture, by the names of the pictures: from a file (`read_prompts`), a mapping
    {"cat.png": "a cat"}, or a list.

    files  other names of the same pictures, in the same order

    ValueError for prompts that do not fit, and for a list if the names are not in the order of their numbers
    (`order_by_number`).
    """
    if isinstance(prompts, (str, Path)):
        return read_prompts(prompts, names, files)
    if isinstance(prompts, Mapping):
        return _by_name("the mapping of prompts", list(prompts.items()), names, files)
    _check_filled("the prompts", prompts)
    _check_number("the list of prompts", len(prompts), len(names))
    if order_by_number(names) != list(range(len(names))):
        raise ValueError(
            f"{_doubt('the list of prompts', names)}: give them by name, {{{names[0]!r}: prompt, ...}}"
        )
    return list(prompts)


def read_prompts(path: str | Path, names: Sequence[str], files: Sequence[str] = ()) -> list[str]:
    """The prompts in a file, one for each of these names and in their order; `files` as in `prompts_for`.

    .txt           one per line, in the order of the number in the names: 1-a.png, 2-b.png, ..., 10-j.png
    .jsonl, .json  {"file_name": "cat.png", "prompt": "a cat"}, one per line or in a list; "text" or "caption"
                   will do for "prompt". A .json file may also be {"cat.png": "a cat", ...}
    .csv           columns file_name and prompt, or prompt alone, in order as in .txt

    FileNotFoundError, or ValueError in one line: a picture without a prompt or with two, a prompt without a
    picture, an empty one; and prompts without names if no number in the names gives the order
    (`order_by_number`), since a picture could get another's prompt.
    """
    path, listed = Path(path), _listed(Path(path))
    prompts = [prompt for _, prompt in listed]
    if any(name is not None for name, _ in listed):
        return _by_name(str(path), [(str(name), prompt) for name, prompt in listed], names, files)
    _check_number(str(path), len(prompts), len(names))
    order = order_by_number(names)
    if order is None:
        raise ValueError(
            f'{_doubt(str(path), names)}: name them in a .jsonl file, {{"file_name": "{names[0]}", '
            f'"prompt": ...}}, or a .csv file, '
            "or put captions beside them"
        )
    return [prompt for _, prompt in sorted(zip(order, prompts, strict=True))]


def _doubt(where: str, names: Sequence[str]) -> str:
    return (
        f"{where} names no pictures, and no number in {names[0]}, {names[1]}, ... says for certain which "
        "comes first"
    )


def list_prompts(path: str | Path) -> list[str]:
    """All prompts of such a file, in its order, to draw pictures from. Errors as in `read_prompts`."""
    return [prompt for _, prompt in _listed(Path(path))]


def _listed(path: Path) -> Listed:
    if not path.is_file():
        raise FileNotFoundError(f"no such file of prompts: {path}")
    check_names("kind of file with prompts", [path.suffix.lower()], READERS)
    listed = READERS[path.suffix.lower()](path)
    _check_filled(str(path), [prompt for _, prompt in listed])
    return listed


def read_metadata(path: Path, names: Sequence[str]) -> dict[str, str]:
    """The captions of a metadata.jsonl, {"file_name": "cat.png", "text": "a cat"}, by the pictures' names.
    Errors as in `read_prompts`."""
    return _find_pictures(str(path), _from_jsonl(path, ("text",)), names)


def _by_name(
    where: str, listed: Sequence[tuple[str, str]], names: Sequence[str], files: Sequence[str]
) -> list[str]:
    found = _find_pictures(where, listed, names, files)
    if lacking := [name for name in names if name not in found]:
        raise ValueError(
            f"{where} has {len(found)} prompts for {len(names)} pictures, and none for {lacking[0]}: add "
            "what is missing"
        )
    _check_filled(where, [found[name] for name in names])
    return [found[name] for name in names]


def _find_pictures(
    where: str, listed: Sequence[tuple[str, str]], names: Sequence[str], files: Sequence[str] = ()
) -> dict[str, str]:
    """The prompts by the names of their pictures. ValueError for a picture that is not there, and for two
    prompts of one picture."""
    found: dict[str, str] = {}
    written_names, named = [name for name, _ in listed], dict(zip(files, names, strict=False))
    by_name, by_file = find_names(written_names, names), find_names(written_names, files)
    for (written, prompt), same, file in zip(listed, by_name, by_file, strict=True):
        name = same or named.get(file or "")
        if name is None:
            alike = [each for each in names if each.casefold() == written.casefold()]
            near = alike or difflib.get_close_matches(written[:200], names[:MAX_COMPARED], n=1)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else f"the first is {names[0]}"
                if names
                else "there are none"
            )
            raise ValueError(
                f"{where} has a prompt for {one_line(written)}, which is none of the {len(names)} pictures; "
                f"{hint}"
            )
        if name in found:
            raise ValueError(f"{where} has {len(listed)} prompts, and more than one for {name}: keep one")
        found[name] = prompt
    return found


def find_names(wanted: Iterable[str], names: Sequence[str]) -> list[str | None]:
    """The name that each wanted one stands for, None if there is none: "./é.png" is "é.png", in any Unicode
    form."""
    forms = Counter(map(nfc, names))
    index = {form: name for name in names if forms[form := nfc(name)] == 1} | {name: name for name in names}
    plain = (posixpath.normpath(name) for name in wanted)
    return [index.get(name) or index.get(nfc(name)) for name in plain]


def _check_filled(where: str, prompts: Sequence[str]) -> None:
    if empty := [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        raise ValueError(
            f"prompt {empty[0]} of the {len(prompts)} in {where} is empty: write one, or leave out its "
            "picture"
        )


def _check_number(where: str, prompts: int, pictures: int) -> None:
    if prompts != pictures:
        raise ValueError(
            f"{where} has {prompts} prompts for {pictures} pictures: give one each, or a .jsonl file that "
            "names the pictures"
        )


def _from_txt(path: Path) -> Listed:
    lines = read_text(path, MAX_LIST).split(
        "\n"
    )  # not splitlines, which also splits at characters within a prompt
    while lines and not lines[-1].strip():
        lines.pop()
    return [(None, line.strip()) for line in lines]


def _from_jsonl(path: Path, keys: Sequence[str] = KEYS) -> list[tuple[str, str]]:
    lines = [
        (f"{path}, line {number}", line)
        for number, line in enumerate(read_text(path, MAX_LIST).split("\n"), 1)
        if line.strip()
    ]
    return [_entry(where, read_json(where, line), keys) for where, line in lines]


def _from_json(path: Path) -> Listed:
    content = read_json(str(path), read_text(path, MAX_LIST))
    if isinstance(content, Mapping) and all(isinstance(prompt, str) for prompt in content.values()):
        return [(str(name), prompt.strip()) for name, prompt in content.items()]
    if not isinstance(content, list):
        raise ValueError(
            f'{path} must hold {{"cat.png": "a cat", ...}} or a list of {{"file_name": "cat.png", "prompt": '
            f'"a cat"}}'
        )
    return [_entry(f"{path}, entry {number}", entry) for number, entry in enumerate(content, 1)]


def _from_csv(path: Path) -> Listed:
    rows = csv.DictReader(io.StringIO(read_text(path, MAX_LIST), newline=""), restval="", strict=True)
    try:
        columns = rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
        entries = list(rows)
    except csv.Error as error:
        raise ValueError(f"{path} is no comma-separated text: {error}") from None
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path} has two columns of one name: {', '.join(columns)[:200]}")
    if columns != ["prompt"] and not {"file_name", "prompt"} <= set(columns):
        raise ValueError(
            f"{path} must have the columns file_name and prompt, or prompt alone, not "
            f"{', '.join(columns)[:200] or 'none'}"
        )
    if longer := [number for number, entry in enumerate(entries, 1) if None in entry]:
        raise ValueError(
            f"row {longer[0]} of {path} has more than {len(columns)} columns: put quotes around prompts "
            "with commas in them"
        )
    return [(entry.get("file_name"), entry["prompt"].strip()) for entry in entries]


def read_json(where: str, text: str) -> Any:
    """The value of a JSON text. ValueError that begins with `where` if it is not JSON, or has two entries of
    one name."""
    try:
        return json.loads(text, object_pairs_hook=_check_unique_names)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from None


def _check_unique_names(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary. ValueError for two entries of the same name."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"two entries for {one_line(name)}")
        found[name] = value
    return found


def _entry(where: str, entry: Any, keys: Sequence[str] = KEYS) -> tuple[str, str]:
    found = [key for key in keys if key in entry] if isinstance(entry, Mapping) else []
    if len(found) > 1:
        raise ValueError(f"{where} has both {found[0]} and {found[1]}: keep one")
    if not found or not isinstance(entry.get("file_name"), str) or not isinstance(entry[found[0]], str):
        raise ValueError(
            f'{where} must be like {{"file_name": "cat.png", "{keys[0]}": "a cat"}}, not '
            f"{json.dumps(entry)[:80]}"
        )
    return entry["file_name"], entry[found[0]].strip()


READERS: dict[str, Callable[[Path], Listed]] = {
    ".txt": _from_txt,
    ".jsonl": _from_jsonl,
    ".json": _from_json,
    ".csv": _from_csv,
}
