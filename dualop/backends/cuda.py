"""Define the CUDA backend: it has a chain's kernels from `cuda/` compiled by load_inline, and calls them by ctypes.

A library is compiled for a chain, the result's dtype and the inputs' dtypes and kinds (dualop/launch/layout.py). Its
launchers take one block of 8-byte words, those of `LaunchWords` and of a `ViewWords` for each input.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dualop.backends.base import GpuBackend, Needs, Planned, Progress
from dualop.build import build, pool, toolchain
from dualop.build.sources import cuda_header
from dualop.errors import BackendUnavailable
from dualop.language.program import Step, curved, steps
from dualop.language.slopes import Slope, is_slope
from dualop.language.syntax import Chain
from dualop.launch import tuning
from dualop.launch.grid import Cut, Grid, Tall, backward_grid, ceil_div, forward_grid, multiprocessors, power_of_two
from dualop.launch.layout import COLUMN, DTYPES, FULL, ROW, SPLIT, WRAP, Layout, View, layout_of
from dualop.replay.record import Word, launched, number

C_TYPES = {torch.float32: "float", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "double"}
# Searched for on an H100 with the default chain (bench/NOTES.md). Forward hides the wait for memory by many threads
# with few accesses each; in backward, large blocks leave few partial sums, 32 threads side by side read whole rows.
FORWARD = {
    **dict.fromkeys(DTYPES, Cut(rows=1, threads=128, across=128, resident=8)),
    torch.float32: Cut(rows=2, threads=128, across=128, resident=6),
    torch.float64: Cut(rows=1, threads=128, across=128, resident=1),
}
BACKWARD = {
    **dict.fromkeys(DTYPES, Cut(rows=2, threads=256, across=32, resident=4)),
    torch.float64: Cut(rows=2, threads=256, across=32, resident=1),
}
TALL = dict.fromkeys(DTYPES, Tall(bytes=32, tiles=2))

SPACE = tuning.Space(
    registers=((1, 4), (1, 8), (2, 4), (2, 6), (4, 2), (4, 4), (8, 1), (8, 2)),
    # The fewer side by side, the fewer partial sums. With few side by side a program may take all rows.
    summing=((128, 32), (256, 2), (256, 4), (256, 32), (256, 64)),
)

_missing_tools = lru_cache(maxsize=2)(toolchain.missing_tools)

# The result's dtype, the inputs' dtypes and kinds, and whether 32 bits hold every index.
Signature = tuple[torch.dtype, tuple[tuple[torch.dtype, int], ...], bool]
Cuts = tuple[Cut, Cut]  # of the forward and the backward kernel


def source(chain: Chain | Slope, signature: Signature, host: bool, cuts: Cuts | None = None) -> str:
    """Return the whole text that is compiled: the kernels, the chain as a type, and the exported launchers.

    The rows and the registers of `cuts`, by default the heuristic's, are compiled in; a launch passes the threads. A
    slope has a library of its own, so that a chain which nobody differentiates twice is not compiled for it.
    """
    dtype, inputs, narrow = signature
    index = "int" if narrow else "long long"
    sloped = is_slope(chain)
    form, header, exported = (
        ("Slope", "second.cuh", "DUALOP_SLOPE_LIBRARY") if sloped else ("Chain", "library.cuh", "DUALOP_LIBRARY")
    )
    bent = curved(chain) if is_slope(chain) else frozenset[str]()
    stages = ",\n    ".join(_stage(step, step.function in bent) for step in steps(chain))
    kinds = "".join(f", Input<{C_TYPES[t]}, {_kind(kind)}>" for t, kind in inputs)
    compiled = ", ".join(f"Cut<{c.rows}, {c.resident}>" for c in cuts or _untuned(chain, dtype, len(inputs)))
    return (
        f"namespace dualop {{ using index_t = {index}; }}\n{cuda_header(header, host)}\n"
        f"// {chain}\nnamespace dualop {{\nusing TheChain = {form}<\n    {stages}>;\n"
        f"using TheProblem = Problem<TheChain, {compiled}, {C_TYPES[dtype]}{kinds}>;\n}}\n"
        f"{exported}(dualop::TheProblem)\n"
    )


def _stage(step: Step, bent: bool) -> str:
    function = f"stage::{step.function}"
    if step.operand is not None:
        taken = f"Operand<{step.operand}>" if isinstance(step.operand, int) else f"Number<{_number(step.operand)}>"
        return f"With<{function}, {taken}>"
    parameters = f"<{', '.join(map(_number, step.numbers))}>" if step.numbers else ""
    if bent:
        return f"Curved<{function}{parameters}>"
    return f"Only<{function}{parameters}>"


def _number(value: float) -> str:
    """Return the double as exact C++ text: hexadecimal, or what the compiler has for infinity."""
    if value in (float("inf"), float("-inf")):
        return f"number({'-' if value < 0 else ''}__builtin_huge_val())"
    return f"number({value.hex()})"


def _kind(kind: int) -> str:
    names = ("FULL",) if kind & FULL == FULL else tuple(n for n, b in (("COLUMN", COLUMN), ("ROW", ROW)) if kind & b)
    more = tuple(n for n, b in (("WRAP", WRAP), ("SPLIT", SPLIT)) if kind & b)
    return " | ".join((*names, *more)) or "0"


def _untuned(chain: Chain | Slope, dtype: torch.dtype, inputs: int) -> Cuts:
    forward, backward = FORWARD[dtype], BACKWARD[dtype]
    # Long chains, many inputs and slopes need more registers than `resident` leaves: they would spill.
    if len(steps(chain)) + inputs < 8 and not is_slope(chain):
        return forward, backward
    return replace(forward, resident=1), replace(backward, resident=1)


def _build(chain: Chain | Slope, signature: Signature, device: torch.device, cuts: Cuts) -> build.Build:
    host = device.type == "cpu"
    arch = None if host else torch.cuda.get_device_capability(device)
    return build.Build("host" if host else "cuda", source(chain, signature, host, cuts), host, arch)


def _signature(layout: Layout, dtypes: Iterable[torch.dtype]) -> Signature:
    return layout.dtype, tuple((t, view.kind) for t, view in zip(dtypes, layout.views, strict=True)), layout.narrow


class ViewWords(NamedTuple):
    """Hold one input of a launch, in the order of `View` in cuda/view.cuh."""

    data: Word
    div: int
    mod: int
    row_stride: int
    outer_stride: int
    gradient: Word = None
    sum: Word = None
    outer: int = 0
    kept: int = 0
    inner: int = 0
    columns: int = 0


class LaunchWords(NamedTuple):
    """Hold a launch, in the order of `Launch` in cuda/library.cuh; the words of each input's view follow."""

    vector: int
    grid_x: int
    grid_y: int
    grid_z: int
    block_x: int
    block_y: int
    stream: int
    cols: int
    total: int
    steps: int
    row_step: int
    col_step: int
    y: Word
    gy: Word


