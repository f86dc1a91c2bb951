"""What benchmarks share: how dtypes are called, and what is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from models.files.text import write_json
from models.files.writing import replacing
from samplers.provenance import provenance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_bench(out: Path, timings: Sequence[Any], table: str, **more: Any) -> None:
    """out/bench.json, the timings, which are dataclasses, with more facts and provenance; and out/bench.md, the table of them."""
    write_json(out / "bench.json", {"timings": [asdict(timing) for timing in timings], **more, "facts": provenance()})
    with replacing(out / "bench.md") as temporary:
        temporary.write_text(table)
