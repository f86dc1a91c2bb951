"""Names from outside: own networks, samplers, ... from configurations, and never from files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from configs import compose
from diffusion import outside
from diffusion.spec import lookup, make_params
from eval.scoring import run as score
from eval.settings import ScoreParams
from models.layouts import native
from samplers import ddim, generate
from samplers.modes import draw_config
from samplers.pictures import read_settings
from train.data import digits
from train.run import run

MINE = """
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from diffusion import RectifiedFlow
from diffusion.guidance_rules import extrapolate
from diffusion.spacing import SPACINGS
from eval.features.custom import Custom
from eval.metrics.registry import Metric
from eval.metrics.figure import Figure
from models import NetworkParams, network_input
from samplers.solver import Step
from train.data import TensorData
from train.density import DENSITIES
from train.run import OBJECTIVES
from train.weighting import WEIGHTINGS


@dataclass(frozen=True)
class TinyParams(NetworkParams):
    in_channels: int = 1
    out_channels: int = 1
    num_classes: int | None = 10
    width: int = 8
    time_factor: float | None = None


class Tiny(nn.Module):
    def __init__(self, params: TinyParams) -> None:
        super().__init__()
        self.params = params
        self.label = nn.Embedding(params.num_classes + 1, params.width)
        self.conv_in = nn.Conv2d(params.in_channels, params.width, 3, padding=1)
        self.conv_out = nn.Conv2d(params.width, params.out_channels, 3, padding=1)

    def forward(self, x, t, condition):
        h = self.conv_in(network_input(x, condition, self.params))
        return self.conv_out((h + self.label(condition.label)[:, :, None, None]).sin())


class Forgetful(nn.Module):
    def __init__(self, params: TinyParams) -> None:
        super().__init__()


def alternate(denoiser, x, grid, *, damp: float = 1.0):
    for i, (t, s) in enumerate(pairwise(grid)):
        estimate = denoiser(x, t)
        x = damp * estimate.at(s)
        yield Step(i, s, x, estimate)


def spaced(schedule, steps, t_start, t_end, *, power: float = 1.0):
    return SPACINGS["linspace"](schedule, steps, t_start, t_end)


def schedule():
    return RectifiedFlow()


def rule(): return extrapolate


def digits(rows: int = 32):
    return TensorData(torch.randn(rows, 1, 8, 8), torch.arange(rows) % 10, 10)


def mean_of_rows(evidence):
    return Figure(float(evidence.rows.mean()))


brightness = Metric("Brightness", ("features", ""), "rows", "neither", mean_of_rows, needs=())


def pixels():
    def prepare(pictures):
        return torch.stack([picture.float().mean(0) / 255 for picture in pictures])

    return Custom(
        lambda x: x.flatten(1), name="pixels", prepared="grey", width=64, prepare=prepare, weights="none"
    )


