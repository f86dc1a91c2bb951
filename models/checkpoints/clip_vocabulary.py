"""The tokenizers of CLIP's towers, as transformers' folders hold them: a table with words of its own, or OpenAI's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from diffusion.spec import check_type, make_params
from models.checkpoints import diffusers_configs
from models.checkpoints.parts import Part
from models.files import replacing, write_json
from models.tokenizer import BEGIN, END, WORD_END, AddedToken, CLIPTokenizer, Vocabulary, vocabulary
from models.tokenizer_json import parse, read_text

WHOLE, TABLE, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
CONFIG, ADDED, NAMES = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")  # of transformers, which read the tokens of CLIP
SPECIAL = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}  # and what each is, unless something else is said
LONGEST_READ = 100_000  # tokens; transformers writes 1e30 where there is no limit


def is_clip(path: Path) -> bool:
    """Whether a tokenizer.json, or a folder of a tokenizer, holds byte pairs, as CLIP's does."""
    file = path / WHOLE if path.is_dir() else path
    if not file.is_file():
        return (path / TABLE).is_file()
    if file.name.endswith(".json"):
        try:
            return bool(parse(read_text(file))["model"].get("end_of_word_suffix") == WORD_END)
        except ValueError:
            pass
    return False


def find_clip_tokenizer(part: Part, given: Iterable[Path], second: bool | None) -> CLIPTokenizer | None:
    """The tokenizer of a tower of CLIP: given, beside its weights, or in tokenizer_N beside its text_encoder_N; None where there is none.

    second  whether the tower is the second of two: a tokenizer that was given is for it if its folder is called tokenizer_2; None: of one
    """
    home = part.file.path.absolute().parent
    beside = home.parent / home.name.replace("text_encoder", "tokenizer")
    folders = {path: path if path.is_dir() else path.parent for path in reversed(list(given)) if is_clip(path)}
    mine = [path for path, folder in folders.items() if second in (None, folder.name.endswith("_2"))]
    there = [beside] if beside != home and any((beside / name).is_file() for name in (WHOLE, TABLE, CONFIG)) else []
    places = [*mine, *there, *([home] if is_clip(home) else [])]
    return _opened(places[0]) if places else None


def _opened(path: Path) -> CLIPTokenizer:
    """The tokenizer in a folder of transformers', or of a tokenizer.json alone. ValueError in one line that names it."""
    try:
        tokenizer = CLIPTokenizer(_vocabulary(path if path.is_dir() else path.parent, path if path.is_file() else path / WHOLE))
        if not tokenizer.is_openai:
            tokenizer.check()
        return tokenizer
    except ValueError as error:
        raise ValueError(f"{path}: this tokenizer cannot be used: {error}") from None


def _vocabulary(folder: Path, whole: Path) -> Vocabulary:
    """As transformers puts it together: tokenizer.json goes before vocab.json, and the configuration before what older versions wrote."""
    config = _object(folder / CONFIG)
    if (kind := config.get("tokenizer_class")) not in (None, *CLASSES):
        raise ValueError(f"{CONFIG} says tokenizer_class={kind!r:.80}, and the text encoders here read the tokens of a CLIPTokenizer")
    described = parse(read_text(whole)) if whole.is_file() else {}
    if described:
        tokens, merges = described["model"].get("vocab"), described["model"].get("merges", [])
    else:
        tokens, merges = _object(folder / TABLE, needed=True), _merges(folder / MERGES)
    check_type("its table of tokens", tokens, dict)
    check_type("its list of merges", merges, list)
    said = config if "added_tokens_decoder" in config else config | _object(folder / NAMES)
    names = {key: _name(said.get(key) or usual) for key, usual in SPECIAL.items()}
    added = {token.content: token for token in _added(folder, config, described, set(names.values()))}
    more = said.get("additional_special_tokens") or said.get("extra_special_tokens") or []
    for each in (*(said.get(key) or usual for key, usual in SPECIAL.items()), *(more if isinstance(more, list) else [])):
        if (name := _name(each)) not in added:  # transformers adds it
            ids = [number for number in (*tokens.values(), *(token.id for token in added.values())) if type(number) is int]
            flags = {} if isinstance(each, str) else {key: value for key, value in each.items() if key != "__type"}
            number = tokens.get(name, max(ids, default=-1) + 1)
            added[name] = _token(number, {"normalized": False, **flags, "content": name, "special": True})
    length, openai = config.get("model_max_length"), tokens == vocabulary()[0] and _is_openai(merges)
    return Vocabulary(
        added=tuple(sorted(added.values(), key=lambda token: token.id)),
        bos=names["bos_token"],
        eos=names["eos_token"],
        unk=names["unk_token"],
        pad=names["pad_token"],
        length=length if isinstance(length, int) and 2 < length < LONGEST_READ else None,
        tokens=None if openai else tokens,
        merges=None if openai else tuple(map(_pair, merges)),
    )


