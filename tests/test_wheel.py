"""The wheel: what it holds, and its command in a folder that has modules of the same names. `make wheel-test`
runs this.

The wheel is installed into an environment of its own, which sees the packages of this one, but not the
sources here; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from email import message_from_bytes
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest

from plain_diffusion import __version__
from plain_diffusion.extras import EXTRAS
from plain_diffusion.packages import PACKAGES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
OURS = ("plain_diffusion", *PACKAGES)
SOURCES = shutil.ignore_patterns("__pycache__")
TINY = (
    "channels=8", "channel_mult=[1]", "attention=[0]", "middle_attention=0", "head_dim=8", "groups=4",
)  # fmt: skip
QUIET = ("device=cpu", "progress=false")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def pip(python: str | Path, *arguments: str, here: Path) -> None:
    """Without the settings of this machine, and without looking anywhere for other packages."""
    options = ["--isolated", "--quiet", "--no-input", "--disable-pip-version-check"]
    subprocess.run(
        [str(python), "-m", "pip", *options, *arguments, "--no-deps", "--no-index"], cwd=here, check=True
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, as building leaves files beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in OURS:
        shutil.copytree(ROOT / name, source / name, ignore=SOURCES)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip(sys.executable, "wheel", "--no-build-isolation", "--wheel-dir", "dist", ".", here=source)
    (built,) = (source / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with ZipFile(wheel) as archive:
        return message_from_bytes(archive.read(f"plain_diffusion-{__version__}.dist-info/METADATA"))


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment that has the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    pip(python, "install", str(wheel), here=folder)
    ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    (site / "dependencies.pth").write_text(
        "".join(f"{sysconfig.get_path(kind)}\n" for kind in ("purelib", "platlib"))
    )
    return python.parent


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with modules of the names of ours, which raise, and with one that settings name."""
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "models").mkdir()
    (folder / "configs").mkdir()
    for name in ("models/__init__.py", "train.py", "eval.py", "samplers.py", "diffusion.py"):
        (folder / name).write_text(f"raise RuntimeError('their {name} was run')\n")
    (folder / "mine.py").write_text(
        "class Parameters:\n    def __call__(self, model):\n        return {'mine': 3.5}\n"
    )
    return folder


@pytest.fixture(scope="module")
def run(environment: Path, theirs: Path) -> Run:
    """Runs a program of the environment in that folder, which is also on PYTHONPATH."""

    def program(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(environment / str(arguments[0])), *map(str, arguments[1:])]
        variables = {**os.environ, "PYTHONPATH": str(theirs), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=theirs, env=variables, capture_output=True, text=True)

    return program


def test_it_holds_every_file_of_our_packages(wheel: Path) -> None:
    """Configurations, templates and py.typed with them, and nothing else."""
    with ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert inside == {
        str(path.relative_to(ROOT))
        for name in OURS
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {f"{name}/py.typed" for name in OURS} <= inside
    assert {"configs/train/experiment/digits_unet.yaml", "eval/templates/report.html.j2"} <= inside


def test_its_metadata_agree_with_the_source(metadata: Message) -> None:
    """One version; the extras that messages name; and everything it needs is pinned in constraints.txt."""
    assert metadata["Version"] == __version__
    assert set(metadata.get_all("Provides-Extra", [])) == {*EXTRAS, "docs", "dev"}
    needed = {re.split(r"[<>=\[ ;]", line)[0].lower() for line in metadata.get_all("Requires-Dist", [])} - {
        "plain-diffusion"
    }
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    assert len(needed) > 25
    assert needed - pinned == set()


def test_its_command_trains_samples_and_scores(run: Run, environment: Path, theirs: Path) -> None:
    """Among modules that would raise; and settings may still name a module in that folder."""
    assert (
        str(environment.parent)
        in run("python", "-c", "import plain_diffusion; print(plain_diffusion.__file__)").stdout
    )
    usage = run("plain-diffusion", "--help")
    assert (usage.returncode, usage.stderr) == (0, "")
    assert "plain-diffusion train experiment=digits_unet" in usage.stdout
    settings = [
        "train.steps=2",
        "train.warmup=1",
        "train.batch_size=16",
        "train.evaluate_every=2",
        "wandb=false",
    ]
    settings += [*(f"model.network.{setting}" for setting in TINY), "evaluate={_target_: mine.Parameters}"]
    trained = run("plain-diffusion", "train", "experiment=digits_unet", "run=run", *settings, *QUIET)
    assert (trained.returncode, trained.stderr) == (0, "")
    assert '"mine": 3.5' in (theirs / "run" / "metrics.jsonl").read_text()
    sampled = run(
        "plain-diffusion", "samplers", "run=run", "labels=[3,7]", "n=6", "steps=2", "out=samples", *QUIET
    )
    assert (sampled.returncode, sampled.stderr) == (0, "")
    few = [f"+{setting}.held_out=0.95" for setting in ("reference", "training", "extractors.digits")]
    scored = run(
        "plain-diffusion",
        "eval",
        "experiment=digits",
        "samples=samples/images",
        "report=report",
        *few,
        *QUIET,
    )
    assert (scored.returncode, scored.stderr) == (0, "")
    (result,) = (theirs / "report" / "results").glob("*.json")
    assert json.loads(result.read_text())["samples"]["n"] == 6
    assert "</html>" in (theirs / "report" / "report.html").read_text()
    families = run("plain-diffusion", "models", "families")
    assert (families.returncode, families.stderr) == (0, "")


def test_python_m_names_what_hides_it(run: Run, theirs: Path) -> None:
    (theirs / "samplers.py").rename(theirs / "samplers.txt")
    hidden = run("python", "-m", "samplers")
    assert (hidden.returncode, hidden.stdout) == (1, "")
    assert hidden.stderr.startswith(
        f"error: {theirs}/diffusion.py hides the package diffusion of plain-diffusion: type "
        "`plain-diffusion samp"
    )
