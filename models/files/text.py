"""Text and JSON in files: read within limits, and told in one line where they are damaged. Hashes of files
and tensors."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.files.writing import replacing

MAX_JSON = 2**24  # bytes, of configurations, indices and results
MAX_JSON_LINES = 2**30  # bytes, of a run's metrics


def strict(value: Any) -> Any:
    """Plain values as strict JSON can hold them: numbers that are not finite become None, tuples lists, keys
    text."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """One object, indented for people; paths as text, numbers that are not finite as null."""
    write_text(path, json.dumps(strict(content), indent=2, default=str, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """A text file in UTF-8, whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds. ValueError where it is none, or nested too deeply."""
    return _parsed(text)


def parse_strict_json(text: str) -> Any:
    """What `parse_json` does; also ValueError for numbers that are not finite, by name or by size, and for
    whole ones beyond 64 bits."""
    return _parsed(text, parse_constant=_finite, parse_float=_finite, parse_int=_whole)


def _parsed(text: str | bytes, **numbers: Callable[[str], float]) -> Any:
    try:
        return json.loads(text, **numbers)  # type: ignore[arg-type]  # whose annotations know no mapping of them
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"it holds {text:.40}, where a finite number is meant")
    return number


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**63:
        raise ValueError(f"it holds {text:.40}, which is too large a number")
    return number


def read_bytes(path: str | Path, most: int) -> bytes:
    """What a file holds that has at most so many bytes. ValueError that names it where it has more, or is no
    file but a folder or pipe."""
    path = Path(path)
    if not path.is_file() and path.exists():
        raise ValueError(
            f"{path} cannot be read: it is a {'folder' if path.is_dir() else 'device or pipe'}, not a file"
        )
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"{path} has {size:,} bytes, more than the {most:,} that such a file may have")
        return file.read(size)


def read_text(path: str | Path, most: int) -> str:
    """What a file of at most so many bytes says (`decode_text`). ValueError as in `read_bytes` too."""
    return decode_text(path, read_bytes(path, most))


def decode_text(source: object, content: bytes) -> str:
    """UTF-8 as text, with line ends of any system. ValueError that names its source where it is something
    else."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is no UTF-8 text: {error}") from None
    if "\0" in text:
        raise ValueError(
            f"{source} is no UTF-8 text: it holds NUL characters, as UTF-16 does; save it as UTF-8"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | Path, most: int = MAX_JSON) -> dict[str, Any]:
    """One object, of a file of at most so many bytes. ValueError that names the file where it holds none."""
    text = read_text(path, most)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def read_json_lines(path: str | Path) -> list[dict[str, float]]:
    """A file of one JSON object per line, such as a run's metrics.jsonl; a last line that a crash cut short
    is left out.

    ValueError that names file and line for any other that is no object.
    """
    text = read_text(path, MAX_JSON_LINES)
    lines = text.splitlines()
    objects: list[dict[str, float]] = []
    for number, line in enumerate(lines, 1):
        try:
            objects.append(dict(parse_json(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise ValueError(f"{path} is damaged in line {number}: {error}") from None
    return objects


def sha256_of_file(path: str | Path) -> str:
    """Of its bytes, in hexadecimal. FileNotFoundError where there is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Callable[[], Tensor]]) -> dict[str, str]:
    """Of the bytes of each, in hexadecimal, by name. Several at once, since a processor hashes slower than a
    disk reads: each holds one."""

    def digest(read: Callable[[], Tensor]) -> str:
        return hashlib.sha256(read().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))
