"""Opens files of tensors in every format. Opening reads the header; a tensor is read when it is used.

safetensors    safetensors_file.py
GGUF           gguf_file.py: GGML's format, whose tensors may be packed
pickles        pickle_file.py: .ckpt, .pt, ...
*.index.json   one model in several files

A file's first bytes determine its format, and its name only if they do not.
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
# Names of weights in folders of diffusers and transformers: a whole file, an index of shards, and a shard.
STEM = "(diffusion_pytorch_model|model|pytorch_model)"
WHOLE = re.compile(STEM + r"(\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)")
INDEX = re.compile(STEM + r"\.(?P<kind>safetensors|bin)\.index(\.(?P<variant>\w+))?\.json")
SHARD = re.compile(STEM + r"(\.\w+)?-\d+-of-\d+\.(safetensors|bin)")
WEB_PAGE = "a web page, as a download with a wrong address or without permission leaves"
NO_WEIGHTS = {  # how files begin that a failed download left
    b"<!doctype html": WEB_PAGE,
    b"<html": WEB_PAGE,
    b"version https://git-lfs": "Git LFS's pointer to the file, which `git lfs pull` replaces",
}


def open_tensors(path: str | Path) -> TensorFile:
    """Open a file of tensors. FileNotFoundError, or ValueError if it is damaged or in an unknown format."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with open(path, "rb") as file:
        begin = file.read(64)
    text = begin.lstrip().lower()
    if not text:
        raise ValueError(f"{path} holds no weights: it is empty")
    for start, what in NO_WEIGHTS.items():
        if text.startswith(start):
            raise ValueError(f"{path} holds no weights: it is {what}")
    if path.suffix == ".json" and ".index." in path.name:
        return _open_shards(path)
    if reader := _find_reader(begin) or READERS.get(path.suffix.lower()):
        return reader(path)
    endings = ", ".join((*SAFETENSORS, *PICKLES, *GGUF))
    raise ValueError(f"{path} is not a weights file: expected {endings} or a shards' .index.json")


def open_gguf(path: Path) -> TensorFile:
    from models.files import gguf_file  # here: importing this library imports no format that is not used

    return gguf_file.open_gguf(path)


def open_pickle(path: Path) -> TensorFile:
    from models.files import pickle_file

    return pickle_file.open_pickle(path)


READERS = (
    dict.fromkeys(SAFETENSORS, open_safetensors)
    | dict.fromkeys(PICKLES, open_pickle)
    | dict.fromkeys(GGUF, open_gguf)
)


def _find_reader(begin: bytes) -> Callable[[Path], TensorFile] | None:
    """The reader for a file that begins like this, None if unknown."""
    if begin.startswith(b"GGUF"):
        return open_gguf
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") <= MAX_HEADER:
        return open_safetensors
    if begin.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return open_pickle
    return None


def _open_shards(path: Path) -> TensorFile:
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise ValueError(f"{path} is damaged: it has no weight_map, which says which shard holds a tensor")
    if len(shard_of) > MAX_TENSORS:
        raise ValueError(f"{path} holds no model: no known one has as many as {len(shard_of):,} tensors")
    for key in shard_of:
        check_name(path, key)
    names = sorted(set(shard_of.values()))
    for name in names:
        plain = Path(name).name == name and name.isprintable() and len(name) <= 200
        if not plain or not name.endswith((*SAFETENSORS, *PICKLES)):
            raise ValueError(f"{path} names the shard {brief(name)}, which is not a weights file beside it")
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        present = f"{len(names) - len(missing)} of {len(names)} are there"
        raise FileNotFoundError(f"{path} names the shard {missing[0]}, which is missing ({present})")
    shards = {name: open_tensors(path.parent / name) for name in names}
    for key, name in shard_of.items():
        if key not in shards[name].tensors:
            raise ValueError(f"{path} says that {name} holds {key}, and it does not")
    for name, file in shards.items():
        if unlisted := [key for key in file.tensors if shard_of.get(key) != name]:
            raise ValueError(f"{path.parent / name} holds {unlisted[0]}, which {path.name} does not list")
    return TensorFile(path, {key: shards[name].tensors[key] for key, name in shard_of.items()})


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds files that are named like weights."""
    patterns = (WHOLE, INDEX, SHARD)
    return any(pattern.fullmatch(path.name) for path in folder.iterdir() for pattern in patterns)
