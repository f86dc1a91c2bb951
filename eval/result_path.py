"""Where a result is written, and the result that is already there."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict
from pathlib import Path

from diffusion.settings import of_kind
from eval.evaluation import Evaluation
from eval.images.generated import GeneratedPictures
from eval.results import Result, read_result
from eval.settings import ScoreParams
from models.files.writing import check_writable
from train.data.source import Source


def find_existing(evaluation: Evaluation, leads: bool) -> tuple[Path, Result | None]:
    """The result's path, and an existing result that the new figures can be added to.

    A result gathers metrics that are asked for one after another. A result of other samples, or of the same
    metrics with other settings, is overwritten only if `out` or a report's folder names its path. ValueError
    where another file is in the way, OSError where nothing can be written.
    """
    params = evaluation.params
    path = _path(params, evaluation.sides["samples"])
    existing = _of_same_samples(evaluation, path)
    if existing and not _is_consistent(evaluation, existing) and params.out is None and params.report is None:
        path = path.with_name(f"{path.stem}-{_digest(params)}.json")
        existing = _of_same_samples(evaluation, path)
    if leads:
        check_writable(path)
    return path, existing if existing and _is_consistent(evaluation, existing) else None


def _of_same_samples(evaluation: Evaluation, path: Path) -> Result | None:
    if not path.exists():
        return None
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not the file of a result: out={path / 'result.json'}")
    try:
        existing = read_result(path)
    except ValueError as error:
        raise ValueError(f"{error}; out=... names another place for the result") from None
    return existing if existing.settings.get("of") == evaluation.samples_key else None


def _is_consistent(evaluation: Evaluation, existing: Result) -> bool:
    """Whether its figures of the metrics that are asked for are those that would be computed."""
    keys = existing.settings.get("keys", {})
    return all(
        name not in existing.figures or keys.get(name) == evaluation.key(name) for name in evaluation.outputs
    )


def _path(params: ScoreParams, samples: Source) -> Path:
    """`out`, a file in the report's folder, or a file beside the samples."""
    if params.out is not None:
        return Path(params.out)
    name = (
        re.sub(r"[^\w.]+", "-", params.name or default_name(samples)).strip("-.").lower()[-100:] or "samples"
    )
    if params.report is not None:
        return Path(params.report) / "results" / f"{name}-{_digest(params)}.json"
    origin = Path(samples.origin)
    if isinstance(samples, GeneratedPictures):
        return origin / "scores" / f"{name}.json" if origin.is_dir() else Path(f"{name}.scores.json")
    origin = origin.resolve()
    return origin.with_name(f"{origin.name}.scores.json") if origin.exists() else Path(f"{name}.scores.json")


def _digest(params: ScoreParams) -> str:
    """A hash of the settings that make another row of a table. One row gathers several metrics."""
    left_out = (*of_kind(ScoreParams, "place"), "metric")
    row = {key: value for key, value in asdict(params).items() if key not in left_out}
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:8]


def default_name(samples: Source) -> str:
    """The name of a row of a table."""
    return samples.name if isinstance(samples, GeneratedPictures) else samples.origin
