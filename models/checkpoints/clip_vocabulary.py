"""Reads and writes the tokenizers of CLIP text encoders, as transformers' folders hold them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from diffusion.messages import brief
from diffusion.spec import check_mapping, check_type, make_params
from models.checkpoints.table import Part
from models.files import read_json, read_text, replacing, write_json
from models.tokenizer import BEGIN, END, WORD_END, AddedToken, CLIPTokenizer, Vocabulary, check_table, vocabulary
from models.tokenizer_json import MAX_FILE, parse

WHOLE, TABLE, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
CONFIG, ADDED, NAMES = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")  # of transformers
DECODER = "added_tokens_decoder"
SPECIAL = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}  # by role, with defaults
MORE = ("extra_special_tokens", "additional_special_tokens")  # those without a role; the first key takes precedence
MAX_LENGTH = 100_000  # tokens of a text; transformers writes 1e30 for "no limit"


def is_clip(path: Path) -> bool:
    """Whether a tokenizer.json, or the folder of a tokenizer, is CLIP's kind: byte pairs with an end-of-word suffix."""
    file = path / WHOLE if path.is_dir() else path
    if not file.is_file():
        return (path / TABLE).is_file()
    if file.name.endswith(".json"):
        try:
            return bool(parse(read_text(file, MAX_FILE))["model"].get("end_of_word_suffix") == WORD_END)
        except ValueError:
            pass
    return False


def find_clip_tokenizer(part: Part, given: Iterable[Path], second: bool | None) -> CLIPTokenizer | None:
    """The tokenizer of a CLIP text encoder, None without one. Looked for among the given paths, in tokenizer_N beside its text_encoder_N,
    then in the folder of its weights.

    second  whether this is the second of two text encoders, to which a given folder named tokenizer_2 belongs; None: there is only one
    """
    home = part.file.path.absolute().parent
    beside = home.parent / home.name.replace("text_encoder", "tokenizer")
    folders = {path: path if path.is_dir() else path.parent for path in reversed(list(given)) if is_clip(path)}
    matching = [path for path, folder in folders.items() if second in (None, folder.name.endswith("_2"))]
    neighbour = [beside] if beside != home and any((beside / name).is_file() for name in (WHOLE, TABLE, CONFIG)) else []
    places = [*matching, *neighbour, *([home] if is_clip(home) else [])]
    return open_tokenizer(places[0]) if places else None


def open_tokenizer(path: Path) -> CLIPTokenizer:
    """The tokenizer in a transformers folder, or in a single tokenizer.json. ValueError in one line that names the path."""
    try:
        tokenizer = CLIPTokenizer(_read_vocabulary(path if path.is_dir() else path.parent, path if path.is_file() else path / WHOLE))
        if not tokenizer.is_openai:
            tokenizer.check()
        return tokenizer
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: this tokenizer cannot be used: {error}") from None


