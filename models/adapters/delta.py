"""What an adapter does to one published weight W: at strength s, W becomes W + s * difference(W).

At strength 0 that is the base for every kind, and small strengths are small changes. Each kind is one frozen
dataclass; factors are kept as their file has them, and computed with in W's dtype (float32 or wider).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Delta(ABC):
    """The change of one published weight."""

    @abstractmethod
    def difference(self, w: Tensor) -> Tensor:
        """What is added to `w` at strength 1, of its shape and dtype. ValueError where the sizes differ."""


@dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """LoRA (Hu et al. 2021, arXiv:2106.09685), with convolutions LoCon: scale * up @ down.

    down  (r, in) or (r, in, kh, kw)
    up    (out, r) or (out, r, 1, 1)
    mid   (r, r, kh, kw) of a convolution in Tucker form (LyCORIS), where down is (r, in, 1, 1)
    scale alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0
    mid: Tensor | None = None

    def difference(self, w: Tensor) -> Tensor:
        up, down = self.up.to(w).flatten(1), self.down.to(w)
        if up.shape[1] != len(down):
            raise ValueError(f"the rank of its two factors is {len(down)} and {up.shape[1]}")
        if self.mid is None:
            change = (up @ down.flatten(1)).unflatten(1, down.shape[1:])
        else:
            change = torch.einsum("mnkl,im,nj->ijkl", self.mid.to(w), up, down.flatten(1))
        return _like(w, change.mul_(self.scale))


@dataclass(frozen=True, eq=False)
class Hadamard(Delta):
    """LoHa (Hyeon-Woo et al. 2022, arXiv:2108.06098): scale * (a1 b1) o (a2 b2), the product element-wise.

    first, second  (a, b) with a (out, r) and b (r, in kh kw); or (a, b, t) with a (r, out), b (r, in) and the
                   core t (r, r, kh, kw)
    """

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    scale: float = 1.0

    def difference(self, w: Tensor) -> Tensor:
        return _like(w, _product(self.first, w) * _product(self.second, w) * self.scale)


@dataclass(frozen=True, eq=False)
class Kronecker(Delta):
    """LoKr (Yeh et al. 2024, arXiv:2309.14859): scale * kron(w1, w2).

    first, second  one whole factor, or its own factors as in `Hadamard`; w1 is a matrix
    """

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    scale: float = 1.0

    def difference(self, w: Tensor) -> Tensor:
        w1, w2 = _product(self.first, w), _product(self.second, w)
        return _like(w, torch.kron(w1[(...,) + (None,) * (w2.ndim - 2)], w2).mul_(self.scale))


@dataclass(frozen=True, eq=False)
class Added(Delta):
    """A whole difference, as of norms, biases and small layers."""

    value: Tensor

    def difference(self, w: Tensor) -> Tensor:
        return _like(w, self.value.to(w))


@dataclass(frozen=True, eq=False)
class Replaced(Delta):
    """A weight in the place of W; at strengths between 0 and 1 a mixture of both."""

    value: Tensor

    def difference(self, w: Tensor) -> Tensor:
        return _like(w, self.value.to(w)) - w


@dataclass(frozen=True, eq=False)
class Scaled(Delta):
    """(IA)^3 (Liu et al. 2022, arXiv:2205.05638): W times 1 + factor, with one factor per row or column.

    factor  (out, 1, ...) or (1, in, 1, ...): broadcasts to W
    """

    factor: Tensor

    def difference(self, w: Tensor) -> Tensor:
        return _like(w, w * self.factor.to(w))


@dataclass(frozen=True, eq=False)
class Magnitude(Delta):
    """DoRA (Liu et al. 2024, arXiv:2402.09353): m * V / ||V|| with V = W + inner.

    magnitude  one value for each of W's rows (dim 0), or of its columns (dim 1)
    dim        which of them; the norm is over all other dimensions
    """

    inner: Delta
    magnitude: Tensor
    dim: int = 0

    def difference(self, w: Tensor) -> Tensor:
        if self.magnitude.numel() != w.shape[self.dim]:
            side = ("rows", "columns")[self.dim]
            raise ValueError(f"it has {self.magnitude.numel()} magnitudes for {w.shape[self.dim]} {side}")
        v = w + self.inner.difference(w)
        norm = torch.linalg.vector_norm(v, dim=[d for d in range(w.ndim) if d != self.dim], keepdim=True)
        return v * (self.magnitude.to(w).view(norm.shape) / norm) - w


def _product(factors: tuple[Tensor, ...], w: Tensor) -> Tensor:
    """A whole factor, a @ b, or the core t with both of its sides multiplied."""
    parts = [factor.to(w) for factor in factors]
    if len(parts) == 1:
        return parts[0]
    if len(parts) == 2:
        return parts[0] @ parts[1].flatten(1)
    a, b, t = parts
    return torch.einsum("ijkl,ip,jr->prkl", t, a, b)


def _like(w: Tensor, change: Tensor) -> Tensor:
    """The change in W's shape: files hold 1x1 convolutions as matrices, too, and matrices as convolutions."""
    if change.ndim and change.shape[0] == w.shape[0] and change.numel() == w.numel():
        return change.reshape(w.shape)
    raise ValueError(f"it changes a weight of {list(change.shape)}, and the model's is {list(w.shape)}")
