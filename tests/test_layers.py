"""Imports point left only: plain_diffusion <- diffusion <- models <- samplers <- train <- eval; the core
needs few packages of others."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("diffusion", "models", "samplers", "train", "eval")
PACKAGES = ("plain_diffusion", *LAYERS, "configs")
OF_TRAIN = (
    "train.data",
    "train.world",
    "train.logbook",
)  # of train, what eval may import
OPTIONAL = (
    "torchvision", "transformers", "open_clip", "wandb", "hydra", "scipy", "sklearn", "matplotlib", "PIL",
    "huggingface_hub",
    "tokenizers", "gguf",
)  # fmt: skip


def imported(source: str, module: str) -> list[str]:
    """Dotted names that a module's source imports, wherever in it. `from a import b` is a.b."""
    names: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(module.split(".")[: -node.level]) if node.level else ""
            base = ".".join(filter(None, (package, node.module)))
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def allowed(module: str, name: str) -> bool:
    """Whether that module of ours may import that name."""
    ours, theirs = module.split(".")[0], name.split(".")[0]
    if ours == theirs:
        return True
    if theirs == "configs":
        return module.endswith("__main__")
    if ours == "plain_diffusion":
        return theirs in sys.stdlib_module_names
    if theirs not in LAYERS:
        return ours != "diffusion" or theirs in {
            "plain_diffusion",
            "torch",
            "numpy",
            *sys.stdlib_module_names,
        }
    if ours == "configs":  # which stands above all: only programs import it
        return True
    if LAYERS.index(theirs) > LAYERS.index(ours):
        return False
    return (
        (ours, theirs) != ("eval", "train")
        or name in OF_TRAIN
        or name.startswith(tuple(f"{module}." for module in OF_TRAIN))
    )


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name, packages as name.__init__."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_left(package: str) -> None:
    """No module imports a layer to its right; diffusion imports torch, numpy and the standard library only;
    lazy imports count."""
    found = {
        module: path.read_text() for module, path in modules().items() if module.split(".")[0] == package
    }
    assert f"{package}.__init__" in found
    assert [
        (module, name)
        for module, source in found.items()
        for name in imported(source, module)
        if not allowed(module, name)
    ] == []


@pytest.mark.parametrize(("folder", "others"), [("metrics", ()), ("images", ()), ("features", ())])
def test_the_ground_of_eval_stands_on_nothing_of_it(folder: str, others: tuple[str, ...]) -> None:
    """Metrics, sources of pictures and extractors import nothing else of eval, so that each can be read
    alone. What only annotations name does not count."""
    own = {
        module: path.read_text() for module, path in modules().items() if module.startswith(f"eval.{folder}.")
    }
    assert len(own) > 3
    names = [
        (module, name)
        for module, source in own.items()
        for name in imported(at_run_time(source), module)
        if name.startswith("eval.")
    ]
    assert [pair for pair in names if not pair[1].startswith((f"eval.{folder}.", *others))] == []


def test_data_stands_on_nothing_of_training_but_its_processes() -> None:
    """Evaluation reads it too: a picture's file needs no loop, objective or run."""
    own = {module: path.read_text() for module, path in modules().items() if module.startswith("train.data.")}
    names = [
        (module, name)
        for module, source in own.items()
        for name in imported(source, module)
        if name.startswith("train.")
    ]
    assert [pair for pair in names if not pair[1].startswith(("train.data.", "train.world."))] == []
    assert len(names) > 20


# What each room of models may import of the others. What only annotations name does not count.
ROOMS = {
    "layers": (),
    "networks": ("layers",),
    "files": ("layers",),
    "text": ("layers", "networks", "files"),
    "families": ("layers", "networks", "files", "text"),
    "layouts": ("layers", "networks", "files", "text", "families", "model"),
}


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_of_models_stand_on_each_other(room: str) -> None:
    """Layers know no network, files know no family, and a family's file knows nothing of the layouts that are
    made of it."""
    found = {
        module: path.read_text() for module, path in modules().items() if module.startswith(f"models.{room}.")
    }
    assert len(found) > 5
    names = {
        (module, name) for module, source in found.items() for name in imported(at_run_time(source), module)
    }
    rooms = tuple(f"models.{each}" for each in (room, *ROOMS[room]))
    assert [pair for pair in names if pair[1].startswith("models") and not pair[1].startswith(rooms)] == []


