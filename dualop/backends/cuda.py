"""Define the CUDA backend: it has a chain's kernels from `cuda/` compiled by load_inline, and calls them by ctypes.

A library is compiled for a chain and a `Signature`: what the layout of a call (dualop/launch/layout.py) and the
alignment of its tensors ask of the code. Its launchers take one block of 8-byte words, those of `LaunchWords`, a
`divisor` for each dimension and for each input a `ViewWords` with its strides.
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
from dualop.launch import sums, tuning
from dualop.launch.grid import Cut, Grid, Tall, backward_grid, by_elements, forward_grid, multiprocessors, side_by_side
from dualop.launch.layout import (
    ACCESS,
    COLUMN,
    DTYPES,
    EACH,
    FULL,
    NEAR,
    ONE,
    ROW,
    SHARED,
    WIDE,
    Layout,
    divisor,
    layout_of,
)
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
    **dict.fromkeys(DTYPES, Cut(rows=2, threads=256, across=32, resident=4, least=4)),
    torch.float64: Cut(rows=2, threads=256, across=32, resident=1, least=4),
}
TALL = dict.fromkeys(DTYPES, Tall(bytes=32, tiles=2))

SPACE = tuning.Space(
    registers=((1, 4), (1, 8), (2, 4), (2, 6), (4, 2), (4, 4), (8, 1), (8, 2)),
    # The fewer side by side, the fewer partial sums. With few side by side a program may take all rows.
    summing=((128, 32), (256, 2), (256, 4), (256, 32), (256, 64)),
)

_missing_tools = lru_cache(maxsize=2)(toolchain.missing_tools)


class Placed(NamedTuple):
    """Describe how a tensor lies: its dtype, along what it varies, and how its columns are read."""

    dtype: torch.dtype
    kind: int
    access: int


class Signature(NamedTuple):
    """Hold what is compiled in of a call's layout: the result (and gy) and the inputs, and the form of the whole.

    `rows` and `cols` count the dimensions of the rows and the columns; `ragged`: the last access to the result is not
    a whole one; `narrow`: 32 bits hold every index.
    """

    result: Placed
    inputs: tuple[Placed, ...]
    rows: int = 1
    cols: int = 1
    ragged: bool = False
    narrow: bool = True


Cuts = tuple[Cut, Cut]  # of the forward and the backward kernel


def source(chain: Chain | Slope, signature: Signature, host: bool, cuts: Cuts | None = None) -> str:
    """Return the whole text that is compiled: the kernels, the chain as a type, and the exported launchers.

    The rows and the registers of `cuts`, by default the heuristic's, are compiled in; a launch passes the threads. A
    slope has a library of its own, so that a chain which nobody differentiates twice is not compiled for it.
    """
    index = "int" if signature.narrow else "long long"
    sloped = is_slope(chain)
    form, header, exported = (
        ("Slope", "second.cuh", "DUALOP_SLOPE_LIBRARY") if sloped else ("Chain", "library.cuh", "DUALOP_LIBRARY")
    )
    bent = curved(chain) if is_slope(chain) else frozenset[str]()
    stages = ",\n    ".join(_stage(step, step.function in bent) for step in steps(chain))
    tensors = ", ".join(map(_input, (signature.result, *signature.inputs)))
    form_of = f"Form<{signature.rows}, {signature.cols}, {'true' if signature.ragged else 'false'}>"
    cuts = cuts or _untuned(chain, signature.result.dtype, len(signature.inputs))
    compiled = ", ".join(f"Cut<{c.rows}, {c.resident}>" for c in cuts)
    return (
        f"namespace dualop {{ using index_t = {index}; }}\n{cuda_header(header, host)}\n"
        f"// {chain}\nnamespace dualop {{\nusing TheChain = {form}<\n    {stages}>;\n"
        f"using TheProblem = Problem<TheChain, {compiled}, {form_of},\n    {tensors}>;\n}}\n"
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


def _input(placed: Placed) -> str:
    kind = {0: "0", COLUMN: "COLUMN", ROW: "ROW", FULL: "FULL", FULL | SHARED: "FULL | SHARED"}[placed.kind]
    access = {EACH: "EACH", ONE: "ONE", WIDE: "WIDE", NEAR: "NEAR"}[placed.access]
    return f"Input<{C_TYPES[placed.dtype]}, {kind}, {access}>"


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


def _signature(layout: Layout, dtypes: Sequence[torch.dtype], aligned: Sequence[bool]) -> Signature:
    """Return the signature of a call; `aligned` says of gy or y and of each input whether its data are."""
    access = lambda view, fits: NEAR if view.access == WIDE and not fits else view.access
    inputs = zip(dtypes, layout.views, aligned[1:], strict=True)
    return Signature(
        Placed(layout.dtype, FULL, WIDE if aligned[0] else NEAR),
        tuple(Placed(dtype, view.kind, access(view, fits)) for dtype, view, fits in inputs),
        len(layout.row_sizes),
        len(layout.col_sizes),
        layout.ragged,
        layout.narrow,
    )


class ViewWords(NamedTuple):
    """Hold one input of a launch, in the order of `View` in cuda/view.cuh; its strides follow."""

    data: Word
    gradient: Word = None
    sum: Word = None
    outer: int = 0
    kept: int = 0
    inner: int = 0
    columns: int = 0
    segment: int = 0


class LaunchWords(NamedTuple):
    """Hold a launch, in the order of `Launch` in cuda/library.cuh; sizes and the inputs' views follow."""

    grid_x: int
    grid_y: int
    grid_z: int
    block_x: int
    block_y: int
    stream: int
    rows: int
    cols: int
    total: int
    steps: int
    row_step: int
    col_step: int
    y: Word
    gy: Word


