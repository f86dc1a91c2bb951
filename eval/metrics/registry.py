"""The metrics by name: their features, what they need besides the samples, and how they are computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from diffusion.spec import lookup
from eval.metrics.accuracy import label_accuracy, share
from eval.metrics.alignment import CONVENTIONS
from eval.metrics.figure import Figure
from eval.metrics.frechet import Reference, frechet_distance, frechet_infinity
from eval.metrics.inception_score import inception_score, ordered_splits, shuffled_splits
from eval.metrics.jackknife import jackknife, mean_of, student_quantile
from eval.metrics.kernel import gaussian_distance, kernel_distance, subset_kernel_distance
from eval.metrics.manifold import DensityCoverage, PrecisionRecall, density_coverage, precision_recall
from eval.metrics.neighbours import memorised, nearest_distance

if TYPE_CHECKING:
    from eval.feature_pass import Features
    from eval.features.extractor import TextFeatures
    from eval.features.protocols import Protocol
    from eval.results import Better
    from eval.statistics_file import Statistics

Need = Literal["reference", "training", "prompts", "labels"]
NORMAL = 1.959963984540054  # standard errors that hold 95 % of a normal distribution
SHARE = (0.0, 1.0)
SUBSETS = {"subsets": 100, "size": 1000}  # of the kernel distance, as papers cite it


@dataclass(frozen=True)
class Evidence:
    """What a metric may be computed from.

    output      of the extractors: "inception.pool"
    device      to compute on
    statistics  of the reference, if they come from a file
    embedded    prefix -> embeddings of the samples' prompts with that prefix before them
    wanted      (n,) the class that each sample was drawn for
    classes     (n,) of the samples and (N,) of the reference, if both have the same classes
    numbers     (n,) index of each sample within its class; None without classes
    """

    output: str
    samples: Features
    protocol: Protocol
    device: torch.device
    statistics: Statistics | None = None
    reference: Features | None = None
    training: Features | None = None
    embedded: Callable[[str], TextFeatures] | None = None
    wanted: Tensor | None = None
    classes: tuple[Tensor, Tensor] | None = None
    numbers: Tensor | None = None

    @cached_property
    def rows(self) -> Tensor:
        """(n, width) features of the samples."""
        return self.samples.rows[self.output].to(self.device)

    @cached_property
    def real(self) -> Tensor:
        """(N, width) features of the reference."""
        assert self.reference is not None
        return self.reference.rows[self.output].to(self.device)

    @cached_property
    def seen(self) -> Tensor:
        """(M, width) features of the pictures that the samples' model has seen."""
        assert self.training is not None
        return self.training.rows[self.output].to(self.device)

    @cached_property
    def real_moments(self) -> Reference:
        if self.statistics is not None:
            return Reference(self.statistics.moments[self.output.split(".")[1]])
        assert self.reference is not None
        return Reference(self.reference.moments[self.output].whole())

    @cached_property
    def precision_recall(self) -> PrecisionRecall:
        return precision_recall(self.rows, self.real)

    @cached_property
    def density_coverage(self) -> DensityCoverage:
        return density_coverage(self.rows, self.real)


@dataclass(frozen=True)
class Metric:
    """How a metric is computed.

    title        in tables
    output       extractor and output. "features", "neighbours" and "classifier" stand for those that the
                 settings name; "" for the extractor's main output
    keep         whether features are summed, in constant memory, or kept one by one
    needs        besides the samples
    settings     that its value depends on, for the result's basis
    least        pictures that it needs of each side
    of_class     and of each class, if samples and reference have the same ones, whose numbers then count as
                 fixed; 0: they never do
    by_groups    whether its value, not only its interval, depends on the number of groups
    per_picture  whether it is a mean over pictures, which does not depend on their number
    bounds       of its values, to which intervals are clipped
    """

    title: str
    output: tuple[str, str]
    keep: Literal["moments", "rows"]
    better: Better
    compute: Callable[[Evidence], Figure]
    needs: tuple[Need, ...] = ("reference",)
    settings: dict[str, Any] = field(default_factory=dict)
    least: int = 2
    of_class: int = 0
    by_groups: bool = False
    per_picture: bool = False
    bounds: tuple[float, float] = (-math.inf, math.inf)

    def figure(self, parts: Sequence[Evidence]) -> Figure:
        """The metric of the samples, or the mean over their parts, with its interval within the bounds."""
        found = mean_of([self.compute(evidence) for evidence in parts])
        return replace(found, low=_clipped(found.low, self.bounds), high=_clipped(found.high, self.bounds))

    def __str__(self) -> str:
        better = "" if self.better == "neither" else f"; {self.better} is better"
        return f"{self.title}{better}" + (f"; needs {', '.join(self.needs)}" if self.needs else "")


