"""The Python of README and docs/ runs as it stands, and the files they name are there."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import models
import train
from configs import compose
from diffusion import SPACINGS
from models.families import table
from samplers import SAMPLERS
from samplers.modes import draw_config
from samplers.pictures import save_png
from tests.peers import k_sampling

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("diffusion", "models", "samplers", "train", "eval", "configs", "tests")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models where `make quickstart` leaves its DiT and where SDXL's and FLUX.1's files would lie, and
    pictures to score."""
    folder = tmp_path_factory.mktemp("readme")
    network = {
        "name": "dit",
        "in_channels": 1,
        "image_size": 8,
        "hidden": 16,
        "depth": 1,
        "heads": 2,
        "num_classes": 10,
    }
    model = models.build(
        {"network": network, "schedule": {"name": "flow"}, "prediction": "flow", "shape": [1, 8, 8]}
    )
    for p in model.network.parameters():
        nn.init.normal_(p, std=0.1)
    models.save(model, folder / "runs" / "quickstart" / "dit" / "checkpoint.safetensors")
    models.save(models.miniature("sdxl"), folder / "sd_xl_base_1.0.safetensors", layout="ldm")
    models.save(models.miniature("flux-dev"), folder, layout="separate")
    for name, published in {"flux-dev": "flux1-dev", "vae": "ae"}.items():
        (folder / f"{name}.safetensors").rename(folder / f"{published}.safetensors")
    for i, picture in enumerate(torch.rand(20, 1, 8, 8)):
        (folder / ("samples", "reference")[i % 2]).mkdir(exist_ok=True)
        save_png(picture, folder / ("samples", "reference")[i % 2] / f"{i}.png", low=0.0)
    return folder


def run_blocks(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that a page's Python leaves, run block by block with fewer steps."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        if block.startswith("# mine.py"):  # a file, and no line to type
            continue
        block = block.replace(
            'memory="6GB"', 'memory="60GB"'
        )  # a process that has run other tests has more in memory than that
        exec(compile(re.sub(r"steps=(30|28)", "steps=1, height=128, width=128", block), page, "exec"), names)
    return names


def test_the_readme_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run_blocks("README.md", folder, monkeypatch)
    assert names["x0"].shape == (10, 1, 8, 8)
    *solvers, distance = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in solvers] == ["ddim", "heun", "dpm2", "dpmpp_2m", "unipc", "rk4"]
    assert all(float(line.split()[-1]) < 0.1 for line in solvers)
    assert float(distance) > 0


def test_parts_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's module and experiment: trained, sampled and opened again as its lines say, in fewer
    steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (module,) = re.findall(r"```python\n(# mine.py\n.*?)```", README, re.DOTALL)
    (experiment,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.py").write_text(module)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(experiment)
    lines = re.findall(r"    plain-diffusion (.*mine.*)", README)
    by_line, draw, by_file = (shlex.split(line, comments=True)[1:] for line in lines)
    few = [
        "train.steps=2",
        "train.warmup=1",
        "train.batch_size=4",
        "wandb=false",
        "progress=false",
        "device=cpu",
    ]
    assert train.run(compose("train", [*by_line, *few]))
    assert train.run(compose("train", [*by_file, *few]))
    network = importlib.import_module("mine").Tiny
    assert models.load("runs/mine", network=network).spec["network"] == {"name": "mine:Tiny", "width": 64}
    assert models.load("runs/wide").spec["network"]["channels"] == 64
    assert draw_config(compose("samplers", [*draw, "n=1", "steps=2", "progress=false", "device=cpu"]))


def test_sampling_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_blocks("docs/sampling.md", folder, monkeypatch)
    assert names["step"].x.shape == names["completed"].shape == (10, 1, 8, 8)
    assert (names["step"].x - names["x0"]).abs().max() < 1e-5  # both blocks sample the same digits


def test_models_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stem = "lora_unet_input_blocks_1_0_in_layers_2"
    for name in ("style", "lcm"):
        lora = {
            f"{stem}.lora_down.weight": torch.ones(2, 64, 3, 3),
            f"{stem}.lora_up.weight": torch.ones(64, 2, 1, 1),
        }
        save_file(lora, folder / f"{name}.safetensors")
    names = run_blocks("docs/models.md", folder, monkeypatch)
    assert names["images"].shape == (1, 3, 128, 128)
    assert (folder / "sdxl" / "model_index.json").exists()
    assert names["styled"].fingerprint != names["softer"].fingerprint != names["base"].fingerprint


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    """Links and pictures, and the files of the table of papers."""
    text = page.read_text()
    for link in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:diffusion|models|samplers|train|eval|notebooks)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path


def test_names_of_the_peers() -> None:
    """What docs/names.md calls by name is there; and it has every sampler and spacing of ours."""
    text = (ROOT / "docs" / "names.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    ours = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert ours >= {*SAMPLERS, *SPACINGS}
    theirs = set(re.findall(r"\b\w+(?:Scheduler|Transformer2DModel)\b", text)) - {
        "SDTurboScheduler",
        "AlignYourStepsScheduler",
    }
    assert len(theirs) >= 20
    assert theirs - set(dir(diffusers)) == set()
    assert set(re.findall(r"`((?:sample|get_sigmas)_\w+)`", text)) - set(dir(k_sampling())) == set()


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/paper_to_code.md"])
def test_what_a_page_names_in_files_is_there(page: str) -> None:
    """Of `file.py: NAME`, both."""
    sources = {
        path: path.read_text() for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in FOLDERS
    }
    named = re.findall(r"`([\w/]+\.py): (\w+)`", (ROOT / page).read_text())
    assert len(named) > 5
    for place, name in named:
        found = [text for path, text in sources.items() if path.as_posix().endswith(f"/{place}")]
        assert any(re.search(rf"^(def |class )?{name}\b", text, re.MULTILINE) for text in found), (
            f"{place}: {name}"
        )


def test_its_table_of_families_is_that_of_the_library() -> None:
    assert table() in README, "put what `plain-diffusion models families` prints into the README"
