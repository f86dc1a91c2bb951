"""What the tokenizers of all text encoders share: words added to a vocabulary, and the folders in which
transformers keeps them.

A kind of reader has its own table of tokens (CLIP's vocab.json with merges.txt, T5's spiece.model, or a
tokenizer.json). Configurations beside any of them say which words are added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.messages import brief, one_line
from diffusion.spec import check_mapping, check_type, make_params
from models.files.text import parse_json, read_json, read_text

if TYPE_CHECKING:
    from models.files.table import Part

MAX_FILE = 2**26  # bytes; T5's has 2.4 million
MAX_TOKENS = 1_000_000  # CLIP has 49,408, T5 32,100
MAX_TOKEN_LENGTH = 1000  # characters; CLIP's have up to 32, T5's up to 16
# a letter, one of several bytes, one that is in no word: a tokenizer that reads these reads all texts
TRIAL = "a ½ \U0010fffd"

WHOLE, SPIECE, TABLE, MERGES = "tokenizer.json", "spiece.model", "vocab.json", "merges.txt"
CONFIG, ADDED, NAMES = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
# in tokenizer_config.json; where it stands, added_tokens.json and special_tokens_map.json do not count
DECODER = "added_tokens_decoder"
MORE = (
    "extra_special_tokens",
    "additional_special_tokens",
)  # those without a role; the first key takes precedence


@dataclass(frozen=True)
class AddedToken:
    """A word that is one token and is found in a text before it is split: a learned word, or the name of a
    special token.

    single_word  only where it is no part of a longer word
    lstrip       with the blanks before it; rstrip: with those behind it
    normalized   in the text with capitals lowered and blanks joined, so that capitals do not matter; else in
                 the text as it stands
    special      a name such as that of the end of text
    """

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.id < MAX_TOKENS:
            raise ValueError(
                f"its added token {brief(self.content)} has the id {brief(self.id)}: ids are 0 to "
                f"{MAX_TOKENS - 1:,}"
            )
        if not 0 < len(self.content) <= MAX_TOKEN_LENGTH:
            raise ValueError(
                f"it has an added token of {len(self.content):,} characters: known ones have 1 to "
                f"{MAX_TOKEN_LENGTH:,}"
            )


def parse_tokenizer_json(text: str) -> dict[str, Any]:
    """The content of the file. ValueError if it is damaged or describes no model."""
    try:
        content = parse_json(text)
        content["model"].keys()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it describes no model ({type(error).__name__}: {error})") from None
    return dict(content)


def read_model_entry(file: Path) -> dict[str, Any]:
    """What a tokenizer.json says of its model, {} where it is damaged or describes none."""
    try:
        return dict(parse_tokenizer_json(read_text(file, MAX_FILE))["model"])
    except ValueError:
        return {}


def folders_beside(part: Part) -> tuple[Path, Path]:
    """Where a text encoder's tokenizer may lie: tokenizer_N beside its folder text_encoder_N, and the folder
    of its weights."""
    home = part.file.path.absolute().parent
    return home.parent / home.name.replace("text_encoder", "tokenizer"), home


def special_tokens(
    folder: Path, config: Mapping[str, Any], roles: Mapping[str, str]
) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Special tokens by role, and those without a role, from the configuration or the file of older versions
    that overrides it.

    Each is written as a name or as a mapping. Their ids stand elsewhere, and are 0 here.
    """
    names = {} if DECODER in config else read_object(folder / NAMES)

    def read(key: str) -> list[AddedToken]:
        file, content = (NAMES, names[key]) if key in names else (CONFIG, config.get(key))
        with name_in_errors(f"{key} in {file}"):
            if key in roles:
                return [_special_token(roles[key] if content in (None, "") else content)]
            check_type("a list of special tokens", content, list | dict | None)
            return [
                _special_token(entry)
                for entry in (content.values() if isinstance(content, dict) else content or [])
            ]

    more = [read(key) for key in MORE]
    return {key: read(key)[0] for key in roles}, more[0] or more[1]


def _special_token(entry: Any) -> AddedToken:
    check_type("a special token", entry, str | dict)
    settings = {"content": entry} if isinstance(entry, str) else entry
    token = _token(
        0, {"normalized": "__type" in settings, **settings}
    )  # as transformers has it, which makes an AddedToken of those
    return replace(token, special=True)


def added_tokens(
    folder: Path,
    config: Mapping[str, Any],
    described: Sequence[Any],
    special: Sequence[AddedToken],
    tokens: Mapping[str, int],
) -> list[AddedToken]:
    """The words that are added to a table of tokens, by id. Special ones whose id no file says have that of
    the table, or the next."""
    names = {token.content for token in special}
    if DECODER in config:
        with name_in_errors(CONFIG):
            found = [
                _token(number, entry) for number, entry in check_mapping(DECODER, config[DECODER]).items()
            ]
    else:  # older versions
        with name_in_errors(ADDED):
            entries = read_object(folder / ADDED).items()
            found = [
                _token(id, {"content": name, "normalized": name not in names, "special": name in names})
                for name, id in entries
            ]
        with name_in_errors(WHOLE):
            found += [_token(check_mapping("an added token", entry).get("id"), entry) for entry in described]
    added = {token.content: token for token in found}
    for token in special:
        if token.content not in added:
            following = max([*tokens.values(), *(other.id for other in added.values())], default=-1) + 1
            added[token.content] = replace(token, id=tokens.get(token.content, following))
    return sorted(added.values(), key=lambda token: token.id)


def _token(number: Any, entry: Any) -> AddedToken:
    settings = {
        key: value
        for key, value in check_mapping("an added token", entry).items()
        if key not in ("__type", "id")
    }
    return make_params(
        "added token", AddedToken, {**settings, "id": int(number) if str(number).isdecimal() else number}
    )


@contextmanager
def name_in_errors(file: str) -> Iterator[None]:
    """Puts the name of the file before errors that lack it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if file in str(error) else f"{file}: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    return read_json(path, MAX_FILE) if path.is_file() else {}


def tokenizers_library() -> Any:
    """The package tokenizers. ValueError that says what to install without it."""
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(
            f"prompts are read with the package tokenizers ({error}): pip install tokenizers"
        ) from error
    return tokenizers


def call_library(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The result of a call of the library. ValueError in one line if it fails in any way, also by a panic,
    which is no Exception."""
    try:
        return call(*args, **options)
    except BaseException as error:
        failed = isinstance(error, Exception) and not isinstance(error, MemoryError)
        if not failed and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"it is damaged ({one_line(error)})") from None
