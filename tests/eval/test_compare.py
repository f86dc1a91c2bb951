"""Many rows at once: which rows a configuration asks for, what samples are judged by, and the quickstart on
models of a few steps."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import configs
import models
from diffusion import APG, ClassifierFreeGuidance, Clipped, Condition, interval
from eval import (
    Figure,
    Moments,
    compare,
    frechet_distance,
    kernel_distance,
    memorised,
    nearest_distance,
    scoring,
)
from eval.compare import map_in_threads, read_rows
from eval.features.digits import train_classifier
from eval.images.open import open_source
from eval.images.subset import equal_parts, proportional_classes
from eval.metrics.jackknife import mean_of, student_quantile
from eval.metrics.registry import METRICS, Metric
from eval.results import Result, Scored, read_result
from eval.settings import CompareParams, NamedModel
from eval.targets import Target, TargetParams, check_rows, evaluate
from models.files.text import read_json
from samplers import sample
from samplers.pictures import to_uint8
from train import run
from train.data import digits

DIGITS = [str(label) for label in digits("held_out").__getitems__(range(539))["label"].tolist()]
FEW: dict[str, Any] = {"name": "digits", "held_out": 0.95}  # what a judge learns from in no time
SCORE: dict[str, Any] = {
    "metric": ["frechet", "kernel", "accuracy", "nearest", "memorised"], "features": "digits",
    "neighbours": "digits.pixels",
    "extractors": {"digits": FEW}, "reference": {"name": "digits", "split": "held_out", "exact": True},
    "training": {"name": "digits", "split": "train", "exact": True}, "classes": "reference",
    "batch_size": 1000, "progress": False,
    "device": "cpu",
}  # fmt: skip


# Rows, targets ----------------------------------------------------------------------------------------------


def params(*rows: dict[str, Any], **more: Any) -> CompareParams:
    named = {"a": NamedModel("A net", "runs/a"), "b": NamedModel("B net", "runs/b")}
    texts: dict[str, Any] = {"out": "out", "title": "title", "summary": "summary"}
    return CompareParams(**texts, score={"metric": "frechet"}, rows=rows, n=10, models=named, **more)


def test_lists_are_multiplied_out() -> None:
    """Every combination of sampler, steps and guidance is a row; what is not a list stands for itself;
    pictures are as many as the parts need; settings of all rows are in each, and a row's own come first.
    """
    rows = read_rows(
        params(
            {
                "model": "a",
                "sampler": ["ddpm", "ddim"],
                "steps": [5, 10],
                "guidance": [1.0, 2.0],
                "guide": {"zero_from": 0.9},
            },
            {"model": "b", "sampler": "euler", "steps": 1, "parts": 3, "name": "B, else"},
            {
                "name": "real",
                "samples": {"name": "digits"},
                "n": None,
                "role": "held_out",
                "metric": "accuracy",
            },
        )
    )
    assert list(rows)[:3] == [
        "A net, ddpm, 5 steps",
        "A net, ddpm, 10 steps",
        "A net, ddpm, 5 steps, guidance 2",
    ]
    assert len(rows) == 10
    guided = rows["A net, ddim, 10 steps, guidance 2"]
    drawn = {
        "run": "runs/a",
        "sampler": "ddim",
        "steps": 10,
        "guidance": 2.0,
        "guide": {"zero_from": 0.9},
        "n": 10,
    }
    assert (guided["samples"], guided["model"], guided["metric"]) == (drawn, "A net", "frechet")
    assert rows["B, else, euler, 1 step"]["samples"]["n"] == 30
    assert (rows["real"]["samples"], rows["real"]["metric"]) == ({"name": "digits"}, "accuracy")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"model": "c", "sampler": "ddim"}, "no model named 'c'"),
        ({"name": "x"}, "a row needs a name and samples, or a model, not only name"),
        (
            {"model": "a", "sampler": "ddim", "steps": [5, 5]},
            "two rows named 'A net, ddim, 5 steps'",
        ),
    ],
)
def test_rows_that_do_not_fit_are_refused(row: dict[str, Any], message: str) -> None:
    """In one line."""
    with pytest.raises(ValueError, match=message):
        read_rows(params(row))


def result(name: str, value: float, **extra: float) -> Result:
    return Result(name, {"frechet": Scored(value, "lower", 10, {}, extra=extra)}, {})


@pytest.mark.parametrize(
    ("limits", "value", "met"),
    [
        ({"at_most": 1.3}, 3.0, False), ({"at_most": 3.0}, 3.0, True), ({"at_least": 3.1}, 3.0, False),
        ({"at_least": 2.9}, 3.0, True),
        ({"at_most": 1.5, "over": "b"}, 1.5, True), ({"at_most": 1.4, "over": "b"}, 1.5, False),
        ({"at_most": 9.0}, math.nan, False),
        ({"at_least": 0.0}, math.nan, False),
    ],
)  # fmt: skip
def test_a_target_is_met_within_its_limit(limits: dict[str, Any], value: float, met: bool) -> None:
    """By the figure or by its ratio; what is no number meets nothing."""
    results = {"a": result("a", math.nan if math.isnan(value) else 3.0), "b": result("b", 2.0, std=0.25)}
    target = evaluate(TargetParams("t", "frechet", "a", **limits), results)
    assert (target.met, target.note) == (met, "3.000 against 2.000 ± 0.250" if "over" in limits else "")
    assert target.value == value or math.isnan(value)
    assert json.loads(json.dumps(target.to_json(), allow_nan=False))["met"] is met


def test_targets_that_cannot_be_judged_are_refused() -> None:
    """Two limits or none, a row that is not there, a row without the figure."""
    both: dict[str, Any] = {"at_most": 1.0, "at_least": 0.0}
    for limits in ({}, both):
        with pytest.raises(ValueError, match="the target 't' needs one limit: at_most or at_least"):
            TargetParams("t", "frechet", "a", **limits)
    with pytest.raises(ValueError, match="the target 't' needs the row 'b': add it to rows"):
        check_rows([TargetParams("t", "frechet", "a", "b", 1.0)], ["a"])
    with pytest.raises(ValueError, match="no figure of a named 'kernel'"):
        evaluate(TargetParams("t", "kernel", "a", at_most=1.0), {"a": result("a", 1.0)})
    assert Target("t", 1.0, 1.0, True).met


# Parts and classes ------------------------------------------------------------------------------------------


def test_the_mean_over_parts_and_its_interval() -> None:
    """Student's interval of a mean, the standard deviation beside it, within the metric's bounds; of one
    part, its own figure."""
    parts = [Figure(value, value - 1, value + 1, {"error": value}) for value in (1.0, 2.0, 3.0)]
    found, half = mean_of(parts), student_quantile(0.975, 2) / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - half, 2 + half))
    assert found.extra == {"error": 2.0, "std": 1.0, "parts": 3.0}
    assert mean_of(parts[:1]) is parts[0]
    waiting = iter(parts)
    bounded = Metric("t", ("features", ""), "rows", "lower", lambda _: next(waiting), bounds=(0.0, 3.5))
    within: Any = [None] * 3
    assert (bounded.figure(within).low, METRICS["frechet"].bounds[0]) == (0.0, 0.0)


def test_samples_show_classes_as_often_as_the_reference_does() -> None:
    """To within one picture per class, whatever their number; all of them are the reference's labels
    themselves, mixed."""
    share = torch.tensor([DIGITS.count(str(k)) for k in range(10)]) / len(DIGITS)
    for n in (50, 270, len(DIGITS)):
        classes = proportional_classes(DIGITS, n)
        counts = torch.tensor([classes.count(str(k)) for k in range(10)])
        assert ((counts - n * share).abs() < 1).all()
        assert len(set(classes[: n // 2])) > 5  # mixed, not class by class
    for n in (0, len(DIGITS) + 1):
        with pytest.raises(
            ValueError,
            match=rf"n must lie in 1 \.\.\. {len(DIGITS)}, the number of pictures of the reference, not {n}",
        ):
            proportional_classes(DIGITS, n)


def test_the_floor_has_the_classes_of_the_samples() -> None:
    """Random class shares would raise the floor, and flatter samples whose shares are fixed; within a part no
    picture comes twice."""
    classes = proportional_classes(DIGITS, 270)
    source = open_source({"name": "digits", "split": "train", "n": 540}, classes=[classes] * 2)
    one, other = equal_parts(source, 2)
    assert one.labels == other.labels == classes
    assert one.stamp != other.stamp
    data = digits()
    for part, seed in ((one, 0), (other, 1)):
        chosen = data.pick_by_class(torch.tensor(list(map(int, classes))), seed)
        assert len(chosen.unique()) == 270
        pixels = torch.stack([picture for picture in part.read(range(270)) if isinstance(picture, Tensor)])
        assert torch.equal(pixels[:, :1], to_uint8(data.images[chosen]))
    with pytest.raises(ValueError, match=r"there are \d+ images of class 3, fewer than 200"):
        open_source({"name": "digits", "n": 200}, classes=[["3"] * 200])
    with pytest.raises(ValueError, match="n of a data set's pictures are chosen by class: classes=reference"):
        open_source({"name": "digits", "n": 200})
    with pytest.raises(ValueError, match="has 540 pictures, which do not divide into parts=7 equal parts"):
        equal_parts(source, 7)


def test_an_exact_data_set_is_not_rounded() -> None:
    """The extractor of digits sees the very numbers; 8 bits would move them."""
    pictures = open_source({"name": "digits", "split": "held_out", "exact": True}).read(range(4))
    pixels = torch.stack([picture for picture in pictures if isinstance(picture, Tensor)])
    assert torch.equal(pixels.mean(1, keepdim=True) / 127.5 - 1, digits("held_out").images[:4])
    assert not torch.equal(
        to_uint8(digits("held_out").images[:4]).float() / 127.5 - 1, digits("held_out").images[:4]
    )


def small() -> models.Model:
    """A model of digits that has learned nothing."""
    torch.manual_seed(0)
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
        torch.nn.init.normal_(p, std=0.1)
    return model


def test_parts_are_sets_of_their_own(tmp_path: Path) -> None:
    """By hand: each part is drawn from its own seeds with the reference's classes and its own guidance, and
    every figure is the mean of what the parts get; images are seen in 8 bits, and the reference as it is.
    """
    models.save(small(), tmp_path / "model.safetensors")
    guide = {"interval": [0.1, 0.8], "rule": {"name": "apg", "momentum": -0.5}}
    samples = {
        "run": str(tmp_path / "model.safetensors"),
        "sampler": "ddim",
        "steps": 4,
        "guidance": 4.0,
        "guide": guide,
        "n": 120,
    }
    written = scoring.run(
        {**SCORE, "samples": samples, "parts": 2, "model": "Mine", "out": str(tmp_path / "a.json")}
    )
    assert written is not None
    found = read_result(tmp_path / "a.json")
    assert (found.samples["n"], found.samples["model"], found.samples["calls"]) == (120, "Mine", 7)

    model, labels = small(), torch.tensor(list(map(int, proportional_classes(DIGITS, 60))))
    rule = APG(momentum=-0.5)
    denoiser = Clipped(
        ClassifierFreeGuidance(model.denoiser(), interval(4.0, 0.1, 0.8), model.null, rule=rule)
    )
    train, real, classifier = digits(), digits("held_out"), train_classifier(digits(held_out=0.95))
    assert real.labels is not None
    values: dict[str, list[float]] = {name: [] for name in SCORE["metric"]}
    with torch.no_grad():
        reference = classifier.features(real.images)
        for k in range(2):
            seeds = range(60 * k, 60 * k + 60)
            x = sample(
                "ddim",
                denoiser,
                model.grid(4),
                shape=model.shape,
                seeds=seeds,
                condition=Condition(label=labels),
            )
            x = to_uint8(x).float() / 127.5 - 1
            features = classifier.features(x)
            values["frechet"].append(frechet_distance(Moments.of(features), Moments.of(reference)))
            values["kernel"].append(kernel_distance(features, reference, labels, real.labels).value)
            values["accuracy"].append(float((classifier(x).argmax(1) == labels).double().mean()))
            values["nearest"].append(float(nearest_distance(x, train.images).mean()))
            values["memorised"].append(memorised(x, train.images, real.images).share.value)
    for name, (one, other) in values.items():
        assert found.figures[name].value == pytest.approx((one + other) / 2, rel=1e-6), name
        assert found.figures[name].extra["std"] == pytest.approx(
            abs(one - other) / math.sqrt(2), rel=1e-4, abs=1e-6
        ), name
        assert (found.figures[name].n, found.figures[name].extra["parts"]) == (60, 2)


def test_workers_share_the_threads_of_torch() -> None:
    """Each worker computes on its share, at least one; afterwards, and after an error, torch has all of them
    again."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for workers, share in ((1, 4), (2, 2), (3, 1), (8, 1)):
            assert map_in_threads(lambda part: (part, torch.get_num_threads()), [1, 2, 3], workers) == [
                (part, share) for part in (1, 2, 3)
            ]
            assert torch.get_num_threads() == 4
        with pytest.raises(ZeroDivisionError):
            map_in_threads(lambda part: 1 / part, [1, 0], 2)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_the_judge_is_the_same_every_time() -> None:
    """The same seed trains the same classifier, without touching the global generator, and labels are
    needed."""
    few = digits(held_out=0.95)
    a, b = (train_classifier(few, epochs=2) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ValueError, match="labels"):
        train_classifier(type(few)(few.images))


