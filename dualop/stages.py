"""The one table of stages: names, parameters and defaults, and what each means in torch.

The kernels implement the same names in the same order in `cuda/stages.cuh` and `triton_kernels/stages.py`. Everything
that needs a list of stages (parser, tests, benchmarks, command line) reads `STAGES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dualop.errors import ChainError

aten = torch.ops.aten

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
    `gradient(gy, z, *arguments)` is the gradient of z by torch's differentiable functions; for an operand stage the
    pair of gradients of z and of the operand, not yet summed over what was broadcast.
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
    whole = argument.is_integer() and abs(argument) < 1e6 and str(argument) != "-0.0"
    return str(int(argument)) if whole else repr(argument)


@lru_cache(maxsize=1)
def clamp_gradient_at_bound() -> float:
    """1.0 or 0.0: clamp's derivative at its own bounds, which differs between releases of torch.

    Asked in a thread of its own: the calling one may be inside an op, a transform or a fake mode.
    """

    def ask() -> float:
        bound = torch.ones((), requires_grad=True)
        (gradient,) = torch.autograd.grad(bound.clamp(-1, 1), bound)
        return gradient.item()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()


def _like(z: Tensor, other: Tensor | float) -> Tensor:
    return other if isinstance(other, Tensor) else torch.full((), other, dtype=z.dtype, device=z.device)


def _bounds(low: float, high: float) -> str | None:
    return f"min_val {low} is greater than max_val {high}" if low > high else None


def _number(name: str, default: float | None = None) -> Parameter:
    return Parameter(name, default)


def _operand(name: str, reference: Callable[..., Tensor], gradient: Callable[..., tuple[Tensor, Tensor]]) -> Stage:
    return Stage(name, reference, gradient, name, (Parameter("operand", name),), operand=True)


def _kept(condition: Tensor, gy: Tensor) -> Tensor:
    return torch.where(condition, gy, torch.zeros_like(gy))


def _extremum(gy: Tensor, z: Tensor, b: Tensor | float, loses: Callable[[Any, Any], Tensor]) -> tuple[Tensor, Tensor]:
    share = torch.where(z == b, gy / 2, gy)
    return _kept(~loses(z, b), share), _kept(~loses(-z, -b), share)


def _clamp_gradient(gy: Tensor, z: Tensor, low: float, high: float) -> Tensor:
    # An infinite bound is none, so the derivative at infinity is 1 there.
    at_bound = clamp_gradient_at_bound()
    above = z >= low if at_bound or low == -math.inf else z > low
    below = z <= high if at_bound or high == math.inf else z < high
    return _kept(above & below, gy)


# aten's silu_backward, mish_backward and hardsigmoid_backward cannot be differentiated again.
def _silu_gradient(gy: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return gy * (s * (1 + z * (1 - s)))


def _mish_gradient(gy: Tensor, z: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(z))
    return gy * (t + z * torch.sigmoid(z) * (1 - t * t))


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

_TABLE = (
    # Operand stages: the argument is a tensor's name, x, or a number.
    _operand("add", lambda z, b: z + b, lambda g, z, b: (g, g)),
    _operand("sub", lambda z, b: z - b, lambda g, z, b: (g, -g)),
    _operand("rsub", lambda z, b: b - z, lambda g, z, b: (-g, g)),
    _operand("mul", lambda z, b: z * b, lambda g, z, b: (g * b, g * z)),
    _operand("div", lambda z, b: z / b, lambda g, z, b: (g / b, -g * (z / b) / b)),
    _operand(
        "minimum",
        lambda z, b: torch.minimum(z, _like(z, b)),
        lambda g, z, b: _extremum(g, z, b, lambda mine, other: mine > other),
    ),
    _operand(
        "maximum",
        lambda z, b: torch.maximum(z, _like(z, b)),
        lambda g, z, b: _extremum(g, z, b, lambda mine, other: mine < other),
    ),
    # Piecewise linear stages.
    Stage(
        "clamp",
        lambda z, low, high: z.clamp(None if low == -math.inf else low, None if high == math.inf else high),
        _clamp_gradient,
        "clamp(-0.5, 0.75)",
        (_number("min", -math.inf), _number("max", math.inf)),
        problem=lambda low, high: "give min, max or both" if low == -math.inf and high == math.inf else None,
        constants=lambda low, high: (low, high, clamp_gradient_at_bound()),
    ),
    Stage("relu", F.relu, lambda g, z: aten.threshold_backward(g, z, 0), "relu"),
    Stage(
        "hardtanh",
        F.hardtanh,
        aten.hardtanh_backward,
        "hardtanh",
        (_number("min_val", -1.0), _number("max_val", 1.0)),
        problem=_bounds,
    ),
    Stage("relu6", F.relu6, lambda g, z: aten.hardtanh_backward(g, z, 0, 6), "relu6"),
    Stage(
        "leaky_relu",
        F.leaky_relu,
        lambda g, z, slope: aten.leaky_relu_backward(g, z, slope, False),
        "leaky_relu",
        (_number("negative_slope", 0.01),),
    ),
    Stage(
        "threshold",
        F.threshold,
        lambda g, z, threshold, value: aten.threshold_backward(g, z, threshold),
        "threshold(0.5, 0.25)",
        (_number("threshold"), _number("value")),
    ),
    Stage("hardshrink", F.hardshrink, aten.hardshrink_backward, "hardshrink", (_number("lambd", 0.5),)),
    Stage(
        "softshrink",
        F.softshrink,
        aten.softshrink_backward,
        "softshrink",
        (_number("lambd", 0.5),),
        problem=lambda lambd: "lambd must not be negative" if lambd < 0 else None,
    ),
    Stage("hardsigmoid", F.hardsigmoid, lambda g, z: _kept((z > -3) & (z < 3), g / 6), "hardsigmoid"),
    Stage("hardswish", F.hardswish, aten.hardswish_backward, "hardswish"),
    # Smooth stages.
    Stage(
        "elu",
        F.elu,
        lambda g, z, alpha: aten.elu_backward(g, alpha, 1.0, 1.0, False, z),
        "elu",
        (_number("alpha", 1.0),),
    ),
    Stage("selu", F.selu, lambda g, z: aten.elu_backward(g, _SELU_ALPHA, _SELU_SCALE, 1.0, False, z), "selu"),
    Stage(
        "celu",
        F.celu,
        lambda g, z, alpha: aten.elu_backward(g, alpha, 1.0, 1.0 / alpha, False, z),
        "celu(1.5)",
        (_number("alpha", 1.0),),
        problem=lambda alpha: "alpha must not be zero" if alpha == 0 else None,
    ),
    Stage("sigmoid", torch.sigmoid, lambda g, z: aten.sigmoid_backward(g, torch.sigmoid(z)), "sigmoid"),
    Stage("silu", F.silu, _silu_gradient, "silu", aliases=("swish",)),
    Stage("tanh", torch.tanh, lambda g, z: aten.tanh_backward(g, torch.tanh(z)), "tanh"),
    Stage("tanhshrink", F.tanhshrink, lambda g, z: g * torch.tanh(z).square(), "tanhshrink"),
    Stage(
        "softplus",
        F.softplus,
        aten.softplus_backward,
        "softplus",
        (_number("beta", 1.0), _number("threshold", 20.0)),
        problem=lambda beta, threshold: "beta must not be zero" if beta == 0 else None,
    ),
    Stage("logsigmoid", F.logsigmoid, lambda g, z: g * torch.sigmoid(-z), "logsigmoid"),
    Stage("mish", F.mish, _mish_gradient, "mish"),
    Stage("softsign", F.softsign, lambda g, z: g / (1 + z.abs()).square(), "softsign"),
    Stage(
        "gelu",
        lambda z, approximate: F.gelu(z, approximate=approximate),
        lambda g, z, approximate: aten.gelu_backward(g, z, approximate=approximate),
        "gelu",
        (Parameter("approximate", "none", words=("none", "tanh")),),
        kernel_name=lambda approximate: "gelu_tanh" if approximate == "tanh" else "gelu",
    ),
    # Plain functions.
    Stage("abs", torch.abs, lambda g, z: g * z.sgn(), "abs"),
    Stage("neg", torch.neg, lambda g, z: -g, "neg"),
    Stage("square", torch.square, lambda g, z: g * (2 * z), "square"),
    Stage("sqrt", torch.sqrt, lambda g, z: g / (2 * z.sqrt()), "abs | sqrt"),
    Stage("reciprocal", torch.reciprocal, lambda g, z: -g * z.reciprocal().square(), "reciprocal"),
    Stage("exp", torch.exp, lambda g, z: g * z.exp(), "exp"),
)

# No operand's name: they read as numbers, or are parameters of a chain's call.
RESERVED = ("inf", "nan", "self", "backend")

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
    """`stages.hardtanh(-1, 1)`: a constructor for every stage and alias of the table."""
    if name in STAGES or name in ALIASES:
        return lambda *arguments, **keywords: call(name, *arguments, **keywords)
    raise AttributeError(f"module 'dualop.stages' has no attribute {name!r}")
