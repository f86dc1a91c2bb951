"""What each program can be told: its settings, from the dataclasses that declare them, and what there is to
choose from."""

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
    find,
    merged,
    page,
    settings,
    with_null_defaults,
    with_values,
)
from diffusion.spec import check_names

FOLDER = Path(__file__).parent  # of the experiments, a folder per program
GIVEN = ("noise", "path")  # options of samplers that come from the seeds
OWN = {  # what may come from outside
    "its name alone": ("sampler", "spacing", "prediction", "metric", "features"),
    "{name: package.module:name, and its settings}": (
        "data",
        "network",
        "schedule",
        "objective",
        "density",
        "weighting",
        "rule",
    ),
}


@dataclass(frozen=True)
class Program:
    """One program.

    usage     how it is called, for the top of its --help
    written   the setting that names the folder or file of its results
    settings  all at the top, those of `experiment` where there is one
    texts     these, and those of what their mappings describe, to tell which are text
    choices   what there is to choose from, by the setting that chooses; imported when asked for
    experiment  that is taken where none is chosen
    """

    usage: str
    written: str
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
    """Those of both ways to draw, of which null stands for what is not given."""
    from samplers.run import SampleParams
    from samplers.text_to_image import TextToImageParams

    run, text = settings(SampleParams), settings(TextToImageParams)
    first = {each.name: each for each in (*run, *text)}
    again = (
        "a PNG drawn here: its settings, and what is given beside it instead of them; alone, the same to "
        "the last bit"
    )
    chosen = (first["run"], first["weights"], Setting("from", None, About(again, text="path")))
    shared = {each.name for each in run} & {each.name for each in text}
    own = [each for part in (text, run) for each in part if each.name not in shared]
    return with_null_defaults(merged(chosen, own, [each for each in run if each.name in shared]))


def _training_texts() -> tuple[Setting, ...]:
    """With the paths that data sets and objectives take."""
    from train.data import DATASETS
    from train.run import OBJECTIVES

    further = Setting("from", None, About(text="path"), list[str])  # of model
    return (
        *_train(),
        further,
        *(each for entry in (*DATASETS.values(), *OBJECTIVES.values()) for each in _paths(entry)),
    )


def _scoring_texts() -> tuple[Setting, ...]:
    """With those of what draws samples."""
    from train.data import DATASETS

    scored = [each for of in subprograms("eval").values() for each in of]
    return (*scored, *_samplers(), *(each for entry in DATASETS.values() for each in _paths(entry)))


def _paths(entry: Callable[..., Any]) -> list[Setting]:
    """The parameters that a path can be given to."""
    hints = get_type_hints(entry.__init__ if inspect.isclass(entry) else entry)
    return [
        Setting(name, None, About(text="path"), kind)
        for name, kind in hints.items()
        if {str, Path} & {kind, *get_args(kind)}
    ]


def _scoring() -> tuple[Setting, ...]:
    return subprograms("eval")["score"]


@cache
def subprograms(program: str) -> dict[str, tuple[Setting, ...]]:
    """Of a program whose experiments name one of several by `program`, the settings of those that declare
    theirs in a dataclass."""
    if program != "eval":
        return {}
    from eval.bench import BENCHMARKS
    from eval.bench.orders import OrderParams
    from eval.reference import StatisticsParams
    from eval.settings import CompareParams, ScoreParams

    params = {
        "score": ScoreParams,
        "statistics": StatisticsParams,
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
    return {
        "data": DATASETS,
        "network": networks,
        "schedule": SCHEDULES,
        "prediction": PREDICTIONS,
        "objective": OBJECTIVES,
        "density": DENSITIES,
        "weighting": WEIGHTINGS,
    }


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
        "plain-diffusion train experiment=digits_unet [train.steps=2000 ...]              a model from "
        "scratch, or a distilled one\n"
        "plain-diffusion train experiment=finetune weights=FILE data=FOLDER [...]         a published "
        "model, on captioned pictures\n"
        "plain-diffusion train experiment=folder/mine.yaml [...]                          an experiment of "
        "your own",
        "run",
        _train,
        _training_texts,
        _training_choices,
    ),
    "samplers": Program(
        "plain-diffusion samplers run=runs/digits_unet [labels=[3,7] ...]                              with "
        "a model trained here\n"
        'plain-diffusion samplers weights=sd_xl_base_1.0.safetensors prompt="a corgi" [n=4 ...]        with '
        "a published one\n"
        "plain-diffusion samplers from=samples/a-corgi-1f2e3d4c/images/000000.png [steps=40 ...]       an "
        "image once more, or changed\n\n"
        "null, everywhere: what the model is meant for, or what is said beside it.",
        "out",
        _samplers,
        _samplers,
        _drawing_choices,
    ),
    "eval": Program(
        "plain-diffusion eval samples=FOLDER reference=FOLDER metric=[fid,kid]      scores pictures\n"
        "plain-diffusion eval experiment=NAME [...]                            compares runs, measures "
        "speed, ...: see --help experiment",
        "out",
        _scoring,
        _scoring_texts,
        _scoring_choices,
        experiment="score",
    ),
}


