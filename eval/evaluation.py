"""What an evaluation is to do: everything opened and checked before the work, and what each metric is given
of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from diffusion import outside
from diffusion.spec import check_names, lookup
from eval.checks import check_classes, check_number, check_told
from eval.feature_pass import CollectParams, Features, Seen, extract_features, forget, unseen
from eval.features.extractor import Extractor, TextFeatures
from eval.features.protocols import PROTOCOLS
from eval.features.registry import DTYPES, EXTRACTORS, build, check_dtype
from eval.images.open import open_source
from eval.images.subset import equal_parts, first_of, index_within_class, proportional_classes
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

    sides       pictures by what they are: the samples, what they are compared with, what their model has seen
    statistics  of the reference, where they come from a file: for metrics that need no more
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

        sources     pictures of one's own, in place of what `params` names
        extractors  of one's own, by the names that `params.features` and `params.classifier` call them
        """
        metrics = {name: find_metric(name) for name in params.metrics}
        statistics = None
        if isinstance(params.reference, str) and is_statistics(params.reference):
            statistics = read_statistics(params.reference)
        sides = _sides(params, metrics, statistics, sources or {})
        part: dict[Side, Source] = {**sides, "samples": equal_parts(sides["samples"], params.parts)[0]}
        for name, metric in metrics.items():
            check_told(name, metric, part["samples"])
            for side in sides_needed(metric, part):
                check_number(name, metric, side, part[side], len(part[side]))
            check_classes(name, metric, [part[side] for side in get_args(Side)[:2] if side in part])
        params, own = _with_outside(params)
        own |= extractors or {}
        named = [params.features, params.classifier, *filter(None, [params.neighbours])]
        check_names("extractor", [name.split(".")[0] for name in named], [*EXTRACTORS, *own])
        outputs = {name: _output(metric, params, own) for name, metric in metrics.items()}
        for name in _names(outputs):
            if name not in own:
                check_dtype(name, DTYPES[params.dtype])
        used = {
            name: own.get(name) or build(name, params.extractors, params.protocol, DTYPES[params.dtype])
            for name in _names(outputs)
        }
        for extractor in used.values():
            extractor.to(where.device).eval().requires_grad_(False)
        evaluation = cls(params, sides, statistics, outputs, used, where.device)
        for name in outputs:
            evaluation._check_output(name)
        return evaluation

    def _check_output(self, name: str) -> None:
        """ValueError where the extractor of a metric does not give what it needs, or statistics are those of
        another."""
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
        """The extractor and the output that a metric is computed of."""
        extractor, output = self.outputs[name].split(".")
        return self.extractors[extractor], output

    @cached_property
    def parts(self) -> list[Evaluation]:
        """The same for each of the equal parts that the samples are scored in."""
        parts = equal_parts(self.sides["samples"], self.params.parts)
        return [replace(self, sides={**self.sides, "samples": part}) for part in parts]

    def only(self, names: Collection[str]) -> Evaluation:
        """The same for these metrics alone."""
        outputs = {name: output for name, output in self.outputs.items() if name in names}
        sides: dict[Side, Source] = {
            side: source
            for side, source in self.sides.items()
            if side == "samples"
            or any(side in sides_needed(find_metric(name), self.sides) for name in outputs)
        }
        used = {name: self.extractors[name] for name in _names(outputs)}
        return Evaluation(self.params, sides, self.statistics, outputs, used, self.device)

    @cached_property
    def samples_key(self) -> str:
        """Of the samples, and which of them count."""
        return _key([self.sides["samples"].stamp, self.params.on_error])

    def key(self, name: str) -> str:
        """Of all that the figure of a metric depends on: settings, pictures, weights, and the version of this
        library."""
        metric, (extractor, output) = find_metric(name), self._source(name)
        stamps = {side: self.sides[side].stamp for side in sides_needed(metric, self.sides)}
        conditions = {"prompts": self.sides["samples"].prompts, "labels": self.sides["samples"].labels}
        needed = {need: list(value or ()) for need, value in conditions.items() if need in metric.needs}
        statistics = (
            self.statistics.sha256 if self.statistics is not None and "reference" in metric.needs else None
        )
        return _key(
            [
                __version__,
                name,
                self.params.how,
                stamps,
                needed,
                statistics,
                extractor.identity.to_json(),
                output,
            ]
        )

    def gather(
        self, side: Side, where: World, state: Path | None = None, keep: bool = False, seen: Seen = unseen
    ) -> Features | None:
        """Go through the pictures of a side once, for all metrics. state, keep, seen: as in `collect`."""
        source, (moments, rows), p = self.sides[side], self._wanted(side), self.params
        used = {
            name: self.extractors[name]
            for name in dict.fromkeys(output.split(".")[0] for output in (*moments, *rows))
        }
        params = CollectParams(p.batch_size, p.groups, p.on_error, p.sizes, p.save_every)
        ahead = not getattr(source, "computes", False)
        return extract_features(
            source,
            used,
            moments,
            rows,
            params,
            where,
            state,
            keep=keep,
            ahead=ahead,
            seen=seen,
            progress=p.progress,
        )

    def state(self, side: Side, out: Path, part: int = 0) -> Path:
        """Where the work on a side or a part of the samples is saved: beside the result or, of what many
        results share, in the cache."""
        if side == "samples" or self.params.cache is None:
            return out.with_name(f".{out.stem}.{side}{f'-{part}' * (part > 0)}.safetensors")
        wanted = self._wanted(side)
        identities = [self.extractors[output.split(".")[0]].identity.to_json() for output in chain(*wanted)]
        key = _key([self.sides[side].origin, self.sides[side].stamp, wanted, identities, self.params.how])
        return Path(self.params.cache) / f"{key[:16]}.safetensors"

    def forget(self, out: Path) -> None:
        """Remove the work that no other result shares, for when this one is written."""
        for side in self.sides:
            if side == "samples" or self.params.cache is None:
                for part in range(self.params.parts):
                    forget(self.state(side, out, part))

    def _wanted(self, side: Side) -> tuple[list[str], list[str]]:
        """The outputs to sum up, and to keep, of the pictures of a side."""
        asked = [
            (find_metric(name).keep, output)
            for name, output in self.outputs.items()
            if side in ("samples", *find_metric(name).needs)
        ]
        if side == "reference" and self.statistics is not None:
            asked = [(keep, output) for keep, output in asked if keep == "rows"]
        moments, rows = (
            [output for keep, output in dict.fromkeys(asked) if keep == kind] for kind in ("moments", "rows")
        )
        return moments, rows

    def evidence(self, output: str, gathered: Mapping[Side, Features]) -> Evidence:
        """What the metrics of an output are computed of. ValueError where too few pictures are left for one
        of them."""
        samples, extractor = gathered["samples"], self.extractors[output.split(".")[0]]
        metrics = {name: find_metric(name) for name, other in self.outputs.items() if other == output}
        needs = {need for metric in metrics.values() for need in metric.needs}
        for name, metric in metrics.items():
            for side in sides_needed(metric, gathered):
                check_number(name, metric, side, self.sides[side], gathered[side].n)
        return Evidence(
            output,
            samples,
            PROTOCOLS[self.params.protocol],
            self.device,
            statistics=self.statistics,
            reference=gathered.get("reference"),
            training=gathered.get("training"),
            embedded=(lambda prefix: self._texts(extractor, prefix, samples)) if "prompts" in needs else None,
            wanted=_numbered(self.labels("samples", samples), _classes(extractor))
            if "labels" in needs
            else None,
            classes=self.common_classes(gathered),
            numbers=torch.tensor(index_within_class(labels))
            if (labels := self.labels("samples", samples))
            else None,
        )

    def _texts(self, extractor: Extractor, prefix: str, samples: Features) -> TextFeatures:
        """The prompts of the samples that were used, with the prefix before each, embedded."""
        prompts, size = [prefix + prompt for prompt in self.prompts(samples)], self.params.batch_size
        parts = [extractor.text(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        return TextFeatures(
            torch.cat([part.rows for part in parts]), tuple(chain(*(part.truncated for part in parts)))
        )

    def prompts(self, samples: Features) -> list[str]:
        """Of the samples that were used."""
        prompts = self.sides["samples"].prompts or ()
        return [prompts[i] for i in samples.indices.tolist()]

    def labels(self, side: Side, part: Features) -> list[str]:
        """Of the pictures that were used; none where there are no classes."""
        labels = self.sides[side].labels
        return [] if labels is None else [labels[i] for i in part.indices.tolist()]

    def common_classes(self, gathered: Mapping[Side, Features]) -> tuple[Tensor, Tensor] | None:
        """The classes of samples and reference, numbered, where both have the same ones."""
        found = [self.labels(side, gathered[side]) for side in get_args(Side)[:2] if side in gathered]
        if len(found) < 2 or not found[0] or set(found[0]) != set(found[1]):
            return None
        one, other = (_numbered(labels, sorted(set(labels))) for labels in found)
        return one, other


def _sides(
    params: ScoreParams,
    metrics: Mapping[str, Metric],
    statistics: Statistics | None,
    given: Mapping[Side, Source],
) -> dict[Side, Source]:
    """All pictures that the metrics need, opened; the reference before the samples, which may show its
    classes."""
    others: dict[Side, Source] = {}
    for side in get_args(Side)[1:]:
        spared = "moments" if side == "reference" and statistics is not None and side not in given else None
        if who := next(
            (name for name, metric in metrics.items() if side in metric.needs and metric.keep != spared), None
        ):
            others[side] = given.get(side) or _opened(params, side, who, statistics)
    return {"samples": given.get("samples") or _samples(params, others.get("reference")), **others}


def _samples(params: ScoreParams, reference: Source | None) -> Source:
    """The samples that the settings name: the first n of them, or as many as they are."""
    classes = None
    if params.classes == "reference":
        if reference is None or reference.labels is None:
            raise ValueError(
                "classes=reference needs a reference of pictures with classes, and a metric that compares "
                "with it"
            )
        if not isinstance(params.samples, Mapping):
            raise ValueError(
                "classes=reference is for what is drawn: pictures that are there have the classes that they "
                "have"
            )
        if (n := params.samples.get("n")) is not None:
            classes = [proportional_classes(reference.labels, n // params.parts)] * params.parts
    samples = open_source(params.samples, params.prompts, params.max_pixels, classes)
    if params.n is None:
        return samples
    if getattr(samples, "computes", False):
        raise ValueError(
            "n is for pictures that are there: what is drawn says itself how many, samples={run: ..., n: ...}"
        )
    return first_of(samples, params.n)


def _opened(params: ScoreParams, side: Side, who: str, statistics: Statistics | None) -> Source:
    if (asked := getattr(params, side)) is None:
        raise ValueError(
            f"{who} needs {side} pictures: {side}=FOLDER{', or a file of statistics' * (side == 'reference')}"
        )
    try:
        return open_source(asked, max_pixels=params.max_pixels)
    except ValueError as error:
        if statistics is None:
            raise
        raise ValueError(f"{who} compares picture by picture: {error}") from None


def sides_needed(metric: Metric, sides: Mapping[Side, object]) -> list[Side]:
    """Which of these picture sets a metric reads."""
    return [side for side in sides if side == "samples" or side in metric.needs]


def _output(metric: Metric, params: ScoreParams, own: Mapping[str, Extractor]) -> str:
    """The output that a metric is computed of: its own, or that of the extractor which the settings name in
    its place."""
    extractor, output = metric.output
    settings = {
        "features": params.features,
        "neighbours": params.neighbours or params.features,
        "classifier": params.classifier,
    }
    chosen, _, asked = settings.get(extractor, extractor).partition(".")
    main = next(iter(own[chosen].widths)) if chosen in own else lookup("extractor", chosen, EXTRACTORS).main
    return f"{chosen}.{output or asked or main}"


def _with_outside(params: ScoreParams) -> tuple[ScoreParams, dict[str, Extractor]]:
    """Extractors from outside that the settings name, under names without dots, which part an extractor from
    its output."""
    names, own = dict[str, Any](), dict[str, Extractor]()
    for field in ("features", "neighbours", "classifier"):
        name = getattr(params, field)
        if (
            name is None
            or name.split(".")[0] in EXTRACTORS
            or (found := outside.find("extractor", name)) is None
        ):
            continue
        made = found if isinstance(found, Extractor) else found()
        if not isinstance(made, Extractor):
            raise ValueError(
                f"the extractor {name!r} must be an eval.features.extractor.Extractor, or make one"
            )
        names[field] = name.replace(".", "/")
        own[names[field]] = made
    return replace(params, **names), own


def _names(outputs: Mapping[str, str]) -> list[str]:
    """Of the extractors."""
    return list(dict.fromkeys(output.split(".")[0] for output in outputs.values()))


def _classes(extractor: Extractor) -> list[str]:
    """That it tells apart, in the order of its output."""
    return list(getattr(extractor, "classes", ()))


def _numbered(labels: list[str], classes: list[str]) -> Tensor:
    return torch.tensor([classes.index(label) for label in labels])


def _key(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
