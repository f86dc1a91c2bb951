"""Modules of other people that have the names of our packages: what the command does about them, and what
everything else says."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

import plain_diffusion
from eval import __main__ as evaluation
from models.files import gguf_file
from plain_diffusion.packages import PACKAGES, ROOT, prefer_own
from train.data import digits

# An editable installation: ours are found after everything on sys.path, even after folders without
# __init__.py.
EDITABLE = f"""
import sys
from importlib.machinery import PathFinder
class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path or [{ROOT!r}])
sys.path.remove({ROOT!r})
sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, Editable)
"""


def python(*arguments: str, here: Path) -> subprocess.CompletedProcess[str]:
    """Python in that folder, where our packages come after it."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=here,
        env={**os.environ, "PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("theirs", "hidden", "program"),
    [
        ("models/__init__.py", "models", "samplers"),
        ("models.py", "models", "train"),
        ("diffusion.py", "diffusion", "models.layouts"),
        ("train.py", "train", "eval"),
        ("configs/__init__.py", "configs", "samplers"),
    ],
)
def test_a_program_names_the_file_that_hides_a_package(
    theirs: str, hidden: str, program: str, tmp_path: Path
) -> None:
    """One line and status 1, before their file is run; the same of the library is an ImportError, unless it
    does not use that package."""
    (tmp_path / theirs).parent.mkdir(exist_ok=True)
    (tmp_path / theirs).write_text("raise RuntimeError('theirs was run')\n")
    name = program.split(".")[0]
    what = f"{tmp_path / theirs} hides the package {hidden} of plain-diffusion: "
    done = python("-m", program, here=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == f"error: {what}type `plain-diffusion {name} ...`, which finds its own packages first, or rename "
        "yours\n"
    )
    if hidden != "configs":
        done = python("-c", f"import {name}", here=tmp_path)
        assert (
            done.stderr.splitlines()[-1]
            == f"ImportError: {what}rename yours, or run Python where its folder is not on sys.path"
        )


def test_a_folder_without_init_hides_an_editable_installation(tmp_path: Path) -> None:
    (tmp_path / "diffusion").mkdir()
    done = python("-c", f"{EDITABLE}\nimport models", here=tmp_path)
    assert done.stderr.splitlines()[-1].startswith(
        f"ImportError: {tmp_path}/diffusion hides the package diffusion of plain-diffusion: "
    )


def test_a_module_that_was_imported_before_is_named(tmp_path: Path) -> None:
    (tmp_path / "models.py").write_text("")
    done = python(
        "-c", f"import models, sys; sys.path[:] = [{ROOT!r}, *sys.path]\nimport samplers", here=tmp_path
    )
    assert done.stderr.splitlines()[-1].startswith(
        f"ImportError: {tmp_path}/models.py hides the package models of plain-diffusion: "
    )


def test_our_own_through_a_link_is_ours(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(ROOT)
    code = f"import plain_diffusion, sys; sys.path[:0] = [{str(tmp_path / 'link')!r}]\n"
    code += f"plain_diffusion.check(*{PACKAGES!r}); print('ours')"
    assert python("-c", code, here=tmp_path).stdout == "ours\n"


@pytest.mark.parametrize("places", [[""], ["", "theirs", "other"], ["", ROOT], ["other", "."]])
def test_the_command_finds_our_packages_first(
    places: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With theirs in the working folder, named in three ways, or in one before ours; what only they have is
    found as ever."""
    for name in ("theirs", "other"):
        (tmp_path / name / "configs").mkdir(parents=True)
        (tmp_path / name / "models.py").write_text("")
        (tmp_path / name / f"only_{name}.py").write_text("")
    monkeypatch.chdir(tmp_path / "theirs")
    there = {"theirs": str(tmp_path / "theirs"), "other": str(tmp_path / "other")}
    monkeypatch.setattr(sys, "path", [there.get(place, place) for place in places])
    prefer_own()
    for package in PACKAGES:
        spec = PathFinder.find_spec(package)
        assert spec is not None
        assert spec.origin == os.path.join(ROOT, package, "__init__.py")
    assert sys.path[-1] == there["theirs"]
    for name in {"theirs", *places} & there.keys():
        assert PathFinder.find_spec(f"only_{name}")


def test_the_command_says_what_there_is(tmp_path: Path) -> None:
    """Its version and help import nothing heavy, which a broken torch would show."""
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    version, usage, wrong = (
        python("-m", "plain_diffusion", argument, here=tmp_path)
        for argument in ("--version", "--help", "trian")
    )
    assert version.stdout == f"plain-diffusion {plain_diffusion.__version__}\n"
    assert "\n  plain-diffusion train experiment=digits_unet" in usage.stdout
    assert wrong.returncode == 2
    assert wrong.stderr.endswith(
        "invalid choice: 'trian' (choose from 'train', 'samplers', 'eval', 'models')\n"
    )


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("eval.drawing", "matplotlib"),
        ("eval.plots", "matplotlib.figure"),
        ("eval.bench.solver_plots", "matplotlib.ticker"),
    ],
)
def test_a_module_that_draws_names_the_extra_for_plots(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError,
        match=rf"^plots and reports need .* \(.*{package}.*\): pip install 'plain-diffusion\[plots\]'$",
    ):
        import_module(module)


def test_a_feature_without_its_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of it is done."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        ValueError, match=r"handwritten digits need .* pip install 'plain-diffusion\[digits\]'$"
    ):
        digits()
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf_file._header_reader.cache_clear()
    with pytest.raises(ValueError, match=r"GGUF files need .* pip install 'plain-diffusion\[gguf\]'$"):
        gguf_file._header_reader()
    monkeypatch.delitem(sys.modules, "eval.report", raising=False)
    monkeypatch.delitem(sys.modules, "eval.drawing", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ValueError, match=r"plots and reports need .* pip install 'plain-diffusion\[plots\]'$"
    ):
        evaluation.main({"program": "score", "samples": str(tmp_path / "gone"), "report": str(tmp_path)})
