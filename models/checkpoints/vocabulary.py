"""T5's vocabulary, which lies in a file of its own beside the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from models.checkpoints.clip_vocabulary import TABLE, is_clip, words_beside
from models.checkpoints.folder import holds_weights
from models.checkpoints.table import Part
from models.files import replacing
from models.t5_tokenizer import T5Tokenizer

FILES = ("tokenizer.json", "spiece.model")
CLASSES = ("T5Tokenizer", "T5TokenizerFast")  # of transformers


def is_vocabulary(path: Path) -> bool:
    """Whether a path is one by its name, tokenizer.json, spiece.model or another .model, or a folder of one without weights."""
    if path.is_dir():
        return any((path / name).is_file() for name in (*FILES, TABLE)) and not holds_weights(path)
    return path.name.endswith("tokenizer.json") or path.suffix == ".model"


def find_tokenizer(part: Part, given: Iterable[Path], notes: list[str]) -> T5Tokenizer | None:
    """The tokenizer that was given last, or lies beside the weights of a T5, or in tokenizer_N beside their text_encoder_N; else None.

    ValueError for one that was given and is none of T5's; one that merely lies there is left alone, and noted.
    """
    for file in _files(path for path in reversed(list(given)) if not is_clip(path)):
        return _opened(file)
    home = part.file.path.absolute().parent
    for file in _files([home, home.parent / home.name.replace("text_encoder", "tokenizer")]):
        if is_clip(file):
            continue
        try:
            return _opened(file)
        except ValueError as error:
            notes.append(f"left alone: {error}")
    return None


def _opened(file: Path) -> T5Tokenizer:
    """The tokenizer in a file, with the words that configurations beside it add: a spiece.model has no place for any."""
    tokenizer = T5Tokenizer.open(file)
    try:
        return tokenizer.with_words(words_beside(file.parent, CLASSES, tokenizer.knows, tokenizer.size))
    except ValueError as error:
        raise ValueError(f"{file.parent}: the words beside {file.name} cannot be used: {error}") from None


def _files(places: Iterable[Path]) -> Iterator[Path]:
    """Those that are there, of these places or within them."""
    for place in places:
        yield from (file for file in ([place / name for name in FILES] if place.is_dir() else [place]) if file.is_file())


def write_tokenizer(tokenizer: T5Tokenizer, folder: Path) -> None:
    """folder/tokenizer.json."""
    with replacing(folder / FILES[0]) as temporary:
        temporary.write_text(tokenizer.to_json(), encoding="utf-8")
