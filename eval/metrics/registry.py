"""The metrics by name: which features each is computed of, what it needs besides the samples, and how it is
computed."""

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
    """All that a metric may be computed of.

    output      of the extractors: "inception.pool"
    device      to compute on
    statistics  of the reference, where they come from a file
    embedded    of each sample's prompt, with a prefix before it, an embedding
    wanted      (n,) the class that each sample was asked to show
    classes     (n,) of the samples and (N,) of the reference, where both have the same ones
    numbers     (n,) the number of each sample among those of its class; None without classes
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
        """Of the reference."""
        if self.statistics is not None:
            return Reference(self.statistics.moments[self.output.split(".")[1]])
        assert self.reference is not None
        return Reference(self.reference.moments[self.output].whole())

    @cached_property
    def precision_recall(self) -> PrecisionRecall:
        """With the paper's k."""
        return precision_recall(self.rows, self.real)

    @cached_property
    def density_coverage(self) -> DensityCoverage:
        """With the paper's k."""
        return density_coverage(self.rows, self.real)


@dataclass(frozen=True)
class Metric:
    """How a metric is computed.

    title     as tables say it
    output    extractor and output. "features", "neighbours" and "classifier" stand for those that the
              settings name; "" for the extractor's main output
    keep      whether features are summed up, in memory that does not grow, or kept one by one
    needs     besides the samples
    settings  that its value depends on, as the result's basis says them
    least     pictures that it needs of each side
    of_class  and of each class, where samples and reference have the same ones and their numbers count as
              fixed; 0: they never do
    by_groups whether its value, and not its interval only, depends on the number of groups
    per_picture  whether it is a mean over pictures, which does not depend on how many they are
    bounds    no value lies outside, and no interval needs to
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
        """The metric of samples or, where they come in parts, its mean over these, with its interval within
        the bounds."""
        found = mean_of([self.compute(evidence) for evidence in parts])
        return replace(found, low=_clipped(found.low, self.bounds), high=_clipped(found.high, self.bounds))

    def __str__(self) -> str:
        better = "" if self.better == "neither" else f"; {self.better} is better"
        return f"{self.title}{better}" + (f"; needs {', '.join(self.needs)}" if self.needs else "")


def _clipped(end: float, bounds: tuple[float, float]) -> float:
    return end if math.isnan(end) else min(max(end, bounds[0]), bounds[1])


def _frechet(evidence: Evidence) -> Figure:
    """Its interval says how it varies with the samples; the reference is held."""
    samples, reference = evidence.samples.moments[evidence.output], evidence.real_moments

    def distance(without: int | None) -> float:
        return frechet_distance(samples.whole() if without is None else samples.without(without), reference)

    if samples.groups < 2 or samples.n < 2 * samples.groups:
        return Figure(distance(None))
    return jackknife(distance, samples.groups)


def _frechet_infinity(evidence: Evidence) -> Figure:
    return frechet_infinity(evidence.samples.moments[evidence.output], evidence.real_moments)


def _within(value: float, error: float) -> Figure:
    """With a normal interval of that standard error."""
    return Figure(
        value,
        value - NORMAL * error,
        value + NORMAL * error,
        {"error": error} if math.isfinite(error) else {},
    )


def _kid(evidence: Evidence) -> Figure:
    """As papers have it, whatever the classes."""
    return _within(*kernel_distance(evidence.rows, evidence.real))


def _kernel(evidence: Evidence) -> Figure:
    """Where both sides have the same classes, their numbers count as fixed, as those of samples are;
    otherwise as drawn."""
    return _within(*kernel_distance(evidence.rows, evidence.real, *(evidence.classes or ())))


def _kernel_subsets(evidence: Evidence) -> Figure:
    value, std = subset_kernel_distance(evidence.rows, evidence.real, **SUBSETS)
    return Figure(value, extra={"std": std})


def _cmmd(evidence: Evidence) -> Figure:
    return _within(*gaussian_distance(evidence.rows, evidence.real))


def _inception_score(evidence: Evidence) -> Figure:
    """Its interval is that of a mean over splits."""
    rule, n, numbers = evidence.protocol.splits, evidence.samples.n, evidence.numbers
    splits = (
        ordered_splits(n, rule.size)
        if rule.size
        else shuffled_splits(n, rule.count or 1, rule.shuffle_seed or 0)
    )
    if (
        rule.size and numbers is not None
    ):  # classes in turn: a folder has them one after the other, and a split of one class scores 1
        splits = splits[numbers.argsort(stable=True).argsort()]
    found = inception_score(evidence.rows, splits)
    count = int(found.extra["splits"])
    if count < 2:
        return found
    half = student_quantile(0.975, count - 1) * found.extra["std"] / math.sqrt(count - 1)
    return Figure(found.value, found.value - half, found.value + half, found.extra)


def _precision(evidence: Evidence) -> Figure:
    """Its interval is for the reference's balls as they are."""
    return share(round(evidence.precision_recall.precision * evidence.samples.n), evidence.samples.n)


