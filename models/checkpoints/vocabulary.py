"""T5's vocabulary, which lies in a file of its own beside the weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from models.checkpoints.parts import Part
from models.files import replacing
from models.t5_tokenizer import T5Tokenizer

FILES = ("tokenizer.json", "spiece.model")


def is_vocabulary(path: Path) -> bool:
    """Whether a file is one by its name: tokenizer.json, spiece.model, or another .model."""
    return path.name.endswith("tokenizer.json") or path.suffix == ".model"


def find_tokenizer(part: Part, given: Iterable[Path]) -> T5Tokenizer | None:
    """The tokenizer that was given last, or lies beside the weights of a T5, or in tokenizer_N beside their text_encoder_N; else None."""
    home = part.file.path.absolute().parent
    beside = [folder / name for folder in (home, home.parent / home.name.replace("text_encoder", "tokenizer")) for name in FILES]
    path = next((path for path in (*reversed(list(given)), *beside) if path.is_file()), None)
    return None if path is None else T5Tokenizer.open(path)


def write_tokenizer(tokenizer: T5Tokenizer, folder: Path) -> None:
    """folder/tokenizer.json."""
    with replacing(folder / FILES[0]) as temporary:
        temporary.write_text(tokenizer.to_json(), encoding="utf-8")
