"""Chains and slopes by their texts, as the lists of problems in the tests name them."""

from __future__ import annotations

from dualop.language import syntax
from dualop.language.slopes import Slope
from dualop.language.syntax import Chain

SLOPE_OF = "slope of "


def parse(text: str) -> Chain | Slope:
    if text.startswith(SLOPE_OF):
        return Slope(syntax.parse(text.removeprefix(SLOPE_OF)))
    return syntax.parse(text)
