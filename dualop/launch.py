"""How a layout is cut into programs: the same rule for both kernel languages, in tiles of rows and columns."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from dualop.layout import COLUMN, FULL, ROW, Layout


@dataclass(frozen=True)
class Grid:
    """`row_programs` x `col_programs` programs, each making `steps` tiles.

    A tile has `tile_rows` x `tile_cols` elements. Successive tiles of a program lie `row_step` rows and `col_step`
    columns apart; one of the two is zero.
    """

    tile_rows: int
    tile_cols: int
    row_programs: int
    col_programs: int
    steps: int = 1
    row_step: int = 0
    col_step: int = 0

    @property
    def program_rows(self) -> int:
        """Rows that a program covers with all its tiles."""
        return self.row_step * self.steps or self.tile_rows

    @property
    def program_cols(self) -> int:
        return self.col_step * self.steps or self.tile_cols

    @property
    def programs(self) -> int:
        return self.row_programs * self.col_programs


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; on the CPU a small number, so that interpreted kernels cut their loops as on a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def forward_grid(layout: Layout, tile_rows: int, tile_cols: int) -> Grid:
    """One tile a program."""
    return Grid(tile_rows, tile_cols, ceil_div(layout.rows, tile_rows), ceil_div(layout.cols, tile_cols))


def backward_grid(layout: Layout, tile_rows: int, tile_cols: int, programs: int) -> Grid:
    """About `programs` programs where gradients are summed, so that few partial sums are left to add up.

    Sums along rows are kept while a program walks along the columns, sums along columns while it walks down the rows;
    where both are wanted it makes a single tile.
    """
    rows, cols = ceil_div(layout.rows, tile_rows), ceil_div(layout.cols, tile_cols)
    kinds = {v.kind & FULL for v in layout.views if v.reduced and (v.kind & FULL) != FULL}
    if not kinds or {ROW, COLUMN} <= kinds:
        return Grid(tile_rows, tile_cols, rows, cols)
    if ROW in kinds:
        steps = ceil_div(cols, max(1, min(cols, ceil_div(programs, rows))))
        return Grid(tile_rows, tile_cols, rows, ceil_div(cols, steps), steps, 0, tile_cols)
    steps = ceil_div(rows, max(1, min(rows, ceil_div(programs, cols))))
    return Grid(tile_rows, tile_cols, ceil_div(rows, steps), cols, steps, tile_rows, 0)
