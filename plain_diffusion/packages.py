"""Finds modules that hide our packages: many projects have their own `train.py`, `models/` or `configs/`."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec

from plain_diffusion.starting import program

PACKAGES = ("diffusion", "models", "samplers", "train", "eval", "configs")
ROOT = os.path.dirname(os.path.dirname(__file__))  # the folder that holds all our packages


def check(*packages: str) -> None:
    """Make sure that these names find our own packages, before any of them is imported.

    ImportError names the file that hides one of ours; a program started with `python -m` prints one line and
    exits with status 1.
    """
    name = program()
    for package in (*packages, *(() if name in (None, "models") else ("configs",))):  # others read no configs
        spec = find_spec(package)
        if spec is None or (foreign := _foreign_path(spec, package)) is None:
            continue
        problem = f"{foreign} hides the package {package} of plain-diffusion"
        if name:
            sys.exit(
                f"error: {problem}: type `plain-diffusion {name} ...`, which finds its own packages first, "
                "or "
                "rename yours"
            )
        remedy = "rename yours, or run Python where its folder is not on sys.path"
        raise ImportError(f"{problem}: {remedy}", name=package)


def _foreign_path(spec: ModuleSpec, package: str) -> str | None:
    """The file or folder of a module that is not our package; None for our own."""
    own = os.path.join(ROOT, package, "__init__.py")
    path = spec.origin or next(iter(spec.submodule_search_locations or ()), "a module without a file")
    return None if path == own or (os.path.exists(path) and os.path.samefile(path, own)) else path


def prefer_own() -> None:
    """Put our folder on sys.path before every folder with modules of the same names, the working folder last.

    Through sys.path, subprocesses find the same packages. Settings may still name modules in the working
    folder.
    """
    here = os.getcwd()
    sys.path[:] = [*(folder for folder in sys.path if os.path.abspath(folder) != here), here]
    hiding = (
        i
        for i, folder in enumerate(sys.path)
        if any(PathFinder.find_spec(package, [folder]) for package in PACKAGES)
    )
    sys.path.insert(next(hiding, len(sys.path)), ROOT)
