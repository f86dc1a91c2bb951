"""What plots are made of: colours, axes, scales and legends.

`save_figure` writes a plot as a PNG file. `svg` makes it part of a page: its colours become CSS variables,
for light and dark, and its text stays text. pyplot's global state is not used.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.files.writing import replacing
from plain_diffusion.extras import extra
from samplers.pictures import tile, to_uint8

with extra("plots"):
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

# Light colours; the page's style sheet has dark ones of the same names. The series is Okabe and Ito's (2008).
PALETTE = {
    "ink": "#1c2128", "muted": "#66707b", "grid": "#e4e7eb", "surface": "#fefefe",
    "blue": "#0072b2", "vermilion": "#d55e00", "green": "#009e73", "purple": "#b8609a", "orange": "#d18f00",
    "sky": "#3d9fd6",
}  # fmt: skip
SERIES = ("blue", "vermilion", "green", "purple", "orange", "sky")
WIDTH = 11.0  # inches; a page shows a figure of this width at its full measure
INK, MUTED, GRID, SURFACE = (PALETTE[name] for name in ("ink", "muted", "grid", "surface"))
T = TypeVar("T")


@dataclass(frozen=True)
class Style:
    """How a sampler looks in every plot."""

    color: str
    marker: str
    size: float
    width: float
    dashes: Any = "-"
    hollow: bool = False
    offset: float = -0.2  # from a line that samplers share, in lines


# DDIM and Euler give the same numbers: DDIM is a wide band with rings, Euler a thin line with dots in them.
STYLES = {
    "ddpm": Style(PALETTE["vermilion"], "s", 5.5, 1.8),
    "ddim": Style(PALETTE["sky"], "o", 11, 4.5, hollow=True, offset=0.1),
    "euler": Style(PALETTE["ink"], "o", 4, 1.4, (0, (3, 2)), offset=0.1),
    "consistency": Style(PALETTE["green"], "D", 6, 1.8, offset=0),
}


def make_panels(rows: int, columns: int, height: float, sharey: bool = False) -> tuple[Figure, Any]:
    """A figure of full width and its axes as an array (rows, columns); `height` of a row is in inches."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(WIDTH, height * max(rows, 1) + 0.5), layout=layout)
    return figure, figure.subplots(max(rows, 1), max(columns, 1), squeeze=False, sharey=sharey)


def label_axes(axes: Any, title: str, xlabel: str, ylabel: str = "", grid: str = "y") -> None:
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=8)
    axes.set_xlabel(xlabel, fontsize=9, color=MUTED)
    axes.set_ylabel(ylabel)
    axes.yaxis.label.set(fontsize=9, color=MUTED)
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=8.5, length=3)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis=grid, color=GRID, lw=0.8)
    axes.set_axisbelow(True)


def log_x(axes: Any, ticks: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    apart = [tick for i, tick in enumerate(ticks) if i == 0 or tick >= 1.25 * ticks[i - 1]]
    axes.xaxis.set_major_locator(FixedLocator(apart))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))


def log_y(axes: Any, values: np.ndarray) -> None:
    """Round numbers as ticks: 1, 2, 5 within two decades, powers of ten beyond."""
    if len(values) > 0:
        axes.set_yscale("log", nonpositive="mask")
        _round_ticks(axes.yaxis, values)


def log_x_round(axes: Any, values: np.ndarray) -> None:
    """As `log_y`, for measured values, which have no ticks of their own."""
    if len(values) > 0:
        axes.set_xscale("log", nonpositive="mask")
        _round_ticks(axes.xaxis, values)


def _round_ticks(axis: Any, values: np.ndarray) -> None:
    narrow = values.max() < 100 * values.min()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(plain))


def legend(figure: Figure, panels: Iterable[Any], columns: int = 8) -> None:
    """One legend above the panels, each name once."""
    entries: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        figure.legend(
            entries.values(), entries.keys(), loc="outside upper left", ncols=columns, frameon=False,
            fontsize=9.5, labelcolor=INK, handlelength=2.6, columnspacing=2.2,
        )  # fmt: skip


def literal(text: str) -> str:
    """A name as a label: on one line, without mathematics, and never hidden from a legend."""
    text = " ".join(text.split()).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def colors_of(names: Iterable[str]) -> dict[str, str]:
    return {name: PALETTE[SERIES[i % len(SERIES)]] for i, name in enumerate(unique(names))}


def unique(names: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(names))


def sampler_style(sampler: str) -> Style:
    """A sampler's own style, or a colour and marker that follow from its name."""
    if sampler in STYLES:
        return STYLES[sampler]
    place = sum(map(ord, sampler))
    return Style(PALETTE[("purple", "orange", "blue")[place % 3]], "^vPX"[place % 4], 6.5, 1.8)


def guidance_name(scale: float) -> str:
    """A guidance scale in words: 1 is none, 0 leaves the condition out."""
    return "unconditional" if scale == 0 else "no guidance" if scale == 1 else f"guidance {scale:g}"


def pareto_front(items: Iterable[T], cost: Callable[[T], float], loss: Callable[[T], float]) -> list[T]:
    """The items with a finite loss that no cheaper item reaches, from the cheapest on."""
    front: list[T] = []
    finite = [item for item in items if math.isfinite(loss(item))]
    for item in sorted(finite, key=lambda item: (cost(item), loss(item))):
        if not front or loss(item) < loss(front[-1]):
            front.append(item)
    return front


def plain(value: float, _: int | None = None) -> str:
    return f"{value:g}"


def save_figure(figure: Figure, path: str | Path, dpi: int = 200) -> None:
    """Write a figure as PNG on white, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white")
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def svg(figure: Figure, name: str, description: str) -> str:
    """A figure as an <svg> element: palette colours as var(--...), text as text, ids that begin with `name`.

    The same figure gives the same text. `description` is for screen readers.
    """
    buffer = io.StringIO()
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # a second layout would move everything by a rounding error
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*|<!--.*?-->\s*", "", text, flags=re.DOTALL
    )
    # Several figures share a page, and matplotlib's own ids differ from run to run.
    ids = {old: f"{name}-{i}" for i, old in enumerate(re.findall(r'\bid="([^"]+)"', text))}
    text = re.sub(r'(\bid="|href="#|url\(#)([^")]+)', lambda match: match[1] + ids[match[2]], text)
    known = {color: f"var(--{key}, {color})" for key, color in PALETTE.items()}
    text = re.sub(r"#[0-9a-f]{6}\b", lambda match: known.get(match[0], match[0]), text)
    box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {box[0] if box else ""} role="img" aria-label="{html.escape(description)}">'
    return head + re.sub(r"^<svg[^>]*>", "", text).replace("xlink:href", "href")


def picture(images: Tensor, columns: int) -> bytes:
    """Images (N, 1 or 3, H, W), clipped to [-1, 1], as one PNG, row by row, a transparent pixel apart."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"a picture needs images (N, 1 or 3, H, W), not {tuple(images.shape)}")
    colours = images.detach().cpu().float().expand(-1, 3, -1, -1)
    opaque = torch.cat([colours, torch.ones_like(colours[:, :1])], 1)
    pixels = to_uint8(tile(opaque, columns, fill=-1)[None])[0].permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
