"""Define the Triton backend: it generates a file for each chain around the stages of `triton_kernels/`.

With DUALOP_INTERPRET=1 the same file runs in Triton's interpreter, on CPU tensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dualop.backends.base import GpuBackend, Needs, Planned, Progress
from dualop.backends.mode import INTERPRET, TRITON_TOO_EARLY
from dualop.build import locks, pool
from dualop.build.generated import imported
from dualop.language.program import curved, steps
from dualop.language.slopes import Slope, is_slope
from dualop.language.syntax import Chain
from dualop.launch import sums, tuning
from dualop.launch.grid import (
    TILES,
    Cut,
    Grid,
    Tall,
    backward_grid,
    by_elements,
    ceil_div,
    forward_grid,
    multiprocessors,
    power_of_two,
    side_by_side,
    summed,
)
from dualop.launch.layout import COLUMN, DTYPES, FULL, NEAR, ONE, ROW, WIDE, Layout, SumShape, View, divisor, layout_of
from dualop.replay.triton import launched

# As in the CUDA backend, except that the compiler chooses the registers.
FORWARD = {
    **dict.fromkeys(DTYPES, Cut(rows=1, threads=128, across=128, resident=1)),
    torch.float32: Cut(rows=2, threads=128, across=128, resident=1),
}
BACKWARD = dict.fromkeys(DTYPES, Cut(rows=4, threads=128, across=32, resident=1, least=4))
# The same in 16 bits where there are too few tiles for that: more and smaller programs.
MEDIUM = Cut(rows=2, threads=64, across=32, resident=1, least=8)
# More tiles than in CUDA, since loads are pipelined.
TALL = {
    **dict.fromkeys(DTYPES, Tall(bytes=64, tiles=8, rows=4)),
    torch.float32: Tall(bytes=128, tiles=16, rows=4),
    torch.float64: Tall(bytes=64, tiles=8),
}
# A slope has three values a stage and element on its way up: at most 8 elements a thread, or long ones spill.
SLOPE = {t: Cut(rows=1 if t.itemsize == 2 else 2, threads=128, across=128, resident=1) for t in DTYPES}
SPACE = tuning.Space(
    # 1 means no limit; registers are what the compiler chooses well by itself, mostly.
    registers=((1, 1), (1, 4), (2, 1), (2, 4), (4, 1), (8, 1)),
    summing=((32, 32), (128, 32), (256, 4), (256, 8), (256, 16), (256, 32)),
)
# Tiles of a program that are under way at once, all but one in shared memory. The assembler would move loads into
# registers down to their first use.
STAGES = 3
RESERVED = 8 << 10  # bytes of a program's shared memory, for sums of its threads
MOST_PROCESSES = 12  # that compile kernels: each has a CUDA context and one call's tensors
# Fused multiply-add is what nvcc does too; a coming Triton changes the default, so it is said.
OPTIONS = {} if INTERPRET else {"enable_fp_fusion": True}


# (kind, access) of each input, x first, and the numbers of dimensions of the rows and of the columns.
Form = tuple[tuple[tuple[int, int], ...], int, int]


def form_of(layout: Layout) -> Form:
    """Return what a chain's file depends on of a layout."""
    return tuple((v.kind, v.access) for v in layout.views), len(layout.row_sizes), len(layout.col_sizes)


def source(chain: Chain | Slope, form: Form) -> str:
    """Return the text of the chain's file for a layout of this form."""
    with locks.brief:  # the first time it imports triton
        from dualop.triton_kernels import generate, slope

    title, stages = str(chain).replace('"', "'"), steps(chain)
    if is_slope(chain):
        return slope.generate(title, stages, curved(chain), generate.Form(*form))
    return generate.generate(title, stages, generate.Form(*form))


@lru_cache(maxsize=1024)
def _module(chain: Chain | Slope, form: Form) -> ModuleType:
    """Write the chain's file to the cache under a name of its content, where Triton reads it, and import it."""
    return imported(source(chain, form))


