"""Cut a layout into programs: the same rule for both kernel languages, in tiles of rows and columns.

The heuristic, which knows the dtype, the shape and the number of multiprocessors (SMs):

1. Each backend has a Cut for each dtype and direction (FORWARD and BACKWARD in `dualop/backends/`), from a search on
   large tensors. Where registers would not suffice, in long chains, `resident` is 1.
2. `Tall.fitted`: where gradients are summed along the columns, a program takes all rows if there are few, or if it can
   have a multiprocessor to itself.
3. `across` threads lie side by side as far as there are columns; the remaining threads lie along the rows.
4. `forward_grid` has a program for each tile, `backward_grid` as many programs as suit the sums of gradients.

A result of `dualop tune` for a chain, dtype and shape (dualop/launch/tuning.py) replaces 1 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from dualop.launch.layout import COLUMN, EACH, FULL, ROW, SHARED, WIDE, Layout


@dataclass(frozen=True)
class Cut:
    """Describe how a kernel's work is cut, in either language.

    `threads` of a program lie `across` side by side along the columns, as far as there are columns, the others along
    the rows; a thread takes `rows` accesses of 16 bytes at once. Registers are limited so that `resident` * 256 threads
    fit into an SM (1: no limit). Where gradients are summed, `least` to `most` programs an SM are launched (both 0: as
    few as possible, each with all that it can sum).
    """

    rows: int
    threads: int
    across: int
    resident: int
    least: int = 8
    most: int = 64


TILES = 8  # tiles per program in backward
TALL_THREADS, TALL_ROWS = 256, 2
SECTOR, WIDEST = 32, 256  # bytes: the unit of memory reads, and the largest width of a tall tile
# Where each multiprocessor has at most one program: the share that must have one, the tiles of a program, and how many
# inputs of the result's size fit into shared memory.
FILLED, MOST_TILES, MOST_WHOLE = 0.9, 32, 2
TURNED = 4  # threads side by side, whose accesses are 64 bytes, as memory is read
MOST_PROGRAMS = 65535  # the limit of a grid's second and third axis


@dataclass(frozen=True)
class Grid:
    """Describe a grid of `row_programs` x `col_programs` programs, each of which computes `steps` tiles.

    A tile has `tile_rows` x `tile_cols` elements. Successive tiles of a program lie `row_step` rows and `col_step`
    columns apart, one of which is zero. The tiles of the other programs lie in between, so that all programs together
    move through memory as one. Programs beyond the last row have nothing to do.
    """

    tile_rows: int
    tile_cols: int
    row_programs: int
    col_programs: int
    steps: int = 1
    row_step: int = 0
    col_step: int = 0

    @property
    def axes(self) -> tuple[int, int, int]:
        """Return the grid as it is launched: columns, then rows along two axes."""
        third = ceil_div(self.row_programs, MOST_PROGRAMS)
        return self.col_programs, self.row_programs // third, third


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Return the SMs of a GPU; on the CPU a small number, so that interpreted kernels cut their loops as on a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def by_elements(layout: Layout, also: int = EACH) -> bool:
    """Return True if an input is read by elements that the rows of a thread share, so that several rows pay."""
    return any(view.kind == COLUMN and view.access in (EACH, also) for view in layout.views)


def side_by_side(cut: Cut, layout: Layout) -> int:
    """Return how many threads of a program lie side by side: few where an input's neighbours lie below each other."""
    most = TURNED if layout.turned else cut.across
    return min(most, cut.across, power_of_two(ceil_div(layout.cols, layout.width)))


def forward_grid(layout: Layout, tile_rows: int, tile_cols: int) -> Grid:
    """Return the grid of a forward kernel, with one tile per program."""
    return Grid(tile_rows, tile_cols, _launchable(ceil_div(layout.rows, tile_rows)), ceil_div(layout.cols, tile_cols))


def summed(layout: Layout) -> set[int]:
    """Return along what gradients are summed: COLUMN for one sum per column, ROW, or 0 for a single number."""
    return {v.kind for v in layout.views if v.reduced and not v.kind & SHARED}


