"""Scoring samples, whoever made them: what `python -m eval samples=... reference=... metric=[...]` does, callable with plain values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.spec import make_params
from eval.collect import Collected, unseen
from eval.figures import METRICS
from eval.plan import Plan, ScoreParams, Side
from eval.results import Result, Scored, write_result
from eval.sheet import Sheet
from eval.tracking import log_result
from samplers.results import given
from train.world import world


class Written(NamedTuple):
    """A result, its file, and whether it is new or was there already."""

    result: Result
    path: Path
    new: bool


def run(config: Mapping[str, Any], found: Callable[[str, Scored], None] = lambda name, figure: None) -> Written | None:
    """Score as the configuration says, and write the result as JSON; None in the processes that do not lead.

    found  called with each figure as soon as it is known, so that none is lost whatever comes after

    A result that is there already, of the same settings, pictures and weights, is returned as it is. ValueError for anything that
    cannot be scored, as far as possible before the work; OSError where the result cannot be written.
    """
    params = make_params("", ScoreParams, given({key: value for key, value in config.items() if key != "program"}))
    with world(params.device) as where:
        plan = Plan.of(params, where)
        done = plan.finished(where)
        sheet = Sheet(plan.sides["samples"])
        sides = () if done else plan.sides
        parts = {side: plan.gather(side, where, plan.state(side), sheet.see if side == "samples" else unseen) for side in sides}
    if not where.leads:
        return None
    if done:
        for name, figure in done.figures.items():
            found(name, figure)
        return Written(done, plan.out, new=False)
    result = computed(plan, {side: part for side, part in parts.items() if part is not None}, found)
    if params.report is not None:
        sheet.save(plan.out.with_suffix(".png"))
    write_result(result, plan.out)
    plan.forget()
    if params.wandb is not None:
        log_result(result, params.wandb, plan.out)
    return Written(result, plan.out, new=True)


def computed(plan: Plan, gathered: Mapping[Side, Collected], found: Callable[[str, Scored], None] = lambda name, figure: None) -> Result:
    """Metric by metric, of what was gathered of each side; `found` is called with each figure."""
    plan.check_enough(gathered)
    evidence = {output: plan.evidence(output, gathered) for output in dict.fromkeys(plan.outputs.values())}
    figures: dict[str, Scored] = {}
    for name, output in plan.outputs.items():
        figures[name] = plan.scored(name, METRICS[name].compute(evidence[output]), gathered)
        found(name, figures[name])
    return plan.result(figures, gathered)
