"""An evaluation: everything is opened and checked before the work, then each metric gets what it needs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffusion import outside
from diffusion.spec import check_names, lookup
from eval.checks import check_classes, check_conditions, check_number
from eval.feature_pass import Features, Seen, extract_features, forget, unseen
from eval.features.extractor import Extractor, TextFeatures
from eval.features.protocols import PROTOCOLS
from eval.features.registry import DTYPES, EXTRACTORS, build, check_dtype
from eval.images.open import open_source
from eval.images.subset import equal_parts, first_pictures, index_within_class, proportional_classes
from eval.metrics.registry import Evidence, Metric, find_metric
from eval.settings import ScoreParams
from eval.statistics_file import Statistics, check_identity, check_width, is_statistics, read_statistics
from plain_diffusion import __version__
from train.data.source import Source
from train.world import World

Side = Literal["samples", "reference", "training"]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation with everything opened and checked.

    sides       pictures: the samples, the reference they are compared with, and what their model has seen
    statistics  of the reference, if they come from a file: for metrics that need no more
    outputs     of each metric, "extractor.output"
    device      where networks and metrics are computed
    """

    params: ScoreParams
    sides: dict[Side, Source]
    statistics: Statistics | None
    outputs: dict[str, str]
    extractors: dict[str, Extractor]
    device: torch.device

    @classmethod
    def prepare(
        cls,
        params: ScoreParams,
        where: World,
        sources: Mapping[Side, Source] | None = None,
        extractors: Mapping[str, Extractor] | None = None,
    ) -> Evaluation:
        """ValueError or OSError for what cannot be scored.

        sources     your own pictures, in place of what `params` names
        extractors  your own, by the names in `params.features`, `neighbours` and `classifier`
        """
        metrics = {name: find_metric(name) for name in params.metrics}
        statistics = None
        if isinstance(params.reference, str) and is_statistics(params.reference):
            statistics = read_statistics(params.reference)
        sides = _sides(params, metrics, statistics, sources or {})
        part: dict[Side, Source] = {**sides, "samples": equal_parts(sides["samples"], params.parts)[0]}
        for name, metric in metrics.items():
            check_conditions(name, metric, part["samples"])
            for side in sides_needed(metric, part):
                check_number(name, metric, side, part[side], len(part[side]))
            check_classes(name, metric, [part[side] for side in get_args(Side)[:2] if side in part])
        params, own = _with_outside(params)
        own |= extractors or {}
        named = [params.features, params.classifier, *filter(None, [params.neighbours])]
        check_names("extractor", [name.split(".")[0] for name in named], [*EXTRACTORS, *own])
        outputs = {name: _output(metric, params, own) for name, metric in metrics.items()}
        used, dtype = _names(outputs.values()), DTYPES[params.dtype]
        for name in used:
            if name not in own:
                check_dtype(name, dtype)
        built = {
            name: own.get(name) or build(name, params.extractors, params.protocol, dtype) for name in used
        }
        for extractor in built.values():
            extractor.to(where.device).eval().requires_grad_(False)
        evaluation = cls(params, sides, statistics, outputs, built, where.device)
        for name in outputs:
            evaluation._check_output(name)
        return evaluation

    def _check_output(self, name: str) -> None:
        """ValueError if an extractor lacks what a metric needs, or made other features than statistics."""
        metric, samples = find_metric(name), self.sides["samples"]
        extractor, output = self._source(name)
        extractor.check_outputs([output])
        if self.statistics is not None and "reference" in metric.needs and metric.keep == "moments":
            check_identity(self.statistics, extractor.identity)
            check_width(self.statistics, output, extractor.widths[output])
        if "labels" in metric.needs:
            check_names("class", sorted(set(samples.labels or ())), _classes(extractor))
        if "prompts" in metric.needs:
            extractor.text(list(samples.prompts or ())[:1])

    def _source(self, name: str) -> tuple[Extractor, str]:
        """The extractor and the output that a metric is computed from."""
        extractor, output = self.outputs[name].split(".")
        return self.extractors[extractor], output

    @cached_property
    def parts(self) -> list[Evaluation]:
        """The same evaluation of each of the equal parts of the samples."""
        parts = equal_parts(self.sides["samples"], self.params.parts)
        return [replace(self, sides={**self.sides, "samples": part}) for part in parts]

    def only(self, names: Collection[str]) -> Evaluation:
        """The same evaluation by these metrics alone."""
        outputs = {name: output for name, output in self.outputs.items() if name in names}
        sides: dict[Side, Source] = {
            side: source
            for side, source in self.sides.items()
            if side == "samples"
            or any(side in sides_needed(find_metric(name), self.sides) for name in outputs)
        }
        used = {name: self.extractors[name] for name in _names(outputs.values())}
        return Evaluation(self.params, sides, self.statistics, outputs, used, self.device)

    @cached_property
    def samples_key(self) -> str:
        """A hash of the samples, and of which are used."""
        return _key([self.sides["samples"].stamp, self.params.on_error])

    def key(self, name: str) -> str:
        """A hash of what a figure depends on: settings, pictures, weights, this library's version."""
        metric, (extractor, output) = find_metric(name), self._source(name)
        stamps = {side: self.sides[side].stamp for side in sides_needed(metric, self.sides)}
        conditions = {"prompts": self.sides["samples"].prompts, "labels": self.sides["samples"].labels}
        needed = {need: list(value or ()) for need, value in conditions.items() if need in metric.needs}
        statistics = self.statistics.sha256 if self.statistics and "reference" in metric.needs else None
        identity = extractor.identity.to_json()
        return _key([__version__, name, self.params.how, stamps, needed, statistics, identity, output])

    def gather(
        self, side: Side, where: World, state: Path | None = None, keep: bool = False, seen: Seen = unseen
    ) -> Features | None:
        """One pass over the pictures of a side, for all metrics. See `extract_features`."""
        moments, rows = self._wanted(side)
        used = {name: self.extractors[name] for name in _names([*moments, *rows])}
        return extract_features(
            self.sides[side], used, moments, rows, self.params, where, state, keep=keep, seen=seen
        )

    def state(self, side: Side, out: Path, part: int = 0) -> Path:
        """Where unfinished work is saved: beside the result or, if results share it, in the cache."""
        if side == "samples" or self.params.cache is None:
            return out.with_name(f".{out.stem}.{side}{f'-{part}' * (part > 0)}.safetensors")
        wanted = self._wanted(side)
        identities = [self.extractors[output.split(".")[0]].identity.to_json() for output in chain(*wanted)]
        key = _key([self.sides[side].origin, self.sides[side].stamp, wanted, identities, self.params.how])
        return Path(self.params.cache) / f"{key[:16]}.safetensors"

    def forget(self, out: Path) -> None:
        """Remove the saved work that no other result shares, once this one is written."""
        for side in self.sides:
            if side == "samples" or self.params.cache is None:
                for part in range(self.params.parts):
                    forget(self.state(side, out, part))

    def _wanted(self, side: Side) -> tuple[list[str], list[str]]:
        """The outputs whose features are summed, and kept one by one, on a side."""
        wanted: dict[str, dict[str, None]] = {"moments": {}, "rows": {}}  # in order, each once
        for name, output in self.outputs.items():
            metric = find_metric(name)
            if side in ("samples", *metric.needs):
                wanted[metric.keep][output] = None
        from_file = side == "reference" and self.statistics is not None
        return [] if from_file else list(wanted["moments"]), list(wanted["rows"])

    def evidence(self, output: str, gathered: Mapping[Side, Features]) -> Evidence:
        """What an output's metrics are computed from. ValueError if too few pictures are left for one."""
        samples, extractor = gathered["samples"], self.extractors[output.split(".")[0]]
        metrics = {name: find_metric(name) for name, other in self.outputs.items() if other == output}
        needs = {need for metric in metrics.values() for need in metric.needs}
        for name, metric in metrics.items():
            for side in sides_needed(metric, gathered):
                check_number(name, metric, side, self.sides[side], gathered[side].n)
        labels = self.labels("samples", samples)
        return Evidence(
            output,
            samples,
            PROTOCOLS[self.params.protocol],
            self.device,
            statistics=self.statistics,
            reference=gathered.get("reference"),
            training=gathered.get("training"),
            embedded=(lambda prefix: self._texts(extractor, prefix, samples)) if "prompts" in needs else None,
            wanted=_numbered(labels, _classes(extractor)) if "labels" in needs else None,
            classes=self.common_classes(gathered),
            numbers=torch.tensor(index_within_class(labels)) if labels else None,
        )

    def _texts(self, extractor: Extractor, prefix: str, samples: Features) -> TextFeatures:
        """Embeddings of the used samples' prompts, with the prefix before each."""
        prompts, size = [prefix + prompt for prompt in self.prompts(samples)], self.params.batch_size
        parts = [extractor.text(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        truncated = tuple(chain(*(part.truncated for part in parts)))
        return TextFeatures(torch.cat([part.rows for part in parts]), truncated)

    def prompts(self, samples: Features) -> list[str]:
        """Of the used samples."""
        prompts = self.sides["samples"].prompts or ()
        return [prompts[i] for i in samples.indices.tolist()]

    def labels(self, side: Side, part: Features) -> list[str]:
        """Of the used pictures; empty without classes."""
        labels = self.sides[side].labels
        return [] if labels is None else [labels[i] for i in part.indices.tolist()]

    def common_classes(self, gathered: Mapping[Side, Features]) -> tuple[Tensor, Tensor] | None:
        """The numbered classes of samples and reference, if both have the same ones."""
        found = [self.labels(side, gathered[side]) for side in get_args(Side)[:2] if side in gathered]
        if len(found) < 2 or not found[0] or set(found[0]) != set(found[1]):
            return None
        one, other = (_numbered(labels, sorted(set(labels))) for labels in found)
        return one, other


def _sides(
    params: ScoreParams,
    metrics: Mapping[str, Metric],
    statistics: Statistics | None,
    own: Mapping[Side, Source],
) -> dict[Side, Source]:
    """The pictures that the metrics need; the reference first, whose classes samples may take over."""
    others: dict[Side, Source] = {}
    for side in get_args(Side)[1:]:
        spared = "moments" if side == "reference" and statistics is not None and side not in own else None
        if who := next(
            (name for name, metric in metrics.items() if side in metric.needs and metric.keep != spared), None
        ):
            others[side] = own.get(side) or _opened(params, side, who, statistics)
    return {"samples": own.get("samples") or _samples(params, others.get("reference")), **others}


def _samples(params: ScoreParams, reference: Source | None) -> Source:
    """The samples that the settings name: the first n of them, or all."""
    classes = None
    if params.classes == "reference":
        if reference is None or reference.labels is None:
            raise ValueError(
                "classes=reference needs a reference of pictures with classes, and a metric of both"
            )
        if not isinstance(params.samples, Mapping):
            raise ValueError(
                "classes=reference is for {run: ...} or {name: ...}: files have their own classes"
            )
        if (n := params.samples.get("n")) is not None:
            classes = [proportional_classes(reference.labels, n // params.parts)] * params.parts
    samples = open_source(params.samples, params.prompts, params.max_pixels, classes)
    if params.n is None:
        return samples
    if getattr(samples, "computes", False):
        raise ValueError(
            "n is for existing pictures: what a model draws has its own, samples={run: ..., n: ...}"
        )
    return first_pictures(samples, params.n)


def _opened(params: ScoreParams, side: Side, who: str, statistics: Statistics | None) -> Source:
    if (spec := getattr(params, side)) is None:
        raise ValueError(
            f"{who} needs {side} pictures: {side}=FOLDER{', or a file of statistics' * (side == 'reference')}"
        )
    try:
        return open_source(spec, max_pixels=params.max_pixels)
    except ValueError as error:
        if statistics is None:
            raise
        raise ValueError(f"{who} compares picture by picture: {error}") from None


def sides_needed(metric: Metric, sides: Mapping[Side, object]) -> list[Side]:
    """Which of these picture sets a metric reads."""
    return [side for side in sides if side == "samples" or side in metric.needs]


def _output(metric: Metric, params: ScoreParams, own: Mapping[str, Extractor]) -> str:
    """The output that a metric is computed from: its own, or one that the settings name."""
    extractor, output = metric.output
    settings = {
        "features": params.features,
        "neighbours": params.neighbours or params.features,
        "classifier": params.classifier,
    }
    name, _, named = settings.get(extractor, extractor).partition(".")
    main = next(iter(own[name].widths)) if name in own else lookup("extractor", name, EXTRACTORS).main
    return f"{name}.{output or named or main}"


def _with_outside(params: ScoreParams) -> tuple[ScoreParams, dict[str, Extractor]]:
    """Extractors from outside that the settings name, under names without dots, which separate outputs."""
    names, own = dict[str, Any](), dict[str, Extractor]()
    for field in ("features", "neighbours", "classifier"):
        name = getattr(params, field)
        if name is None or name.split(".")[0] in EXTRACTORS:
            continue
        if (found := outside.find("extractor", name)) is None:
            continue
        extractor = found if isinstance(found, Extractor) else found()
        if not isinstance(extractor, Extractor):
            raise ValueError(
                f"the extractor {name!r} must be an eval.features.extractor.Extractor, or make one"
            )
        names[field] = name.replace(".", "/")
        own[names[field]] = extractor
    return replace(params, **names), own


def _names(outputs: Iterable[str]) -> list[str]:
    """The extractors of these outputs."""
    return list(dict.fromkeys(output.split(".")[0] for output in outputs))


def _classes(extractor: Extractor) -> list[str]:
    """The classes of its logits, in their order."""
    return list(getattr(extractor, "classes", ()))


def _numbered(labels: list[str], classes: list[str]) -> Tensor:
    return torch.tensor([classes.index(label) for label in labels])


def _key(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
