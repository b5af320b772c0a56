"""List the stages: every fact about a stage but its kernels; `entry.py` describes an entry.

The kernels implement the same names in the same order in `cuda/stages/` and `triton_kernels/stages/`.
"""

from __future__ import annotations

import math
import operator

import torch
import torch.nn.functional as F

from dualop.language import derivatives, ranges
from dualop.language.derivatives import SELU_ALPHA, SELU_SCALE, exp_below_zero, extremum, kept
from dualop.language.entry import PIECEWISE_LINEAR, Excuse, Parameter, Stage, operand_stage
from dualop.language.ranges import EVERYTHING

aten = torch.ops.aten


def _invertible(alpha: float) -> str | None:
    inside = 1e-38 <= abs(alpha) <= 1e38  # its inverse has to be a float32 number, too
    return None if inside else f"alpha must be from 1e-38 to 1e38 in magnitude, not {alpha}"


def _bounds(low: float, high: float) -> str | None:
    return f"min_val {low} is greater than max_val {high}" if low > high else None


def _number(name: str, default: float | None = None) -> Parameter:
    return Parameter(name, default)


TABLE = (
    # Operand stages: the argument is a tensor's name, x, or a number.
    operand_stage("add", lambda z, b: z + b, lambda g, z, b: (g, g), 0.0),
    operand_stage("sub", lambda z, b: z - b, lambda g, z, b: (g, -g), 0.0),
    operand_stage("rsub", lambda z, b: b - z, lambda g, z, b: (-g, g), 0.0),
    operand_stage("mul", lambda z, b: z * b, lambda g, z, b: (g * b, g * z), 1.25),
    operand_stage("div", lambda z, b: z / b, lambda g, z, b: (g / b, -g * (z / b) / b), 3.0),
    operand_stage("minimum", *extremum(torch.minimum, operator.gt), 0.5),
    operand_stage("maximum", *extremum(torch.maximum, operator.lt), 0.5),
    # Piecewise linear stages.
    Stage(
        "clamp",
        derivatives.clamp,
        derivatives.clamp_gradient,
        "clamp(-0.5, 0.75)",
        (_number("min", -math.inf), _number("max", math.inf)),
        second=PIECEWISE_LINEAR,
        problem=lambda low, high: "give min, max or both" if low == -math.inf and high == math.inf else None,
        constants=lambda low, high: (low, high, derivatives.clamp_gradient_at_bound()),
        range=ranges.clipped,
        kinks=(-0.5, 0.75),
    ),
    Stage(
        "relu",
        F.relu,
        lambda g, z: aten.threshold_backward(g, z, 0),
        "relu",
        second=PIECEWISE_LINEAR,
        range=lambda low, high: ranges.clipped(low, high, 0.0, math.inf),
        kinks=(0.0,),
        steady=True,
        clips=True,
    ),
    Stage(
        "hardtanh",
        F.hardtanh,
        aten.hardtanh_backward,
        "hardtanh",
        (_number("min_val", -1.0), _number("max_val", 1.0)),
        second=PIECEWISE_LINEAR,
        problem=_bounds,
        range=ranges.clipped,
        kinks=(-1.0, 1.0),
        steady=True,
        clips=True,
    ),
    Stage(
        "relu6",
        F.relu6,
        lambda g, z: aten.hardtanh_backward(g, z, 0, 6),
        "relu6",
        second=PIECEWISE_LINEAR,
        range=lambda low, high: ranges.clipped(low, high, 0.0, 6.0),
        kinks=(0.0, 6.0),
        steady=True,
        clips=True,
    ),
    Stage(
        "leaky_relu",
        F.leaky_relu,
        lambda g, z, slope: aten.leaky_relu_backward(g, z, slope, False),
        "leaky_relu",
        (_number("negative_slope", 0.01),),
        second=PIECEWISE_LINEAR,
        range=EVERYTHING,
        kinks=(0.0,),
        steady=True,
    ),
    Stage(
        "threshold",
        F.threshold,
        lambda g, z, threshold, value: aten.threshold_backward(g, z, threshold),
        "threshold(0.5, 0.25)",
        (_number("threshold"), _number("value")),
        second=PIECEWISE_LINEAR,
        range=EVERYTHING,
        kinks=(0.5,),
    ),
    Stage(
        "hardshrink",
        F.hardshrink,
        aten.hardshrink_backward,
        "hardshrink",
        (_number("lambd", 0.5),),
        second=PIECEWISE_LINEAR,
        range=EVERYTHING,
        kinks=(-0.5, 0.5),
    ),
    Stage(
        "softshrink",
        lambda z, lambd: F.softshrink(z, lambd) if lambd < math.inf else z * 0,  # which torch refuses
        aten.softshrink_backward,
        "softshrink",
        (_number("lambd", 0.5),),
        second=PIECEWISE_LINEAR,
        problem=lambda lambd: "lambd must not be negative" if lambd < 0 else None,
        range=EVERYTHING,
        kinks=(-0.5, 0.5),
    ),
    Stage(
        "hardsigmoid",
        F.hardsigmoid,
        lambda g, z: kept((z > -3) & (z < 3), g / 6),
        "hardsigmoid",
        second=PIECEWISE_LINEAR,
        range=(0.0, 1.0),
        kinks=(-3.0, 3.0),
        exact=derivatives.hardsigmoid,
    ),
    Stage(
        "hardswish",
        F.hardswish,
        aten.hardswish_backward,
        "hardswish",
        second=derivatives.hardswish_second,
        range=ranges.dip(lambda z: z, -0.3751),
        kinks=(-3.0, 3.0),
        exact=lambda z: z * derivatives.hardsigmoid(z),
    ),
    # Smooth stages.
    Stage(
        "elu",
        F.elu,
        lambda g, z, alpha: aten.elu_backward(g, alpha, 1.0, 1.0, False, z),
        "elu",
        (_number("alpha", 1.0),),
        second=exp_below_zero,
        range=EVERYTHING,
        kinks=(0.0,),
        steady=True,
    ),
    Stage(
        "selu",
        F.selu,
        lambda g, z: aten.elu_backward(g, SELU_ALPHA, SELU_SCALE, 1.0, False, z),
        "selu",
        second=lambda z: exp_below_zero(z, SELU_SCALE * SELU_ALPHA),
        range=EVERYTHING,
        kinks=(0.0,),
        steady=True,
    ),
    Stage(
        "celu",
        F.celu,
        lambda g, z, alpha: aten.elu_backward(g, alpha, 1.0, 1.0 / alpha, False, z),
        "celu(1.5)",
        (_number("alpha", 1.0),),
        second=lambda z, alpha: exp_below_zero(z, 1 / alpha, 1 / alpha),
        problem=_invertible,
        range=EVERYTHING,
        kinks=(0.0,),
        steady=True,
    ),
    Stage(
        "sigmoid",
        torch.sigmoid,
        lambda g, z: aten.sigmoid_backward(g, torch.sigmoid(z)),
        "sigmoid",
        second=derivatives.sigmoid_second,
        range=ranges.rising(ranges.sigmoid),
        kinks=(),
        steady=True,
    ),
    Stage(
        "silu",
        F.silu,
        derivatives.silu_gradient,
        "silu",
        second=derivatives.silu_second,
        aliases=("swish",),
        range=ranges.dip(lambda z: z * ranges.sigmoid(z), -0.2785),
        kinks=(),
        steady=True,
        joined={"tanh": "silu_tanh", "tanh_approx": "silu_tanh_approx"},
    ),
    Stage(
        "tanh",
        torch.tanh,
        lambda g, z: aten.tanh_backward(g, torch.tanh(z)),
        "tanh",
        second=derivatives.tanh_second,
        range=ranges.rising(math.tanh),
        kinks=(),
        steady=True,
        approximate="tanh_approx",
    ),
    Stage(
        "tanhshrink",
        F.tanhshrink,
        lambda g, z: g * torch.tanh(z).square(),
        "tanhshrink",
        second=lambda z: -derivatives.tanh_second(z),
        range=EVERYTHING,
        kinks=(),
    ),
    Stage(
        "softplus",
        F.softplus,
        aten.softplus_backward,
        "softplus",
        (_number("beta", 1.0), _number("threshold", 20.0)),
        second=derivatives.softplus_second,
        problem=lambda beta, threshold: "beta must not be zero" if beta == 0 else None,
        range=EVERYTHING,
        kinks=(20.0,),
        steady=True,
    ),
    Stage(
        "logsigmoid",
        F.logsigmoid,
        lambda g, z: g * torch.sigmoid(-z),
        "logsigmoid",
        second=lambda z: -derivatives.sigmoid_slope(z),
        range=EVERYTHING,
        kinks=(),
    ),
    Stage(
        "mish",
        F.mish,
        derivatives.mish_gradient,
        "mish",
        second=derivatives.mish_second,
        range=ranges.dip(lambda z: z, -0.3089),
        kinks=(),
        steady=True,
        within={"mish": ((-0.31, math.inf, "mish_upper"),)},
    ),
    Stage(
        "softsign",
        F.softsign,
        lambda g, z: g / (1 + z.abs()).square(),
        "softsign",
        second=derivatives.softsign_second,
        range=(-1.0, 1.0),
        kinks=(0.0,),
    ),
    Stage(
        "gelu",
        lambda z, approximate: F.gelu(z, approximate=approximate),
        lambda g, z, approximate: aten.gelu_backward(g, z, approximate=approximate),
        "gelu",
        (Parameter("approximate", "none", words=("none", "tanh")),),
        second=derivatives.gelu_second,
        kernel_name=lambda approximate: "gelu_tanh" if approximate == "tanh" else "gelu",
        range=ranges.dip(lambda z: z * ranges.normcdf(z) + 5e-4, -0.1705),
        kinks=(),
        steady=True,
        excuses={
            ("float16", "gradient"): Excuse(0.56, "a normal distribution good to 1.5e-7, where the gradient is 0.001")
        },
        within={"gelu": ((-0.5, 1.0, "gelu_upper"), (-1.0, 1.0, "gelu_unit"))},
    ),
    # Plain functions.
    Stage(
        "abs",
        torch.abs,
        lambda g, z: g * z.sgn(),
        "abs",
        second=PIECEWISE_LINEAR,
        range=lambda low, high: (0.0, max(-low, high)),
        kinks=(0.0,),
        steady=True,
    ),
    Stage(
        "neg",
        torch.neg,
        lambda g, z: -g,
        "neg",
        second=PIECEWISE_LINEAR,
        range=EVERYTHING,
        kinks=(),
        steady=True,
    ),
    Stage(
        "square",
        torch.square,
        lambda g, z: g * (2 * z),
        "square",
        second=lambda z: torch.full_like(z, 2.0),
        range=EVERYTHING,
        kinks=(),
    ),
    Stage(
        "sqrt",
        torch.sqrt,
        lambda g, z: g / (2 * z.sqrt()),
        "abs | sqrt",
        second=lambda z: -0.25 / (z * z.sqrt()),
        range=EVERYTHING,
        kinks=(0.0,),
    ),
    Stage(
        "reciprocal",
        torch.reciprocal,
        lambda g, z: -g * z.reciprocal().square(),
        "reciprocal",
        second=lambda z: 2 * z.reciprocal() ** 3,
        range=EVERYTHING,
        kinks=(0.0,),
    ),
    Stage(
        "exp",
        torch.exp,
        lambda g, z: g * z.exp(),
        "exp",
        second=torch.exp,
        range=(0.0, math.inf),
        kinks=(),
        steady=True,
    ),
    Stage("sin", torch.sin, lambda g, z: g * z.cos(), "sin", second=lambda z: -z.sin(), range=(-1.0, 1.0), kinks=()),
)
