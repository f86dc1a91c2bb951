"""Checks before the work: whether a metric has the pictures, prompts and classes that it needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from eval.metrics.registry import Metric
from train.data.source import Source


def check_conditions(name: str, metric: Metric, samples: Source) -> None:
    """ValueError if a metric needs prompts or classes, and there are none."""
    if "prompts" in metric.needs and samples.prompts is None:
        raise ValueError(
            f"{name} needs the prompts of {samples.origin}: give prompts=FILE, which names them (.jsonl, "
            ".csv) or is in order (.txt)"
        )
    if "labels" in metric.needs and samples.labels is None:
        raise ValueError(
            f"{name} needs the classes of the pictures of {samples.origin}: keep them in a folder per class"
        )


def check_number(name: str, metric: Metric, side: str, source: Source, n: int) -> None:
    """ValueError if n usable pictures of a side are too few for a metric."""
    if n < metric.least:
        usable = "" if n == len(source) else f" of {len(source)} that can be used"
        raise ValueError(
            f"{name} needs at least {metric.least} {side.removesuffix('s')} pictures, and {source.origin} "
            f"has {n}{usable}"
        )


def check_classes(name: str, metric: Metric, compared: Sequence[Source]) -> None:
    """ValueError if classes whose numbers count as fixed have too few pictures for a metric."""
    counts = [Counter(source.labels or ()) for source in compared]
    if metric.of_class and counts[0] and counts[0].keys() == counts[-1].keys():
        for source, count in zip(compared, counts, strict=True):
            label, fewest = min(count.items(), key=lambda item: item[1])
            if fewest < metric.of_class:
                raise ValueError(
                    f"{name} needs at least {metric.of_class} pictures of each class, and {source.origin} "
                    f"has {fewest} of {label}"
                )
