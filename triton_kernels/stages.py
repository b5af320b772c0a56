"""Every stage: NAME(z, parameters, BITS) -> y and NAME_backward(z, gy, parameters, BITS) -> gz.

Where the value on the way in a backward can be had cheaper, NAME_inner gives it.
An operand stage has NAME(z, b, BITS) and NAME_backward(z, b, gy, BITS) -> (gz, gb). `cuda/stages.cuh` has the same
names in the same order with the same formulas; `dualop/language/stages.py` says what they mean in torch. Gradients at
kinks are torch's. Masked gradients are selected, not multiplied by 0, so that an infinite gy stays out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import math, platform, single
from .math import divide
from .platform import max_nan, min_nan, number

# ---- operand stages --------------------------------------------------------------------------------------------------


@triton.jit
def add(z, b, BITS: tl.constexpr):
    return z + b


@triton.jit
def add_backward(z, b, gy, BITS: tl.constexpr):
    return gy, gy


@triton.jit
def sub(z, b, BITS: tl.constexpr):
    return z - b


@triton.jit
def sub_backward(z, b, gy, BITS: tl.constexpr):
    return gy, -gy


@triton.jit
def rsub(z, b, BITS: tl.constexpr):
    return b - z


@triton.jit
def rsub_backward(z, b, gy, BITS: tl.constexpr):
    return -gy, gy


@triton.jit
def mul(z, b, BITS: tl.constexpr):
    return z * b


@triton.jit
def mul_backward(z, b, gy, BITS: tl.constexpr):
    return gy * b, gy * z


@triton.jit
def div(z, b, BITS: tl.constexpr):
    return divide(z, b, BITS)


@triton.jit
def div_backward(z, b, gy, BITS: tl.constexpr):
    return divide(gy, b, BITS), -gy * divide(divide(z, b, BITS), b, BITS)


# A tie gives each side half.
@triton.jit
def minimum(z, b, BITS: tl.constexpr):
    return min_nan(z, b)


@triton.jit
def minimum_backward(z, b, gy, BITS: tl.constexpr):
    share = tl.where(z == b, gy * 0.5, gy)
    return tl.where(z > b, 0.0, share), tl.where(z < b, 0.0, share)


@triton.jit
def maximum(z, b, BITS: tl.constexpr):
    return max_nan(z, b)


@triton.jit
def maximum_backward(z, b, gy, BITS: tl.constexpr):
    share = tl.where(z == b, gy * 0.5, gy)
    return tl.where(z < b, 0.0, share), tl.where(z > b, 0.0, share)


# ---- piecewise linear stages -----------------------------------------------------------------------------------------


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


# ---- smooth stages ---------------------------------------------------------------------------------------------------


@triton.jit
def elu(z, alpha: tl.constexpr, BITS: tl.constexpr):
    return tl.where(z < 0, number(z, alpha) * math.expm1(z, BITS), z)


@triton.jit
def elu_backward(z, gy, alpha: tl.constexpr, BITS: tl.constexpr):
    return tl.where(z <= 0, gy * number(z, alpha) * math.exp_neg(-z, BITS), gy)


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
def celu(z, alpha: tl.constexpr, BITS: tl.constexpr):
    return tl.where(z <= 0, number(z, alpha) * math.expm1(z * number(z, 1.0 / alpha), BITS), z)


@triton.jit
def celu_backward(z, gy, alpha: tl.constexpr, BITS: tl.constexpr):
    inverse = number(z, 1.0 / alpha)
    if BITS == 24 and alpha > 0:
        return tl.where(z <= 0, gy * single.exp_ratio(z, number(z, alpha), inverse), gy)
    else:
        return tl.where(z <= 0, gy * math.exp(z * inverse, BITS), gy)


@triton.jit
def sigmoid(z, BITS: tl.constexpr):
    return math.sigmoid_alone(z, BITS)


@triton.jit
def sigmoid_inner(z, BITS: tl.constexpr):
    return math.sigmoid(z, BITS)


@triton.jit
def sigmoid_backward(z, gy, BITS: tl.constexpr):
    return gy * math.sigmoid_slope(z, BITS)


# y' = s + z s'
@triton.jit
def silu(z, BITS: tl.constexpr):
    if BITS == 24:
        return single.silu(z)
    else:
        return z * math.sigmoid_alone(z, BITS)


@triton.jit
def silu_backward(z, gy, BITS: tl.constexpr):
    if BITS == 24:
        factor, more, _, _ = single.silu_slope(z)
        return gy * single.slope(factor, more)
    elif BITS <= 11:
        s = math.sigmoid_alone(z, BITS)
        return gy * (s + (z * s) * (1.0 - s))
    else:
        return gy * (math.sigmoid(z, BITS) + z * math.sigmoid_slope(z, BITS))


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


# tanh(silu(z)) in one, since tanh's slope multiplies what silu was rounded by with 2 y; dualop/language/program.py
# chooses it.
@triton.jit
def silu_tanh(z, BITS: tl.constexpr):
    if BITS == 24:
        return single.tanh_short(single.silu(z))
    else:
        return tanh(silu(z, BITS), BITS)


@triton.jit
def silu_tanh_inner(z, BITS: tl.constexpr):
    if BITS == 24:
        _, _, y, rest = single.silu_slope(z)
        _, _, value, _ = single.tanh_slope(y, rest)
        return value
    else:
        return tanh_inner(silu(z, BITS), BITS)


@triton.jit
def silu_tanh_backward(z, gy, BITS: tl.constexpr):
    if BITS == 24:
        f1, m1, y, rest = single.silu_slope(z)
        f2, m2, _, _ = single.tanh_slope(y, rest)
        # The product of both: the factor not taken is 1.
        return gy * single.slope(tl.where(z < 0, f1, f2), platform.fma(m1, m2, m1 + m2))
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
def logsigmoid(z, BITS: tl.constexpr):
    return min_nan(z, number(z, 0.0)) - math.log1p(math.exp_neg(tl.abs(z), BITS), BITS)


@triton.jit
def logsigmoid_backward(z, gy, BITS: tl.constexpr):
    return gy * math.sigmoid(-z, BITS)


# tanh(softplus(z)) = n / (n + 2) with n = e (e + 2), e = exp(z); beyond z = 20 it is 1 in every dtype.
@triton.jit
def mish(z, BITS: tl.constexpr):
    if BITS == 24:
        return single.mish(z)
    else:
        e = math.exp(min_nan(z, number(z, 20.0)), BITS)
        n = e * (e + 2.0)
        return z * (n * math.rcp(n + 2.0, BITS))


@triton.jit
def mish_backward(z, gy, BITS: tl.constexpr):
    if BITS == 24:
        return gy * single.mish_slope(z)
    else:
        near = min_nan(z, number(z, 20.0))
        e = math.exp(near, BITS)
        n = e * (e + 2.0)
        r = math.rcp(n + 2.0, BITS)
        return gy * (n * r + near * (4.0 * e * (1.0 + e) * (r * r)))


@triton.jit
def softsign(z, BITS: tl.constexpr):
    return divide(z, 1.0 + tl.abs(z), BITS)


@triton.jit
def softsign_backward(z, gy, BITS: tl.constexpr):
    d = 1.0 + tl.abs(z)
    return divide(divide(gy, d, BITS), d, BITS)


# z Phi(z), Phi the normal distribution (Hendrycks and Gimpel 2016)
@triton.jit
def gelu(z, BITS: tl.constexpr):
    if BITS == 24:
        return single.gelu(z)
    else:
        return z * math.normcdf(z, BITS)


@triton.jit
def gelu_backward(z, gy, BITS: tl.constexpr):
    if BITS == 24:
        return gy * single.gelu_slope(z)
    else:
        return gy * (math.normcdf(z, BITS) + z * math.normpdf(z, BITS))


# gelu for |z| <= 1, for instance behind tanh; chosen by dualop/language/program.py.
@triton.jit
def gelu_unit(z, BITS: tl.constexpr):
    return z * math.normcdf_unit(z, BITS)


@triton.jit
def gelu_unit_backward(z, gy, BITS: tl.constexpr):
    return gy * math.gelu_slope_unit(z, BITS)


# gelu for -0.5 <= z <= 1, for instance behind silu and tanh; chosen by dualop/language/program.py.
@triton.jit
def gelu_upper(z, BITS: tl.constexpr):
    return gelu_unit(z, BITS)


@triton.jit
def gelu_upper_backward(z, gy, BITS: tl.constexpr):
    return gy * math.gelu_slope_upper(z, BITS)


# z (1 + tanh(u)) / 2 = z sigmoid(2 u) with u = sqrt(2 / pi) (z + 0.044715 z^3)
@triton.jit
def gelu_tanh(z, BITS: tl.constexpr):
    slope: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
    if BITS == 24:
        return single.gelu_tanh(z)
    else:
        return z * math.sigmoid_alone(slope * z * (1.0 + 0.044715 * z * z), BITS)


@triton.jit
def gelu_tanh_backward(z, gy, BITS: tl.constexpr):
    slope: tl.constexpr = 1.5957691216057308  # 2 sqrt(2 / pi)
    if BITS == 24:
        return gy * single.gelu_tanh_slope(z)
    else:
        # The second term has long vanished at |z| = 20, before its cube overflows.
        near = min_nan(max_nan(z, number(z, -20.0)), number(z, 20.0))
        z2 = near * near
        u = slope * near * (1.0 + 0.044715 * z2)
        bump = math.sigmoid_slope(u, BITS) * (slope * (1.0 + 3.0 * 0.044715 * z2))
        return gy * (math.sigmoid(u, BITS) + near * bump)


# ---- plain functions -------------------------------------------------------------------------------------------------


@triton.jit
def abs(z, BITS: tl.constexpr):
    return tl.abs(z)


@triton.jit
def abs_backward(z, gy, BITS: tl.constexpr):
    return tl.where(z > 0, gy, tl.where(z < 0, -gy, gy * 0.0))


@triton.jit
def neg(z, BITS: tl.constexpr):
    return -z


@triton.jit
def neg_backward(z, gy, BITS: tl.constexpr):
    return -gy


@triton.jit
def square(z, BITS: tl.constexpr):
    return z * z


@triton.jit
def square_backward(z, gy, BITS: tl.constexpr):
    return gy * (2.0 * z)


@triton.jit
def sqrt(z, BITS: tl.constexpr):
    if BITS == 53:
        return tl.sqrt(z)
    else:
        return tl.sqrt_rn(z)


@triton.jit
def sqrt_backward(z, gy, BITS: tl.constexpr):
    return divide(gy, 2.0 * sqrt(z, BITS), BITS)


@triton.jit
def reciprocal(z, BITS: tl.constexpr):
    return divide(number(z, 1.0), z, BITS)


@triton.jit
def reciprocal_backward(z, gy, BITS: tl.constexpr):
    r = divide(number(z, 1.0), z, BITS)
    return -gy * (r * r)


@triton.jit
def exp(z, BITS: tl.constexpr):
    return math.exp(z, BITS)


@triton.jit
def exp_backward(z, gy, BITS: tl.constexpr):
    return gy * math.exp(z, BITS)
