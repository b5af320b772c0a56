"""The truth of `dualop verify`: a chain of one variable and its derivative, in float64.

Each stage by its reference and its gradient's formula in torch's float64, but for those that torch computes there with
constants rounded to float32. Some formulas cancel (1 - tanh^2, 1 + erf): their error is a few times 1e-16 of what
cancels. An error is measured in ulps of no less than a thousandth of the largest result, so that this counts for less
than 1e-3 of a float32 ulp as long as what cancels is no more than a hundred times as large as the largest result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from dualop.backends.reference import evaluate, reference_gradients
from dualop.language.entry import Exact, Stage
from dualop.language.stages import Call
from dualop.language.syntax import Chain


def exact(chain: Chain, x: Tensor, operands: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The chain at x and its derivative by x, both of x's shape; everything is float64."""
    precise = _precise(chain)
    with torch.no_grad():
        y = evaluate(precise, x, operands)
        needs = (True, *[False] * len(operands))
        (gradient,) = reference_gradients(precise, torch.ones_like(y), x, operands, needs)
    return y, gradient


@lru_cache(maxsize=64)
def _precise(chain: Chain) -> Chain:
    return Chain(tuple(Call(_in_float64(c.stage), c.arguments) for c in chain.calls))


def _in_float64(stage: Stage) -> Stage:
    if not isinstance(stage.exact, Exact):
        return stage
    return replace(stage, reference=stage.exact.reference, gradient=stage.exact.gradient or stage.gradient)
