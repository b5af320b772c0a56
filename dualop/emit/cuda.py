"""Write the CUDA part of an emitted file: the part of the kernels that a chain uses, and Python that launches them."""

from __future__ import annotations

import re

import torch

from dualop.backends import cuda
from dualop.emit import launch as emit_launch
from dualop.emit.trim import trimmed
from dualop.language.syntax import Chain
from dualop.launch.layout import DTYPES

_CUDA = """namespace dualop { using index_t = @INDEX@; }

@HEADERS@

// ==== the chain ======================================================================================================

namespace dualop {

// @CHAIN@
@PROBLEM@

}  // namespace dualop

DUALOP_LIBRARY(dualop::TheProblem)
"""

_PYTHON = '''import ctypes
import functools
import hashlib
import math
import struct
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.utils.cpp_extension import load_inline

CUDA = r"""
@SOURCE@"""
@LAUNCH@

# ---- the kernels, compiled and launched ------------------------------------------------------------------------------

# Of a dtype: its name in C++, and the templates' parameters in forward and backward.
COMPILED = {
@COMPILED@
}


@functools.lru_cache(maxsize=None)
def library(dtype):
    """The kernels for tensors of one dtype, compiled at the first call."""
    names = zip(("DTYPE", "FORWARD_CUT", "BACKWARD_CUT"), COMPILED[dtype])
    source = "".join(f"#define {name} {value}\\n" for name, value in names) + CUDA
    path = load_inline(
        "dualop_" + hashlib.sha256(source.encode()).hexdigest()[:16],
        cpp_sources=[""],
        cuda_sources=[source],
        extra_cuda_cflags=["-O3", "-std=c++17"],
        extra_ldflags=["-Wl,-Bsymbolic"],  # each library keeps to its own functions
        no_implicit_headers=True,
        is_python_module=False,
    )
    loaded = ctypes.CDLL(path)
    loaded.dualop_error_text.restype = ctypes.c_char_p
    return loaded


@functools.lru_cache(maxsize=None)
def cut(layout, backward, vector, sms):
    """The grid, and how many blocks and threads along x, y and z."""
    width = 16 // layout.dtype.itemsize if vector else 1
    cut = (BACKWARD if backward else FORWARD)[layout.dtype]
    if backward:
        cut = TALL[layout.dtype].fitted(cut, layout, sms)
    x = min(cut.across if vector else max(cut.across, 32), power_of_two(ceil_div(layout.cols, width)))
    y = cut.threads // x
    tile = (y * cut.rows, x * width)
    grid = backward_grid(layout, *tile, sms, cut) if backward else forward_grid(layout, *tile)
    return grid, (*grid.axes, x, y)


def aligned(layout, tensors):
    """Whether all accesses can be of 16 bytes: all rows start at such addresses."""
    wide = 16 // layout.dtype.itemsize
    if layout.cols % wide or layout.total % wide or any(tensor.data_ptr() % 16 for tensor in tensors):
        return False
    return all(view.row_stride % wide == 0 for view in layout.views if view.kind & FULL == FULL)


def launch(name, layout, grid, blocks, vector, device, y, gy, inputs):
    """As the struct Launch above has it, in words of 8 bytes."""
    kernels = library(layout.dtype)
    with torch.cuda.device(device):
        head = (vector, *blocks, torch.cuda.current_stream(device).cuda_stream, layout.cols, layout.total)
        walk = (grid.steps, grid.row_step, grid.col_step, y, gy)
        error = getattr(kernels, name)(struct.pack(f"={14 + len(inputs)}q", *head, *walk, *inputs))
    if error:
        raise RuntimeError(f"the kernel could not be launched: {kernels.dualop_error_text(error).decode()}")


def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def tail_forward(inputs):
    z = inputs[0]
    layout, result = layout_of(z.shape, z.dtype), torch.empty_like(z)
    vector = aligned(layout, [*inputs, result])
    words = []
    for view, tensor in zip(layout.views, inputs):
        words += (tensor.data_ptr(), view.div, view.mod, view.row_stride, 0, 0, 0, 0, 0, 0, 0)
    grid, blocks = cut(layout, False, vector, multiprocessors(z.device))
    launch("dualop_forward", layout, grid, blocks, vector, z.device, result.data_ptr(), 0, words)
    return result


def tail_backward(gy, inputs, needs):
    """The gradients of those inputs that `needs` is true for, None for the others."""
    z = inputs[0]
    layout = layout_of(z.shape, z.dtype)
    vector = aligned(layout, [*inputs, gy])
    grid, blocks = cut(layout, True, vector, multiprocessors(z.device))
    gradients = [torch.empty_like(t) if need else None for t, need in zip(inputs, needs)]
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    words, partials = [], []
    for view, tensor, gradient in zip(layout.views, inputs, gradients):
        # Where elements share an operand's element, each block leaves a partial sum, and a second kernel adds them up;
        # but where one block has all of a sum.
        shape = view.sum_shape(layout.rows, layout.cols, grid.row_programs, grid.col_programs)
        parted = gradient is not None and view.reduced and shape[0] * shape[2] > 1
        partials.append(torch.empty(math.prod(shape), dtype=wide, device=z.device) if parted else gradient)
        place = (tensor.data_ptr(), view.div, view.mod, view.row_stride, 0)
        words += (*place, address(partials[-1]), address(gradient) if parted else 0, *shape)
    launch("dualop_backward", layout, grid, blocks, vector, z.device, 0, gy.data_ptr(), words)
    return gradients
'''


