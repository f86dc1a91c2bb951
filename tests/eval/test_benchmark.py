"""The benchmark: which rows a configuration asks for, what real digits and noise get, and which promises are kept."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from diffusion import APG, ClassifierFreeGuidance, Clipped, Condition, interval
from eval.digits.benchmark import Job, _side_by_side, draw, jobs, measure, references
from eval.digits.classifier import train_classifier
from eval.digits.judge import DigitJudge
from eval.digits.quickstart import targets
from eval.digits.score import METRICS, Score, Spread
from samplers import sample
from train.data import digits

CONFIG = {"unet": {"name": "UNet"}, "dit": {"name": "DiT"}, "student": {"name": "Student"}}


def row(model: str, kind: Any = "model", sampler: str = "", steps: int = 0, guidance: float = 1.0, **figures: float) -> Score:
    values = {name: Spread(figures.get(name, math.nan), 0.0) for name in METRICS}
    return Score(model, kind, sampler, steps, guidance, calls=steps, n=10, seeds=1, kernel_error=0.0, seconds=0.0, **values)


def kept() -> list[Score]:
    """Scores that meet every target."""
    found = [row("Real", "floor", frechet=1.0, nearest=0.0, accuracy=1.0), row("Held out", "held_out", nearest=2.0, accuracy=0.98)]
    for name in ("UNet", "DiT"):
        for sampler, ten in (("ddpm", 3.0), ("ddim", 1.5), ("euler", 1.5)):
            found += [
                row(name, sampler=sampler, steps=50, frechet=1.2, accuracy=0.98, nearest=1.9, copies=0.01),
                row(name, sampler=sampler, steps=10, frechet=ten, accuracy=0.98, nearest=1.9, copies=0.01),
                row(name, sampler=sampler, steps=50, guidance=1.5, frechet=2.0, accuracy=0.995, nearest=1.9, copies=0.01),
            ]
    return [
        *found,
        row("Student", sampler="consistency", steps=1, frechet=2.5),
        row("Student", sampler="consistency", steps=2, frechet=1.5),
    ]


def changed(model: str, sampler: str, steps: int, guided: bool = False, /, **figures: float) -> list[Score]:
    """The same scores but for one row."""
    key = (model, sampler, steps, guided)
    assert [s for s in kept() if (s.model, s.sampler, s.steps, s.guidance != 1) == key]
    guidance = 1.5 if guided else 1.0
    return [
        row(model, "model", sampler, steps, guidance, **figures) if (s.model, s.sampler, s.steps, s.guidance != 1) == key else s
        for s in kept()
    ]


def test_lists_are_multiplied_out() -> None:
    """Every combination of sampler, steps and guidance is a row; what is not a list stands for itself; guidance is off by default."""
    found = jobs(
        [
            {"name": "a", "run": "r", "sampler": ["ddpm", "ddim"], "steps": [5, 10], "guidance": [1.0, 2.0]},
            {"name": "b", "run": "q", "sampler": "euler", "steps": 3, "seeds": 1},
        ]
    )
    assert len(found) == len(set(map(repr, found))) == 9
    assert {(j.sampler, j.steps, j.guidance) for j in found[:8]} == {
        (s, n, g) for s in ("ddpm", "ddim") for n in (5, 10) for g in (1.0, 2.0)
    }
    assert asdict(found[8]) == asdict(Job("b", "q", "euler", 3, 1.0, seeds=1))
    with pytest.raises(ValueError, match="no jobs parameter named 'stesp'; did you mean 'steps'"):
        jobs([{"name": "a", "run": "r", "sampler": "ddim", "stesp": 5}])
    cured = {"name": "a", "run": "r", "sampler": "ddim", "steps": [5, 10], "guidance": 2.0, "guide": {"interval": [0.2, 0.8]}}
    assert [job.guide for job in jobs([cured])] == [{"interval": [0.2, 0.8]}] * 2
    with pytest.raises(ValueError, match="more than one row that reads 'a, ddim, 10 steps, guidance 2': give"):
        jobs([cured, {**cured, "steps": 10, "guide": {}}])


def small() -> models.Model:
    """A model of digits that has learned nothing."""
    torch.manual_seed(0)
    network = {"name": "dit", "in_channels": 1, "image_size": 8, "hidden": 16, "depth": 1, "heads": 2, "num_classes": 10}
    model = models.build({"network": network, "schedule": {"name": "flow"}, "prediction": "flow", "shape": [1, 8, 8]})
    for p in model.network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.mark.parametrize(
    ("sampler", "guidance", "guide", "calls"),
    [
        ("ddim", 1.0, {}, 10), ("ddim", 0.0, {}, 10), ("ddim", 1.5, {}, 20), ("ddim", -1.0, {}, 20),
        ("heun", 1.0, {}, 19), ("heun", 2.0, {}, 38), ("rk4", 1.0, {}, 37), ("ddpm", 1.5, {}, 20), ("sit_sde", 1.5, {}, 20),
        ("ddim", 1.5, {"interval": [0.25, 0.75]}, 10 + 5),  # at 0.7, 0.6, ..., 0.3
        ("heun", 1.5, {"interval": [0.25, 0.75]}, 19 + 10),
        ("ddim", 1.5, {"zero_from": 0.95}, 18),
        ("ddim", 0.0, {"rule": {"name": "apg"}}, 20),
    ],
)  # fmt: skip
def test_calls_are_counted(sampler: str, guidance: float, guide: dict[str, Any], calls: int) -> None:
    """As the solver makes them on the row's own grid; guidance doubles them where it is on, which it is not at scale 1 and 0."""
    assert Job("a", "r", sampler, 10, guidance, guide=guide).calls(small()) == calls


