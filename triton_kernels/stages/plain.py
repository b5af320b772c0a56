"""Plain functions.

`__init__.py` says what each has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import math
from ..math import divide
from ..platform import number


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
def square_second(z, BITS: tl.constexpr):
    return number(z, 2.0)


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
def sqrt_second(z, BITS: tl.constexpr):
    if BITS == 53:
        return -0.25 / (z * tl.sqrt(z))
    else:
        return divide(number(z, -0.25), z * tl.sqrt_rn(z), BITS)


@triton.jit
def reciprocal(z, BITS: tl.constexpr):
    return divide(number(z, 1.0), z, BITS)


@triton.jit
def reciprocal_backward(z, gy, BITS: tl.constexpr):
    r = divide(number(z, 1.0), z, BITS)
    return -gy * (r * r)


@triton.jit
def reciprocal_second(z, BITS: tl.constexpr):
    r = divide(number(z, 1.0), z, BITS)
    return 2.0 * r * r * r


@triton.jit
def exp(z, BITS: tl.constexpr):
    return math.exp(z, BITS)


@triton.jit
def exp_backward(z, gy, BITS: tl.constexpr):
    return gy * math.exp(z, BITS)


@triton.jit
def exp_second(z, BITS: tl.constexpr):
    return math.exp(z, BITS)


@triton.jit
def sin(z, BITS: tl.constexpr):
    return math.sin(z, BITS)


@triton.jit
def sin_backward(z, gy, BITS: tl.constexpr):
    return gy * math.cos(z, BITS)


@triton.jit
def sin_second(z, BITS: tl.constexpr):
    return -math.sin(z, BITS)
