"""T5's vocabulary, which lies in a file of its own beside the weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from models.checkpoints.folder import holds_weights
from models.checkpoints.parts import Part
from models.files import replacing
from models.t5_tokenizer import T5Tokenizer

FILES = ("tokenizer.json", "spiece.model")


def is_vocabulary(path: Path) -> bool:
    """Whether a path is one by its name, tokenizer.json, spiece.model or another .model, or a folder of one without weights."""
    if path.is_dir():
        return any((path / name).is_file() for name in FILES) and not holds_weights(path)
    return path.name.endswith("tokenizer.json") or path.suffix == ".model"


def find_tokenizer(part: Part, given: Iterable[Path]) -> T5Tokenizer | None:
    """The tokenizer that was given last, or lies beside the weights of a T5, or in tokenizer_N beside their text_encoder_N; else None."""
    home = part.file.path.absolute().parent
    places = [*reversed(list(given)), home, home.parent / home.name.replace("text_encoder", "tokenizer")]
    files = [file for place in places for file in ([place / name for name in FILES] if place.is_dir() else [place])]
    path = next((file for file in files if file.is_file()), None)
    return None if path is None else T5Tokenizer.open(path)


def write_tokenizer(tokenizer: T5Tokenizer, folder: Path) -> None:
    """folder/tokenizer.json."""
    with replacing(folder / FILES[0]) as temporary:
        temporary.write_text(tokenizer.to_json(), encoding="utf-8")
