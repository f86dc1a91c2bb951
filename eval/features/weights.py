"""Weights from a local file into a network, all of them or none."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from models.files.tensors import open_tensors


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes, in the order of the names: for a network that came from no file."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file or a pickle, by their names; no code of it runs. Those of a parallel
    run lose their "module."."""
    tensors = {key: stored.mapped() for key, stored in open_tensors(path).tensors.items()}
    prefix = "module." if all(key.startswith("module.") for key in tensors) else ""
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items()}


def is_torchscript(path: str | Path) -> bool:
    """Whether it is an archive with code in it: a zip file, which torch.save writes too, with the table of
    constants of TorchScript."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(member.endswith("/constants.pkl") for member in archive.namelist())


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy them into the module's own of the same names, in its dtypes. ValueError names the first that is
    missing, unknown or of another shape.
    """
    own = module.state_dict()
    if missing := [key for key in own if key not in tensors]:
        raise ValueError(
            f"{source} is of another network: it lacks {missing[0]} ({len(missing)} of {len(own)} tensors)"
        )
    if unknown := [key for key in tensors if key not in own]:
        raise ValueError(
            f"{source} is of another network: it holds {unknown[0]}, which this one has not ({len(unknown)} "
            "in all)"
        )
    for key, tensor in tensors.items():
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"{source} is of another network: {key} has shape {list(tensor.shape)}, not "
                f"{list(own[key].shape)}"
            )
    module.load_state_dict(dict(tensors))
