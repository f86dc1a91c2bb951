"""Statistics of a reference, computed once: `plain-diffusion eval experiment=statistics`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.settings import setting
from diffusion.spec import check_names, make_params
from eval.feature_pass import extract_features, forget, size_names
from eval.features.registry import DTYPES, EXTRACTORS, build
from eval.images.open import open_source
from eval.settings import FeatureParams
from eval.statistics_file import Statistics, write_statistics
from models.files.writing import check_writable
from samplers.results import drop_nulls
from train.world import world


@dataclass(frozen=True, kw_only=True)
class StatisticsParams(FeatureParams):
    """The pictures, and how their features are computed."""

    samples: str | dict[str, Any] = setting(
        ..., "the pictures: as of --help score", text="path", swept=True, heading="What"
    )
    out: str = setting(..., "a .safetensors file", kind="place", text="path")
    outputs: tuple[str, ...] | None = setting(
        None, "for fid and sfid of inception [pool, spatial]; null: the main output"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("extractor", [self.features], EXTRACTORS)


def run(config: Mapping[str, Any]) -> Path | None:
    """Write the statistics of pictures to `out`. Returns its path, or None in processes that do not lead."""
    params = make_params(
        "", StatisticsParams, drop_nulls({key: value for key, value in config.items() if key != "program"})
    )
    out, name = Path(params.out), params.features
    if out.suffix != ".safetensors":
        raise ValueError(f"statistics are written as .safetensors: out={out.with_suffix('.safetensors')}")
    source = open_source(params.samples, max_pixels=params.max_pixels)
    with world(params.device) as where:
        if where.leads:
            check_writable(out)
        extractor = build(name, params.extractors, params.protocol, DTYPES[params.dtype])
        extractor.to(where.device).eval().requires_grad_(False)
        outputs = params.outputs or (EXTRACTORS[name].main,)
        extractor.check_outputs(outputs)
        state = out.with_name(f".{out.stem}.work.safetensors")
        moments = [f"{name}.{output}" for output in outputs]
        found = extract_features(source, {name: extractor}, moments, [], params, where, state)
    if found is None:
        return None
    statistics = Statistics(
        {output: found.moments[f"{name}.{output}"].whole() for output in outputs},
        found.n,
        extractor.identity,
        source.origin,
        pictures=found.sha256,
        sizes=tuple(size_names(found.sizes)),
    )
    write_statistics(statistics, out)
    forget(state)
    return out
