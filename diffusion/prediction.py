"""What a network outputs, as two coefficients: out = a * x0 + b * eps. Target, inversion and loss scale follow from them.

eps   (0, 1)             Ho et al. 2020                x0    (1, 0)
v     (-sigma, alpha)    Salimans & Ho 2022            flow  (-1, 1)    Liu et al. 2022, Lipman et al. 2023
edm   (sigma/(sd*q), -sd/q), q = sqrt(sigma^2 + sd^2)  Karras et al. 2022: the raw network F, alpha = 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from diffusion.level import Level, Scalar, broadcast


@dataclass(frozen=True, slots=True)
class Estimate:
    """A denoiser's belief about a noisy sample: x_t = alpha * x0 + sigma * eps holds for the pair. Unpacks as `x0, eps`.

    variance  what a network with a learned variance says of it, in [-1, 1] (Nichol & Dhariwal 2021, eq. 15), else None
    """

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None

    def __iter__(self) -> Iterator[Tensor]:
        yield self.x0
        yield self.eps

    @classmethod
    def from_x0(cls, x_t: Tensor, x0: Tensor, level: Level, variance: Tensor | None = None) -> Estimate:
        """Complete an estimate of x0 with the noise it implies. level.sigma > 0."""
        alpha, sigma = broadcast(level.alpha, x_t), broadcast(level.sigma, x_t)
        return cls(x0, (x_t - alpha * x0) / sigma, variance)


@dataclass(frozen=True)
class Prediction:
    """One parametrisation: `coefficients(level) -> (a, b)`, arithmetic that works on floats and on (B,) tensors alike."""

    name: str
    coefficients: Callable[[Level], tuple[Scalar, Scalar]]

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """What the network should output for a sample made of x0 and eps, same shape."""
        a, b = self.coefficients(level)
        return broadcast(a, x0) * x0 + broadcast(b, eps) * eps

    def determinant(self, level: Level) -> Scalar:
        """D = alpha*b - sigma*a, the determinant of (x0, eps) -> (x_t, out). 0: the output says nothing about x0.

        An error d in the output is an error -sigma/D * d in x0 and alpha/D * d in eps: losses convert by these.
        """
        a, b = self.coefficients(level)
        return level.alpha * b - level.sigma * a

    def estimate(self, x_t: Tensor, out: Tensor, level: Level) -> Estimate:
        """Solve x_t = alpha*x0 + sigma*eps, out = a*x0 + b*eps for (x0, eps). Raises where that has no solution."""
        a, b = self.coefficients(level)
        det = self.determinant(level)
        if bool((det == 0).any()) if isinstance(det, Tensor) else det == 0:
            raise ValueError(f"{self.name}-prediction {self._silence(level)}")
        x0 = broadcast(b / det, x_t) * x_t - broadcast(level.sigma / det, x_t) * out
        eps = broadcast(level.alpha / det, x_t) * out - broadcast(a / det, x_t) * x_t
        return Estimate(x0, eps)

    def _silence(self, level: Level) -> str:
        """What the output leaves open where the determinant is 0, and the way out."""
        at_data = level.sigma == 0
        if bool(at_data.any()) if isinstance(at_data, Tensor) else at_data:
            return f"says nothing about eps at t={level.t}, which is data: end the grid above it (t_end=...)"
        return (
            f"says nothing about x0 at t={level.t}, where alpha is {level.alpha}: "
            "use v- or flow-prediction, or start the grid below pure noise (t_start=...)"
        )


def edm(sigma_data: float = 0.5) -> Prediction:
    """EDM's raw network F for data of standard deviation `sigma_data`: x0 = c_skip*x_t + c_out*F (Karras et al. 2022, table 1)."""

    def coefficients(level: Level) -> tuple[Scalar, Scalar]:
        q = (level.sigma**2 + sigma_data**2) ** 0.5
        return level.sigma / (sigma_data * q), -sigma_data / q

    return Prediction("edm", coefficients)


EPS = Prediction("eps", lambda level: (0.0, 1.0))
X0 = Prediction("x0", lambda level: (1.0, 0.0))
V = Prediction("v", lambda level: (-level.sigma, level.alpha))
FLOW = Prediction("flow", lambda level: (-1.0, 1.0))
EDM = edm()

PREDICTIONS: dict[str, Prediction] = {p.name: p for p in (EPS, X0, V, FLOW, EDM)}
