"""Configurations of the three programs, and the only place that knows Hydra.

    configs/train, configs/samplers, configs/eval    the experiments of each program; its settings are
    declared
                                                     in dataclasses (`programs`)

`compose` gives a notebook the same plain dictionary that the command line gives the program.
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
from configs.sweep import STOPPED, combinations, readable, run_all
from configs.texts import file_names, texts
from diffusion.settings import values

FOLDER = Path(__file__).parent
OWN_FOLDERS = ("train", "samplers")  # programs whose runs in a sweep get a folder each
SWEEP_FLAGS = ("--multirun", "-m")
ENDINGS = (".yaml", ".yml")
INFO_FLAGS = ("--help", "-h", "--cfg", "-c", "--resolve", "--info", "-i", "--version")


def compose(program: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The resolved configuration of `plain-diffusion program override ...`. ValueError in one line."""
    return _resolve(program, _in_grammar(program, overrides))


def _resolve(program: str, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        config = _compose(program, overrides)
        for name in sorted(OmegaConf.missing_keys(config)):
            raise ValueError(f"{name} must be given: {name}=...{_experiments(program, name)}")
        resolved: dict[str, Any] = dict(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]  # keys of our files are strings
    except HydraException as error:
        raise ValueError(_explain(program, overrides, error)) from None
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    if key := texts(program).empty_path(resolved):
        raise ValueError(f"{key} is empty: give a path, or leave the setting out")
    return resolved


def _unresolved(program: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The configuration with ??? for required settings, and ${...} unresolved."""
    try:
        return dict(OmegaConf.to_container(_compose(program, overrides)))  # type: ignore[arg-type]  # as in `_resolve`
    except HydraException as error:
        raise ValueError(_explain(program, overrides, error)) from None


def compose_sweep(
    program: str, overrides: Sequence[str] = (), multirun: bool = True
) -> list[tuple[str, dict[str, Any]]]:
    """What is special about each run of a sweep, and its configuration; all composed before the first run.

    multirun  False: only if the experiment's file is a sweep (hydra.mode: MULTIRUN), else there are no runs

    ValueError as in `compose`.
    """
    given = _in_grammar(program, overrides)
    try:
        first = combinations(given, {})[0]
        own = _compose(program, first, return_hydra_config=True).hydra
        if not multirun and own.mode != RunMode.MULTIRUN:
            return []
        params = (own.sweeper.params or {}).items()
        runs = combinations(given, {key: texts(program).swept(key, str(values)) for key, values in params})
    except HydraException as error:
        raise ValueError(_explain(program, given, error)) from None
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from None
    same = set.intersection(*map(set, runs)) if len(runs) > 1 else set()
    different = [[override for override in run if override not in same] for run in runs]
    special = [" ".join(map(readable, run)) or "as it stands" for run in different]
    if program == "train" and len(runs) > 1 and not any(override.startswith("resume=") for override in given):
        runs = [[*run, "resume=true"] for run in runs]  # finished or begun trainings are not repeated
    configs = [_resolve(program, run) for run in runs]
    if _share_a_folder(configs, key := PROGRAMS[program].output):
        if program in OWN_FOLDERS:
            each = zip(runs, configs, file_names(special), strict=True)
            configs = [_resolve(program, _separate(program, *run)) for run in each]
            return list(zip(special, configs, strict=True))
        names = {override.partition("=")[0].lstrip("+") for run in different for override in run}
        if names := names - {"metric"}:
            stem, ending = os.path.splitext(configs[0][key])
            advice = f"{key}='{stem}-{'-'.join(f'${{{name}}}' for name in sorted(names))}{ending}'"
            raise ValueError(
                f"runs of this sweep would replace each other's results in {key}={stem}{ending}: "
                f"name it by what differs, {advice}"
            )
    return list(zip(special, configs, strict=True))


def _share_a_folder(configs: Sequence[Mapping[str, Any]], key: str) -> bool:
    places = [config[key] for config in configs if config[key] is not None]
    return len(set(places)) < len(places)


def _separate(program: str, run: Sequence[str], config: Mapping[str, Any], folder: str) -> list[str]:
    """The overrides of a run that writes into its own folder, below the one that all runs were to share."""
    key = PROGRAMS[program].output
    own = texts(program).in_grammar(f"{key}={config[key]}/{folder}")
    return [*(override for override in run if not override.startswith(f"{key}=")), own]


def command_line(
    program: str,
    main: Callable[[dict[str, Any]], int],
    after: Callable[[Sequence[dict[str, Any]]], None] = lambda configs: None,
) -> None:
    """Runs a program with the overrides of the command line, or with -m all combinations, and exits.

    after  called at the end with all configurations

    The user's errors end with one line and status 1; HYDRA_FULL_ERROR=1 shows the traceback.
    """
    arguments = sys.argv[1:]
    try:
        if "--version" in arguments:
            print(f"plain-diffusion {plain_diffusion.__version__}")
            return
        overrides = [argument for argument in arguments if "=" in argument]
        topics = [argument for argument in arguments if argument not in ("--help", "-h")]
        if overrides and topics != arguments:
            chosen = dict(override.split("=", 1) for override in overrides).get("experiment", "")
            config = _unresolved(program, _in_grammar(program, overrides))
            print(experiment_page(program, chosen, config), flush=True)
            return
        if topics != arguments:
            print(help_page(program, topics), flush=True)
            return
        if _is_for_hydra(arguments):
            sys.argv[1:] = _in_grammar(program, arguments)
            select(program)
            hydra.main(None, program, version_base="1.3")(main)()  # shows the configuration, does not run it
            return
        overrides = [argument for argument in arguments if argument not in SWEEP_FLAGS]
        runs = compose_sweep(program, overrides, multirun=overrides != arguments)
        with _warnings_in_a_line():
            if runs:
                sys.exit(run_all(runs, main, after))
            sys.exit(_run_one(compose(program, overrides), main, after))
    except HydraException as error:  # such as an `evaluate` that cannot be made
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")
    except BrokenPipeError:  # the reader of stdout has closed it: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:  # its message, if any, says how to continue
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
    """Prints warnings for the user as "warning: ..." on stderr, without the line of code."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)

        def show(message: Warning | str, *_: Any, **__: Any) -> None:
            print(f"warning: {message}", file=sys.stderr, flush=True)

        warnings.showwarning = show
        yield


def _is_for_hydra(arguments: Sequence[str]) -> bool:
    """Whether a flag such as --cfg job only shows the configuration. ValueError for an unknown flag."""
    flags = [argument.split("=")[0] for argument in arguments if argument.startswith("-")]
    flags = [flag for flag in flags if flag not in SWEEP_FLAGS]
    for flag in flags:
        if flag not in INFO_FLAGS:
            known = f"{', '.join(INFO_FLAGS)} show settings, and -m runs every combination"
            raise ValueError(f"no flag {flag}: settings are given as name=value, {known}")
    return bool(flags)


def _in_grammar(program: str, overrides: Sequence[str]) -> list[str]:
    """The overrides in Hydra's grammar. ValueError for a text given twice (an unquoted {000..009})."""
    keys = [override.partition("=")[0].lstrip("+") for override in overrides]
    for key in keys:
        if keys.count(key) > 1 and key in texts(program):
            advice = f"give it once, and quote a pattern for the shell: {key}='shard-{{000..009}}.tar'"
            raise ValueError(f"{key} is given {keys.count(key)} times: {advice}")
    parts: list[str] = []
    for override in overrides:
        override = chosen_experiment(program, override)
        names = _settings(program) if "${" in override else ()
        parts += _replace_section(texts(program).in_grammar(override, names))
    return parts


def _replace_section(override: str) -> list[str]:
    """data={name: ...} describes another data set: removes the file's section, which Hydra would merge."""
    section = re.match(r"(?:\+\+?)?([\w.]+)=\{.*\bname\s*:", override)
    return [f"++{section[1]}=null", f"++{override.lstrip('+')}"] if section else [override]


def chosen_experiment(program: str, override: str) -> str:
    """experiment=folder/mine.yaml chooses the user's own file; others in its folder can be its defaults."""
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
    """Makes the experiments of the file's folder known to Hydra. ValueError or OSError if that fails."""
    if not path.is_file():
        raise FileNotFoundError(f"no such experiment: {path}")
    if path.stem in (own := _options(program, "experiment")):
        raise ValueError(f"this library has an experiment {path.stem}: give {path} another name")
    select(program)
    files = [file for file in path.parent.iterdir() if file.suffix in ENDINGS and file.stem not in own]
    for file in sorted(files):
        try:
            _store_experiment(program, file)
        except (yaml.YAMLError, OmegaConfBaseException, UnicodeError) as error:
            if file == path:
                reason = " ".join(str(error).split())
                # Other files in its folder may be anything.
                raise ValueError(f"{path} cannot be read as YAML: {reason}") from None


def _settings(program: str) -> list[str]:
    """The names of all settings of a program and its experiments."""
    files = [OmegaConf.to_container(OmegaConf.load(path)) for path in (FOLDER / program).rglob("*.yaml")]
    declared = (PROGRAMS[program].settings(), *subprograms(program).values())
    return [key for each in (*map(values, declared), *files) for key in _keys(each)]


def _compose(program: str, overrides: Sequence[str], return_hydra_config: bool = False) -> DictConfig:
    select(program)
    with hydra.initialize(None, version_base="1.3"):
        return hydra.compose(program, list(overrides), return_hydra_config=return_hydra_config)


def select(program: str) -> None:
    """Makes the settings and experiments of this program those that Hydra knows."""
    ConfigStore.instance().repo["experiment"] = _stored(program)


@cache
def _stored(program: str) -> dict[str, Any]:
    """Hydra's group "experiment" with the program's experiments; stores its settings too."""
    store, parts = ConfigStore.instance(), subprograms(program)
    base = {} if parts else values(PROGRAMS[program].settings())
    store.store(program, {"defaults": ["_self_", {"experiment": PROGRAMS[program].experiment}], **base})
    for name, own in parts.items():
        store.store(name, {"program": name, **values(own)}, group="program", package="_global_")
    group = store.repo["experiment"] = {}
    for path in (FOLDER / program / "experiment").glob("*.yaml"):
        _store_experiment(program, path)
    return group


def _store_experiment(program: str, path: Path) -> None:
    """Makes an experiment known to Hydra."""
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    if sections := _null_sections(content) if "defaults" in content else {}:
        name = f"{program}-{path.stem}"
        ConfigStore.instance().store(name, sections, group="hydra/emptied", package="_global_")
        bases = list(content["defaults"])
        bases.insert(bases.index("_self_") if "_self_" in bases else len(bases), f"/hydra/emptied/{name}")
        content["defaults"] = bases
    ConfigStore.instance().store(path.stem, content, group="experiment", package="_global_")


def _null_sections(content: Any) -> dict[str, Any]:
    """null for every section with a `name`, which replaces the section of the experiment that it builds on.

    Such a section describes another network, data set, ...; Hydra would merge the two.
    """
    sections = {key: value for key, value in content.items() if isinstance(value, Mapping) and key != "hydra"}
    inner = {key: None if "name" in value else _null_sections(value) for key, value in sections.items()}
    return {key: value for key, value in inner.items() if value != {}}


def _explain(program: str, overrides: Sequence[str], error: HydraException) -> str:
    """Hydra's error in one line, with the nearest key or file."""
    text = str(error)
    if match := re.search(r"Could not (?:override|delete) '([^'@=]+)'", text):
        key = match[1]
        choices = [o for o in overrides if o.split("=")[0] in _groups(program)]
        config = _compose(program, choices if key not in "".join(choices) else [])
        known = list(_keys(OmegaConf.to_container(config)))
        if key in known:  # data={nam: folder}: the section exists, a name within it does not
            parsed = OverridesParser.create().parse_overrides(list(overrides))
            given = {override.key_or_group: override.value() for override in parsed}
            key = next((name for name in _keys(given.get(key), f"{key}.") if name not in known), key)
        hint = _nearest(key, known, f"known at the top: {', '.join(k for k in known if '.' not in k)}")
        return f"no setting named {key!r}; {hint} (+{key}=... adds one that the file leaves at its default)"
    if match := re.search(r"Could not find '([\w-]+)/([^']+)'", text):
        options = _options(program, match[1])
        hint = _nearest(match[2], options, f"known: {', '.join(options)}")
        return f"no {match[1]} named {match[2]!r}; {hint}"
    return " ".join(text.split())


def _nearest(name: str, known: Sequence[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def _groups(program: str) -> list[str]:
    return [path.name for path in (FOLDER / program).iterdir() if path.is_dir()]


def _options(program: str, group: str) -> list[str]:
    return sorted(path.stem for path in (FOLDER / program / group).glob("*.yaml"))


def _experiments(program: str, missing: str) -> str:
    """Advice for "must be given": experiments to choose from."""
    options = _options(program, "experiment")
    if not options or missing == "experiment":
        return ""
    return f", or choose an experiment: experiment={' | '.join(options)}"


def _keys(config: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(config, Mapping):
        for key, value in config.items():
            yield f"{prefix}{key}"
            yield from _keys(value, f"{prefix}{key}.")
