"""Compute the functions that stages are made of, each as accurate as a result of BITS significant bits needs.

`cuda/math.cuh` has the same functions in the same order, and says how accurate they are. Tensors are two-dimensional
float32 (float64 where BITS is 53).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import float32, platform
from .platform import max_nan, min_nan, number


@triton.jit
def divide(a, b, BITS: tl.constexpr):
    """Return a / b, rounded once in float32 and float64; 16 bits do not show what Triton's own `/` is off by."""
    if BITS == 24:
        return tl.div_rn(a, b)
    else:
        return a / b


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
    """Return exp(z) - 1."""
    if BITS <= 11:
        series = z + z * z * (0.5 + z * (1.0 / 6 + z * (1.0 / 24 + z * (1.0 / 120))))
        return tl.where(tl.abs(z) < 0.25, series, exp(z, BITS) - 1.0)
    else:
        return platform.expm1(z)


@triton.jit
def log1p(z, BITS: tl.constexpr):
    """Return log(1 + z) for 0 <= z <= 1, by minimax polynomials."""
    if BITS == 53:
        return platform.log1p(z)
    elif BITS <= 11:
        p = -0.235038549 + z * (0.149223775 + z * (-0.0664017126 + z * 0.0141409943))
        return z * (0.999998748 + z * (-0.499869645 + z * (0.331094474 + z * p)))
    else:
        p = -0.15305604 + z * (0.106036745 + z * (-0.0569597147 + z * (0.0198515505 + z * -0.00324404356)))
        q = -0.499999017 + z * (0.333299637 + z * (-0.249541342 + z * (0.196759433 + z * p)))
        return platform.fma(z * z, q, z)


@triton.jit
def exp_neg(a, BITS: tl.constexpr, N: tl.constexpr = 1):
    """Return exp(-N a) for a >= 0."""
    log2_e: tl.constexpr = 1.4426950408889634
    if BITS == 53:
        return platform.exp(-N * a)
    elif BITS <= 11:
        return platform.ex2_approx(a * (-N * log2_e))
    else:
        return float32.exp_below(min_nan(a, number(a, 89.0 / N)), number(a, -0.0), N)


@triton.jit
def rcp_1p(e, BITS: tl.constexpr, N: tl.constexpr = 1):
    """Return N / (1 + e) for 0 <= e <= 1."""
    if BITS == 24:
        r = platform.rcp_approx(1.0 + e)
        return N * platform.fma(r, platform.fma(-r, e, 1.0 - r), r)
    elif N == 1:
        return rcp(1.0 + e, BITS)
    else:
        return rcp(1.0 / N + (1.0 / N) * e, BITS)


# With e = exp(-|z|): sigmoid(|z|) = 1 / (1 + e), sigmoid(-|z|) = e / (1 + e) = v, and their product, in float32
# v - v^2, is the derivative. Nothing overflows, and v <= 1/2 cancels nothing.


@triton.jit
def sigmoid(z, BITS: tl.constexpr):
    e = exp_neg(tl.abs(z), BITS)
    if BITS == 24:
        v = float32.quotient(e, e)
        return tl.where(z < 0, v, 1.0 - v)
    else:
        r = rcp_1p(e, BITS)
        return tl.where(z < 0, e * r, r)


@triton.jit
def sigmoid_alone(z, BITS: tl.constexpr):
    """Return sigmoid where its derivative is not needed: 16-bit results have a shorter way."""
    log2_e: tl.constexpr = 1.4426950408889634
    if BITS <= 11:
        return platform.rcp_approx(1.0 + platform.ex2_approx(z * -log2_e))
    else:
        return sigmoid(z, BITS)


@triton.jit
def sigmoid_slope(z, BITS: tl.constexpr):
    e = exp_neg(tl.abs(z), BITS)
    if BITS == 24:
        v = float32.quotient(e, e)
        return platform.fma(-v, v, v)
    else:
        r = rcp_1p(e, BITS)
        return e * r * r


@triton.jit
def sigmoid_second(z, BITS: tl.constexpr):
    """Return the second derivative of sigmoid: with e = exp(-|z|) nothing overflows."""
    e = exp_neg(tl.abs(z), BITS)
    r = rcp_1p(e, BITS)
    bent = (e * r * r) * ((1.0 - e) * r)
    return tl.where(z < 0, bent, -bent)


