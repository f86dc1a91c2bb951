"""What pages are made of: templates, readable numbers, and embedded pictures."""

# ruff: noqa: RUF001  (minus signs, dashes and multiplication signs are meant)

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from models.files.writing import replacing

NOTHING = "–"


def write_page(path: str | Path, template: Path, **values: Any) -> None:
    """Fill in a template and write the page, whole or not at all. All text is escaped.

    The template may extend those in eval/templates. OSError if `path` cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent / "templates"]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template(template.name).render(**values)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def picture_address(content: bytes, kind: str = "png") -> str:
    """The bytes of a PNG or JPEG file as a data: address."""
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def decimals(values: Sequence[float], spreads: Sequence[float]) -> int:
    """Decimals for two digits of the median spread, or three of the median value if spreads are 0."""
    positive = [spread for spread in spreads if spread > 0]
    digits, numbers = (2, positive) if positive else (3, [abs(value) for value in values if value])
    if not numbers:
        return 2
    return min(6, max(0, digits - 1 - math.floor(math.log10(statistics.median(numbers)))))


def number(value: float, digits: int = 3) -> str:
    """A readable number: `digits` significant digits, no trailing zeros; powers of ten below a thousandth."""
    if math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    if size >= 10 ** (digits - 1) or value == int(value):
        return minus(f"{value:,.0f}")
    if size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        return minus(f"{_trimmed(mantissa)} × 10{raised}")
    return minus(_trimmed(f"{value:.{digits - 1 - math.floor(math.log10(size))}f}"))


def _trimmed(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def minus(text: str) -> str:
    """Hyphens as minus signs."""
    return text.replace("-", "−")
