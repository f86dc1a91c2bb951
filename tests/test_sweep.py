"""Sweeps: Hydra's grammar for many runs, of which one that fails is said at once and holds up none of the others."""

from __future__ import annotations

from typing import Any

import pytest

from configs import compose, compose_sweep
from configs.sweep import combinations, run_all


def test_every_combination_is_a_run_and_the_last_setting_changes_first() -> None:
    """Lists and ranges in Hydra's grammar; what has one value stays, and a list in brackets is one value."""
    runs = combinations(["a=1,2", "b=[1,2]", "c=range(0,3)"], {})
    assert runs == [[f"a={a}", "b=[1,2]", f"c={c}"] for a in (1, 2) for c in range(3)]
    assert combinations(["a=1"], {}) == [["a=1"]]


def test_the_command_line_goes_before_the_file() -> None:
    """A setting of hydra.sweeper.params that is given is not swept; others are."""
    assert combinations(["a=5"], {"a": "1,2", "b": "x,y"}) == [["b=x", "a=5"], ["b=y", "a=5"]]


def test_an_interval_is_no_list() -> None:
    """It names what would do."""
    with pytest.raises(ValueError, match=r"a=interval\(1,2\) names no values that could be listed: give a=1,2,3 or a=range\(1,4\)"):
        combinations(["a=interval(1,2)"], {})


def test_all_configurations_are_composed_before_the_first_run() -> None:
    """They are what compose gives Python, one by one; a typo names the nearest setting, whichever run it is in."""
    runs = compose_sweep("eval", ["experiment=digits", "samples=a,b", "n=1,2"])
    assert [what for what, _ in runs] == ["samples=a n=1", "samples=a n=2", "samples=b n=1", "samples=b n=2"]
    assert runs[2][1] == compose("eval", ["experiment=digits", "samples=b", "n=1"])
    with pytest.raises(ValueError, match="no setting named 'smaples'; did you mean 'samples'"):
        compose_sweep("eval", ["experiment=digits", "samples=a,b", "smaples=c"])


def test_without_the_flag_only_a_file_makes_a_sweep() -> None:
    """Several values without -m stay an error of Hydra's, which says what to do."""
    assert compose_sweep("eval", ["experiment=digits", "samples=a"], multirun=False) == []
    with pytest.raises(ValueError, match="multirun"):
        compose("eval", ["experiment=digits", "samples=a,b"])


@pytest.mark.parametrize("failure", [ValueError("no such sampler"), RuntimeError("out of memory")])
def test_a_failing_run_is_said_at_once_and_the_rest_go_on(failure: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    """Its error comes before the next run begins, the status is not zero, and what comes after the sweep sees all configurations."""
    said: list[str] = []
    after: list[Any] = []

    def main(config: dict[str, Any]) -> int:
        said.append(capsys.readouterr().err)
        if config["i"] == 1:
            raise failure
        return 0

    status = run_all([(f"i={i}", {"i": i}) for i in range(3)], main, after.extend)
    assert status == 1
    assert said[:2] == ["", ""]
    assert said[2].startswith("error: i=1: ")
    assert str(failure) in said[2]
    assert [config["i"] for config in after] == [0, 1, 2]
    assert "1 of 3 runs failed" in capsys.readouterr().err


def test_a_sweep_that_succeeds_has_status_zero(capsys: pytest.CaptureFixture[str]) -> None:
    """And says how far it is."""
    assert run_all([("a", {}), ("b", {})], lambda config: 0, lambda configs: None) == 0
    assert "[2/2] b" in capsys.readouterr().out


def test_processes_of_torchrun_run_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share one run; it says what to do."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun shares one run among processes: start one for each run of a sweep"):
        run_all([("a", {}), ("b", {})], lambda config: 0, lambda configs: None)
