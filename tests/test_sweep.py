"""Sweeps: Hydra's grammar for many runs, of which one that fails is said at once and holds up none of the
others."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

import models
import plain_diffusion.starting
from configs import command_line, compose, compose_sweep
from configs.sweep import combinations, run_all
from configs.texts import texts
from eval import __main__ as program
from eval import scoring
from eval.settings import ScoreParams
from models.files.text import read_json_lines
from samplers.run import SampleParams
from samplers.text_to_image import TextToImageParams
from train import __main__ as trainer
from train.data import DATASETS
from train.run import OBJECTIVES
from train.run import run as train_run
from train.settings import RunSettings
from train.world import PeerError


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
    with pytest.raises(
        ValueError,
        match=r"a=interval\(1,2\) does not list its values: give a=1,2,3 or a=range\(1,4\)",
    ):
        combinations(["a=interval(1,2)"], {})


def test_all_configurations_are_composed_before_the_first_run() -> None:
    """They are what compose gives Python, one by one; a typo names the nearest setting, whichever run it is
    in."""
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


# paths and prompts as people have them
AWKWARD = [
    "runs/lr=1e-4", "runs/try (2)", "runs/李明", "runs/50%", "/data/épreuves, 2024", "[sd] v2.safetensors",
    "[a], b", "{a} b", "{000..9}",
    "~/x", "$HOME/x", "${x}", "a b", "it's", 'say "it"', "a@b", "a:b", "!x", "C:\\data\\", "=",
    "3", "1e3", "true", "a'b, c'd", "#1",
    "a;b|c", "-m", "1_000", "None", "x{1}y", "a\\b", "\\${n}", "a\\\\${n}'", "{a} {b}",
]  # fmt: skip


def at(config: Any, key: str) -> Any:
    """What stands in the configuration under a dotted key."""
    for name in key.split("."):
        config = config[name]
    return config


# program, the overrides before, and settings that are given at once
TEXT_SETTINGS = [
    ("train", ["experiment=finetune"], ["run", "weights", "data", "latents.folder"]),
    ("train", ["experiment=digits_consistency"], ["model.from", "objective.teacher", "+data.folder"]),
    ("samplers", [], ["run", "weights", "from", "refiner", "image", "mask", "out", "prompt", "negative"]),
    (
        "eval",
        ["samples=x"],
        ["out", "report", "cache", "name", "extractors.dinov2.weights", "+extractors.digits.folder"],
    ),
]


@pytest.mark.parametrize(("program", "before", "keys"), TEXT_SETTINGS)
def test_every_path_and_prompt_is_taken_as_it_stands(
    program: str, before: list[str], keys: list[str]
) -> None:
    """Alone and in a sweep, whatever Hydra's grammar or OmegaConf would make of it, and whichever program
    asks."""
    for first in range(0, len(AWKWARD), len(keys)):
        values = dict(zip(keys, AWKWARD[first:] + AWKWARD, strict=False))
        found = compose(program, [*before, *(f"{key}={value}" for key, value in values.items())])
        assert {key: at(found, key.lstrip("+")) for key in keys} == values
    other = {"train": "train.seed", "samplers": "seed", "eval": "metric"}[program]
    swept = ["fid", "kid"] if program == "eval" else [0, 1]
    axis = f"{other}={swept[0]},{swept[1]}"
    runs = [
        config
        for _, config in compose_sweep(program, [*before, *(f"{key}=[a], b=c (1)" for key in keys), axis])
    ]
    assert [at(config, other) for config in runs] == swept
    for config in runs:  # the folder that is written to has one beneath it for each run
        assert all(str(at(config, key.lstrip("+"))).startswith("[a], b=c (1)") for key in keys)


@pytest.mark.parametrize(
    ("program", "overrides", "key"),
    [
        ("samplers", ["weights=", "prompt="], "weights"),
        ("samplers", ["weights=[a,'']"], "weights"),
        ("train", ["experiment=finetune", "weights=a", "data="], "data"),
        ("train", ["experiment=digits_unet", "data={name: folder, folder: '', size: 8}"], "data.folder"),
        ("train", ["experiment=digits_consistency", 'model.from=""'], "model.from"),
        ("eval", ["samples=x", "extractors.clip.weights="], "extractors.clip.weights"),
        ("eval", ["samples=x", "out="], "out"),
    ],
)
def test_an_empty_path_is_refused(program: str, overrides: list[str], key: str) -> None:
    """As weights=$UNSET leaves it: it would be the working folder; in Python too. An empty prompt is one."""
    with pytest.raises(ValueError, match=r"^a path of weights is empty: give a file or folder$"):
        models.load("")
    with pytest.raises(ValueError, match=f"^{key} is empty: give a path, or leave the setting out$"):
        compose(program, overrides)
    assert compose("samplers", ["prompt=", "negative="])["prompt"] == ""


@pytest.mark.parametrize(
    "value", ["a=b (1)", "épreuves, 2024", "it's", "shard-{000..009}.tar", "[a] b", "a: b", "50%", "${x}"]
)
def test_paths_within_a_mapping_are_taken_as_they_stand(value: str) -> None:
    """Of the data set to train on, which replaces the experiment's, and of a drawn side of an evaluation."""
    config = compose("train", ["experiment=digits_unet", f"data={{name: folder, folder: {value}, size: 8}}"])
    assert config["data"] == {"name": "folder", "folder": value, "size": 8}
    drawn = compose("eval", [f"samples={{grid: {{spacing: karras, t_end: 1}}, steps: 10, run: {value}}}"])
    assert drawn["samples"] == {"run": value, "grid": {"spacing": "karras", "t_end": 1}, "steps": 10}