@dataclass(frozen=True)
class Launch:
    """Describe a kernel's launch, except for the addresses. `vector`: accesses are of 16 bytes, not of one element."""

    library: ctypes.CDLL
    layout: Layout
    grid: Grid
    block: tuple[int, int]
    vector: bool

    def forward(self, y: Tensor, inputs: Sequence[Tensor]) -> None:
        views = [ViewWords(t, *_walk(view)) for view, t in zip(self.layout.views, inputs, strict=True)]
        self._run(self.library.dualop_forward, y, None, views)

    def backward(
        self,
        gy: Tensor,
        inputs: Sequence[Tensor],
        partials: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
    ) -> None:
        sizes = self.layout.rows, self.layout.cols, self.grid.row_programs, self.grid.col_programs
        views = []
        for view, tensor, gradient, partial in zip(self.layout.views, inputs, gradients, partials, strict=True):
            to, total = (gradient, None) if partial is None else (partial, gradient)
            views.append(ViewWords(tensor, *_walk(view), to, total, *view.sum_shape(*sizes)))
        self._run(self.library.dualop_backward, None, gy, views)

    def _run(self, launcher: Any, y: Word, gy: Word, views: Sequence[ViewWords]) -> None:
        layout, grid, device = self.layout, self.grid, self.layout.device
        on_gpu = device.type == "cuda"
        away = on_gpu and torch.cuda.current_device() != device.index
        with torch.cuda.device(device) if away else nullcontext():
            stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
            walk = (layout.cols, layout.total, grid.steps, grid.row_step, grid.col_step)
            head = LaunchWords(self.vector, *grid.axes, *self.block, stream, *walk, y, gy)
            words = [*head, *(word for view in views for word in view)]
            launched(launcher, words, LaunchWords._fields.index("stream"))
            error = launcher(struct.pack(f"={len(words)}q", *map(number, words)))
        if error:
            text = self.library.dualop_error_text(error).decode()
            raise BackendUnavailable(f"the CUDA kernel could not be launched on {device}: {text}")


