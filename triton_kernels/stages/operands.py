"""Operand stages: NAME(z, b, BITS) and NAME_backward(z, b, gy, BITS).

`__init__.py` says what each has.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..math import divide
from ..platform import max_nan, min_nan


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
