"""Configurations of the three programs, and the one place that knows Hydra.

    configs/train, configs/samplers, configs/eval    the experiments of each program; its settings stand in
                                                     dataclasses (`programs`)

`compose` gives a notebook the same plain dictionary that the command line would give the program.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import plain_diffusion
from configs.programs import PROGRAMS, experiment_page, help_page, subprograms
from configs.sweep import STOPPED, combinations, run_all, shown
from configs.texts import file_names, texts
from diffusion.settings import values

FOLDER = Path(__file__).parent
APART = ("train", "samplers")  # programs whose runs in a sweep get a folder each
SWEEPING = ("--multirun", "-m")
ENDINGS = (".yaml", ".yml")
LOOKING = ("--help", "-h", "--cfg", "-c", "--resolve", "--info", "-i", "--version")


def compose(program: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved configuration of `python -m program override ...`. ValueError in one line for anything
    wrong with it."""
    return _resolved(program, _quoted(program, overrides))


def _resolved(program: str, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        config = _compose(program, overrides)
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ValueError(
                f"{missing[0]} must be given: {missing[0]}=...{_experiments(program, missing[0])}"
            )
        resolved: dict[str, Any] = dict(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]  # keys of our files are strings
    except HydraException as error:
        raise ValueError(_explain(program, overrides, error)) from None
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    if key := texts(program).empty_path(resolved):
        raise ValueError(f"{key} is empty: give a path, or leave the setting out")
    return resolved


def _unresolved(program: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration with ??? for what must be given, and ${...} as it is written."""
    try:
        return dict(OmegaConf.to_container(_compose(program, overrides)))  # type: ignore[arg-type]  # as in `_resolved`
    except HydraException as error:
        raise ValueError(_explain(program, overrides, error)) from None


def compose_sweep(
    program: str, overrides: Sequence[str] = (), multirun: bool = True
) -> list[tuple[str, dict[str, Any]]]:
    """The configuration of every run of a sweep, and what is special about each; all are composed before the
    first is run.

    multirun  False: only where the experiment's own file says that it is a sweep (hydra.mode: MULTIRUN);
              otherwise there are none

    ValueError as in `compose`.
    """
    given = _quoted(program, overrides)
    try:
        swept = combinations(given, {})
        own = _compose(program, swept[0], return_hydra_config=True).hydra
        if not multirun and own.mode != RunMode.MULTIRUN:
            return []
        runs = combinations(
            given,
            {
                key: texts(program).swept(key, str(values))
                for key, values in (own.sweeper.params or {}).items()
            },
        )
    except HydraException as error:
        raise ValueError(_explain(program, given, error)) from None
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    same = set.intersection(*map(set, runs)) if len(runs) > 1 else set()
    special = [
        " ".join(shown(override) for override in run if override not in same) or "as it stands"
        for run in runs
    ]
    if program == "train" and len(runs) > 1 and not any(override.startswith("resume=") for override in given):
        runs = [
            [*run, "resume=true"] for run in runs
        ]  # a training that is done, or begun, is not begun again
    configs = [_resolved(program, run) for run in runs]
    if _share_a_folder(configs, key := PROGRAMS[program].written):
        if program in APART:
            folders = file_names(special)
            configs = [
                _resolved(program, _apart(program, *each))
                for each in zip(runs, configs, folders, strict=True)
            ]
        elif others := sorted(
            {
                override.partition("=")[0].lstrip("+")
                for run in runs
                for override in run
                if override not in same
            }
            - {"metric"}
        ):
            stem, ending = os.path.splitext(configs[0][key])
            advice = (
                "name it by what differs, "
                f"{key}='{stem}-{'-'.join(f'${{{other}}}' for other in others)}{ending}'"
            )
            raise ValueError(
                f"runs of this sweep would replace each other's results in {key}={stem}{ending}: {advice}"
            )
    return list(zip(special, configs, strict=True))


def _share_a_folder(configs: Sequence[Mapping[str, Any]], key: str) -> bool:
    places = [config[key] for config in configs if config[key] is not None]
    return len(set(places)) < len(places)


def _apart(program: str, run: Sequence[str], config: Mapping[str, Any], folder: str) -> list[str]:
    """The overrides of a run of a sweep that writes into a folder of its own beneath the one that all were to
    share."""
    key = PROGRAMS[program].written
    own = texts(program).in_grammar(f"{key}={config[key]}/{folder}")
    return [*(override for override in run if not override.startswith(f"{key}=")), own]


def command_line(
    program: str,
    main: Callable[[dict[str, Any]], int],
    after: Callable[[Sequence[dict[str, Any]]], None] = lambda configs: None,
) -> None:
    """Run a program with the overrides of the command line and exit with its status; with -m (--multirun) all
    combinations of them.

    after  called at the end with all configurations, of a sweep or of one run

    An error that the user can mend ends with one line and status 1; HYDRA_FULL_ERROR=1 shows where it came
    from.
    """
    arguments = sys.argv[1:]
    try:
        if "--version" in arguments:
            print(f"plain-diffusion {plain_diffusion.__version__}")
            return
        settled = [argument for argument in arguments if "=" in argument]
        if settled and {"--help", "-h"} & set(arguments):
            print(experiment_page(program, _unresolved(program, _quoted(program, settled))), flush=True)
            return
        if help_asked := {"--help", "-h"} & set(arguments):
            print(
                help_page(program, [argument for argument in arguments if argument not in help_asked]),
                flush=True,
            )
            return
        if _is_for_hydra(arguments):
            sys.argv[1:] = _quoted(program, arguments)
            select(program)
            hydra.main(None, program, version_base="1.3")(main)()  # which shows, and does not run it
            return
        overrides = [argument for argument in arguments if argument not in SWEEPING]
        runs = compose_sweep(program, overrides, multirun=overrides != arguments)
        with _warnings_in_a_line():
            sys.exit(
                run_all(runs, main, after) if runs else _run_one(compose(program, overrides), main, after)
            )
    except HydraException as error:  # such as what `evaluate` names, and cannot be made
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")
    except BrokenPipeError:  # whoever read stdout has seen enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:  # its message, if any, says how to go on
        if os.environ.get("RANK", "0") == "0":
            print(": ".join(["stopped", *map(str, stop.args)]), file=sys.stderr)
        sys.exit(STOPPED)


def _run_one(
    config: dict[str, Any],
    main: Callable[[dict[str, Any]], int],
    after: Callable[[Sequence[dict[str, Any]]], None],
) -> int:
    status = main(config)
    after([config])
    return status


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Warnings for the user as "warning: ..." on stderr, without the line of code they come from."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(
            f"warning: {message}", file=sys.stderr, flush=True
        )
        yield


def _is_for_hydra(arguments: Sequence[str]) -> bool:
    """Whether a flag such as --cfg job or --info only looks at the configuration, which Hydra's own command
    line answers. ValueError for a flag that has no meaning.
    """
    flags = [
        argument.split("=")[0]
        for argument in arguments
        if argument.startswith("-") and argument not in SWEEPING
    ]
    for flag in flags:
        if flag not in LOOKING:
            shown = ", ".join(LOOKING)
            raise ValueError(
                f"no flag {flag}: settings are given as name=value, {shown} show them, and -m runs every "
                "combination"
            )
    return bool(flags)


def _quoted(program: str, overrides: Sequence[str]) -> list[str]:
    """The overrides in Hydra's grammar. ValueError for a text that is given twice, as a shell's unquoted
    {000..009} gives it."""
    keys = [override.partition("=")[0].lstrip("+") for override in overrides]
    for key in keys:
        if keys.count(key) > 1 and key in texts(program):
            advice = (
                "give it once, and a pattern in quotes, which the shell leaves whole: "
                f"{key}='shard-{{000..009}}.tar'"
            )
            raise ValueError(f"{key} is given {keys.count(key)} times: {advice}")
    overrides = [chosen_experiment(program, override) for override in overrides]
    given = [
        texts(program).in_grammar(override, _settings(program) if "${" in override else ())
        for override in overrides
    ]
    return [part for override in given for part in _whole_section(override)]


def _whole_section(override: str) -> list[str]:
    """data={name: ...} describes another data set, model.network={name: ...} another network: what the file
    says of its own goes, which Hydra would leave beside it.
    """
    described = re.match(r"(?:\+\+?)?([\w.]+)=\{.*\bname\s*:", override)
    return [f"++{described[1]}=null", f"++{override.lstrip('+')}"] if described else [override]


def chosen_experiment(program: str, override: str) -> str:
    """experiment=folder/mine.yaml chooses a file of the user's own, and brings those beside it along, which
    it may build on."""
    key, _, value = override.partition("=")
    if key != "experiment":
        return override
    names = []
    for path in map(Path, value.split(",")):
        if path.suffix in ENDINGS or path.parent != Path():
            _register(program, path if path.suffix in ENDINGS else path.with_name(f"{path.name}.yaml"))
            path = Path(path.stem)
        names.append(str(path))
    return f"{key}={','.join(names)}"


def _register(program: str, path: Path) -> None:
    """Make the experiments in the folder of this one known to Hydra. ValueError or OSError where that cannot
    be."""
    if not path.is_file():
        raise FileNotFoundError(f"no such experiment: {path}")
    if path.stem in (own := _options(program, "experiment")):
        raise ValueError(f"an experiment {path.stem} comes with this library: give {path} another name")
    select(program)
    for file in sorted(each for each in path.parent.iterdir() if each.suffix in ENDINGS):
        if file.stem in own:
            continue
        try:
            _store_experiment(program, file)
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeError) as error:
            if file == path:
                raise ValueError(
                    f"{path} cannot be read as YAML: {' '.join(str(error).split())}"
                ) from None  # other files beside it may be anything


def _settings(program: str) -> list[str]:
    """Every setting that a program and its experiments name."""
    files = [OmegaConf.to_container(OmegaConf.load(path)) for path in (FOLDER / program).rglob("*.yaml")]
    declared = (PROGRAMS[program].settings(), *subprograms(program).values())
    return [key for each in (*map(values, declared), *files) for key in _keys(each)]


def _compose(program: str, overrides: Sequence[str], return_hydra_config: bool = False) -> DictConfig:
    select(program)
    with hydra.initialize(None, version_base="1.3"):
        return hydra.compose(program, list(overrides), return_hydra_config=return_hydra_config)


def select(program: str) -> None:
    """Make the settings and experiments of this program those that Hydra knows."""
    ConfigStore.instance().repo["experiment"] = _stored(program)


@cache
def _stored(program: str) -> dict[str, Any]:
    """What Hydra knows of the group "experiment", once a program's settings and experiments are stored."""
    store, several = ConfigStore.instance(), subprograms(program)
    base = {} if several else values(PROGRAMS[program].settings())
    store.store(program, {"defaults": ["_self_", {"experiment": PROGRAMS[program].experiment}], **base})
    for name, own in several.items():
        store.store(name, {"program": name, **values(own)}, group="program", package="_global_")
    group = store.repo["experiment"] = {}
    for path in (FOLDER / program / "experiment").glob("*.yaml"):
        _store_experiment(program, path)
    return group


def _store_experiment(program: str, path: Path) -> None:
    """Add an experiment to those that Hydra knows."""
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    if sections := _described(content) if "defaults" in content else {}:
        name = f"{program}-{path.stem}"
        ConfigStore.instance().store(name, sections, group="hydra/emptied", package="_global_")
        bases = list(content["defaults"])
        bases.insert(bases.index("_self_") if "_self_" in bases else len(bases), f"/hydra/emptied/{name}")
        content["defaults"] = bases
    ConfigStore.instance().store(path.stem, content, group="experiment", package="_global_")


def _described(content: Any) -> dict[str, Any]:
    """null in place of every section with a `name`. Such a section describes another network, data set, ...,
    so that those which the file builds on leave nothing of theirs in it, as on the command line.
    """
    sections = {key: value for key, value in content.items() if isinstance(value, Mapping) and key != "hydra"}
    inner = {key: None if "name" in value else _described(value) for key, value in sections.items()}
    return {key: value for key, value in inner.items() if value != {}}


def _explain(program: str, overrides: Sequence[str], error: HydraException) -> str:
    """One line for what Hydra says in several, with the nearest key or file that there is."""
    text = str(error)
    if found := re.search(r"Could not (?:override|delete) '([^'@=]+)'", text):
        key = found[1]
        choices = [o for o in overrides if o.split("=")[0] in _groups(program)]
        known = list(
            _keys(OmegaConf.to_container(_compose(program, choices if key not in "".join(choices) else [])))
        )
        if key in known:  # data={nam: folder}: the section is there, a name within it is not
            given = {
                o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(list(overrides))
            }
            key = next((name for name in _keys(given.get(key), f"{key}.") if name not in known), key)
        near = difflib.get_close_matches(key, known, n=1)
        hint = (
            f"did you mean {near[0]!r}?"
            if near
            else f"known at the top: {', '.join(k for k in known if '.' not in k)}"
        )
        return f"no setting named {key!r}; {hint} (+{key}=... adds one that the file leaves at its default)"
    if found := re.search(r"Could not find '([\w-]+)/([^']+)'", text):
        options = _options(program, found[1])
        near = difflib.get_close_matches(found[2], options, n=1)
        return f"no {found[1]} named {found[2]!r}; " + (
            f"did you mean {near[0]!r}?" if near else f"known: {', '.join(options)}"
        )
    return " ".join(text.split())


def _groups(program: str) -> list[str]:
    return [path.name for path in (FOLDER / program).iterdir() if path.is_dir()]


def _options(program: str, group: str) -> list[str]:
    return sorted(path.stem for path in (FOLDER / program / group).glob("*.yaml"))


def _experiments(program: str, missing: str) -> str:
    """What to add to "must be given" where choosing an experiment would give it."""
    options = _options(program, "experiment")
    return (
        f", or choose an experiment: experiment={' | '.join(options)}"
        if options and missing != "experiment"
        else ""
    )


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")