density, weighting, objective = DENSITIES["uniform"], WEIGHTINGS["uniform"], OBJECTIVES["denoising"]
"""
DIT: dict[str, Any] = {
    "network": {"name": "dit", "depth": 1, "hidden": 16, "heads": 1},
    "schedule": {"name": "flow"},
    "prediction": "flow",
}
OWN = (
    "data={name: mine:digits, rows: 16}",
    "model={network: {name: mine:Tiny, width: 4}, schedule: {name: mine:schedule}, prediction: flow, "
    "shape: [1, 8, 8]}",
    "objective={name: mine:objective, density: {name: mine:density}, weighting: {name: mine:weighting}}",
    *("train.steps=2", "train.warmup=1", "train.batch_size=4", "wandb=false", "progress=false", "device=cpu"),
)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of one's own, which nothing has imported or trusted yet."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(outside, "_trusted", set())
    monkeypatch.setattr(outside, "_known", {})
    yield tmp_path
    sys.modules.pop("mine", None)


def forget() -> None:
    """As in a new process."""
    outside._trusted.clear()
    outside._known.clear()
    sys.modules.pop("mine", None)


def test_everything_from_outside_in_a_run_and_back(mine: Path) -> None:
    """Data, network, schedule, objective, density and weighting train; sampler, spacing and rule draw; the
    picture repeats itself."""
    folder = mine / "run"
    assert run(compose("train", [*OWN, f"run={folder}"]))
    forget()
    draw = [
        f"run={folder}",
        "trust=true",
        "sampler=mine:alternate",
        "+options.damp=0.9",
        "grid.spacing=mine:spaced",
        "+grid.power=2.0",
    ]
    draw += ["guidance=2.0", "guide.rule={name: mine:rule}", "steps=3", "n=2", "progress=false", "device=cpu"]
    (out, (image, _)), _ = draw_config(compose("samplers", draw))
    assert out.name.startswith("mine.alternate-3-guidance-2-rule-mine-rule-spacing-mine-spaced-power-2.0")
    assert read_settings(image)["sampler"] == "mine:alternate"
    forget()
    with pytest.raises(ValueError, match=r"no schedule named 'mine:schedule'; .*trust=true"):
        draw_config({"from": str(image)})
    assert "mine" not in sys.modules
    with pytest.raises(ValueError, match=r"no \w+( \w+)? named 'mine:\w+'; it is your own code"):
        draw_config({"from": str(image), "trust": True})
    assert outside._known.keys() == {("network", "mine:Tiny"), ("schedule", "mine:schedule")}  # the model's
    own: dict[str, Any] = {"sampler": "mine:alternate", "guide": {"rule": {"name": "mine:rule"}}}
    own["grid"] = {"spacing": "mine:spaced", "power": 2.0}
    assert "the same" in draw_config({"from": str(image), "trust": True, "progress": False, **own})[1]


def test_scores_of_an_own_metric_and_extractor(mine: Path) -> None:
    """Both by name from a configuration: the mean of all pixels is what they are."""
    data = digits("held_out")
    given = [
        "samples={name: digits, split: held_out}",
        "metric=[mine:brightness]",
        "features=mine:pixels",
        f"out={mine / 'score.json'}",
    ]
    written = score(compose("eval", [*given, "progress=false", "device=cpu"]))
    assert written is not None
    figure = written.result.figures["mine:brightness"]
    assert figure.value == pytest.approx(float(data.images.add(1).div(2).mean()), abs=2e-3)
    assert figure.basis["extractor"]["network"] == "pixels"
    forget()
    with pytest.raises(ValueError, match="no metric named 'mine:brightness'; it is your own code"):
        make_params("", ScoreParams, {"samples": "x", "metric": ["mine:brightness"]})


def test_files_with_an_own_network(mine: Path) -> None:
    """Loaded with the class, or with the name in the file once the caller trusts it; and not imported
    otherwise."""
    import mine as module  # type: ignore[import-not-found]

    model = models.build(
        {"network": {"name": module.Tiny, "width": 4}, "schedule": {"name": "flow"}, "prediction": "flow"}
    )
    assert model.spec["network"]["name"] == "mine:Tiny"
    models.save(model, mine / "model.safetensors")
    forget()
    with pytest.raises(ValueError, match=r"no network named 'mine:Tiny'; .*trust=true"):
        models.load(mine / "model.safetensors")
    assert "mine" not in sys.modules
    loaded = models.load(mine / "model.safetensors", trust=True)
    import mine as module

    assert type(loaded.network) is module.Tiny
    assert loaded.fingerprint == model.fingerprint
    forget()
    assert type(models.load(mine / "model.safetensors", network=module.Tiny).network) is module.Tiny
    models.save(models.build(DIT), mine / "dit.safetensors")
    with pytest.raises(ValueError, match=r"leave network=\.\.\. out"):
        models.load(mine / "dit.safetensors", network=module.Tiny)


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": {"name": "mine:schedule"}},
        {"prediction": "mine:rule"},
        {"grid": {"spacing": "mine:spaced"}},
        {"network": {"name": "mine:Tiny"}},
        {"sampling": {"sampler": "mine:alternate"}, "shape": [4, 8, 8]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_file_has_no_name_followed(change: dict[str, Any], mine: Path) -> None:
    """None that it names, whatever for: the module is not imported."""
    native.write(mine / "file.safetensors", models.build(DIT).state_dict(), {"model": {**DIT, **change}})
    with pytest.raises(ValueError, match=r"no \w+ named 'mine:"):
        draw_config({"run": str(mine / "file.safetensors"), "n": 1, "steps": 2})
    assert "mine" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine:other", "cannot be imported: AttributeError: module 'mine' has no attribute 'other'"),
        ("nowhere:f", "cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("broken:f", "cannot be imported: ZeroDivisionError"),
        ("mine", "no network named 'mine'; known"),
        ("mine:alternate", "must be an nn.Module that is built from one dataclass"),
        ("mine:Forgetful", "must keep its parameters: self.params = params"),
    ],
)
def test_mistakes_in_a_line(mine: Path, name: str, message: str) -> None:
    (mine / "broken.py").write_text("1 / 0")
    outside.trust({"model": {"network": [name]}})
    with pytest.raises(ValueError, match=message) as error:
        models.build({"network": {"name": name}, "schedule": {"name": "flow"}, "prediction": "flow"})
    assert "\n" not in str(error.value)


def test_entry_points_of_installed_packages(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a name of their own, in a group per kind; as trusted as other names, no more."""
    site = mine / "plugin-1.0.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (site / "entry_points.txt").write_text("[plain_diffusion.sampler]\nzigzag = mine:alternate\n")
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="no sampler named 'zigzag'"):
        lookup("sampler", "zigzag", {})
    outside.trust("zigzag")
    assert lookup("sampler", "zigzag", dict[str, Any]()).__name__ == "alternate"
    with pytest.raises(ValueError, match="no guidance rule named 'zigzag'"):
        lookup("guidance rule", "zigzag", {"none": None})


