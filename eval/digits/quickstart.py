"""The quickstart's last step: benchmark the trained models, hold them to what they must reach, write the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Set
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from diffusion import Condition, initial_noise
from diffusion.spec import check_names, check_type, make
from eval.digits.benchmark import Job, jobs, measure, references
from eval.digits.judge import DigitJudge
from eval.digits.plots import quality_plot
from eval.digits.report import Gallery, write_report
from eval.digits.score import Score, Target, reference
from eval.drawing import save_figure
from models.files.text import read_json_lines, write_json
from samplers import SAMPLERS
from samplers.guide import steered
from samplers.pictures import save_png, tile
from samplers.provenance import provenance
from train.data import digits

KEYS = ("program", "out", "training", "reference", "n", "workers", "progress", "unet", "dit", "student", "jobs")
SUMMARY = """\
Two models learned to draw handwritten digits from nothing: a UNet that predicts the noise of a discrete variance-preserving \
process, and a transformer (DiT) that predicts the velocity of a rectified flow. The UNet was then distilled into a \
consistency model that needs one or two network calls.

Every figure compares samples with real digits that no model has seen. What as many training digits get is the floor, \
what pure noise gets is the ceiling; a number means something only beside the two."""


def run(config: Mapping[str, Any]) -> bool:
    """Measure, judge, and write out/report.html, out/scores.json and pictures; whether every target was met."""
    check_names("setting", config, KEYS)
    for name, kind in (("n", int), ("workers", int | None), ("jobs", list[dict[str, Any]]), ("progress", bool), ("out", str)):
        check_type(name, config[name], kind)
    start, out = time.perf_counter(), Path(config["out"])
    splits = {"digits": digits}
    rows = jobs(config["jobs"])
    _require_rows({(job.name, job.sampler, job.steps, job.guidance != 1) for job in rows}, config)  # before the work
    judge = DigitJudge(make("data set", config["training"], splits), make("data set", config["reference"], splits))
    labels = judge.classes(config["n"])
    floor_and_ceiling = references(judge, config["n"])
    out.mkdir(parents=True, exist_ok=True)
    scores, images = measure(rows, judge, config["n"], config["workers"], config["progress"])
    scores = floor_and_ceiling + scores
    found = targets(scores, config)
    facts = {
        **provenance(),
        "measured in": f"{time.perf_counter() - start:.0f} s",
        "images per seed": str(config["n"]),
        "training digits": str(len(judge.train)),
        "held-out digits": str(len(judge.held_out)),
    }
    write_json(out / "scores.json", {"scores": [s.to_json() for s in scores], "targets": [t.to_json() for t in found], "facts": facts})
    _pictures(out, scores, images, labels)
    write_report(
        out / "report.html",
        title="Handwritten digits: two diffusion models and a distilled one",
        summary=SUMMARY,
        scores=scores,
        targets=found,
        curves={config[part]["name"]: read_json_lines(Path(config[part]["run"]) / "metrics.jsonl") for part in ("unet", "dit", "student")},
        forward={config[part]["name"]: (models.load(config[part]["run"]).schedule, judge.train.images[:3]) for part in ("unet", "dit")},
        galleries=[Gallery("Held-out real digits", "What samples should look like.", _by_class(judge.held_out.images, judge.labels))]
        + [_gallery(score, x, labels) for score, x in zip(scores[-len(images) :], images.values(), strict=True)],
        trajectories=list(chain.from_iterable(_trajectories(config[part]) for part in ("unet", "dit"))),
        facts=facts,
    )
    return all(target.met for target in found)


def targets(scores: Sequence[Score], config: Mapping[str, Any]) -> list[Target]:
    """What the quickstart must reach, with what it reached."""
    floor, unseen = reference(scores, "floor", "frechet"), reference(scores, "floor", "nearest")
    if floor is None or unseen is None:
        raise ValueError("targets need the reference rows of real digits")
    _require_rows({(s.model, s.sampler, s.steps, s.guidance != 1) for s in scores}, config)
    unet, dit, student = (config[part]["name"] for part in ("unet", "dit", "student"))

    def row(name: str, sampler: str, steps: int, guided: bool = False) -> Score:
        return next(s for s in scores if (s.model, s.sampler, s.steps, s.guidance != 1) == (name, sampler, steps, guided))

    def frechet(name: str, sampler: str, steps: int) -> float:
        return row(name, sampler, steps).frechet.mean

    found = []
    for name, sampler in ((unet, "ddim"), (dit, "euler")):
        best, guided = row(name, sampler, 50), row(name, sampler, 50, guided=True)
        note = f"{best.frechet.mean:.3f} against {floor.mean:.3f} ± {floor.std:.3f} of real digits"
        found += [
            Target(f"{name}: Fréchet distance at 50 steps over the floor", best.frechet.mean / floor.mean, 1.3, True, note),
            Target(f"{name}: label accuracy at 50 steps", best.accuracy.mean, 0.97, False),
            Target(f"{name}: label accuracy at 50 steps, guided", guided.accuracy.mean, 0.99, False, f"guidance {guided.guidance:g}"),
            Target(
                f"{name}: nearest training digit, over held-out digits' own", best.nearest.mean / unseen.mean, 0.9, False, "a copy is 0"
            ),
            Target(
                f"{name}: share of near-copies", best.copies.mean, 0.05, True, "0.01 of held-out digits lie as near to a training digit"
            ),
            Target(f"{name}: Fréchet distance at 10 {sampler} steps over 50", frechet(name, sampler, 10) / best.frechet.mean, 1.5, True),
            Target(f"{name}: 10 DDIM steps over 10 DDPM steps", frechet(name, "ddim", 10) / frechet(name, "ddpm", 10), 1.0, True),
        ]
    teacher = frechet(unet, "ddim", 50)
    for steps, limit in ((2, 1.5), (1, 2.5)):
        distance = frechet(student, "consistency", steps)
        name = f"{student}: Fréchet distance at {steps} step{'s' * (steps > 1)} over its teacher's at 50"
        found.append(Target(name, distance / teacher, limit, True, f"{distance:.3f} against {teacher:.3f}"))
    return found


def _require_rows(rows: Set[tuple[str, str, int, bool]], config: Mapping[str, Any]) -> None:
    """ValueError unless there are the rows (model, sampler, steps, guided) that the targets need."""
    unet, dit, student = (config[part]["name"] for part in ("unet", "dit", "student"))
    needed = {(student, "consistency", steps, False) for steps in (1, 2)}
    for name, sampler in ((unet, "ddim"), (dit, "euler")):
        needed |= {(name, sampler, 50, False), (name, sampler, 50, True), (name, sampler, 10, False)}
        needed |= {(name, "ddim", 10, False), (name, "ddpm", 10, False)}
    for name, sampler, steps, guided in sorted(needed - rows):
        raise ValueError(f"the targets need a row for {name}, {sampler}, {steps} steps{', guided' * guided}: add it to jobs")


def _by_class(images: Tensor, labels: Tensor, each: int = 3) -> Tensor:
    """The first images of every class, one class per column."""
    first = [(labels == k).nonzero()[:each, 0] for k in range(10)]
    return images[torch.stack(first, 1).flatten()]


def _gallery(score: Score, images: Tensor, labels: Tensor) -> Gallery:
    guided = "" if score.guidance == 1 else f", guidance {score.guidance:g}"
    title = f"{score.model}: {score.sampler}, {score.steps} step{'s' * (score.steps > 1)}{guided}"
    return Gallery(title, f"{score.calls} network call{'s' * (score.calls > 1)} per image.", _by_class(images, labels))


@torch.no_grad()
def _trajectories(part: Mapping[str, str], steps: int = 12) -> list[Gallery]:
    """What the sampler holds and what the network believes, step by step, for four digits."""
    model = models.load(part["run"])
    model.network.eval()
    grid = model.grid(steps)
    denoiser, label = steered(model, 1.0, clip=True), torch.tensor([2, 3, 5, 8])
    x = grid.start(initial_noise(range(4), model.shape))
    trace = list(SAMPLERS["ddim"](lambda x_t, level: denoiser(x_t, level, Condition(label=label)), x, grid))
    captions = {
        "the sample x_t": [step.x for step in trace],
        "the estimate of x0": [step.x0 for step in trace],
    }
    return [
        Gallery(f"{part['name']}: {what}", f"{steps} DDIM steps, from noise to data.", torch.stack(frames, 1).flatten(0, 1), columns=steps)
        for what, frames in captions.items()
    ]


def _pictures(out: Path, scores: Sequence[Score], images: Mapping[Job, Tensor], labels: Tensor) -> None:
    """The pictures that a README or a talk can take: quality against steps, and a grid per row."""
    save_figure(quality_plot(scores), out / "quality.png")
    for job, x in images.items():
        name = f"{job.name}-{job.sampler}-{job.steps}-{job.guidance:g}".lower().replace(", ", "-").replace(" ", "-")
        save_png(tile(_by_class(x, labels), columns=10), out / "samples" / f"{name}.png", zoom=8)