def _clipped(end: float, bounds: tuple[float, float]) -> float:
    return end if math.isnan(end) else min(max(end, bounds[0]), bounds[1])


def _frechet(evidence: Evidence) -> Figure:
    """Its interval is for other samples and the same reference."""
    samples, reference = evidence.samples.moments[evidence.output], evidence.real_moments

    def distance(without: int | None) -> float:
        return frechet_distance(samples.whole() if without is None else samples.without(without), reference)

    if samples.groups < 2 or samples.n < 2 * samples.groups:
        return Figure(distance(None))
    return jackknife(distance, samples.groups)


def _frechet_infinity(evidence: Evidence) -> Figure:
    return frechet_infinity(evidence.samples.moments[evidence.output], evidence.real_moments)


def _within(value: float, error: float) -> Figure:
    """A value with a normal interval of that standard error."""
    extra = {"error": error} if math.isfinite(error) else {}
    return Figure(value, value - NORMAL * error, value + NORMAL * error, extra)


def _mean(values: Tensor) -> Figure:
    """The mean of independent values, with a normal interval."""
    return _within(float(values.mean()), float(values.std()) / math.sqrt(len(values)))


def _kid(evidence: Evidence) -> Figure:
    """As in papers: classes are ignored."""
    return _within(*kernel_distance(evidence.rows, evidence.real))


def _kernel(evidence: Evidence) -> Figure:
    """If both sides have the same classes, the number of pictures of each counts as fixed, not as drawn."""
    return _within(*kernel_distance(evidence.rows, evidence.real, *(evidence.classes or ())))


def _kernel_subsets(evidence: Evidence) -> Figure:
    value, std = subset_kernel_distance(evidence.rows, evidence.real, **SUBSETS)
    return Figure(value, extra={"std": std})


def _cmmd(evidence: Evidence) -> Figure:
    return _within(*gaussian_distance(evidence.rows, evidence.real))


def _inception_score(evidence: Evidence) -> Figure:
    """Its interval is for the mean over splits."""
    rule, n, numbers = evidence.protocol.splits, evidence.samples.n, evidence.numbers
    if rule.size is None:
        splits = shuffled_splits(n, rule.count or 1, rule.shuffle_seed or 0)
    else:
        splits = ordered_splits(n, rule.size)
        if numbers is not None:  # classes in turn: a folder lists one after the other, and one class scores 1
            splits = splits[numbers.argsort(stable=True).argsort()]
    found = inception_score(evidence.rows, splits)
    count = int(found.extra["splits"])
    if count < 2:
        return found
    half = student_quantile(0.975, count - 1) * found.extra["std"] / math.sqrt(count - 1)
    return Figure(found.value, found.value - half, found.value + half, found.extra)


def _precision(evidence: Evidence) -> Figure:
    """Its interval is for the same reference."""
    return share(round(evidence.precision_recall.precision * evidence.samples.n), evidence.samples.n)


def _recall(evidence: Evidence) -> Figure:
    """Its interval is for the same samples."""
    return share(round(evidence.precision_recall.recall * len(evidence.real)), len(evidence.real))


def _density(evidence: Evidence) -> Figure:
    """Its interval is for the same reference."""
    return _within(evidence.density_coverage.density, evidence.density_coverage.error)


def _coverage(evidence: Evidence) -> Figure:
    """Its interval is for the same samples."""
    return share(round(evidence.density_coverage.coverage * len(evidence.real)), len(evidence.real))


