"""The CUDA part of an emitted file: of the kernels in `cuda/` what a chain uses, and Python that launches them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dualop.backends import cuda
from dualop.chains import Chain
from dualop.emit_trim import trimmed
from dualop.layout import COLUMN, FULL

# What Python calls. @...@ is filled in.
_LAUNCHERS = r"""
// ==== what Python calls ==============================================================================================

namespace dualop {

@PROBLEM@
constexpr int kinds[] = {@KINDS@};

// The matrix z and a vector along its columns (COLUMN) or a single number (0) for each operand, all dense.
static Arguments<TheProblem::inputs> arguments(index_t rows, index_t cols, index_t total, index_t across, index_t steps,
                                               index_t row_step, const void* const* inputs) {
    Arguments<TheProblem::inputs> a = {};
    a.rows = rows, a.cols = cols, a.total = total;
    a.col_programs = across, a.steps = steps, a.row_step = row_step;
    for (int i = 0; i < TheProblem::inputs; i++) a.in[i].data = inputs[i], a.in[i].row_stride = cols;
    return a;
}

}  // namespace dualop

using namespace dualop;

// Both return 0 or a cudaError_t. vector: accesses of 16 bytes. x, y: threads of a block; across, down: blocks.
DUALOP_EXPORT int tail_forward(void* stream, index_t vector, index_t x, index_t y, index_t across, index_t down,
                               index_t steps, index_t rows, index_t cols, index_t total, const void* const* inputs,
                               void* result) {
    const dim3 block(static_cast<unsigned>(x), static_cast<unsigned>(y)), grid(static_cast<unsigned>(across * down));
    auto a = arguments(rows, cols, total, across, steps, y * UNROLL, inputs);
    a.y = result;
    if (vector) launch(forward_kernel<TheProblem, TheProblem::wide>, grid, block, stream, a);
    else launch(forward_kernel<TheProblem, 1>, grid, block, stream, a);
    return last_error();
}

