"""Scoring samples, whoever made them: what `python -m eval samples=... reference=... metric=[...]` does,
callable with plain values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.outside import trust
from diffusion.spec import make_params
from eval.collect import Seen, unseen
from eval.features.extractor import Extractor
from eval.figures import find_metric
from eval.outcome import Gathered, find_existing, result_of, scored
from eval.plan import Plan, Side
from eval.results import Result, Scored, write_result
from eval.settings import ScoreParams
from eval.sheet import Sheet
from eval.tracking import log_result
from samplers.results import drop_nulls
from train.data.source import Source
from train.world import World, world


class Written(NamedTuple):
    """A result, its file, and whether there is anything new in it."""

    result: Result
    path: Path
    new: bool


def run(
    config: Mapping[str, Any],
    found: Callable[[str, Scored], None] = lambda name, figure: None,
    sources: Mapping[Side, Source] | None = None,
    extractors: Mapping[str, Extractor] | None = None,
) -> Written | None:
    """Score as the configuration says, and write the result as JSON; None in the processes that do not lead.

    found       called with each figure as soon as it is known; the file is written each time, so that none is
                lost whatever comes after
    sources     pictures of one's own, {"samples": TensorPictures(...)}, in place of what the configuration
                names
    extractors  of one's own, {"mine": Custom(...)}, for features=mine

    Figures that are there already, of the same settings, pictures and weights, are not computed again; what
    is new joins them. ValueError for anything that cannot be scored, as far as possible before the work;
    OSError where the result cannot be written.
    """
    trust(config)
    own = {side: source.origin for side, source in (sources or {}).items()}
    plain = {
        "samples": own.get("samples"),
        **{key: value for key, value in config.items() if key != "program"},
    }
    params = make_params("", ScoreParams, drop_nulls(plain))
    with world(params.device) as where:
        plan = Plan.of(params, where, sources, extractors)
        out, before = find_existing(plan, where.leads)
        known = {
            name: before.figures[name]
            for name in plan.outputs
            if before is not None and name in before.figures
        }
        left = plan.only([name for name in plan.outputs if name not in known])
        sheet = Sheet(plan.parts[0].sides["samples"])
        gathered = gather(left, where, out, sheet.see) if left.outputs else []
    if not where.leads:
        return None
    for name, figure in known.items():
        found(name, figure)
    result, failed = before, None
    for result, name in _results(left, gathered, before):
        found(name, result.figures[name])
        try:
            write_result(result, out)
        except OSError as error:  # a full disk keeps no metric from being computed
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
    plan: Plan, where: World, out: Path | None = None, seen: Seen = unseen, others: Gathered | None = None
) -> list[Gathered]:
    """All that the metrics need, for each part of the samples; nothing in the processes that do not lead.

    out     of the result: beside it the work is saved
    seen    called with the pictures of the first part
    others  what was gathered of the other sides before
    """
    samples, found = [], dict(others or {})
    for k, part in enumerate(plan.parts):
        samples.append(
            part.gather(
                "samples", where, out and plan.state("samples", out, k), seen=seen if k == 0 else unseen
            )
        )
    for side in plan.sides:
        if side not in ("samples", *found):
            one = plan.gather(side, where, out and plan.state(side, out), keep=plan.params.cache is not None)
            if one is not None:
                found[side] = one
    return [{"samples": part, **found} for part in samples if part is not None]


def _results(plan: Plan, parts: Sequence[Gathered], before: Result | None) -> Iterator[tuple[Result, str]]:
    """The result as it grows, and the name of the figure that is new in it."""
    figures: dict[str, Scored] = {}
    for name, figure in compute(plan, parts):
        figures[name] = figure
        yield result_of(plan, figures, parts, before), name


def compute(plan: Plan, parts: Sequence[Gathered]) -> Iterator[tuple[str, Scored]]:
    """Metric by metric, of what was gathered; of several parts, the mean over them."""
    outputs = dict.fromkeys(plan.outputs.values())
    evidence = {
        output: [part.evidence(output, gathered) for part, gathered in zip(plan.parts, parts, strict=True)]
        for output in outputs
        if parts
    }
    for name, output in plan.outputs.items():
        if parts:
            yield name, scored(plan.parts[0], name, find_metric(name).figure(evidence[output]), parts[0])