def _alignment(convention: str) -> Callable[[Evidence], Figure]:
    def compute(evidence: Evidence) -> Figure:
        assert evidence.embedded is not None
        texts = evidence.embedded(CONVENTIONS[convention].prefix)
        scores = CONVENTIONS[convention](evidence.rows, texts.rows.to(evidence.rows.device)).double()
        found = _mean(scores)
        return replace(found, extra={**found.extra, "cut": float(sum(texts.truncated))})

    return compute


def _accuracy(evidence: Evidence) -> Figure:
    assert evidence.wanted is not None
    return label_accuracy(evidence.rows, evidence.wanted.to(evidence.device))


def _memorised(evidence: Evidence) -> Figure:
    found = memorised(evidence.rows, evidence.seen, evidence.real)
    return replace(found.share, extra={"threshold": found.threshold})


def _nearest(evidence: Evidence) -> Figure:
    return _mean(nearest_distance(evidence.rows, evidence.seen))


def _distance(title: str, extractor: str, output: str = "") -> Metric:
    return Metric(title, (extractor, output), "moments", "lower", _frechet, bounds=(0.0, math.inf))


def _rows(
    title: str, extractor: str, better: Better, compute: Callable[[Evidence], Figure], **more: Any
) -> Metric:
    return Metric(title, (extractor, ""), "rows", better, compute, **more)


def _score(title: str, convention: str) -> Metric:
    settings = {"scale": CONVENTIONS[convention].scale}
    return _rows(
        title, "clip", "higher", _alignment(convention), needs=("prompts",), settings=settings, least=1
    )


METRICS: dict[str, Metric] = {
    "fid": _distance("FID", "inception"),
    "fid_infinity": Metric(
        "FID-infinity", ("inception", ""), "moments", "lower", _frechet_infinity, least=30, by_groups=True,
    ),
    "sfid": _distance("sFID", "inception", "spatial"),
    "kid": _rows("KID", "inception", "lower", _kid, least=3),
    "kid_subsets": _rows(
        "KID, mean of subsets", "inception", "lower", _kernel_subsets, settings=SUBSETS,
        least=SUBSETS["size"],
    ),
    "inception_score": Metric(
        "Inception Score", ("inception", "logits_unbiased"), "rows", "higher", _inception_score, (), least=10,
    ),
    "fd_dinov2": _distance("FD-DINOv2", "dinov2"),
    "cmmd": _rows("CMMD", "cmmd", "lower", _cmmd),
    "clip_score": _score("CLIP score, x100", "clip_score"),
    "clip_score_hessel": _score("CLIPScore, x2.5", "hessel"),
    "frechet": _distance("Frechet distance", "features"),
    "kernel": _rows("Kernel distance", "features", "lower", _kernel, least=3, of_class=3),
    "precision": _rows(
        "Precision", "features", "higher", _precision, settings={"k": 3}, least=4, bounds=SHARE,
    ),
    "recall": _rows("Recall", "features", "higher", _recall, settings={"k": 3}, least=4, bounds=SHARE),
    "density": _rows("Density", "features", "higher", _density, settings={"k": 5}, least=6),
    "coverage": _rows("Coverage", "features", "higher", _coverage, settings={"k": 5}, least=6, bounds=SHARE),
    "accuracy": Metric(
        "Label accuracy", ("classifier", "logits"), "rows", "higher", _accuracy, ("labels",), least=1,
        per_picture=True, bounds=SHARE,
    ),
    "nearest": _rows(
        "Nearest training image", "neighbours", "neither", _nearest, needs=("training",), per_picture=True,
    ),
    "memorised": _rows(
        "Memorised", "neighbours", "lower", _memorised, needs=("reference", "training"),
        settings={"quantile": 0.01}, per_picture=True, bounds=SHARE,
    ),
}  # fmt: skip


def find_metric(name: str) -> Metric:
    """The metric of that name, or one from outside (see `diffusion.outside`). ValueError if it is unknown."""
    found = lookup("metric", name, METRICS)
    if not isinstance(found, Metric):
        raise ValueError(
            f"the metric {name!r} must be an eval.metrics.registry.Metric, not a {type(found).__name__}"
        )
    return found
