"""Describe the partial sums that the programs of a backward leave, and that a second kernel adds up.

An input that is broadcast has a gradient that is a sum over elements of the result. Each program sums what its tiles
have of it and leaves that in memory, in float32 (or float64):

- of an input that varies along the columns, a sum for each column, or where neighbouring columns share an element, such
  as the 7 x 7 columns of a channel, for each such segment. A segment may lie in the columns of several programs: then
  it has a slot for each of them.
- of one that varies along the rows, a sum for each row and each program across.
- of a number, one sum. Of one that varies along both but not along all, every element: the terms themselves.

The second kernel adds in a fixed order, so that results are the same bit by bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dualop.launch.grid import Grid
from dualop.launch.layout import COLUMN, ROW, SHARED, Kept, Layout, SumShape, alternating


def segment(layout: Layout, index: int) -> int:
    """Return how many neighbouring columns share an element of input `index`; 0 if each has its own."""
    view, size = layout.views[index], 1
    if view.kind != COLUMN:
        return 0
    for n, kept in reversed(list(zip(layout.col_sizes, view.kept_cols, strict=True))):
        if kept:
            break
        size *= n
    return size if size > 1 else 0


def sum_shape(layout: Layout, index: int, grid: Grid) -> SumShape:
    """Return the sizes of the partial sums of input `index`; those of an expanded one are a single run."""
    view = layout.views[index]
    rows, cols = zip(layout.row_sizes, view.kept_rows, strict=True), zip(layout.col_sizes, view.kept_cols, strict=True)
    dims: list[Kept]
    if view.kind & SHARED:
        return view.shape or (1, 1, 1, layout.rows * layout.cols)
    if view.kind == COLUMN:
        dims = [(grid.row_programs, False), *cols]
        if shared := segment(layout, index):
            while not dims[-1][1]:
                dims.pop()
            dims.append((slots(shared, grid), False))
    elif view.kind == ROW:
        dims = [*rows, (grid.col_programs, False)]
    else:
        dims = [(grid.row_programs * grid.col_programs, False)]
    shape = alternating(dims)
    assert shape is not None
    return shape


def slots(segment: int, grid: Grid) -> int:
    """Return how many programs across may have a part of a segment."""
    width = grid.tile_cols
    if segment % width == 0 or width % segment == 0:
        return max(segment // width, 1)
    return min((segment - 1) // width + 2, grid.col_programs)


def partial(layout: Layout, index: int, grid: Grid) -> Tensor | None:
    """Return uninitialised memory for the partial sums of input `index`.

    Return None if there are none: nothing is summed, or one program has all of a sum and writes the gradient itself.
    """
    view, shape = layout.views[index], sum_shape(layout, index, grid)
    if not view.reduced or (shape[0] * shape[2] == 1 and not view.expanded):
        return None
    size = layout.rows * layout.cols if view.kind & SHARED else math.prod(shape)
    return torch.empty(size, dtype=layout.accumulator, device=layout.device)
