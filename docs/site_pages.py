"""The pages that are made of the library itself: its API, its tables of names, its families, and what each
program prints as --help."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

# Packages, and the modules whose public names stand on their page besides what the package exports.
PACKAGES: dict[str, tuple[str, ...]] = {
    "diffusion": ("diffusion.oracle",),
    "models": (),
    "samplers": (),
    "train": ("train.data", "train.objective", "train.density", "train.weighting", "train.consistency"),
    "eval": ("eval.scoring", "eval.results", "eval.training", "eval.features.custom"),
}
FIRST = (
    "samplers.sample",
    "samplers.generate",
    "samplers.solver",
)  # the others follow as the package imports them
ROOT = Path(__file__).parent.parent


@cache
def contents(package: str) -> dict[str, list[str]]:
    """The full names to document, by the module that defines them, in the order in which the package imports
    these."""
    source = Path(str(import_module(package).__file__)).read_text()
    exported = import_module(package).__all__
    groups: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{package}.{alias.name}" for alias in node.names if alias.name in exported]
            if names:
                groups.setdefault(node.module, []).extend(names)
    for module in PACKAGES[package]:
        groups[module] = [f"{module}.{name}" for name in _defined(module)]
    return {module: groups[module] for module in sorted(groups, key=lambda module: module not in FIRST)}


def _defined(module: str) -> list[str]:
    """The public functions, classes and tables of a module, in the order of its source."""
    found = import_module(module)
    if hasattr(found, "__all__"):
        return list(found.__all__)
    own = [
        name
        for name, value in vars(found).items()
        if getattr(value, "__module__", None) == module and inspect.getdoc(value)
    ]
    tables = [name for name, value in vars(found).items() if name.isupper() and isinstance(value, dict)]
    return [name for name in own + tables if not name.startswith("_")]


@cache
def public_names() -> dict[tuple[str, str], str]:
    """(package, name) -> the full name under which it is documented."""
    full = [(package, name) for package in PACKAGES for names in contents(package).values() for name in names]
    return {(package, name.rsplit(".", 1)[1]): name for package, name in full}


def write_pages(folder: Path) -> None:
    """Write all of them anew; a page that is as it was keeps its date, so that Sphinx need not read it
    again."""
    folder.mkdir(exist_ok=True)
    pages = {f"{package}.md": _api(package) for package in PACKAGES}
    pages |= {"families.md": _families(), "help.md": _help()}
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def _api(package: str) -> str:
    parts = [f"# {package}", str(import_module(package).__doc__).replace("\n\n", "\n")]
    for module, names in contents(package).items():
        summary, _, rest = str(import_module(module).__doc__).partition("\n\n")
        parts += [f"## {module}", _escaped(" ".join(summary.split())), _directive(names, rest, package)]
        parts += [_table(name) for name in names if isinstance(_value(name), Mapping)]
    return "\n\n".join(parts) + "\n"


def _directive(names: list[str], introduction: str, package: str) -> str:
    from site_docstrings import restructured

    lines = restructured(introduction.splitlines(), package) if introduction else []
    for name in names:
        value = _value(name)
        kind = "class" if inspect.isclass(value) else "function" if inspect.isroutine(value) else "data"
        lines += [f".. auto{kind}:: {name}", *["   :members:"] * (kind == "class")]
        lines += ["   :show-inheritance:"] * (kind == "class" and value.__bases__ != (object,))
        lines += ["   :no-value:", ""] if kind == "data" else [""]
    return "```{eval-rst}\n" + "\n".join(lines) + "\n```"


def _table(name: str) -> str:
    """What stands behind each name of a registry."""
    rows = [f"| `{key}` | {_summary(value)} |" for key, value in _value(name).items()]
    return f"| {name.rsplit('.', 1)[1]} | |\n|---|---|\n" + "\n".join(rows)


def _summary(value: Any) -> str:
    """The first sentence of a docstring; that of what it makes, where a function that needs nothing has none;
    a title."""
    if isinstance(value, tuple):
        value = value[0]
    if inspect.isroutine(value) and not inspect.getdoc(value) and not inspect.signature(value).parameters:
        value = value()
    own = (
        inspect.getdoc(value)
        if inspect.isroutine(value) or inspect.isclass(value)
        else getattr(value, "title", "")
    )
    return _escaped(" ".join((own or "").split("\n\n")[0].split()))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;")


def _value(name: str) -> Any:
    module, attribute = name.rsplit(".", 1)
    return getattr(import_module(module), attribute)


def _families() -> str:
    from models.families import PUBLISHED, table

    rows = [
        f"| `{name}` | {each.repo} | {', '.join(f'`{file}`' for file in each.files)} | {each.licence} |"
        for name, each in PUBLISHED.items()
    ]
    downloads = "\n".join(["| name | repository | files | licence |", "|---|---|---|---|", *rows])
    return (
        "# Families\n\nWhat `models.load` recognises, and `family=` names where files leave it open. "
        "[Published models](../models.md) says what proves each.\n\n"
        f"{table()}\n\n## What `plain-diffusion models download` knows\n\n{downloads}\n"
    )


def _help() -> str:
    """Each program's own page, and those on what there is to choose from."""
    from configs.programs import PROGRAMS, help_page

    parts = ["# Help of the programs", "## plain-diffusion", _shown("plain-diffusion --help", _printed())]
    for program, of in PROGRAMS.items():
        parts += [f"## {program}", _shown(f"plain-diffusion {program} --help", help_page(program, []))]
        for topic in ("experiment", *of.choices()):
            parts += [
                f"### {program} --help {topic}",
                _shown(f"plain-diffusion {program} --help {topic}", help_page(program, [topic])),
            ]
    parts += ["## models", _shown("plain-diffusion models --help", _printed("models"))]
    return "\n\n".join(parts) + "\n"


def _shown(command: str, output: str) -> str:
    return f"```text\n$ {command}\n{output.rstrip()}\n```"


def _printed(*program: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "plain_diffusion", *program, "--help"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
