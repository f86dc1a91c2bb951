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
MAX_COMPARED = 10_000  # names among which the nearest to a wrong one is searched
Entries = Sequence[
    tuple[str | None, str]
]  # the name of a picture, or None in a list without names; its prompt
Prompts = str | Path | Sequence[str] | Mapping[str, str]


def prompts_for(prompts: Prompts, names: Sequence[str], files: Sequence[str] = ()) -> list[str]:
    """One prompt per picture: from a file (`read_prompts`), a mapping {"cat.png": "a cat"}, or a list.

    names  of the pictures
    files  other names of the same pictures, in the same order

    ValueError for prompts that do not fit, and for a list if the names are not in the order of their numbers
    (`order_by_number`).
    """
    if isinstance(prompts, (str, Path)):
        return read_prompts(prompts, names, files)
    if isinstance(prompts, Mapping):
        return _match_names("the mapping of prompts", list(prompts.items()), names, files)
    _check_filled("the prompts", prompts)
    _check_number("the list of prompts", len(prompts), len(names))
    if order_by_number(names) != list(range(len(names))):
        problem = _describe_doubt("the list of prompts", names)
        raise ValueError(f"{problem}: give them by name, {{{names[0]!r}: prompt, ...}}")
    return list(prompts)


def read_prompts(path: str | Path, names: Sequence[str], files: Sequence[str] = ()) -> list[str]:
    """The prompts in a file, one per picture, in the order of their names; `files` as in `prompts_for`.

    .txt           one per line, in the order of the number in the names: 1-a.png, 2-b.png, ..., 10-j.png
    .jsonl, .json  {"file_name": "cat.png", "prompt": "a cat"}, one per line or in a list. "prompt" may be
                   called "text" or "caption". A .json file may also be {"cat.png": "a cat", ...}
    .csv           columns file_name and prompt, or prompt alone, in order as in .txt

    FileNotFoundError, or ValueError in one line for a picture with no prompt or two, a prompt without a
    picture, or an empty one. Also for prompts without names if no number in the pictures' names gives the
    order (`order_by_number`), since a picture could get another's prompt.
    """
    path, entries = Path(path), _read_entries(Path(path))
    prompts = [prompt for _, prompt in entries]
    if any(name is not None for name, _ in entries):
        return _match_names(str(path), [(str(name), prompt) for name, prompt in entries], names, files)
    _check_number(str(path), len(prompts), len(names))
    order = order_by_number(names)
    if order is None:
        raise ValueError(
            f'{_describe_doubt(str(path), names)}: name them in a .jsonl file, {{"file_name": "{names[0]}", '
            f'"prompt": ...}}, or a .csv file, or put captions beside them'
        )
    return [prompt for _, prompt in sorted(zip(order, prompts, strict=True))]


def _describe_doubt(where: str, names: Sequence[str]) -> str:
    first = f"{names[0]}, {names[1]}, ..."
    return f"{where} names no pictures, and no number in {first} says for certain which comes first"


def list_prompts(path: str | Path) -> list[str]:
    """All prompts of such a file, in its order, to sample from. Errors as in `read_prompts`."""
    return [prompt for _, prompt in _read_entries(Path(path))]


def _read_entries(path: Path) -> Entries:
    if not path.is_file():
        raise FileNotFoundError(f"no such file of prompts: {path}")
    check_names("kind of file with prompts", [path.suffix.lower()], READERS)
    entries = READERS[path.suffix.lower()](path)
    _check_filled(str(path), [prompt for _, prompt in entries])
    return entries


def read_metadata(path: Path, names: Sequence[str]) -> dict[str, str]:
    """The captions of a metadata.jsonl, {"file_name": "cat.png", "text": "a cat"}, by picture.

    Errors as in `read_prompts`.
    """
    return _index_by_picture(str(path), _read_jsonl(path, ("text",)), names)


def _match_names(
    where: str, entries: Sequence[tuple[str, str]], names: Sequence[str], files: Sequence[str]
) -> list[str]:
    prompts = _index_by_picture(where, entries, names, files)
    if missing := [name for name in names if name not in prompts]:
        raise ValueError(
            f"{where} has {len(prompts)} prompts for {len(names)} pictures, and none for {missing[0]}: add "
            "what is missing"
        )
    _check_filled(where, [prompts[name] for name in names])
    return [prompts[name] for name in names]


