"""Decide the launch of an emitted file when it is written: the layout, and each dtype's cuts for an H100 or H200."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dualop.errors import OperandError
from dualop.launch import sums
from dualop.launch.grid import Grid
from dualop.launch.layout import COLUMN, FULL, ROW, Layout, View, layout_of

MULTIPROCESSORS = 132  # of an H100 and of an H200

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Hold what a file knows of its tensors: a layout for each dtype, all with the same views.

    `trailing` is what z's shape must end in, with any batch in front; `sizes` are the operands' numbers of elements.
    """

    layouts: Mapping[torch.dtype, Layout]
    trailing: Shape
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def layout(self) -> Layout:
        return next(iter(self.layouts.values()))

    @property
    def views(self) -> tuple[View, ...]:
        return self.layout.views

    @property
    def cols(self) -> int:
        return self.layout.cols

    @property
    def folded(self) -> bool:
        """Return True if nothing varies along rows or columns alone, so that the last row may be short."""
        return {v.kind for v in self.views} <= {FULL, 0}

    @property
    def across(self) -> bool:
        """Return True if a backward program walks along the columns, else it walks down the rows."""
        kinds = {v.kind & FULL for v in self.views if v.reduced}
        return ROW in kinds and COLUMN not in kinds

    def vector(self, dtype: torch.dtype) -> int:
        """Return the elements of an access: 16 bytes where all rows start at multiples of them, else one."""
        layout, wide = self.layouts[dtype], 16 // dtype.itemsize
        return 1 if layout.cols % wide or layout.total % wide else wide

    def offset(self, index: int, divide: str) -> str:
        """Return the code for the place of input `index` at `row` and `column`."""
        view, terms, inner = self.views[index], [], self.layout.rows
        for place, (size, stride) in enumerate(zip(self.layout.row_sizes, view.row_strides, strict=True)):
            inner //= size
            if not stride:
                continue
            at = f"row {divide} {inner}" if inner > 1 else "row"
            at = f"{at} % {size}" if place else at  # a file takes any batch
            terms.append(f"{at} * {stride}" if stride > 1 else at)
        return " + ".join([*terms, "column"] if view.kind & COLUMN else terms)

    def sum_shape(self, index: int) -> str:
        """Return the code for (outer, kept, inner, columns) of an input's partial sums, or None."""
        view, sizes = self.views[index], self.layout.row_sizes
        if not view.reduced:
            return "None"
        if view.kind == COLUMN:
            return f"(down, 1, 1, {self.cols})"
        if view.kind == 0:
            return "(down * across, 1, 1, 1)"
        # The rows are outer * kept * inner, and only the outermost dimension depends on the batch.
        at = [place for place, kept in enumerate(view.kept_rows) if kept]
        inner = math.prod(sizes[at[-1] + 1 :])
        kept = math.prod(sizes[at[0] : at[-1] + 1]) if at[0] else f"rows // {inner}"
        outer = f"rows // {math.prod(sizes[at[0] :])}" if at[0] else "1"
        if view.kind & COLUMN:
            return f"({outer}, {kept}, {inner}, {self.cols})"
        return f"({outer}, {kept}, {f'{inner} * ' if inner > 1 else ''}across, 1)"

    def sum_sizes(self, layout: Layout, grid: Grid) -> list[tuple[int, int, int, int]]:
        """Return (outer, kept, inner, columns) of all partial sums for the shape that the file is written for."""
        return [sums.sum_shape(layout, i, grid) for i, v in enumerate(layout.views) if v.reduced]


def plan(shape: Shape, operands: Mapping[str, Shape], dtypes: Sequence[torch.dtype]) -> Plan:
    """Return the plan for z of this shape. Raises OperandError for operands that no single pass over z can read."""
    shapes = tuple(operands.values())
    for name, given in operands.items():
        if len(given) > len(shape) or any(n not in (1, m) for n, m in zip(given[::-1], shape[::-1], strict=False)):
            raise OperandError(f"{name} has the shape {given}, which does not broadcast with {shape}")
    of_one_batch = any(len(s) == len(shape) and s[0] > 1 for s in shapes)
    # Along a batch of one nothing would be seen to repeat, and the file is to take any batch.
    whole = shape if of_one_batch else (max(shape[0], 2), *shape[1:])
    metas = {t: [torch.empty(s, dtype=t, device="meta") for s in (whole, *shapes)] for t in dtypes}
    of_dtypes = {t: layout_of(x, rest, whole=False) for t, (x, *rest) in metas.items()}
    found = Plan(of_dtypes, shape[1:], tuple(operands), tuple(math.prod(s) for s in shapes))
    for (name, given), v in zip(operands.items(), found.views[1:], strict=True):
        if v.expanded:
            raise OperandError(
                f"{name} has the shape {given} on {shape}; an emitted file takes operands that vary along neighbouring "
                "dimensions, such as a vector (N,), a channel (C, 1, 1), a row (B, 1), a number () or the full shape"
            )
    # Where a folded layout has accesses of 16 bytes, another batch must not break the last of them.
    cut = found.folded and any(math.prod(shape[1:]) % found.vector(t) for t in dtypes)
    return Plan(of_dtypes, shape, found.names, found.sizes) if of_one_batch or cut else found
