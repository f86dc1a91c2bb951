"""Compare models, samplers, steps and guidance, with real data and noise, in one report with targets."""

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
from eval.report import Story, make_report
from eval.runs import Run
from eval.scoring import Written
from eval.settings import CompareParams
from eval.targets import check_rows, evaluate
from models.files.text import write_json
from train.data.source import Source

Item = TypeVar("Item")
Value = TypeVar("Value")
EXPANDED = ("sampler", "guidance", "steps")  # lists of these make a row for every combination


def run(config: Mapping[str, Any]) -> bool:
    """Score all rows, and write results, report, targets and a figure; whether every target was met."""
    params = make_params("", CompareParams, {key: value for key, value in config.items() if key != "program"})
    start, out = time.perf_counter(), Path(params.out)
    rows = read_rows(params)
    check_rows(params.targets, rows)
    for row in rows.values():  # an error in the last row is raised before the first is sampled
        if "run" in row["samples"]:
            open_source(row["samples"])
    specs = {side: params.score.get(side) for side in get_args(Side)[1:]}
    sources: dict[Side, Source] = {  # opened once for all rows
        side: open_source(spec) for side, spec in specs.items() if isinstance(spec, Mapping)
    }
    written = score_rows(rows, sources, params)
    results = [each.result for each in written]
    targets = [evaluate(target, dict(zip(rows, results, strict=True))) for target in params.targets]
    write_json(out / "targets.json", {"targets": [target.to_json() for target in targets]})
    save_figure(steps_plot(results, main_metrics(results)[0]), out / "quality.png")
    runs = [Run(model.name, model.run, shown=key in params.shown) for key, model in params.models.items()]
    facts = {"measured in": f"{time.perf_counter() - start:.0f} s"}
    story = Story(params.title, params.summary, targets, runs, _real_images(sources), facts)
    make_report(out, [each.path for each in written], story)
    return all(target.met for target in targets)


def _real_images(sources: Mapping[Side, Source]) -> Tensor | None:
    """A few training images, (N, 3, H, W) in [-1, 1]."""
    if "training" not in sources:
        return None
    pictures = [picture for picture in sources["training"].read(range(3)) if isinstance(picture, Tensor)]
    return torch.stack(pictures).float() / 127.5 - 1


def read_rows(params: CompareParams) -> dict[str, dict[str, Any]]:
    """Settings of each row by its name. ValueError for wrong entries, and for two rows of one name."""
    rows: dict[str, dict[str, Any]] = {}
    for entry in params.rows:
        for row in _expand(check_mapping("a row", entry), params):
            if (name := row["name"]) in rows:
                raise ValueError(f"rows has two rows named {name!r}: give one of them another name")
            rows[name] = row
    return rows


def _expand(entry: dict[str, Any], params: CompareParams) -> list[dict[str, Any]]:
    """The rows of an entry: itself, or every combination of sampler, steps and guidance of a model."""
    if "model" not in entry:
        return [_with_shared(entry, params)]
    own: dict[str, Any] = {
        name: entry.pop(name) for name in ("name", "role", "metric", "parts", "n") if name in entry
    }
    key = entry.pop("model")
    check_names("model", [key], params.models)
    model = params.models[key]
    called = own.pop("name", model.name)
    lists = [value if isinstance(value := entry.pop(name, None), list) else [value] for name in EXPANDED]
    rows = []
    for sampler, guidance, steps in product(*lists):
        samples = {**entry, "run": model.run, "sampler": sampler, "steps": steps}
        name = f"{called}, {sampler}, {steps} step{'s' * (steps != 1)}"
        if guidance not in (None, 1):
            samples["guidance"] = guidance
            name += f", {guidance_name(guidance)}"
        rows.append(_with_shared({**own, "name": name, "model": called, "samples": samples}, params))
    return rows


def _with_shared(row: dict[str, Any], params: CompareParams) -> dict[str, Any]:
    """A row with the settings that all rows share, and as many samples as its parts need."""
    if "name" not in row or not isinstance(row.get("samples"), Mapping):
        keys = ", ".join(row) or "nothing"
        raise ValueError(f"a row needs a name and samples, or a model, not only {keys}")
    row = dict(row)
    n = row.pop("n", params.n)
    samples = {**row["samples"], **({} if n is None else {"n": n * row.get("parts", 1)})}
    places = {"report": params.out, "cache": f"{params.out}/cache", "progress": False}
    return {**params.score, **row, "samples": samples, **places}


def score_rows(
    rows: Mapping[str, dict[str, Any]], sources: Mapping[Side, Source], params: CompareParams
) -> list[Written]:
    """The result of each row. Results that exist are not computed again."""
    with tqdm(total=len(rows), desc="scoring", unit="row", disable=not params.progress) as bar:

        def score(name: str) -> Written:
            written = scoring.run(rows[name], sources=sources)
            assert written is not None
            bar.update()
            return written

        first, *others = rows
        written = [score(first)]  # alone: it builds the extractors, which the others share
        return written + map_in_threads(score, others, params.workers or torch.get_num_threads())


def map_in_threads(function: Callable[[Item], Value], items: Sequence[Item], workers: int) -> list[Value]:
    """[function(item) for item in items] by `workers` threads, each with its share of torch's threads.

    On two cores, two rows on one core each are faster than one after the other on both.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    pool = ThreadPoolExecutor(workers)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