def test_a_file_of_that_name_is_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list is one where brackets close at the end, and each member a path; a mapping likewise; unless such
    a file is there."""
    assert compose("samplers", ["weights=[a (1).pt,'b, c.pt',d=e.pt]"])["weights"] == [
        "a (1).pt",
        "b, c.pt",
        "d=e.pt",
    ]
    assert compose("train", ["experiment=digits_consistency", "model.from=[a (1),b=c]"])["model"]["from"] == [
        "a (1)",
        "b=c",
    ]
    assert compose("eval", ["samples={name: digits, split: all}"])["samples"] == {
        "name": "digits",
        "split": "all",
    }
    monkeypatch.chdir(tmp_path)
    for name in ("[a,b]", "{name: digits}", "a,b", "choice(a,b)"):
        Path(name).touch()
    assert compose("samplers", ["weights=[a,b]"])["weights"] == "[a,b]"
    for name in ("{name: digits}", "a,b", "choice(a,b)"):
        assert compose("eval", [f"samples={name}"])["samples"] == name


def test_a_setting_is_text_in_every_program() -> None:
    """What takes a path or a text by its annotation is quoted; what takes a name of a table is Hydra's, so
    that it can be swept."""
    names = {
        "sampler",
        "device",
        "dtype",
        "family",
        "prediction",
        "variant",
        "memory",
        "metric",
        "protocol",
        "features",
        "neighbours",
        "classifier",
    }

    def missed(program: str, kinds: dict[str, Any]) -> set[str]:
        return {name for name, kind in kinds.items() if takes_text(kind) and name not in texts(program)}

    for name, params in (
        ("samplers", SampleParams),
        ("samplers", TextToImageParams),
        ("eval", ScoreParams),
        ("train", RunSettings),
    ):
        assert missed(name, get_type_hints(params)) <= names
    for function in (*DATASETS.values(), *OBJECTIVES.values()):
        assert missed("train", get_type_hints(init_of(function))) == set()


def init_of(function: Any) -> Any:
    """What takes the parameters of a class or a function."""
    return vars(function)["__init__"] if isinstance(function, type) else function


def takes_text(kind: Any) -> bool:
    """Whether an annotation takes any text."""
    return kind in (str, Path) or (
        get_origin(kind) in (UnionType, Union, tuple) and any(map(takes_text, get_args(kind)))
    )


def test_labels_are_numbers_or_names() -> None:
    """Numbers stay numbers, names are text, quotes make a name of a number, and commas sweep."""
    assert compose("samplers", ["labels=[3,cat's,African hunting dog (2),'7']"])["labels"] == [
        3,
        "cat's",
        "African hunting dog (2)",
        "7",
    ]
    assert compose("samplers", ["labels=3"])["labels"] == 3
    assert [config["labels"] for _, config in compose_sweep("samplers", ["labels=[1,2],cat,4"])] == [
        [1, 2],
        "cat",
        4,
    ]


def test_runs_of_a_sweep_of_trainings_have_a_folder_each() -> None:
    """Named for what is special about each, beneath the one they were to share; and they go on where they
    were."""
    runs = compose_sweep(
        "train",
        ["experiment=digits_unet", "train.seed=0,1", "model.schedule.name=cosine,linear", "run=runs/a=b"],
    )
    assert [config["run"] for _, config in runs] == [
        f"runs/a=b/train.seed={seed}-model.schedule.name={name}"
        for seed in (0, 1)
        for name in ("cosine", "linear")
    ]
    assert all(config["resume"] for _, config in runs)
    assert not compose_sweep("train", ["experiment=digits_unet", "train.seed=0,1", "resume=false"])[0][1][
        "resume"
    ]
    assert (
        compose_sweep("train", ["experiment=digits_unet", "train.seed=0"])[0][1]["run"] == "runs/digits_unet"
    )


def test_folders_that_a_sweep_tells_apart_stay() -> None:
    """By ${...} of a setting, or by the experiments' own; each value makes another name, whatever signs are
    in it."""
    runs = compose_sweep("train", ["experiment=digits_unet", "train.seed=0,1", "run=runs/seed-${train.seed}"])
    assert [config["run"] for _, config in runs] == ["runs/seed-0", "runs/seed-1"]
    runs = compose_sweep("train", ["experiment=digits_unet,digits_dit"])
    assert [config["run"] for _, config in runs] == ["runs/digits_unet", "runs/digits_dit"]
    runs = compose_sweep("train", ["experiment=digits_unet", "+data.folder=choice(/a/b,/a-b,../x)"])
    folders = [Path(config["run"]) for _, config in runs]
    assert len(set(folders)) == 3
    assert {folder.parent for folder in folders} == {Path("runs/digits_unet")}
    assert [config["data"]["folder"] for _, config in runs] == ["/a/b", "/a-b", "../x"]


def test_samples_of_a_sweep_have_a_folder_each() -> None:
    """Where one is given for all; without one, each is named as the program names it."""
    runs = compose_sweep("samplers", ["run=x", "out=y", "+options.eta=0,1"])
    assert [config["out"] for _, config in runs] == ["y/options.eta=0", "y/options.eta=1"]
    assert [config["out"] for _, config in compose_sweep("samplers", ["run=x", "seed=0,9"])] == [None, None]


def test_results_of_a_sweep_do_not_replace_each_other() -> None:
    """Runs that share a file are refused before the first one, except where it gathers their metrics."""
    score = ["reference=c", "out=x.json"]
    networks = ["experiment=bench_networks", "network=sd15,sdxl", "batch=1,2"]
    for shared, right in (
        (["samples=a,b", *score], "x-${samples}.json"),
        (networks, "runs/bench_networks-${batch}-${network}"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"by what differs, out='{right}'")):
            compose_sweep("eval", shared)
        runs = compose_sweep(
            "eval", [*(override for override in shared if not override.startswith("out=")), f"out={right}"]
        )
        assert len({config["out"] for _, config in runs}) == len(runs)
    for apart in (
        ["metric=[fid],[kid]", "samples=a", *score],
        ["samples=a,b", "reference=c", "out=scores/${samples}.json"],
    ):
        assert len(compose_sweep("eval", apart)) == 2


def test_quotes_of_their_own_and_null_are_not_part_of_a_text() -> None:
    """A path with a comma is given in quotes; null is nothing, and 'null' a name."""
    found = compose(
        "eval", ["samples='a, b'", 'reference="c,[d]"', "name='null'", "training=null", "cache='x y'"]
    )
    assert compose("eval", ["samples=${n}", "reference=[1]", "training={1}"])["samples"] == "${n}"
    assert [found[key] for key in ("samples", "reference", "name", "training", "cache")] == [
        "a, b",
        "c,[d]",
        "null",
        None,
        "x y",
    ]


def test_mappings_and_several_values_are_hydras() -> None:
    """Braces around all of it are a mapping, commas part the values of a sweep, and each of these is text
    again."""
    drawn = compose("eval", ["samples={run: x, steps: 10}", "reference={name: digits}"])
    assert (drawn["samples"], drawn["reference"]) == ({"run": "x", "steps": 10}, {"name": "digits"})
    runs = compose_sweep("eval", ["samples=1000,0010,'a, b',c", "name=d, e"])
    assert [config["samples"] for _, config in runs] == ["1000", "0010", "a, b", "c"]
    assert [what for what, _ in runs][:2] == ["samples=1000", "samples=0010"]
    assert {config["name"] for _, config in runs} == {"d, e"}


def test_other_settings_rest_on_a_text() -> None:
    """An experiment without it says so; ${out} within a file is what was given."""
    with pytest.raises(ValueError, match="no setting named 'samples'"):
        compose("eval", ["experiment=quickstart", "samples=x"])
    assert compose("eval", ["experiment=quickstart", "out=a [1]"])["models"]["unet"]["run"] == "a [1]/unet"


def test_a_text_that_is_given_twice_is_refused() -> None:
    """It is what a shell makes of an unquoted {000..001}; the line says to quote it, in a sweep too."""
    twice = ["samples=shard-000.tar", "samples=shard-001.tar"]
    with pytest.raises(
        ValueError,
        match=r"samples is given 2 times: give it once, and quote a pattern.* samples=.shard-\{",
    ):
        compose("eval", twice)
    with pytest.raises(ValueError, match="samples is given 2 times"):
        compose_sweep("eval", [*twice, "n=1,2"])
    with pytest.raises(ValueError, match="prompt is given 2 times"):
        compose("samplers", ["prompt=a", "prompt=b"])


@pytest.mark.parametrize("failure", [ValueError("no such sampler"), RuntimeError("out of memory")])
def test_a_failing_run_is_said_at_once_and_the_rest_go_on(
    failure: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its error comes before the next run begins, the status is not zero, and what comes after the sweep sees
    all configurations."""
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

    assert (
        run_all([("a", {"status": 0}), ("b", {"status": 1})], lambda config: int(config["status"]), after)
        == 1
    )
    assert capsys.readouterr().err.splitlines() == [
        "failed: b",
        "error: after all runs: no space left for the report",
        "error: 1 of 2 runs failed; called again, finished runs are not repeated",
    ]
    assert run_all([("a", {})], lambda config: 0, after) == 1
    assert capsys.readouterr().err == "error: after all runs: no space left for the report\n"


