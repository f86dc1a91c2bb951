"""Scoring samples: `plain-diffusion eval samples=... reference=... metric=[...]`, as a function of plain
values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.outside import trust
from diffusion.spec import make_params
from eval.evaluation import Evaluation, Side
from eval.feature_pass import Features, Seen, joined, size_names, unseen
from eval.features.extractor import Extractor
from eval.features.protocols import PROTOCOLS, USUAL_N
from eval.images.generated import GeneratedPictures
from eval.metrics.figure import Figure
from eval.metrics.registry import find_metric
from eval.result_path import default_name, find_existing
from eval.results import Result, Scored, write_result
from eval.settings import ScoreParams
from eval.sheet import Sheet
from eval.tracking import log_result
from samplers.provenance import provenance
from samplers.results import drop_nulls
from train.data.names import describe_suffixes
from train.data.source import Source
from train.world import World, world

Gathered = Mapping[Side, Features]


class Written(NamedTuple):
    """A result, its file, and whether it holds new figures."""

    result: Result
    path: Path
    new: bool


def run(
    config: Mapping[str, Any],
    found: Callable[[str, Scored], None] = lambda name, figure: None,
    sources: Mapping[Side, Source] | None = None,
    extractors: Mapping[str, Extractor] | None = None,
) -> Written | None:
    """Score as the configuration says, and write the result as JSON. Returns None in processes that do not
    lead.

    found       called with each figure as soon as it is known; the file is written again each time, so that
                no figure is lost if a later one fails
    sources     your own pictures, {"samples": TensorPictures(...)}, in place of what the configuration names
    extractors  your own, {"mine": Custom(...)}, for features=mine

    Figures that exist already, of the same settings, pictures and weights, are not computed again; new
    figures are added to them. ValueError for what cannot be scored, before the work where possible; OSError
    where the result cannot be written.
    """
    trust(config)
    own = {side: source.origin for side, source in (sources or {}).items()}
    plain = {
        "samples": own.get("samples"),
        **{key: value for key, value in config.items() if key != "program"},
    }
    params = make_params("", ScoreParams, drop_nulls(plain))
    with world(params.device) as where:
        evaluation = Evaluation.prepare(params, where, sources, extractors)
        out, before = find_existing(evaluation, where.leads)
        known = {
            name: before.figures[name]
            for name in evaluation.outputs
            if before is not None and name in before.figures
        }
        left = evaluation.only([name for name in evaluation.outputs if name not in known])
        sheet = Sheet(evaluation.parts[0].sides["samples"])
        gathered = gather(left, where, out, sheet.see) if left.outputs else []
    if not where.leads:
        return None
    for name, figure in known.items():
        found(name, figure)
    result, failed = before, None
    figures: dict[str, Scored] = {}
    for name, figure in compute(left, gathered):
        figures[name] = figure
        result = _result(left, figures, gathered, before)
        found(name, figure)
        try:
            write_result(result, out)
        except OSError as error:  # a full disk does not stop the other metrics
            failed = error
    if failed is not None:
        raise failed
    assert result is not None
    left.forget(out)
    if params.report is not None and not (result is before and out.with_suffix(".png").exists()):
        sheet.save(out.with_suffix(".png"))
    if params.wandb is not None and result is not before:
        log_result(result, params.wandb, out)
    return Written(result, out, new=result is not before)


def gather(
    evaluation: Evaluation,
    where: World,
    out: Path | None = None,
    seen: Seen = unseen,
    others: Gathered | None = None,
) -> list[Gathered]:
    """The features that the metrics need, for each part of the samples; empty in processes that do not lead.

    out     path of the result: unfinished work is saved beside it
    seen    called with the pictures of the first part
    others  features of the other sides that are known already
    """
    samples, found = [], dict(others or {})
    for k, part in enumerate(evaluation.parts):
        state = out and evaluation.state("samples", out, k)
        samples.append(part.gather("samples", where, state, seen=seen if k == 0 else unseen))
    for side in evaluation.sides:
        if side not in ("samples", *found):
            state = out and evaluation.state(side, out)
            features = evaluation.gather(side, where, state, keep=evaluation.params.cache is not None)
            if features is not None:
                found[side] = features
    return [{"samples": part, **found} for part in samples if part is not None]


def compute(evaluation: Evaluation, parts: Sequence[Gathered]) -> Iterator[tuple[str, Scored]]:
    """The figure of each metric; if the samples come in parts, the mean over the parts."""
    if not parts:
        return
    evidence = {
        output: [
            part.evidence(output, features) for part, features in zip(evaluation.parts, parts, strict=True)
        ]
        for output in dict.fromkeys(evaluation.outputs.values())
    }
    for name, output in evaluation.outputs.items():
        yield name, _scored(evaluation.parts[0], name, find_metric(name).figure(evidence[output]), parts[0])


def _scored(evaluation: Evaluation, name: str, figure: Figure, gathered: Gathered) -> Scored:
    """A figure with everything that it depends on; of samples in parts, with the basis of the first part."""
    metric, samples = find_metric(name), gathered["samples"]
    extractor, output = evaluation.outputs[name].split(".")
    basis: dict[str, Any] = {"metric": metric.title, "settings": dict(metric.settings)}
    if not metric.per_picture:
        basis["n"] = samples.n
    if extractor == "inception":
        basis["protocol"] = evaluation.params.protocol
    if metric.by_groups:
        basis["groups"] = evaluation.params.groups
    if metric.of_class:
        basis["classes"] = "drawn" if evaluation.common_classes(gathered) is None else "fixed"
    basis |= {"extractor": evaluation.extractors[extractor].identity.to_json(), "output": output}
    if "reference" in metric.needs:
        statistics = evaluation.statistics if metric.keep == "moments" else None
        basis["reference"] = statistics.known if statistics else gathered["reference"].sha256
    if "training" in metric.needs:
        basis["training"] = gathered["training"].sha256
    if "prompts" in metric.needs:
        basis["prompts"] = hashlib.sha256(json.dumps(evaluation.prompts(samples)).encode()).hexdigest()
    return Scored(figure.value, metric.better, samples.n, basis, figure.low, figure.high, dict(figure.extra))


def _result(
    evaluation: Evaluation, figures: Mapping[str, Scored], parts: Sequence[Gathered], before: Result | None
) -> Result:
    """The figures with what the file says about them, and with the figures of an existing result."""
    params, source = evaluation.params, evaluation.sides["samples"]
    samples = joined([part["samples"] for part in parts])
    about: dict[str, Any] = {
        "origin": source.origin,
        "n": samples.n,
        "sha256": samples.sha256,
        "skipped": samples.skipped,
        "sizes": size_names(samples.sizes),
    }
    about |= {name: value for name in ("role", "model") if (value := getattr(params, name)) is not None}
    if isinstance(source, GeneratedPictures):
        about |= {"settings": source.settings, "calls": source.calls, "seconds": source.seconds}
    settings = {name: value for name, value in asdict(params).items() if value is not None}
    settings |= {"of": evaluation.samples_key, "keys": {name: evaluation.key(name) for name in figures}}
    facts = provenance()
    if any(output.startswith("inception.") for output in evaluation.outputs.values()):
        protocol = PROTOCOLS[params.protocol]
        facts |= {"protocol": f"{protocol.name}: {protocol}"}
    remarks = tuple(notes(evaluation, {**parts[0], "samples": samples}, figures))
    new = Result(params.name or default_name(source), dict(figures), about, remarks, settings, facts)
    return new if before is None else _merged(before, new)


def _merged(before: Result, new: Result) -> Result:
    """The new result with the figures and notes of the older one."""
    keys = {**before.settings["keys"], **new.settings["keys"]}
    measured = {
        name: value for name, value in new.samples.items() if value == value
    }  # NaN: nothing was drawn now
    return replace(
        new,
        figures={**before.figures, **new.figures},
        samples={**before.samples, **measured},
        notes=tuple(dict.fromkeys((*before.notes, *new.notes))),
        settings={**new.settings, "metric": list(keys), "keys": keys},
        facts={**before.facts, **new.facts},
    )


def notes(evaluation: Evaluation, gathered: Gathered, figures: Mapping[str, Scored]) -> Iterator[str]:
    """What a reader of the figures should know, one line each."""
    for side, features in gathered.items():
        source, pictures = evaluation.sides[side], f"{side.removesuffix('s')} pictures"
        if features.skipped:
            yield f"{len(features.skipped)} of {len(source)} {pictures} could not be used and were left out"
        if ignored := getattr(source, "ignored", None):
            yield f"files of the {side} that are not read: {describe_suffixes(ignored)}"
        if len(features.sizes) > 1:
            yield f"the {pictures} have {len(features.sizes)} sizes"
    own, other = size_names(gathered["samples"].sizes), _reference_sizes(evaluation, gathered)
    if own and other and not set(own) & set(other):
        yield (
            f"the samples are {_few(own)}, the reference is {_few(other)}: resizing them to one size is a "
            "part of every distance"
        )
    for extractor in evaluation.extractors.values():
        if extractor.identity.random:
            yield f"{extractor.identity.network} has random weights: its numbers mean nothing outside a trial"
    for name, figure in figures.items():
        if cut := figure.extra.get("cut", 0):
            yield f"{name}: {cut:g} of {figure.n} prompts are longer than the network reads, and were cut"
    for name, figure in figures.items():
        if "protocol" in figure.basis and "reference" in figure.basis and figure.n < USUAL_N:
            under = f"under {evaluation.params.protocol}, {name}"
            yield f"{under} is usually of {USUAL_N:,} samples; these are {figure.n:,}"
            break
    if evaluation.statistics is not None and evaluation.statistics.identity is None:
        yield (
            f"{evaluation.statistics.origin} does not say which network its statistics are of, nor how "
            "pictures were prepared"
        )


def _reference_sizes(evaluation: Evaluation, gathered: Gathered) -> Sequence[str]:
    if "reference" in gathered:
        return size_names(gathered["reference"].sizes)
    return evaluation.statistics.sizes if evaluation.statistics is not None else ()


def _few(sizes: Sequence[str]) -> str:
    return ", ".join(sizes[:3]) + f" and {len(sizes) - 3} more" * (len(sizes) > 3)
