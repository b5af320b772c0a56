"""Which launches `dualop tune` tries: few enough to time all of them, with every kind of launch that has ever won."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dualop.launch.grid import Cut, ceil_div, power_of_two
from dualop.launch.layout import Layout

# (rows, resident): the more rows a thread has under way, the more registers it needs and the fewer threads fit.
REGISTERS = {
    "cuda": ((1, 4), (1, 8), (2, 4), (2, 6), (4, 2), (4, 4), (8, 1), (8, 2)),
    # To Triton 1 means no limit; registers are what its compiler chooses well by itself, mostly.
    "triton": ((1, 1), (1, 4), (2, 1), (2, 4), (4, 1), (8, 1)),
}
# float64 needs twice as many.
WIDE_REGISTERS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1))
# (threads, across) for kernels that write every element, and for those that sum gradients along the columns or rows: in
# CUDA the fewer side by side, the fewer partial sums. With few side by side a program may take all rows.
WRITING = ((64, 64), (128, 32), (128, 128), (256, 32), (256, 256))
SUMMING = {
    "cuda": ((128, 32), (256, 2), (256, 4), (256, 32), (256, 64)),
    "triton": ((32, 32), (128, 32), (256, 4), (256, 8), (256, 16), (256, 32)),
}
# (least, most) programs an SM where gradients are summed.
PROGRAMS = ((0, 0), (2, 8), (4, 16), (4, 64), (8, 32), (8, 64), (16, 64), (32, 128))


def sums(view: Layout, direction: str) -> bool:
    """Whether the kernel of this direction sums gradients."""
    return direction == "backward" and any(v.reduced for v in view.views)


def candidates(backend: str, view: Layout, direction: str, present: Cut) -> list[Cut]:
    """About 40 cuts at most, `present` first, which differ for this layout and have its number of programs."""
    registers = REGISTERS[backend] if view.dtype.itemsize < 8 else WIDE_REGISTERS
    threads = SUMMING[backend] if sums(view, direction) else WRITING
    cuts = [
        replace(present, rows=rows, resident=resident, threads=count, across=across)
        for rows, resident in registers
        for count, across in threads
    ]
    tall, found = power_of_two(view.rows), {_effective(present, view): present}
    for cut in cuts:
        effective = _effective(cut, view)
        if effective.rows * (effective.threads // effective.across) <= tall:
            found.setdefault(effective, cut)
    return list(found.values())


def near(view: Layout, direction: str, best: Cut) -> Sequence[Cut]:
    """The best so far with other numbers of programs, where that changes anything: nothing is compiled for it."""
    return [replace(best, least=least, most=most) for least, most in PROGRAMS] if sums(view, direction) else ()


def _effective(cut: Cut, view: Layout) -> Cut:
    """With no more threads side by side than there are columns for."""
    return replace(cut, across=min(cut.across, power_of_two(ceil_div(view.cols, 16 // view.dtype.itemsize))))
