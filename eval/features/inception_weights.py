"""The published files of the FID network, and their weights as the network wants them: by one set of names,
normalisation folded in.

All are one set of weights: the TensorFlow graph of 5 December 2015 that the Frechet Inception distance is
defined by.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eval.features.weights import is_torchscript
from models.download import FILES
from models.files.text import sha256_of_file

EPS = 1e-3  # of the batch normalisation
NORMALISATION = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Published:
    """A file: its name, what it must hash to, and its bytes."""

    name: str
    sha256: str
    size: int


# pytorch-fid's plain tensors, and NVIDIA's TorchScript archive, which StyleGAN2-ADA and after, and clean-fid,
# read.
STATE_DICT = Published(FILES["inception"].name, FILES["inception"].sha256, FILES["inception"].size)
TORCHSCRIPT = Published(
    name="inception-2015-12-05.pt",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    size=95_607_719,
)
PUBLISHED = (STATE_DICT, TORCHSCRIPT)

# What the TorchScript archive, which kept the graph's scopes, calls a convolution; and what the plain file,
# which has torchvision's names, calls it. The first were read in miemie2013/ppgan: convert_weights, which
# runs the archive beside a copy of it, name by name.
_STEM = {
    "conv": "Conv2d_1a_3x3",
    "conv_1": "Conv2d_2a_3x3",
    "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1",
    "conv_4": "Conv2d_4a_3x3",
}
_A = {
    "conv": "branch1x1",
    "tower.conv": "branch5x5_1",
    "tower.conv_1": "branch5x5_2",
    "tower_1.conv": "branch3x3dbl_1",
    "tower_1.conv_1": "branch3x3dbl_2",
    "tower_1.conv_2": "branch3x3dbl_3",
    "tower_2.conv": "branch_pool",
}
_B = {
    "conv": "branch3x3",
    "tower.conv": "branch3x3dbl_1",
    "tower.conv_1": "branch3x3dbl_2",
    "tower.conv_2": "branch3x3dbl_3",
}
_C = {
    "conv": "branch1x1",
    "tower.conv": "branch7x7_1",
    "tower.conv_1": "branch7x7_2",
    "tower.conv_2": "branch7x7_3",
    "tower_1.conv": "branch7x7dbl_1",
    "tower_1.conv_1": "branch7x7dbl_2",
    "tower_1.conv_2": "branch7x7dbl_3",
    "tower_1.conv_3": "branch7x7dbl_4",
    "tower_1.conv_4": "branch7x7dbl_5",
    "tower_2.conv": "branch_pool",
}
_D = {
    "tower.conv": "branch3x3_1",
    "tower.conv_1": "branch3x3_2",
    "tower_1.conv": "branch7x7x3_1",
    "tower_1.conv_1": "branch7x7x3_2",
    "tower_1.conv_2": "branch7x7x3_3",
    "tower_1.conv_3": "branch7x7x3_4",
}
_E = {
    "conv": "branch1x1",
    "tower_conv": "branch3x3_1",
    "tower_mixed_conv": "branch3x3_2a",
    "tower_mixed_conv_1": "branch3x3_2b",
    "tower_1_conv": "branch3x3dbl_1",
    "tower_1_conv_1": "branch3x3dbl_2",
    "tower_1_mixed_conv": "branch3x3dbl_3a",
    "tower_1_mixed_conv_1": "branch3x3dbl_3b",
    "tower_2_conv": "branch_pool",
}
_BLOCKS = {
    "mixed": ("Mixed_5b", _A),
    "mixed_1": ("Mixed_5c", _A),
    "mixed_2": ("Mixed_5d", _A),
    "mixed_3": ("Mixed_6a", _B),
    "mixed_4": ("Mixed_6b", _C),
    "mixed_5": ("Mixed_6c", _C),
    "mixed_6": ("Mixed_6d", _C),
    "mixed_7": ("Mixed_6e", _C),
    "mixed_8": ("Mixed_7a", _D),
    "mixed_9": ("Mixed_7b", _E),
    "mixed_10": ("Mixed_7c", _E),
}
_PARAMETERS = {"weight": "conv.weight", "beta": "bn.bias", "mean": "bn.running_mean", "var": "bn.running_var"}
SCOPES = _STEM | {
    f"{scope}.{inner}": f"{block}.{name}"
    for scope, (block, names) in _BLOCKS.items()
    for inner, name in names.items()
}
FROM_TORCHSCRIPT = {
    "output.weight": "fc.weight",
    "output.bias": "fc.bias",
    **{
        f"layers.{scope}.{old}": f"{name}.{new}"
        for scope, name in SCOPES.items()
        for old, new in _PARAMETERS.items()
    },
}


def read_weights(path: str | Path, sha256: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Tensors of a file by the names of the plain one, on the CPU, and the file's SHA-256.

    The file must be one that is published, or hash to `sha256`: ValueError. OSError where it cannot be read.
    """
    path = Path(path)
    digest = sha256_of_file(path)
    expected = {sha256} if sha256 else {published.sha256 for published in PUBLISHED}
    if digest not in expected:
        what = (
            "what was asked for"
            if sha256
            else f"one of {', '.join(published.name for published in PUBLISHED)}"
        )
        raise ValueError(
            f"{path} has SHA-256 {digest} and is not {what}: give sha256={digest!r} if it is what you mean"
        )
    if is_torchscript(path):
        return from_torchscript(torch.jit.load(path, map_location="cpu").state_dict(), str(path)), digest
    return dict(torch.load(path, map_location="cpu", weights_only=True)), digest


