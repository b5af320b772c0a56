"""The CUDA backend: a chain's kernels from `cuda/`, compiled by load_inline, called through ctypes.

A library is compiled for a chain, the result's dtype and the inputs' dtypes and kinds (dualop/launch/layout.py). Its
launchers take one block of 8-byte words, laid out as `Launch` in cuda/library.cuh.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from dualop.backends.base import GpuBackend, Planned, Progress
from dualop.build import build, pool
from dualop.build.sources import cuda_header
from dualop.errors import BackendUnavailable
from dualop.language.program import Step, curved, steps
from dualop.language.slopes import Slope, is_slope
from dualop.language.syntax import Chain
from dualop.launch import tuning
from dualop.launch.grid import Cut, Grid, Tall, backward_grid, forward_grid, multiprocessors, power_of_two
from dualop.launch.layout import COLUMN, DTYPES, FULL, ROW, SPLIT, WRAP, Layout, View, layout
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

STREAM = 6  # its place among a launch's words

_missing_tools = lru_cache(maxsize=2)(build.missing_tools)

# The result's dtype, the inputs' dtypes and kinds, and whether 32 bits hold every index.
Signature = tuple[torch.dtype, tuple[tuple[torch.dtype, int], ...], bool]
Cuts = tuple[Cut, Cut]  # of the forward and the backward kernel


def source(chain: Chain | Slope, signature: Signature, host: bool, cuts: Cuts | None = None) -> str:
    """The whole text that is compiled: the kernels, the chain as a type, and the exported launchers.

    Of `cuts`, by default the heuristic's, the rows and the registers are compiled in; the threads come with a launch.
    A slope has a library of its own, so that a chain which nobody differentiates twice is not compiled for it.
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
    """The double exactly: hexadecimal, or what the compiler has for infinity."""
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


def _signature(view: Layout, dtypes: Iterable[torch.dtype]) -> Signature:
    return view.dtype, tuple((t, v.kind) for t, v in zip(dtypes, view.views, strict=True)), view.narrow