def divisors(sizes: Sequence[int]) -> list[int]:
    """Return the words for all sizes but the outermost (`divisor` in dualop/launch/layout.py), as 32 signed bits."""
    words = [divisor(size) for size in sizes[1:]]
    return [word for size, multiplier, shift in words for word in (size, multiplier - (1 << 32), shift)]


def strides(view: View, step: int) -> list[int]:
    """Return the strides of a view that its kernel takes: of rows in accesses of `step` elements where it has them."""
    rows = view.row_strides if view.kind & ROW else ()
    if view.access == WIDE:
        return [s // step for s in rows]
    return [*rows, *(view.col_strides if view.kind & COLUMN and view.access != NEAR else ())]


def backward_cut(layout: Layout, sloped: bool, multiprocessors: int) -> Cut:
    """Return how a backward kernel, of a chain or of a slope, is cut for a GPU with so many SMs."""
    if not any(view.reduced for view in layout.views):
        cut = (SLOPE if sloped else FORWARD)[layout.dtype]
    else:
        cut = BACKWARD[layout.dtype]
        tile_rows, tile_cols = _tile(layout, cut)
        tiles = ceil_div(layout.rows, tile_rows) * ceil_div(layout.cols, tile_cols)
        few = tiles // TILES < cut.least * multiprocessors
        if layout.dtype.itemsize == 2 and summed(layout) == {COLUMN} and len(layout.col_sizes) == 1 and few:
            cut = MEDIUM
    return TALL[layout.dtype].fitted(cut, layout, multiprocessors)


class Triton(GpuBackend):
    """Launch Triton kernels on a GPU, or with DUALOP_INTERPRET=1 run the same kernels in Triton's interpreter."""

    name = "triton"
    space = SPACE
    flushed = frozenset({torch.bfloat16} if INTERPRET else ())  # Triton's interpreter makes zeros of them

    def missing(self, host: bool) -> list[str]:
        return _missing()

    def source(self, chain: Chain | Slope) -> str:
        return source(chain, (((FULL, WIDE), *[(COLUMN, WIDE)] * len(chain.operands)), 1, 1))

    def launch(
        self, chain: Chain | Slope, layout: Layout, needs: Needs, cut: Cut | None, tensors: Sequence[Tensor]
    ) -> Launch:
        return _launch(chain, layout, needs, cut)

    def heuristic(self, chain: Chain | Slope, layout: Layout, direction: str) -> Cut:
        if direction == "backward":
            return backward_cut(layout, is_slope(chain), multiprocessors(layout.device))
        cut = FORWARD[layout.dtype]
        # Several rows share what is read by elements, or where that is not aligned, hide the wait for it.
        if by_elements(layout, also=ONE):
            return replace(cut, rows=4)
        return replace(cut, rows=2) if any(view.access == NEAR for view in layout.views) else cut

    def prepare(self, calls: Iterable[Planned], progress: Progress = lambda done, total: None) -> None:
        """Launch each call once on tensors of zeros, in processes of their own; the interpreter compiles nothing.

        Triton keeps what it compiles on disk, where this process finds it. What fails there fails here again.
        """
        form = lambda t: (tuple(t.shape), t.stride(), t.dtype)
        tasks = [(replace(call, tensors=()), [form(t) for t in call.tensors]) for call in calls if _compiles(call)]
        pool.each(_launch_once, tasks, MOST_PROCESSES, progress)

    def forget(self) -> None:
        _launch.cache_clear()

    def on(self, device: torch.device) -> Any:
        """Return a context in which a kernel may be launched on this device.

        Triton launches on the current device; its interpreter computes with NumPy, which would warn of every NaN.
        """
        if INTERPRET:
            import numpy as np

            return np.errstate(all="ignore")
        away = device.type == "cuda" and torch.cuda.current_device() != device.index
        return torch.cuda.device(device) if away else nullcontext()

    def options(self, threads: int, resident: int = 1, early: bool = False) -> dict[str, Any]:
        """Return the keywords of a launch of so many threads, whose registers let `resident` * 256 threads into an SM.

        `early`: the kernel waits by itself for the one before.
        """
        if INTERPRET:
            return {}
        limit = {"maxnreg": 65536 // (256 * resident)} if resident > 1 else {}
        dependent = {"launch_pdl": True} if early else {}
        return {"num_warps": threads // 32, **limit, **dependent, **OPTIONS}


TRITON = Triton()


def _compiles(call: Planned) -> bool:
    return call.device.type == "cuda" and all(call.tensors[0].shape)


def _zeros(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return torch.zeros(1 + last, dtype=dtype, device=device).as_strided(shape, strides)


def _launch_once(call: Planned, forms: Sequence[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]) -> None:
    with contextlib.suppress(Exception):
        zeros = [_zeros(*form, call.device) for form in forms]
        (x, *operands), cuts = zeros, dict(call.cuts)
        y = layout_of(x, operands).output().zero_()
        if "forward" in call.directions:
            TRITON.forward(call.chain, x, operands, cut=cuts.get("forward"))
        if "backward" in call.directions:
            needs = call.needs or (True,) * len(zeros)
            TRITON.backward(call.chain, y, x, operands, needs, cut=cuts.get("backward"))


@dataclass(frozen=True)
class Launch:
    """Describe a kernel's launch, except for the addresses."""

    kernel: Any  # with its grid
    layout: Layout
    grid: Grid
    walks: tuple[tuple[int, ...], ...]  # the strides of each input
    numbers: dict[str, Any]

    def forward(self, y: Tensor, inputs: Sequence[Tensor]) -> None:
        self((y,), inputs)

    def backward(
        self,
        gy: Tensor,
        inputs: Sequence[Tensor],
        partials: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
    ) -> None:
        # A gradient that nobody wants is not written; gy stands in for its pointer.
        written = [next((t for t in pair if t is not None), gy) for pair in zip(partials, gradients, strict=True)]
        self((gy, *written), inputs)
        for i, (partial, gradient) in enumerate(zip(partials, gradients, strict=True)):
            if partial is not None and gradient is not None:
                _sum(partial, gradient, sums.sum_shape(self.layout, i, self.grid), self.layout.device)

    def __call__(self, pointers: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        views = [part for tensor, walk in zip(inputs, self.walks, strict=True) for part in (tensor, *walk)]
        with TRITON.on(self.layout.device):
            compiled = self.kernel(*pointers, *views, **self.numbers)
        launched(compiled, self.grid.axes, (*pointers, *views), self.numbers)


@lru_cache(maxsize=2048)
def _launch(chain: Chain | Slope, layout: Layout, needs: tuple[bool, ...] | None, given: Cut | None = None) -> Launch:
    """Return the launch of the forward kernel, or of the backward kernel with these gradients."""
    device = layout.device
    module = _module(chain, form_of(layout))
    step = 1 if layout.ragged else layout.width
    walks = tuple(tuple(strides(view, step)) for view in layout.views)
    direction = "forward" if needs is None else "backward"
    cut = TRITON.chosen(chain, layout, direction, given)
    if needs is None:
        kernel, grid = module.forward_kernel, forward_grid(layout, *_tile(layout, cut))
        own: dict[str, Any] = {"BITS": layout.bits}
    else:
        kernel, grid = module.backward_kernel, backward_grid(layout, *_tile(layout, cut), multiprocessors(device), cut)
        mask = sum(1 << i for i, need in enumerate(needs) if need)
        own = {"NEEDS": mask, "STAGES": _stages(layout, grid, _shared(device)), "BITS": layout.gradient_bits}
        own |= _segments(layout, grid)
    numbers = {
        "rows": layout.rows,
        "cols": layout.cols // step,
        "total": layout.total // step,
        "steps": grid.steps,
        "row_step": grid.row_step,
        "col_step": grid.col_step,
        **dict(zip(_names(layout), (*divisors(layout.row_sizes), *divisors(layout.col_sizes)), strict=True)),
        "MASK": _mask(layout, grid),
        "NARROW": layout.narrow,
        "EARLY": _early(device),
        "STEP": step,
        "BLOCK_ROWS": grid.tile_rows,
        "BLOCK_COLS": grid.tile_cols,
        **own,
        **TRITON.options(cut.threads, cut.resident, _early(device)),
    }
    return Launch(kernel[grid.axes], layout, grid, walks, numbers)


def _segments(layout: Layout, grid: Grid) -> dict[str, int]:
    """Return what a backward kernel takes for each sum: the columns of a segment, its slots, how many it may meet."""
    named: dict[str, int] = {}
    for i, view in enumerate(layout.views):
        if view.kind & FULL != FULL:
            own = sums.segment(layout, i)
            named |= {f"segment{i}": own, f"slots{i}": sums.slots(own, grid) if own else 1}
            named[f"SEGMENTS{i}"] = power_of_two((grid.tile_cols - 1) // own + 2) if own else 0
    return named


def _names(layout: Layout) -> list[str]:
    from dualop.triton_kernels import generate

    return generate.sizes(generate.Form(*form_of(layout)))


def _tile(layout: Layout, cut: Cut) -> tuple[int, int]:
    """Return rows and columns of a tile: threads lie side by side with 16 bytes each, as far as there are columns."""
    wide = 16 // layout.dtype.itemsize
    columns = side_by_side(cut, layout) * wide
    return cut.rows * cut.threads * wide // columns, columns


def _mask(layout: Layout, grid: Grid) -> int:
    """Return 0 if the programs' tiles cover the rows and columns exactly, 2 if the last row is short, else 1."""
    if layout.total != layout.rows * layout.cols:
        return 2
    rows, cols = grid.tile_rows * grid.row_programs, grid.tile_cols * grid.col_programs
    covered = (max(rows, grid.row_step * grid.steps), max(cols, grid.col_step * grid.steps))
    return int(covered != (layout.rows, layout.cols))


def _sum(partial: Tensor, out: Tensor, shape: SumShape, device: torch.device) -> None:
    from dualop.triton_kernels.tile import sum_kernel

    outer, kept, inner, columns = shape
    block_out = min(power_of_two(kept * columns), 32)
    most = 4096 if outer * inner > 256 else 1024  # read at once: where terms are many, their latency adds up
    block_terms = min(power_of_two(outer * inner), most // block_out)
    blocks = {"BLOCK_TERMS": block_terms, "BLOCK_OUT": block_out}
    early = _early(device)
    sizes = {"COLUMNS": kept == 1, "EARLY": early, **blocks}
    with TRITON.on(device):
        arguments, grid = (partial, out, outer, kept, inner, columns), (-(-kept * columns // block_out),)
        compiled = sum_kernel[grid](*arguments, **sizes, **TRITON.options(128, early=early))
    launched(compiled, grid, arguments, sizes)


def _stages(layout: Layout, grid: Grid, shared: int) -> int:
    """Return STAGES, or fewer if inputs of the result's size would take more than `shared` bytes of memory."""
    whole = 1 + sum(view.kind & FULL == FULL for view in layout.views)
    tile = grid.tile_rows * grid.tile_cols * layout.dtype.itemsize
    return min(STAGES, 1 + shared // (whole * tile))


@lru_cache(maxsize=64)
def _shared(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have for tiles; on the CPU, more than enough."""
    if device.type != "cuda":
        return 1 << 20
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stubs lack some of them
    return int(properties.shared_memory_per_block_optin) - RESERVED


@lru_cache(maxsize=64)
def _early(device: torch.device) -> bool:
    """Return True if the GPU launches a kernel while the one before still runs, as in cuda/device.cuh."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@lru_cache(maxsize=1)
def _missing() -> list[str]:
    try:
        version("triton")
    except PackageNotFoundError:
        return ["no triton: pip install triton (it is packaged for Linux)"]
    if TRITON_TOO_EARLY:
        return ["triton was imported first, without its interpreter: import dualop before it or set TRITON_INTERPRET=1"]
    return []
