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
from dualop.launch import Cut, Grid, backward_grid, forward_grid, multiprocessors, power_of_two
from dualop.layout import COLUMN, DTYPES, FULL, Layout, device_of, layout
from dualop.ranges import steps

# As in the CUDA backend; a program is one warp in backward, whose sums along the columns then stay in its threads.
FORWARD = {
    torch.bfloat16: Cut(rows=2, threads=128, across=128, resident=1),
    **dict.fromkeys(
        (torch.float16, torch.float32, torch.float64), Cut(rows=4, threads=128, across=128, resident=1)
    ),
}
BACKWARD = dict.fromkeys(DTYPES, Cut(rows=2, threads=32, across=32, resident=1, least=32, most=64))
# Tiles of a program that are under way at once. The assembler would move loads into registers down to their first use.
STAGES = 3
# Fused multiply-add is what nvcc does too; a coming Triton changes the default, so it is said.
OPTIONS = {} if INTERPRET else {"enable_fp_fusion": True}


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
            cut = FORWARD[view.dtype]
            grid = forward_grid(view, *_tile(view, cut))
            arguments = (y, *_arguments(view, tensors, device))
            _launch(module.forward_kernel, arguments, view, grid, cut, device, BITS=view.bits)
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
        cut = (BACKWARD if any(v.reduced for v in view.views) else FORWARD)[view.dtype]
        grid = backward_grid(view, *_tile(view, cut), multiprocessors(device), cut)
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
        more = {"NEEDS": mask, "EARLY": _early(device), "STAGES": STAGES, "BITS": view.gradient_bits}
        _launch(module.backward_kernel, arguments, view, grid, cut, device, **more)
        for v, partial, gradient in zip(view.views, partials, gradients, strict=True):
            if partial is not None and gradient is not None:
                _sum(partial, gradient, v.sum_shape(view.rows, view.cols, grid.row_programs, grid.col_programs), device)
        return view.finished(gradients, partials, tensors)


def _tile(view: Layout, cut: Cut) -> tuple[int, int]:
    """Rows and columns: threads side by side with 16 bytes each, as far as there are columns."""
    wide = 16 // view.dtype.itemsize
    columns = min(power_of_two(view.cols), cut.across * wide)
    return cut.rows * cut.threads * wide // columns, columns


def _arguments(view: Layout, tensors: Sequence[Tensor], device: torch.device) -> list[Any]:
    arguments: list[Any] = []
    for i, (v, tensor) in enumerate(zip(view.views, tensors, strict=True)):
        arguments += (view.readable(i, tensor, device), v.div, v.mod, v.row_stride, v.outer_stride)
    return arguments


def _launch(
    kernel: Any, arguments: Sequence[Any], view: Layout, grid: Grid, cut: Cut, device: torch.device, **more: int
) -> None:
    shape = (view.rows, view.cols, view.total)
    walk = (grid.steps, grid.row_step, grid.col_step)
    with _on(device):
        kernel[grid.axes](
            *arguments,
            *shape,
            *walk,
            **more,
            MASK=_mask(view, grid),
            NARROW=view.narrow,
            BLOCK_ROWS=grid.tile_rows,
            BLOCK_COLS=grid.tile_cols,
            **_options(cut.threads, cut.resident),
        )


def _mask(view: Layout, grid: Grid) -> int:
    """0 where the programs' tiles cover the rows and columns exactly; 2 where the last row is short."""
    if view.total != view.rows * view.cols:
        return 2
    rows, cols = grid.tile_rows * grid.row_programs, grid.tile_cols * grid.col_programs
    covered = (max(rows, grid.row_step * grid.steps), max(cols, grid.col_step * grid.steps))
    return int(covered != (view.rows, view.cols))


def _sum(partial: Tensor, out: Tensor, shape: tuple[int, int, int, int], device: torch.device) -> None:
    from dualop.triton_kernels.tile import sum_kernel

    outer, kept, inner, columns = shape
    block_out = min(power_of_two(kept * columns), 32)
    block_terms = min(power_of_two(outer * inner), 1024 // block_out)
    early = _early(device)
    options = {**_options(128), "launch_pdl": True} if early else _options(128)
    sizes = {"COLUMNS": kept == inner == 1, "EARLY": early, "BLOCK_TERMS": block_terms, "BLOCK_OUT": block_out}
    with _on(device):
        sum_kernel[(-(-kept * columns // block_out),)](partial, out, outer, kept, inner, columns, **sizes, **options)


@lru_cache(maxsize=64)
def _early(device: torch.device) -> bool:
    """Whether the GPU launches the sum kernel while the backward kernel still runs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def _options(threads: int, resident: int = 1) -> dict[str, Any]:
    if INTERPRET:
        return {}
    limit = {"maxnreg": 65536 // (256 * resident)} if resident > 1 else {}
    return {"num_warps": threads // 32, **limit, **OPTIONS}


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
