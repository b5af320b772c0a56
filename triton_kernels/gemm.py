"""Write a matrix product that runs a chain on its sums while they are in registers: y = chain(x @ weight.T, *operands).

Programs are persistent, each making tile after tile of y: the loop over a tile's depth and the loop over tiles are
flattened into one, so that the loads of the next tile are under way while the chain runs on the last one. Two programs
on an SM hide the rest of it: while one runs the chain, the other has the tensor cores.
`generate` writes the kernel for one chain, around the functions below.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from .generate import Form, Step, chain_forward, sizes, tile_of, view
from .platform import INTERPRETED, round_to

_EXACT = tl.constexpr(INTERPRETED)  # the interpreter's product of two bfloat16 is not to be trusted


@triton.jit
def corner(tile, rows, cols, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return a tile's first row and column. GROUP tiles of rows go along the columns and share the weight in L2."""
    down = tl.cdiv(rows, BLOCK_M)
    across = tl.cdiv(cols, BLOCK_N)
    first = tile // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    inside = tile % (GROUP * across)
    return (first + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def fetch(
    source, row, column, rows, cols, stride, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DESCRIPTORS: tl.constexpr
):
    """Return a block of a matrix whose rows lie `stride` apart, zero outside of it."""
    if DESCRIPTORS:
        block = source.load([row, column])
    else:
        r = row + tl.arange(0, HEIGHT)[:, None]
        c = column + tl.arange(0, WIDTH)[None, :]
        block = tl.load(source + r.to(tl.int64) * stride + c, (r < rows) & (c < cols), other=0.0)
    if _EXACT:
        return block.to(tl.float32)
    else:
        return block


@triton.jit
def put(target, row, column, rows, cols, value, DESCRIPTORS: tl.constexpr):
    """Write a block of a dense matrix, rounded once."""
    if DESCRIPTORS:
        target.store([row, column], round_to(value, target.dtype))
    else:
        r = row + tl.arange(0, value.shape[0])[:, None]
        c = column + tl.arange(0, value.shape[1])[None, :]
        rounded = round_to(value, target.dtype.element_ty)
        tl.store(target + r.to(tl.int64) * cols + c, rounded, (r < rows) & (c < cols))


@triton.jit
def halves(sums):
    """Return the left and the right half of the columns: the chain on half a tile needs half the registers."""
    HEIGHT: tl.constexpr = sums.shape[0]
    WIDTH: tl.constexpr = sums.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(sums, (HEIGHT, 2, WIDTH)), (0, 2, 1)))


_HEAD = '''"""{title} behind a matrix product: written by dualop, do not edit."""

import triton
import triton.language as tl

from {package} import stages
from {package}.gemm import corner, fetch, halves, put
from {package}.platform import count, number
from {package}.tile import inside, place, read, split
'''

_KERNEL = """@triton.jit
def finish(sums, y, @VIEWS@first_row, first_column, rows, cols, @OPTIONS@):
    row, column = place(first_row, first_column, sums.shape[0], sums.shape[1])
    if not NARROW:
        row = row.to(tl.int64)
    MASK: tl.constexpr = 1
    total = rows * cols
    in0 = sums
@READS@    put(y, first_row, first_column, rows, cols, chain_forward(@INPUTS@, BITS), DESCRIPTORS)


@triton.jit
def finish_in_parts(sums, y, @VIEWS@row, column, rows, cols, PARTS: tl.constexpr, @OPTIONS@):
    if PARTS == 1:
        finish(sums, y, @VIEWS@row, column, rows, cols, @GIVEN@)
    else:
        left, right = halves(sums)
        middle = column + left.shape[1]
        finish_in_parts(left, y, @VIEWS@row, column, rows, cols, PARTS // 2, @GIVEN@)
        finish_in_parts(right, y, @VIEWS@row, middle, rows, cols, PARTS // 2, @GIVEN@)


@triton.jit
def gemm_kernel(
    x, weight, y, @VIEWS@rows, cols, depth, x_stride, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
    @OPTIONS@,
):
    programs = tl.num_programs(0)
    tiles = tl.cdiv(rows, BLOCK_M) * tl.cdiv(cols, BLOCK_N)
    # The tile that is finished, by a number of its own: what is loaded ahead must not wait for it.
    done = tl.program_id(0) - programs
    for tile in tl.range(count(tl.program_id(0)), count(tiles), count(programs), flatten=True):
        row, column = corner(tile, rows, cols, BLOCK_M, BLOCK_N, GROUP)
        sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(count(tl.cdiv(depth, BLOCK_K))):
            left = fetch(x, row, k * BLOCK_K, rows, depth, x_stride, BLOCK_M, BLOCK_K, DESCRIPTORS)
            right = fetch(weight, column, k * BLOCK_K, cols, depth, weight_stride, BLOCK_N, BLOCK_K, DESCRIPTORS)
            sums = tl.dot(left, right.T, sums)
        done += programs
        row, column = corner(done, rows, cols, BLOCK_M, BLOCK_N, GROUP)
        finish_in_parts(sums, y, @VIEWS@row, column, rows, cols, PARTS, @GIVEN@)
"""


def generate(title: str, steps: Sequence[Step], form: Form) -> str:
    """Return a chain's file with a `gemm_kernel`; `form`: of the product, not read, and the operands."""
    count = len(form.views)
    placed = [*(part for i in range(1, count) for part in view(form, i)), *sizes(form)]
    constants = ("STEP", "DESCRIPTORS", "NARROW", "BITS")
    filled = {
        "@VIEWS@": "".join(f"{name}, " for name in placed),
        "@READS@": "".join(f"    {line}\n" for line in tile_of(form, 1)),
        "@INPUTS@": ", ".join(f"in{i}" for i in range(count)),
        "@OPTIONS@": ", ".join(f"{name}: tl.constexpr" for name in constants),
        "@GIVEN@": ", ".join(constants),
    }
    kernel = _KERNEL
    for mark, value in filled.items():
        kernel = kernel.replace(mark, value)
    head = _HEAD.format(title=title, package=__name__.rpartition(".")[0])
    return f"{head}\n\n{chain_forward(steps, count)}\n\n\n{kernel}"
