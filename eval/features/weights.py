"""Weights of extractors from local files."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.files.tensors import open_tensors


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes, in the order of the names: for networks without a file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file or a pickle, without a common "module."; no code of it runs."""
    tensors = {key: stored.mapped() for key, stored in open_tensors(path).tensors.items()}
    prefix = "module." if all(key.startswith("module.") for key in tensors) else ""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is an archive with code: a zip file with TorchScript's table of constants."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.endswith("/constants.pkl") for member in archive.namelist())


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy tensors into a module. ValueError names the first that is missing, unknown or of another shape."""
    own = module.state_dict()
    if missing := [key for key in own if key not in tensors]:
        raise ValueError(
            f"{source} is of another network: it lacks {missing[0]} ({len(missing)} of {len(own)} tensors)"
        )
    if unknown := [key for key in tensors if key not in own]:
        raise ValueError(f"{source} is of another network: {unknown[0]} is unknown ({len(unknown)} in all)")
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            shapes = f"{list(tensor.shape)}, not {list(own[key].shape)}"
            raise ValueError(f"{source} is of another network: {key} has shape {shapes}")
    module.load_state_dict(dict(tensors))