def from_torchscript(state: Mapping[str, Tensor], path: str = "the archive") -> dict[str, Tensor]:
    """The archive's tensors by the plain file's names. Its normalisation has no scale; the plain file's is 1.
    ValueError at another key."""
    if unknown := sorted(state.keys() - FROM_TORCHSCRIPT.keys()):
        raise ValueError(f"{path} has {unknown[0]!r}, which the FID network has no place for")
    if missing := sorted(FROM_TORCHSCRIPT.keys() - state.keys()):
        raise ValueError(f"{path} lacks {missing[0]!r}, which the FID network needs")
    named = {FROM_TORCHSCRIPT[key]: value for key, value in state.items()}
    return named | {
        f"{name}.bn.weight": torch.ones_like(named[f"{name}.bn.bias"]) for name in SCOPES.values()
    }


def folded(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does what this one and the normalisation behind it do, computed
    in float64."""
    scale, shift, mean, var = (state[f"{name}.bn.{part}"].double() for part in NORMALISATION)
    scale = scale / (var + EPS).sqrt()
    return state[f"{name}.conv.weight"].double() * scale[:, None, None, None], shift - mean * scale


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: str) -> None:
    """ValueError, in one line that names it, at a tensor too many, too few, or of another shape."""
    counted = {
        key for key in state if key.endswith(".num_batches_tracked")
    }  # how long it was trained, which inference does not need
    if unknown := sorted(state.keys() - shapes.keys() - counted):
        raise ValueError(f"{path} has {unknown[0]!r}, which the FID network has no place for")
    for key, shape in shapes.items():
        if key not in state:
            raise ValueError(f"{path} lacks {key!r}, which the FID network needs")
        if tuple(state[key].shape) != shape:
            raise ValueError(
                f"{path}: {key} has shape {tuple(state[key].shape)}, and the FID network's has {shape}"
            )


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights drawn so that features neither die out nor explode on their way, by the names and shapes of the
    plain file."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(key: str, shape: tuple[int, ...]) -> Tensor:
        if key.endswith(("running_var", "bn.weight")):
            return torch.empty(shape).uniform_(0.8, 1.2, generator=generator)
        gain = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
        return gain * torch.randn(shape, generator=generator)

    return {key: drawn(key, shape) for key, shape in shapes.items()}
