"""Finds, reads and writes the tokenizers of text encoders, as transformers' folders hold them.

CLIP's is a table of tokens (vocab.json with merges.txt, or tokenizer.json), T5's a list of pieces (tokenizer.json or spiece.model).
Configurations beside either say which words are added to it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

from diffusion.messages import brief
from diffusion.spec import check_mapping, check_type, make_params
from models.files.table import Part
from models.files.tensors import holds_weights
from models.files.text import read_json, read_text, write_json
from models.files.writing import replacing
from models.text.clip_tokenizer import BEGIN, END, TRIAL, WORD_END, AddedToken, CLIPTokenizer, Vocabulary, check_table, openai_tables
from models.text.t5_tokenizer import T5Tokenizer
from models.text.tokenizer_json import MAX_FILE, parse

WHOLE, SPIECE, TABLE, MERGES = "tokenizer.json", "spiece.model", "vocab.json", "merges.txt"
CONFIG, ADDED, NAMES = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
CLIP_CLASSES, T5_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast"), ("T5Tokenizer", "T5TokenizerFast")  # of transformers
DECODER = "added_tokens_decoder"  # in tokenizer_config.json; where it stands, added_tokens.json and special_tokens_map.json do not count
ROLES = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}  # CLIP's special tokens, with defaults
MORE = ("extra_special_tokens", "additional_special_tokens")  # those without a role; the first key takes precedence
MAX_LENGTH = 100_000  # tokens of a text; transformers writes 1e30 for "no limit"


# ---- which tokenizer belongs to a text encoder


def is_vocabulary(path: Path) -> bool:
    """Whether a path is a tokenizer: by its name tokenizer.json, spiece.model or another .model, or a folder of one without weights."""
    if path.is_dir():
        return any((path / name).is_file() for name in (WHOLE, SPIECE, TABLE)) and not holds_weights(path)
    return path.name.endswith(WHOLE) or path.suffix == ".model"


def is_clip(path: Path) -> bool:
    """Whether a tokenizer.json, or the folder of a tokenizer, is CLIP's kind: byte pairs with an end-of-word suffix."""
    file = path / WHOLE if path.is_dir() else path
    if not file.is_file():
        return (path / TABLE).is_file()
    if file.suffix != ".json":
        return False
    try:
        return bool(parse(read_text(file, MAX_FILE))["model"].get("end_of_word_suffix") == WORD_END)
    except ValueError:
        return False


def find_clip_tokenizer(part: Part, given: Sequence[Path], second: bool | None) -> CLIPTokenizer | None:
    """The tokenizer of a CLIP text encoder: the last of the given paths that is one, or one beside the weights; None without one.

    second  whether this is the second of two text encoders, to which a given folder named tokenizer_2 belongs; None: there is only one
    """
    neighbour, home = _folders_beside(part)
    clips = [path for path in reversed(given) if is_clip(path)]
    places = [path for path in clips if second in (None, (path if path.is_dir() else path.parent).name.endswith("_2"))]
    if neighbour != home and any((neighbour / name).is_file() for name in (WHOLE, TABLE, CONFIG)):
        places.append(neighbour)
    if is_clip(home):
        places.append(home)
    return open_clip_tokenizer(places[0]) if places else None


def find_t5_tokenizer(part: Part, given: Sequence[Path], notes: list[str]) -> T5Tokenizer | None:
    """The tokenizer of a T5: the last of the given paths that is not CLIP's, or one beside the weights; None without one.

    ValueError for one that was given and is none of T5's; one that merely lies beside the weights is then left alone, and noted.
    """
    for file in _t5_files(path for path in reversed(given) if not is_clip(path)):
        return open_t5_tokenizer(file)
    for file in _t5_files(dict.fromkeys(_folders_beside(part))):
        try:
            if not is_clip(file):
                return open_t5_tokenizer(file)
        except ValueError as error:
            notes.append(f"left alone: {error}")
    return None


def _folders_beside(part: Part) -> tuple[Path, Path]:
    """Where a text encoder's tokenizer may lie: tokenizer_N beside its folder text_encoder_N, and the folder of its weights."""
    home = part.file.path.absolute().parent
    return home.parent / home.name.replace("text_encoder", "tokenizer"), home


