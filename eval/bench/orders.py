"""A table and a picture of how fast every solver converges (experiment=sampler_orders)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tqdm import tqdm

from diffusion import Grid, build_schedule, time_grid
from diffusion.settings import setting
from diffusion.spec import check_at_least_one, check_call, lookup, make_params
from eval.bench.convergence import Curve, ode_curve, sde_curve, stated_orders
from eval.bench.harness import markdown_table, write
from samplers import SAMPLERS


@dataclass(frozen=True, kw_only=True)
class OrderParams:
    """What to measure."""

    samplers: tuple[str, ...] | None = setting(None, "names to measure; null: all that state an order")
    grids: tuple[dict[str, Any], ...] = setting(
        ..., "for solvers of the ODE: {name, schedule, and what time_grid takes: spacing, t_start, ...}"
    )
    steps: tuple[int, ...] = setting(
        (8, 16, 32, 64, 128, 256, 512, 1024), "on each of the grids; each twice the one before"
    )
    path_grid: dict[str, Any] = setting(..., "the grid for solvers of the SDE, on Brownian paths")
    path_steps: tuple[int, ...] = setting((8, 16, 32, 64, 128, 256), "on the grid of paths")
    path_samples: int = setting(20000, "paths")
    out: str = setting(..., "the folder of orders.md, orders.json and orders.png", kind="place", text="path")
    progress: bool = setting(True, "false: no bar", kind="place")

    def __post_init__(self) -> None:
        check_at_least_one(self, "steps", "path_steps", "path_samples")
        for name, steps in (("steps", self.steps), ("path_steps", self.path_steps)):
            if len(steps) < 2 or any(b != 2 * a for a, b in pairwise(steps)):
                raise ValueError(f"{name} must double, at least once, to measure an order, not {list(steps)}")
        for sampler in self.samplers or ():
            lookup("sampler", sampler, SAMPLERS)


def run(config: Mapping[str, Any]) -> list[Curve]:
    """Measure, and write out/orders.json, out/orders.md and out/orders.png."""
    from eval.bench.solver_plots import convergence_plot  # imports matplotlib, which settings do not need
    from eval.drawing import save_figure

    params = make_params("", OrderParams, {key: value for key, value in config.items() if key != "program"})
    wanted = params.samplers or tuple(SAMPLERS)
    stated = [stated_orders(words) for words in ("Order", "Strong order")]
    ode, sde = ({name: order for name, order in each.items() if name in wanted} for each in stated)
    grids = {_name(spec): [_grid(spec, n) for n in params.steps] for spec in params.grids}
    path_name = _name(params.path_grid)
    path_grids = [_grid(params.path_grid, n) for n in (*params.path_steps, 2 * params.path_steps[-1])]
    curves = []
    with tqdm(total=len(ode) * len(grids) + len(sde), desc="solvers", disable=not params.progress) as bar:
        for name, made in grids.items():
            for sampler, order in ode.items():
                curves.append(ode_curve(sampler, order, name, made))
                bar.update()
        for sampler, order in sde.items():
            curves.append(sde_curve(sampler, order, path_name, path_grids, params.path_samples))
            bar.update()
    out = Path(params.out)
    write(out, "orders", curves, table(curves))
    save_figure(convergence_plot(curves), out / "orders.png")
    return curves


def table(curves: Sequence[Curve]) -> str:
    """A Markdown table: of each solver its calls, the stated order, and the measured order on each grid."""
    grids = list(dict.fromkeys(curve.grid for curve in curves if not curve.strong))
    measured = [f"{grid}: measured" for grid in grids]
    rows = []
    for sampler in dict.fromkeys(curve.sampler for curve in curves):
        own = {"path" if each.strong else each.grid: each for each in curves if each.sampler == sampler}
        first = next(iter(own.values()))
        cells = [f"{own[grid].measured:.2f}" if grid in own else "" for grid in [*grids, "path"]]
        calls, order = round(first.calls[-1] / first.steps[-1]), f"{first.stated}{' (strong)' * first.strong}"
        rows.append([f"`{sampler}`", str(calls), order, *cells])
    return markdown_table(["solver", "calls a step", "order", *measured, "on a Brownian path"], rows)


def _name(spec: Mapping[str, Any]) -> str:
    if not isinstance(spec.get("name"), str) or "schedule" not in spec:
        raise ValueError(f"a grid needs a name and a schedule, not only {', '.join(spec) or 'nothing'}")
    return str(spec["name"])


def _grid(spec: Mapping[str, Any], steps: int) -> Grid:
    """A grid of that many steps between levels with noise."""
    options = {key: value for key, value in spec.items() if key not in ("name", "schedule")}
    options = check_call("the grid", time_grid, 2, options)
    return time_grid(build_schedule(spec["schedule"]), steps + 1, **options)[:-1]
