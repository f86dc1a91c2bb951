"""The report of an evaluation: nothing ranked that cannot be compared, every number with its interval, whole, self-contained, escaped."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.drawing import pareto_front
from eval.report import cite, make_tables, markdown_table, report_of, write_scores_report
from eval.report_plots import drawn, main_metrics, metric_name, pareto_plot, save_pareto, short_names, trade_off_plot
from eval.results import Result, Scored, write_result
from tests.eval.test_report import HOSTILE, Page


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


FID_BASIS: dict[str, Any] = {
    "metric": "fid", "protocol": "clean", "n": 50000, "reference": sha("reference"), "settings": {},
    "extractor": {"network": "inception", "weights": sha("inception"), "prepared": "299 x 299, bicubic, antialiased", "random": False},
}  # fmt: skip
CLIP_BASIS: dict[str, Any] = {
    "metric": "clip_score", "protocol": "torchmetrics", "n": 50000, "reference": None, "settings": {"scale": 100},
    "extractor": {"network": "clip ViT-B-16", "weights": sha("clip"), "prepared": "224 x 224, bicubic", "random": False},
}  # fmt: skip
KID_BASIS: dict[str, Any] = {**FID_BASIS, "metric": "kid", "settings": {"subsets": 100, "size": 1000}}
FACTS = {"plain-diffusion": "0.1.0", "torch": "2.15.0", "device": "CPU, 2 threads"}


def fid(value: float, half: float = 0.25, **basis: Any) -> Scored:
    return Scored(value, value - half, value + half, "lower", basis.get("n", 50000), {**FID_BASIS, **basis})


def result(name: str, figures: dict[str, Scored], **parts: Any) -> Result:
    samples = {"origin": f"samples of {name}", "n": 50000, "sha256": sha(name), "sizes": [[32, 32]], "skipped": 0}
    return Result(name, figures, {**samples, **parts.pop("samples", {})}, facts=FACTS, **parts)


def made(model: int, sampler: str, steps: int, guidance: float) -> Result:
    """A result as a sweep would leave it: better with steps and calls, its CLIP score rising and its FID rising or falling with guidance."""
    order = {"euler": 1.0, "heun": 1.9, "dpmpp_2m": 1.7}[sampler]
    calls = steps * (1 + (guidance != 1)) * (1 + (sampler == "heun"))
    value = 4.2 - model + 900 * (1 + 0.2 * model) / steps ** (1 + 0.35 * order) + 1.4 * (guidance - 1.5) ** 2
    clip = 24 + 0.8 * model + 6 * (1 - math.exp(-guidance / 2)) - 20 / steps ** (1 + 0.3 * order)
    figures = {
        "fid": fid(value, 0.05 + 0.02 * value),
        "kid": Scored(value / 4000, value / 4000 - 2e-4, value / 4000 + 2e-4, "lower", 50000, KID_BASIS),
        "clip_score": Scored(clip, clip - 0.11, clip + 0.11, "higher", 50000, CLIP_BASIS),
    }
    settings = {"run": f"runs/{('unet', 'dit')[model]}", "sampler": sampler, "steps": steps, "guidance": guidance, "seed": 0}
    return result(
        f"{('unet', 'dit')[model]} {sampler} {steps} x{guidance:g}",
        figures,
        samples={"settings": settings, "calls": calls, "seconds": 50000 * calls * (0.004 + 0.003 * model)},
        notes=("3 pictures that could not be read were left out",) if steps == 5 else (),
        settings={"metric": ["fid", "kid", "clip_score"], "batch_size": 64},
    )


SWEEP = [made(*row) for row in itertools.product((0, 1), ("euler", "heun", "dpmpp_2m"), (5, 10, 25), (1.0, 2.5))]
CLOSED = result("closed model", {"fid": fid(9.7, 0.3), "clip_score": Scored(28.7, 28.6, 28.8, "higher", 50000, CLIP_BASIS)})
OTHER = result("unet, as in 2017", {"fid": fid(7.77, protocol="tensorflow", n=10000), "clip_score": SWEEP[0].figures["clip_score"]})
EVERYTHING = [*SWEEP, CLOSED, OTHER]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an evaluation leaves: results, two sheets, and the report made of them."""
    folder = tmp_path_factory.mktemp("evaluation")
    for i, one in enumerate(EVERYTHING):
        write_result(one, folder / "results" / f"{i:02d}.json")
    noise = np.random.default_rng(0)
    Image.fromarray(noise.integers(0, 255, (35, 35, 3), np.uint8)).save(folder / "results" / "00.png")
    Image.fromarray(noise.integers(0, 255, (200, 1800, 3), np.uint8)).resize((1800, 1800)).save(folder / "results" / "01.png")
    report_of(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")