def _index_by_picture(
    where: str, entries: Sequence[tuple[str, str]], names: Sequence[str], files: Sequence[str] = ()
) -> dict[str, str]:
    """Prompts by the names of their pictures. ValueError for an unknown picture, or one with two prompts."""
    prompts: dict[str, str] = {}
    written, by_file = [name for name, _ in entries], dict(zip(files, names, strict=False))
    for (entry, prompt), name, file in zip(
        entries, find_names(written, names), find_names(written, files), strict=True
    ):
        name = name or by_file.get(file or "")
        if name is None:
            raise ValueError(
                f"{where} has a prompt for {one_line(entry)}, which is none of the {len(names)} pictures; "
                f"{_suggest_name(entry, names)}"
            )
        if name in prompts:
            raise ValueError(f"{where} has {len(entries)} prompts, and more than one for {name}: keep one")
        prompts[name] = prompt
    return prompts


def _suggest_name(written: str, names: Sequence[str]) -> str:
    alike = [name for name in names if name.casefold() == written.casefold()]
    if near := alike or difflib.get_close_matches(written[:200], names[:MAX_COMPARED], n=1):
        return f"did you mean {near[0]}?"
    return f"the first is {names[0]}" if names else "there are none"


def find_names(wanted: Iterable[str], names: Sequence[str]) -> list[str | None]:
    """The name that each wanted one stands for, or None: "./é.png" is "é.png", in any Unicode form."""
    count = Counter(map(nfc, names))
    index = {nfc(name): name for name in names if count[nfc(name)] == 1} | {name: name for name in names}
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


def _read_lines(path: Path) -> list[str]:
    return read_text(path, MAX_LIST).split("\n")  # splitlines would also split at characters within a prompt


def _read_txt(path: Path) -> Entries:
    lines = _read_lines(path)
    while lines and not lines[-1].strip():
        lines.pop()
    return [(None, line.strip()) for line in lines]


def _read_jsonl(path: Path, keys: Sequence[str] = KEYS) -> list[tuple[str, str]]:
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(_read_lines(path), 1)]
    return [_parse_entry(where, parse_json(where, line), keys) for where, line in lines if line.strip()]


def _read_json(path: Path) -> Entries:
    content = parse_json(str(path), read_text(path, MAX_LIST))
    if isinstance(content, Mapping) and all(isinstance(prompt, str) for prompt in content.values()):
        return [(str(name), prompt.strip()) for name, prompt in content.items()]
    if not isinstance(content, list):
        raise ValueError(
            f'{path} must hold {{"cat.png": "a cat", ...}} or a list of {{"file_name": "cat.png", "prompt": '
            f'"a cat"}}'
        )
    return [_parse_entry(f"{path}, entry {number}", entry) for number, entry in enumerate(content, 1)]


def _read_csv(path: Path) -> Entries:
    rows = csv.DictReader(io.StringIO(read_text(path, MAX_LIST), newline=""), restval="", strict=True)
    try:
        columns = rows.fieldnames = [name.strip() for name in rows.fieldnames or []]
        entries = list(rows)
    except csv.Error as error:
        raise ValueError(f"{path} is not comma-separated text: {error}") from None
    shown = ", ".join(columns)[:200]
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path} has two columns of one name: {shown}")
    if columns != ["prompt"] and not {"file_name", "prompt"} <= set(columns):
        raise ValueError(f"{path} needs the columns file_name and prompt, or prompt, not {shown or 'none'}")
    if longer := [number for number, entry in enumerate(entries, 1) if None in entry]:
        raise ValueError(
            f"row {longer[0]} of {path} has more than {len(columns)} columns: put quotes around prompts "
            "with commas in them"
        )
    return [(entry.get("file_name"), entry["prompt"].strip()) for entry in entries]


def parse_json(where: str, text: str) -> Any:
    """The value of a JSON text. ValueError, which begins with `where`, for other texts and repeated names."""
    try:
        return json.loads(text, object_pairs_hook=_check_unique_names)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _check_unique_names(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dictionary. ValueError for two entries of the same name."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"two entries for {one_line(name)}")
        values[name] = value
    return values


def _parse_entry(where: str, entry: Any, keys: Sequence[str] = KEYS) -> tuple[str, str]:
    names = [key for key in keys if key in entry] if isinstance(entry, Mapping) else []
    if len(names) > 1:
        raise ValueError(f"{where} has both {names[0]} and {names[1]}: keep one")
    if not names or not isinstance(entry.get("file_name"), str) or not isinstance(entry[names[0]], str):
        raise ValueError(
            f'{where} must be like {{"file_name": "cat.png", "{keys[0]}": "a cat"}}, not '
            f"{json.dumps(entry)[:80]}"
        )
    return entry["file_name"], entry[names[0]].strip()


READERS: dict[str, Callable[[Path], Entries]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}