def _is_openai(merges: list[Any]) -> bool:
    return merges == _openai_merges() or (merges[:1] != _openai_merges()[:1] and [_pair(merge) for merge in merges] == vocabulary()[1])


@cache
def _openai_merges() -> list[str]:
    return [f"{a} {b}" for a, b in vocabulary()[1]]


def _pair(merge: Any) -> tuple[str, str]:
    """A merge, ["a", "b"] or, as older versions write it, "a b"."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise ValueError(f"its merges are damaged: {merge!r:.80} is not a pair of tokens")
    return pair[0], pair[1]


def _added(folder: Path, config: Mapping[str, Any], described: Mapping[str, Any], special: set[str]) -> Iterator[AddedToken]:
    """The words beside the table: of the configuration, or of the files that there were before it held them."""
    if "added_tokens_decoder" in config:
        for number, entry in config["added_tokens_decoder"].items():
            yield _token(number, entry)
        return
    for name, number in _object(folder / ADDED).items():
        yield _token(number, {"content": name, "normalized": name not in special, "special": name in special})
    for entry in described.get("added_tokens") or []:
        check_type("an added token", entry, dict)
        yield _token(entry.get("id"), {key: value for key, value in entry.items() if key != "id"})


def _token(number: Any, entry: Any) -> AddedToken:
    check_type("an added token", entry, dict)
    entry = {key: value for key, value in entry.items() if key != "__type"}
    if isinstance(number, str) and number.isdecimal():
        number = int(number)
    return make_params("added token", AddedToken, {**entry, "id": number})


def _name(said: Any) -> str:
    """The name of a special token, which stands there alone or with its properties."""
    name = said.get("content") if isinstance(said, dict) else said
    check_type("the name of a special token", name, str)
    return str(name)


def _object(path: Path, needed: bool = False) -> dict[str, Any]:
    if not (needed or path.is_file()):
        return {}
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from None
    check_type(path.name, content, dict)
    return dict(content)


def _merges(path: Path) -> list[str]:
    """The pairs of merges.txt, one a line, of which the first may name its version."""
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    return [line for line in lines if line.strip() and not line.startswith("#version")]


def write_clip_tokenizer(tokenizer: CLIPTokenizer, folder: Path, pad: int, length: int) -> None:
    """A folder that transformers' CLIPTokenizer opens; pad is the id of the token behind the end, length how many are read at once."""
    tokens, merges = vocabulary() if tokenizer.is_openai else (tokenizer.tokens, tokenizer.merges)
    of = Vocabulary() if tokenizer.is_openai else tokenizer.vocabulary
    texts = {TABLE: json.dumps(tokens), MERGES: "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)}
    for file, text in texts.items():
        with replacing(folder / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    names = {token.id: token.content for token in of.added} | {number: token for token, number in tokens.items()}
    config = diffusers_configs.tokenizer(of, names[pad], length)
    if of.added:
        entries = {str(token.id): {key: value for key, value in asdict(token).items() if key != "id"} for token in of.added}
        config["added_tokens_decoder"] = entries
        write_json(folder / ADDED, {token.content: token.id for token in of.added if token.content not in tokens})  # for older readers
    write_json(folder / CONFIG, config)