def test_own_experiments(mine: Path) -> None:
    """A file of one's own, which builds on another beside it or on one of this library's; a mapping with a
    name replaces a section."""
    (mine / "base.yaml").write_text("train: {steps: 3}\n")
    (mine / "own.yaml").write_text("# @package _global_\ndefaults: [digits_unet, base, _self_]\nrun: here\n")
    network = "model.network={name: mine:Tiny, width: 4}"
    config = compose("train", [f"experiment={mine / 'own.yaml'}", network])
    assert (config["run"], config["train"]["steps"], config["data"]["name"]) == ("here", 3, "digits")
    assert config["model"]["network"] == {"name": "mine:Tiny", "width": 4}
    assert compose("train", [f"experiment={mine / 'own'}"])["train"]["steps"] == 3
    (mine / "digits_unet.yaml").write_text("run: there\n")
    (mine / "bad.yaml").write_text("a: [\n")
    for name, message in (
        ("none.yaml", "no such experiment"),
        ("digits_unet", "another name"),
        ("bad.yaml", "cannot be read as YAML"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            compose("train", [f"experiment={mine / name}"])


def test_a_section_with_a_name_is_another(mine: Path) -> None:
    """In a file as on the command line: nothing stays of the network that the base describes, and one without
    a name changes the base's. Other programs do not know these experiments."""
    network, data = {"name": "dit", "depth": 1}, {"name": "folder", "folder": "x"}
    section = f"model: {{network: {network}}}\ndata: {data}\n"
    (mine / "dit.yaml").write_text(f"defaults: [digits_unet]\n{section}train: {{steps: 3}}\n")
    (mine / "deep.yaml").write_text("defaults: [_self_, dit]\nmodel: {network: {name: unet, heads: 7}}\n")
    (mine / "wide.yaml").write_text("defaults: [dit, _self_]\nmodel: {network: {hidden: 8}}\nrun: r\n")
    base, changed, wide, deep = (
        compose("train", [f"experiment={name}"])
        for name in ("digits_unet", mine / "dit", mine / "wide", mine / "deep")
    )
    same = {"model": {**base["model"], "network": network}, "data": data}
    assert changed == {**base, **same, "train": {**base["train"], "steps": 3}}
    assert deep == changed
    assert wide["model"] == {**base["model"], "network": {**network, "hidden": 8}}
    with pytest.raises(ValueError, match="no experiment named 'wide'"):
        compose("eval", ["experiment=wide"])


def test_a_prediction_with_settings(tmp_path: Path) -> None:
    """EDM's for data of another standard deviation: trained, saved, loaded; layouts that cannot say it
    refuse."""
    network = "{name: dit, in_channels: 1, image_size: 8, depth: 1, hidden: 16, heads: 1, num_classes: 10}"
    model = (
        f"{{network: {network}, schedule: {{name: ve}}, prediction: {{name: edm, sigma_data: 0.25}}, shape: "
        f"[1, 8, 8]}}"
    )
    objective = "objective={name: denoising, weighting: {name: uniform}}"
    assert run(
        compose(
            "train",
            [
                f"model={model}",
                objective,
                "data={name: digits, split: train}",
                f"run={tmp_path / 'run'}",
                *OWN[3:],
            ],
        )
    )
    loaded = models.load(tmp_path / "run")
    level = loaded.schedule.level(0.5)
    assert loaded.prediction.input_scale is not None
    assert loaded.prediction.input_scale(level) == (0.5**2 + 0.25**2) ** -0.5
    models.save(loaded, tmp_path / "copy.safetensors")
    assert models.load(tmp_path / "copy.safetensors").prediction.name == "edm, sigma_data=0.25"
    playground = models.miniature("playground-v2.5")
    playground.spec["prediction"], playground.prediction = (
        {"name": "edm", "sigma_data": 0.25},
        loaded.prediction,
    )
    for layout in ("ldm", "diffusers"):
        with pytest.raises(ValueError, match=r"sigma_data=0\.25"):
            models.save(playground, tmp_path / f"{layout}.safetensors", layout=layout)
    with pytest.raises(ValueError, match="sigma_data is a standard deviation, above 0"):
        models.build({**loaded.spec, "prediction": {"name": "edm", "sigma_data": -1.0}})


def test_generate_takes_a_solver_itself() -> None:
    """Python code passes the function, and needs no name for it."""
    model = models.miniature("sd1")
    drawn = [
        generate(model, "a cat", sampler=sampler, steps=2, height=64, width=64, eta=0.5)
        for sampler in ("ddim", ddim)
    ]
    assert torch.equal(*drawn)
    with pytest.raises(ValueError, match="no option of ddim named 'churn'"):
        generate(model, "a cat", sampler=ddim, steps=2, churn=0.5)


def test_torch_is_not_needed_to_trust() -> None:
    """Texts in any plain values; what is none is passed over."""
    assert set(outside._texts({"a": ["x", {"b": ("y", 3)}], "c": torch.zeros(1)})) == {"x", "y"}