@lru_cache(maxsize=2048)
def _launch(
    chain: Chain | Slope,
    layout: Layout,
    dtypes: tuple[torch.dtype, ...],
    direction: str,
    vector: bool,
    given: Cut | None = None,
) -> Launch:
    """Return the launch of one direction's kernel for inputs of these dtypes."""
    cuts = _cuts(chain, layout, () if given is None else ((direction, given),))
    backward = direction == "backward"
    width = 16 // layout.dtype.itemsize if vector else 1
    cut = cuts[backward]
    across = cut.across if vector else max(cut.across, 32)  # tall tiles are narrow in accesses of 16 bytes only
    x = min(across, power_of_two(ceil_div(layout.cols, width)))
    y = cut.threads // x
    tile = (y * cut.rows, x * width)
    if backward:
        grid = backward_grid(layout, *tile, multiprocessors(layout.device), cut)
    else:
        grid = forward_grid(layout, *tile)
    return Launch(
        _library(_build(chain, _signature(layout, dtypes), layout.device, cuts)), layout, grid, (x, y), vector
    )


@lru_cache(maxsize=1024)
def _library(made: build.Build) -> ctypes.CDLL:
    """Return the loaded library, compiled if needed, with the types of its functions."""
    library = made.load()
    for name in ("dualop_forward", "dualop_backward"):  # that of a slope has no forward
        if hasattr(library, name):
            getattr(library, name).argtypes, getattr(library, name).restype = [ctypes.c_char_p], ctypes.c_int
    library.dualop_error_text.argtypes, library.dualop_error_text.restype = [ctypes.c_int], ctypes.c_char_p
    return library


class Cuda(GpuBackend):
    """Launch CUDA C++ kernels on a GPU, or with DUALOP_INTERPRET=1 run the same kernels on CPU tensors."""

    name = "cuda"
    space = SPACE

    def missing(self, host: bool) -> list[str]:
        return _missing_tools(host)

    def source(self, chain: Chain | Slope) -> str:
        return source(chain, (torch.float32, _plain_inputs(chain), True), host=False)

    def launch(
        self, chain: Chain | Slope, layout: Layout, needs: Needs, cut: Cut | None, tensors: Sequence[Tensor]
    ) -> Launch:
        direction = "forward" if needs is None else "backward"
        return _launch(chain, layout, tuple(t.dtype for t in tensors[1:]), direction, _aligned(layout, tensors), cut)

    def heuristic(self, chain: Chain | Slope, layout: Layout, direction: str) -> Cut:
        forward, backward = _untuned(chain, layout.dtype, len(layout.views))
        if direction == "forward":
            return forward
        return TALL[layout.dtype].fitted(backward, layout, multiprocessors(layout.device))

    def prepare(self, calls: Iterable[Planned], progress: Progress = lambda done, total: None) -> None:
        """Build the libraries of these calls, in as many processes as there are cores.

        Raises the first build's error after all have ended.
        """
        wanted: dict[build.Build, None] = {}
        for call in calls:
            layout = layout_of(call.tensors[0], call.tensors[1:], call.device)
            signature = _signature(layout, [t.dtype for t in call.tensors])
            cuts = _cuts(call.chain, layout, call.cuts)
            wanted[_build(call.chain, signature, call.device, cuts)] = None
        missing = [(one,) for one in wanted if one.try_load() is None]
        pool.each(build.Build.build, missing, len(missing), progress)

    def forget(self) -> None:
        _launch.cache_clear()
        _cuts.cache_clear()


@lru_cache(maxsize=2048)
def _cuts(chain: Chain | Slope, layout: Layout, given: tuple[tuple[str, Cut], ...] = ()) -> Cuts:
    """Return the cuts of both kernels, which are in one library: the given ones, or those that were chosen."""
    chosen = lambda way: Cuda().chosen(chain, layout, way, dict(given).get(way))
    return chosen("forward"), chosen("backward")


def _walk(view: View) -> tuple[int, int, int, int]:
    return view.div, view.mod, view.row_stride, view.outer_stride


def _plain_inputs(chain: Chain | Slope) -> tuple[tuple[torch.dtype, int], ...]:
    return ((torch.float32, FULL), *[(torch.float32, COLUMN)] * len(chain.operands))


def _aligned(layout: Layout, tensors: Sequence[Tensor]) -> bool:
    """Return True if all rows of all tensors start at multiples of 16 bytes: then every access may be that wide."""
    wide = 16 // layout.dtype.itemsize
    if layout.cols % wide or layout.total % wide:
        return False
    for tensor in tensors:
        if tensor.data_ptr() % 16:
            return False
    whole = [view for view in layout.views if view.kind & FULL == FULL]
    return all(view.row_stride % wide == view.outer_stride % wide == 0 for view in whole)
