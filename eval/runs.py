"""Trained models in a report: how they learned, how noise is added, and how a sampler removes it."""

# ruff: noqa: RUF001  (Greek letters and minus signs are meant)

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

import models
from diffusion import NONE, Condition, DiscreteVP, Schedule, initial_noise, marginal
from eval.drawing import MUTED, colors_of, label_axes, legend, log_y, make_panels, picture, svg
from eval.page import NOTHING, minus, number, picture_address
from models import Model
from models.files.text import read_json_lines
from samplers import SAMPLERS
from samplers.guide import class_denoiser
from train.logbook import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDEST = 1000  # CSS pixels that the pictures of a sampling may be magnified to
Line = Mapping[str, float]  # of METRICS: step, loss, grad_norm, lr, samples_per_second


@dataclass(frozen=True)
class Run:
    """A trained model in a report. shown: whether its forward process and its sampling are, too."""

    name: str
    folder: str
    shown: bool = True


def describe_runs(runs: Sequence[Run], images: Tensor | None) -> dict[str, Any]:
    """The template's values. images (N, 3, H, W) in [-1, 1]: real ones, for the forward process."""
    curves = {run.name: read_json_lines(Path(run.folder) / METRICS) for run in runs}
    shown = {run.name: models.load(run.folder) for run in runs if run.shown}
    schedules = {name: model.schedule for name, model in shown.items()}
    loss = svg(loss_plot(curves), "loss", "Loss and gradient norm over training steps") if curves else ""
    over_time = "alpha, sigma and log-SNR over time"
    return {
        "training": [_training(name, lines) for name, lines in curves.items()],
        "loss": Markup(loss),
        "forward": [] if images is None else [_forward(name, model, images) for name, model in shown.items()],
        "schedules": Markup(svg(schedule_plot(schedules), "schedules", over_time)) if schedules else "",
        "paths": [strip for name, model in shown.items() for strip in _paths(name, model)],
    }


# Training ---------------------------------------------------------------------------------------------------


