"""What training writes into a model's description, and what it warns of: settings that cannot do what they
say."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import models
from diffusion import CosineVP, DiscreteVP, RectifiedFlow, Schedule, VarianceExploding
from models import Model
from models.layouts import native
from samplers.pictures import read_settings
from samplers.run import SampleParams, label_cycle
from samplers.run import run as sample_run
from train import TrainParams, train
from train.data import TensorData
from train.density import Density, LogitNormal, LogNormal, Uniform, usual
from train.objective import DenoisingObjective
from train.state import require_same
from train.weighting import min_snr, uniform

NETWORK = {
    "name": "dit",
    "in_channels": 1,
    "image_size": 8,
    "hidden": 16,
    "depth": 1,
    "heads": 2,
    "num_classes": 3,
}
QUICK: dict[str, Any] = dict(steps=2, batch_size=4, warmup=0, log_every=1, save_every=2)


def fresh(**network: Any) -> Model:
    return models.build(
        {"network": {**NETWORK, **network}, "schedule": {"name": "flow"}, "prediction": "flow"}
    )


def data(classes: list[str] | None = None) -> TensorData:
    found = TensorData(torch.zeros(6, 1, 8, 8), torch.arange(6) % 3)
    if classes:
        found.classes = classes  # type: ignore[attr-defined]  # as a folder of images has them
    return found


def go(
    folder: Path, model: Model | None = None, drop: float = 0.1, of: TensorData | None = None, **params: Any
) -> Model:
    model = model or fresh()
    objective = DenoisingObjective(
        model.schedule, model.prediction, Uniform(model.schedule), uniform, model.null, drop
    )
    train(model, objective, of or data(), TrainParams(**{**QUICK, **params}), folder, progress=False)
    return model


def test_a_trained_model_says_what_it_was_trained_on(tmp_path: Path) -> None:
    """From Python as by the program: the shape to sample, the classes by name, the share without a label; and
    it can be sampled so."""
    go(tmp_path, of=data(["cat", "dog", "2"]))
    model = models.load(tmp_path)
    assert (model.spec["shape"], model.spec["classes"], model.spec["drop"]) == (
        [1, 8, 8],
        ["cat", "dog", "2"],
        0.1,
    )
    out = sample_run(
        {"run": str(tmp_path), "labels": ["dog", 0], "n": 2, "steps": 1, "device": "cpu", "progress": False}
    )
    kept = [read_settings(path) for path in (out / "images/1/000000.png", out / "images/0/000001.png")]
    assert [(each["labels"], each["class"]) for each in kept] == [(1, "dog"), (0, "cat")]


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [("cat", [0]), (("dog", "cat", 2), [1, 0, 2]), (None, [0, 1, 2]), ("2", [2]), (2, [2])],
)
def test_labels_are_names_or_numbers(labels: Any, numbers: list[int]) -> None:
    """A text is a name, also one of digits; a number is a number."""
    model = fresh()
    model.spec["classes"] = ["cat", "dog", "2"]
    assert label_cycle(model, SampleParams(run="x", labels=labels)) == numbers


def test_labels_that_are_not_there() -> None:
    """The nearest name is said; a model without names takes numbers; a number that is another class's name is
    warned of."""
    model = fresh()
    with pytest.raises(ValueError, match="these classes have no names: labels are 0 to 2, not 'cat'"):
        label_cycle(model, SampleParams(run="x", labels="cat"))
    model.spec["classes"] = ["1", "2", "golden retriever"]
    with pytest.raises(
        ValueError, match=r"no class named 'goldn retriever'; did you mean 'golden retriever'"
    ):
        label_cycle(model, SampleParams(run="x", labels="goldn retriever"))
    with pytest.warns(UserWarning, match=r"label 1 is class number 1, '2'; labels=\['1'\] means its name"):
        assert label_cycle(model, SampleParams(run="x", labels=1)) == [1]


def test_other_classes_are_said(tmp_path: Path) -> None:
    """A model that is trained further on classes of other names."""
    model = go(tmp_path / "a", of=data(["a", "b", "c"]))
    with pytest.warns(UserWarning, match="the model's classes were a, b, c; from now on they are b, c, d"):
        go(tmp_path / "b", model, of=data(["b", "c", "d"]))
    assert models.load(tmp_path / "b").spec["classes"] == ["b", "c", "d"]


def test_guidance_on_a_model_that_was_never_without_a_label(tmp_path: Path) -> None:
    """It is warned of, where the description says so, and not at guidance 1."""
    settings = {"run": str(tmp_path), "n": 1, "steps": 1, "device": "cpu", "progress": False}
    go(tmp_path, drop=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_run(settings)
    with pytest.warns(UserWarning, match="guidance=2 .* trained with drop=0"):
        sample_run({**settings, "guidance": 2.0})


def test_a_model_that_nothing_could_load_is_not_trained(tmp_path: Path) -> None:
    """Before the first step, and nothing is written."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)

    for model in (replace(fresh(), backbone=Own()), replace(fresh(), spec={})):
        with pytest.raises(ValueError, match=r"could not be loaded again.*: make it with models\.build"):
            go(tmp_path / "run", model)
    assert not (tmp_path / "run").exists()


def test_a_network_that_was_changed_is_not_trained(tmp_path: Path) -> None:
    """Its files would hold what its description does not make."""
    longer, other = fresh(), fresh()
    longer.network.extra = nn.Linear(2, 2)
    name = next(
        name for name, layer in other.network.named_children() if any(True for _ in layer.parameters())
    )
    setattr(other.network, name, nn.Identity())
    for model in (longer, other):
        with pytest.raises(
            ValueError,
            match=r"could not be loaded again: its description makes another .*: make it with "
            r"models\.build",
        ):
            go(tmp_path / "run", model)
    unknown = fresh()
    unknown.spec["mine"] = 1
    with pytest.raises(ValueError, match=r"could not be loaded again .*mine"):
        go(tmp_path / "run", unknown)
    assert not (tmp_path / "run").exists()


