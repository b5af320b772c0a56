"""Compute functions whose float32 results, slopes included, are held to 4 ulps. 16-bit results need none of this.

`cuda/float32.cuh` has the same functions in the same order, and says how they work and how accurate they are. Where it
has a struct, there is a tuple here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import platform
from .platform import max_nan, min_nan, number


@triton.jit
def scaled_exp(a, rest, N: tl.constexpr):
    """Return (two, r, bend): exp(-N (a + rest)) = two (1 + p) with p = -N r + r^2 bend."""
    k = platform.fma(a, number(a, N * -1.44269504), number(a, 12582912.0)) - 12582912.0  # beyond 2^23: integers only
    r = platform.fma(k, number(a, 0.693147182 / N), a) + rest
    bend = platform.fma(
        r, number(a, N * N * N * N * N * N * 0.00138207339), number(a, -N * N * N * N * N * 0.00836867746)
    )
    bend = platform.fma(r, bend, number(a, N * N * N * N * 0.0416682661))
    bend = platform.fma(r, bend, number(a, -N * N * N * 0.166665211))
    return platform.ex2_approx(k), r, platform.fma(r, bend, number(a, N * N * 0.49999994))


@triton.jit
def small(r, bend, N: tl.constexpr):
    return platform.fma(r * r, bend, -N * r)


@triton.jit
def whole(two, r, bend, N: tl.constexpr):
    return platform.fma(two, small(r, bend, N), two)


@triton.jit
def exp_below(a, rest, N: tl.constexpr):
    """Return exp(-N (a + rest)), rounded."""
    two, r, bend = scaled_exp(a, rest, N)
    return whole(two, r, bend, N)


@triton.jit
def exp_ratio(z, alpha, inverse):
    """Return exp(z / alpha) for z <= 0, alpha > 0."""
    a = -max_nan(z, -89.0 * alpha)
    s = a * inverse
    return exp_below(s, platform.fma(-s, alpha, a) * inverse, 1)


@triton.jit
def quotient(x, e):
    """Return x / (1 + e) for e >= 0."""
    r = platform.rcp_approx(1.0 + e)
    t = x * r
    return platform.fma(r, platform.fma(-t, e, platform.minus_rounded(x, t)), t)


@triton.jit
def tanh_long(z):
    u = z * z
    e = exp_below(min_nan(tl.abs(z), number(z, 44.0)), number(z, -0.0), 2)
    far = platform.fma(quotient(e, e), number(z, -2.0), number(z, 1.0))
    p = 0.0539106987 + u * (-0.0213160906 + u * 0.00662128581)
    p = 0.333333313 + u * (-0.133331209 + u * p)
    return platform.copysign(tl.where(tl.abs(z) < 0.55, platform.fma(z * u, -p, z), far), z)


@triton.jit
def tanh_short(z):
    two, r, bend = scaled_exp(min_nan(tl.abs(z), number(z, 44.0)), number(z, -0.0), 2)
    return platform.copysign(quotient(platform.fma(-two, small(r, bend, 2), 1.0 - two), whole(two, r, bend, 2)), z)


# A function's slope as factor (1 + more), beside it the function's value and what rounding that left:
# (factor, more, value, rest).


@triton.jit
def slope(factor, more):
    return platform.fma(factor, more, factor)


@triton.jit
def tanh_slope(y, rest):
    """Return tanh and its slope at y + rest, y > -0.3."""
    two, r, bend = scaled_exp(y, rest, 2)
    near = y < 0.65
    p = small(r, bend, 2)
    e = whole(two, r, bend, 2)
    h = quotient(tl.where(near, platform.fma(-two, p, 1.0 - two), e), e)
    square = h * h
    more = platform.fma(1.0 + p, platform.fma(h, number(h, -2.0), square), p)
    value = tl.where(near, h, platform.fma(h, number(h, -2.0), number(h, 1.0)))
    return tl.where(near, 1.0, 4.0 * two), tl.where(near, -square, more), value, number(h, 0.0)


@triton.jit
def upper(z):
    """Return max(z, 0), but NaN at minus infinity, as torch has it of z times 0."""
    return tl.where(z < 0, 0.0 * z, z)


@triton.jit
def silu(z):
    a = min_nan(tl.abs(z), number(z, 89.0))
    e = exp_below(a, number(z, -0.0), 1)
    return platform.fma(-a, quotient(e, e), upper(z))


@triton.jit
def silu_slope(z):
    negative = z < 0
    a = min_nan(tl.abs(z), number(z, 89.0))
    two, r, bend = scaled_exp(a, number(z, -0.0), 1)
    m = platform.fma(two, r * r * bend, platform.fma(-two, r, (1.0 - a) + two))
    e = whole(two, r, bend, 1)
    v = quotient(e, e)
    k = platform.fma(-v, v, v)
    s = platform.fma(a, k, -v)
    top = tl.where(negative, 0.0, a)
    y = platform.fma(-a, v, top)
    below = tl.where(tl.abs(m) < 0.47, k * m, -s)
    return tl.where(negative, below, 1.0), tl.where(negative, 0.0, s), y, platform.fma(-a, v, top - y)


@triton.jit
def horner(t, p, c0: tl.constexpr, c1: tl.constexpr, c2: tl.constexpr):
    """Return ((p t + c0) t + c1) t + c2: three more coefficients of a polynomial, the last one first."""
    p = platform.fma(t, p, number(t, c0))
    return platform.fma(t, platform.fma(t, p, number(t, c1)), number(t, c2))


@triton.jit
def bell(a):
    """Return exp(-a^2 / 2)."""
    half = 0.5 * a
    square = half * a
    return exp_below(square, platform.fma(half, a, -square), 1)


@triton.jit
def gelu(z):
    a = min_nan(tl.abs(z), number(z, 13.5))
    t = a - 1.5
    p = platform.fma(t, number(t, 5.74304326e-10), number(t, -1.07933502e-08))
    p = platform.fma(t, p, number(t, 8.90310048e-08))
    p = horner(t, p, -4.50695865e-07, 1.77829179e-06, -6.78457263e-06)
    p = horner(t, p, 2.66290353e-05, -0.000101807513, 0.000368819863)
    p = horner(t, p, -0.00126653037, 0.00411022268, -0.0124968858)
    p = horner(t, p, 0.0351868756, -0.0902712867, 0.20578067)
    return platform.fma(-a, bell(a) * p, upper(z))


@triton.jit
def gelu_slope(z):
    a = min_nan(tl.abs(z), number(z, 13.5))
    t = a - 1.5
    p = platform.fma(t, number(t, -1.05373654e-09), number(t, 1.71440551e-08))
    p = horner(t, p, -1.20537678e-07, 5.31802755e-07, -2.02528668e-06)
    p = horner(t, p, 8.17472483e-06, -3.31814408e-05, 0.000127143823)
    p = horner(t, p, -0.000463323813, 0.00161250238, -0.00531720091)
    p = horner(t, p, 0.0164755825, -0.0475138687, 0.524763823)
    below = bell(a) * platform.fma(0.7517915368 - a, p, -1.21144495e-08 * p)
    return tl.where(z < 0, below, 1.0 - below)


@triton.jit
def gelu_cubic(a):
    """Return (u, rest, a u'(a)) of gelu_tanh."""
    linear: tl.constexpr = 1.59576917  # and what it and the cubic coefficient have beyond 24 bits
    linear_rest: tl.constexpr = -4.53406805e-08
    cubic: tl.constexpr = 0.0713548139
    cubic_rest: tl.constexpr = 2.39883247e-09
    q = a * a
    p = platform.fma(q, number(a, cubic), number(a, linear))
    u = a * p
    p_rest = platform.fma(platform.fma(a, a, -q), number(a, cubic), number(a, linear_rest))
    p_rest = platform.fma(q, number(a, cubic), linear - p) + platform.fma(q, number(a, cubic_rest), p_rest)
    rest = platform.fma(a, p_rest, platform.fma(a, p, -u))
    return u, rest, u + platform.fma(a, 2.0 * cubic * q, rest)


@triton.jit
def gelu_tanh(z):
    a = min_nan(tl.abs(z), number(z, 10.1))
    u, rest, _ = gelu_cubic(a)
    e = exp_below(u, rest, 1)
    return platform.fma(-a, quotient(e, e), upper(z))


@triton.jit
def gelu_tanh_slope(z):
    u, rest, rise = gelu_cubic(min_nan(tl.abs(z), number(z, 10.1)))
    two, r, bend = scaled_exp(u, rest, 1)
    p = small(r, bend, 1)
    e = whole(two, r, bend, 1)
    v = quotient(e, e)
    far = slope(two * platform.fma(rise, v, 1.0 - rise), platform.fma(-v, 1.0 + p, p))
    t = (z + 0.752461433) - 1.13396283e-08
    p = horner(t, number(t, -0.000920474995), -0.00223021652, 0.0052988017, 0.0196351148)
    p = horner(t, p, -0.016630888, -0.113940619, -0.0157818887)
    p = platform.fma(t, platform.fma(t, p, number(t, 0.387518406)), number(t, 0.430400074))
    below = tl.where(tl.abs(t + 0.05) < 0.6, t * p, far)
    return tl.where(z < 0, below, 1.0 - below)


@triton.jit
def mish_parts(a, negative):
    """Return (u, u / 2, u^2 / 2, w); tanh(softplus(-a)) is w / (1 + w)."""
    u = tl.where(negative, 1.0, 2.0) * exp_below(a, number(a, -0.0), 1)
    half = 0.5 * u
    return u, half, half * u, platform.fma(half, u, u)


@triton.jit
def mish(z):
    negative = z < 0
    a = min_nan(tl.abs(z), number(z, 89.0))
    _, _, square, w = mish_parts(a, negative)
    return platform.fma(-a, quotient(tl.where(negative, w, square), w), upper(z))


@triton.jit
def mish_slope(z):
    negative = z < 0
    a = min_nan(tl.abs(z), number(z, 89.0))
    t = z + 1.19243121
    u, half, _, w = mish_parts(a, negative)
    r = quotient(number(u, 1.0), w)
    h = 1.0 + half
    x = u * platform.fma(u, platform.fma(h, h, 0.5 - a), 1.0 - a)
    far = platform.fma(x, platform.fma(r, r, number(r, -1.0)), x)
    above = platform.fma(u * u * r, platform.fma(a * h, r, number(r, -0.5)), number(r, 1.0))
    p = horner(t, number(t, -4.33991991e-05), -0.000100244768, 0.000274161459, 0.00102499081)
    p = horner(t, p, 0.00107128907, -0.00336712599, -0.0158150587)
    p = horner(t, p, -0.0202716477, 0.0419072025, 0.204731271)
    close = platform.fma(t, platform.fma(t, p, number(t, 0.266947925)), number(t, 8.12570985e-10))
    return tl.where(negative, tl.where(z > -1.8, close, far), above)


@triton.jit
def mish_upper_parts(a):
    """Return (e, r, share, ratio, rest) for a >= -0.31."""
    e = exp_below(a, number(a, -0.0), 1)
    u = 2.0 * e
    w = platform.fma(u, e, u)
    r = platform.rcp_approx(1.0 + w)
    ratio = platform.fma(u, r, r)
    return e, r, u * r, ratio, (1.0 - ratio) + platform.fma(-ratio, w, u)


@triton.jit
def mish_upper(z):
    a = min_nan(z, number(z, 89.0))
    _, r, _, ratio, rest = mish_upper_parts(a)
    return platform.fma(z, ratio, a * r * rest)


@triton.jit
def mish_upper_slope(z):
    a = min_nan(z, number(z, 89.0))
    e, r, share, ratio, rest = mish_upper_parts(a)
    return ratio + platform.fma(r, rest, platform.fma(a, e, a) * share * share)
