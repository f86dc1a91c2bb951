"""Modules of other people that have the names of our packages: many a project has a `train.py`, a `models/`
and a `configs/` of its own."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec

from plain_diffusion.starting import program

PACKAGES = ("diffusion", "models", "samplers", "train", "eval", "configs")
ROOT = os.path.dirname(os.path.dirname(__file__))  # the folder that holds all our packages


def check(*packages: str) -> None:
    """Make sure that Python finds our own packages under these names, before any of them is imported.

    ImportError that names the file which hides one of ours; of a program started with `python -m`, one line
    and status 1.
    """
    settings = (
        () if program() in (None, "models") else ("configs",)
    )  # which programs read, and the library does not
    for package in (*packages, *settings):
        spec = find_spec(package)
        if spec is None or (theirs := _foreign(spec, package)) is None:
            continue
        what = f"{theirs} hides the package {package} of plain-diffusion"
        if name := program():
            sys.exit(
                f"error: {what}: type `plain-diffusion {name} ...`, which finds its own packages first, or "
                "rename yours"
            )
        raise ImportError(
            f"{what}: rename yours, or run Python where its folder is not on sys.path", name=package
        )


def _foreign(spec: ModuleSpec, package: str) -> str | None:
    """The file or folder of a module that is not our package; None for our own."""
    own = os.path.join(ROOT, package, "__init__.py")
    place = spec.origin or next(
        iter(spec.submodule_search_locations or ()), "a module without a file"
    )  # a folder without __init__.py
    return None if place == own or (os.path.exists(place) and os.path.samefile(place, own)) else place


def prefer_own() -> None:
    """Put the folder of our packages before any folder with modules of the same names, and the working folder
    last.

    On sys.path, so that processes which this one starts find the same. Settings may still name modules in the
    working folder.
    """
    here = os.getcwd()
    sys.path[:] = [*(folder for folder in sys.path if os.path.abspath(folder) != here), here]
    holding = (
        i
        for i, folder in enumerate(sys.path)
        if any(PathFinder.find_spec(package, [folder]) for package in PACKAGES)
    )
    sys.path.insert(next(holding, len(sys.path)), ROOT)
