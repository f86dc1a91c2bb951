"""Settings of `plain-diffusion eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffusion.settings import setting
from diffusion.spec import check_at_least_one, check_names
from eval.feature_pass import PassParams
from eval.features.protocols import PROTOCOLS
from eval.features.registry import ExtractorParams
from eval.metrics.registry import find_metric
from eval.results import Role
from eval.targets import TargetParams


@dataclass(frozen=True, kw_only=True)
class FeatureParams(PassParams):
    """How features are computed, for scores and for the statistics of a reference."""

    protocol: str = setting(
        "clean",
        "for all that Inception computes: clean, legacy_pytorch, torch_fidelity or adm (--help protocol)",
        heading="Features",
    )
    features: str = setting(
        "inception",
        "what frechet, kernel, precision, recall, density and coverage compare: inception, dinov2, clip or "
        "digits; or one of its outputs, digits.pixels",
    )
    extractors: ExtractorParams = setting(
        ExtractorParams, 'weights, all local files; "random": random weights, for a trial; the result says so'
    )
    dtype: Literal["fp32", "bf16"] = setting(
        "fp32", "of Inception; bf16 is faster on a GPU, and its figures are compared with their like only"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("protocol", [self.protocol], PROTOCOLS)


@dataclass(frozen=True, kw_only=True)
class ScoreParams(FeatureParams):
    """What to score, and how."""

    samples: str | dict[str, Any] = setting(
        ...,
        "a folder, tar shards ('shard-{000..009}.tar', quoted for the shell), an .npz of pictures; or what a "
        "model draws, without files: {run: runs/x, sampler: ddim, steps: 10} or {weights: FILES, prompts: "
        "FILE, ...}; or a data set, {name: digits, split: held_out}; or noise, {noise: [3, 32, 32], n: 99}. "
        "Paths are taken literally, but a comma in samples, reference or training separates the values of a "
        "sweep (-m samples=a,b), unless the path has its own quotes: samples='\"a, b\"'",
        text="path",
        swept=True,
        heading="What",
    )
    reference: str | dict[str, Any] | None = setting(
        None,
        "what they are compared with: pictures as above, or a file of statistics (.npz of pytorch-fid or "
        "ADM, .safetensors of `plain-diffusion eval experiment=statistics`)",
        text="path",
        swept=True,
    )
    training: str | dict[str, Any] | None = setting(
        None, "the training set of the samples' model, for nearest and memorised", text="path", swept=True
    )
    prompts: str | None = setting(
        None,
        "for clip_score: .jsonl or .csv that name the pictures, or .txt in the order of the numbers in their "
        "names; null: captions beside the pictures",
        text="path",
    )
    metric: str | tuple[str, ...] = setting(
        ("fid", "kid"), "metrics (--help metric); frechet and kernel are fid and kid of `features`"
    )
    name: str | None = setting(None, "of the row in tables; null: the samples' origin", text="text")
    model: str | None = setting(None, "name of the model that draws in tables; null: its folder", text="text")
    role: Role | None = setting(
        None,
        "of a row that samples are judged by, and not ranked with: floor (real pictures, scored as samples "
        "are), held_out (real ones that no model has seen) or ceiling (noise)",
    )
    n: int | None = setting(None, "only the first n of the samples (of a model: n inside samples)")
    parts: int = setting(
        1,
        "score the samples in so many equal parts; figures are means over them, with their spread",
    )
    classes: Literal["own", "reference"] = setting(
        "own", "reference: samples have each class as often as the reference"
    )
    neighbours: str | None = setting(None, "extractor for nearest and memorised; null: as features")
    classifier: str = setting("digits", "extractor for accuracy")
    out: str | None = setting(
        None,
        "the result; null: beside the samples, as NAME.scores.json",
        kind="place",
        text="path",
        heading="Where",
    )
    report: str | None = setting(
        None,
        "a folder that collects results, as results/NAME.json, and their report",
        kind="place",
        text="path",
    )
    cache: str | None = setting(None, "a folder for the features of references", kind="place", text="path")
    wandb: str | None = setting(None, "a project of Weights & Biases", kind="place", text="text")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "n", "parts")
        for name in self.metrics:
            find_metric(name)
        if len(set(self.metrics)) < len(self.metrics) or not self.metrics:
            raise ValueError(f"metric must name metrics, each once, not {', '.join(self.metrics) or 'none'}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Their names."""
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    @property
    def how(self) -> dict[str, Any]:
        """What every figure depends on besides pictures, weights and its own settings."""
        names = ("protocol", "dtype", "groups", "parts", "on_error", "sizes")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class ReportParams:
    """Of what to make a report."""

    out: str = setting(..., "a folder with results/NAME.json, as report=FOLDER gathers them", text="path")


@dataclass(frozen=True)
class NamedModel:
    """A trained model, as rows and the report call it."""

    name: str
    run: str


@dataclass(frozen=True, kw_only=True)
class CompareParams:
    """What to compare, and what the report says."""

    title: str = setting(..., "of the report", text="text", heading="The report")
    summary: str = setting(..., "paragraphs below the title", text="text")
    models: dict[str, NamedModel] = setting(
        dict, "trained models by the names that rows use: {name: as the report calls it, run: its folder}"
    )
    shown: tuple[str, ...] = setting((), "models whose forward process and sampling the report shows")
    score: dict[str, Any] = setting(dict, "settings of --help score that all rows share", heading="Rows")
    rows: tuple[dict[str, Any], ...] = setting(
        ...,
        "{name, samples, and settings of --help score}; or {model, sampler, steps, guidance, ...} for what a "
        "model draws: every combination of lists is a row",
    )
    n: int = setting(..., "pictures of each part, in rows without their own n")
    targets: tuple[TargetParams, ...] = setting(
        (), "what rows must reach: {name, metric, row, over: another row, at_most or at_least, note}"
    )
    out: str = setting(
        ..., "the folder of report.html, targets.json, quality.png and results/", kind="place", text="path",
        heading="Where and how",
    )  # fmt: skip
    workers: int | None = setting(
        None,
        "rows scored side by side, each on its share of torch's threads; null: one per thread",
        kind="place",
    )
    progress: bool = setting(True, "false: no bar", kind="place")

    def __post_init__(self) -> None:
        check_at_least_one(self, "n", "workers")
        check_names("model", self.shown, self.models)
