"""python -m eval samples=FOLDER, or python -m eval experiment=NAME: see configs/eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from configs import command_line
from diffusion.spec import lookup
from eval import folder
from eval.bench import frechet, loading, networks, orders, samplers
from eval.digits import quickstart


def main(config: dict[str, Any]) -> int:
    programs = {
        "score": _score,
        "quickstart": _quickstart,
        "sampler_orders": _sampler_orders,
        "bench_samplers": _bench_samplers,
        "bench_networks": _bench_networks,
        "bench_loading": _bench_loading,
        "bench_frechet": _bench_frechet,
    }
    return lookup("program", config["program"], programs)(config)


def _score(config: dict[str, Any]) -> int:
    for name, value in folder.run(config).items():
        print(f"{name:14s} {value:.4g}")
    return 0


def _quickstart(config: dict[str, Any]) -> int:
    met = quickstart.run(config)
    print(f"{'every target met' if met else 'targets missed, see the report'}\nreport: {(Path(config['out']) / 'report.html').resolve()}")
    return 0


def _sampler_orders(config: dict[str, Any]) -> int:
    print(orders.table(orders.run(config)) + f"picture: {(Path(config['out']) / 'orders.png').resolve()}")
    return 0


def _bench_samplers(config: dict[str, Any]) -> int:
    print(samplers.table(samplers.run(config)), end="")
    return 0


def _bench_networks(config: dict[str, Any]) -> int:
    print(networks.table(networks.run(config)), end="")
    return 0


def _bench_loading(config: dict[str, Any]) -> int:
    print(loading.table(loading.run(config)), end="")
    return 0


def _bench_frechet(config: dict[str, Any]) -> int:
    print(frechet.table(frechet.run(config)), end="")
    return 0


if __name__ == "__main__":
    command_line("eval", main)
