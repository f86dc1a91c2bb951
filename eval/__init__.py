"""Features, metrics, benchmarks and reports."""

from eval.metrics.frechet import frechet_distance
from eval.metrics.kernel import KernelDistance, kernel_distance
from eval.metrics.moments import Moments
from eval.metrics.neighbours import nearest_distance

__all__ = ["KernelDistance", "Moments", "frechet_distance", "kernel_distance", "nearest_distance"]