@triton.jit
def tanhshrink_series(u, BITS: tl.constexpr):
    """Return T of tanh(z) = z - z^3 T, a minimax polynomial in u = z^2 for |z| < 1.2."""
    if BITS <= 11:
        p = 0.0533416271 + u * (-0.0198468771 + u * (0.0056736893 + u * -0.000836071617))
        return 0.333331853 + u * (-0.133259162 + u * p)
    else:
        p = -0.00330401724 + u * (0.00106209004 + u * (-0.000240167908 + u * 2.68460608e-05))
        p = 0.0539635606 + u * (-0.0218348168 + u * (0.00873210374 + u * p))
        return 0.333333343 + u * (-0.133333087 + u * p)


@triton.jit
def tanh_far(z, BITS: tl.constexpr):
    """Return 1 - 2 e / (1 + e), e = exp(-2 |z|), with z's sign: accurate to 2^-23 of 1, too little for small z."""
    e = exp_neg(tl.abs(z), BITS, 2)
    t = 1.0 - e * rcp_1p(e, BITS, 2)
    return tl.where(z < 0, -t, t)


@triton.jit
def tanh(z, BITS: tl.constexpr):
    if BITS == 53:
        return platform.tanh(z)
    elif BITS <= 11:
        # A minimax quotient, off by at most 1.3e-6 of the result; from 4.7 on tanh rounds to 1.
        c = min_nan(max_nan(z, number(z, -4.7)), number(z, 4.7))
        u = c * c
        p = 0.999998715 + u * (0.117111504 + u * 0.00167329065)
        return c * p * platform.rcp_approx(1.0 + u * (0.45043405 + u * (0.0184998655 + u * 6.70261213e-05)))
    else:
        return float32.tanh_long(z)


@triton.jit
def sech2(z, BITS: tl.constexpr):
    """Return 1 - tanh(z)^2, which cancels where tanh saturates: 4 e / (1 + e)^2, e = exp(-2 |z|), does not."""
    if BITS == 24:
        factor, more, _, _ = float32.tanh_slope(min_nan(tl.abs(z), number(z, 44.0)), number(z, -0.0))
        return float32.slope(factor, more)
    else:
        e = exp_neg(tl.abs(z), BITS, 2)
        r = rcp_1p(e, BITS, 2)
        return (e * r) * r


@triton.jit
def normpdf(z, BITS: tl.constexpr):
    """Return the density of the normal distribution."""
    inverse_sqrt_2pi: tl.constexpr = 0.3989422804014327
    return inverse_sqrt_2pi * exp_neg(0.5 * z * z, BITS)


@triton.jit
def normcdf(z, BITS: tl.constexpr):
    """Return the distribution function of the normal distribution, (1 + erf(z / sqrt(2))) / 2."""
    sqrt_half: tl.constexpr = 0.7071067811865476
    if BITS <= 11:
        t = rcp(1.0 + 0.3275911 * sqrt_half * tl.abs(z), BITS)
        p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
        tail = 0.5 * p * exp_neg(0.5 * z * z, BITS)
        return tl.where(z < 0, tail, 1.0 - tail)
    else:
        return 0.5 * platform.erfc(-z * sqrt_half)


@triton.jit
def normcdf_unit(z, BITS: tl.constexpr):
    """Return Phi for |z| <= 1, by a minimax polynomial: no exponential, no branch. float64 has no need of it."""
    u = z * z
    if BITS == 53:
        return normcdf(z, BITS)
    elif BITS <= 11:
        return 0.5 + z * (0.398941547 + u * (-0.0664662942 + u * (0.00985012297 + u * -0.000981363701)))
    else:
        p = -0.00118635304 + u * (0.000113512659 + u * -7.66467929e-06)
        return 0.5 + z * (0.398942292 + u * (-0.0664903596 + u * (0.00997333135 + u * p)))


@triton.jit
def gelu_slope_unit(z, BITS: tl.constexpr):
    """Return gelu's derivative for |z| <= 1, again by polynomials. In float32 by one that has the zero as a factor."""
    if BITS == 53:
        return normcdf(z, BITS) + z * normpdf(z, BITS)
    elif BITS <= 11:
        u = z * z
        p = -0.265952706 + u * (0.0597694553 + u * (-0.00929194223 + u * 0.000906444388))
        return 0.5 + z * (0.797884405 + u * p)
    else:
        p = 0.00106718601 + z * (8.22413931e-05 + z * (-8.44386304e-05 + z * -6.25826169e-06))
        p = 0.00667734817 + z * (-0.00886739511 + z * (-0.000823385722 + z * p))
        p = 0.17665346 + z * (-0.234976366 + z * (-0.0412148908 + z * (0.0548188388 + z * p)))
        return ((z + 0.751791537) - 1.21144499e-08) * (0.665077984 + z * p)