@dataclass
class Plan:
    """All of a call that its tensors' addresses do not change."""

    library: ctypes.CDLL
    view: Layout
    cuts: Cuts
    wide: int
    fixed: dict[tuple[bool, bool], tuple[Grid, tuple[int, ...]]] = field(default_factory=dict)

    def grid(self, backward: bool, vector: bool, device: torch.device) -> tuple[Grid, tuple[int, ...]]:
        """The grid, and the launch's grid and block."""
        known = self.fixed.get((backward, vector))
        if known is None:
            width = self.wide if vector else 1
            cut = self.cuts[backward]
            across = cut.across if vector else max(cut.across, 32)  # tall tiles are narrow in accesses of 16 bytes only
            x = min(across, power_of_two(-(-self.view.cols // width)))
            y = cut.threads // x
            tile = (y * cut.rows, x * width)
            if backward:
                grid = backward_grid(self.view, *tile, multiprocessors(device), cut)
            else:
                grid = forward_grid(self.view, *tile)
            known = self.fixed[backward, vector] = grid, (*grid.axes, x, y)
        return known


@lru_cache(maxsize=1024)
def _plan(
    chain: Chain | Slope,
    view: Layout,
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    given: tuple[tuple[str, Cut], ...] = (),
) -> Plan:
    cuts = _cuts(chain, view, device, given)
    library = _build(chain, _signature(view, dtypes), device, cuts).load()
    for launcher in [library.dualop_backward] + ([] if is_slope(chain) else [library.dualop_forward]):
        launcher.argtypes, launcher.restype = [ctypes.c_char_p], ctypes.c_int
    library.dualop_error_text.argtypes, library.dualop_error_text.restype = [ctypes.c_int], ctypes.c_char_p
    return Plan(library, view, cuts, 16 // view.dtype.itemsize)


@dataclass(frozen=True)
class Launch:
    """One launch of a plan."""

    plan: Plan
    direction: str
    vector: bool  # accesses of 16 bytes
    device: torch.device

    @property
    def grid(self) -> Grid:
        return self.plan.grid(self.direction == "backward", self.vector, self.device)[0]

    def forward(self, y: Tensor, inputs: Sequence[Tensor]) -> None:
        _launch(self.plan, False, self.vector, self.device, y, None, _words(self.plan.view, inputs))

    def backward(
        self,
        gy: Tensor,
        inputs: Sequence[Tensor],
        partials: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
    ) -> None:
        view, grid = self.plan.view, self.grid
        words: list[Word] = []
        for v, tensor, gradient, partial in zip(view.views, inputs, gradients, partials, strict=True):
            written = partial if partial is not None else gradient
            summed = gradient if partial is not None else None
            shape = v.sum_shape(view.rows, view.cols, grid.row_programs, grid.col_programs)
            words += (tensor, *_walk(v), written, summed, *shape)
        _launch(self.plan, True, self.vector, self.device, None, gy, words)


class Cuda(GpuBackend):
    """CUDA C++ kernels on a GPU, or with DUALOP_INTERPRET=1 the same kernels on CPU tensors."""

    name = "cuda"
    space = SPACE

    def missing(self, host: bool) -> list[str]:
        return _missing_tools(host)

    def source(self, chain: Chain | Slope) -> str:
        return source(chain, (torch.float32, _plain_inputs(chain), True), host=False)

    def launch(
        self,
        chain: Chain | Slope,
        view: Layout,
        device: torch.device,
        needs: tuple[bool, ...] | None,
        cut: Cut | None,
        tensors: Sequence[Tensor],
    ) -> Launch:
        direction = "forward" if needs is None else "backward"
        given = () if cut is None else ((direction, cut),)
        plan = _plan(chain, view, tuple(t.dtype for t in tensors[1:]), device, given)
        return Launch(plan, direction, _aligned(view, plan.wide, tensors), device)

    def heuristic(self, chain: Chain | Slope, view: Layout, direction: str, device: torch.device) -> Cut:
        forward, backward = _untuned(chain, view.dtype, len(view.views))
        return TALL[view.dtype].fitted(backward, view, multiprocessors(device)) if direction == "backward" else forward

    def prepare(self, calls: Iterable[Planned], progress: Progress = lambda done, total: None) -> None:
        """Build the libraries of these calls, in as many processes as there are cores.

        Raises the first build's error after all have ended.
        """
        wanted: dict[build.Build, None] = {}
        for call in calls:
            view = layout(call.tensors[0], call.tensors[1:])
            signature = _signature(view, [t.dtype for t in call.tensors])
            cuts = _cuts(call.chain, view, call.device, call.cuts)
            wanted[_build(call.chain, signature, call.device, cuts)] = None
        missing = [(one,) for one in wanted if one.try_load() is None]
        pool.each(build.Build.build, missing, len(missing), progress)

    def forget(self) -> None:
        _plan.cache_clear()


def _cuts(chain: Chain | Slope, view: Layout, device: torch.device, given: tuple[tuple[str, Cut], ...] = ()) -> Cuts:
    """Of both kernels, which are in one library: the given ones, or those that were chosen."""
    chosen = lambda way: Cuda().chosen(chain, view, way, device, dict(given).get(way))
    return chosen("forward"), chosen("backward")


def _walk(v: View) -> tuple[int, int, int, int]:
    return v.div, v.mod, v.row_stride, v.outer_stride


def _plain_inputs(chain: Chain | Slope) -> tuple[tuple[torch.dtype, int], ...]:
    return ((torch.float32, FULL), *[(torch.float32, COLUMN)] * len(chain.operands))


def _words(view: Layout, inputs: Sequence[Tensor]) -> list[Word]:
    words: list[Word] = []
    for v, tensor in zip(view.views, inputs, strict=True):
        words += (tensor, *_walk(v), 0, 0, 0, 0, 0, 0)
    return words


def _aligned(view: Layout, wide: int, tensors: Sequence[Tensor]) -> bool:
    """Whether every access of `wide` elements is aligned: at the rows' starts, so everywhere."""
    if view.cols % wide or view.total % wide:
        return False
    for tensor in tensors:
        if tensor.data_ptr() % 16:
            return False
    return all(v.row_stride % wide == v.outer_stride % wide == 0 for v in view.views if v.kind & FULL == FULL)


def _launch(
    plan: Plan, backward: bool, vector: bool, device: torch.device, y: Word, gy: Word, inputs: Sequence[Word]
) -> None:
    view = plan.view
    grid, blocks = plan.grid(backward, vector, device)
    on_gpu = device.type == "cuda"
    guard = torch.cuda.device(device) if on_gpu and torch.cuda.current_device() != device.index else nullcontext()
    with guard:
        stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
        head = (int(vector), *blocks, stream, view.cols, view.total)
        walk = (grid.steps, grid.row_step, grid.col_step, y, gy)
        words = (*head, *walk, *inputs)
        launcher = plan.library.dualop_backward if backward else plan.library.dualop_forward
        launched(launcher, words, STREAM)
        error = launcher(struct.pack(f"={len(words)}q", *[w if type(w) is int else number(w) for w in words]))
    if error:
        text = plan.library.dualop_error_text(error).decode()
        raise BackendUnavailable(f"the CUDA kernel could not be launched on {device}: {text}")
