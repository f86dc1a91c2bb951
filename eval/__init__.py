"""Features, metrics, benchmarks and reports."""

from eval.frechet import frechet_distance
from eval.kernel import KernelDistance, kernel_distance
from eval.moments import Moments
from eval.neighbours import nearest_distance

__all__ = ["KernelDistance", "Moments", "frechet_distance", "kernel_distance", "nearest_distance"]