def _read_vocabulary(folder: Path, whole: Path) -> Vocabulary:
    """The vocabulary, with transformers' precedence: tokenizer.json over vocab.json, tokenizer_config.json over files of older versions."""
    config = _read_object(folder / CONFIG)
    if (kind := config.get("tokenizer_class")) not in (None, *CLASSES):
        raise ValueError(f"{CONFIG} says tokenizer_class={brief(kind)}, and the text encoders here read the tokens of a CLIPTokenizer")
    length = config.get("model_max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, (int, float))):  # 1e30 may be written as a whole number
        raise ValueError(f"model_max_length in {CONFIG} must be a number, not {brief(length)}")
    tokens, merges, described = _read_table(folder, whole)
    special_map = {} if DECODER in config else _read_object(folder / NAMES)
    special, extra = _special_tokens(config | special_map, {key: NAMES if key in special_map else CONFIG for key in (*SPECIAL, *MORE)})
    names = {key: _name(token) for key, token in special.items()}
    added = {token.content: token for token in _added_tokens(folder, config, described, set(names.values()))}
    for each in (*special.values(), *extra):
        if (name := _name(each)) not in added:  # transformers adds such a token
            ids = [*tokens.values(), *(token.id for token in added.values())]
            flags = {} if isinstance(each, str) else each
            number = tokens.get(name, max(ids, default=-1) + 1)
            added[name] = _token(number, {"normalized": False, **flags, "content": name, "special": True})
    openai = (tokens, merges) == vocabulary()
    return Vocabulary(
        added=tuple(sorted(added.values(), key=lambda token: token.id)),
        bos=names["bos_token"],
        eos=names["eos_token"],
        unk=names["unk_token"],
        pad=names["pad_token"],
        length=int(length) if length is not None and 2 < length < MAX_LENGTH else None,
        tokens=None if openai else tokens,
        merges=None if openai else tuple(merges),
    )


def _read_table(folder: Path, whole: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[str, Any]]:
    """The ids of tokens, the merges, and the content of tokenizer.json, {} without that file."""
    described: dict[str, Any] = {}
    if whole.is_file():
        text = read_text(whole, MAX_FILE)
        with _name_in_errors(whole.name):
            described = parse(text)
            tokens, merges = described["model"].get("vocab"), described["model"].get("merges", [])
            check_type("its list of merges", merges, list)
    elif missing := [name for name in (TABLE, MERGES) if not (folder / name).is_file()]:
        raise ValueError(f"{missing[0]} is not there: {WHOLE} holds the tokens, or {TABLE} and {MERGES} do")
    else:
        tokens, merges = _read_object(folder / TABLE), read_text(folder / MERGES, MAX_FILE)
    with _name_in_errors(whole.name if described else TABLE):
        check_table(tokens)
    with _name_in_errors(whole.name if described else MERGES):
        return tokens, _parse_merges(merges) if isinstance(merges, str) else _split_merges(merges), described


@lru_cache(maxsize=2)  # the second tokenizer of a pipeline mostly has the merges of the first
def _parse_merges(text: str) -> list[tuple[str, str]]:
    """The merges of a merges.txt, whose first line may name its version. Callers share the list and do not change it."""
    return _split_merges([line for line in text.split("\n") if line.strip() and not line.startswith("#version")])


def _split_merges(merges: list[Any]) -> list[tuple[str, str]]:
    return vocabulary()[1] if merges == _openai_merges() else list(map(_split_merge, merges))


def _special_tokens(config: Mapping[str, Any], files: Mapping[str, str]) -> tuple[dict[str, Any], list[Any]]:
    """Special tokens by role, and those without a role, each a name or a mapping. `files` names the file of each entry for errors."""
    roles = {key: default if config.get(key) in (None, "") else config[key] for key, default in SPECIAL.items()}
    extra = _tokens_without_role(config, files)
    for key, token in roles.items():
        _check_name(f"{key} in {files[key]}", token)
    return roles, extra


def _tokens_without_role(config: Mapping[str, Any], files: Mapping[str, str]) -> list[Any]:
    extra: list[Any] = []
    for key in MORE:
        entries = config.get(key)
        check_type(f"{key} in {files[key]}", entries, list | dict | None)
        entries = list(entries.values() if isinstance(entries, dict) else entries or [])
        for entry in entries:
            _check_name(f"an entry of {key} in {files[key]}", entry)
        extra = extra or entries
    return extra


def words_beside(folder: Path, classes: Collection[str], known: Callable[[str], bool], size: int) -> list[AddedToken]:
    """The words that configurations in a folder add to a tokenizer of one of these classes, without those that it knows itself.

    size  how many tokens it has: words without an id of their own get the next ones
    """
    config = _read_object(folder / CONFIG)
    if config.get("tokenizer_class") not in (None, *classes):
        return []
    overriding = {} if DECODER in config else _read_object(folder / NAMES)
    extra = _tokens_without_role(config | overriding, {key: NAMES if key in overriding else CONFIG for key in MORE})
    added = _added_tokens(folder, config, {}, set(map(_name, extra)))
    words = {token.content: token for token in added if not known(token.content)}
    for each in extra:
        if (name := _name(each)) not in words and not known(name):
            flags = {} if isinstance(each, str) else each
            words[name] = _token(size + len(words), {"normalized": False, **flags, "content": name, "special": True})
    return sorted(words.values(), key=lambda token: token.id)


@cache
def _openai_merges() -> list[str]:
    return [f"{a} {b}" for a, b in vocabulary()[1]]


def _split_merge(merge: Any) -> tuple[str, str]:
    """The two tokens of a merge: ["a", "b"], or "a b" as older versions write it."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise ValueError(f"its merges are damaged: {brief(merge)} is not a pair of tokens")
    return pair[0], pair[1]


def _added_tokens(folder: Path, config: Mapping[str, Any], described: Mapping[str, Any], special: set[str]) -> Iterator[AddedToken]:
    """Tokens added to the table: from the configuration, or from the files that older versions wrote instead."""
    if DECODER in config:
        with _name_in_errors(CONFIG):
            for number, entry in check_mapping(DECODER, config[DECODER]).items():
                yield _token(number, entry)
        return
    with _name_in_errors(ADDED):
        for name, number in _read_object(folder / ADDED).items():
            yield _token(number, {"content": name, "normalized": name not in special, "special": name in special})
    with _name_in_errors(WHOLE):
        entries = described.get("added_tokens")
        check_type("its list of added tokens", entries, list | None)
        for entry in entries or []:
            yield _token(check_mapping("an added token", entry).get("id"), {key: value for key, value in entry.items() if key != "id"})


def _token(number: Any, entry: Any) -> AddedToken:
    entry = {key: value for key, value in check_mapping("an added token", entry).items() if key != "__type"}
    if isinstance(number, str) and number.isdecimal():
        number = int(number)
    return make_params("added token", AddedToken, {**entry, "id": number})


def _check_name(where: str, token: Any) -> None:
    """ValueError unless this is a special token: a name, or a mapping with one."""
    check_type(where, token, str | dict)
    check_type(f"the name of {where}", _name(token), str)
    if isinstance(token, dict):
        with _name_in_errors(where):
            _token(0, token)


def _name(token: Any) -> Any:
    """The name of a special token, which is written alone or in a mapping."""
    return token.get("content") if isinstance(token, dict) else token


@contextmanager
def _name_in_errors(file: str) -> Iterator[None]:
    """Puts the name of the file before errors that lack it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if file in str(error) else f"{file}: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    return read_json(path, MAX_FILE) if path.is_file() else {}


def write_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path, pad: int, length: int) -> None:
    """Write a folder that transformers' CLIPTokenizer opens. pad: the id of the padding token; length: tokens of a text."""
    tokens, merges = vocabulary() if tokenizer.is_openai else (tokenizer.tokens, tokenizer.merges)
    of = Vocabulary() if tokenizer.is_openai else tokenizer.vocabulary
    texts = {TABLE: json.dumps(tokens), MERGES: "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)}
    for file, text in texts.items():
        with replacing(folder / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    names = {token.id: token.content for token in of.added} | {number: token for token, number in tokens.items()}
    config = _config(of, names[pad], length)
    if of.added:
        entries = {str(token.id): {key: value for key, value in asdict(token).items() if key != "id"} for token in of.added}
        config[DECODER] = entries
        write_json(folder / ADDED, {token.content: token.id for token in of.added if token.content not in tokens})  # read by older versions
    write_json(folder / CONFIG, config)


def _config(of: Vocabulary, pad: str, length: int) -> dict[str, Any]:
    """For CLIPTokenizer."""
    return {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": of.bos,
        "eos_token": of.eos,
        "unk_token": of.unk,
        "pad_token": pad,
        "model_max_length": length,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
