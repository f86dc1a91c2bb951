"""What an evaluation is to do: everything opened and checked before the work, and what each metric is given of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffusion.spec import check_at_least_one, check_names
from eval.collect import Collected, CollectParams, Seen, collect, forget, unseen
from eval.features.clip import ClipFeatures, TextFeatures
from eval.features.extractor import Extractor
from eval.features.protocols import PROTOCOLS
from eval.features.registry import DTYPES, EXTRACTORS, ExtractorParams, build
from eval.figures import METRICS, Evidence, Metric
from eval.images.drawn import Drawn
from eval.images.open import open_source
from eval.images.source import Source
from eval.images.subset import First
from eval.metrics.figure import Figure
from eval.results import Result, Scored, read_result
from eval.statistics import Statistics, check_identity, check_width, is_statistics, read_statistics
from models.files import check_writable
from samplers.provenance import provenance
from train.world import World

MACHINE = ("out", "cache", "report", "wandb", "batch_size", "save_every", "device", "progress")  # what no number depends on
Side = Literal["samples", "reference", "training"]


@dataclass(frozen=True)
class ScoreParams:
    """What to score, and how: see configs/eval/experiment/score.yaml.

    samples, reference, training  a path, or a mapping, as `open_source` takes them; reference also a file of statistics
    """

    samples: str | dict[str, Any]
    metric: str | tuple[str, ...]
    reference: str | dict[str, Any] | None = None
    training: str | dict[str, Any] | None = None
    prompts: str | None = None
    name: str | None = None
    n: int | None = None
    protocol: str = "clean"
    features: str = "inception"
    classifier: str = "digits"
    extractors: ExtractorParams = field(default_factory=ExtractorParams)
    dtype: Literal["fp32", "bf16"] = "fp32"
    groups: int = 17
    on_error: Literal["refuse", "skip"] = "refuse"
    sizes: Literal["equal", "any"] = "equal"
    out: str | None = None
    report: str | None = None
    cache: str | None = None
    wandb: str | None = None
    batch_size: int = 64
    save_every: float = 300.0
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_at_least_one(self, "n", "groups", "batch_size")
        check_names("metric", self.metrics, METRICS)
        check_names("protocol", [self.protocol], PROTOCOLS)
        check_names("extractor", [self.features, self.classifier], EXTRACTORS)
        if len(set(self.metrics)) < len(self.metrics) or not self.metrics:
            raise ValueError(f"metric must name metrics, each once, not {', '.join(self.metrics) or 'none'}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Their names."""
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    def output(self, metric: Metric) -> str:
        """The output that a metric is computed of: its own, or that of the extractor which the settings name in its place."""
        extractor, output = metric.output
        chosen = {"features": self.features, "classifier": self.classifier}.get(extractor, extractor)
        return f"{chosen}.{output or EXTRACTORS[chosen].main}"


