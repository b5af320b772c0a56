"""The functions that stages are made of, each as accurate as a result of BITS significant bits needs it.

`cuda/math.cuh` has the same functions in the same order, and says what they are good to. Tensors are two-dimensional
float32 (float64 where BITS is 53).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import platform


@triton.jit
def number(z, value: tl.constexpr):
    """`value` in z's dtype. Triton makes a float32 of a bare number, which a float64 z must not get."""
    return tl.full([1, 1], value, z.dtype)


@triton.jit
def min_nan(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def divide(a, b, BITS: tl.constexpr):
    """Correctly rounded; Triton's own float32 division is not."""
    if BITS == 53:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def rcp(z, BITS: tl.constexpr):
    if BITS == 53:
        return 1.0 / z
    else:
        return platform.rcp_approx(z)


@triton.jit
def exp(z, BITS: tl.constexpr):
    if BITS <= 11:
        log2_e: tl.constexpr = 1.4426950408889634
        return platform.ex2_approx(z * log2_e)
    else:
        return platform.exp(z)


@triton.jit
def expm1(z, BITS: tl.constexpr):
    """exp(z) - 1"""
    if BITS <= 11:
        series = z + z * z * (0.5 + z * (1.0 / 6 + z * (1.0 / 24 + z * (1.0 / 120))))
        return tl.where(tl.abs(z) < 0.25, series, exp(z, BITS) - 1.0)
    else:
        return platform.expm1(z)


@triton.jit
def log1p(z, BITS: tl.constexpr):
    """log(1 + z) for z >= 0"""
    if BITS <= 11:
        ln_2: tl.constexpr = 0.6931471805599453
        return tl.where(z < 0.01, z - 0.5 * z * z, platform.lg2_approx(1.0 + z) * ln_2)
    else:
        return platform.log1p(z)


# With e = exp(-|z|): sigmoid(|z|) = 1 / (1 + e), sigmoid(-|z|) = e / (1 + e), and their product is the derivative.
# Nothing cancels and nothing overflows.


@triton.jit
def sigmoid(z, BITS: tl.constexpr):
    e = exp(-tl.abs(z), BITS)
    r = rcp(1.0 + e, BITS)
    return tl.where(z < 0, e * r, r)


@triton.jit
def sigmoid_slope(z, BITS: tl.constexpr):
    e = exp(-tl.abs(z), BITS)
    r = rcp(1.0 + e, BITS)
    return e * r * r


@triton.jit
def tanh_series(z, BITS: tl.constexpr):
    """The factor T of tanh(z) = z + z^3 T, a minimax polynomial for |z| < 0.3 (16-bit results) or 0.55 (float32)."""
    u = z * z
    if BITS <= 11:
        return -0.333281547 + u * 0.128647104
    else:
        p = -0.0539106987 + u * (0.0213160906 + u * -0.00662128581)
        return -0.333333313 + u * (0.133331209 + u * p)


@triton.jit
def in_tanh_series(z, BITS: tl.constexpr):
    end: tl.constexpr = 0.3 if BITS <= 11 else 0.55
    return tl.abs(z) < end


@triton.jit
def tanh(z, BITS: tl.constexpr):
    if BITS == 8:
        return platform.tanh_approx(z)
    elif BITS == 53:
        return platform.tanh(z)
    else:
        # (1 - e) / (1 + e) with e = exp(-2 |z|), which has no accuracy left near 0.
        e = exp(-2.0 * tl.abs(z), BITS)
        far = 1.0 - 2.0 * e * rcp(1.0 + e, BITS)
        far = tl.where(z < 0, -far, far)
        return tl.where(in_tanh_series(z, BITS), z + z * z * z * tanh_series(z, BITS), far)


@triton.jit
def sech2(z, BITS: tl.constexpr):
    """1 - tanh(z)^2, which cancels where tanh saturates: 4 e / (1 + e)^2 with e = exp(-2 |z|) does not."""
    e = exp(-2.0 * tl.abs(z), BITS)
    r = rcp(1.0 + e, BITS)
    return 4.0 * e * r * r


@triton.jit
def near_zero(
    far,
    z,
    hi: tl.constexpr,
    lo: tl.constexpr,
    c0: tl.constexpr,
    c1: tl.constexpr,
    c2: tl.constexpr,
    c3: tl.constexpr,
    c4: tl.constexpr,
    c5: tl.constexpr,
    BITS: tl.constexpr,
):
    """A derivative that has a zero at hi + lo, where its formula `far` cancels: close to it a polynomial."""
    if BITS != 24:
        return far
    else:
        t = (z - hi) - lo
        near = t * (c0 + t * (c1 + t * (c2 + t * (c3 + t * (c4 + t * c5)))))
        return tl.where(tl.abs(t) < 0.25, near, far)


@triton.jit
def normpdf(z, BITS: tl.constexpr):
    """The density of the normal distribution."""
    inverse_sqrt_2pi: tl.constexpr = 0.3989422804014327
    return inverse_sqrt_2pi * exp(-0.5 * z * z, BITS)


@triton.jit
def normcdf(z, BITS: tl.constexpr):
    """The distribution function of the normal distribution, (1 + erf(z / sqrt(2))) / 2."""
    sqrt_half: tl.constexpr = 0.7071067811865476
    if BITS <= 11:
        t = rcp(1.0 + 0.3275911 * sqrt_half * tl.abs(z), BITS)
        p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail = 0.5 * p * exp(-0.5 * z * z, BITS)
        return tl.where(z < 0, tail, 1.0 - tail)
    else:
        return 0.5 * platform.erfc(-z * sqrt_half)


# The same two for |z| <= 1, by minimax polynomials in z^2: no exponential, no branch. float64 has no need of them.


@triton.jit
def normpdf_unit(z, BITS: tl.constexpr):
    u = z * z
    if BITS == 53:
        return normpdf(z, BITS)
    elif BITS <= 11:
        return 0.398942113 + u * (-0.199463084 + u * (0.0498020686 + u * (-0.00812228862 + u * 0.000812059792)))
    else:
        p = -0.00831072591 + u * (0.00103725446 + u * (-0.000101399994 + u * 6.75949696e-06))
        return 0.398942292 + u * (-0.199471131 + u * (0.0498676896 + u * p))


@triton.jit
def normcdf_unit(z, BITS: tl.constexpr):
    u = z * z
    if BITS == 53:
        return normcdf(z, BITS)
    elif BITS <= 11:
        return 0.5 + z * (0.398941547 + u * (-0.0664662942 + u * (0.00985012297 + u * -0.000981363701)))
    else:
        p = -0.00118635304 + u * (0.000113512659 + u * -7.66467929e-06)
        return 0.5 + z * (0.398942292 + u * (-0.0664903596 + u * (0.00997333135 + u * p)))


@triton.jit
def gelu_slope(z, cdf, pdf, BITS: tl.constexpr):
    """gelu's derivative, given Phi and the density."""
    far = cdf + z * pdf
    return near_zero(
        far,
        z,
        -0.751791537,
        1.21144499e-08,
        0.431494027,
        0.388284743,
        -0.018209355,
        -0.113988124,
        -0.0143532213,
        0.0190178882,
        BITS,
    )
