"""Run `chain(x @ weight.T, *operands)` in one Triton kernel, the chain in the product's epilogue, for inference.

As a rule, cuBLAS computes the product and a second kernel the chain. The one kernel here does not write the product and
read it again, and hides part of the chain's arithmetic behind the tensor cores, but its product alone is slower than
that of cuBLAS. `pays` says which sizes gain.

The environment variable DUALOP_GEMM chooses: `on` takes the kernel wherever it can run, `auto` (the default) where it
pays, `off` never. A call whose backend is set to another one than triton does not take it. Neither does a call that
needs a gradient: backward needs the product in memory, so training gains nothing (bench/NOTES.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import BuiltinFunctionType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualop import torch_private
from dualop.backends import registry
from dualop.backends.triton import TRITON, Form, divisors, strides
from dualop.build.generated import imported
from dualop.errors import BackendUnavailable
from dualop.language.program import steps
from dualop.language.syntax import Chain
from dualop.launch.grid import ceil_div, multiprocessors
from dualop.launch.layout import Layout, layout_of
from dualop.op import eager

SWITCH = "DUALOP_GEMM"
BACKEND = TRITON.name  # the kernel is Triton's
mode = os.environ.get(SWITCH) or "auto"


@contextmanager
def switched(to: str) -> Iterator[None]:
    """Set DUALOP_GEMM to auto, on or off within a `with` block, for all threads."""
    global mode
    before, mode = mode, to
    try:
        yield
    finally:
        mode = before


@dataclass(frozen=True)
class Tile:
    """Describe how the kernel is cut: the tile of y that a program computes at a time, and what computes it."""

    rows: int = 128
    columns: int = 128
    depth_bytes: int = 128  # of a row of x and of weight, for one step of the product
    stages: int = 3  # steps whose loads are in flight
    warps: int = 4
    programs: int = 2  # of an SM
    parts: int = 2  # the chain runs on one part of the columns after the other, which takes fewer registers
    group: int = 8  # tiles of rows that share columns of the weight in the L2 cache


TILE = Tile()


def pays(rows: int, out_features: int, in_features: int) -> bool:
    """Return True where the one kernel is faster than cuBLAS and a kernel behind it.

    Measured on an H100 with the default chain in bfloat16, against the faster of both backends (bench/NOTES.md): it is
    1.05 to 1.3 times as fast with up to 1024 in_features, and 0.98 to 1.04 times with 2048. With more, the product
    takes most of the time, and cuBLAS's is faster.
    """
    return in_features <= 1024 and rows * out_features >= 2**23


def reasons(x: Tensor, weight: Tensor, operands: Sequence[Tensor], backend: str | None = None) -> list[str]:
    """Return what keeps product and chain from running in one kernel here; empty if nothing does.

    The kernel takes x (..., in_features), weight (out_features, in_features) and operands that broadcast with the
    product, all of one dtype: bfloat16, float16, or float32 where torch.set_float32_matmul_precision allows TF32.
    Raises BackendUnavailable if DUALOP_GEMM is none of auto, on, off.
    """
    if mode not in ("auto", "on", "off"):
        raise BackendUnavailable(f"{SWITCH}={mode}: it may be auto, on or off")
    if mode == "off":
        return [f"{SWITCH}=off"]
    if torch.compiler.is_compiling() or torch_private.transformed():
        return ["torch.compile, functorch and forward mode take the product and the chain apart"]
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        return ["the shapes do not fit"]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, *operands)):
        return ["a gradient is needed, and the kernel is for inference: cuBLAS and the chain are as fast in training"]
    rows = x.numel() // max(x.shape[-1], 1)
    if mode == "auto" and not pays(rows, weight.shape[0], weight.shape[1]):
        return ["cuBLAS and a kernel behind it are faster at this size"]
    name = registry.requested(backend)
    if name != BACKEND and (name != registry.AUTO or registry.interpreting()):
        return [f"the backend is {name}, and this kernel is {BACKEND}'s"]
    return TRITON.environment() or _of_tensors(x, weight, operands) or _of_layout(x, weight, operands)


def launch(chain: Chain, x: Tensor, weight: Tensor, operands: Sequence[Tensor], tile: Tile | None = None) -> Tensor:
    """Return chain(F.linear(x, weight), *operands) from one kernel; call it only where `reasons` is empty.

    The product is accumulated in float32, and the chain takes it before it is rounded.
    """
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    kernel, grid, arguments, constants, options = prepared(chain, _rows(x), _rows(weight), y, operands, tile or TILE)
    with TRITON.on(x.device):
        kernel[grid](*arguments, **constants, **options)
    return y


def _of_tensors(x: Tensor, weight: Tensor, operands: Sequence[Tensor]) -> list[str]:
    tensors = (x, weight, *operands)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return [f"{x.dtype} is not for tensor cores"]
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return ["float32 products are to be exact: torch.set_float32_matmul_precision"]
    if torch.is_autocast_enabled(x.device.type):
        return ["autocast is on"]
    if any((t.dtype, t.device) != (x.dtype, x.device) for t in tensors):
        return ["the tensors differ in dtype or device"]
    if any(type(t) not in (Tensor, nn.Parameter) for t in tensors):
        return ["a tensor is of a class of its own"]
    if not eager.plain(tensors) or not isinstance(F.linear, BuiltinFunctionType):
        return ["a mode, a tracer, a replaced F.linear or a tensor that is not plain memory wants torch's own product"]
    if x.device.type != ("cpu" if registry.interpreting() else "cuda"):
        return [f"there are no kernels for {x.device.type} tensors"]
    if not x.numel() or not weight.numel():
        return ["a tensor is empty"]
    if mode == "auto" and not (_hopper(x.device) and _aligned(_rows(x), _rows(weight))):
        return ["it takes compute capability 9.0 and rows that start at multiples of 16 bytes"]
    return []


def _of_layout(x: Tensor, weight: Tensor, operands: Sequence[Tensor]) -> list[str]:
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    try:
        layout = _layout(shape, x.dtype, operands)
    except RuntimeError:
        return ["the operands do not broadcast"]
    if layout.shape != shape or layout.cols != shape[-1]:
        return ["an operand does not lie along the rows and columns of the product"]
    return []


def prepared(
    chain: Chain, x: Tensor, weight: Tensor, y: Tensor, operands: Sequence[Tensor], tile: Tile
) -> tuple[Any, tuple[int], list[Any], dict[str, Any], dict[str, Any]]:
    """Return a launch: the kernel, the grid, arguments, constants, options. x and weight are matrices."""
    (rows, depth), cols = x.shape, weight.shape[0]
    layout = _layout(y.shape, y.dtype, operands)
    views, deep = layout.views[:-1], tile.depth_bytes // x.element_size()
    matrices: list[Any] = [x, weight, y.reshape(rows, cols)]
    descriptors = _aligned(*matrices) and (x.device.type != "cuda" or _hopper(x.device))
    if descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        blocks = ([tile.rows, deep], [tile.columns, deep], [tile.rows, tile.columns // tile.parts])
        matrices = [TensorDescriptor.from_tensor(m, block) for m, block in zip(matrices, blocks, strict=True)]
    step = 1 if cols % layout.width else layout.width
    placed = [part for t, view in zip(operands, views[1:], strict=True) for part in (t, *strides(view, step))]
    placed += divisors(layout.row_sizes)
    tiles = ceil_div(rows, tile.rows) * ceil_div(cols, tile.columns)
    constants = {
        "STEP": step, "DESCRIPTORS": descriptors, "NARROW": layout.narrow, "BITS": layout.bits,
        "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": deep, "GROUP": tile.group, "PARTS": tile.parts,
    }  # fmt: skip
    return (
        _module(chain, (tuple((v.kind, v.access) for v in views), len(layout.row_sizes), 1)).gemm_kernel,
        (min(tiles, tile.programs * multiprocessors(x.device)),),
        [*matrices, *placed, rows, cols, depth, x.stride(0), weight.stride(0)],
        constants,
        {**TRITON.options(32 * tile.warps), "num_stages": tile.stages},
    )


@lru_cache(maxsize=256)
def _module(chain: Chain, form: Form) -> ModuleType:
    """Return the chain's module for the product and operands of this form."""
    from dualop.triton_kernels import gemm, generate

    return imported(gemm.generate(str(chain).replace('"', "'"), steps(chain), generate.Form(*form)))


def _layout(shape: torch.Size, dtype: torch.dtype, operands: Sequence[Tensor]) -> Layout:
    """Return the layout of the product, the operands and a vector along the columns.

    The vector keeps the layout from being cut into other rows than the product has.
    """
    product, vector = (torch.empty(s, dtype=dtype, device="meta") for s in (shape, shape[-1:]))
    return layout_of(product, [*operands, vector], whole=False)


def _rows(tensor: Tensor) -> Tensor:
    """Return the tensor as a matrix whose rows are dense, without a copy where that is possible."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _aligned(*matrices: Tensor) -> bool:
    """Return True if all rows start at multiples of 16 bytes, as a tensor descriptor requires."""
    return all(m.data_ptr() % 16 == 0 == m.stride(0) * m.element_size() % 16 for m in matrices)


@lru_cache(maxsize=64)
def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
