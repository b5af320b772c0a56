"""The one table of stages: names, parameters and defaults, and what each means in torch.

The kernels implement the same names in the same order in `cuda/stages.cuh` and `triton_kernels/stages.py`. Everything
that needs a list of stages (parser, tests, benchmarks, command line) reads `STAGES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualop.errors import ChainError

Argument = float | str


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
    `example` is a chain of this stage alone that tests and benchmarks use. `problem(*arguments)` says what is wrong
    with arguments that parse, or None. `kernel(*arguments)` names the function in the kernel languages and the numbers
    that are compiled into it.
    """

    name: str
    reference: Callable[..., Tensor]
    example: str
    parameters: tuple[Parameter, ...] = ()
    aliases: tuple[str, ...] = ()
    operand: bool = False
    problem: Callable[..., str | None] = lambda *arguments: None
    kernel_name: Callable[..., str] | None = None
    constants: Callable[..., tuple[float, ...]] = lambda *arguments: tuple(a for a in arguments if isinstance(a, float))

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
    return str(int(argument)) if argument.is_integer() and abs(argument) < 1e6 and str(argument) != "-0.0" else repr(argument)


@lru_cache(maxsize=1)
def clamp_gradient_at_bound() -> float:
    """1.0 or 0.0: clamp's derivative at its own bounds, which differs between releases of torch."""
    with torch.enable_grad():
        bound = torch.ones((), requires_grad=True)
        (gradient,) = torch.autograd.grad(bound.clamp(-1, 1), bound)
    return gradient.item()


def _like(z: Tensor, other: Tensor | float) -> Tensor:
    return other if isinstance(other, Tensor) else torch.full((), other, dtype=z.dtype, device=z.device)


def _bounds(low: float, high: float) -> str | None:
    return f"min_val {low} is greater than max_val {high}" if low > high else None


def _number(name: str, default: float | None = None) -> Parameter:
    return Parameter(name, default)


def _operand(name: str, reference: Callable[..., Tensor]) -> Stage:
    return Stage(name, reference, name, (Parameter("operand", name),), operand=True)


_TABLE = (
    # Operand stages: the argument is a tensor's name, x, or a number.
    _operand("add", lambda z, b: z + b),
    _operand("sub", lambda z, b: z - b),
    _operand("rsub", lambda z, b: b - z),
    _operand("mul", lambda z, b: z * b),
    _operand("div", lambda z, b: z / b),
    _operand("minimum", lambda z, b: torch.minimum(z, _like(z, b))),
    _operand("maximum", lambda z, b: torch.maximum(z, _like(z, b))),
    # Piecewise linear stages.
    Stage(
        "clamp",
        lambda z, low, high: z.clamp(None if low == -math.inf else low, None if high == math.inf else high),
        "clamp(-0.5, 0.75)",
        (_number("min", -math.inf), _number("max", math.inf)),
        problem=lambda low, high: "give min, max or both" if low == -math.inf and high == math.inf else None,
        constants=lambda low, high: (low, high, clamp_gradient_at_bound()),
    ),
    Stage("relu", F.relu, "relu"),
    Stage("relu6", F.relu6, "relu6"),
    Stage("hardtanh", F.hardtanh, "hardtanh", (_number("min_val", -1.0), _number("max_val", 1.0)), problem=_bounds),
    Stage("leaky_relu", F.leaky_relu, "leaky_relu", (_number("negative_slope", 0.01),)),
    Stage("threshold", F.threshold, "threshold(0.5, 0.25)", (_number("threshold"), _number("value"))),
    Stage("hardshrink", F.hardshrink, "hardshrink", (_number("lambd", 0.5),)),
    Stage(
        "softshrink",
        F.softshrink,
        "softshrink",
        (_number("lambd", 0.5),),
        problem=lambda lambd: "lambd must not be negative" if lambd < 0 else None,
    ),
    Stage("hardsigmoid", F.hardsigmoid, "hardsigmoid"),
    Stage("hardswish", F.hardswish, "hardswish"),
    # Smooth stages.
    Stage("elu", F.elu, "elu", (_number("alpha", 1.0),)),
    Stage("selu", F.selu, "selu"),
    Stage(
        "celu",
        F.celu,
        "celu(1.5)",
        (_number("alpha", 1.0),),
        problem=lambda alpha: "alpha must not be zero" if alpha == 0 else None,
    ),
    Stage("sigmoid", torch.sigmoid, "sigmoid"),
    Stage("silu", F.silu, "silu", aliases=("swish",)),
    Stage("tanh", torch.tanh, "tanh"),
    Stage("tanhshrink", F.tanhshrink, "tanhshrink"),
    Stage(
        "softplus",
        F.softplus,
        "softplus",
        (_number("beta", 1.0), _number("threshold", 20.0)),
        problem=lambda beta, threshold: "beta must not be zero" if beta == 0 else None,
    ),
    Stage("logsigmoid", F.logsigmoid, "logsigmoid"),
    Stage("mish", F.mish, "mish"),
    Stage("softsign", F.softsign, "softsign"),
    Stage(
        "gelu",
        lambda z, approximate: F.gelu(z, approximate=approximate),
        "gelu",
        (Parameter("approximate", "none", words=("none", "tanh")),),
        kernel_name=lambda approximate: "gelu_tanh" if approximate == "tanh" else "gelu",
    ),
    # Plain functions.
    Stage("abs", torch.abs, "abs"),
    Stage("neg", torch.neg, "neg"),
    Stage("square", torch.square, "square"),
    Stage("sqrt", torch.sqrt, "abs | sqrt"),
    Stage("reciprocal", torch.reciprocal, "reciprocal"),
    Stage("exp", torch.exp, "exp"),
)

STAGES: dict[str, Stage] = {stage.name: stage for stage in _TABLE}
ALIASES: dict[str, str] = {alias: stage.name for stage in _TABLE for alias in stage.aliases}


@dataclass(frozen=True)
class Call:
    """A stage with its arguments, complete and in order. An operand stage's one argument is a float or a name."""

    stage: Stage
    arguments: tuple[Argument, ...] = ()

    @property
    def operand(self) -> Argument | None:
        """What an operand stage takes: a tensor's name, "x", or a number; None for the other stages."""
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
    """The stage `name` with arguments as in torch; raises ChainError for what the table does not allow."""
    stage = STAGES.get(ALIASES.get(name, name))
    if stage is None:
        raise ChainError(f"unknown stage {name!r}{_nearest(name)}; `dualop stages` lists them all")
    parameters = stage.parameters
    if len(positional) > len(parameters):
        raise ChainError(f"{name} takes {stage.signature}: at most {len(parameters)} arguments, {len(positional)} given")
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
            if not value.isidentifier() or value in ("inf", "nan"):
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

    near = difflib.get_close_matches(name, [*STAGES, *ALIASES], n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def __getattr__(name: str) -> Callable[..., Call]:
    """`stages.hardtanh(-1, 1)`: a constructor for every stage and alias of the table."""
    if name in STAGES or name in ALIASES:
        return lambda *arguments, **keywords: call(name, *arguments, **keywords)
    raise AttributeError(f"module 'dualop.stages' has no attribute {name!r}")
