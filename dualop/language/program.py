"""What is known of a chain's values before any is seen: the interval that each stage's output lies in.

Two uses, both decided here and for both kernel languages: a clamp that cannot clamp is left out, and a gelu behind a
stage that ends in [-1, 1] takes a polynomial. NaN lies in every interval: it passes a clamp as it passes no clamp.
Besides, a tanh may be the GPU's approximation where no stage behind it can enlarge a relative error, and silu with tanh
behind it is one function, since tanh's slope enlarges silu's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from dualop.language.slopes import Slope, is_slope
from dualop.language.stages import Call, Stage
from dualop.language.syntax import Chain

Interval = tuple[float, float]
# Functions of the kernels that no text names.
SPECIALISED = ("gelu_unit", "gelu_upper", "tanh_approx", "silu_tanh", "silu_tanh_approx")
# Their relative error is at most about 1.5 times that of an input in [-1, 1]; no difference, no jump.
_STEADY = (
    "silu",
    "gelu",
    "mish",
    "hardtanh",
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "celu",
    "selu",
    "sigmoid",
    "softplus",
    "abs",
    "neg",
    "exp",
    "tanh",
)
EVERYTHING: Interval = (-math.inf, math.inf)


class Step(NamedTuple):
    """A stage as a kernel has it: its function there, the numbers compiled into it, and what an operand stage takes:

    the number of an input (0 is x), a float, or None for the other stages.
    """

    function: str
    numbers: tuple[float, ...] = ()
    operand: int | float | None = None


def steps(chain: Chain | Slope) -> tuple[Step, ...]:
    """The chain as the kernels run it. A slope has to have every stage by itself, with its second derivative."""
    return tuple(step for step, _ in _lowered(chain))


def curved(sloped: Slope) -> frozenset[str]:
    """The kernel functions of a slope whose stage has a second derivative: so have the specialised ones."""
    return frozenset(step.function for step, stage in _lowered(sloped) if stage.curved)


@lru_cache(maxsize=4096)
def _lowered(chain: Chain | Slope) -> tuple[tuple[Step, Stage], ...]:
    """Each kernel function of the chain, with the stage that it is, or ends with."""
    sloped = is_slope(chain)
    of, interval = chain.of, EVERYTHING
    found: list[tuple[Step, Stage]] = []
    for i, call in enumerate(of.calls):
        if not _without_effect(call, interval):
            step = _step(call, of, interval)
            if step.function == "tanh" and all(later.stage.name in _STEADY for later in of.calls[i + 1 :]):
                step = Step("tanh_approx")
            if step.function in ("tanh", "tanh_approx") and found and found[-1][0] == Step("silu") and not sloped:
                step = Step(f"{found.pop()[0].function}_{step.function}")
            found.append((step, call.stage))
        interval = output(call, interval)
    return tuple(found)


def output(call: Call, interval: Interval) -> Interval:
    """Where a stage's output lies if its input lies in `interval`; EVERYTHING where nothing is known."""
    rule = _RULES.get(call.stage.name)
    return rule(*interval, *call.arguments) if rule else EVERYTHING


def _step(call: Call, chain: Chain, interval: Interval) -> Step:
    if call.stage.operand:
        operand = call.operand
        if isinstance(operand, str):
            operand = 0 if operand == "x" else chain.operands.index(operand) + 1
        return Step(call.stage.name, (), operand)
    function, numbers = call.stage.kernel(*call.arguments)
    if function == "gelu" and interval[0] >= -1 and interval[1] <= 1:
        function = "gelu_upper" if interval[0] >= -0.5 else "gelu_unit"
    return Step(function, numbers)


def _without_effect(call: Call, interval: Interval) -> bool:
    """A clamp whose bounds lie outside of the interval by more than the arithmetic is off by.

    Not torch.clamp itself: unlike the others it has the gradient 0 at NaN, which is a value of every chain.
    """
    if call.stage.name not in ("hardtanh", "relu6", "relu"):
        return False
    low, high = output(call, EVERYTHING)
    above = low + 1e-3 * max(abs(low), 1) < interval[0]
    return above and (high == math.inf or interval[1] < high - 1e-3 * max(abs(high), 1))


def _clipped(low: float, high: float, least: float, most: float) -> Interval:
    return min(max(low, least), most), min(max(high, least), most)


def _dip(value: Callable[[float], float], least: float) -> Callable[[float, float], Interval]:
    """Functions like silu: 0 at minus infinity and at 0, `least` in between, rising from 0 on to at most `value`."""
    return lambda low, high: (least if low < 0 else 0.0, value(high) if high > 0 else 0.0)


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0


def _normcdf(z: float) -> float:
    return 0.5 * math.erfc(-z * math.sqrt(0.5))


def _gelu(low: float, high: float, approximate: object) -> Interval:
    # The tanh form is off by less than 5e-4 from the exact one.
    return _dip(lambda z: z * _normcdf(z) + 5e-4, -0.1705)(low, high)


_RULES: dict[str, Callable[..., Interval]] = {
    "clamp": _clipped,
    "hardtanh": _clipped,
    "relu": lambda low, high: _clipped(low, high, 0.0, math.inf),
    "relu6": lambda low, high: _clipped(low, high, 0.0, 6.0),
    "hardsigmoid": lambda low, high: (0.0, 1.0),
    "sigmoid": lambda low, high: (_sigmoid(low), _sigmoid(high)),
    "tanh": lambda low, high: (math.tanh(low), math.tanh(high)),
    "softsign": lambda low, high: (-1.0, 1.0),
    "silu": _dip(lambda z: z * _sigmoid(z), -0.2785),
    "mish": _dip(lambda z: z, -0.3089),
    "hardswish": _dip(lambda z: z, -0.3751),
    "gelu": _gelu,
    "abs": lambda low, high: (0.0, max(-low, high)),
    "exp": lambda low, high: (0.0, math.inf),
}
