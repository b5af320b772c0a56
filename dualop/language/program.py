"""Lower a chain to the functions that both kernel languages call.

The interval of each stage's output is known before any value is. So a clamp that cannot clamp is left out, and a gelu
behind a stage that ends in [-1, 1] takes a polynomial. NaN lies in every interval: it passes a clamp unchanged. A tanh
may be the GPU's approximation where no later stage can enlarge a relative error, and silu with tanh behind it is one
function, since tanh's slope enlarges silu's rounding.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from dualop.language.ranges import EVERYTHING, Interval
from dualop.language.slopes import Slope, is_slope
from dualop.language.stages import STAGES, Call, Stage
from dualop.language.syntax import Chain

# Functions of the kernels that no text names.
SPECIALISED = tuple(name for stage in STAGES.values() for name in stage.specialised)


class Step(NamedTuple):
    """Name the kernel function of a stage, with the numbers that are compiled into it.

    `operand` is what an operand stage takes, the number of an input (0 is x) or a float, and None for other stages.
    """

    function: str
    numbers: tuple[float, ...] = ()
    operand: int | float | None = None


def steps(chain: Chain | Slope) -> tuple[Step, ...]:
    """Return the chain as the kernels run it. In a slope every stage stands by itself, with its second derivative."""
    return tuple(step for step, _ in _lowered(chain))


def curved(sloped: Slope) -> frozenset[str]:
    """Return the kernel functions of a slope whose stage has a second derivative, specialised ones among them."""
    return frozenset(step.function for step, stage in _lowered(sloped) if stage.curved)


@lru_cache(maxsize=4096)
def _lowered(chain: Chain | Slope) -> tuple[tuple[Step, Stage], ...]:
    """Return each kernel function of the chain, with the stage that it is, or ends with."""
    sloped = is_slope(chain)
    of, interval = chain.of, EVERYTHING
    found: list[tuple[Step, Stage]] = []
    for i, call in enumerate(of.calls):
        if not _without_effect(call, interval):
            step = _step(call, of, interval)
            if call.stage.approximate and all(later.stage.steady for later in of.calls[i + 1 :]):
                step = step._replace(function=call.stage.approximate)
            if found and not sloped and (joined := _joined(*found[-1], step)):
                found.pop()
                step = joined
            found.append((step, call.stage))
        interval = output(call, interval)
    return tuple(found)


def output(call: Call, interval: Interval) -> Interval:
    """Return where a stage's output lies if its input lies in `interval`; EVERYTHING where nothing is known."""
    return call.stage.interval(*interval, *call.arguments)


def _step(call: Call, chain: Chain, interval: Interval) -> Step:
    if call.stage.operand:
        operand = call.operand
        if isinstance(operand, str):
            operand = 0 if operand == "x" else chain.operands.index(operand) + 1
        return Step(call.stage.name, (), operand)
    function, numbers = call.stage.kernel(*call.arguments)
    narrower = (
        name for low, high, name in call.stage.within.get(function, ()) if low <= interval[0] <= interval[1] <= high
    )
    return Step(next(narrower, function), numbers)


def _joined(before: Step, stage: Stage, step: Step) -> Step | None:
    """Return one function for two stages that follow each other, or None if the kernels have none."""
    if before.function != stage.name or step.operand is not None or step.function not in stage.joined:
        return None
    return Step(stage.joined[step.function], before.numbers + step.numbers)


def _without_effect(call: Call, interval: Interval) -> bool:
    """Return True for a clamp whose bounds lie outside of the interval by more than the arithmetic is off by."""
    if not call.stage.clips:
        return False
    low, high = output(call, EVERYTHING)
    above = low + 1e-3 * max(abs(low), 1) < interval[0]
    return above and (high == math.inf or interval[1] < high - 1e-3 * max(abs(high), 1))
