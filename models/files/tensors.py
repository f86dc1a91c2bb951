"""Files of tensors, whatever their format: what one holds is known from its header alone; a tensor is read
when it is asked for.

safetensors    safetensors_file.py
GGUF           gguf_file.py: GGML's format, whose tensors may be packed
pickles        pickle_file.py: .ckpt, .pt, ...
*.index.json   several files that are one

A file's first bytes say which of these it is, whatever its name; its name decides only where they say
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from diffusion.messages import brief
from models.files.safetensors_file import open_safetensors
from models.files.stored import MAX_HEADER, MAX_TENSORS, TensorFile, check_name
from models.files.text import read_json

SAFETENSORS = (".safetensors", ".sft")
GGUF = (".gguf",)
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# How weights are named in folders of diffusers and transformers: a whole file, the index of several, and one
# of these.
STEM = "(diffusion_pytorch_model|model|pytorch_model)"
WHOLE = re.compile(STEM + r"(\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)")
INDEX = re.compile(STEM + r"\.(?P<kind>safetensors|bin)\.index(\.(?P<variant>\w+))?\.json")
SHARD = re.compile(STEM + r"(\.\w+)?-\d+-of-\d+\.(safetensors|bin)")
NO_WEIGHTS = {  # how files begin that a download left in place of the one that was meant
    b"<!doctype html": "a web page, as a download with a wrong address or without permission leaves",
    b"<html": "a web page, as a download with a wrong address or without permission leaves",
    b"version https://git-lfs": "Git LFS's pointer to the file, which `git lfs pull` puts in its place",
}


def open_tensors(path: str | Path) -> TensorFile:
    """Look into a file. FileNotFoundError, or ValueError where it is damaged or of no kind that is known."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with open(path, "rb") as file:
        begin = file.read(64)
    text = begin.lstrip().lower()
    if what := next(
        (what for start, what in NO_WEIGHTS.items() if text.startswith(start)), None if text else "empty"
    ):
        raise ValueError(f"{path} holds no weights: it is {what}")
    if path.suffix == ".json" and ".index." in path.name:
        return _open_shards(path)
    if reader := _reader_of(begin) or READERS.get(path.suffix.lower()):
        return reader(path)
    raise ValueError(
        f"{path} is no file of weights: expected {', '.join((*SAFETENSORS, *PICKLES, *GGUF))} or a shards' "
        ".index.json"
    )


def open_gguf(path: Path) -> TensorFile:
    from models.files import (
        gguf_file,
    )  # here, and so below: to import this library needs no format that is not opened

    return gguf_file.open_gguf(path)


def open_pickle(path: Path) -> TensorFile:
    from models.files import pickle_file

    return pickle_file.open_pickle(path)


READERS = (
    dict.fromkeys(SAFETENSORS, open_safetensors)
    | dict.fromkeys(PICKLES, open_pickle)
    | dict.fromkeys(GGUF, open_gguf)
)


def _reader_of(begin: bytes) -> Callable[[Path], TensorFile] | None:
    """What reads a file that begins so, None where that does not tell."""
    if begin.startswith(b"GGUF"):
        return open_gguf
    if (
        begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") <= MAX_HEADER
    ):  # its header's length, and the header
        return open_safetensors
    if begin.startswith(b"PK\x03\x04") or (
        begin[:1] == b"\x80" and begin[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    ):
        return open_pickle
    return None


def _open_shards(path: Path) -> TensorFile:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{path} is damaged: it has no weight_map, the table of what lies in which shard")
    if len(places) > MAX_TENSORS:
        raise ValueError(f"{path} holds no model: no known one has as many as {len(places):,} tensors")
    for key in places:
        check_name(path, key)
    shards = sorted(set(places.values()))
    if odd := [
        name
        for name in shards
        if Path(name).name != name
        or not name.isprintable()
        or len(name) > 200
        or not name.endswith((*SAFETENSORS, *PICKLES))
    ]:
        raise ValueError(f"{path} names the shard {brief(odd[0])}, which is no file of weights beside it")
    if lost := [name for name in shards if not (path.parent / name).is_file()]:
        raise FileNotFoundError(
            f"{path} names the shard {lost[0]}, which is not there ({len(shards) - len(lost)} of "
            f"{len(shards)} are)"
        )
    opened = {name: open_tensors(path.parent / name) for name in shards}
    tensors = {}
    for key, name in places.items():
        if key not in opened[name].tensors:
            raise ValueError(f"{path} says that {name} holds {key}, and it does not")
        tensors[key] = opened[name].tensors[key]
    for name, file in opened.items():
        if unnamed := [key for key in file.tensors if places.get(key) != name]:
            raise ValueError(f"{path.parent / name} holds {unnamed[0]}, which {path.name} does not name")
    return TensorFile(path, tensors)


def holds_weights(folder: Path) -> bool:
    """Whether files that are named as weights lie in it."""
    return any(
        WHOLE.fullmatch(path.name) or INDEX.fullmatch(path.name) or SHARD.fullmatch(path.name)
        for path in folder.iterdir()
    )
