"""The settings of each program, from the dataclasses that declare them, and the choices that it offers."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

from diffusion.settings import (
    LINE,
    About,
    Setting,
    as_yaml,
    find,
    merged,
    page,
    settings,
    with_null_defaults,
    with_values,
)
from diffusion.spec import check_names

FOLDER = Path(__file__).parent  # of the experiments, a folder per program
FROM_SEEDS = ("noise", "path")  # options of samplers
# Choices for which one's own code may be named: package.module:name, or {name: package.module:name, ...}.
BY_NAME = ("sampler", "spacing", "prediction", "metric", "features")
BY_DESCRIPTION = ("data", "network", "schedule", "objective", "density", "weighting", "rule")


@dataclass(frozen=True)
class Program:
    """One program.

    usage       how to call it, for the top of its --help
    sweep       settings that -m runs in every combination, as an example
    output      the setting that names the folder or file of its results
    settings    all at the top; those of `experiment` if there is one
    texts       these and those within its mappings, to find the ones that are text
    choices     what there is to choose from, by setting; imported when called
    experiment  the default experiment
    """

    usage: str
    sweep: str
    output: str
    settings: Callable[[], tuple[Setting, ...]]
    texts: Callable[[], tuple[Setting, ...]]
    choices: Callable[[], dict[str, Mapping[str, Any]]]
    experiment: str | None = None


@cache
def _train() -> tuple[Setting, ...]:
    from train.settings import RunSettings

    return settings(RunSettings)


@cache
def _samplers() -> tuple[Setting, ...]:
    """Those of both ways to draw, with null for the model's default."""
    from samplers.run import SampleParams
    from samplers.text_to_image import TextToImageParams

    run, text = settings(SampleParams), settings(TextToImageParams)
    every = {each.name: each for each in (*run, *text)}
    redraw = About("a PNG drawn here: draws it again to the last bit, or with other settings", text="path")
    modes = (every["run"], every["weights"], Setting("from", None, redraw))
    shared = {each.name for each in run} & {each.name for each in text}
    own = [each for part in (text, run) for each in part if each.name not in shared]
    return with_null_defaults(merged(modes, own, [each for each in run if each.name in shared]))


def _training_texts() -> tuple[Setting, ...]:
    """Adds the paths that data sets and objectives take."""
    from train.data import DATASETS
    from train.run import OBJECTIVES

    model_from = Setting("from", None, About(text="path"), list[str])
    entries = *DATASETS.values(), *OBJECTIVES.values()
    return (*_train(), model_from, *(each for entry in entries for each in _paths(entry)))


def _scoring_texts() -> tuple[Setting, ...]:
    """Adds those of drawing samples."""
    from train.data import DATASETS

    scoring = [each for group in subprograms("eval").values() for each in group]
    return (*scoring, *_samplers(), *(each for entry in DATASETS.values() for each in _paths(entry)))


def _paths(entry: Callable[..., Any]) -> list[Setting]:
    """The parameters that take a path."""
    hints = get_type_hints(entry.__init__ if inspect.isclass(entry) else entry).items()
    paths = [(name, kind) for name, kind in hints if {str, Path} & {kind, *get_args(kind)}]
    return [Setting(name, None, About(text="path"), kind) for name, kind in paths]


def _scoring() -> tuple[Setting, ...]:
    return subprograms("eval")["score"]


@cache
def subprograms(program: str) -> dict[str, tuple[Setting, ...]]:
    """Settings of the programs that eval's experiments choose by `program`, if a dataclass declares them."""
    if program != "eval":
        return {}
    from eval.bench import BENCHMARKS
    from eval.bench.orders import OrderParams
    from eval.reference import StatisticsParams
    from eval.settings import CompareParams, ReportParams, ScoreParams

    params = {
        "score": ScoreParams,
        "statistics": StatisticsParams,
        "report": ReportParams,
        "compare": CompareParams,
        "sampler_orders": OrderParams,
        **{f"bench_{name}": import_module(f"eval.bench.{name}").Params for name in BENCHMARKS},
    }
    return {name: settings(each) for name, each in params.items()}


def _training_choices() -> dict[str, Mapping[str, Any]]:
    from diffusion import PREDICTIONS, SCHEDULES
    from models import NETWORKS
    from train.data import DATASETS
    from train.density import DENSITIES
    from train.run import OBJECTIVES
    from train.weighting import WEIGHTINGS

    networks = {name: params for name, (_, params) in NETWORKS.items()}
    choices: dict[str, Mapping[str, Any]] = {"data": DATASETS, "network": networks, "schedule": SCHEDULES}
    choices |= {"prediction": PREDICTIONS, "objective": OBJECTIVES}
    return choices | {"density": DENSITIES, "weighting": WEIGHTINGS}


def _drawing_choices() -> dict[str, Mapping[str, Any]]:
    from diffusion import RULES, SPACINGS
    from models import FAMILIES
    from samplers.sample import SAMPLERS

    return {"sampler": SAMPLERS, "spacing": SPACINGS, "rule": RULES, "family": FAMILIES}


def _scoring_choices() -> dict[str, Mapping[str, Any]]:
    from eval.features.protocols import PROTOCOLS
    from eval.features.registry import EXTRACTORS
    from eval.metrics.registry import METRICS

    return {"metric": METRICS, "features": EXTRACTORS, "protocol": PROTOCOLS}


