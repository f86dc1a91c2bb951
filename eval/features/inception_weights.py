"""The published files of the FID network, by one set of names, with normalisation folded in.

All hold the weights of TensorFlow's graph of 5 December 2015, which defines the Frechet Inception distance.
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
    """A published file. size: in bytes."""

    name: str
    sha256: str
    size: int


# pytorch-fid's plain tensors, and NVIDIA's TorchScript archive, of StyleGAN2-ADA and clean-fid.
STATE_DICT = Published(FILES["inception"].name, FILES["inception"].sha256, FILES["inception"].size)
TORCHSCRIPT = Published(
    name="inception-2015-12-05.pt",
    sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
    size=95_607_719,
)
PUBLISHED = (STATE_DICT, TORCHSCRIPT)

# Names of convolutions in the TorchScript archive, with the graph's scopes, and in the plain file, with
# torchvision's. The first are from convert_weights of miemie2013/ppgan.
_STEM = {
    "conv": "Conv2d_1a_3x3", "conv_1": "Conv2d_2a_3x3", "conv_2": "Conv2d_2b_3x3",
    "conv_3": "Conv2d_3b_1x1", "conv_4": "Conv2d_4a_3x3",
}  # fmt: skip
_A = {
    "conv": "branch1x1", "tower.conv": "branch5x5_1", "tower.conv_1": "branch5x5_2",
    "tower_1.conv": "branch3x3dbl_1", "tower_1.conv_1": "branch3x3dbl_2",
    "tower_1.conv_2": "branch3x3dbl_3", "tower_2.conv": "branch_pool",
}  # fmt: skip
_B = {
    "conv": "branch3x3", "tower.conv": "branch3x3dbl_1", "tower.conv_1": "branch3x3dbl_2",
    "tower.conv_2": "branch3x3dbl_3",
}  # fmt: skip
_C = {
    "conv": "branch1x1", "tower.conv": "branch7x7_1", "tower.conv_1": "branch7x7_2",
    "tower.conv_2": "branch7x7_3", "tower_1.conv": "branch7x7dbl_1", "tower_1.conv_1": "branch7x7dbl_2",
    "tower_1.conv_2": "branch7x7dbl_3", "tower_1.conv_3": "branch7x7dbl_4",
    "tower_1.conv_4": "branch7x7dbl_5", "tower_2.conv": "branch_pool",
}  # fmt: skip
_D = {
    "tower.conv": "branch3x3_1", "tower.conv_1": "branch3x3_2", "tower_1.conv": "branch7x7x3_1",
    "tower_1.conv_1": "branch7x7x3_2", "tower_1.conv_2": "branch7x7x3_3", "tower_1.conv_3": "branch7x7x3_4",
}  # fmt: skip
_E = {
    "conv": "branch1x1", "tower_conv": "branch3x3_1", "tower_mixed_conv": "branch3x3_2a",
    "tower_mixed_conv_1": "branch3x3_2b", "tower_1_conv": "branch3x3dbl_1",
    "tower_1_conv_1": "branch3x3dbl_2", "tower_1_mixed_conv": "branch3x3dbl_3a",
    "tower_1_mixed_conv_1": "branch3x3dbl_3b", "tower_2_conv": "branch_pool",
}  # fmt: skip
_BLOCKS = {
    "mixed": ("Mixed_5b", _A), "mixed_1": ("Mixed_5c", _A), "mixed_2": ("Mixed_5d", _A),
    "mixed_3": ("Mixed_6a", _B), "mixed_4": ("Mixed_6b", _C), "mixed_5": ("Mixed_6c", _C),
    "mixed_6": ("Mixed_6d", _C), "mixed_7": ("Mixed_6e", _C), "mixed_8": ("Mixed_7a", _D),
    "mixed_9": ("Mixed_7b", _E), "mixed_10": ("Mixed_7c", _E),
}  # fmt: skip
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
    """A file's tensors by the names of the plain file, on the CPU, and its SHA-256.

    ValueError unless it is published, or hashes to `sha256`. OSError if it cannot be read.
    """
    path = Path(path)
    digest = sha256_of_file(path)
    expected = {sha256} if sha256 else {published.sha256 for published in PUBLISHED}
    if digest not in expected:
        names = ", ".join(published.name for published in PUBLISHED)
        what = "what was asked for" if sha256 else f"one of {names}"
        raise ValueError(
            f"{path} has SHA-256 {digest} and is not {what}: give sha256={digest!r} if it is what you mean"
        )
    if is_torchscript(path):
        return from_torchscript(torch.jit.load(path, map_location="cpu").state_dict(), str(path)), digest
    return dict(torch.load(path, map_location="cpu", weights_only=True)), digest


def from_torchscript(state: Mapping[str, Tensor], path: str = "the archive") -> dict[str, Tensor]:
    """The archive's tensors by the plain file's names, with scales of 1. ValueError for other keys."""
    if unknown := sorted(state.keys() - FROM_TORCHSCRIPT.keys()):
        raise ValueError(f"{path} has {unknown[0]!r}, which the FID network does not have")
    if missing := sorted(FROM_TORCHSCRIPT.keys() - state.keys()):
        raise ValueError(f"{path} lacks {missing[0]!r}, which the FID network needs")
    named = {FROM_TORCHSCRIPT[key]: value for key, value in state.items()}
    return named | {
        f"{name}.bn.weight": torch.ones_like(named[f"{name}.bn.bias"]) for name in SCOPES.values()
    }


def folded(state: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution with its normalisation folded in, computed in float64."""
    scale, shift, mean, var = (state[f"{name}.bn.{part}"].double() for part in NORMALISATION)
    scale = scale / (var + EPS).sqrt()
    return state[f"{name}.conv.weight"].double() * scale[:, None, None, None], shift - mean * scale


def check_state(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], path: str) -> None:
    """ValueError that names a missing or unknown tensor, or one of another shape."""
    for_training = {key for key in state if key.endswith(".num_batches_tracked")}
    if unknown := sorted(state.keys() - shapes.keys() - for_training):
        raise ValueError(f"{path} has {unknown[0]!r}, which the FID network does not have")
    for key, shape in shapes.items():
        if key not in state:
            raise ValueError(f"{path} lacks {key!r}, which the FID network needs")
        if tuple(state[key].shape) != shape:
            raise ValueError(f"{path}: {key} must have shape {shape}, not {tuple(state[key].shape)}")


def random_state(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Random weights by the names of the plain file, scaled so that features neither vanish nor explode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(key: str, shape: tuple[int, ...]) -> Tensor:
        if key.endswith(("running_var", "bn.weight")):
            return torch.empty(shape).uniform_(0.8, 1.2, generator=generator)
        gain = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
        return gain * torch.randn(shape, generator=generator)

    return {key: draw(key, shape) for key, shape in shapes.items()}