def at_run_time(source: str) -> str:
    """A module's source without what stands under `if TYPE_CHECKING:`."""
    tree = ast.parse(source)
    tree.body = [
        node
        for node in tree.body
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    return ast.unparse(tree)


@pytest.mark.parametrize(
    ("module", "source", "ok"),
    [
        (
            "diffusion.grid",
            "import math\nimport torch.nn\nfrom numpy import pi\nfrom diffusion.level import Level",
            True,
        ),
        ("diffusion.grid", "from .level import Level", True),
        ("diffusion.grid", "import scipy.stats", False),
        ("diffusion.grid", "import einops", False),
        ("diffusion.grid", "def f():\n    from models import UNet", False),
        ("plain_diffusion.packages", "import os\nfrom plain_diffusion.starting import program", True),
        ("plain_diffusion.packages", "import torch", False),
        ("plain_diffusion.packages", "from models import UNet", False),
        ("diffusion.grid", "import plain_diffusion", True),
        ("models.networks.unet", "import einops\nfrom diffusion import Schedule", True),
        ("models.networks.unet", "from samplers import sample", False),
        ("samplers.__main__", "import models, diffusion, configs", True),
        ("samplers.run", "import configs", False),
        ("samplers.run", "if TYPE_CHECKING:\n    import train.loop", False),
        ("train.loop", "import samplers, models, diffusion", True),
        ("train.loop", "from eval import Moments", False),
        ("eval.report", "from train.data import Batch\nimport train.data\nfrom samplers import sample", True),
        ("eval.report", "from train import data", True),
        ("eval.report", "from train.loop import Trainer", False),
        ("eval.report", "import train", False),
        ("eval.report", "from train.data_loader import x", False),
        ("configs.__init__", "import hydra", True),
        ("configs.__init__", "from diffusion import Schedule", True),
        ("diffusion.spec", "import configs", False),
        ("eval.features", "from ..train.loop import x", False),
    ],
)
def test_the_rule_itself(module: str, source: str, ok: bool) -> None:
    """Planted imports: those that the rule forbids are caught, the others are not."""
    assert all(allowed(module, name) for name in imported(source, module)) is ok


def test_the_core_survives_broken_optional_packages(tmp_path: Path) -> None:
    """`import diffusion, models` with each optional package replaced by one that raises as soon as it is
    imported."""
    for name in OPTIONAL:
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} is broken')\n")
    script = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
import diffusion, models
assert not sys.modules.keys() & set({OPTIONAL!r})
for name in {OPTIONAL!r}:  # the stubs do stand in the way
    try:
        __import__(name)
    except RuntimeError as error:
        assert str(error) == f"{{name}} is broken"
    else:
        raise AssertionError(name)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode == 0, run.stderr


def test_importing_reads_no_format_that_is_not_opened() -> None:
    """`import diffusion, models, samplers` leaves out other programs, files and pictures; `load`, formats
    that only some files are in; `eval.scoring`, the networks of extractors that are not built.
    """
    others = ["hydra", "pandas", "html", "train", "eval", "configs"]
    heavy = [*OPTIONAL, *others, "models.families", "models.layouts.load", "samplers.pictures"]
    networks = [
        "open_clip",
        "timm",
        "torchvision",
        "transformers",
        "sklearn",
        "scipy",
        "matplotlib",
        "wandb",
        "hydra",
        "torch._dynamo",
    ]
    formats = [
        "models.files.gguf_file",
        "models.files.pickle_file",
        "models.layouts.single_file",
        "models.layouts.diffusers_folder",
    ]
    script = f"""
import sys, diffusion, models, samplers
print([name for name in {heavy!r} if name in sys.modules])
models.load, models.save, samplers.read_image, samplers.read_mask, samplers.to_pil
print([name for name in {formats!r} if name in sys.modules])
from models import *
from samplers import *
print(load is models.load, save is models.save, to_pil is samplers.to_pil)
try:
    models.lode
except AttributeError as error:
    print(error)
import eval.scoring, eval.training
print([name for name in {networks!r} if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == (
        "[]\n[]\nTrue True True\nmodule 'models' has no attribute 'lode'\n[]\n",
        "",
    )
