"""Streaming mean and covariance of features, in float64; and by groups of samples, bitwise reproducible."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MANY = 2**20 + 1  # more than features are wide, and MANY - 1 is a power of two, which multiplies exactly


class Moments:
    """n, mean and covariance of all features of `update`, `merge` and `without` (Chan et al. 1979).

    Sums are centred, since E[x^2] - E[x]^2 loses precision (for features around 10 +- 0.01, say). a.merge(b)
    and b.merge(a) are bitwise equal. Sums are on the device of the first CUDA features, else on the CPU.
    """

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self._scatter = torch.zeros(dim, dim, dtype=torch.float64)  # sum of (x - mean)(x - mean)^T

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """The moments of features (N, D)."""
        moments = cls(features.shape[1])
        moments.update(features)
        return moments

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Moments:
        """The inverse of `state_dict`, bitwise."""
        moments = cls(len(state["mean"]))
        moments.n = int(state["n"])
        moments.mean, moments._scatter = state["mean"].clone(), state["scatter"].clone()
        return moments

    @classmethod
    def exactly(cls, mean: Tensor, covariance: Tensor) -> Moments:
        """A distribution, or an unknown number of samples, of mean (D,) and covariance (D, D); n is MANY."""
        moments = cls(len(mean))
        moments.n, moments.mean, moments._scatter = MANY, mean.double(), covariance.double() * (MANY - 1)
        return moments

    def state_dict(self) -> dict[str, Tensor]:
        """n (), mean (D,) and scatter (D, D), the covariance times n - 1."""
        return {"n": torch.tensor(self.n), "mean": self.mean.clone(), "scatter": self._scatter.clone()}

    def update(self, features: Tensor) -> None:
        """Add features (N, D) of any float dtype. ValueError for another width, NaN and infinity."""
        x = checked(features, len(self.mean))
        if len(x) == 0:
            return
        mean = x.mean(0)
        centred = x - mean
        self._add(len(x), mean, centred.T @ centred)

    def merge(self, other: Moments) -> None:
        """Add the samples of another."""
        if other.n:
            self._add(other.n, other.mean, other._scatter)

    def without(self, other: Moments) -> Moments:
        """The moments without a part of the samples, to about 1e-15 of this covariance."""
        n = self.n - other.n
        if n < 0:
            raise ValueError(f"moments of {other.n} samples cannot be a part of {self.n}")
        rest = Moments(len(self.mean))
        if n:
            rest.n = n
            mean, scatter = other.mean.to(self.mean.device), other._scatter.to(self.mean.device)
            rest.mean = self.mean + (self.mean - mean) * (other.n / n)
            between = (rest.mean - mean) * (n * other.n / self.n) ** 0.5
            rest._scatter = (self._scatter - scatter).addr_(between, between, alpha=-1)
        return rest

    @property
    def covariance(self) -> Tensor:
        """The unbiased estimate (D, D); needs n >= 2."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 samples, not {self.n}")
        return self._scatter / (self.n - 1)

    def _add(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        device = mean.device if mean.is_cuda else self.mean.device
        if not self.n:  # zeros, which need not travel
            self.mean, self._scatter = (
                torch.zeros_like(each, device=device) for each in (self.mean, self._scatter)
            )
        self.mean, self._scatter = self.mean.to(device), self._scatter.to(device)
        mean, scatter = mean.to(device), scatter.to(device)
        total, delta = self.n + n, mean - self.mean
        between = delta * (self.n * n / total) ** 0.5
        self._scatter.add_(scatter).addr_(between, between)
        # (n_a mean_a + n_b mean_b) / n, symmetric in both sides, and exact for equal means.
        self.mean = (self.mean + mean) / 2 + delta * ((n - self.n) / total / 2)
        self.n = total


class GroupedMoments:
    """Moments of samples in groups, sample i in group i % groups, for estimates that leave a group out.

    A group adds its samples in the order of their indices, in blocks of exactly `block`, and `whole` merges
    groups in order. So results are bitwise the same for any batches, for work that was saved and resumed, and
    for any number of processes that share whole groups and merge in the end, on one kind of device and number
    of threads. Memory is constant: groups * (D + block) * D numbers.
    """

    def __init__(self, dim: int, groups: int = 17, block: int = 256) -> None:
        if min(dim, groups, block) < 1:
            raise ValueError(f"dim, groups and block must be at least 1, not {dim}, {groups} and {block}")
        self.dim, self.groups, self.block = dim, groups, block
        self._groups = [_Group(dim) for _ in range(groups)]
        self._whole: Moments | None = None

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> GroupedMoments:
        """The inverse of `state_dict`, bitwise, also for what is added later."""
        dim, groups, block = state["shape"].tolist()
        grouped = cls(dim, groups, block)
        pending = state["pending"].split(state["pending_rows"].tolist())
        for k, g in enumerate(state["group"].tolist()):
            mine = grouped._groups[g]
            mine.moments = Moments.from_state({name: state[name][k] for name in ("n", "mean", "scatter")})
            mine.last, mine.pending = int(state["last"][k]), [pending[k].clone()]
        return grouped

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors for saving and sending: moments of groups with samples, and rows of unfinished blocks."""
        found = [g for g, group in enumerate(self._groups) if group.n]
        groups = [self._groups[g] for g in found]
        empty = torch.zeros(0, self.dim, dtype=torch.float64)
        return {
            "shape": torch.tensor([self.dim, self.groups, self.block]),
            "group": torch.tensor(found, dtype=torch.long),
            "last": torch.tensor([group.last for group in groups], dtype=torch.long),
            "n": torch.tensor([group.moments.n for group in groups], dtype=torch.long),
            "mean": torch.stack([group.moments.mean.cpu() for group in groups]) if groups else empty,
            "scatter": torch.stack([group.moments._scatter.cpu() for group in groups])
            if groups
            else empty[:, :, None].expand(0, self.dim, self.dim),
            "pending": torch.cat([empty, *(rows.cpu() for group in groups for rows in group.pending)]),
            "pending_rows": torch.tensor([group.waiting for group in groups], dtype=torch.long),
        }

    @property
    def n(self) -> int:
        """The number of samples."""
        return sum(group.n for group in self._groups)

    def update(self, indices: Tensor, features: Tensor) -> None:
        """Add features (N, D) of samples `indices` (N,) >= 0, ascending within a group over all calls.

        ValueError for other indices, another width, NaN and infinity; nothing is added then.
        """
        x, indices = checked(features, self.dim), indices.cpu()
        if indices.shape != x.shape[:1]:
            raise ValueError(
                f"{tuple(indices.shape)} indices for {len(x)} feature vectors: one each is needed"
            )
        members = {
            g: (indices % self.groups == g).nonzero()[:, 0] for g in (indices % self.groups).unique().tolist()
        }
        for g, rows in members.items():
            self._groups[g].check(indices[rows])
        self._whole = None
        for g, rows in members.items():
            self._groups[g].add(x[rows.to(x.device, non_blocking=True)], int(indices[rows[-1]]), self.block)

    def merge(self, other: GroupedMoments) -> None:
        """Add other samples. Groups that only one side has stay bitwise the same.

        A group that both have ends its last block on both sides, and continues after the higher last index.
        """
        if (self.dim, self.groups, self.block) != (other.dim, other.groups, other.block):
            ours, theirs = ((m.dim, m.groups, m.block) for m in (self, other))
            raise ValueError(f"grouped moments of different dim, groups, block: {ours} and {theirs}")
        self._whole = None
        for mine, theirs_ in zip(self._groups, other._groups, strict=True):
            mine.merge(theirs_)

    def group(self, g: int) -> Moments:
        """The moments of group g alone."""
        return self._groups[g].closed()

    def whole(self) -> Moments:
        """The moments of all samples."""
        if self._whole is None:
            self._whole = Moments(self.dim)
            for group in self._groups:
                self._whole.merge(group.closed())
        copy = Moments(self.dim)
        copy.merge(self._whole)
        return copy

    def without(self, g: int) -> Moments:
        """The moments of all samples but those of group g."""
        return self.whole().without(self.group(g))


class _Group:
    """Samples of one group in ascending order: moments of full blocks, and rows of an unfinished one."""

    def __init__(self, dim: int) -> None:
        self.moments, self.last = Moments(dim), -1
        self.pending: list[Tensor] = []

    @property
    def waiting(self) -> int:
        return sum(map(len, self.pending))

    @property
    def n(self) -> int:
        return self.moments.n + self.waiting

    def check(self, indices: Tensor) -> None:
        """ValueError unless these come after the last, in order."""
        before = torch.cat([torch.tensor([self.last]), indices[:-1]])
        wrong = (indices <= before).nonzero()[:, 0].tolist()
        if wrong:
            late, last = int(indices[wrong[0]]), int(before[wrong[0]])
            raise ValueError(
                f"sample {late} came after sample {last} of its group: each must come once, in order"
            )

    def add(self, rows: Tensor, last: int, block: int) -> None:
        self.pending = [*(earlier.to(rows.device) for earlier in self.pending), rows]
        self.last = last
        if self.waiting >= block:
            *full, rest = torch.cat(self.pending).split(block)
            if len(rest) == block:
                full, rest = [*full, rest], rest[:0]
            for rows in full:
                self.moments.update(rows.clone())  # a new tensor, whose memory is always aligned alike
            self.pending = [rest.clone()] if len(rest) else []

    def closed(self) -> Moments:
        """The moments with the waiting rows as a last, shorter block."""
        moments = Moments(len(self.moments.mean))
        moments.merge(self.moments)
        if self.pending:
            moments.update(torch.cat(self.pending))
        return moments

    def merge(self, other: _Group) -> None:
        if other.n == 0:
            return
        if self.n == 0:
            self.moments.merge(other.moments)
            self.pending = [rows.clone() for rows in other.pending]
        else:
            self.moments, self.pending = self.closed(), []
            self.moments.merge(other.closed())
        self.last = max(self.last, other.last)


def checked(features: Tensor, dim: int) -> Tensor:
    """features (N, dim) in float64, on CUDA or the CPU. ValueError for another width, NaN and infinity."""
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"features must have shape (N, {dim}), not {tuple(features.shape)}")
    x = features.detach().to(features.device if features.is_cuda else "cpu", torch.float64)
    if not x.isfinite().all():
        raise ValueError(f"{int((~x.isfinite()).any(1).sum())} of {len(x)} feature vectors are not finite")
    return x