def _training(name: str, lines: Sequence[Line]) -> dict[str, str]:
    """A run as a row: its length, its final loss (mean of the last tenth) and its median speed."""
    losses, rates, speeds = (
        [line[key] for line in lines if key in line] for key in ("loss", "lr", "samples_per_second")
    )
    last = losses[-max(1, len(losses) // 10) :]
    return {
        "name": name,
        "steps": f"{max((line['step'] for line in lines), default=0):,.0f}",
        "loss": number(statistics.fmean(last), 4) if last else NOTHING,
        "lr": number(max(rates)) if rates else NOTHING,
        "speed": number(statistics.median(speeds)) if speeds else NOTHING,
    }


def loss_plot(curves: Mapping[str, Sequence[Line]]) -> Figure:
    """Loss and gradient norm of each run: logged values faint, their moving average over 5 % bold."""
    logged = {key for lines in curves.values() for line in lines for key in line}
    names = {"loss": "loss", "grad_norm": "gradient norm"}
    rows = [key for key in names if key in logged]
    figure, panels = make_panels(len(rows), len(curves), height=2.3)
    for j, (name, color) in enumerate(colors_of(curves).items()):
        for i, key in enumerate(rows):
            axes = panels[i, j]
            finite = [line for line in curves[name] if math.isfinite(line.get(key, math.nan))]
            label_axes(axes, title=name if i == 0 else "", xlabel="step" if i == len(rows) - 1 else "")
            if finite:
                steps, values = (
                    np.array([line[name] for line in finite], np.float64) for name in ("step", key)
                )
                every = max(1, len(steps) // 500)  # as many points as pixels
                axes.plot(steps[::every], values[::every], color=color, lw=0.6, alpha=0.4)
                axes.plot(steps[::every], smooth(values)[::every], color=color, lw=2)
                log_y(axes, values[values > 0])
            if j == 0:
                axes.set_ylabel(names[key])
    return figure


def smooth(values: np.ndarray, share: float = 0.05) -> np.ndarray:
    """Moving average over `share` of the values: narrower at the steep start, one-sided at the noisy end."""
    i = np.arange(len(values))
    before = np.minimum(i, round(share * len(values) / 2))
    after = np.minimum(before, i[::-1])
    total = np.concatenate(([0.0], np.cumsum(values)))
    return np.asarray((total[i + after + 1] - total[i - before]) / (before + after + 1))


# Noise and back ---------------------------------------------------------------------------------------------


def schedule_plot(schedules: Mapping[str, Schedule]) -> Figure:
    """alpha, sigma and the log signal-to-noise ratio over each schedule's own span of time."""
    figure, ((factors, snr),) = make_panels(1, 2, height=3.0)
    share = torch.linspace(0, 1, 301, dtype=torch.float64)
    for (name, schedule), color in zip(schedules.items(), colors_of(schedules).values(), strict=True):
        t = schedule.t_data + share * (schedule.t_max - schedule.t_data)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        factors.plot(share, alpha, color=color, lw=2, label=name)
        factors.plot(share, sigma, color=color, lw=2, ls=(0, (4, 2)))
        inside = (alpha > 0) & (sigma > 0)
        snr.plot(share[inside], 2 * (alpha / sigma)[inside].log(), color=color, lw=2)
    where = "share of the schedule's time, from data (0) to noise (1)"
    label_axes(factors, title="Factor of the data, α (solid), and of the noise, σ (dashed)", xlabel=where)
    label_axes(snr, title="log signal-to-noise ratio, log(α²/σ²)", xlabel=where)
    snr.axhline(0, color=MUTED, lw=1)
    below: dict[str, Any] = dict(textcoords="offset points", va="top")
    snr.annotate("as much data as noise", (0, 0), (4, -4), color=MUTED, fontsize=8.5, **below)
    snr.set_ylim(-14, 14)
    legend(figure, [factors])
    return figure


def _forward(name: str, model: Model, images: Tensor, columns: int = 8) -> dict[str, Any]:
    """Up to three images, clean and at `columns` times of training, each with its noise."""
    schedule, images = model.schedule, images[:3, : model.shape[0]]
    noise = initial_noise(range(len(images)), images.shape[1:], images.dtype)
    times = [schedule.t_min + (schedule.t_max - schedule.t_min) * i / (columns - 1) for i in range(columns)]
    levels = [schedule.level(float(round(t)) if isinstance(schedule, DiscreteVP) else t) for t in times]
    if levels[0].sigma > 0:  # otherwise the first time is clean data already
        levels.insert(0, schedule.terminal)
    strip = []
    for level in levels:
        # Only variance-exploding noise leaves the range of pictures; otherwise the divisor is 1.
        x_t = marginal(images, noise, level) / max(1.0, math.hypot(level.alpha, level.sigma))
        log_snr = minus(f"{2 * level.half_log_snr:+.1f}".replace("inf", "∞"))
        time = "data" if level.sigma == 0 else f"{level.t:.3g}" if level.t < 100 else f"{level.t:.0f}"
        sigma = f"{level.sigma:.3f}" if level.sigma < 100 else number(level.sigma)
        source = picture_address(picture(x_t, columns=1))
        alpha = f"{level.alpha:.3f}"
        strip.append({"source": source, "t": time, "alpha": alpha, "sigma": sigma, "log_snr": log_snr})
    return {"name": name, "columns": strip}


@torch.no_grad()
def _paths(name: str, model: Model, steps: int = 12) -> list[dict[str, Any]]:
    """DDIM's states and estimates, step by step, of four samples, of four classes if there are classes."""
    model.network.eval()
    denoiser, grid, count = class_denoiser(model, 1.0, clip=True), model.grid(steps), model.num_classes
    condition = Condition(label=torch.tensor([k % count for k in (2, 3, 5, 8)])) if count else NONE
    x = grid.start(initial_noise(range(4), model.shape))
    trace = list(SAMPLERS["ddim"](lambda x_t, level: denoiser(x_t, level, condition), x, grid))
    strips = []
    states, estimates = [step.x for step in trace], [step.x0 for step in trace]
    for what, frames in (("the sample x_t", states), ("the estimate of x0", estimates)):
        images = torch.stack(frames, 1).flatten(0, 1)
        across = steps * (images.shape[-1] + 1) - 1
        width = across * min(10, max(1, WIDEST // across))
        title, caption = f"{name}: {what}", f"{steps} DDIM steps, from noise to data."
        source = picture_address(picture(images, steps))
        strips.append({"title": title, "caption": caption, "source": source, "width": width})
    return strips
