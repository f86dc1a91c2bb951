"""Common to all tokenizers: words added to a vocabulary, and the files in which transformers stores them.

Each kind of tokenizer has its own token table (CLIP's vocab.json with merges.txt, T5's spiece.model, or a
tokenizer.json). Configurations in the same folder add words to it.
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
TRIAL = "a ½ \U0010fffd"  # ASCII, a character of several bytes, an unknown one: a test for tokenizers

WHOLE, SPIECE, TABLE, MERGES = "tokenizer.json", "spiece.model", "vocab.json", "merges.txt"
CONFIG, ADDED, NAMES = "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"
# Its presence in tokenizer_config.json overrides added_tokens.json and special_tokens_map.json.
DECODER = "added_tokens_decoder"
# Keys of tokens without a role; the first key comes first.
MORE = ("extra_special_tokens", "additional_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A word that is one token, found in a text before it is split: a learned word or a special token.

    single_word  not as a part of a longer word
    lstrip       with the spaces before it; rstrip: with the spaces after it
    normalized   found in the normalised text, so that case does not matter; else in the original text
    special      a special token, such as the end of text
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
            name, last = brief(self.content), MAX_TOKENS - 1
            raise ValueError(f"its added token {name} has the id {brief(self.id)}: ids are 0 to {last:,}")
        if not 0 < (length := len(self.content)) <= MAX_TOKEN_LENGTH:
            limit = f"1 to {MAX_TOKEN_LENGTH:,} are allowed"
            raise ValueError(f"it has an added token of {length:,} characters: {limit}")


def parse_tokenizer_json(text: str) -> dict[str, Any]:
    """The content of a tokenizer.json. ValueError if it is damaged or has no model."""
    try:
        content = parse_json(text)
        content["model"].keys()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"it has no model ({type(error).__name__}: {error})") from None
    return dict(content)


def read_model_entry(file: Path) -> dict[str, Any]:
    """The entry "model" of a tokenizer.json; {} if it is damaged or missing."""
    try:
        return dict(parse_tokenizer_json(read_text(file, MAX_FILE))["model"])
    except ValueError:
        return {}


def folders_beside(part: Part) -> tuple[Path, Path]:
    """Folders for a text encoder's tokenizer: tokenizer_N next to text_encoder_N, and that of the weights."""
    home = part.file.path.absolute().parent
    return home.parent / home.name.replace("text_encoder", "tokenizer"), home


def special_tokens(
    folder: Path, config: Mapping[str, Any], roles: Mapping[str, str]
) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Special tokens by role, and those without a role, from NAMES (older versions) or the configuration.

    Each is a name or a mapping. Their ids are in other files, and 0 here.
    """
    names = {} if DECODER in config else read_object(folder / NAMES)

    def read(key: str) -> list[AddedToken]:
        file, content = (NAMES, names[key]) if key in names else (CONFIG, config.get(key))
        with name_in_errors(f"{key} in {file}"):
            if key in roles:
                return [_special_token(roles[key] if content in (None, "") else content)]
            check_type("a list of special tokens", content, list | dict | None)
            entries = content.values() if isinstance(content, dict) else content or []
            return [_special_token(entry) for entry in entries]

    more = [read(key) for key in MORE]
    return {key: read(key)[0] for key in roles}, more[0] or more[1]


def _special_token(entry: Any) -> AddedToken:
    check_type("a special token", entry, str | dict)
    settings = {"content": entry} if isinstance(entry, str) else entry
    # "__type": transformers makes an AddedToken of it, which is normalized by default.
    return replace(_token(0, {"normalized": "__type" in settings, **settings}), special=True)


def added_tokens(
    folder: Path,
    config: Mapping[str, Any],
    described: Sequence[Any],
    special: Sequence[AddedToken],
    tokens: Mapping[str, int],
) -> list[AddedToken]:
    """The words added to a token table, by id. Special tokens without an id get the table's or the next."""
    names = {token.content for token in special}
    if DECODER in config:
        with name_in_errors(CONFIG):
            entries = check_mapping(DECODER, config[DECODER]).items()
            found = [_token(number, entry) for number, entry in entries]
    else:  # older versions
        found = []
        with name_in_errors(ADDED):
            for name, number in read_object(folder / ADDED).items():
                special_name = name in names
                entry = {"content": name, "normalized": not special_name, "special": special_name}
                found.append(_token(number, entry))
        with name_in_errors(WHOLE):
            found += [_token(check_mapping("an added token", entry).get("id"), entry) for entry in described]
    added = {token.content: token for token in found}
    for token in special:
        if token.content not in added:
            following = max([*tokens.values(), *(other.id for other in added.values())], default=-1) + 1
            added[token.content] = replace(token, id=tokens.get(token.content, following))
    return sorted(added.values(), key=lambda token: token.id)


def _token(number: Any, entry: Any) -> AddedToken:
    settings = {**check_mapping("an added token", entry), "id": number}
    settings.pop("__type", None)
    if str(number).isdecimal():
        settings["id"] = int(number)
    return make_params("added token", AddedToken, settings)


@contextmanager
def name_in_errors(file: str) -> Iterator[None]:
    """Adds the name of the file to errors that lack it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if file in str(error) else f"{file}: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    return read_json(path, MAX_FILE) if path.is_file() else {}


def tokenizers_library() -> Any:
    """The package tokenizers. ValueError if it is missing."""
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(f"prompts need the package tokenizers ({error}): pip install tokenizers") from error
    return tokenizers


def call_library(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The result of a call of the library. ValueError for failures, even a panic, which is no Exception."""
    try:
        return call(*args, **options)
    except BaseException as error:
        failed = isinstance(error, Exception) and not isinstance(error, MemoryError)
        if not failed and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"it is damaged ({one_line(error)})") from None
