"""A number with its uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Figure:
    """A value and the 95 % confidence interval low ... high; NaN at both ends where none is known.

    extra  what a reader may want besides, such as the standard deviation over the splits of an Inception
           Score
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    extra: dict[str, float] = field(default_factory=dict)
