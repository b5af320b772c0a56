"""The one table of stages: names, parameters and defaults, what each means in torch, and its derivatives.

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
from dualop.language import derivatives
from dualop.language.derivatives import SELU_ALPHA, SELU_SCALE, exp_below_zero, extremum, kept
from dualop.language.entry import (
    PIECEWISE_LINEAR,
    Argument,
    Parameter,
    PiecewiseLinear,
    Stage,
    argument_text,
    in_float32_range,
)

aten = torch.ops.aten


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


def _invertible(alpha: float) -> str | None:
    inside = 1e-38 <= abs(alpha) <= 1e38  # its inverse has to be a float32 number, too
    return None if inside else f"alpha must be from 1e-38 to 1e38 in magnitude, not {alpha}"


def _bounds(low: float, high: float) -> str | None:
    return f"min_val {low} is greater than max_val {high}" if low > high else None


def _number(name: str, default: float | None = None) -> Parameter:
    return Parameter(name, default)


def _operand(
    name: str,
    reference: Callable[..., Tensor],
    gradient: Callable[..., tuple[Tensor, Tensor]],
    second: Callable[..., Tensor] | PiecewiseLinear,
) -> Stage:
    return Stage(name, reference, gradient, name, (Parameter("operand", name),), second=second, operand=True)


def _clamp(z: Tensor, low: float, high: float) -> Tensor:
    # torch wants one bound at least, where both were rounded to infinity, too.
    return z.clamp(low if low > -math.inf or high == math.inf else None, high if high < math.inf else None)


def _clamp_gradient(gy: Tensor, z: Tensor, low: float, high: float) -> Tensor:
    # An infinite bound is none, so the derivative at infinity is 1 there.
    at_bound = clamp_gradient_at_bound()
    above = z >= low if at_bound or low == -math.inf else z > low
    below = z <= high if at_bound or high == math.inf else z < high
    return kept(above & below, gy)


_TABLE = (
    # Operand stages: the argument is a tensor's name, x, or a number.
    _operand("add", lambda z, b: z + b, lambda g, z, b: (g, g), PIECEWISE_LINEAR),
    _operand("sub", lambda z, b: z - b, lambda g, z, b: (g, -g), PIECEWISE_LINEAR),
    _operand("rsub", lambda z, b: b - z, lambda g, z, b: (-g, g), PIECEWISE_LINEAR),
    _operand("mul", lambda z, b: z * b, lambda g, z, b: (g * b, g * z), PIECEWISE_LINEAR),
    _operand("div", lambda z, b: z / b, lambda g, z, b: (g / b, -g * (z / b) / b), PIECEWISE_LINEAR),
    _operand(
        "minimum",
        lambda z, b: torch.minimum(z, _like(z, b)),
        lambda g, z, b: extremum(g, z, b, lambda mine, other: mine > other),
        PIECEWISE_LINEAR,
    ),
    _operand(
        "maximum",
        lambda z, b: torch.maximum(z, _like(z, b)),
        lambda g, z, b: extremum(g, z, b, lambda mine, other: mine < other),
        PIECEWISE_LINEAR,
    ),
    # Piecewise linear stages.
    Stage(
        "clamp",
        _clamp,
        _clamp_gradient,
        "clamp(-0.5, 0.75)",
        (_number("min", -math.inf), _number("max", math.inf)),
        second=PIECEWISE_LINEAR,
        problem=lambda low, high: "give min, max or both" if low == -math.inf and high == math.inf else None,
        constants=lambda low, high: (low, high, clamp_gradient_at_bound()),
    ),
    Stage("relu", F.relu, lambda g, z: aten.threshold_backward(g, z, 0), "relu", second=PIECEWISE_LINEAR),
    Stage(
        "hardtanh",
        F.hardtanh,
        aten.hardtanh_backward,
        "hardtanh",
        (_number("min_val", -1.0), _number("max_val", 1.0)),
        second=PIECEWISE_LINEAR,
        problem=_bounds,
    ),
    Stage("relu6", F.relu6, lambda g, z: aten.hardtanh_backward(g, z, 0, 6), "relu6", second=PIECEWISE_LINEAR),
    Stage(
        "leaky_relu",
        F.leaky_relu,
        lambda g, z, slope: aten.leaky_relu_backward(g, z, slope, False),
        "leaky_relu",
        (_number("negative_slope", 0.01),),
        second=PIECEWISE_LINEAR,
    ),
    Stage(
        "threshold",
        F.threshold,
        lambda g, z, threshold, value: aten.threshold_backward(g, z, threshold),
        "threshold(0.5, 0.25)",
        (_number("threshold"), _number("value")),
        second=PIECEWISE_LINEAR,
    ),
    Stage(
        "hardshrink",
        F.hardshrink,
        aten.hardshrink_backward,
        "hardshrink",
        (_number("lambd", 0.5),),
        second=PIECEWISE_LINEAR,
    ),
    Stage(
        "softshrink",
        lambda z, lambd: F.softshrink(z, lambd) if lambd < math.inf else z * 0,  # which torch refuses
        aten.softshrink_backward,
        "softshrink",
        (_number("lambd", 0.5),),
        second=PIECEWISE_LINEAR,
        problem=lambda lambd: "lambd must not be negative" if lambd < 0 else None,
    ),
    Stage(
        "hardsigmoid",
        F.hardsigmoid,
        lambda g, z: kept((z > -3) & (z < 3), g / 6),
        "hardsigmoid",
        second=PIECEWISE_LINEAR,
    ),
    Stage("hardswish", F.hardswish, aten.hardswish_backward, "hardswish", second=derivatives.hardswish_second),
    # Smooth stages.
    Stage(
        "elu",
        F.elu,
        lambda g, z, alpha: aten.elu_backward(g, alpha, 1.0, 1.0, False, z),
        "elu",
        (_number("alpha", 1.0),),
        second=exp_below_zero,
    ),
    Stage(
        "selu",
        F.selu,
        lambda g, z: aten.elu_backward(g, SELU_ALPHA, SELU_SCALE, 1.0, False, z),
        "selu",
        second=lambda z: exp_below_zero(z, SELU_SCALE * SELU_ALPHA),
    ),
    Stage(
        "celu",
        F.celu,
        lambda g, z, alpha: aten.elu_backward(g, alpha, 1.0, 1.0 / alpha, False, z),
        "celu(1.5)",
        (_number("alpha", 1.0),),
        second=lambda z, alpha: exp_below_zero(z, 1 / alpha, 1 / alpha),
        problem=_invertible,
    ),
    Stage(
        "sigmoid",
        torch.sigmoid,
        lambda g, z: aten.sigmoid_backward(g, torch.sigmoid(z)),
        "sigmoid",
        second=derivatives.sigmoid_second,
    ),
    Stage("silu", F.silu, derivatives.silu_gradient, "silu", second=derivatives.silu_second, aliases=("swish",)),
    Stage(
        "tanh", torch.tanh, lambda g, z: aten.tanh_backward(g, torch.tanh(z)), "tanh", second=derivatives.tanh_second
    ),
    Stage(
        "tanhshrink",
        F.tanhshrink,
        lambda g, z: g * torch.tanh(z).square(),
        "tanhshrink",
        second=lambda z: -derivatives.tanh_second(z),
    ),
    Stage(
        "softplus",
        F.softplus,
        aten.softplus_backward,
        "softplus",
        (_number("beta", 1.0), _number("threshold", 20.0)),
        second=derivatives.softplus_second,
        problem=lambda beta, threshold: "beta must not be zero" if beta == 0 else None,
    ),
    Stage(
        "logsigmoid",
        F.logsigmoid,
        lambda g, z: g * torch.sigmoid(-z),
        "logsigmoid",
        second=lambda z: -derivatives.sigmoid_slope(z),
    ),
    Stage("mish", F.mish, derivatives.mish_gradient, "mish", second=derivatives.mish_second),
    Stage(
        "softsign", F.softsign, lambda g, z: g / (1 + z.abs()).square(), "softsign", second=derivatives.softsign_second
    ),
    Stage(
        "gelu",
        lambda z, approximate: F.gelu(z, approximate=approximate),
        lambda g, z, approximate: aten.gelu_backward(g, z, approximate=approximate),
        "gelu",
        (Parameter("approximate", "none", words=("none", "tanh")),),
        second=derivatives.gelu_second,
        kernel_name=lambda approximate: "gelu_tanh" if approximate == "tanh" else "gelu",
    ),
    # Plain functions.
    Stage("abs", torch.abs, lambda g, z: g * z.sgn(), "abs", second=PIECEWISE_LINEAR),
    Stage("neg", torch.neg, lambda g, z: -g, "neg", second=PIECEWISE_LINEAR),
    Stage("square", torch.square, lambda g, z: g * (2 * z), "square", second=lambda z: torch.full_like(z, 2.0)),
    Stage("sqrt", torch.sqrt, lambda g, z: g / (2 * z.sqrt()), "abs | sqrt", second=lambda z: -0.25 / (z * z.sqrt())),
    Stage(
        "reciprocal",
        torch.reciprocal,
        lambda g, z: -g * z.reciprocal().square(),
        "reciprocal",
        second=lambda z: 2 * z.reciprocal() ** 3,
    ),
    Stage("exp", torch.exp, lambda g, z: g * z.exp(), "exp", second=torch.exp),
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

    def numbers(self, dtype: torch.dtype) -> tuple[Argument, ...]:
        """The arguments for tensors of `dtype`: in float32 arithmetic as the kernels round them, to infinity too.

        torch rounds them as well, but refuses those beyond float32's range in some functions.
        """
        return self.arguments if dtype == torch.float64 else tuple(map(in_float32_range, self.arguments))

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