def test_a_row_is_drawn_with_its_own_guidance() -> None:
    """To the last bit what the same denoiser made by hand draws, and another set than plain guidance gives."""
    model, labels = small(), torch.arange(5)
    rule, guide = APG(momentum=-0.5), {"interval": [0.1, 0.8], "rule": {"name": "apg", "momentum": -0.5}}
    by_hand = Clipped(ClassifierFreeGuidance(model.denoiser(), interval(4.0, 0.1, 0.8), model.null, rule=rule))
    expected = sample("ddim", by_hand, model.grid(6), shape=model.shape, seeds=range(5), condition=Condition(label=labels))
    assert torch.equal(draw(model, Job("a", "r", "ddim", 6, 4.0, guide=guide), labels, range(5)), expected)
    assert not torch.allclose(draw(model, Job("a", "r", "ddim", 6, 4.0), labels, range(5)), expected, atol=1e-3)


def test_all_targets_can_be_met() -> None:
    """Seven for each model and two for the student, each with its own limit."""
    found = targets(kept(), CONFIG)
    assert len(found) == 16
    assert [target.name for target in found if not target.met] == []


GOOD: dict[str, Any] = dict(frechet=1.2, accuracy=0.98, nearest=1.9, copies=0.01)


@pytest.mark.parametrize(
    ("scores", "missed"),
    [
        (changed("UNet", "ddim", 50, **{**GOOD, "frechet": 1.31}), ["UNet: Fréchet distance at 50 steps over the floor"]),
        (changed("DiT", "euler", 50, **{**GOOD, "accuracy": 0.96}), ["DiT: label accuracy at 50 steps"]),
        (changed("DiT", "euler", 50, True, **{**GOOD, "frechet": 9.0}), ["DiT: label accuracy at 50 steps, guided"]),
        (changed("UNet", "ddim", 50, **{**GOOD, "nearest": 1.7}), ["UNet: nearest training digit, over held-out digits' own"]),
        (changed("DiT", "euler", 50, **{**GOOD, "copies": 0.06}), ["DiT: share of near-copies"]),
        (changed("UNet", "ddpm", 10, frechet=1.4), ["UNet: 10 DDIM steps over 10 DDPM steps"]),
        (changed("Student", "consistency", 1, frechet=3.1), ["Student: Fréchet distance at 1 step over its teacher's at 50"]),
        (changed("Student", "consistency", 2, frechet=math.nan), ["Student: Fréchet distance at 2 steps over its teacher's at 50"]),
    ],
)  # fmt: skip
def test_one_bad_row_misses_its_target(scores: list[Score], missed: list[str]) -> None:
    """A figure beyond its limit, or that is no number, misses that target and no other."""
    assert [target.name for target in targets(scores, CONFIG) if not target.met] == missed


def test_targets_need_their_rows() -> None:
    """A row that is not there is named; so are the real digits."""
    with pytest.raises(ValueError, match="need a row for Student, consistency, 2 steps: add it to jobs"):
        targets(kept()[:-1], CONFIG)
    with pytest.raises(ValueError, match="need a row for DiT, euler, 50 steps, guided"):
        targets([s for s in kept() if (s.model, s.sampler, s.guidance) != ("DiT", "euler", 1.5)], CONFIG)
    with pytest.raises(ValueError, match="reference rows"):
        targets([s for s in kept() if s.kind != "floor"], CONFIG)


