"""What every benchmark writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from models.files import replacing, write_json
from samplers.provenance import provenance


def write_bench(out: Path, timings: Sequence[Any], table: str, **more: Any) -> None:
    """out/bench.json, the timings, which are dataclasses, with more facts and provenance; and out/bench.md, the table of them."""
    write_json(out / "bench.json", {"timings": [asdict(timing) for timing in timings], **more, "facts": provenance()})
    with replacing(out / "bench.md") as temporary:
        temporary.write_text(table)
