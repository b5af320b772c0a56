"""Describe an entry of the table of stages (`dualop/language/table.py`): every fact about a stage.

A fact that is left out is an error when the table is read. A second derivative in particular: a stage without one would
count as linear, and its double backward would be zero without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor

from dualop.errors import ChainError
from dualop.language.ranges import EVERYTHING, Interval, Range

Argument = float | str
# The largest float32, and where rounding to float32 begins to give infinity.
_LARGEST, _INFINITE = 2.0**128 - 2.0**104, 2.0**128 - 2.0**103


class PiecewiseLinear(Enum):
    """Give PIECEWISE_LINEAR a type."""

    PIECEWISE_LINEAR = "piecewise linear"


# What a table entry says of a stage whose second derivative is zero wherever it exists.
PIECEWISE_LINEAR = PiecewiseLinear.PIECEWISE_LINEAR


@dataclass(frozen=True)
class Parameter:
    """Describe a parameter of a stage: a number, or one of `words`. A parameter without `default` must be given."""

    name: str
    default: Argument | None = None
    words: tuple[str, ...] = ()


class Excuse(NamedTuple):
    """Say why `dualop verify` allows an error of up to `ulp` ulps, beyond its limit or worse than eager's."""

    ulp: float
    why: str


class SameAsReference(Enum):
    """Give SAME_AS_REFERENCE a type."""

    SAME_AS_REFERENCE = "same as reference"


# What a table entry says of a stage that torch computes in float64 with float64's constants.
SAME_AS_REFERENCE = SameAsReference.SAME_AS_REFERENCE