@dataclass(frozen=True)
class Launch:
    """Describe a kernel's launch, except for the addresses."""

    library: ctypes.CDLL
    layout: Layout
    grid: Grid
    block: tuple[int, int]

    def forward(self, y: Tensor, inputs: Sequence[Tensor]) -> None:
        self._run(self.library.dualop_forward, y, None, [ViewWords(t) for t in inputs])

    def backward(
        self,
        gy: Tensor,
        inputs: Sequence[Tensor],
        partials: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
    ) -> None:
        views = []
        for i, (tensor, gradient, left) in enumerate(zip(inputs, gradients, partials, strict=True)):
            to, total = (gradient, None) if left is None else (left, gradient)
            shape = sums.sum_shape(self.layout, i, self.grid)
            views.append(ViewWords(tensor, to, total, *shape, sums.segment(self.layout, i)))
        self._run(self.library.dualop_backward, None, gy, views)

    def _run(self, launcher: Any, y: Word, gy: Word, views: Sequence[ViewWords]) -> None:
        layout, grid, device = self.layout, self.grid, self.layout.device
        on_gpu = device.type == "cuda"
        away = on_gpu and torch.cuda.current_device() != device.index
        with torch.cuda.device(device) if away else nullcontext():
            stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
            walk = (layout.rows, layout.cols, layout.total, grid.steps, grid.row_step, grid.col_step)
            words: list[Word] = [*LaunchWords(*grid.axes, *self.block, stream, *walk, y, gy)]
            for sizes in (layout.row_sizes, layout.col_sizes):  # by the outermost nothing is divided
                words += [sizes[0], 0, 0, *(word for size in sizes[1:] for word in divisor(size))]
            for own, view in zip(views, layout.views, strict=True):
                words += [*own, *view.row_strides, *view.col_strides]
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
    aligned: tuple[bool, ...],
    given: Cut | None = None,
) -> Launch:
    """Return the launch of one direction's kernel for inputs of these dtypes."""
    cuts = _cuts(chain, layout, () if given is None else ((direction, given),))
    backward = direction == "backward"
    cut = cuts[backward]
    x = side_by_side(cut, layout)
    y = cut.threads // x
    tile = (y * cut.rows, x * layout.width)
    if backward:
        grid = backward_grid(layout, *tile, multiprocessors(layout.device), cut)
    else:
        grid = forward_grid(layout, *tile)
    library = _library(_build(chain, _signature(layout, dtypes, aligned), layout.device, cuts))
    return Launch(library, layout, grid, (x, y))


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
        vector = Placed(torch.float32, COLUMN, WIDE)
        x = Placed(torch.float32, FULL, WIDE)
        return source(chain, Signature(x, (x, *[vector] * len(chain.operands))), host=False)

    def launch(
        self, chain: Chain | Slope, layout: Layout, needs: Needs, cut: Cut | None, tensors: Sequence[Tensor]
    ) -> Launch:
        direction = "forward" if needs is None else "backward"
        aligned = tuple(t.data_ptr() % ACCESS == 0 for t in tensors)  # as dualop/replay tells calls apart
        return _launch(chain, layout, tuple(t.dtype for t in tensors[1:]), direction, aligned, cut)

    def heuristic(self, chain: Chain | Slope, layout: Layout, direction: str) -> Cut:
        forward, backward = _untuned(chain, layout.dtype, len(layout.views))
        if direction == "forward" and by_elements(layout):
            return replace(forward, rows=4, resident=min(forward.resident, 4))
        if direction == "forward":
            return forward
        return TALL[layout.dtype].fitted(backward, layout, multiprocessors(layout.device))

    def prepare(self, calls: Iterable[Planned], progress: Progress = lambda done, total: None) -> None:
        """Build the libraries of these calls, in as many processes as there are cores.

        Raises the first build's error after all have ended.
        """
        wanted: dict[build.Build, None] = {}
        for call in calls:
            x, *operands = call.tensors
            aligned = [True] * (1 + len(call.tensors))
            for direction in call.directions:
                needs = None if direction == "forward" else call.needs or (True,) * len(call.tensors)
                layout = layout_of(x, operands, needs, device=call.device)
                signature = _signature(layout, [t.dtype for t in call.tensors], aligned)
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
