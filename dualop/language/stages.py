"""Find stages by name, and make calls: a stage with its arguments.

Everything that needs a list of stages (parser, tests, benchmarks, command line) reads `STAGES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dualop.errors import ChainError
from dualop.language.entry import Argument, Parameter, Stage, argument_text, in_float32_range
from dualop.language.table import TABLE

# No operand's name: they read as numbers, or are parameters of a chain's call.
RESERVED = ("inf", "nan", "self", "backend")

STAGES: dict[str, Stage] = {stage.name: stage for stage in TABLE}
ALIASES: dict[str, str] = {alias: stage.name for stage in TABLE for alias in stage.aliases}


@dataclass(frozen=True)
class Call:
    """Hold a stage with its arguments, complete and in order. An operand stage's one argument is a float or a name."""

    stage: Stage
    arguments: tuple[Argument, ...] = ()

    def numbers(self, dtype: torch.dtype) -> tuple[Argument, ...]:
        """Return the arguments for tensors of `dtype`: in float32 as the kernels round them, to infinity too.

        torch rounds them as well, but refuses those beyond float32's range in some functions.
        """
        return self.arguments if dtype == torch.float64 else tuple(map(in_float32_range, self.arguments))

    @property
    def operand(self) -> Argument | None:
        """Return what an operand stage takes, a tensor's name, "x" or a number; None for the other stages."""
        return self.arguments[0] if self.stage.operand else None

    def __str__(self) -> str:
        name, stage = self.stage.name, self.stage
        if stage.operand:
            source = self.arguments[0]
            return name if source == name else f"{name}({source if isinstance(source, str) else argument_text(source)})"
        given = list(self.arguments)
        while given and given[-1] == stage.parameters[len(given) - 1].default:
            given.pop()
        shown = [
            f"{p.name}={argument_text(a)}" if p.words else argument_text(a)
            for p, a in zip(stage.parameters, given, strict=False)
        ]
        return f"{name}({', '.join(shown)})" if shown else name


def call(name: str, *positional: Any, **keywords: Any) -> Call:
    """Return the stage `name` with arguments as in torch. Raises ChainError for what the table does not allow."""
    stage = STAGES.get(ALIASES.get(name, name))
    if stage is None:
        raise ChainError(f"unknown stage {name!r}{_nearest(name)}; `dualop stages` lists them all")
    parameters = stage.parameters
    if len(positional) > len(parameters):
        raise ChainError(
            f"{name} takes {stage.signature}, so at most {len(parameters)} arguments, not {len(positional)}"
        )
    given: dict[str, Any] = {p.name: value for p, value in zip(parameters, positional, strict=False)}
    for keyword, value in keywords.items():
        if keyword not in {p.name for p in parameters}:
            raise ChainError(f"{name} has no parameter {keyword!r}; it takes {stage.signature}")
        if keyword in given:
            raise ChainError(f"{name} got {keyword!r} twice")
        given[keyword] = value
    arguments = tuple(_argument(stage, p, given.get(p.name, p.default)) for p in parameters)
    if problem := stage.problem(*arguments):
        raise ChainError(f"{name}: {problem}")
    return Call(stage, arguments)


def _argument(stage: Stage, parameter: Parameter, value: Any) -> Argument:
    what = f"{stage.name}: {parameter.name}"
    if value is None:
        raise ChainError(f"{what} has no default; write {stage.signature}")
    if isinstance(value, str):
        if stage.operand:
            if not (value.isascii() and value.isidentifier()) or value in RESERVED:
                raise ChainError(f"{what} must be a name, x or a number, not {value!r}")
            return value
        if value not in parameter.words:
            raise ChainError(f"{what} must be {' or '.join(parameter.words) or 'a number'}, not {value!r}")
        return value
    if parameter.words:
        raise ChainError(f"{what} must be {' or '.join(map(repr, parameter.words))}, not {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ChainError(f"{what} must be a number, not {value!r}") from None
    if math.isnan(number):
        raise ChainError(f"{what} must not be NaN")
    return number


def _nearest(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name.lower(), [*STAGES, *ALIASES], n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def __getattr__(name: str) -> Callable[..., Call]:
    """Return the constructor of a stage or alias of the table, as `stages.hardtanh` in `stages.hardtanh(-1, 1)`."""
    if name in STAGES or name in ALIASES:
        return lambda *arguments, **keywords: call(name, *arguments, **keywords)
    raise AttributeError(f"module 'dualop.stages' has no attribute {name!r}")
