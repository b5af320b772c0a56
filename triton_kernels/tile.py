"""Read and write a program's tile: its rows and columns, and how inputs and gradients lie there.

At row r and column c an input's element is
    data[sum of row strides * (coordinates of r) + sum of column strides * (coordinates of c)]
where the coordinates are those of r within the rows' sizes and of c within the columns' (dualop/launch/layout.py).
`generate.py` writes the sums for each input; `cuda/view.cuh` does the same for the threads of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .platform import count, let_next_kernel_begin, round_to, wait_for_kernel_before

COLUMN = tl.constexpr(1)
ROW = tl.constexpr(2)


@triton.jit
def programs(NARROW: tl.constexpr):
    """Return this program's numbers along the rows and along the columns, wide enough for all indices."""
    row_program = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    col_program = tl.program_id(0)
    if NARROW:
        return row_program, col_program
    else:
        return row_program.to(tl.int64), col_program.to(tl.int64)


@triton.jit
def place(first_row, first_column, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Row numbers [BLOCK_ROWS, 1] and column numbers [1, BLOCK_COLS]."""
    row = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
    column = first_column + tl.arange(0, BLOCK_COLS)[None, :]
    return row, column


@triton.jit
def inside(row, column, rows, cols, total, MASK: tl.constexpr):
    """Which elements there are. MASK: 2 where the last row is short; 0, with no mask, where all are."""
    if MASK == 2:
        return (row < rows) & (column < cols) & (row * cols + column < total)
    else:
        return (row < rows) & (column < cols)


@triton.jit
def load(pointers, mask):
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask, other=0.0)


@triton.jit
def split(i, size, multiplier, shift, NARROW: tl.constexpr):
    """Return i // size and i % size; below 2^31 by a multiplication (`Divisor` in cuda/view.cuh)."""
    if NARROW:
        above = (tl.umulhi(i.to(tl.uint32), multiplier.to(tl.uint32)) >> shift).to(tl.int32)
    else:
        above = i // size
    return above, i - above * size


@triton.jit
def read(pointers, mask, BITS: tl.constexpr):
    """Return an input's values: [rows, columns], or 1 in place of a dimension that it does not vary along."""
    value = load(pointers, mask)
    if BITS == 53:
        return value.to(tl.float64)
    else:
        return value.to(tl.float32)


@triton.jit
def write(pointer, offset, value, mask):
    tl.store(pointer + offset, round_to(value, pointer.dtype.element_ty), mask)


@triton.jit
def zeros(BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BITS: tl.constexpr):
    """Return the sum of no gradients, one for each element of a tile: threads meet only when all tiles are done."""
    dtype: tl.constexpr = tl.float64 if BITS == 53 else tl.float32
    return tl.zeros([BLOCK_ROWS, BLOCK_COLS], dtype)


@triton.jit
def add(sums, gradient, mask):
    if mask is not None:
        gradient = tl.where(mask, gradient, 0.0)
    return sums + gradient


@triton.jit
def write_sum(
    pointer,
    sums,
    row,
    column,
    rows,
    cols,
    row_program,
    col_program,
    segment,
    slots,
    KIND: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Leave a program's partial sums where they are added up, or the gradient where it has all of a sum.

    If SEGMENTS, so many segments of columns, each of which has one sum, may lie in the program's columns. A segment has
    a slot for each program that may have a part of it; who has its end fills what may be one more with zero.
    """
    if COLUMN & KIND:
        total = tl.sum(sums, axis=0, keep_dims=True)
        if SEGMENTS:
            WIDTH: tl.constexpr = sums.shape[1]
            first = col_program * WIDTH
            end = tl.minimum(first + WIDTH, cols)
            which = first // segment + tl.arange(0, SEGMENTS)[:, None]
            begin = which * segment
            part = tl.sum(tl.where((column >= begin) & (column < begin + segment), total, 0.0), axis=1, keep_dims=True)
            slot = col_program - begin // WIDTH
            place = (row_program * (cols // segment) + which) * slots + slot
            write(pointer, place, part, begin < end)
            write(
                pointer, place + 1, tl.zeros_like(part), (begin < end) & (begin + segment <= end) & (slot + 1 < slots)
            )
        else:
            write(pointer, row_program * cols + column, total, column < cols)
    elif ROW & KIND:
        place = row * tl.num_programs(0) + col_program
        write(pointer, place, tl.sum(sums, axis=1, keep_dims=True), row < rows)
    else:
        total = tl.sum(tl.sum(sums, axis=1, keep_dims=True), axis=0, keep_dims=True)
        place = row_program * tl.num_programs(0) + col_program
        write(pointer, place + tl.zeros([1, 1], tl.int32), total, None)


@triton.jit
def sum_kernel(
    partial,
    out,
    outer,
    kept,
    inner,
    columns,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_TERMS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Write out[k, n] = partial[outer, k, inner, n] summed over outer and inner, in float64 and in a fixed order."""
    wait_for_kernel_before(EARLY)
    output = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    term = tl.arange(0, BLOCK_TERMS)[:, None].to(tl.int64)
    sums = tl.zeros([BLOCK_TERMS, BLOCK_OUT], tl.float64)
    # Several blocks of terms are under way at once: it is their latency that counts.
    for start in tl.range(0, count(outer * inner), BLOCK_TERMS, num_stages=4):
        t = start + term
        if COLUMNS:  # one that is kept: no division
            offset = t * columns + output
        else:
            k = output // columns
            offset = (((t // inner) * kept + k) * inner + t % inner) * columns + output - k * columns
        mask = (t < outer * inner) & (output < kept * columns)
        sums += tl.load(partial + offset, mask, other=0.0).to(tl.float64)
    let_next_kernel_begin(EARLY)
    total = tl.sum(sums, axis=0, keep_dims=True)
    if out.dtype.element_ty == tl.float64:
        tl.store(out + output, total, output < kept * columns)
    else:
        write(out, output, total.to(tl.float32), output < kept * columns)