def test_a_description_of_a_part_that_is_not_there_is_enough(tmp_path: Path) -> None:
    """The run goes on, also from a checkpoint of an earlier version, which described such parts; not with the
    part."""
    taesd = models.miniature("sd1").spec["preview"]

    def go_on(steps: int, model: Model) -> None:
        objective = DenoisingObjective(
            model.schedule, model.prediction, Uniform(model.schedule), uniform, model.null
        )
        train(
            model,
            objective,
            data(),
            TrainParams(**{**QUICK, "steps": steps}),
            tmp_path,
            resume=True,
            progress=False,
        )

    def lacking() -> Model:
        return replace(fresh(), spec={**fresh().spec, "preview": taesd})

    for steps in (1, 2):
        go_on(steps, lacking())
    tensors, metadata = native.verify(tmp_path)
    assert "preview" not in metadata["model"]
    metadata["model"]["preview"] = taesd
    native.write(
        tmp_path / native.FILE_NAME, tensors, {**metadata, "checksum": native.checksum(tensors, metadata)}
    )
    go_on(3, lacking())
    assert models.load(tmp_path).preview is None
    with pytest.raises(ValueError, match="was trained with preview=None, not"):
        go_on(4, models.build({**fresh().spec, "preview": taesd}))


def test_settings_that_differ_are_told_shortly() -> None:
    """However much they hold: a line says how both begin."""
    vast = {f"setting {i} {'x' * 60}": list(range(50)) for i in range(50)}
    for saved, given in ((vast, None), ("b" * 900, vast), (None, [vast] * 12)):
        with pytest.raises(
            ValueError, match=r"^run was trained with part=.+, not .+: use that to resume it, or"
        ) as refusal:
            require_same(Path("run"), {"part": saved}, {"part": given})
        assert len(str(refusal.value)) < 400


def test_a_condition_without_a_null_value_is_not_silently_kept(tmp_path: Path) -> None:
    """drop needs a null value of every condition; without one it must be 0."""
    model = fresh()
    objective = DenoisingObjective(model.schedule, model.prediction, Uniform(model.schedule), uniform)
    with pytest.raises(
        ValueError, match=r"objective.drop=0.1 needs a null value of 'label' .* null=model\.null, or drop=0"
    ):
        train(model, objective, data(), TrainParams(**QUICK), tmp_path, progress=False)
    without = DenoisingObjective(model.schedule, model.prediction, Uniform(model.schedule), uniform, drop=0.0)
    assert train(fresh(), without, data(), TrainParams(**QUICK), tmp_path / "b", progress=False)


def test_a_warm_up_longer_than_the_run_is_said(tmp_path: Path) -> None:
    """And the run goes on, with the learning rate that the warm-up reaches."""
    with pytest.warns(
        UserWarning,
        match=r"train.warmup=8 is as long as the run of 2 steps, or longer: the learning rate only rises, "
        r"to 25% of",
    ) as said:
        go(tmp_path, warmup=8)
    assert said[0].filename == __file__


def test_an_evaluation_that_is_never_asked_for(tmp_path: Path) -> None:
    """Is warned of too; and a run of which nothing is to be said is silent."""
    model = fresh()
    objective = DenoisingObjective(
        model.schedule, model.prediction, Uniform(model.schedule), uniform, model.null
    )
    with pytest.warns(UserWarning, match="evaluate is given, but train.evaluate_every=0"):
        train(
            model,
            objective,
            data(),
            TrainParams(**QUICK),
            tmp_path / "a",
            evaluate=lambda model: {},
            progress=False,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        go(tmp_path / "b", warmup=1)


VE, FLOW = VarianceExploding(), RectifiedFlow()


@pytest.mark.parametrize(
    "density",
    [
        *(usual(schedule) for schedule in (VE, FLOW, CosineVP(), DiscreteVP.cosine(),
            DiscreteVP.scaled_linear())),
        LogitNormal(FLOW), LogitNormal(FLOW, std=0.5), LogitNormal(FLOW, shift=3.0), LogNormal(VE),
    ],
)  # fmt: skip
def test_usual_densities_see_all_times(density: Density) -> None:
    assert density.gaps() == ""


@pytest.mark.parametrize(
    ("density", "where"),
    [
        (LogitNormal(FLOW, std=0.1), "below t=0.408 and above t=0.592"),  # sigmoid(0.1 * 3.719)
        (LogitNormal(FLOW, mean=4.0), "below t=0.57"),
        (LogNormal(VE, mean=-4.0, std=0.5), "above t=0.118"),  # exp(-4 + 0.5 * 3.719)
    ],
)
def test_times_that_are_hardly_trained_are_said(density: Density, where: str) -> None:
    """Fewer than 1 of 10,000 samples beyond them."""
    assert f"fewer than 1 of 10,000 samples {where}" in density.gaps()


@pytest.mark.parametrize("schedule", [FLOW, VE])
def test_values_that_train_nothing_are_refused(schedule: Schedule) -> None:
    """A density of one time, and a weighting of nothing."""
    with pytest.raises(ValueError, match="std of a density must be greater than 0"):
        (LogNormal if schedule is VE else LogitNormal)(schedule, std=0.0)
    with pytest.raises(ValueError, match="gamma of min_snr must be greater than 0"):
        min_snr(0.0)