@triton.jit
def gelu_slope_upper(z, BITS: tl.constexpr):
    """Return gelu's derivative for -0.5 <= z <= 1."""
    if BITS != 24:
        return gelu_slope_unit(z, BITS)
    else:
        u = z * z
        p = -0.00947522186 + u * (0.0011175595 + u * -8.48879208e-05)
        p = -0.265960544 + u * (0.0598340444 + u * p)
        return platform.fma(z, platform.fma(u, p, number(z, 0.797884524)), number(z, 0.5))


@triton.jit
def shifted(high, low, shift):
    """Return the first 64 of 128 bits behind `shift` of them."""
    return (high << shift) | (low >> 1 >> (63 - shift))


@triton.jit
def far_angle(z):
    """Return `angle` of a float32 z with |z| >= 2^17, by Payne and Hanek's reduction. It is NaN at infinity.

    CUDA's has 64 more bits of the product, since it serves float64 too.
    """
    bits = tl.abs(z).to(tl.float64).to(tl.uint64, bitcast=True)
    at = (bits >> 52) - 1040
    digits = (bits & 0xFFFFFFFFFFFFF) | 0x10000000000000
    # 2 / pi behind 37 zeros: the word that the digits begin in, and the next two.
    second = number(bits, 0x727220A94FE13ABE)
    third = number(bits, 0x8FA9A6EE06DB14AC)
    first = tl.where(at < 64, number(bits, 0x517CC1B), second)
    second = tl.where(at < 64, second, third)
    third = tl.where(at < 64, third, number(bits, 0xC9E21C820FF28B1D))
    low = shifted(second, third, at & 63)
    high = digits * shifted(first, second, at & 63) + tl.umulhi(digits, low)
    quarters = (high + 0x2000000000000000) >> 62
    left = (high - (quarters << 62)).to(tl.int64, bitcast=True).to(tl.float64)
    exact = left * number(left, 3.4061215800865545e-19)  # pi / 2 by 2^62
    rest = exact.to(tl.float32) + (z - z)
    less = (rest.to(tl.float64) - exact).to(tl.float32)
    quarters = quarters.to(tl.int32)
    return tl.where(z < 0, -quarters, quarters), tl.where(z < 0, -rest, rest), tl.where(z < 0, -less, less)


@triton.jit
def angle(given):
    """Return (quarters, rest, less) of a float32 number: quarters pi / 2 + rest - less, |rest| <= 0.79.

    Cody and Waite's reduction serves those below 2^17. A tile with no larger number never computes the other one.
    """
    far = ~(tl.abs(given) < 131072.0)
    z = tl.where(far, 0.0, given)
    q = platform.fma(z, number(z, 0.6366197723675814), number(z, 12582912.0)) - 12582912.0
    near = platform.fma(q, number(z, -1.57079625), z)
    product = q * 7.54978942e-08
    rest = platform.minus_rounded(near, product)
    less = platform.fma(q, number(z, 5.39030253e-15), platform.fma(q, number(z, 7.54978942e-08), -product))
    less -= platform.minus_rounded(near - rest, product)
    quarters = q.to(tl.int32)
    if tl.max(far.to(tl.int32)) > 0:
        far_quarters, far_rest, far_less = far_angle(given)
        quarters = tl.where(far, far_quarters, quarters)
        rest = tl.where(far, far_rest, rest)
        less = tl.where(far, far_less, less)
    return quarters, rest, less


@triton.jit
def sine(quarters, rest, less):
    """Return the sine of an angle, by minimax polynomials of rest^2."""
    u = rest * rest
    s = -0.166666672 + u * (0.00833338592 + u * (-0.000198559923 + u * 2.86567956e-06))
    c = 0.0416666567 + u * (-0.00138877297 + u * 2.44677067e-05)
    half = 0.5 * u
    most = 1.0 - half
    odd = most + ((1.0 - most) - half + platform.fma(u * u, c, rest * less))
    # -0 stays -0. Triton 3.6 makes +0 of a +0 with a minus in front, so that a number has the minus here.
    even = rest + platform.fma(platform.fma(rest, u, number(u, 0.0)), s, less * -most)
    y = tl.where((quarters & 1) == 0, even, odd)
    return tl.where((quarters & 2) == 0, y, -y)


@triton.jit
def sin(z, BITS: tl.constexpr):
    """Return the sine of z."""
    if BITS == 53:
        return platform.sin(z)
    else:
        quarters, rest, less = angle(z)
        return sine(quarters, rest, less)


@triton.jit
def cos(z, BITS: tl.constexpr):
    """Return the cosine of z."""
    if BITS == 53:
        return platform.cos(z)
    else:
        quarters, rest, less = angle(z)
        return sine(quarters + 1, rest, less)
