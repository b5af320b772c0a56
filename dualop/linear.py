"""`chain(x @ weight.T, *operands)` in one Triton kernel, the chain in the matrix product's epilogue, for inference.

cuBLAS with a kernel behind it is the rule; this one saves writing the product and reading it again, and hides part of
the chain's arithmetic behind the tensor cores, but its product alone is slower than cuBLAS. `pays` says where it is
taken. The environment variable DUALOP_GEMM asks for it: `on` takes it wherever it can run, `auto` (the default) where
it pays, `off` never. It is Triton's: a backend that is asked for by name and is not triton rules it out. A call that is
to be differentiated always takes cuBLAS and the chain: in training one kernel gains nothing (bench/NOTES.md), since the
product has to be written for the backward all the same.
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
from dualop.backends.triton import TRITON
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
    """DUALOP_GEMM within a `with` block, for all threads: auto, on or off."""
    global mode
    before, mode = mode, to
    try:
        yield
    finally:
        mode = before


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a program's tile, bytes of its depth that are loaded at once, and how many such loads are

    under way; warps of a program, programs of an SM; in how many parts the chain runs on a tile; tiles of rows that
    share columns of the weight in the L2 cache.
    """

    rows: int = 128
    columns: int = 128
    depth_bytes: int = 128
    stages: int = 3
    warps: int = 4
    programs: int = 2
    parts: int = 2
    group: int = 8


TILE = Tile()


def pays(rows: int, out_features: int, in_features: int) -> bool:
    """Return True where the fused kernel beats cuBLAS and a kernel behind it.

    Measured on an H100, default chain, bfloat16, against the better of both backends (bench/NOTES.md): by 1.05 to 1.3
    with up to 1024 in_features; with 2048 it is a draw (0.98 and 1.04), and beyond, the product is all that counts and
    cuBLAS's is faster.
    """
    return in_features <= 1024 and rows * out_features >= 2**23


def reasons(x: Tensor, weight: Tensor, operands: Sequence[Tensor], backend: str | None = None) -> list[str]:
    """Return what keeps product and chain from running in one kernel here; empty if nothing does.

    It takes x (..., in_features), weight (out_features, in_features) and operands of one dtype: bfloat16, float16, or
    float32 where torch.set_float32_matmul_precision allows TF32. Raises BackendUnavailable where DUALOP_GEMM is none of
    auto, on, off.
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
        return ["a gradient is wanted, and the kernel is for inference: cuBLAS and the chain are as fast in training"]
    rows = x.numel() // max(x.shape[-1], 1)
    if mode == "auto" and not pays(rows, weight.shape[0], weight.shape[1]):
        return ["cuBLAS and a kernel behind it are faster at this size"]
    of_call = _of_call(x, registry.requested(backend))
    return of_call or _of_tensors(x, weight, operands) or _of_layout(x, weight, operands)


def launch(chain: Chain, x: Tensor, weight: Tensor, operands: Sequence[Tensor], tile: Tile | None = None) -> Tensor:
    """Return chain(F.linear(x, weight), *operands) from one kernel, where `reasons` is empty.

    The chain takes the product as it is accumulated, in float32.
    """
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype, device=x.device)
    kernel, grid, arguments, constants, options = prepared(chain, _rows(x), _rows(weight), y, operands, tile or TILE)
    with TRITON.on(x.device):
        kernel[grid](*arguments, **constants, **options)
    return y


def _of_call(x: Tensor, name: str) -> list[str]:
    if name != "triton" and (name != registry.AUTO or registry.interpreting()):
        return [f"the backend is {name}, and this kernel is triton's"]
    if torch.is_autocast_enabled(x.device.type):
        return ["autocast is on"]
    return TRITON.environment()


def _of_tensors(x: Tensor, weight: Tensor, operands: Sequence[Tensor]) -> list[str]:
    tensors = (x, weight, *operands)
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return [f"{x.dtype} is not for tensor cores"]
    if x.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return ["float32 products are to be exact: torch.set_float32_matmul_precision"]
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
        view = _view(shape, x.dtype, operands)
    except RuntimeError:
        return ["the operands do not broadcast"]
    if view.shape != shape or any(v.copy is not None for v in view.views):
        return ["an operand does not lie along the rows and columns of the product"]
    return []


def prepared(
    chain: Chain, x: Tensor, weight: Tensor, y: Tensor, operands: Sequence[Tensor], tile: Tile
) -> tuple[Any, tuple[int], list[Any], dict[str, Any], dict[str, Any]]:
    """Return a launch: the kernel, the grid, arguments, constants, options. x and weight are matrices."""
    (rows, depth), cols = x.shape, weight.shape[0]
    view = _view(y.shape, y.dtype, operands)
    kernel = _module(chain, tuple(v.kind for v in view.views[1:-1])).gemm_kernel
    deep = tile.depth_bytes // x.element_size()
    matrices: list[Any] = [x, weight, y.reshape(rows, cols)]
    descriptors = _aligned(*matrices) and (x.device.type != "cuda" or _hopper(x.device))
    if descriptors:
        from triton.tools.tensor_descriptor import TensorDescriptor

        blocks = ([tile.rows, deep], [tile.columns, deep], [tile.rows, tile.columns // tile.parts])
        matrices = [TensorDescriptor.from_tensor(m, block) for m, block in zip(matrices, blocks, strict=True)]
    views: list[Any] = []
    for v, tensor in zip(view.views[1:-1], operands, strict=True):
        views += (tensor, v.div, v.mod, v.row_stride, v.outer_stride)
    tiles = ceil_div(rows, tile.rows) * ceil_div(cols, tile.columns)
    constants = {
        "DESCRIPTORS": descriptors, "NARROW": view.narrow, "BITS": view.bits,
        "BLOCK_M": tile.rows, "BLOCK_N": tile.columns, "BLOCK_K": deep, "GROUP": tile.group, "PARTS": tile.parts,
    }  # fmt: skip
    options = {} if registry.interpreting() else {**TRITON.options(32 * tile.warps), "num_stages": tile.stages}
    arguments = [*matrices, *views, rows, cols, depth, x.stride(0), weight.stride(0)]
    return kernel, (min(tiles, tile.programs * multiprocessors(x.device)),), arguments, constants, options


def source(chain: Chain, kinds: Sequence[int]) -> str:
    """The text of the chain's file for operands of these kinds (dualop/launch/layout.py)."""
    from dualop.triton_kernels.gemm import generate

    return generate(str(chain).replace('"', "'"), steps(chain), kinds)


@lru_cache(maxsize=256)
def _module(chain: Chain, kinds: tuple[int, ...]) -> ModuleType:
    return imported(source(chain, kinds))


def _view(shape: torch.Size, dtype: torch.dtype, operands: Sequence[Tensor]) -> Layout:
    """The layout of the product and the operands, with a vector along its columns behind them, so that it is not cut
    into other rows than the product has."""
    product, vector = (torch.empty(s, dtype=dtype, device="meta") for s in (shape, shape[-1:]))
    return layout_of(product, [*operands, vector])


def _rows(tensor: Tensor) -> Tensor:
    """As a matrix whose rows are dense; a view where there is one."""
    matrix = tensor.reshape(-1, tensor.shape[-1])
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _aligned(*matrices: Tensor) -> bool:
    """Whether all rows start at multiples of 16 bytes, as a tensor descriptor needs them to."""
    return all(m.data_ptr() % 16 == 0 == m.stride(0) * m.element_size() % 16 for m in matrices)


@lru_cache(maxsize=64)
def _hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
