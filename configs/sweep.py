"""Many runs of one program, in Hydra's grammar: a setting with several values, or `hydra.sweeper.params` of
an experiment's file.

python -m eval -m experiment=... samples.sampler=ddim,euler samples.steps=5,10
'samples.guidance=range(1,3,0.5)'
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

STOPPED = 130  # the status of a run that Ctrl-C has ended, and that has said so


def combinations(overrides: Sequence[str], params: Mapping[str, str]) -> list[list[str]]:
    """The overrides of every run: all combinations of settings with several values, where the last setting
    varies fastest.

    params  settings of the experiment's file; overrides of the same name replace them
    """
    given = _parsed(overrides)
    asked = {override.get_key_element() for override in given}
    axes = [
        _values(override)
        for override in (
            *_parsed([f"{key}={value}" for key, value in params.items() if key not in asked]),
            *given,
        )
    ]
    return [list(run) for run in product(*axes)]


def shown(override: str) -> str:
    """An override as people would write it, without the quotes that Hydra's grammar needs."""
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
        raise ValueError(
            f"{override.input_line} names no values that could be listed: give {key}=1,2,3 or "
            f"{key}=range(1,4)"
        )
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def run_all(
    runs: Sequence[tuple[str, dict[str, Any]]],
    main: Callable[[dict[str, Any]], int],
    after: Callable[[Sequence[dict[str, Any]]], None],
) -> int:
    """Run one after the other. An error is printed at once, the other runs go on, and the status is 1.

    runs   the settings that distinguish each run, and its configuration
    after  called with all configurations at the end, also after errors; its own errors are printed like those
           of a run

    Ctrl-C ends the sweep: `after` is called for what is there, then KeyboardInterrupt is raised with a
    message that says how to go on. ValueError under torchrun: processes that failed at different runs could
    no longer speak to each other.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("torchrun shares one run among processes: start one for each run of a sweep")
    configs = [config for _, config in runs]
    try:
        failed = _each(runs, main)
    except KeyboardInterrupt:
        _status("after all runs", lambda: after(configs))
        raise KeyboardInterrupt("called again, runs that are done are not repeated") from None
    for what in failed:
        print(f"failed: {what}", file=sys.stderr, flush=True)
    status = _status("after all runs", lambda: after(configs))
    if failed:
        print(
            f"error: {len(failed)} of {len(runs)} runs failed; called again, those that are done are not "
            "repeated",
            file=sys.stderr,
        )
    return 1 if failed else status


def _each(runs: Sequence[tuple[str, dict[str, Any]]], main: Callable[[dict[str, Any]], int]) -> list[str]:
    """Run one after the other, and name those that failed."""
    failed = []
    for number, (what, config) in enumerate(runs, 1):
        print(f"[{number}/{len(runs)}] {what}", flush=True)
        start = time.perf_counter()
        status = _status(what, partial(main, config))
        if status == STOPPED:
            raise KeyboardInterrupt
        if status:
            failed.append(what)
        print(
            f"[{number}/{len(runs)}] {'failed' if status else 'done'} after "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return failed


def _status(what: str, job: Callable[[], int | None]) -> int:
    """The status of a job: 1 if it raises, which is printed at once."""
    try:
        return job() or 0
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            traceback.print_exc()
        expected = isinstance(error, (ValueError, OSError, FloatingPointError))
        print(
            f"error: {what}: {'' if expected else f'{type(error).__name__}: '}{error}",
            file=sys.stderr,
            flush=True,
        )
        return 1
