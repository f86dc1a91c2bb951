"""Files that are whole at any moment, and the JSON that accompanies runs and results."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_UMASK = os.umask(0)  # reading it sets it, so this is done once, before there are threads
os.umask(_UMASK)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Within the block, a temporary path to write to; at its end that file takes the place of `path`, flushed to disk.

    A reader finds the old file or the new one, never a part, also after a crash; what a crash leaves behind, the next write
    takes over. Makes the folders it needs. Raises OSError that names the path where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.chmod(0o666 & ~_UMASK)  # some writers make files that nobody else may read
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """One object, indented for people; paths as text."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """One object. ValueError that names the file where it holds none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def read_json_lines(path: str | Path) -> list[dict[str, float]]:
    """A file of one JSON object per line, such as a run's metrics.jsonl; a last line that a crash cut short is left out.

    ValueError that names file and line for any other that is no object.
    """
    text = Path(path).read_text()
    objects: list[dict[str, float]] = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            objects.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(text.splitlines()) and not text.endswith("\n"):
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


def check_writable(path: str | Path) -> None:
    """OSError unless a file can be written there: for what is found out before hours of work."""
    with replacing(Path(path).with_name(f".{Path(path).name}.trial")) as temporary:
        temporary.touch()
    Path(path).with_name(f".{Path(path).name}.trial").unlink()
