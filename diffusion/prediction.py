"""The output of a network, as two coefficients: out = a * x0 + b * eps. Everything else follows from them.

eps   (0, 1)             Ho et al. 2020                x0    (1, 0)
v     (-sigma, alpha)    Salimans & Ho 2022            flow  (-1, 1)    Liu et al. 2022, Lipman et al. 2023
edm   (sigma/(sd*q), -sd/q), q = sqrt(sigma^2 + sd^2)  Karras et al. 2022: the raw network F, alpha = 1

A prediction may also precondition the network's input and time (EDM's c_in and c_noise).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from diffusion.level import Level, Scalar, linear
from diffusion.spec import make

Rows = tuple[tuple[Scalar, Scalar], tuple[Scalar, Scalar]]


class Estimate:
    """The x0 and eps that a denoiser estimates, with x_t = alpha * x0 + sigma * eps. Unpacks as `x0, eps`.

    Stored as combinations of two tensors, x0 = i p + j q and eps = m p + n q; for a network p and q are x_t
    and its output. So a step that needs only `at(s)` is one pass over x_t and the output, without x0 or eps.

    variance  the learned variance in [-1, 1] (Nichol & Dhariwal 2021, eq. 15), or None
    """

    def __init__(
        self, p: Tensor, q: Tensor, variance: Tensor | None = None, *, rows: Rows = ((1.0, 0.0), (0.0, 1.0))
    ) -> None:
        """Estimate(x0, eps); or with `rows` ((i, j), (m, n)), combinations of p and q."""
        self._p, self._q, self._rows, self.variance = p, q, rows, variance

    @classmethod
    def from_x0(cls, x_t: Tensor, x0: Tensor, level: Level, variance: Tensor | None = None) -> Estimate:
        """An estimate of x0, and the eps that it implies. level.sigma > 0."""
        return cls(x_t, x0, variance, rows=((0.0, 1.0), (1 / level.sigma, -level.alpha / level.sigma)))

    @cached_property
    def x0(self) -> Tensor:
        """Clean data, like x_t."""
        return linear(*self._rows[0], self._p, self._q)

    @cached_property
    def eps(self) -> Tensor:
        """The noise, like x_t."""
        return linear(*self._rows[1], self._p, self._q)

    def combine(self, a: Scalar, b: Scalar) -> Tensor:
        """a * x0 + b * eps; (-1, 1) gives the velocity of flow time."""
        (i, j), (m, n) = self._rows
        return linear(a * i + b * m, a * j + b * n, self._p, self._q)

    def at(self, level: Level) -> Tensor:
        """The sample with this x0 and eps at another level: a DDIM step."""
        return self.combine(level.alpha, level.sigma)

    def __iter__(self) -> Iterator[Tensor]:
        yield self.x0
        yield self.eps


@dataclass(frozen=True)
class Prediction:
    """One parametrisation: functions of a level that work on floats and on (B,) tensors.

    coefficients  (a, b) of the network's output a * x0 + b * eps
    input_scale   factor of x_t at the network's input (EDM's c_in); None: 1
    network_time  the network's time input (EDM's c_noise); None: the schedule's own t
    title         what the output is, in words
    """

    name: str
    coefficients: Callable[[Level], tuple[Scalar, Scalar]]
    input_scale: Callable[[Level], Scalar] | None = None
    network_time: Callable[[Level], Scalar] | None = None
    title: str = ""

    def target(self, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
        """What the network should output for a sample made of x0 and eps, same shape."""
        a, b = self.coefficients(level)
        return linear(a, b, x0, eps)

    def determinant(self, level: Level) -> Scalar:
        """D = alpha*b - sigma*a, the determinant of (x0, eps) -> (x_t, out). If 0, out does not determine x0.

        An error d of the output is an error -sigma/D * d of x0 and alpha/D * d of eps: losses convert by
        these.
        """
        a, b = self.coefficients(level)
        return level.alpha * b - level.sigma * a

    def estimate(self, x_t: Tensor, out: Tensor, level: Level, variance: Tensor | None = None) -> Estimate:
        """Solve x_t = alpha*x0 + sigma*eps, out = a*x0 + b*eps for (x0, eps). ValueError if D = 0."""
        a, b = self.coefficients(level)
        det = self.determinant(level)
        if bool((det == 0).any()) if isinstance(det, Tensor) else det == 0:
            raise ValueError(f"{self.name}-prediction {self._silence(level)}")
        rows = (b / det, -level.sigma / det), (-a / det, level.alpha / det)
        return Estimate(x_t, out, variance, rows=rows)

    def _silence(self, level: Level) -> str:
        """What the output leaves open if D is 0, and how to avoid it."""
        at_data = level.sigma == 0
        if bool(at_data.any()) if isinstance(at_data, Tensor) else at_data:
            return f"does not determine eps at t={level.t}, which is data: end the grid above it (t_end=...)"
        return (
            f"does not determine x0 at t={level.t}, where alpha is {level.alpha}: "
            "use v- or flow-prediction, or start the grid below pure noise (t_start=...)"
        )


def edm(sigma_data: float = 0.5) -> Prediction:
    """EDM's raw network F with its preconditioning, sigma_data the data's std (Karras et al. 2022, table 1).

    x0 = c_skip * x_t + c_out * F(c_in * x_t, c_noise), for alpha = 1: the schedule "ve".
    """
    if not sigma_data > 0:
        raise ValueError(f"sigma_data is a standard deviation, above 0, not {sigma_data:g}")

    def coefficients(level: Level) -> tuple[Scalar, Scalar]:
        q = (level.sigma**2 + sigma_data**2) ** 0.5
        return level.sigma / (sigma_data * q), -sigma_data / q

    def c_in(level: Level) -> Scalar:
        return 1 / (level.sigma**2 + sigma_data**2) ** 0.5

    def c_noise(level: Level) -> Scalar:
        return level.sigma.log() / 4 if isinstance(level.sigma, Tensor) else math.log(level.sigma) / 4

    name = "edm" if sigma_data == 0.5 else f"edm, sigma_data={sigma_data:g}"
    return Prediction(name, coefficients, c_in, c_noise)


EPS = Prediction("eps", lambda level: (0.0, 1.0), title="The noise (Ho et al. 2020).")
X0 = Prediction("x0", lambda level: (1.0, 0.0), title="The clean sample.")
V = Prediction(
    "v",
    lambda level: (-level.sigma, level.alpha),
    title="alpha eps - sigma x0 (Salimans & Ho 2022, section 4).",
)
FLOW = Prediction(
    "flow", lambda level: (-1.0, 1.0), title="The velocity eps - x0 (Liu et al. 2022; Lipman et al. 2023)."
)
EDM = edm()

PREDICTIONS: dict[str, Callable[..., Prediction]] = {
    "eps": lambda: EPS,
    "x0": lambda: X0,
    "v": lambda: V,
    "flow": lambda: FLOW,
    "edm": edm,
}


def build_prediction(spec: str | Mapping[str, Any]) -> Prediction:
    """A prediction from its name, or from a description such as {"name": "edm", "sigma_data": 0.5}."""
    return make("prediction", {"name": spec} if isinstance(spec, str) else spec, PREDICTIONS)
