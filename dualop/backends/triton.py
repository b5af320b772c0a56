"""The Triton backend: a generated file a chain around the stages of `triton_kernels/`, launched by Triton.

With DUALOP_INTERPRET=1 the same file runs in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dualop import build
from dualop.backends.mode import CPU_REASON, INTERPRET, TRITON_TOO_EARLY
from dualop.chains import Chain
from dualop.errors import BackendUnavailable
from dualop.launch import Grid, backward_grid, forward_grid, multiprocessors, power_of_two
from dualop.layout import COLUMN, FULL, Layout, device_of, layout
from dualop.ranges import steps

WARPS, UNROLL = 4, 4
PROGRAMS_PER_SM = 16
# Fused multiply-add is what nvcc does too; a coming Triton changes the default, so it is said.
OPTIONS = {} if INTERPRET else {"num_warps": WARPS, "enable_fp_fusion": True}


def source(chain: Chain, kinds: Sequence[int]) -> str:
    """The text of the chain's file for inputs of these kinds (dualop/layout.py), x first."""
    from dualop.triton_kernels.generate import generate

    return generate(str(chain).replace('"', "'"), steps(chain), kinds)


@lru_cache(maxsize=1024)
def _module(chain: Chain, kinds: tuple[int, ...]) -> ModuleType:
    """The chain's file, written to the cache under a name of its content, and imported. Triton reads it from there."""
    text = source(chain, kinds)
    name = f"triton_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder = build.cache_folder()
    path = folder / f"{name}.py"
    try:
        if not path.exists() or path.read_text() != text:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
                file.write(text)
            os.replace(file.name, path)
    except OSError as error:
        raise BackendUnavailable(
            f"cannot write to {folder} ({error}): set DUALOP_CACHE_DIR to a folder that is writable"
        ) from error
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Triton:
    """Triton kernels on a GPU, or with DUALOP_INTERPRET=1 the same kernels in Triton's interpreter."""

    name = "triton"

    @property
    def interpreted(self) -> bool:
        return INTERPRET

    def environment(self) -> list[str]:
        if not INTERPRET and not torch.cuda.is_available():
            return ["no GPU that torch can use; set DUALOP_INTERPRET=1 to run its kernels on CPU tensors", *_missing()]
        return list(_missing())

    def reasons(self, chain: Chain, device: torch.device) -> list[str]:
        if device.type == "cpu" and not INTERPRET:
            return [CPU_REASON]
        if device.type not in ("cpu", "cuda"):
            return [f"has no kernels for {device.type} tensors"]
        return _missing()

    def source(self, chain: Chain) -> str:
        return source(chain, (FULL, *[COLUMN] * len(chain.operands)))

    def forward(self, chain: Chain, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        tensors, device = (x, *operands), device_of(x, operands)
        view = layout(x, operands)
        y = view.output(device)
        if view.total:
            module = _module(chain, tuple(v.kind for v in view.views))
            grid = forward_grid(view, *_tile(view))
            _launch(module.forward_kernel, (y, *_arguments(view, tensors, device)), view, grid, device, BITS=view.bits)
        return y

    def backward(
        self, chain: Chain, gy: Tensor, x: Tensor, operands: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        tensors, device = (x, *operands), device_of(x, operands)
        view = layout(x, operands)
        if not view.total:
            return [torch.zeros_like(t) for t, need in zip(tensors, needs, strict=True) if need]
        if gy.stride() != view.strides or gy.dtype != view.dtype:
            gy = view.output(device).copy_(gy)
        module = _module(chain, tuple(v.kind for v in view.views))
        grid = backward_grid(view, *_tile(view), PROGRAMS_PER_SM * multiprocessors(device))
        partials: list[Tensor | None] = [
            view.partial(i, grid.row_programs, grid.col_programs, device) if need and v.reduced else None
            for i, (need, v) in enumerate(zip(needs, view.views, strict=True))
        ]
        gradients = [
            view.gradient(i, t, device) if need and not v.expanded else None
            for i, (t, need, v) in enumerate(zip(tensors, needs, view.views, strict=True))
        ]
        # A gradient that nobody wants is not written; gy stands in for its pointer.
        written = [next((t for t in pair if t is not None), gy) for pair in zip(partials, gradients, strict=True)]
        mask = sum(1 << i for i, need in enumerate(needs) if need)
        arguments = (gy, *written, *_arguments(view, tensors, device))
        _launch(module.backward_kernel, arguments, view, grid, device, NEEDS=mask, BITS=view.gradient_bits)
        for v, partial, gradient in zip(view.views, partials, gradients, strict=True):
            if partial is not None and gradient is not None:
                _sum(partial, gradient, v.sum_shape(view.rows, view.cols, grid.row_programs, grid.col_programs), device)
        return view.finished(gradients, partials, tensors)


def _tile(view: Layout) -> tuple[int, int]:
    """Rows and columns: a warp group's threads side by side with 16 bytes each, as far as there are columns."""
    elements = WARPS * 32 * (16 // view.dtype.itemsize)
    columns = min(power_of_two(view.cols), elements)
    return UNROLL * elements // columns, columns


def _arguments(view: Layout, tensors: Sequence[Tensor], device: torch.device) -> list[Any]:
    arguments: list[Any] = []
    for i, (v, tensor) in enumerate(zip(view.views, tensors, strict=True)):
        arguments += (view.readable(i, tensor, device), v.div, v.mod, v.row_stride, v.outer_stride)
    return arguments


def _launch(kernel: Any, arguments: Sequence[Any], view: Layout, grid: Grid, device: torch.device, **more: int) -> None:
    shape = (view.rows, view.cols, view.total, grid.col_programs, grid.program_rows, grid.program_cols)
    walk = (grid.steps, grid.row_step, grid.col_step)
    with _on(device):
        kernel[(grid.programs,)](
            *arguments,
            *shape,
            *walk,
            **more,
            FOLDED=view.total != view.rows * view.cols,
            BLOCK_ROWS=grid.tile_rows,
            BLOCK_COLS=grid.tile_cols,
            **OPTIONS,
        )


def _sum(partial: Tensor, out: Tensor, shape: tuple[int, int, int, int], device: torch.device) -> None:
    from dualop.triton_kernels.tile import sum_kernel

    outer, kept, inner, columns = shape
    block_out = min(power_of_two(kept * columns), 32)
    block_terms = min(power_of_two(outer * inner), 4096 // block_out)
    with _on(device):
        sum_kernel[(-(-kept * columns // block_out),)](
            partial, out, outer, kept, inner, columns, BLOCK_TERMS=block_terms, BLOCK_OUT=block_out, **OPTIONS
        )


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    away = device.type == "cuda" and torch.cuda.current_device() != device.index
    return torch.cuda.device(device) if away else nullcontext()


@lru_cache(maxsize=1)
def _missing() -> list[str]:
    try:
        version("triton")
    except PackageNotFoundError:
        return ["no triton: pip install triton (it is packaged for Linux)"]
    if TRITON_TOO_EARLY:
        return ["triton was imported first, without its interpreter: import dualop before it or set TRITON_INTERPRET=1"]
    return []