@dataclass(frozen=True)
class Tall:
    """Describe tall and narrow tiles for a backward where a program can take all rows of its columns.

    Then no partial sums are left to add up, and there is one launch instead of two. `bytes` and `tiles` apply to few
    rows; `rows`, the accesses that a thread takes at once, to programs that fill the multiprocessors (0: never).
    """

    bytes: int
    tiles: int
    rows: int = 0

    def fitted(self, cut: Cut, layout: Layout, multiprocessors: int) -> Cut:
        """Return `cut`, or its tall form where that is faster."""
        kinds = summed(layout)
        if COLUMN not in kinds or ROW in kinds or len(layout.col_sizes) > 1:
            return cut
        # Few threads wait for loads, which are not pipelined where they are not whole accesses.
        if any(v.kind & FULL == FULL and v.access != WIDE for v in layout.views):
            return cut
        rows, width = TALL_ROWS, self._of_few_rows(layout, multiprocessors)
        if not width:
            rows, width = self.rows, self._of_one_each(layout, multiprocessors)
        return replace(cut, rows=rows, threads=TALL_THREADS, across=width // 16, least=0, most=0) if width else cut

    def _of_few_rows(self, layout: Layout, multiprocessors: int) -> int:
        """Return the bytes of a tile's row, or 0 if a program would have too many tiles.

        A program has at most `tiles` tiles, and fewer tiles when there are fewer programs to keep all multiprocessors
        busy. A row has `bytes`, or half of that where this is needed for enough programs, but at least what memory is
        read by.
        """
        if self._tiles(layout, self.bytes, TALL_ROWS) > self.tiles:
            return 0
        for width in (self.bytes, self.bytes // 2):
            tiles, programs = self._tiles(layout, width, TALL_ROWS), self._programs(layout, width)
            if width >= SECTOR and (tiles == 1 or tiles * multiprocessors <= 16 * programs):
                return width
        return 0

    def _of_one_each(self, layout: Layout, multiprocessors: int) -> int:
        """Return the bytes of a tile's row where nearly every multiprocessor has one program, else 0.

        Loads are pipelined then. With many tiles a program, the saving at the end is smaller than what so few threads
        an SM cost most chains.
        """
        width = max(SECTOR, power_of_two(self._programs(layout, multiprocessors)))
        if not self.rows or width > WIDEST or self._tiles(layout, width, self.rows) > MOST_TILES:
            return 0
        # Triton recognises that accesses are aligned where rows are multiples of 16 elements.
        pipelined = layout.cols % 16 == 0 and sum(v.kind & FULL == FULL for v in layout.views) <= MOST_WHOLE
        return width if pipelined and self._programs(layout, width) >= FILLED * multiprocessors else 0

    def _tiles(self, layout: Layout, width: int, rows: int) -> int:
        """Return the number of tiles of a program whose tiles have rows of `width` bytes."""
        return ceil_div(layout.rows, rows * TALL_THREADS // (width // 16))

    def _programs(self, layout: Layout, width: int) -> int:
        """Return the number of programs that take `width` bytes of a row each."""
        return ceil_div(layout.cols * layout.dtype.itemsize, width)


def backward_grid(layout: Layout, tile_rows: int, tile_cols: int, multiprocessors: int, cut: Cut) -> Grid:
    """Return the grid of a backward kernel, with few programs where gradients are summed.

    Few programs leave few partial sums to add up: each sums TILES tiles. There are fewer tiles a program where not
    enough programs for all multiprocessors would be left, and more where there would be too many programs. Sums along
    rows are kept while a program walks along the columns, sums along columns while it walks down the rows; where both
    are needed, a program computes a single tile.
    """
    rows, cols = ceil_div(layout.rows, tile_rows), ceil_div(layout.cols, tile_cols)
    kinds = summed(layout)
    if not kinds or {ROW, COLUMN} <= kinds:
        return Grid(tile_rows, tile_cols, _launchable(rows), cols)
    least, most = (n * multiprocessors for n in (cut.least, cut.most))
    programs = min(max(rows * cols // TILES, least), most)
    if ROW in kinds:
        steps = ceil_div(cols, max(1, min(cols, ceil_div(programs, rows))))
        across = ceil_div(cols, steps)
        return Grid(tile_rows, tile_cols, _launchable(rows), across, steps, 0, across * tile_cols)
    steps = ceil_div(rows, max(1, min(rows, programs // cols)))
    down = _launchable(ceil_div(rows, steps))
    return Grid(tile_rows, tile_cols, down, cols, steps, down * tile_rows, 0)


def _launchable(programs: int) -> int:
    """Return this number or a slightly larger one, so that the programs fill two axes of a grid."""
    third = ceil_div(programs, MOST_PROGRAMS)
    return ceil_div(programs, third) * third
