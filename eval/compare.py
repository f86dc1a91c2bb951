"""Many rows at once: models, samplers, steps and guidance, and what they are judged by, held to targets and
told in one report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from diffusion.spec import check_mapping, check_names, make_params
from eval import scoring
from eval.drawing import guidance_name, save_figure
from eval.evaluation import Side
from eval.images.open import open_source
from eval.plots import main_metrics, steps_plot
from eval.report import Story, report_of
from eval.runs import Run
from eval.scoring import Written
from eval.settings import CompareParams
from eval.targets import check_rows, judge
from models.files.text import write_json
from train.data.source import Source

Part = TypeVar("Part")
Found = TypeVar("Found")
LISTED = ("sampler", "guidance", "steps")  # of a row's samples: lists of these are multiplied out


def run(config: Mapping[str, Any]) -> bool:
    """Score all rows, and write their results, out/report.html, out/targets.json and out/quality.png; whether
    every target was met."""
    params = make_params("", CompareParams, {key: value for key, value in config.items() if key != "program"})
    start, out = time.perf_counter(), Path(params.out)
    rows = read_rows(params)
    check_rows(params.targets, rows)
    for row in rows.values():  # what is wrong with the last row is said before the first is drawn
        if "run" in row["samples"]:
            open_source(row["samples"])
    sources: dict[Side, Source] = {
        side: open_source(spec)
        for side in get_args(Side)[1:]
        if isinstance(spec := params.score.get(side), Mapping)
    }  # once for all rows
    written = score_rows(rows, sources, params)
    results = [one.result for one in written]
    targets = [judge(promise, dict(zip(rows, results, strict=True))) for promise in params.targets]
    write_json(out / "targets.json", {"targets": [target.to_json() for target in targets]})
    save_figure(steps_plot(results, main_metrics(results)[0]), out / "quality.png")
    runs = [Run(model.name, model.run, shown=key in params.shown) for key, model in params.models.items()]
    facts = {"measured in": f"{time.perf_counter() - start:.0f} s"}
    report_of(
        out,
        [one.path for one in written],
        Story(params.title, params.summary, targets, runs, _real_images(sources), facts),
    )
    return all(target.met for target in targets)


def _real_images(sources: Mapping[Side, Source]) -> Tensor | None:
    """A few of the pictures that the models have seen, (N, 3, H, W) in [-1, 1]."""
    if "training" not in sources:
        return None
    pictures = [picture for picture in sources["training"].read(range(3)) if isinstance(picture, Tensor)]
    return torch.stack(pictures).float() / 127.5 - 1


def read_rows(params: CompareParams) -> dict[str, dict[str, Any]]:
    """The settings of each row by its name; every combination of sampler, steps and guidance of an entry is a
    row.

    ValueError for entries that do not fit, and for two rows of one name.
    """
    rows: dict[str, dict[str, Any]] = {}
    for entry in params.rows:
        for row in _multiplied(check_mapping("a row", entry), params):
            name = row["name"]
            if name in rows:
                raise ValueError(
                    f"rows has more than one that reads {name!r}: give those with other settings a name"
                )
            rows[name] = row
    return rows


def _multiplied(entry: dict[str, Any], params: CompareParams) -> list[dict[str, Any]]:
    """An entry's rows: it is one itself, unless it names a model."""
    if "model" not in entry:
        return [_row(entry, params)]
    own: dict[str, Any] = {
        name: entry.pop(name) for name in ("name", "role", "metric", "parts", "n") if name in entry
    }
    key = entry.pop("model")
    check_names("model", [key], params.models)
    model = params.models[key]
    called = own.pop("name", model.name)
    lists = [value if isinstance(value := entry.pop(name, None), list) else [value] for name in LISTED]
    rows = []
    for sampler, guidance, steps in product(*lists):
        samples = {**entry, "run": model.run, "sampler": sampler, "steps": steps}
        guided = guidance not in (None, 1)
        if guided:
            samples["guidance"] = guidance
        name = f"{called}, {sampler}, {steps} step{'s' * (steps != 1)}" + (
            f", {guidance_name(guidance)}" if guided else ""
        )
        rows.append(_row({**own, "name": name, "model": called, "samples": samples}, params))
    return rows


def _row(row: dict[str, Any], params: CompareParams) -> dict[str, Any]:
    """With the settings that all rows share, and as many pictures as its parts need."""
    if "name" not in row or not isinstance(row.get("samples"), Mapping):
        raise ValueError(
            f"a row needs a name and samples, or a model, not only {', '.join(row) or 'nothing'}"
        )
    row = dict(row)
    n = row.pop("n", params.n)
    samples = {**row["samples"], **({} if n is None else {"n": n * row.get("parts", 1)})}
    return {
        **params.score,
        **row,
        "samples": samples,
        "report": params.out,
        "cache": f"{params.out}/cache",
        "progress": False,
    }


def score_rows(
    rows: Mapping[str, dict[str, Any]], sources: Mapping[Side, Source], params: CompareParams
) -> list[Written]:
    """The result of each row; one that is there already is not computed again."""
    with tqdm(total=len(rows), desc="scoring", unit="row", disable=not params.progress) as bar:

        def score(name: str) -> Written:
            written = scoring.run(rows[name], sources=sources)
            assert written is not None
            bar.update()
            return written

        first, *others = rows
        found = [score(first)]  # alone: it makes the extractors, which the others share
        return found + side_by_side(score, others, params.workers or torch.get_num_threads())


def side_by_side(function: Callable[[Part], Found], parts: Sequence[Part], workers: int) -> list[Found]:
    """function(part) of every part, in order, by `workers` threads that share torch's own: it leaves Python
    free while it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    pool = ThreadPoolExecutor(workers)
    try:
        return list(pool.map(function, parts))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
