"""What `python -m eval` is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from diffusion.spec import check_at_least_one, check_names
from eval.features.protocols import PROTOCOLS
from eval.features.registry import ExtractorParams
from eval.figures import METRICS
from samplers.pictures import MAX_PIXELS

MACHINE = ("out", "cache", "report", "wandb", "batch_size", "save_every", "device", "progress")  # what no number depends on


@dataclass(frozen=True)
class ScoreParams:
    """What to score, and how: see configs/eval/experiment/score.yaml.

    samples, reference, training  a path, or a mapping, as `open_source` takes them; reference also a file of statistics
    """

    samples: str | dict[str, Any]
    metric: str | tuple[str, ...]
    reference: str | dict[str, Any] | None = None
    training: str | dict[str, Any] | None = None
    prompts: str | None = None
    name: str | None = None
    n: int | None = None
    protocol: str = "clean"
    features: str = "inception"
    classifier: str = "digits"
    extractors: ExtractorParams = field(default_factory=ExtractorParams)
    dtype: Literal["fp32", "bf16"] = "fp32"
    groups: int = 17
    on_error: Literal["refuse", "skip"] = "refuse"
    sizes: Literal["equal", "any"] = "equal"
    max_pixels: int = MAX_PIXELS
    out: str | None = None
    report: str | None = None
    cache: str | None = None
    wandb: str | None = None
    batch_size: int = 64
    save_every: float = 300.0
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_at_least_one(self, "n", "groups", "batch_size", "max_pixels")
        check_names("metric", self.metrics, METRICS)
        check_names("protocol", [self.protocol], PROTOCOLS)
        if len(set(self.metrics)) < len(self.metrics) or not self.metrics:
            raise ValueError(f"metric must name metrics, each once, not {', '.join(self.metrics) or 'none'}")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Their names."""
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    @property
    def how(self) -> dict[str, Any]:
        """What every figure depends on besides pictures, weights and its own settings."""
        return {name: getattr(self, name) for name in ("protocol", "dtype", "groups", "on_error", "sizes")}
