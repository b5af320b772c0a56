"""What an entry of the table of stages (`dualop/language/stages.py`) says: every fact about a stage that anybody needs.

A fact that is left out is an error when the table is read. A second derivative in particular: a stage without one would
count as linear, and its double backward would be zero without a word.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor

from dualop.errors import ChainError

Argument = float | str
# The largest float32, and where rounding to float32 begins to give infinity.
_LARGEST, _INFINITE = 2.0**128 - 2.0**104, 2.0**128 - 2.0**103


class PiecewiseLinear(Enum):
    """The type of PIECEWISE_LINEAR."""

    PIECEWISE_LINEAR = "piecewise linear"


# What a table entry says of a stage whose second derivative is zero wherever it exists.
PIECEWISE_LINEAR = PiecewiseLinear.PIECEWISE_LINEAR


@dataclass(frozen=True)
class Parameter:
    """A parameter of a stage: a number, or one of `words`. `default` None means that it must be given."""

    name: str
    default: Argument | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One pointwise function.

    `reference(z, *arguments)` is the definition in torch; for an operand stage the argument is a tensor or a number.
    `gradient(gy, z, *arguments)` is the gradient of z by torch's differentiable functions; for an operand stage the
    pair of gradients of z and of the operand, not yet summed over what was broadcast.
    `second(z, *arguments)` is the second derivative by z in torch's differentiable functions, for an operand stage
    beside a number; PIECEWISE_LINEAR says that it is zero wherever it exists. An entry must give one of the two.
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
    operand: bool = False
    problem: Callable[..., str | None] = lambda *arguments: None
    kernel_name: Callable[..., str] | None = None
    constants: Callable[..., tuple[float, ...]] = lambda *arguments: tuple(a for a in arguments if isinstance(a, float))

    def __post_init__(self) -> None:
        if not callable(self.second) and self.second is not PIECEWISE_LINEAR:
            raise ChainError(
                f"stage {self.name!r} does not say what its second derivative is: give second=f(z, *arguments), "
                "or PIECEWISE_LINEAR if it is zero wherever it exists"
            )

    @property
    def curved(self) -> bool:
        """Return True if the stage has a second derivative that is not zero."""
        return self.second is not PIECEWISE_LINEAR

    def kernel(self, *arguments: Argument) -> tuple[str, tuple[float, ...]]:
        name = self.kernel_name(*arguments) if self.kernel_name else self.name
        return name, self.constants(*arguments)

    @property
    def signature(self) -> str:
        """How it is written, with defaults: `hardtanh(min_val=-1, max_val=1)`."""
        if self.operand:
            return f"{self.name}(operand)"
        shown = [p.name if p.default is None else f"{p.name}={argument_text(p.default)}" for p in self.parameters]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


def argument_text(argument: Argument) -> str:
    """The shortest text that parses to the same argument: -1, 0.5, 1e-05, inf, "tanh"."""
    if isinstance(argument, str):
        return f'"{argument}"'
    whole = argument.is_integer() and abs(argument) < 1e6 and str(argument) != "-0.0"
    return str(int(argument)) if whole else repr(argument)


def in_float32_range(argument: Argument) -> Argument:
    """Return the argument as it is, but infinite where rounding it to float32 makes it so; a word stays a word."""
    if isinstance(argument, str) or abs(argument) <= _LARGEST:
        return argument
    return math.copysign(_LARGEST if abs(argument) < _INFINITE else math.inf, argument)