def help_page(program: str, topics: Sequence[str]) -> str:
    """What --help prints: all settings, or what is known of those that are named. ValueError for one that is
    not."""
    of = PROGRAMS[program]
    if topics:
        return "\n\n".join(_topic(program, topic) for topic in topics)
    choices = "  ".join(("experiment", *of.choices()))
    flags = "\n".join(f"{name:<24}{text}" for name, text in FLAGS.items())
    parts = [of.usage, page(of.settings()), f"What there is to choose from: --help NAME, of {choices}", flags]
    return "\n\n".join(part for part in parts if part)


def experiment_page(program: str, config: Mapping[str, Any]) -> str:
    """What --help prints with an experiment: the settings of its program, with its values as defaults."""
    own = {name: value for name, value in config.items() if name != "program"}
    group = subprograms(program).get(config.get("program", ""), PROGRAMS[program].settings())
    return page(with_values(group, own))


FLAGS = {
    "-m, --multirun": "run every combination of several values: seed=0,9, and of texts and paths "
    "'prompt=choice(a cat,a dog)'",
    "--help experiment=NAME": "the settings of an experiment",
    "--help NAME": "what a setting is, and what there is to choose from",
    "--cfg job": "the settings as they come out, without running",
    "--version": "of this library",
}


def _topic(program: str, topic: str) -> str:
    of = PROGRAMS[program]
    lines = []
    for place, setting in find(of.settings(), topic).items():
        lines.append(page([replace(setting, name=place, about=replace(setting.about, heading=""))]))
    tables = of.choices()
    if topic in tables:
        lines += [describe(name, entry) for name, entry in tables[topic].items()]
        own = next((words for words, topics in OWN.items() if topic in topics), "")
        lines.append(f"  {'package.module:name':<20} one of your own: {own}" if own else "")
    if topic in subprograms(program):
        lines.append(page(subprograms(program)[topic]))
    if topic == "experiment":
        lines += [
            f"  {path.stem:<20} {_first_comment(path)}"
            for path in sorted((FOLDER / program / topic).glob("*.yaml"))
        ]
        lines.append("  folder/mine.yaml     a file of your own, which may build on these")
    if not lines:
        check_names(
            "setting or choice",
            [topic],
            [each.name for each in of.settings()] + ["experiment", *tables, *subprograms(program)],
        )
    return "\n".join(line for line in lines if line)


def _first_comment(path: Path) -> str:
    lines = path.read_text().splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("# ") and "@package" not in line), "")


def describe(name: str, entry: Any) -> str:
    """An entry of a table of names: what it is, from its docstring, and the settings of its own."""
    words = _summary(entry) if callable(entry) else str(entry)
    own = [f"{each.name}={_shown(each.default)}" for each in _own_parameters(entry)]
    if not (about := " ".join([words, f"[{', '.join(own)}]" if own else ""]).strip()):
        return f"  {name}"
    return textwrap.fill(
        about, LINE, initial_indent=f"  {name:<20} ", subsequent_indent=" " * 23, break_on_hyphens=False
    )


def _summary(entry: Any) -> str:
    text = inspect.getdoc(entry)
    if not text and not inspect.signature(entry).parameters:  # which makes what is described
        text = inspect.getdoc(entry())
    return " ".join((text or "").split("\n\n")[0].split())


def _own_parameters(entry: Any) -> list[inspect.Parameter]:
    """Those with plain defaults: the others are given by the program."""
    if not callable(entry):
        return []
    plain = (bool, int, float, str, tuple, type(None))
    return [
        each
        for each in inspect.signature(entry).parameters.values()
        if isinstance(each.default, plain) and each.name not in GIVEN
    ]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