@pytest.mark.parametrize(("fails", "saves"), [(False, False), (True, False), (False, True)])
def test_an_interrupted_sweep_still_sums_up(
    fails: bool, saves: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C begins no other run; what comes after is called for what is there, and the interruption goes on
    whatever that does.

    Also where a run has taken it, as training does that saves, and says so by its status.
    """
    begun: list[int] = []
    seen: list[Any] = []

    def main(config: dict[str, Any]) -> int:
        begun.append(config["i"])
        if config["i"] == 1:
            if saves:
                return 130
            signal.raise_signal(signal.SIGINT)
        return 0

    def after(configs: Any) -> None:
        seen.extend(configs)
        if fails:
            raise ValueError("no report")

    with pytest.raises(KeyboardInterrupt, match="finished runs are not repeated"):
        run_all([(f"i={i}", {"i": i}) for i in range(3)], main, after)
    assert begun == [0, 1]
    assert [config["i"] for config in seen] == [0, 1, 2]
    said = ["error: after all runs: no report"] if fails else []
    assert capsys.readouterr().err.splitlines() == said


@pytest.mark.parametrize("rank", [0, 1])
def test_interrupted_scoring_says_that_it_can_go_on(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C ends `python -m eval` with status 130 and one line, once among the processes of torchrun."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(sys, "argv", ["eval", "samples=x"])
    monkeypatch.setattr(scoring, "run", lambda config, found: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as ended:
        command_line("eval", program.main, program.after_all)
    assert ended.value.code == 130
    assert capsys.readouterr().err == ("" if rank else "stopped: the same command continues from there\n")


@pytest.mark.parametrize(
    ("name", "main", "module"), [("eval", program.main, scoring), ("train", trainer.main, trainer)]
)
def test_a_process_that_ends_because_of_another_says_which(
    name: str, main: Callable[[dict[str, Any]], int], module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 1 and a line, for the output of every process may have a file of its own; and no report of what
    was not done."""

    def fail(*_: Any) -> None:
        raise PeerError("process 1 has failed: no such picture")

    monkeypatch.setattr(
        sys, "argv", [name, *({"eval": ["samples=x"], "train": ["experiment=digits_unet"]}[name])]
    )
    monkeypatch.setattr(module, "run", fail)
    with pytest.raises(SystemExit) as ended:
        command_line(name, main, lambda configs: pytest.fail("a report"))
    assert (
        ended.value.code == "error: process 1 has failed: no such picture"
    )  # which Python prints, and ends with status 1


def test_a_sweep_that_succeeds_has_status_zero(capsys: pytest.CaptureFixture[str]) -> None:
    """And says how far it is."""
    assert run_all([("a", {}), ("b", {})], lambda config: 0, lambda configs: None) == 0
    assert "[2/2] b" in capsys.readouterr().out


def test_processes_of_torchrun_run_no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """They share one run; it says what to do."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ValueError, match="torchrun shares one run among processes: start it once for each run of a sweep"
    ):
        run_all([("a", {}), ("b", {})], lambda config: 0, lambda configs: None)


def test_a_sweep_of_trainings_again_trains_nothing_again(tmp_path: Path) -> None:
    """Runs that are done are found done, each in its own folder, and what they learned differs by their
    seeds."""
    tiny = ["channels=8", "channel_mult=[1]", "attention=[0]", "middle_attention=0", "head_dim=8", "groups=4"]
    settings = [
        "experiment=digits_unet",
        *(f"model.network.{setting}" for setting in tiny),
        "train.steps=2",
        "train.warmup=1",
    ]
    settings += ["wandb=false", "device=cpu", "progress=false", f"run={tmp_path}", "train.seed=0,1"]
    for _ in range(2):
        assert (
            run_all(
                compose_sweep("train", settings),
                lambda config: 0 if train_run(config) else 1,
                lambda configs: None,
            )
            == 0
        )
    places = [tmp_path / f"train.seed={seed}" for seed in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [place.name for place in places]
    assert models.load(places[0]).fingerprint != models.load(places[1]).fingerprint
    assert [line["step"] for line in read_json_lines(places[0] / "metrics.jsonl")] == [2]


@pytest.mark.parametrize("program", ["train", "samplers", "eval"])
def test_ctrl_c_while_a_program_is_imported_is_one_line(program: str, tmp_path: Path) -> None:
    """Status 130, and no traceback; here within an import of torch that takes long."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", program]
    code = (
        "import os, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        f"os.execv({command[0]!r}, {command!r})"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=-1, stderr=-1, text=True,
        cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONPATH": str(tmp_path)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    assert (process.returncode, error) == (130, "stopped before it began\n")


def test_ctrl_c_while_a_program_gets_ready_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it composes its configuration, or loads a model: whatever does not say more."""

    def interrupted(config: dict[str, Any]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["eval", "samples=x"])
    with pytest.raises(SystemExit) as ended:
        command_line("eval", interrupted)
    assert (ended.value.code, capsys.readouterr().err) == (130, "stopped\n")


@pytest.mark.parametrize("arguments", [["--version"], ["experiment=digits_unet", "--version"]])
def test_the_version_is_ours(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    command_line("train", lambda config: 1)
    assert capsys.readouterr().out == f"plain-diffusion {plain_diffusion.__version__}\n"


@pytest.mark.parametrize(("module", "ours"), [("mylab", False), ("train", True), ("models.presets", True)])
def test_ctrl_c_of_other_programs_is_theirs(module: str, ours: bool, tmp_path: Path) -> None:
    """`python -m mylab` that imports this library keeps Python's Ctrl-C, and with it what it does in a
    `finally`."""
    package = tmp_path / module.split(".")[0]
    package.mkdir()
    (package / "__main__.py").write_text("")
    (package / "presets.py").write_text("")
    shutil.copy(plain_diffusion.starting.__file__, tmp_path / "starting.py")  # alone
    code = "import signal, starting; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    (package / "__init__.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", module], cwd=tmp_path, text=True, capture_output=True, check=True, timeout=60
    )
    assert done.stdout.split() == [str(not ours)]
