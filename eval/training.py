"""Scores of a model during training, for `evaluate` in a training's configuration."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

from diffusion.spec import make_params
from eval.evaluation import Evaluation
from eval.images.generated import generated_by
from eval.scoring import Gathered, compute, gather, notes
from eval.settings import ScoreParams
from models import Model
from samplers.run import SampleParams
from train.world import World


class TrainingScores:
    """Draws samples and scores them: {"frechet": 1.2, "frechet_low": 1.1, "frechet_high": 1.3, ...}.

        plain-diffusion train experiment=digits_unet train.evaluate_every=500
        +evaluate._target_=eval.training.TrainingScores
            +evaluate.n=539 '+evaluate.metric=[frechet]' +evaluate.features=digits '+evaluate.reference={name:
            digits, split: held_out}'

    n         pictures, of the same seeds every time
    metric    names
    settings  what the metrics need, as in configs/eval/experiment/score.yaml, and sampler, steps (default
              10), guidance, seed, ... of `plain-diffusion samplers`

    Features of the reference are computed once. Notes on the figures become warnings, each once. ValueError
    at the first call for settings that do not fit.
    """

    def __init__(self, n: int, metric: str | list[str], **settings: Any) -> None:
        own = {field.name for field in fields(ScoreParams)}
        drawing = {name: value for name, value in settings.items() if name not in own}
        self._drawing = make_params(
            "evaluate", SampleParams, {"run": "training", "n": n, "steps": 10, "progress": False, **drawing}
        )
        scoring = {"progress": False, **{name: value for name, value in settings.items() if name in own}}
        self._scoring = make_params(
            "evaluate", ScoreParams, {"samples": "training", "metric": metric, **scoring}
        )
        self._others: Gathered = {}
        self._noted: set[str] = set()

    def __call__(self, model: Model) -> dict[str, float]:
        """The figures of the current model, with the ends of their intervals."""
        where = World(0, 1, next(model.network.parameters()).device)
        evaluation = Evaluation.prepare(self._scoring, where, {"samples": generated_by(model, self._drawing)})
        parts = gather(evaluation, where, others=self._others)
        self._others = {side: part for side, part in parts[0].items() if side != "samples"}
        figures = dict(compute(evaluation, parts))
        for note in notes(evaluation, parts[0], figures):
            if note not in self._noted:
                self._noted.add(note)
                warnings.warn(note, stacklevel=2)
        values = {name: figure.value for name, figure in figures.items()}
        for name, figure in figures.items():
            values |= {f"{name}_low": figure.low, f"{name}_high": figure.high}
        return {name: value for name, value in values.items() if value == value}  # NaN: no interval is known
