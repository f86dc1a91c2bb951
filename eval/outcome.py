"""From figures to a result: what each depends on, what a reader should know, and where it is kept."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from diffusion.settings import of_kind
from eval.collect import Collected, joined, size_names
from eval.features.protocols import PROTOCOLS
from eval.figures import find_metric
from eval.images.drawn import Drawn
from eval.metrics.figure import Figure
from eval.plan import Plan, Side
from eval.results import Result, Scored, read_result
from eval.settings import ScoreParams
from models.files.writing import check_writable
from samplers.provenance import provenance
from train.data.names import describe
from train.data.source import Source

Gathered = Mapping[Side, Collected]


def scored(plan: Plan, name: str, figure: Figure, gathered: Gathered) -> Scored:
    """A figure with all that it depends on; of samples in parts, the plan and the pictures of the first."""
    metric, (extractor, output), samples = (
        find_metric(name),
        plan.outputs[name].split("."),
        gathered["samples"],
    )
    basis: dict[str, Any] = {"metric": metric.title, "settings": dict(metric.settings)}
    if not metric.per_picture:
        basis["n"] = samples.n
    if extractor == "inception":
        basis["protocol"] = plan.params.protocol
    if metric.by_groups:
        basis["groups"] = plan.params.groups
    if metric.of_class:
        basis["classes"] = "drawn" if plan.common_classes(gathered) is None else "fixed"
    basis |= {"extractor": plan.extractors[extractor].identity.to_json(), "output": output}
    if "reference" in metric.needs:
        basis["reference"] = (
            plan.statistics.known
            if plan.statistics and metric.keep == "moments"
            else gathered["reference"].sha256
        )
    if "training" in metric.needs:
        basis["training"] = gathered["training"].sha256
    if "prompts" in metric.needs:
        basis["prompts"] = hashlib.sha256(json.dumps(plan.prompts(samples)).encode()).hexdigest()
    return Scored(figure.value, metric.better, samples.n, basis, figure.low, figure.high, dict(figure.extra))


def result_of(
    plan: Plan, figures: Mapping[str, Scored], parts: Sequence[Gathered], before: Result | None
) -> Result:
    """All of it, for the file, together with the figures that are there already."""
    params, source, samples = plan.params, plan.sides["samples"], joined([part["samples"] for part in parts])
    about: dict[str, Any] = {
        "origin": source.origin,
        "n": samples.n,
        "sha256": samples.sha256,
        "skipped": samples.skipped,
    }
    about["sizes"] = size_names(samples.sizes)
    about |= {
        name: value for name, value in (("role", params.role), ("model", params.model)) if value is not None
    }
    if isinstance(source, Drawn):
        about |= {"settings": source.settings, "calls": source.calls, "seconds": source.seconds}
    keys = {name: plan.key(name) for name in figures}
    settings = {name: value for name, value in asdict(params).items() if value is not None} | {
        "of": plan.samples_key,
        "keys": keys,
    }
    facts = provenance()
    if any(output.startswith("inception.") for output in plan.outputs.values()):
        protocol = PROTOCOLS[params.protocol]
        facts |= {"protocol": f"{protocol.name}: {protocol.prepared} ({protocol.citation})"}
    said = tuple(notes(plan, {**parts[0], "samples": samples}, figures))
    new = Result(params.name or default_name(source), dict(figures), about, said, settings, facts)
    return new if before is None else _merged(before, new)


def _merged(before: Result, new: Result) -> Result:
    """The new result with the older one's figures, and what was said of them."""
    keys = {**before.settings["keys"], **new.settings["keys"]}
    return replace(
        new,
        figures={**before.figures, **new.figures},
        samples={
            **before.samples,
            **{name: value for name, value in new.samples.items() if value == value},
        },  # NaN: nothing was drawn anew
        notes=tuple(dict.fromkeys((*before.notes, *new.notes))),
        settings={**new.settings, "metric": list(keys), "keys": keys},
        facts={**before.facts, **new.facts},
    )


