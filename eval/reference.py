"""Statistics of a reference, computed once for all that is compared with it: `python -m eval experiment=statistics`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusion.spec import check_at_least_one, check_names, make_params
from eval.collect import CollectParams, collect, forget, size_names
from eval.features.protocols import PROTOCOLS
from eval.features.registry import DTYPES, EXTRACTORS, ExtractorParams, build
from eval.images.open import open_source
from eval.statistics_file import Statistics, write_statistics
from models.files.writing import check_writable
from samplers.pictures import MAX_PIXELS
from samplers.results import given
from train.world import world


@dataclass(frozen=True)
class StatisticsParams:
    """Of what to compute statistics, and with what: see configs/eval/experiment/statistics.yaml."""

    samples: str | dict[str, Any]
    out: str
    features: str = "inception"
    outputs: tuple[str, ...] | None = None
    protocol: str = "clean"
    extractors: ExtractorParams = field(default_factory=ExtractorParams)
    dtype: Literal["fp32", "bf16"] = "fp32"
    groups: int = 17
    on_error: Literal["refuse", "skip"] = "refuse"
    sizes: Literal["equal", "any"] = "equal"
    max_pixels: int = MAX_PIXELS
    batch_size: int = 64
    save_every: float = 300.0
    device: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_at_least_one(self, "groups", "batch_size", "max_pixels")
        check_names("protocol", [self.protocol], PROTOCOLS)
        check_names("extractor", [self.features], EXTRACTORS)


def run(config: Mapping[str, Any]) -> Path | None:
    """Write the statistics of a source of pictures to `out`, and return it; None in the processes that do not lead.

    ValueError or OSError in one line, mostly at once.
    """
    params = make_params("", StatisticsParams, given({key: value for key, value in config.items() if key != "program"}))
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
        how = CollectParams(params.batch_size, params.groups, params.on_error, params.sizes, params.save_every)
        state = out.with_name(f".{out.stem}.work.safetensors")
        found = collect(source, {name: extractor}, [f"{name}.{o}" for o in outputs], [], how, where, state, progress=params.progress)
    if found is not None:
        moments = {output: found.moments[f"{name}.{output}"].whole() for output in outputs}
        sizes = tuple(size_names(found.sizes))
        write_statistics(Statistics(moments, found.n, extractor.identity, source.origin, pictures=found.sha256, sizes=sizes), out)
        forget(state)
    return out if where.leads else None
