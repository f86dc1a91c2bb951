"""`plain-diffusion eval samples=... reference=... metric=[...]` or `experiment=NAME`: see configs/eval."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from configs import command_line
from diffusion.outside import trust
from diffusion.spec import lookup
from eval import scoring
from eval.bench import BENCHMARKS
from plain_diffusion.starting import started


def main(config: dict[str, Any]) -> int:
    programs = {
        "score": _score,
        "report": _report,
        "statistics": _statistics,
        "compare": _compare,
        "sampler_orders": _sampler_orders,
        **{f"bench_{name}": _benchmark for name in BENCHMARKS},
    }
    trust(config)
    return lookup("program", config["program"], programs)(config)


def after_all(configs: Sequence[dict[str, Any]]) -> None:
    """The leading process makes the report of every folder that got results."""
    if not _leads():
        return
    if folders := dict.fromkeys(folder for config in configs if (folder := config.get("report"))):
        from eval.report import result_files  # imports matplotlib

        for folder in filter(result_files, folders):
            _report({"out": folder})


def _leads() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _score(config: dict[str, Any]) -> int:
    if config.get("report") and _leads():
        import_module("eval.report")  # a missing package is noticed before the work
    try:
        written = scoring.run(config, lambda name, figure: print(f"{name:18s} {figure}", flush=True))
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command continues from there") from None
    if written is not None:
        for note in written.result.notes:
            print(f"note: {note}")
        print(f"result{'' if written.new else ', which existed already'}: {written.path.resolve()}")
    return 0


def _report(config: dict[str, Any]) -> int:
    from eval.report import make_report

    page = make_report(config["out"])
    print(f"{(page.parent / 'results.md').read_text()}report: {page.resolve()}")
    return 0


def _statistics(config: dict[str, Any]) -> int:
    from eval import reference

    out = reference.run(config)
    if out is not None:
        print(f"statistics: {out.resolve()}")
    return 0


def _compare(config: dict[str, Any]) -> int:
    from eval import compare

    met = compare.run(config)
    print(
        f"{'every target met' if met else 'targets missed, see the report'}\nreport: "
        f"{(Path(config['out']) / 'report.html').resolve()}"
    )
    return 0


def _sampler_orders(config: dict[str, Any]) -> int:
    from eval.bench import orders

    print(orders.table(orders.run(config)) + f"picture: {(Path(config['out']) / 'orders.png').resolve()}")
    return 0


def _benchmark(config: dict[str, Any]) -> int:
    from eval.bench import harness

    print(harness.table(harness.run(config)), end="")
    return 0


if __name__ == "__main__":
    started()
    command_line("eval", main, after_all)
