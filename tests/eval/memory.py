"""How much memory features of 2,048 numbers take while they are collected, in a process of its own: python -m
tests.eval.memory COUNT ...

Prints, per count of pictures, the bytes at most beyond what the process had before, as a JSON list.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from eval.bench.harness import peak_resident
from eval.feature_pass import PassParams, extract_features
from tests.eval.test_feature_pass import ALONE, Numbered, Projected
from train.data.source import Unreadable


class Wide(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.widths = {"rows": 3, "wide": 2048}

    def features(self, x: Tensor, outputs: Collection[str]) -> dict[str, Tensor]:
        wide = super().features(x, ["wide"])["wide"].repeat(1, 256)
        return {name: {"wide": wide, "rows": wide[:, :3]}[name] for name in outputs}


class Endless(Numbered):
    """The same picture over and over."""

    def __init__(self, n: int) -> None:
        super().__init__(1)
        self.names = range(n)  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int]) -> list[Tensor | Unreadable]:
        return [self._images[0]] * len(indices)


def peak(n: int) -> float:
    params = PassParams(groups=3, progress=False)
    return peak_resident(
        lambda: extract_features(Endless(n), {"projected": Wide()}, ["projected.wide"], [], params, ALONE)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    peak(300)  # what is allocated once, is
    print(json.dumps([peak(int(n)) for n in sys.argv[1:]]))