PROGRAMS = {
    "train": Program(
        """\
Train a diffusion model.

plain-diffusion train experiment=digits_unet [train.steps=2000 ...]         from scratch, or distilled
plain-diffusion train experiment=finetune weights=FILE data=FOLDER [...]    from a published model
plain-diffusion train experiment=folder/mine.yaml [...]                     by your own experiment""",
        "train.seed=0,1 train.ema=0.99,0.999",
        "run",
        _train,
        _training_texts,
        _training_choices,
    ),
    "samplers": Program(
        """\
Draw images.

plain-diffusion samplers run=runs/digits_unet [labels=[3,7] ...]                        from a trained run
plain-diffusion samplers weights=sdxl.safetensors prompt="a corgi" [n=4 ...]            from published weights
plain-diffusion samplers from=PICTURE.png [steps=40 ...]                                a picture again

null stands for the model's default, or for what its comment says.""",
        "seed=0,9 'prompt=choice(a cat,a dog)'",
        "out",
        _samplers,
        _samplers,
        _drawing_choices,
    ),
    "eval": Program(
        """\
Score pictures, or run another experiment.

plain-diffusion eval samples=FOLDER reference=FOLDER metric=[fid,kid]    scores pictures
plain-diffusion eval experiment=NAME [...]                               others: see --help experiment""",
        "samples=runs/a,runs/b protocol=clean,adm",
        "out",
        _scoring,
        _scoring_texts,
        _scoring_choices,
        experiment="score",
    ),
}


def help_page(program: str, topics: Sequence[str]) -> str:
    """What --help prints: all settings, or the given topics. ValueError for an unknown topic."""
    if topics:
        return "\n\n".join(_topic(program, topic) for topic in topics)
    own = PROGRAMS[program]
    choices = "Choices: --help NAME, for " + ", ".join(("experiment", *own.choices()))
    flags = "\n".join(f"{name:<24}{text}" for name, text in FLAGS.items()).format(sweep=own.sweep)
    return "\n\n".join([own.usage, page(own.settings()), choices, flags])


def experiment_page(program: str, experiment: str, config: Mapping[str, Any]) -> str:
    """What --help prints with an experiment: the settings of its program, with its values as defaults.

    experiment  its name, its file, or "" for settings without an experiment
    """
    own = {name: value for name, value in config.items() if name != "program"}
    group = subprograms(program).get(config.get("program", ""), PROGRAMS[program].settings())
    paths = (Path(experiment), FOLDER / program / "experiment" / f"{experiment}.yaml")
    title = next((_first_comment(path) for path in paths if path.is_file()), "")
    lines = textwrap.wrap(title, LINE - 2, break_on_hyphens=False)
    return "".join(f"# {line}\n" for line in lines) + "\n" * bool(lines) + page(with_values(group, own))


FLAGS = {
    "-m, --multirun": "run every combination of values: {sweep}",
    "--help experiment=NAME": "show the settings of an experiment",
    "--help NAME": "show a setting, and its choices",
    "--cfg job": "show the resolved settings without running",
    "--version": "show the version of this library",
}


def _topic(program: str, topic: str) -> str:
    group, tables, parts = PROGRAMS[program].settings(), PROGRAMS[program].choices(), subprograms(program)
    lines = []
    for name, setting in find(group, topic).items():
        lines.append(page([replace(setting, name=name, about=replace(setting.about, heading=""))]))
    first_names: dict[int, str] = {}
    for name, entry in tables.get(topic, {}).items():
        first = first_names.setdefault(id(entry), name)
        lines.append(describe(name, entry if first == name else f"The same as {first}."))
    if topic in BY_NAME + BY_DESCRIPTION:
        how = "by this name" if topic in BY_NAME else "as {name: package.module:name, and its settings}"
        lines.append(f"  {'package.module:name':<20} your own, {how}")
    if topic in parts:
        lines.append(page(parts[topic]))
    if topic == "experiment":
        paths = sorted((FOLDER / program / topic).glob("*.yaml"))
        lines += [describe(path.stem, _first_comment(path)) for path in paths]
        lines.append("  folder/mine.yaml     your own file, which may build on these")
    if not lines:
        names = [each.name for each in group]
        known = dict.fromkeys([*names, "experiment", *tables, *parts])
        check_names("setting or choice", [topic], known)
    return "\n".join(line for line in lines if line)


def _first_comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    comments = (line.lstrip("# ").rstrip(":") for line in lines if line.startswith("# "))
    return next((comment for comment in comments if "@package" not in comment), "")


def describe(name: str, entry: Any) -> str:
    """A choice: what it is, from its docstring, and its own settings."""
    words = _summary(entry) if callable(entry) else str(entry)
    own = [f"{each.name}={as_yaml(each.default)}" for each in _own_parameters(entry)]
    text = " ".join([words, f"[{', '.join(own)}]" if own else ""]).strip()
    return f"  {name:<20} " + ("\n" + " " * 23).join(textwrap.wrap(text, LINE - 23, break_on_hyphens=False))


def _summary(entry: Any) -> str:
    text = inspect.getdoc(entry)
    if not text and not inspect.signature(entry).parameters:  # a function that makes the described object
        made = entry()
        text = getattr(made, "title", None) or inspect.getdoc(made)
    return " ".join((text or "").split("\n\n")[0].split())


def _own_parameters(entry: Any) -> list[inspect.Parameter]:
    """The parameters with plain defaults: the program provides the others."""
    if not callable(entry):
        return []
    plain = (bool, int, float, str, tuple, type(None))
    parameters = inspect.signature(entry).parameters.values()
    return [each for each in parameters if isinstance(each.default, plain) and each.name not in FROM_SEEDS]
