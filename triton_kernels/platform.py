"""Provide what lies under the kernels: a GPU, or Triton's interpreter, which has no libdevice and no inline assembly.

The names are those of `cuda/device.cuh`; the interpreter's are plain functions on its NumPy values.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret

if INTERPRETED:
    import math

    import numpy as np
    from triton.runtime.interpreter import TensorHandle

    def _on_values(function):
        def on_tensor(z):
            with np.errstate(all="ignore"):
                values = function(z.handle.data).astype(z.handle.data.dtype)
            return tl.core.tensor(TensorHandle(values, z.handle.dtype), z.type)

        return on_tensor

    def _flush(values):
        return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)

    exp = _on_values(np.exp)
    expm1 = _on_values(np.expm1)
    log1p = _on_values(np.log1p)
    tanh = _on_values(np.tanh)
    sin = _on_values(np.sin)
    cos = _on_values(np.cos)
    erfc = _on_values(np.vectorize(math.erfc, otypes=[np.float64]))
    ex2_approx = _on_values(lambda v: _flush(np.exp2(_flush(v))))
    rcp_approx = _on_values(lambda v: _flush(1 / _flush(v)))
    tanh_approx = _on_values(np.tanh)

    def fma(a, b, c):
        """Return a * b + c, rounded once: float64 holds the product of two float32."""
        values = a.handle.data.astype(np.float64) * b.handle.data + c.handle.data
        return tl.core.tensor(TensorHandle(values.astype(np.float32), tl.float32), (a + b + c).type)

    def minus_rounded(a, b):
        return a - b

    def copysign(a, b):
        values = np.copysign(a.handle.data, b.handle.data)
        return tl.core.tensor(TensorHandle(values, a.handle.dtype), a.type)

    def wait_for_kernel_before(EARLY):
        pass

    def let_next_kernel_begin(EARLY):
        pass

    def count(n):
        """Return a number of iterations: the interpreter of Triton 3.6 cannot make an int of its scalars itself."""
        return int(n.handle.data.item()) if isinstance(n, tl.core.tensor) else int(n)

    def round_to(z, dtype):
        """Return float32 as the interpreter has to store it: it truncates to bfloat16, so round to even here."""
        if dtype != tl.bfloat16:
            return z.to(dtype)
        values = z.to(tl.float32).handle.data
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        bits = np.where(np.isnan(values), 0x7FC00000, rounded).astype(np.uint32)
        return tl.core.tensor(TensorHandle(bits.view(np.float32), tl.float32), z.to(tl.float32).type)

else:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, libdevice

    exp = libdevice.exp
    expm1 = libdevice.expm1
    log1p = libdevice.log1p
    tanh = libdevice.tanh
    sin = libdevice.sin
    cos = libdevice.cos
    erfc = libdevice.erfc
    copysign = libdevice.copysign

    @triton.jit
    def ex2_approx(z):
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [z], tl.float32, is_pure=True, pack=1)

    @triton.jit
    def rcp_approx(z):
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [z], tl.float32, is_pure=True, pack=1)

    @triton.jit
    def tanh_approx(z):
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], tl.float32, is_pure=True, pack=1)

    @triton.jit
    def fma(a, b, c):
        return tl.fma(a, b, c)

    @triton.jit
    def minus_rounded(a, b):
        """Return a - b, where b may be a product: one fma of both would take b before it was rounded."""
        return tl.inline_asm_elementwise("sub.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], tl.float32, is_pure=True, pack=1)

    # If EARLY, kernels are launched with `launch_pdl`: while the one before still runs, once all its programs have
    # called let_next_kernel_begin, or ended. So each begins with wait_for_kernel_before.
    @triton.jit
    def wait_for_kernel_before(EARLY: tl.constexpr):
        if EARLY:
            gdc_wait()

    @triton.jit
    def let_next_kernel_begin(EARLY: tl.constexpr):
        if EARLY:
            gdc_launch_dependents()

    @triton.jit
    def count(n):
        return n

    @triton.jit
    def round_to(z, dtype: tl.constexpr):
        return z.to(dtype)


@triton.jit
def number(z, value: tl.constexpr):
    """Return `value` in z's dtype. Triton makes a float32 of a bare number, which a float64 z must not get."""
    return tl.full([1, 1], value, z.dtype)


@triton.jit
def min_nan(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