def test_real_digits_are_the_floor_and_noise_the_ceiling() -> None:
    """A quick judge already puts noise 50 times as far from real digits as real digits are from each other, and reads only the latter."""
    train, held_out = digits(), digits("held_out")
    judge = DigitJudge(train, held_out, train_classifier(train, epochs=4))
    random_state = torch.random.get_rng_state()
    floor, unseen, ceiling = references(judge, 300, seeds=3)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert [s.kind for s in (floor, unseen, ceiling)] == ["floor", "held_out", "ceiling"]
    assert 50 * floor.frechet.mean < ceiling.frechet.mean
    assert 50 * abs(floor.kernel.mean) < ceiling.kernel.mean
    assert floor.accuracy.mean > 0.95 > 0.9 > 0.3 > ceiling.accuracy.mean
    assert unseen.accuracy.mean > 0.9
    assert floor.nearest.mean == 0 < 2 * unseen.nearest.mean < ceiling.nearest.mean
    assert math.isnan(unseen.frechet.mean)
    assert abs(floor.kernel.mean) < 3 * floor.kernel_error  # real digits of equal class shares: no distance, but for chance
    assert floor.copies.mean == 1
    assert unseen.copies.mean == pytest.approx(0.01, abs=1 / 539)


def test_samples_show_classes_as_often_as_held_out_digits_do() -> None:
    """To within one image per class, whatever their number; all of them are the held-out labels themselves, mixed."""
    held_out = digits("held_out", held_out=0.6)
    judge = DigitJudge(digits(held_out=0.6), held_out, train_classifier(digits(held_out=0.98), epochs=1))
    assert held_out.labels is not None
    share = held_out.labels.bincount() / len(held_out)
    for n in (50, 270, len(held_out)):
        assert ((judge.classes(n).bincount() - n * share).abs() < 1).all()
        assert len(judge.classes(n)[: n // 2].unique()) > 5  # mixed, not class by class


def test_the_floor_has_the_classes_of_the_samples() -> None:
    """Random class shares would raise the floor, and flatter samples whose shares are fixed."""
    train, labels = digits(), digits("held_out").labels
    assert labels is not None
    assert train.labels is not None
    for seed in range(3):
        part = train.of_classes(labels[:270], seed)
        assert torch.equal(train.labels[part], labels[:270])
        assert len(part.unique()) == 270
    assert not torch.equal(train.of_classes(labels, 0), train.of_classes(labels, 1))
    with pytest.raises(ValueError, match=r"200 images of class 3 are asked for, but there are \d+: ask for fewer"):
        train.of_classes(torch.full((200,), 3), 0)


def test_sets_drawn_side_by_side_are_those_drawn_in_turn(tmp_path: Path) -> None:
    """However many workers: the same images and figures, in the order of the jobs; torch's threads are shared out, then given back."""
    models.save(small(), tmp_path / "model.safetensors")
    run = str(tmp_path / "model.safetensors")
    rows = [Job("a", run, "euler", 2, seeds=2), Job("b", run, "ddpm", 3, guidance=1.5, seeds=3)]
    train, held_out = digits(), digits("held_out")
    judge = DigitJudge(train, held_out, train_classifier(train, epochs=1))
    threads = torch.get_num_threads()
    (alone, images), (shared, others) = (measure(rows, judge, 60, workers, progress=False) for workers in (1, 3))
    assert [(s.model, s.seeds) for s in shared] == [("a", 2), ("b", 3)]
    for one, other in zip(alone, shared, strict=True):
        for name in METRICS:
            assert asdict(getattr(one, name)) == pytest.approx(asdict(getattr(other, name)), rel=1e-4, abs=1e-6)
    for job in rows:
        torch.testing.assert_close(images[job], others[job], rtol=0, atol=1e-5)
        assert images[job].shape == (60, 1, 8, 8)
    assert not torch.allclose(images[rows[0]], images[rows[1]], atol=0.1)
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="guide says how guidance works, but guidance=1 is off"):
        measure([*rows, Job("c", run, "ddim", 2, guide={"zero_from": 1})], judge, 60, 1, progress=False)
    for n in (0, 540):
        for measured in (lambda n: measure(rows, judge, n, 1, False), lambda n: references(judge, n)):
            with pytest.raises(ValueError, match=rf"n must lie in 1 \.\.\. 539, the number of held-out digits, not {n}"):
                measured(n)


def test_workers_share_the_threads_of_torch() -> None:
    """Each worker computes on its share, at least one; afterwards, and after an error, torch has all of them again."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for workers, share in ((1, 4), (2, 2), (3, 1), (8, 1)):
            assert _side_by_side(lambda part: (part, torch.get_num_threads()), [1, 2, 3], workers) == [(part, share) for part in (1, 2, 3)]
            assert torch.get_num_threads() == 4
        with pytest.raises(ZeroDivisionError):
            _side_by_side(lambda part: 1 / part, [1, 0], 2)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


def test_the_judge_is_the_same_every_time() -> None:
    """The same seed trains the same classifier, without touching the global generator, and labels are needed."""
    few = digits(held_out=0.95)
    a, b = (train_classifier(few, epochs=2) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ValueError, match="labels"):
        train_classifier(type(few)(few.images))
