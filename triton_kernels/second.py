"""The second derivative of every stage that is not made of straight lines: NAME(z, parameters, BITS) -> f''(z).

`cuda/second.cuh` has the same names in the same order with the same formulas, `dualop/language/derivatives.py` has them
in torch. `slope.py` makes a chain's double backward of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import math
from .math import divide
from .platform import max_nan, min_nan, number


@triton.jit
def _bump_slope(z, BITS: tl.constexpr):
    """The second derivative of sigmoid: with e = exp(-|z|) nothing overflows."""
    e = math.exp_neg(tl.abs(z), BITS)
    r = math.rcp_1p(e, BITS)
    bent = (e * r * r) * ((1.0 - e) * r)
    return tl.where(z < 0, bent, -bent)


@triton.jit
def hardswish(z, BITS: tl.constexpr):
    return tl.where((z > -3.0) & (z < 3.0), number(z, 1.0 / 3), 0.0)


@triton.jit
def elu(z, alpha: tl.constexpr, BITS: tl.constexpr):
    return tl.where(z < 0, number(z, alpha) * math.exp(z, BITS), 0.0)


@triton.jit
def selu(z, BITS: tl.constexpr):
    scale: tl.constexpr = 1.0507009873554804934193349852946
    return scale * elu(z, 1.6732632423543772848170429916717, BITS)


@triton.jit
def celu(z, alpha: tl.constexpr, BITS: tl.constexpr):
    inverse = number(z, 1.0 / alpha)
    return tl.where(z < 0, inverse * math.exp(z * inverse, BITS), 0.0)


@triton.jit
def sigmoid(z, BITS: tl.constexpr):
    return _bump_slope(z, BITS)


# 2 s' + z s''
@triton.jit
def silu(z, BITS: tl.constexpr):
    return 2.0 * math.sigmoid_slope(z, BITS) + z * _bump_slope(z, BITS)


@triton.jit
def tanh(z, BITS: tl.constexpr):
    return -2.0 * math.tanh_far(z, BITS) * math.sech2(z, BITS)


@triton.jit
def tanh_approx(z, BITS: tl.constexpr):
    return tanh(z, BITS)


@triton.jit
def tanhshrink(z, BITS: tl.constexpr):
    return -tanh(z, BITS)


@triton.jit
def softplus(z, beta: tl.constexpr, threshold: tl.constexpr, BITS: tl.constexpr):
    s = z * number(z, beta)
    return tl.where(s > number(z, threshold), 0.0, number(z, beta) * math.sigmoid_slope(s, BITS))


@triton.jit
def logsigmoid(z, BITS: tl.constexpr):
    return -math.sigmoid_slope(z, BITS)


# With t = tanh(softplus(z)) and s = sigmoid(z): (1 - t^2) s (2 + z (1 - s - 2 t s)); see stages.mish.
@triton.jit
def mish(z, BITS: tl.constexpr):
    near = min_nan(z, number(z, 20.0))
    e = math.exp(near, BITS)
    n = e * (e + 2.0)
    r = math.rcp(n + 2.0, BITS)
    s = math.sigmoid(near, BITS)
    t = n * r
    return 4.0 * e * (1.0 + e) * (r * r) * (2.0 + near * (1.0 - s - 2.0 * t * s))


@triton.jit
def softsign(z, BITS: tl.constexpr):
    d = 1.0 + tl.abs(z)
    bent = divide(divide(divide(number(z, 2.0), d, BITS), d, BITS), d, BITS)
    return tl.where(z > 0, -bent, tl.where(z < 0, bent, z))


# (2 - z^2) Phi'(z), which is 0 from |z| = 40 on, before z^2 overflows
@triton.jit
def gelu(z, BITS: tl.constexpr):
    near = min_nan(max_nan(z, number(z, -40.0)), number(z, 40.0))
    return (2.0 - near * near) * math.normpdf(near, BITS)


@triton.jit
def gelu_unit(z, BITS: tl.constexpr):
    return gelu(z, BITS)


@triton.jit
def gelu_upper(z, BITS: tl.constexpr):
    return gelu(z, BITS)


# The second derivative of z sigmoid(u(z)); see stages.gelu_tanh.
@triton.jit
def gelu_tanh(z, BITS: tl.constexpr):
    slope: tl.constexpr = 1.5957691216057308
    near = min_nan(max_nan(z, number(z, -20.0)), number(z, 20.0))
    z2 = near * near
    u = slope * near * (1.0 + 0.044715 * z2)
    u1 = slope * (1.0 + 3.0 * 0.044715 * z2)
    u2 = (6.0 * 0.044715 * slope) * near
    return math.sigmoid_slope(u, BITS) * (2.0 * u1 + near * u2) + near * (u1 * u1) * _bump_slope(u, BITS)


@triton.jit
def square(z, BITS: tl.constexpr):
    return number(z, 2.0)


@triton.jit
def sqrt(z, BITS: tl.constexpr):
    if BITS == 53:
        return -0.25 / (z * tl.sqrt(z))
    else:
        return divide(number(z, -0.25), z * tl.sqrt_rn(z), BITS)


@triton.jit
def reciprocal(z, BITS: tl.constexpr):
    r = divide(number(z, 1.0), z, BITS)
    return 2.0 * r * r * r


@triton.jit
def exp(z, BITS: tl.constexpr):
    return math.exp(z, BITS)
