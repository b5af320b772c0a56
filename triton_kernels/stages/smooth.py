"""Smooth stages of more than that, from softplus to gelu.

`__init__.py` says what each has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import float32, math
from ..math import divide
from ..platform import max_nan, min_nan, number


@triton.jit
def softplus(z, beta: tl.constexpr, threshold: tl.constexpr, BITS: tl.constexpr):
    s = z * number(z, beta)
    e = math.exp_neg(tl.abs(s), BITS)
    y = (tl.where(s > 0, s, 0.0) + math.log1p(e, BITS)) * number(z, 1.0 / beta)
    return tl.where(s > number(z, threshold), z, y)


@triton.jit
def softplus_backward(z, gy, beta: tl.constexpr, threshold: tl.constexpr, BITS: tl.constexpr):
    s = z * number(z, beta)
    return tl.where(s > number(z, threshold), gy, gy * math.sigmoid(s, BITS))


@triton.jit
def softplus_second(z, beta: tl.constexpr, threshold: tl.constexpr, BITS: tl.constexpr):
    s = z * number(z, beta)
    return tl.where(s > number(z, threshold), 0.0, number(z, beta) * math.sigmoid_slope(s, BITS))


@triton.jit
def logsigmoid(z, BITS: tl.constexpr):
    return min_nan(z, number(z, 0.0)) - math.log1p(math.exp_neg(tl.abs(z), BITS), BITS)


@triton.jit
def logsigmoid_backward(z, gy, BITS: tl.constexpr):
    return gy * math.sigmoid(-z, BITS)


@triton.jit
def logsigmoid_second(z, BITS: tl.constexpr):
    return -math.sigmoid_slope(z, BITS)


# tanh(softplus(z)) = n / (n + 2) with n = e (e + 2), e = exp(z); beyond z = 20 it is 1 in every dtype.
@triton.jit
def mish(z, BITS: tl.constexpr):
    if BITS == 24:
        return float32.mish(z)
    else:
        e = math.exp(min_nan(z, number(z, 20.0)), BITS)
        n = e * (e + 2.0)
        return z * (n * math.rcp(n + 2.0, BITS))


@triton.jit
def mish_backward(z, gy, BITS: tl.constexpr):
    if BITS == 24:
        return gy * float32.mish_slope(z)
    else:
        near = min_nan(z, number(z, 20.0))
        e = math.exp(near, BITS)
        n = e * (e + 2.0)
        r = math.rcp(n + 2.0, BITS)
        return gy * (n * r + near * (4.0 * e * (1.0 + e) * (r * r)))


# With t = tanh(softplus(z)) and s = sigmoid(z): (1 - t^2) s (2 + z (1 - s - 2 t s)); see stages.mish.
@triton.jit
def mish_second(z, BITS: tl.constexpr):
    near = min_nan(z, number(z, 20.0))
    e = math.exp(near, BITS)
    n = e * (e + 2.0)
    r = math.rcp(n + 2.0, BITS)
    s = math.sigmoid(near, BITS)
    t = n * r
    return 4.0 * e * (1.0 + e) * (r * r) * (2.0 + near * (1.0 - s - 2.0 * t * s))


# mish for z >= -0.31, for instance behind another mish; chosen by dualop/language/program.py.
@triton.jit
def mish_upper(z, BITS: tl.constexpr):
    if BITS == 24:
        return float32.mish_upper(z)
    else:
        return mish(z, BITS)


@triton.jit
def mish_upper_backward(z, gy, BITS: tl.constexpr):
    if BITS == 24:
        return gy * float32.mish_upper_slope(z)
    else:
        return mish_backward(z, gy, BITS)


@triton.jit
def mish_upper_second(z, BITS: tl.constexpr):
    return mish_second(z, BITS)


@triton.jit
def softsign(z, BITS: tl.constexpr):
    return divide(z, 1.0 + tl.abs(z), BITS)


@triton.jit
def softsign_backward(z, gy, BITS: tl.constexpr):
    d = 1.0 + tl.abs(z)
    return divide(divide(gy, d, BITS), d, BITS)


@triton.jit
def softsign_second(z, BITS: tl.constexpr):
    d = 1.0 + tl.abs(z)
    bent = divide(divide(divide(number(z, 2.0), d, BITS), d, BITS), d, BITS)
    return tl.where(z > 0, -bent, tl.where(z < 0, bent, z))


# z Phi(z), Phi the normal distribution (Hendrycks and Gimpel 2016)
@triton.jit
def gelu(z, BITS: tl.constexpr):
    if BITS == 24:
        return float32.gelu(z)
    else:
        return z * math.normcdf(z, BITS)


@triton.jit
def gelu_backward(z, gy, BITS: tl.constexpr):
    if BITS == 24:
        return gy * float32.gelu_slope(z)
    else:
        return gy * (math.normcdf(z, BITS) + z * math.normpdf(z, BITS))


# (2 - z^2) Phi'(z), which is 0 from |z| = 40 on, before z^2 overflows
@triton.jit
def gelu_second(z, BITS: tl.constexpr):
    near = min_nan(max_nan(z, number(z, -40.0)), number(z, 40.0))
    return (2.0 - near * near) * math.normpdf(near, BITS)


# gelu for |z| <= 1, for instance behind tanh; chosen by dualop/language/program.py.
@triton.jit
def gelu_unit(z, BITS: tl.constexpr):
    return z * math.normcdf_unit(z, BITS)


@triton.jit
def gelu_unit_backward(z, gy, BITS: tl.constexpr):
    return gy * math.gelu_slope_unit(z, BITS)


@triton.jit
def gelu_unit_second(z, BITS: tl.constexpr):
    return gelu_second(z, BITS)


# gelu for -0.5 <= z <= 1, for instance behind silu and tanh; chosen by dualop/language/program.py.
@triton.jit
def gelu_upper(z, BITS: tl.constexpr):
    return gelu_unit(z, BITS)


@triton.jit
def gelu_upper_backward(z, gy, BITS: tl.constexpr):
    return gy * math.gelu_slope_upper(z, BITS)


@triton.jit
def gelu_upper_second(z, BITS: tl.constexpr):
    return gelu_second(z, BITS)


# z (1 + tanh(u)) / 2 = z sigmoid(2 u) with u = sqrt(2 / pi) (z + 0.044715 z^3)
@triton.jit
def gelu_tanh(z, BITS: tl.constexpr):
    slope: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
    if BITS == 24:
        return float32.gelu_tanh(z)
    else:
        return z * math.sigmoid_alone(slope * z * (1.0 + 0.044715 * z * z), BITS)


@triton.jit
def gelu_tanh_backward(z, gy, BITS: tl.constexpr):
    slope: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
    if BITS == 24:
        return gy * float32.gelu_tanh_slope(z)
    else:
        # The second term has long vanished at |z| = 20, before its cube overflows.
        near = min_nan(max_nan(z, number(z, -20.0)), number(z, 20.0))
        z2 = near * near
        u = slope * near * (1.0 + 0.044715 * z2)
        bump = math.sigmoid_slope(u, BITS) * (slope * (1.0 + 3.0 * 0.044715 * z2))
        return gy * (math.sigmoid(u, BITS) + near * bump)


# The second derivative of z sigmoid(u(z)); see stages.gelu_tanh.
@triton.jit
def gelu_tanh_second(z, BITS: tl.constexpr):
    slope: tl.constexpr = 1.5957691216057308
    near = min_nan(max_nan(z, number(z, -20.0)), number(z, 20.0))
    z2 = near * near
    u = slope * near * (1.0 + 0.044715 * z2)
    u1 = slope * (1.0 + 3.0 * 0.044715 * z2)
    u2 = (6.0 * 0.044715 * slope) * near
    return math.sigmoid_slope(u, BITS) * (2.0 * u1 + near * u2) + near * (u1 * u1) * math.sigmoid_second(u, BITS)
