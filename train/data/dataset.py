"""Data sets. Indexed by a list, they return a batch: a dictionary of tensors with one row per sample.

x0       float32 (B, C, H, W): images in [-1, 1], or latents in the diffusion model's units
x0_std   the standard deviation if the data is an autoencoder's distribution; x0 is then its mean
label, context, vector   the conditions of the network
null.*   the null conditions, if the model does not define them
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from diffusion.noise import mix
from plain_diffusion.extras import extra

Batch = dict[str, Tensor]


class Dataset(Protocol):
    """A data set. num_classes is None without labels; shape is (C, H, W).

    With `labels`, a tensor (N,), on_error=skip replaces a sample by one of the same class.
    """

    num_classes: int | None
    shape: tuple[int, int, int]

    def __len__(self) -> int: ...
    def __getitems__(self, indices: Sequence[int]) -> Batch: ...


class TensorData:
    """Images (N, C, H, W) and labels (N,) held in memory."""

    def __init__(self, images: Tensor, labels: Tensor | None = None, num_classes: int | None = None) -> None:
        if len(images) == 0:
            raise ValueError("a data set needs at least one image")
        if labels is not None and num_classes is None:
            num_classes = int(labels.max()) + 1
        if labels is not None and ((labels < 0) | (labels >= (num_classes or 0))).any():
            low, high = int(labels.min()), int(labels.max())
            raise ValueError(f"labels must lie in 0 ... {(num_classes or 0) - 1}; found {low} to {high}")
        self.images, self.labels, self.num_classes = images, labels, num_classes
        self.shape = (images.shape[1], images.shape[2], images.shape[3])

    def __len__(self) -> int:
        return len(self.images)

    def pick_by_class(self, labels: Tensor, seed: int) -> Tensor:
        """Indices (N,) of different random images of the classes `labels` (N,). ValueError for too few."""
        if self.labels is None:
            raise ValueError("choosing images by class needs labels")
        generator = torch.Generator().manual_seed(mix(seed))
        chosen = torch.empty(len(labels), dtype=torch.long)
        for k in labels.unique().tolist():
            members, places = (self.labels == k).nonzero()[:, 0], (labels == k).nonzero()[:, 0]
            if len(members) < len(places):
                raise ValueError(f"there are {len(members)} images of class {k}, fewer than {len(places)}")
            chosen[places] = members[torch.randperm(len(members), generator=generator)[: len(places)]]
        return chosen

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        index = torch.as_tensor(indices)
        batch = {"x0": self.images[index]}
        return batch if self.labels is None else {**batch, "label": self.labels[index]}


def digits(
    split: Literal["train", "held_out", "all"] = "train", held_out: float = 0.3, seed: int = 0
) -> TensorData:
    """Handwritten digits: 1,797 labelled images of 8x8 in 17 grey levels (UCI, shipped with scikit-learn).

    split  "held_out" is a random share of each class that training never sees; the same for the same seed
    """
    with extra("digits"):
        from sklearn.datasets import load_digits  # imported here, as it takes half a second

    raw = load_digits()
    labels = torch.from_numpy(raw.target).long()
    images = torch.from_numpy(raw.images).float()[:, None] / 8 - 1  # 0 ... 16 -> [-1, 1]
    if split == "all":
        return TensorData(images, labels, 10)
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is a share of each class, in [0, 1), not {held_out:g}")
    if split not in ("train", "held_out"):
        raise ValueError(f"split must be 'train', 'held_out' or 'all', not {split!r}")
    generator = torch.Generator().manual_seed(seed)
    unseen = torch.zeros(len(labels), dtype=torch.bool)
    for k in range(10):
        members = (labels == k).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        unseen[members[: round(held_out * len(members))]] = True
    chosen = unseen if split == "held_out" else ~unseen
    return TensorData(images[chosen], labels[chosen], 10)


def shuffled_batches(n: int, batch_size: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Endless batches of indices below n, from batch number `start` on, so that training resumes anywhere.

    Each epoch is a permutation keyed by (seed, epoch). A batch may span two epochs.
    """
    epoch, order = -1, torch.empty(0, dtype=torch.long)
    position = start * batch_size
    while True:
        batch: list[int] = []
        while len(batch) < batch_size:
            if position // n != epoch:
                epoch = position // n
                order = torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed, epoch)))
            taken = order[position % n : position % n + batch_size - len(batch)].tolist()
            batch += taken
            position += len(taken)
        yield batch
