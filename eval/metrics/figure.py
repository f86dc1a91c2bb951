"""A number with its uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Figure:
    """A value and its 95 % confidence interval low ... high, NaN if unknown. extra: other numbers by name."""

    value: float
    low: float = math.nan
    high: float = math.nan
    extra: dict[str, float] = field(default_factory=dict)