# The quickstart ---------------------------------------------------------------------------------------------

SMALL = ("train.steps=4", "train.batch_size=16", "progress=false", "wandb=false")
UNET = ("model.network.channels=8", "model.network.groups=4", "model.network.head_dim=8")
DIT = ("model.network.hidden=16", "model.network.depth=1", "model.network.heads=2")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The quickstart's own configuration over models that have seen four batches; one part of each row, and a
    quick judge."""
    out = tmp_path_factory.mktemp("quickstart")
    for name, settings in (("unet", UNET), ("dit", DIT), ("consistency", (f"model.from={out / 'unet'}",))):
        assert run(
            configs.compose("train", [f"experiment=digits_{name}", f"run={out / name}", *SMALL, *settings])
        )
    found = configs.compose("eval", ["experiment=quickstart", f"out={out}", "n=60", "progress=false"])
    score = {**found["score"], "extractors": {"digits": FEW}}
    few = [
        {**row, "parts": 2}
        if "role" in row and "parts" in row
        else {key: row[key] for key in row if key != "parts"}
        for row in found["rows"]
    ]
    return {**found, "score": score, "rows": few}


def test_report_scores_and_pictures(config: dict[str, Any]) -> None:
    """Every target is judged, and missed by such models; every row has its result and its picture, and the
    report names them all. Real digits are the floor and noise the ceiling.
    """
    random_state = torch.random.get_rng_state()
    assert not compare.run(config)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    out = Path(config["out"])
    targets = read_json(out / "targets.json")["targets"]
    assert len(targets) == 16
    files = sorted((out / "results").glob("*.json"))
    results = {one.name: one for one in map(read_result, files)}
    assert len(results) == 3 + 26 == len(list((out / "results").glob("*.png")))
    assert all(0.5 < one.figures["frechet"].value < 200 for one in results.values() if one.role is None)
    report = (out / "report.html").read_text()
    assert (out / "quality.png").stat().st_size > 10_000
    assert all(target["name"].replace("'", "&#39;") in report for target in targets)
    assert all(f'alt="samples of {name}"' in report for name in results)

    floor, unseen, ceiling = (
        results[name].figures for name in ("Real digits (train split)", "Held-out digits", "Pure noise")
    )
    assert 20 * floor["frechet"].value < ceiling["frechet"].value
    assert 20 * abs(floor["kernel"].value) < ceiling["kernel"].value
    assert unseen["accuracy"].value > 0.7 > 0.3 > ceiling["accuracy"].value
    assert 2 * unseen["nearest"].value < ceiling["nearest"].value
    assert floor["memorised"].value == 1
    assert unseen["memorised"].value == pytest.approx(0.01, abs=1 / 539)
    assert unseen.keys() == {"accuracy", "nearest", "memorised"}


def test_a_row_that_a_target_needs_is_missed_before_the_work(config: dict[str, Any]) -> None:
    """Taking the guided rows out is refused at once, as is a last row that cannot be drawn, and nothing is
    written."""
    rows = [row for row in config["rows"] if "guidance" not in row]
    out = Path(config["out"]) / "elsewhere"
    with pytest.raises(
        ValueError, match=r"needs the row 'UNet, eps, ddim, 50 steps, guidance 1\.5': add it to rows"
    ):
        compare.run({**config, "rows": rows, "out": str(out)})
    wrong = {"model": "dit", "sampler": "ddim", "steps": 2, "name": "wrong", "guide": {"zero_from": 1}}
    with pytest.raises(ValueError, match="guide has no effect, as guidance=1 is off"):
        compare.run({**config, "rows": [*config["rows"], wrong], "out": str(out)})
    assert not out.exists()