@dataclass(frozen=True)
class Stage:
    """Hold one pointwise function with every fact about it.

    `reference(z, *arguments)` is the definition in torch; for an operand stage the argument is a tensor or a number.
    `gradient(gy, z, *arguments)` is the gradient of z by torch's differentiable functions; for an operand stage the
    pair of gradients of z and of the operand, not yet summed over what was broadcast.
    `second(z, *arguments)` is the second derivative by z in torch's differentiable functions, for an operand stage
    beside a number; PIECEWISE_LINEAR says that it is zero wherever it exists. An entry must give one of the two.
    `range` is the interval of the output, or a function of the input's (low, high, *arguments) that gives it;
    EVERYTHING says that nothing is known.
    `exact(z, *arguments)` is the definition in float64, with the gradient by torch's autograd, of a stage that torch
    computes there with constants rounded to float32. `dualop check` and `dualop verify` measure by it.
    `kinks` are the inputs around which the stage in `example` has no derivative or changes its formula, () if there are
    none. `dualop check` tries them all, so each must be a number of every dtype. An entry must give them.
    `excuses` says by dtype and by "forward" or "gradient" where `example` may exceed the limits of `dualop verify`.
    `number` is what an operand stage takes in `dualop verify`: 0 leaves x as it is, where that does not, a number of
    every dtype with which products and quotients have to be rounded.
    `example` is a chain of this stage alone that tests and benchmarks use. `problem(*arguments)` says what is wrong
    with arguments that parse, or None. `kernel(*arguments)` names the function in the kernel languages and the numbers
    that are compiled into it.
    """

    name: str
    reference: Callable[..., Tensor]
    gradient: Callable[..., Any]
    example: str
    parameters: tuple[Parameter, ...] = ()
    aliases: tuple[str, ...] = ()
    second: Callable[..., Tensor] | PiecewiseLinear | None = field(default=None, kw_only=True)  # None is refused
    range: Range | Interval | None = field(default=None, kw_only=True)  # None is refused
    exact: Callable[..., Tensor] | SameAsReference = field(default=SAME_AS_REFERENCE, kw_only=True)
    kinks: tuple[float, ...] | None = field(default=None, kw_only=True)  # None is refused
    excuses: Mapping[tuple[str, str], Excuse] = field(default_factory=dict, kw_only=True)
    operand: bool = False
    number: float | None = None  # of an operand stage None is refused
    problem: Callable[..., str | None] = lambda *arguments: None
    kernel_name: Callable[..., str] | None = None
    constants: Callable[..., tuple[float, ...]] = lambda *arguments: tuple(a for a in arguments if isinstance(a, float))
    steady: bool = field(default=False, kw_only=True)
    clips: bool = field(default=False, kw_only=True)
    within: Mapping[str, tuple[tuple[float, float, str], ...]] = field(default_factory=dict, kw_only=True)
    approximate: str | None = field(default=None, kw_only=True)
    joined: Mapping[str, str] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        for what in ("reference", "gradient"):
            if not callable(getattr(self, what)):
                raise ChainError(f"stage {self.name!r} does not say what its {what} is: give {what}=f(...) in torch")
        if not callable(self.exact) and self.exact is not SAME_AS_REFERENCE:
            raise ChainError(
                f"stage {self.name!r} does not say what it is in float64: give exact=f(z, *arguments) "
                "or SAME_AS_REFERENCE"
            )
        if self.kinks is None:
            raise ChainError(
                f"stage {self.name!r} does not say where its kinks are: give kinks=(...), the inputs where it has no "
                "derivative or changes its formula, or kinks=() if it is smooth"
            )
        if not callable(self.range) and not _is_interval(self.range):
            raise ChainError(
                f"stage {self.name!r} does not say what its range is: give range=(low, high), "
                "range=f(low, high, *arguments), or EVERYTHING if nothing is known of its output"
            )
        if self.operand != isinstance(self.number, (int, float)):
            raise ChainError(
                f"stage {self.name!r} takes {'an' if self.operand else 'no'} operand: give "
                f"{'number=, which `dualop verify` takes for it' if self.operand else 'no number='}"
            )
        if not callable(self.second) and self.second is not PIECEWISE_LINEAR:
            raise ChainError(
                f"stage {self.name!r} does not say what its second derivative is: give second=f(z, *arguments), "
                "or PIECEWISE_LINEAR if it is zero wherever it exists"
            )

    @property
    def curved(self) -> bool:
        """Return True if the stage has a second derivative that is not zero."""
        return self.second is not PIECEWISE_LINEAR

    def interval(self, low: float, high: float, *arguments: Argument) -> Interval:
        """Return where the output lies if the input lies in [low, high]."""
        assert self.range is not None
        return self.range(low, high, *arguments) if callable(self.range) else self.range

    @property
    def specialised(self) -> tuple[str, ...]:
        """Return the kernel functions that no text names."""
        within = (function for forms in self.within.values() for _, _, function in forms)
        return (*within, *((self.approximate,) if self.approximate else ()), *self.joined.values())

    def kernel(self, *arguments: Argument) -> tuple[str, tuple[float, ...]]:
        name = self.kernel_name(*arguments) if self.kernel_name else self.name
        return name, self.constants(*arguments)

    @property
    def signature(self) -> str:
        """Return how it is written, with defaults: `hardtanh(min_val=-1, max_val=1)`."""
        if self.operand:
            return f"{self.name}(operand)"
        shown = [p.name if p.default is None else f"{p.name}={argument_text(p.default)}" for p in self.parameters]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


def operand_stage(
    name: str, reference: Callable[..., Tensor], gradient: Callable[..., tuple[Tensor, Tensor]], number: float
) -> Stage:
    """Return the entry of an operand stage that is piecewise linear in z and of whose output nothing is known."""
    return Stage(
        name,
        reference,
        gradient,
        name,
        (Parameter("operand", name),),
        second=PIECEWISE_LINEAR,
        range=EVERYTHING,
        kinks=(),  # those of minimum and maximum are where z is the operand: `check` puts zeros into both
        operand=True,
        number=number,
    )


def _is_interval(said: object) -> bool:
    return isinstance(said, tuple) and len(said) == 2 and said[0] <= said[1]


def argument_text(argument: Argument) -> str:
    """Return the shortest text that parses to the same argument: -1, 0.5, 1e-05, inf, "tanh"."""
    if isinstance(argument, str):
        return f'"{argument}"'
    whole = argument.is_integer() and abs(argument) < 1e6 and str(argument) != "-0.0"
    return str(int(argument)) if whole else repr(argument)


def in_float32_range(argument: Argument) -> Argument:
    """Return the argument as it is, but infinite where rounding it to float32 makes it so; a word stays a word."""
    if isinstance(argument, str) or abs(argument) <= _LARGEST:
        return argument
    return math.copysign(_LARGEST if abs(argument) < _INFINITE else math.inf, argument)
