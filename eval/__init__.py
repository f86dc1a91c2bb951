"""Features, metrics, benchmarks and reports."""

import plain_diffusion

plain_diffusion.check("diffusion", "models", "samplers", "train")

from eval.metrics.accuracy import label_accuracy
from eval.metrics.figure import Figure
from eval.metrics.frechet import frechet_distance, frechet_infinity
from eval.metrics.inception_score import inception_score, ordered_splits, shuffled_splits
from eval.metrics.jackknife import jackknife
from eval.metrics.kernel import KernelDistance, gaussian_distance, kernel_distance, subset_kernel_distance
from eval.metrics.manifold import density_coverage, precision_recall
from eval.metrics.moments import GroupedMoments, Moments
from eval.metrics.neighbours import memorised, nearest_distance

__all__ = [
    "Figure",
    "GroupedMoments",
    "KernelDistance",
    "Moments",
    "density_coverage",
    "frechet_distance",
    "frechet_infinity",
    "gaussian_distance",
    "inception_score",
    "jackknife",
    "kernel_distance",
    "label_accuracy",
    "memorised",
    "nearest_distance",
    "ordered_splits",
    "precision_recall",
    "shuffled_splits",
    "subset_kernel_distance",
]