def _recall(evidence: Evidence) -> Figure:
    """Its interval is for the samples' balls as they are."""
    return share(round(evidence.precision_recall.recall * len(evidence.real)), len(evidence.real))


def _density(evidence: Evidence) -> Figure:
    """Its interval is for the reference's balls as they are."""
    return _within(evidence.density_coverage.density, evidence.density_coverage.error)


def _coverage(evidence: Evidence) -> Figure:
    """Its interval is for the samples as they are."""
    return share(round(evidence.density_coverage.coverage * len(evidence.real)), len(evidence.real))


def _alignment(convention: str) -> Callable[[Evidence], Figure]:
    def compute(evidence: Evidence) -> Figure:
        assert evidence.embedded is not None
        texts = evidence.embedded(CONVENTIONS[convention].prefix)
        scores = CONVENTIONS[convention](evidence.rows, texts.rows.to(evidence.rows.device)).double()
        found = _within(float(scores.mean()), float(scores.std()) / math.sqrt(len(scores)))
        return replace(found, extra={**found.extra, "cut": float(sum(texts.truncated))})

    return compute


def _accuracy(evidence: Evidence) -> Figure:
    assert evidence.wanted is not None
    return label_accuracy(evidence.rows, evidence.wanted.to(evidence.device))


def _memorised(evidence: Evidence) -> Figure:
    found = memorised(evidence.rows, evidence.seen, evidence.real)
    return replace(found.share, extra={"threshold": found.threshold})


def _nearest(evidence: Evidence) -> Figure:
    distance = nearest_distance(evidence.rows, evidence.seen)
    return _within(float(distance.mean()), float(distance.std()) / math.sqrt(len(distance)))


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
        "FID-infinity", ("inception", ""), "moments", "lower", _frechet_infinity, least=30, by_groups=True
    ),
    "sfid": _distance("sFID", "inception", "spatial"),
    "kid": _rows("KID", "inception", "lower", _kid, least=3),
    "kid_subsets": _rows(
        "KID, mean of subsets", "inception", "lower", _kernel_subsets, settings=SUBSETS, least=SUBSETS["size"]
    ),
    "inception_score": Metric(
        "Inception Score",
        ("inception", "logits_unbiased"),
        "rows",
        "higher",
        _inception_score,
        needs=(),
        least=10,
    ),
    "fd_dinov2": _distance("FD-DINOv2", "dinov2"),
    "cmmd": _rows("CMMD", "cmmd", "lower", _cmmd),
    "clip_score": _score("CLIP score, x100", "clip_score"),
    "clip_score_hessel": _score("CLIPScore, x2.5", "hessel"),
    "frechet": _distance("Frechet distance", "features"),
    "kernel": _rows("Kernel distance", "features", "lower", _kernel, least=3, of_class=3),
    "precision": _rows(
        "Precision", "features", "higher", _precision, settings={"k": 3}, least=4, bounds=SHARE
    ),
    "recall": _rows("Recall", "features", "higher", _recall, settings={"k": 3}, least=4, bounds=SHARE),
    "density": _rows("Density", "features", "higher", _density, settings={"k": 5}, least=6),
    "coverage": _rows("Coverage", "features", "higher", _coverage, settings={"k": 5}, least=6, bounds=SHARE),
    "accuracy": Metric(
        "Label accuracy",
        ("classifier", "logits"),
        "rows",
        "higher",
        _accuracy,
        ("labels",),
        least=1,
        per_picture=True,
        bounds=SHARE,
    ),
    "nearest": _rows(
        "Nearest training image", "neighbours", "neither", _nearest, needs=("training",), per_picture=True
    ),
    "memorised": Metric(
        "Memorised",
        ("neighbours", ""),
        "rows",
        "lower",
        _memorised,
        ("reference", "training"),
        {"quantile": 0.01},
        per_picture=True,
        bounds=SHARE,
    ),
}


def find_metric(name: str) -> Metric:
    """The metric of that name, or one from outside (see `diffusion.outside`). ValueError for a name that is
    unknown."""
    found = lookup("metric", name, METRICS)
    if not isinstance(found, Metric):
        raise ValueError(
            f"the metric {name!r} must be an eval.metrics.registry.Metric, not a {type(found).__name__}"
        )
    return found
