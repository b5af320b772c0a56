"""Smooth stages of one exponential, from elu to tanhshrink.

`__init__.py` says what each has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import float32, math, platform
from ..platform import number


@triton.jit
def elu(z, alpha: tl.constexpr, BITS: tl.constexpr):
    return tl.where(z < 0, number(z, alpha) * math.expm1(z, BITS), z)


@triton.jit
def elu_backward(z, gy, alpha: tl.constexpr, BITS: tl.constexpr):
    return tl.where(z <= 0, gy * number(z, alpha) * math.exp_neg(-z, BITS), gy)


@triton.jit
def elu_second(z, alpha: tl.constexpr, BITS: tl.constexpr):
    return tl.where(z < 0, number(z, alpha) * math.exp(z, BITS), 0.0)


# Klambauer et al. 2017: the constants for which mean 0 and variance 1 are a fixed point.
@triton.jit
def selu(z, BITS: tl.constexpr):
    scale: tl.constexpr = 1.0507009873554804934193349852946
    alpha: tl.constexpr = 1.6732632423543772848170429916717
    return tl.where(z <= 0, number(z, scale * alpha) * math.expm1(z, BITS), number(z, scale) * z)


@triton.jit
def selu_backward(z, gy, BITS: tl.constexpr):
    scale: tl.constexpr = 1.0507009873554804934193349852946
    return scale * elu_backward(z, gy, 1.6732632423543772848170429916717, BITS)


@triton.jit
def selu_second(z, BITS: tl.constexpr):
    scale: tl.constexpr = 1.0507009873554804934193349852946
    return scale * elu_second(z, 1.6732632423543772848170429916717, BITS)


@triton.jit
def celu(z, alpha: tl.constexpr, BITS: tl.constexpr):
    return tl.where(z <= 0, number(z, alpha) * math.expm1(z * number(z, 1.0 / alpha), BITS), z)


@triton.jit
def celu_backward(z, gy, alpha: tl.constexpr, BITS: tl.constexpr):
    inverse = number(z, 1.0 / alpha)
    if BITS == 24 and alpha > 0:
        return tl.where(z <= 0, gy * float32.exp_ratio(z, number(z, alpha), inverse), gy)
    else:
        return tl.where(z <= 0, gy * math.exp(z * inverse, BITS), gy)


@triton.jit
def celu_second(z, alpha: tl.constexpr, BITS: tl.constexpr):
    inverse = number(z, 1.0 / alpha)
    return tl.where(z < 0, inverse * math.exp(z * inverse, BITS), 0.0)


@triton.jit
def sigmoid(z, BITS: tl.constexpr):
    return math.sigmoid_alone(z, BITS)


@triton.jit
def sigmoid_inner(z, BITS: tl.constexpr):
    return math.sigmoid(z, BITS)


@triton.jit
def sigmoid_backward(z, gy, BITS: tl.constexpr):
    return gy * math.sigmoid_slope(z, BITS)


@triton.jit
def sigmoid_second(z, BITS: tl.constexpr):
    return math.sigmoid_second(z, BITS)


# y' = s + z s'
@triton.jit
def silu(z, BITS: tl.constexpr):
    if BITS == 24:
        return float32.silu(z)
    else:
        return z * math.sigmoid_alone(z, BITS)


@triton.jit
def silu_backward(z, gy, BITS: tl.constexpr):
    if BITS == 24:
        factor, more, _, _ = float32.silu_slope(z)
        return gy * float32.slope(factor, more)
    elif BITS <= 11:
        s = math.sigmoid_alone(z, BITS)
        return gy * (s + (z * s) * (1.0 - s))
    else:
        return gy * (math.sigmoid(z, BITS) + z * math.sigmoid_slope(z, BITS))


# 2 s' + z s''
@triton.jit
def silu_second(z, BITS: tl.constexpr):
    return 2.0 * math.sigmoid_slope(z, BITS) + z * math.sigmoid_second(z, BITS)


@triton.jit
def tanh(z, BITS: tl.constexpr):
    return math.tanh(z, BITS)


# A 16-bit gradient does not show its error, which is 2^-23 of 1.
@triton.jit
def tanh_inner(z, BITS: tl.constexpr):
    if BITS <= 11:
        return math.tanh_far(z, BITS)
    else:
        return math.tanh(z, BITS)


@triton.jit
def tanh_backward(z, gy, BITS: tl.constexpr):
    return gy * math.sech2(z, BITS)


@triton.jit
def tanh_second(z, BITS: tl.constexpr):
    return -2.0 * math.tanh_far(z, BITS) * math.sech2(z, BITS)


# tanh where nothing behind it can enlarge its error; chosen by dualop/language/program.py.
@triton.jit
def tanh_approx(z, BITS: tl.constexpr):
    if BITS == 8:
        return platform.tanh_approx(z)
    else:
        return math.tanh(z, BITS)


@triton.jit
def tanh_approx_inner(z, BITS: tl.constexpr):
    return tanh_inner(z, BITS)


@triton.jit
def tanh_approx_backward(z, gy, BITS: tl.constexpr):
    return tanh_backward(z, gy, BITS)


@triton.jit
def tanh_approx_second(z, BITS: tl.constexpr):
    return tanh_second(z, BITS)


# tanh(silu(z)) in one, since tanh's slope multiplies what silu was rounded by with 2 y; dualop/language/program.py
# chooses it.
@triton.jit
def silu_tanh(z, BITS: tl.constexpr):
    if BITS == 24:
        return float32.tanh_short(float32.silu(z))
    else:
        return tanh(silu(z, BITS), BITS)


@triton.jit
def silu_tanh_inner(z, BITS: tl.constexpr):
    if BITS == 24:
        _, _, y, rest = float32.silu_slope(z)
        _, _, value, _ = float32.tanh_slope(y, rest)
        return value
    else:
        return tanh_inner(silu(z, BITS), BITS)


@triton.jit
def silu_tanh_backward(z, gy, BITS: tl.constexpr):
    if BITS == 24:
        f1, m1, y, rest = float32.silu_slope(z)
        f2, m2, _, _ = float32.tanh_slope(y, rest)
        # The product of both: the factor not taken is 1.
        return gy * float32.slope(tl.where(z < 0, f1, f2), platform.fma(m1, m2, m1 + m2))
    else:
        return silu_backward(z, tanh_backward(silu(z, BITS), gy, BITS), BITS)


@triton.jit
def silu_tanh_approx(z, BITS: tl.constexpr):
    if BITS == 8:
        return tanh_approx(silu(z, BITS), BITS)
    else:
        return silu_tanh(z, BITS)


@triton.jit
def silu_tanh_approx_inner(z, BITS: tl.constexpr):
    return silu_tanh_inner(z, BITS)


@triton.jit
def silu_tanh_approx_backward(z, gy, BITS: tl.constexpr):
    return silu_tanh_backward(z, gy, BITS)


# z - tanh(z), by a polynomial where that cancels. float64 cancels, as torch does.
@triton.jit
def tanhshrink(z, BITS: tl.constexpr):
    if BITS == 53:
        return z - math.tanh(z, BITS)
    else:
        u = z * z
        near = (z * u) * math.tanhshrink_series(u, BITS)
        return tl.where(tl.abs(z) < 1.2, near, z - math.tanh_far(z, BITS))


@triton.jit
def tanhshrink_backward(z, gy, BITS: tl.constexpr):
    t = tanh_inner(z, BITS)
    return gy * (t * t)


@triton.jit
def tanhshrink_second(z, BITS: tl.constexpr):
    return -tanh_second(z, BITS)
