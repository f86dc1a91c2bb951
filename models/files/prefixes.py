"""Removes prefixes from names of tensors, which wrappers of networks such as torch.compile add."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from models.files.stored import Stored, TensorFile

# Added at any depth by torch.compile, DistributedDataParallel, DataParallel, FSDP, checkpointing and
# Lightning.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


def without_wrappers(file: TensorFile) -> TensorFile:
    """The file with wrappers removed from its names. ValueError if two tensors would have the same name."""
    tensors: dict[str, Stored] = {}
    for key, stored in file.tensors.items():
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if name in tensors:
            both = f"{tensors[name].key} and {key}"
            raise ValueError(f"{file.path} holds {both}, the same weights twice: keep one of them")
        tensors[name] = stored
    return replace(file, tensors=tensors)


def shared_prefix(keys: Iterable[str]) -> str:
    """The longest dotted prefix of all names, such as "model.diffusion_model."; "" if there is none."""
    keys = list(keys)
    parts = [
        key.split(".")[:-1] for key in (min(keys, default=""), max(keys, default=""))
    ]  # others lie between
    count = next((i for i, (a, b) in enumerate(zip(*parts, strict=False)) if a != b), min(map(len, parts)))
    return "".join(f"{part}." for part in parts[0][:count])
