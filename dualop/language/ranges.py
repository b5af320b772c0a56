"""Compute the interval of a stage's output from that of its input: rules for the table of stages.

NaN lies in every interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Interval = tuple[float, float]
Range = Callable[..., Interval]  # of the input's low and high and the stage's arguments
EVERYTHING: Interval = (-math.inf, math.inf)


def clipped(low: float, high: float, least: float, most: float) -> Interval:
    """Return the interval of a clamp to [least, most]."""
    return min(max(low, least), most), min(max(high, least), most)


def rising(value: Callable[[float], float]) -> Range:
    """Return the range of a function that never falls."""
    return lambda low, high: (value(low), value(high))


def dip(value: Callable[[float], float], least: float) -> Range:
    """Return the range of a function like silu, whatever its arguments.

    It is 0 at minus infinity and at 0, `least` in between, and rises from 0 on to at most `value`.
    """
    return lambda low, high, *arguments: (least if low < 0 else 0.0, value(high) if high > 0 else 0.0)


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0


def normcdf(z: float) -> float:
    return 0.5 * math.erfc(-z * math.sqrt(0.5))
