"""Many runs of one program: settings with several values, or `hydra.sweeper.params` in an experiment.

plain-diffusion eval -m samples.sampler=ddim,euler samples.steps=5,10 'samples.guidance=range(1,3,0.5)'
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

STOPPED = 130  # the status of a run that Ctrl-C has ended


def combinations(overrides: Sequence[str], params: Mapping[str, str]) -> list[list[str]]:
    """The overrides of every run: all combinations of several values; the last setting varies fastest.

    params  settings of the experiment's file; overrides of the same name replace them
    """
    own = _parsed(overrides)
    names = {override.get_key_element() for override in own}
    added = _parsed([f"{key}={value}" for key, value in params.items() if key not in names])
    return [list(run) for run in product(*map(_values, [*added, *own]))]


def readable(override: str) -> str:
    """An override without the quotes of Hydra's grammar."""
    value = _parsed([override])[0].value()
    return f"{override.partition('=')[0]}={value}" if isinstance(value, str) else override


def _parsed(overrides: Sequence[str]) -> list[Override]:
    return list(OverridesParser.create().parse_overrides(list(overrides)))


def _values(override: Override) -> list[str]:
    """One override for each value."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = override.get_key_element()
    if not override.is_discrete_sweep():
        advice = f"give {key}=1,2,3 or {key}=range(1,4)"
        raise ValueError(f"{override.input_line} does not list its values: {advice}")
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def run_all(
    runs: Sequence[tuple[str, dict[str, Any]]],
    main: Callable[[dict[str, Any]], int],
    after: Callable[[Sequence[dict[str, Any]]], None],
) -> int:
    """Runs one after the other. An error is printed at once, the other runs continue, and the status is 1.

    runs   what is special about each run, and its configuration
    after  called with all configurations at the end, also after errors, which are printed as those of a run
           are

    Ctrl-C ends the sweep: `after` is called for the finished runs, then KeyboardInterrupt says how to
    continue. ValueError under torchrun: processes that fail in different runs could not communicate any more.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("torchrun shares one run among processes: start it once for each run of a sweep")
    configs = [config for _, config in runs]
    try:
        failed = _run_each(runs, main)
    except KeyboardInterrupt:
        _status("after all runs", lambda: after(configs))
        raise KeyboardInterrupt("called again, finished runs are not repeated") from None
    for name in failed:
        print(f"failed: {name}", file=sys.stderr, flush=True)
    status = _status("after all runs", lambda: after(configs))
    if failed:
        count = f"{len(failed)} of {len(runs)} runs failed"
        print(f"error: {count}; called again, finished runs are not repeated", file=sys.stderr)
    return 1 if failed else status


def _run_each(runs: Sequence[tuple[str, dict[str, Any]]], main: Callable[[dict[str, Any]], int]) -> list[str]:
    """Runs one after the other; returns those that failed."""
    failed = []
    for number, (name, config) in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {name}", flush=True)
        start = time.perf_counter()
        status = _status(name, partial(main, config))
        if status == STOPPED:
            raise KeyboardInterrupt
        if status:
            failed.append(name)
        result = f"{'failed' if status else 'done'} after {time.perf_counter() - start:.0f} s"
        print(f"[{number}/{len(runs)}] {result}", flush=True)
    return failed


def _status(name: str, job: Callable[[], int | None]) -> int:
    """The status of a job: 1 if it raises; the error is printed at once."""
    try:
        return job() or 0
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            traceback.print_exc()
        expected = isinstance(error, (ValueError, OSError, FloatingPointError))
        kind = "" if expected else f"{type(error).__name__}: "
        print(f"error: {name}: {kind}{error}", file=sys.stderr, flush=True)
        return 1