// gradients and partial sums may be null where nobody wants them.
DUALOP_EXPORT int tail_backward(void* stream, index_t vector, index_t x, index_t y, index_t across, index_t down,
                                index_t steps, index_t rows, index_t cols, index_t total, const void* const* inputs,
                                const void* gy, void* const* gradients, void* const* partials) {
    const dim3 block(static_cast<unsigned>(x), static_cast<unsigned>(y)), grid(static_cast<unsigned>(across * down));
    auto a = arguments(rows, cols, total, across, steps, y * UNROLL, inputs);
    a.gy = gy;
    index_t sums = 0;
    for (int i = 0; i < TheProblem::inputs; i++) {
        View& view = a.in[i];
        view.gradient = kinds[i] == FULL ? gradients[i] : partials[i];
        view.sum = kinds[i] == FULL ? nullptr : gradients[i];
        view.kept = view.inner = 1;
        view.outer = kinds[i] == COLUMN ? down : down * across;
        view.columns = kinds[i] == COLUMN ? cols : 1;
        if (view.sum && view.columns > sums) sums = view.columns;
    }
    if (vector) launch(backward_kernel<TheProblem, TheProblem::wide>, grid, block, stream, a);
    else launch(backward_kernel<TheProblem, 1>, grid, block, stream, a);
    if (int error = last_error()) return error;
    if (sums == 0) return 0;
    const dim3 sum_grid(static_cast<unsigned>((sums + SUM_X - 1) / SUM_X), TheProblem::inputs);
    launch(sum_kernel<TheProblem>, sum_grid, dim3(SUM_X, SUM_Y), stream, a);
    return last_error();
}
"""

_PYTHON = '''import ctypes
import functools
import hashlib

import torch
import torch.nn as nn
from torch.utils.cpp_extension import load_inline

CUDA = r"""
@SOURCE@"""

C_TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "double"}
THREADS, UNROLL = @THREADS@, @UNROLL@  # of a block; rows that a thread works on at once: as in the kernels
BLOCKS_PER_SM = @BLOCKS@  # in backward, so that few partial sums are left to add up


@functools.lru_cache(maxsize=None)
def library(dtype):
    """The kernels for tensors of one dtype, compiled at the first call."""
    source = f"#define DTYPE {C_TYPES[dtype]}\\n{CUDA}"
    path = load_inline(
        "dualop_" + hashlib.sha256(source.encode()).hexdigest()[:16],
        cpp_sources=[""],
        cuda_sources=[source],
        extra_cuda_cflags=["-O3", "-std=c++17"],
        extra_ldflags=["-Wl,-Bsymbolic"],  # each library keeps to its own functions
        no_implicit_headers=True,
        is_python_module=False,
    )
    return ctypes.CDLL(path)


def ceil_div(a, b):
    return -(-a // b)


def cut(rows, cols, width, most_blocks):
    """Threads of a block (x, y), blocks (across, down), and the tiles (steps) that a block makes, one below the other.

    A tile has y * UNROLL rows and x * width columns.
    """
    x = min(THREADS, 1 << (ceil_div(cols, width) - 1).bit_length())
    y = THREADS // x
    across, tiles = ceil_div(cols, x * width), ceil_div(rows, y * UNROLL)
    steps = ceil_div(tiles, max(1, min(tiles, ceil_div(most_blocks, across))))
    return x, y, across, ceil_div(tiles, steps), steps


def shape_of(z):
    """z as rows and columns."""
    @SHAPE@
    return rows, cols


def vector_width(cols, tensors):
    """Elements of one access: 16 bytes of them where all rows start at such addresses, else one."""
    wide = 16 // tensors[0].element_size()
    return wide if cols % wide == 0 and all(t.data_ptr() % 16 == 0 for t in tensors) else 1


def launch(launcher, z, width, x, y, across, down, steps, *pointers):
    rows, cols = shape_of(z)
    numbers = (width > 1, x, y, across, down, steps, rows, cols, z.numel())
    with torch.cuda.device(z.device):
        stream = ctypes.c_void_p(torch.cuda.current_stream(z.device).cuda_stream)
        error = launcher(stream, *map(ctypes.c_longlong, numbers), *pointers)
    if error:
        raise RuntimeError(f"the kernel could not be launched: CUDA error {error}")


def address(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def addresses(tensors):
    return (ctypes.c_void_p * len(tensors))(*map(address, tensors))


def tail_forward(inputs):
    z = inputs[0]
    result = torch.empty_like(z)
    rows, cols = shape_of(z)
    width = vector_width(cols, [*inputs, result])
    geometry = cut(rows, cols, width, most_blocks=rows * cols)
    launch(library(z.dtype).tail_forward, z, width, *geometry, addresses(inputs), address(result))
    return result


def tail_backward(gy, inputs, needs):
    """The gradients of those inputs that `needs` is true for, None for the others."""
    z = inputs[0]
    rows, cols = shape_of(z)
    width = vector_width(cols, [*inputs, gy])
    sms = torch.cuda.get_device_properties(z.device).multi_processor_count
    geometry = cut(rows, cols, width, most_blocks=BLOCKS_PER_SM * sms)
    _, _, across, down, _ = geometry
    gradients = [torch.empty_like(t) if need else None for t, need in zip(inputs, needs)]
    # A block leaves one sum for each of its columns, or a single one for an operand that is a number.
    sums = {"matrix": 0, "vector": down * cols, "number": down * across}
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    partials = [
        torch.empty(sums[kind], dtype=wide, device=z.device) if need and sums[kind] else None
        for kind, need in zip(KINDS, needs)
    ]
    pointers = (addresses(inputs), address(gy), addresses(gradients), addresses(partials))
    launch(library(z.dtype).tail_backward, z, width, *geometry, *pointers)
    return gradients
'''

_KIND = {FULL: "FULL", COLUMN: "COLUMN", 0: "0"}


def emitted(chain: Chain, kinds: Sequence[int], shape: str) -> str:
    """The part of the file above the model: `tail_forward(inputs)` and `tail_backward(gy, inputs, needs)`.

    `kinds` are those of z and the chain's operands: FULL, COLUMN or 0. `shape` is Python that sets `rows` and `cols`.
    """
    inputs = tuple((torch.float32, kind) for kind in kinds)
    source = cuda.source(chain, (torch.float32, inputs), host=False)
    problem = source[source.index("using TheChain") : source.index("\n}\nDUALOP_LIBRARY")].replace("float", "DTYPE")
    launchers = _LAUNCHERS.replace("@PROBLEM@", problem).replace("@KINDS@", ", ".join(_KIND[kind] for kind in kinds))
    filled = {
        "@SOURCE@": f"{trimmed('kernels.cuh', launchers)}\n{launchers}",
        "@THREADS@": cuda.THREADS,
        "@UNROLL@": cuda.UNROLL,
        "@BLOCKS@": cuda.PROGRAMS_PER_SM,
        "@SHAPE@": shape,
    }
    text = _PYTHON
    for mark, value in filled.items():
        text = text.replace(mark, str(value))
    return text
