"""Piecewise linear stages, and hardswish, which is piecewise quadratic.

`__init__.py` says what each has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..math import divide
from ..platform import max_nan, min_nan, number


# at_bound: the derivative at the bounds, 1 or 0, as the installed torch has it. An infinite bound is none: 1 there.
@triton.jit
def clamp(z, min: tl.constexpr, max: tl.constexpr, at_bound: tl.constexpr, BITS: tl.constexpr):
    return min_nan(max_nan(z, number(z, min)), number(z, max))


@triton.jit
def clamp_backward(z, gy, min: tl.constexpr, max: tl.constexpr, at_bound: tl.constexpr, BITS: tl.constexpr):
    low, high = number(z, min), number(z, max)
    if at_bound != 0 or min == float("-inf"):
        above = z >= low
    else:
        above = z > low
    if at_bound != 0 or max == float("inf"):
        below = z <= high
    else:
        below = z < high
    return tl.where(above & below, gy, 0.0)


@triton.jit
def relu(z, BITS: tl.constexpr):
    return tl.where(z <= 0, 0.0, z)


@triton.jit
def relu_backward(z, gy, BITS: tl.constexpr):
    return tl.where(z <= 0, 0.0, gy)


@triton.jit
def hardtanh(z, min_val: tl.constexpr, max_val: tl.constexpr, BITS: tl.constexpr):
    return min_nan(max_nan(z, number(z, min_val)), number(z, max_val))


@triton.jit
def hardtanh_backward(z, gy, min_val: tl.constexpr, max_val: tl.constexpr, BITS: tl.constexpr):
    return tl.where((z <= number(z, min_val)) | (z >= number(z, max_val)), 0.0, gy)


@triton.jit
def relu6(z, BITS: tl.constexpr):
    return hardtanh(z, 0.0, 6.0, BITS)


@triton.jit
def relu6_backward(z, gy, BITS: tl.constexpr):
    return hardtanh_backward(z, gy, 0.0, 6.0, BITS)


@triton.jit
def leaky_relu(z, negative_slope: tl.constexpr, BITS: tl.constexpr):
    return tl.where(z > 0, z, z * number(z, negative_slope))


@triton.jit
def leaky_relu_backward(z, gy, negative_slope: tl.constexpr, BITS: tl.constexpr):
    return tl.where(z > 0, gy, gy * number(z, negative_slope))


@triton.jit
def threshold(z, threshold_: tl.constexpr, replacement: tl.constexpr, BITS: tl.constexpr):
    return tl.where(z <= number(z, threshold_), number(z, replacement), z)


@triton.jit
def threshold_backward(z, gy, threshold_: tl.constexpr, replacement: tl.constexpr, BITS: tl.constexpr):
    return tl.where(z <= number(z, threshold_), 0.0, gy)


@triton.jit
def hardshrink(z, lambd: tl.constexpr, BITS: tl.constexpr):
    return tl.where((z >= -number(z, lambd)) & (z <= number(z, lambd)), 0.0, z)


@triton.jit
def hardshrink_backward(z, gy, lambd: tl.constexpr, BITS: tl.constexpr):
    return tl.where((z >= -number(z, lambd)) & (z <= number(z, lambd)), 0.0, gy)


@triton.jit
def softshrink(z, lambd: tl.constexpr, BITS: tl.constexpr):
    low = number(z, lambd)
    return tl.where(z > low, z - low, tl.where(z < -low, z + low, z * 0.0))  # z * 0 keeps NaN


@triton.jit
def softshrink_backward(z, gy, lambd: tl.constexpr, BITS: tl.constexpr):
    return tl.where((z >= -number(z, lambd)) & (z <= number(z, lambd)), 0.0, gy)


@triton.jit
def hardsigmoid(z, BITS: tl.constexpr):
    sixfold = min_nan(max_nan(z + 3.0, number(z, 0.0)), number(z, 6.0))
    if BITS <= 11:
        return sixfold * (1.0 / 6)
    else:
        return divide(sixfold, number(z, 6.0), BITS)


@triton.jit
def hardsigmoid_backward(z, gy, BITS: tl.constexpr):
    return tl.where((z > -3.0) & (z < 3.0), gy * (1.0 / 6), 0.0)


@triton.jit
def hardswish(z, BITS: tl.constexpr):
    return z * hardsigmoid(z, BITS)


@triton.jit
def hardswish_backward(z, gy, BITS: tl.constexpr):
    return tl.where(z <= -3.0, 0.0, tl.where(z < 3.0, gy * ((z + 1.5) * (1.0 / 3)), gy))


@triton.jit
def hardswish_second(z, BITS: tl.constexpr):
    return tl.where((z > -3.0) & (z < 3.0), number(z, 1.0 / 3), 0.0)