def _t5_files(places: Iterable[Path]) -> Iterator[Path]:
    """The files of T5's tokenizers among these paths, or within those that are folders."""
    for place in places:
        yield from (file for file in ([place / WHOLE, place / SPIECE] if place.is_dir() else [place]) if file.is_file())


# ---- reading


def open_t5_tokenizer(file: Path) -> T5Tokenizer:
    """T5's tokenizer in a file, with the words that configurations beside it add: a spiece.model has no place for any."""
    tokenizer, folder = T5Tokenizer.open(file), file.parent
    try:
        config = _read_object(folder / CONFIG)
        if config.get("tokenizer_class") not in (None, *T5_CLASSES):
            return tokenizer  # a configuration of another tokenizer
        _, more = _special_tokens(folder, config, {})
        return tokenizer.with_words(_added_tokens(folder, config, [], more, tokenizer.tokens))
    except ValueError as error:
        raise ValueError(f"{folder}: the words beside {file.name} cannot be used: {error}") from None


def open_clip_tokenizer(path: Path) -> CLIPTokenizer:
    """The tokenizer in a transformers folder, or in a single tokenizer.json. ValueError in one line that names the path."""
    try:
        tokenizer = CLIPTokenizer(_read_vocabulary(path if path.is_dir() else path.parent, path if path.is_file() else path / WHOLE))
        if not tokenizer.is_openai:
            tokenizer.tokenize(TRIAL)
        return tokenizer
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(str(path)) else f"{path}: this tokenizer cannot be used: {error}") from None


def _read_vocabulary(folder: Path, whole: Path) -> Vocabulary:
    """CLIP's vocabulary, with transformers' precedence: tokenizer.json before vocab.json."""
    config = _read_object(folder / CONFIG)
    if (kind := config.get("tokenizer_class")) not in (None, *CLIP_CLASSES):
        raise ValueError(f"{CONFIG} says tokenizer_class={brief(kind)}, and the text encoders here read the tokens of a CLIPTokenizer")
    length = config.get("model_max_length")
    if length is not None and (isinstance(length, bool) or not isinstance(length, (int, float))):  # 1e30 may be written as a whole number
        raise ValueError(f"model_max_length in {CONFIG} must be a number, not {brief(length)}")
    tokens, merges, described = _read_table(folder, whole)
    roles, more = _special_tokens(folder, config, ROLES)
    added = _added_tokens(folder, config, described, [*roles.values(), *more], tokens)
    openai = (tokens, merges) == openai_tables()
    return Vocabulary(
        added=tuple(added),
        bos=roles["bos_token"].content,
        eos=roles["eos_token"].content,
        unk=roles["unk_token"].content,
        pad=roles["pad_token"].content,
        length=int(length) if length is not None and 2 < length < MAX_LENGTH else None,
        tokens=None if openai else tokens,
        merges=None if openai else tuple(merges),
    )


def _read_table(folder: Path, whole: Path) -> tuple[dict[str, int], list[tuple[str, str]], list[Any]]:
    """The ids of tokens, the merges, and the added tokens as tokenizer.json describes them."""
    if whole.is_file():
        with _name_in_errors(whole.name):
            content = parse(read_text(whole, MAX_FILE))
            tokens, merges, added = content["model"].get("vocab"), content["model"].get("merges", []), content.get("added_tokens")
            check_table(tokens)
            check_type("its list of merges", merges, list)
            check_type("its list of added tokens", added, list | None)
            return tokens, _split_merges(merges), added or []
    if missing := [name for name in (TABLE, MERGES) if not (folder / name).is_file()]:
        raise ValueError(f"{missing[0]} is not there: {WHOLE} holds the tokens, or {TABLE} and {MERGES} do")
    tokens, lines = _read_object(folder / TABLE), read_text(folder / MERGES, MAX_FILE).split("\n")
    with _name_in_errors(TABLE):
        check_table(tokens)
    with _name_in_errors(MERGES):
        return tokens, _split_merges([line for line in lines if line.strip() and not line.startswith("#version")]), []


def _split_merges(merges: list[Any]) -> list[tuple[str, str]]:
    """Pairs of tokens. A merge is ["a", "b"], or "a b" as older versions write it."""
    if merges == _openai_merges():  # as most are, and splitting takes longer than comparing
        return openai_tables()[1]
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(token, str) for token in pair):
            raise ValueError(f"its merges are damaged: {brief(merge)} is not a pair of tokens")
        pairs.append((pair[0], pair[1]))
    return pairs


