"""Removes what wrappers of networks, such as torch.compile's, add to the names of tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from models.files.stored import Stored, TensorFile

# Parts of names that torch.compile, DistributedDataParallel, DataParallel, FSDP, checkpointing and Lightning
# add, at any depth.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


def unwrapped(file: TensorFile) -> TensorFile:
    """The file with its tensors named without wrappers. ValueError if two would have the same name."""
    found: dict[str, Stored] = {}
    for key, stored in file.tensors.items():
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        if name in found:
            raise ValueError(
                f"{file.path} holds {found[name].key} and {key}, the same weights twice: keep one of them"
            )
        found[name] = stored
    return replace(file, tensors=found)


def shared_prefix(keys: Iterable[str]) -> str:
    """The longest dotted prefix of all names, such as "model.diffusion_model."; "" if there is none."""
    keys = list(keys)
    parts = [
        key.split(".")[:-1] for key in (min(keys, default=""), max(keys, default=""))
    ]  # the others lie between these
    count = next((i for i, (a, b) in enumerate(zip(*parts, strict=False)) if a != b), min(map(len, parts)))
    return "".join(f"{part}." for part in parts[0][:count])