def notes(plan: Plan, gathered: Gathered, figures: Mapping[str, Scored]) -> Iterator[str]:
    """What a reader of the figures should know, a line each."""
    for side, found in gathered.items():
        if found.skipped:
            yield (
                f"{len(found.skipped)} of {len(plan.sides[side])} {side.removesuffix('s')} pictures could "
                "not be used and were left out"
            )
        if ignored := getattr(plan.sides[side], "ignored", None):
            yield f"files of the {side} that are not read: {describe(ignored)}"
        if len(found.sizes) > 1:
            yield f"the {side.removesuffix('s')} pictures have {len(found.sizes)} sizes"
    own, other = size_names(gathered["samples"].sizes), _reference_sizes(plan, gathered)
    if own and other and not set(own) & set(other):
        yield (
            f"the samples are {_few(own)}, the reference is {_few(other)}: resizing them to one size is a "
            "part of every distance"
        )
    for extractor in plan.extractors.values():
        if extractor.identity.random:
            yield f"{extractor.identity.network} has random weights: its numbers mean nothing outside a trial"
    for name, figure in figures.items():
        if cut := figure.extra.get("cut", 0):
            yield f"{name}: {cut:g} of {figure.n} prompts are longer than the network reads, and were cut"
    usual = PROTOCOLS[plan.params.protocol].usual_n
    if few := [
        name
        for name, figure in figures.items()
        if "protocol" in figure.basis and "reference" in figure.basis and figure.n < usual
    ]:
        yield (
            f"under {plan.params.protocol}, {few[0]} is usually of {usual:,} samples; these are "
            f"{figures[few[0]].n:,}"
        )
    if plan.statistics is not None and plan.statistics.identity is None:
        yield (
            f"{plan.statistics.origin} does not say which network its statistics are of, nor how pictures "
            "were prepared"
        )


def _reference_sizes(plan: Plan, gathered: Gathered) -> Sequence[str]:
    """Of the pictures of the reference, as far as they are known."""
    if "reference" in gathered:
        return size_names(gathered["reference"].sizes)
    return plan.statistics.sizes if plan.statistics is not None else ()


def _few(sizes: Sequence[str]) -> str:
    return ", ".join(sizes[:3]) + f" and {len(sizes) - 3} more" * (len(sizes) > 3)


def find_existing(plan: Plan, leads: bool) -> tuple[Path, Result | None]:
    """The result's path, and an existing result that these figures can be added to.

    Asked for other metrics, a result gathers figures. One of other samples, or of the same metric with other
    settings, is replaced where `out` or a report's folder names its place, and otherwise left alone.
    ValueError where something else is in the way, OSError where nothing can be written.
    """
    params, samples = plan.params, plan.sides["samples"]
    out = _place(params, samples)
    found = _of_these(plan, out)
    if found is not None and not _fits(plan, found) and params.out is None and params.report is None:
        out = out.with_name(f"{out.stem}-{_digest(params)}.json")
        found = _of_these(plan, out)
    if leads:
        check_writable(out)
    return out, found if found is not None and _fits(plan, found) else None


def _of_these(plan: Plan, out: Path) -> Result | None:
    """The result of these samples that a file holds. ValueError where it is no result, OSError for a
    folder."""
    if not out.exists():
        return None
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder, not the file of a result: out={out / 'result.json'}")
    try:
        found = read_result(out)
    except ValueError as error:
        raise ValueError(f"{error}; out=... names another place for the result") from None
    return found if found.settings.get("of") == plan.samples_key else None


def _fits(plan: Plan, found: Result) -> bool:
    """Whether all of its figures that are asked for again are the same ones."""
    keys = found.settings.get("keys", {})
    return all(name not in found.figures or keys.get(name) == plan.key(name) for name in plan.outputs)


def _place(params: ScoreParams, samples: Source) -> Path:
    """Where it is told, in the report's folder with a name for each row, or beside the samples."""
    if params.out is not None:
        return Path(params.out)
    name = (
        re.sub(r"[^\w.]+", "-", params.name or default_name(samples)).strip("-.").lower()[-100:] or "samples"
    )
    if params.report is not None:
        return Path(params.report) / "results" / f"{name}-{_digest(params)}.json"
    if isinstance(samples, Drawn):
        return (
            Path(samples.origin) / "scores" / f"{name}.json"
            if Path(samples.origin).is_dir()
            else Path(f"{name}.scores.json")
        )
    origin = Path(samples.origin).resolve()
    return origin.with_name(f"{origin.name}.scores.json") if origin.exists() else Path(f"{name}.scores.json")


def _digest(params: ScoreParams) -> str:
    """Of all settings that make another row: not of metrics, which one row gathers."""
    left_out = (*of_kind(ScoreParams, "place"), "metric")
    row = {key: value for key, value in asdict(params).items() if key not in left_out}
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:8]


def default_name(samples: Source) -> str:
    """Of a row of a table."""
    return samples.name if isinstance(samples, Drawn) else samples.origin
