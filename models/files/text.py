"""Reads and writes text and JSON, within limits and with errors in one line; hashes files and tensors."""

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
    """Plain values for strict JSON: numbers that are not finite become None, tuples lists, keys text."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write one object, indented; paths become text, numbers that are not finite null."""
    write_text(path, json.dumps(strict(content), indent=2, default=str, allow_nan=False) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, complete at any moment (`replacing`)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. ValueError if it is malformed or nested too deeply."""
    return _parse(text)


def parse_strict_json(text: str) -> Any:
    """The same; also ValueError for numbers that are not finite, and integers beyond 64 bits."""
    return _parse(text, parse_constant=_parse_float, parse_float=_parse_float, parse_int=_parse_int)


def _parse(text: str | bytes, **numbers: Callable[[str], float]) -> Any:
    try:
        return json.loads(text, **numbers)  # type: ignore[arg-type]  # not annotated for a mapping
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _parse_float(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"it holds {text:.40}, which is not a finite number")
    return number


def _parse_int(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= (number := int(text)) < 2**63:
        raise ValueError(f"it holds {text:.40}, which is too large a number")
    return number


def read_bytes(path: str | Path, max_size: int) -> bytes:
    """The contents of a file. ValueError if it has more than `max_size` bytes, or is a folder or pipe."""
    path = Path(path)
    if not path.is_file() and path.exists():
        kind = "folder" if path.is_dir() else "device or pipe"
        raise ValueError(f"{path} cannot be read: it is a {kind}, not a file")
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > max_size:
            raise ValueError(
                f"{path} has {size:,} bytes, more than the {max_size:,} that such a file may have"
            )
        return file.read(size)


def read_text(path: str | Path, max_size: int) -> str:
    """The text of a file. ValueError as in `read_bytes` and `decode_text`."""
    return decode_text(path, read_bytes(path, max_size))


def decode_text(source: object, content: bytes) -> str:
    r"""UTF-8 as text, with \n as the only line end. ValueError, which names the source, if it is not."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from None
    if "\0" in text:
        utf16 = "it holds NUL characters, as UTF-16 does; save it as UTF-8"
        raise ValueError(f"{source} is not UTF-8 text: {utf16}")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | Path, max_size: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in a file. ValueError, which names the file, if it is too large or holds none."""
    text = read_text(path, max_size)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def read_json_lines(path: str | Path) -> list[dict[str, float]]:
    """The objects of a file with one per line, such as metrics.jsonl, without an unfinished last line.

    ValueError names file and line if another line is damaged.
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
    """SHA-256 of a file, in hexadecimal. FileNotFoundError if it does not exist."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Callable[[], Tensor]]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes, in hexadecimal, by name; four threads, as hashing is slow."""

    def digest(read: Callable[[], Tensor]) -> str:
        return hashlib.sha256(read().cpu().contiguous().flatten().view(torch.uint8).numpy().data).hexdigest()

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))