@cache
def _openai_merges() -> list[str]:
    return [f"{a} {b}" for a, b in openai_tables()[1]]


def _special_tokens(folder: Path, config: Mapping[str, Any], roles: Mapping[str, str]) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Special tokens by role, and those without a role, from the configuration or the file of older versions that overrides it.

    Each is written as a name or as a mapping. Their ids stand elsewhere, and are 0 here.
    """
    names = {} if DECODER in config else _read_object(folder / NAMES)

    def read(key: str) -> list[AddedToken]:
        file, content = (NAMES, names[key]) if key in names else (CONFIG, config.get(key))
        with _name_in_errors(f"{key} in {file}"):
            if key in roles:
                return [_special_token(roles[key] if content in (None, "") else content)]
            check_type("a list of special tokens", content, list | dict | None)
            return [_special_token(entry) for entry in (content.values() if isinstance(content, dict) else content or [])]

    more = [read(key) for key in MORE]
    return {key: read(key)[0] for key in roles}, more[0] or more[1]


def _special_token(entry: Any) -> AddedToken:
    check_type("a special token", entry, str | dict)
    settings = {"content": entry} if isinstance(entry, str) else entry
    token = _token(0, {"normalized": "__type" in settings, **settings})  # as transformers has it, which makes an AddedToken of those
    return replace(token, special=True)


def _added_tokens(
    folder: Path, config: Mapping[str, Any], described: Sequence[Any], special: Sequence[AddedToken], tokens: Mapping[str, int]
) -> list[AddedToken]:
    """The words that are added to a table of tokens, by id. Special ones whose id no file says have that of the table, or the next."""
    names = {token.content for token in special}
    if DECODER in config:
        with _name_in_errors(CONFIG):
            found = [_token(number, entry) for number, entry in check_mapping(DECODER, config[DECODER]).items()]
    else:  # older versions
        with _name_in_errors(ADDED):
            entries = _read_object(folder / ADDED).items()
            found = [_token(id, {"content": name, "normalized": name not in names, "special": name in names}) for name, id in entries]
        with _name_in_errors(WHOLE):
            found += [_token(check_mapping("an added token", entry).get("id"), entry) for entry in described]
    added = {token.content: token for token in found}
    for token in special:
        if token.content not in added:
            following = max([*tokens.values(), *(other.id for other in added.values())], default=-1) + 1
            added[token.content] = replace(token, id=tokens.get(token.content, following))
    return sorted(added.values(), key=lambda token: token.id)


def _token(number: Any, entry: Any) -> AddedToken:
    settings = {key: value for key, value in check_mapping("an added token", entry).items() if key not in ("__type", "id")}
    return make_params("added token", AddedToken, {**settings, "id": int(number) if str(number).isdecimal() else number})


@contextmanager
def _name_in_errors(file: str) -> Iterator[None]:
    """Puts the name of the file before errors that lack it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if file in str(error) else f"{file}: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    return read_json(path, MAX_FILE) if path.is_file() else {}


# ---- writing


def write_t5_tokenizer(tokenizer: T5Tokenizer, folder: Path) -> None:
    """folder/tokenizer.json."""
    with replacing(folder / WHOLE) as temporary:
        temporary.write_text(tokenizer.to_json(), encoding="utf-8")


def write_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path, pad: int, length: int) -> None:
    """Write a folder that transformers' CLIPTokenizer opens. pad: the id of the padding token; length: tokens of a text."""
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in tokenizer.merges)
    for file, text in ((TABLE, json.dumps(tokenizer.tokens)), (MERGES, merges)):
        with replacing(folder / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    of = Vocabulary() if tokenizer.is_openai else tokenizer.vocabulary
    names = {token.id: token.content for token in of.added} | {number: token for token, number in tokenizer.tokens.items()}
    config = {
        "tokenizer_class": CLIP_CLASSES[0],
        "bos_token": of.bos,
        "eos_token": of.eos,
        "unk_token": of.unk,
        "pad_token": names[pad],
        "model_max_length": length,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    if of.added:
        config[DECODER] = {str(token.id): {key: value for key, value in asdict(token).items() if key != "id"} for token in of.added}
        # For older versions.
        write_json(folder / ADDED, {token.content: token.id for token in of.added if token.content not in tokenizer.tokens})
    write_json(folder / CONFIG, config)
