"""Sweeps: Hydra's grammar for many runs, of which one that fails is said at once and holds up none of the others."""

from __future__ import annotations

import signal
import sys
from typing import Any

import pytest

from configs import TEXTS, command_line, compose, compose_sweep
from configs.sweep import combinations, run_all
from eval import __main__ as program
from eval import scoring


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


# settings of `python -m eval` that are paths and names, as the shell hands them over, and what they are
PLAIN = {
    "samples": ["shard-{000..009}.tar", "{000..009}.tar", "ünï/ö", "run=3/x", "C#1", "dir [1]", "1234", "1e3", "true", "a:b", "it's"],
    "reference": ["[1]", "50%", "~/x", "a (2)", "a;b", "", "1_000"],
    "training": ["x{1}y", "a\\b", "${n}", "\\${n}", "a\\\\${n}'"],
    "prompts": ["p (1).txt", "a, b.txt", "{a: 1}"],
    "name": ["FLUX.1 [dev]", "SD 3.5, 28 steps", "1e3", "None", 'it\'s "it"', "'a' or 'b'"],
    "extractors.inception": ["runs/a=b.pth", "random"],
    "extractors.clip.weights": ["007", "a,b"],
}


def at(config: Any, key: str) -> Any:
    """What stands in the configuration under a dotted key."""
    for name in key.split("."):
        config = config[name]
    return config


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in PLAIN.items() for value in values])
def test_paths_and_names_are_text_as_they_stand(key: str, value: str) -> None:
    """Whatever Hydra's grammar or OmegaConf would make of them, alone and in a sweep; what stands beside them stays."""
    given = {"samples": "x", key: value}
    overrides = [f"{name}={text}" for name, text in given.items()]
    found = compose("eval", overrides)
    assert at(found, key) == value
    assert found["extractors"]["clip"]["name"] == "ViT-L-14"
    swept = [config for _, config in compose_sweep("eval", [*overrides, "n=1,2"])]
    assert [(at(config, key), config["n"]) for config in swept] == [(value, 1), (value, 2)]


def test_quotes_of_their_own_and_null_are_not_part_of_a_text() -> None:
    """A path with a comma is given in quotes; null is nothing, and 'null' a name."""
    found = compose("eval", ["samples='a, b'", 'reference="c,[d]"', "name='null'", "training=null", "cache='x y'"])
    assert [found[key] for key in ("samples", "reference", "name", "training", "cache")] == ["a, b", "c,[d]", "null", None, "x y"]


def test_mappings_and_several_values_are_hydras() -> None:
    """Braces around all of it are a mapping, commas part the values of a sweep, and each of these is text again."""
    drawn = compose("eval", ["samples={run: x, steps: 10}", "reference={name: digits}"])
    assert (drawn["samples"], drawn["reference"]) == ({"run": "x", "steps": 10}, {"name": "digits"})
    runs = compose_sweep("eval", ["samples=1000,0010,'a, b',c", "name=d, e"])
    assert [config["samples"] for _, config in runs] == ["1000", "0010", "a, b", "c"]
    assert [what for what, _ in runs][:2] == ["samples=1000", "samples=0010"]
    assert {config["name"] for _, config in runs} == {"d, e"}


def test_every_text_is_a_setting_and_others_rest_on_it() -> None:
    """Each stands in the experiment; an experiment without it says so; ${out} within a file is what was given."""
    for key in TEXTS["eval"]:
        at(compose("eval", ["samples=x"]), key)
    with pytest.raises(ValueError, match="no setting named 'samples'"):
        compose("eval", ["experiment=quickstart", "samples=x"])
    assert compose("eval", ["experiment=quickstart", "out=a [1]"])["unet"]["run"] == "a [1]/unet"


def test_a_text_that_is_given_twice_is_refused() -> None:
    """It is what a shell makes of an unquoted {000..001}; the line says to quote it, in a sweep too."""
    twice = ["samples=shard-000.tar", "samples=shard-001.tar"]
    with pytest.raises(ValueError, match=r"samples is given 2 times: give it once, and a pattern in quotes.* samples='shard-\{"):
        compose("eval", twice)
    with pytest.raises(ValueError, match="samples is given 2 times"):
        compose_sweep("eval", [*twice, "n=1,2"])
    with pytest.raises(ValueError, match="prompt is given 2 times"):
        compose("samplers", ["prompt=a", "prompt=b"])


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


def test_failures_are_listed_before_what_comes_after(capsys: pytest.CaptureFixture[str]) -> None:
    """Its own error is said like that of a run, and makes the status 1, whether or not a run failed."""

    def after(configs: Any) -> None:
        raise OSError("no space left for the report")

    assert run_all([("a", {"status": 0}), ("b", {"status": 1})], lambda config: int(config["status"]), after) == 1
    assert capsys.readouterr().err.splitlines() == [
        "failed: b",
        "error: after all runs: no space left for the report",
        "error: 1 of 2 runs failed; called again, those that are done are not repeated",
    ]
    assert run_all([("a", {})], lambda config: 0, after) == 1
    assert capsys.readouterr().err == "error: after all runs: no space left for the report\n"


@pytest.mark.parametrize("fails", [False, True])
def test_an_interrupted_sweep_still_sums_up(fails: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C begins no other run; what comes after is called for what is there, and the interruption goes on whatever that does."""
    begun: list[int] = []
    seen: list[Any] = []

    def main(config: dict[str, Any]) -> int:
        begun.append(config["i"])
        if config["i"] == 1:
            signal.raise_signal(signal.SIGINT)
        return 0

    def after(configs: Any) -> None:
        seen.extend(configs)
        if fails:
            raise ValueError("no report")

    with pytest.raises(KeyboardInterrupt):
        run_all([(f"i={i}", {"i": i}) for i in range(3)], main, after)
    assert begun == [0, 1]
    assert [config["i"] for config in seen] == [0, 1, 2]
    said = ["error: after all runs: no report"] if fails else []
    assert capsys.readouterr().err.splitlines() == [*said, "stopped: called again, runs that are done are not repeated"]


@pytest.mark.parametrize("rank", [0, 1])
def test_interrupted_scoring_says_that_it_can_go_on(rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C ends `python -m eval` with status 130 and one line, once among the processes of torchrun."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(sys, "argv", ["eval", "samples=x"])
    monkeypatch.setattr(scoring, "run", lambda config, found: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        command_line("eval", program.main, program.after_all)
    assert ended.value.code == 130
    assert capsys.readouterr().err == ("" if rank else "stopped: called again it goes on from there\n")


def test_a_sweep_that_succeeds_has_status_zero(capsys: pytest.CaptureFixture[str]) -> None:
    """And says how far it is."""
    assert run_all([("a", {}), ("b", {})], lambda config: 0, lambda configs: None) == 0
    assert "[2/2] b" in capsys.readouterr().out


def test_processes_of_torchrun_run_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share one run; it says what to do."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun shares one run among processes: start one for each run of a sweep"):
        run_all([("a", {}), ("b", {})], lambda config: 0, lambda configs: None)