# The problem's type in cuda.source: the cuts of the two kernels, then the dtype.
_CUTS = re.compile(r"(Cut<[^<>]*>), (Cut<[^<>]*>), (?=\w)")


def emitted(chain: Chain, plan: emit_launch.Plan) -> str:
    """Return the part of the file above the model: `tail_forward(inputs)` and `tail_backward(gy, inputs, needs)`."""
    compiled = [f"    {dtype}: {_compiled(chain, plan, dtype)!r},".replace("'", '"') for dtype in DTYPES]
    filled = {
        "@SOURCE@": _source(chain, plan),
        "@LAUNCH@": emit_launch.emitted(plan, cuda.FORWARD, cuda.BACKWARD, cuda.TALL),
        "@COMPILED@": "\n".join(compiled),
    }
    text = _PYTHON
    for mark, value in filled.items():
        text = text.replace(mark, value)
    return text


def _problem(chain: Chain, plan: emit_launch.Plan, dtype: torch.dtype) -> str:
    """Return the chain and the problem as C++ types."""
    inputs = tuple((dtype, kind) for kind in plan.kinds)
    text = cuda.source(chain, (dtype, inputs, plan.view.narrow), host=False)
    return text[text.index("using TheChain") : text.index("\n}\nDUALOP_LIBRARY")]


def _compiled(chain: Chain, plan: emit_launch.Plan, dtype: torch.dtype) -> tuple[str, ...]:
    cuts = _CUTS.search(_problem(chain, plan, dtype))
    assert cuts is not None
    return cuda.C_TYPES[dtype], *cuts.groups()


def _source(chain: Chain, plan: emit_launch.Plan) -> str:
    """Return the kernels in any dtype: DTYPE, FORWARD_CUT and BACKWARD_CUT are defined in front of them."""
    problem = _CUTS.sub("FORWARD_CUT, BACKWARD_CUT, ", _problem(chain, plan, torch.float32))
    filled = {
        "@INDEX@": "int" if plan.view.narrow else "long long",
        "@HEADERS@": trimmed("library.cuh", problem),
        "@CHAIN@": str(chain),
        "@PROBLEM@": re.sub(r"\bfloat\b", "DTYPE", problem),
    }
    text = _CUDA
    for mark, value in filled.items():
        text = text.replace(mark, value)
    return text