@dataclass(frozen=True)
class Plan:
    """An evaluation with everything opened and checked.

    sides       pictures by what they are: the samples, what they are compared with, what their model has seen
    statistics  of the reference, where they come from a file: for metrics that need no more
    outputs     of each metric, "extractor.output"
    out         where the result goes
    """

    params: ScoreParams
    sides: dict[Side, Source]
    statistics: Statistics | None
    outputs: dict[str, str]
    extractors: dict[str, Extractor]
    out: Path

    @classmethod
    def of(cls, params: ScoreParams, where: World, samples: Source | None = None) -> Plan:
        """ValueError or OSError for what cannot be scored. samples: in place of what `params` names."""
        metrics = {name: METRICS[name] for name in params.metrics}
        samples = samples or open_source(params.samples, params.prompts)
        sides: dict[Side, Source] = {"samples": samples if params.n is None else First(samples, params.n)}
        statistics = None
        if isinstance(params.reference, str) and is_statistics(params.reference):
            statistics = read_statistics(params.reference)
        for side in ("reference", "training"):
            if who := _asking(side, metrics, only_rows=side == "reference" and statistics is not None):
                sides[side] = _opened(side, getattr(params, side), who, statistics)
        for name, metric in metrics.items():
            _check_fit(name, metric, sides)
            for side, source in sides.items():
                _check_number(name, metric, side, source, len(source))
            _check_classes(name, metric, sides)
        outputs = {name: params.output(metric) for name, metric in metrics.items()}
        out = _place(params, samples)
        names = dict.fromkeys(output.split(".")[0] for output in outputs.values())
        extractors = {name: build(name, params.extractors, params.protocol, DTYPES[params.dtype]) for name in names}
        for name, output in outputs.items():
            extractor, _, width = extractors[output.split(".")[0]], *output.split(".")
            extractor.check_outputs([width])
            if statistics is not None and METRICS[name].keep == "moments":
                check_identity(statistics, extractor.identity)
                check_width(statistics, width, extractor.widths[width])
        for extractor in extractors.values():
            extractor.to(where.device).eval().requires_grad_(False)
        plan = cls(params, sides, statistics, outputs, extractors, out)
        plan._check_told()
        return plan

    @cached_property
    def key(self) -> str:
        """Of all that the result depends on: settings, pictures, weights."""
        settings = {name: value for name, value in asdict(self.params).items() if name not in MACHINE}
        stamps: list[Any] = [{side: source.stamp for side, source in self.sides.items()}, self.statistics and self.statistics.sha256]
        if any("prompts" in METRICS[name].needs for name in self.outputs):
            stamps.append(list(self.sides["samples"].prompts or ()))
        identities = {name: extractor.identity.to_json() for name, extractor in self.extractors.items()}
        return hashlib.sha256(json.dumps([settings, stamps, identities], sort_keys=True, default=str).encode()).hexdigest()

    def _check_told(self) -> None:
        """ValueError where a network cannot tell what the samples are said to show."""
        samples = self.sides["samples"]
        for name, output in self.outputs.items():
            if "labels" in METRICS[name].needs:
                check_names("class", sorted(set(samples.labels or ())), self._classes(output))
            if "prompts" in METRICS[name].needs:
                self._clip(output).text(list(samples.prompts or ())[:1])

    def finished(self, where: World) -> Result | None:
        """The result that is there already. OSError where none could be written, ValueError where something else is in its place."""
        if self.out.exists():
            try:
                done = read_result(self.out)
            except ValueError as error:
                raise ValueError(f"{error}; out=... names another place for the result") from None
            if done.settings.get("key") == self.key:
                return done
        if where.leads:
            check_writable(self.out)
        return None

    def state(self, side: Side) -> Path:
        """Where the work on a side is saved: beside the result or, of what many results share, in the cache."""
        if side == "samples" or self.params.cache is None:
            return self.out.with_name(f".{self.out.stem}.{side}.safetensors")
        source, groups = self.sides[side], self.params.groups
        wanted = self._wanted(side)
        identities = [self.extractors[output.split(".")[0]].identity.to_json() for outputs in wanted for output in outputs]
        key = hashlib.sha256(json.dumps([source.origin, source.stamp, wanted, identities, groups]).encode()).hexdigest()
        return Path(self.params.cache) / f"{key[:16]}.safetensors"

    def forget(self) -> None:
        """Remove the work that no other result shares, for when this one is written."""
        for side in get_args(Side):
            if side == "samples" or self.params.cache is None:
                forget(self.state(side))

    def gather(self, side: Side, where: World, state: Path | None = None, seen: Seen = unseen) -> Collected | None:
        """Go through the pictures of a side once, for all metrics. state, seen: as in `collect`."""
        source, (moments, rows) = self.sides[side], self._wanted(side)
        used = {name: self.extractors[name] for name in dict.fromkeys(output.split(".")[0] for output in (*moments, *rows))}
        p = self.params
        params = CollectParams(p.batch_size, p.groups, p.on_error, p.sizes, p.save_every)
        ahead = not isinstance(source, Drawn)
        return collect(source, used, moments, rows, params, where, state, ahead=ahead, seen=seen, progress=p.progress)

    def _wanted(self, side: Side) -> tuple[list[str], list[str]]:
        """The outputs to sum up, and to keep, of the pictures of a side."""
        asked = [(METRICS[name].keep, output) for name, output in self.outputs.items() if side == "samples" or side in METRICS[name].needs]
        if side == "reference" and self.statistics is not None:
            asked = [(keep, output) for keep, output in asked if keep == "rows"]
        moments, rows = ([output for keep, output in dict.fromkeys(asked) if keep == kind] for kind in ("moments", "rows"))
        return moments, rows

    def check_enough(self, gathered: Mapping[Side, Collected]) -> None:
        """ValueError where too few pictures are left for a metric."""
        for name in self.outputs:
            for side, part in gathered.items():
                _check_number(name, METRICS[name], side, self.sides[side], part.n)

    def evidence(self, output: str, gathered: Mapping[Side, Collected]) -> Evidence:
        """What the metrics of an output are computed of."""
        samples = gathered["samples"]
        needs = {need for name, other in self.outputs.items() if other == output for need in METRICS[name].needs}
        return Evidence(
            output,
            samples,
            PROTOCOLS[self.params.protocol],
            statistics=self.statistics,
            reference=gathered.get("reference"),
            training=gathered.get("training"),
            embedded=(lambda prefix: self._texts(output, prefix, samples)) if "prompts" in needs else None,
            wanted=self._wanted_classes(output, samples) if "labels" in needs else None,
            classes=self._common_classes(gathered),
        )

    def _texts(self, output: str, prefix: str, samples: Collected) -> TextFeatures:
        """The prompts of the samples that were used, with the prefix before each, embedded."""
        prompts, size = [prefix + prompt for prompt in self._prompts(samples)], self.params.batch_size
        parts = [self._clip(output).text(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        return TextFeatures(torch.cat([part.rows for part in parts]), tuple(chain(*(part.truncated for part in parts))))

    def _clip(self, output: str) -> ClipFeatures:
        """The extractor of an output, which reads prompts."""
        clip = self.extractors[output.split(".")[0]]
        assert isinstance(clip, ClipFeatures)
        return clip

    def _prompts(self, samples: Collected) -> list[str]:
        prompts = self.sides["samples"].prompts or ()
        return [prompts[i] for i in samples.indices.tolist()]

    def _wanted_classes(self, output: str, samples: Collected) -> Tensor:
        """(n,) the class that each sample was asked to show, as the extractor numbers them."""
        classes = self._classes(output)
        return torch.tensor([classes.index(label) for label in self._labels("samples", samples)])

    def _classes(self, output: str) -> list[str]:
        """That the extractor tells apart, in the order of its output."""
        return list(getattr(self.extractors[output.split(".")[0]], "classes", ()))

    def _common_classes(self, gathered: Mapping[Side, Collected]) -> tuple[Tensor, Tensor] | None:
        """The classes of samples and reference, numbered, where both have the same ones."""
        found = [self._labels(side, gathered[side]) for side in ("samples", "reference") if side in gathered]
        if len(found) < 2 or not found[0] or set(found[0]) != set(found[1]):
            return None
        classes = sorted(set(found[0]))
        one, other = (torch.tensor([classes.index(label) for label in labels]) for labels in found)
        return one, other

    def _labels(self, side: Side, part: Collected) -> list[str]:
        """Of the pictures that were used; none where there are no classes."""
        labels = self.sides[side].labels
        return [] if labels is None else [labels[i] for i in part.indices.tolist()]

    def scored(self, name: str, figure: Figure, gathered: Mapping[Side, Collected]) -> Scored:
        """The figure with all that it depends on."""
        metric, (extractor, output), samples = METRICS[name], self.outputs[name].split("."), gathered["samples"]
        basis: dict[str, Any] = {"metric": metric.title, "settings": dict(metric.settings), "n": samples.n}
        if extractor == "inception":
            basis["protocol"] = self.params.protocol
        if metric.of_class:
            basis["classes"] = "drawn" if self._common_classes(gathered) is None else "fixed"
        basis |= {"extractor": self.extractors[extractor].identity.to_json(), "output": output}
        if "reference" in metric.needs:
            basis["reference"] = self.statistics.known if self.statistics and metric.keep == "moments" else gathered["reference"].sha256
        if "training" in metric.needs:
            basis["training"] = gathered["training"].sha256
        if "prompts" in metric.needs:
            basis["prompts"] = hashlib.sha256(json.dumps(self._prompts(samples)).encode()).hexdigest()
        return Scored(figure.value, metric.better, samples.n, basis, figure.low, figure.high, dict(figure.extra))

    def result(self, figures: Mapping[str, Scored], gathered: Mapping[Side, Collected]) -> Result:
        """All of it, for the file."""
        source, samples = self.sides["samples"], gathered["samples"]
        about: dict[str, Any] = {"origin": source.origin, "n": samples.n, "sha256": samples.sha256, "skipped": samples.skipped}
        about["sizes"] = [f"{width}x{height}" for height, width in sorted(samples.sizes)]
        if isinstance(source, Drawn):
            about |= {"settings": source.settings, "calls": source.calls, "seconds": source.seconds}
        kept = {name: value for name, value in asdict(self.params).items() if value is not None} | {"key": self.key}
        name = self.params.name or _default_name(source)
        return Result(name, dict(figures), about, tuple(self._notes(gathered, figures)), kept, provenance())

    def _notes(self, gathered: Mapping[Side, Collected], figures: Mapping[str, Scored]) -> Iterator[str]:
        for side, found in gathered.items():
            if found.skipped:
                yield f"{len(found.skipped)} of {len(self.sides[side])} {side} pictures could not be used and were left out"
            if len(found.sizes) > 1:
                yield f"the {side} pictures have {len(found.sizes)} sizes"
        for extractor in self.extractors.values():
            if extractor.identity.random:
                yield f"{extractor.identity.network} has random weights: its numbers mean nothing outside a trial"
        for name, figure in figures.items():
            if cut := figure.extra.get("cut", 0):
                yield f"{name}: {cut:g} of {figure.n} prompts are longer than the network reads, and were cut"
        if self.statistics is not None and self.statistics.identity is None:
            yield f"{self.statistics.origin} does not say which network its statistics are of, nor how pictures were prepared"


def _asking(side: Side, metrics: Mapping[str, Metric], only_rows: bool) -> str | None:
    """The first metric that needs the pictures of a side."""
    return next((name for name, metric in metrics.items() if side in metric.needs and not (only_rows and metric.keep == "moments")), None)


def _opened(side: Side, asked: Any, who: str, statistics: Statistics | None) -> Source:
    if asked is None:
        raise ValueError(f"{who} needs {side} pictures: {side}=FOLDER{', or a file of statistics' * (side == 'reference')}")
    try:
        return open_source(asked)
    except ValueError as error:
        if statistics is None:
            raise
        raise ValueError(f"{who} compares picture by picture: {error}") from None


def _check_fit(name: str, metric: Metric, sides: Mapping[Side, Source]) -> None:
    """ValueError where a metric needs prompts or classes, and there are none."""
    samples = sides["samples"]
    if "prompts" in metric.needs and samples.prompts is None:
        raise ValueError(
            f"{name} needs the prompts of {samples.origin}: give prompts=FILE, a line each in the order of the pictures' names"
        )
    if "labels" in metric.needs and samples.labels is None:
        raise ValueError(f"{name} needs to know what the pictures of {samples.origin} should show: keep them in a folder per class")


def _check_number(name: str, metric: Metric, side: Side, source: Source, n: int) -> None:
    """ValueError where n of the pictures of a side, those that can be used, are too few for a metric."""
    if (side == "samples" or side in metric.needs) and n < metric.least:
        usable = "" if n == len(source) else f" of {len(source)} that can be used"
        raise ValueError(f"{name} needs at least {metric.least} {side} pictures, and {source.origin} has {n}{usable}")


def _check_classes(name: str, metric: Metric, sides: Mapping[Side, Source]) -> None:
    """ValueError where classes that count as fixed have too few pictures for a metric."""
    compared = [sides[side] for side in get_args(Side)[:2] if side in sides]
    counts = [Counter(source.labels or ()) for source in compared]
    if metric.of_class and counts[0] and counts[0].keys() == counts[-1].keys():
        for source, count in zip(compared, counts, strict=True):
            label, fewest = min(count.items(), key=lambda item: item[1])
            if fewest < metric.of_class:
                raise ValueError(
                    f"{name} needs at least {metric.of_class} pictures of each class, and {source.origin} has {fewest} of {label}"
                )


def _place(params: ScoreParams, samples: Source) -> Path:
    """Where the result goes: where it is told, in the report's folder, or beside the samples.

    In the report's folder there is a file for each name and settings, metrics aside: asked for other metrics, a row is replaced.
    """
    if params.out is not None:
        return Path(params.out)
    name = re.sub(r"[^\w.]+", "-", params.name or _default_name(samples)).strip("-").lower()[-100:]
    if params.report is not None:
        row = {key: value for key, value in asdict(params).items() if key not in (*MACHINE, "metric")}
        digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
        return Path(params.report) / "results" / f"{name}-{digest[:8]}.json"
    if isinstance(samples, Drawn):
        return Path(samples.origin) / "scores" / f"{name}.json" if Path(samples.origin).is_dir() else Path(f"{name}.scores.json")
    origin = Path(samples.origin)
    return origin.with_name(f"{origin.name}.scores.json") if origin.exists() else Path(f"{name}.scores.json")


def _default_name(samples: Source) -> str:
    return samples.name if isinstance(samples, Drawn) else samples.origin
