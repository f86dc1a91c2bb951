"""What pages are made of: their template, numbers for people, and pictures within the page."""

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
    """Fill in a template and write the page to `path`, whole or not at all; OSError where the path cannot be
    written.

    All text is escaped. The template may build on those in eval/templates, which give all pages one look.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent / "templates"]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template(template.name).render(**values)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def picture_address(content: bytes, kind: str = "png") -> str:
    """What a PNG or JPEG file holds, as the address of a picture that needs no file."""
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def decimals(values: Sequence[float], spreads: Sequence[float], most: int = 4) -> int:
    """Enough for two digits of the typical spread; where none is above 0, for three digits of the typical
    value. At most `most`."""
    known = [spread for spread in spreads if spread > 0]
    digits, typical = (2, known) if known else (3, [abs(value) for value in values if value])
    return (
        min(most, max(0, digits - 1 - math.floor(math.log10(statistics.median(typical))))) if typical else 2
    )


def number(value: float, digits: int = 3) -> str:
    """A number for people: `digits` significant ones and all before the point, no trailing zeros; powers of
    ten below a thousandth."""
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
    """Hyphens as minus signs, as wide as a plus."""
    return text.replace("-", "−")
