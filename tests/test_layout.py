"""The view: what a kernel would read and write through it, simulated element by element, is what torch computes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce

import pytest
import torch
from torch import Tensor

import dualop
from dualop.errors import DeviceError, DtypeError, LayoutError, OperandError, ShapeError
from dualop.launch import sums
from dualop.launch.checks import device_of, validate
from dualop.launch.grid import MOST_PROGRAMS, TILES, Cut, Grid, Tall, backward_grid, forward_grid, power_of_two
from dualop.launch.layout import COLUMN, EACH, FOLD, FULL, NEAR, ONE, ROW, SHARED, WIDE, Layout, divisor, layout_of

hypothesis = pytest.importorskip("hypothesis")
example, given, settings, st = hypothesis.example, hypothesis.given, hypothesis.settings, hypothesis.strategies

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# ---- random tensors --------------------------------------------------------------------------------------------------


def numbered(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """All elements differ, in every dtype as far as it can tell them apart."""
    n = math.prod(shape)
    return (torch.arange(n, dtype=torch.float64) - n // 2).to(dtype).reshape(tuple(shape))


def arrange(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape, lying in memory in one of the ways that torch knows."""
    how = draw(st.sampled_from(["dense", "permuted", "sliced", "stepped", "expanded", "offset", "channels_last"]))
    rank = len(shape)
    if how == "permuted" and rank > 1:
        order = draw(st.permutations(range(rank)))
        return numbered([shape[d] for d in order], dtype).permute(*[order.index(d) for d in range(rank)])
    if how in ("sliced", "stepped") and rank:
        d, step = draw(st.integers(0, rank - 1)), 2 if how == "stepped" else 1
        big = numbered([n * step + 3 if i == d else n for i, n in enumerate(shape)], dtype)
        strides = [s * (step if i == d else 1) for i, s in enumerate(big.stride())]
        return big.as_strided(shape, strides, 2 * big.stride(d))
    if how == "expanded" and rank:
        kept = [n if draw(st.booleans()) else 1 for n in shape]
        return numbered(kept, dtype).expand(shape)
    if how == "offset":
        return numbered([math.prod(shape) + 1], dtype)[1:].reshape(shape)
    if how == "channels_last" and rank == 4:
        return numbered(shape, dtype).contiguous(memory_format=torch.channels_last)
    return numbered(shape, dtype)


@st.composite
def inputs(draw: st.DrawFn, sizes: st.SearchStrategy[int] = st.integers(1, 4), most: int = 3) -> list[Tensor]:
    """x and up to `most` operands that broadcast together."""
    shape = draw(st.lists(sizes, max_size=5))
    tensors = []
    for _ in range(draw(st.integers(1, most + 1))):
        own = [n if draw(st.integers(0, 3)) else 1 for n in shape]
        own = own[draw(st.integers(0, len(own))) if draw(st.booleans()) else 0 :]
        tensors.append(arrange(draw, tuple(own), draw(st.sampled_from(DTYPES))))
    return tensors


def torchs(tensors: Sequence[Tensor]) -> Tensor:
    """What torch makes of them."""
    return reduce(torch.add, tensors[1:], tensors[0]) if len(tensors) > 1 else -tensors[0]


# ---- what a kernel does with a view ----------------------------------------------------------------------------------


def memory(tensor: Tensor) -> Tensor:
    """The tensor's storage from its first element on: what a kernel can reach from its pointer."""
    length = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return tensor.as_strided((length,), (1,))


def places(layout: Layout) -> tuple[Tensor, Tensor]:
    """Row and column of every element, in the order of the result's memory."""
    at = torch.arange(layout.total)
    return at // layout.cols, at % layout.cols


def offsets(layout: Layout, index: int, row: Tensor, column: Tensor) -> Tensor:
    """Where an input's elements lie for these rows and columns."""
    v, offset = layout.views[index], torch.zeros_like(row)
    for at, sizes, strides in ((row, layout.row_sizes, v.row_strides), (column, layout.col_sizes, v.col_strides)):
        for size, stride in reversed(list(zip(sizes[1:], strides[1:], strict=True))):
            offset, at = offset + at % size * stride, at // size
        offset = offset + at * strides[0]
    return offset


def read(layout: Layout, index: int, tensor: Tensor) -> Tensor:
    """The values of one input at every element, in the order of the result's memory, as `cuda/view.cuh` reads them."""
    v, (row, column) = layout.views[index], places(layout)
    at, wide = offsets(layout, index, row, column), layout.width
    first = torch.arange(layout.total) // wide * wide  # of the elements of an access
    if v.access in (WIDE, NEAR):
        assert torch.equal(at, at[first] + torch.arange(layout.total) - first if v.kind & COLUMN else at[first])
        assert v.access == NEAR or torch.all(at[first] % wide == 0)
    if v.access == ONE and v.kind & COLUMN:
        assert torch.equal(at, at[first])
    return memory(layout.readable(tensor))[at]


def in_memory_order(layout: Layout, values: Tensor) -> Tensor:
    """A broadcast tensor's values in the order of the result's memory."""
    like_y = torch.empty_strided(layout.shape, layout.strides, dtype=values.dtype)
    return like_y.copy_(values).as_strided((layout.total,), (1,))


def partial_sums(layout: Layout, index: int, grid: Grid, g: Tensor) -> Tensor:
    """What the programs of a backward kernel leave, each summing the tiles that it walks over."""
    v, (row, column) = layout.views[index], places(layout)
    tile_row, tile_column = row // grid.tile_rows, column // grid.tile_cols
    row_program = tile_row % grid.row_programs if grid.row_step else tile_row
    column_program = tile_column % grid.col_programs if grid.col_step else tile_column
    size = layout.rows * layout.cols if v.kind & SHARED else math.prod(sums.sum_shape(layout, index, grid))
    out = torch.full((size,), torch.nan, dtype=layout.accumulator)
    if v.kind & FULL == FULL:
        at = row * layout.cols + column
    elif segment := sums.segment(layout, index):
        which, slots = column // segment, sums.slots(segment, grid)
        slot = column_program - which * segment // grid.tile_cols
        assert torch.all(slot < slots)
        at = (row_program * (layout.cols // segment) + which) * slots + slot
    elif v.kind & COLUMN:
        at = row_program * layout.cols + column
    elif v.kind & ROW:
        at = row * grid.col_programs + column_program
    else:
        at = row_program * grid.col_programs + column_program
    touched = torch.zeros(out.numel(), dtype=torch.float64).index_add_(0, at, g)
    out.copy_(touched)
    if v.expanded:  # of a folded layout's last row only the start is written
        out[layout.total :] = torch.nan
    return out


def gradients(layout: Layout, tensors: Sequence[Tensor], grid: Grid, g: Tensor) -> list[Tensor]:
    """The gradient of every input, from the gradient `g` (float64) at every element in the order of memory."""
    written: list[Tensor | None] = []
    partials: list[Tensor | None] = []
    for i, (v, tensor) in enumerate(zip(layout.views, tensors, strict=True)):
        out = None if v.expanded else layout.gradient(i, tensor)
        partial = sums.partial(layout, i, grid)
        if out is not None and not v.reduced:
            out.as_strided((layout.total,), (1,)).copy_(g)
        elif out is not None and partial is None:
            out.as_strided((out.numel(),), (1,)).copy_(partial_sums(layout, i, grid, g))
        elif partial is not None:
            partial.copy_(partial_sums(layout, i, grid, g))
        if out is not None and partial is not None:
            shape = sums.sum_shape(layout, i, grid)
            assert math.prod(shape) <= partial.numel()
            left = partial[: math.prod(shape)].double().reshape(shape)
            out.as_strided((out.numel(),), (1,)).copy_(left.sum((0, 2)).flatten())
        written.append(out)
        partials.append(partial)
    return layout.finished(written, partials, tensors)


def is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether strides fill memory without gaps and overlaps."""
    step = 1
    for stride, size in sorted((s, n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride != step:
            return False
        step *= size
    return True


def steps(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The strides that say something: torch's kernels and its meta kernels differ for dimensions of size 1."""
    return [stride for stride, size in zip(strides, shape, strict=True) if size > 1]


def check(tensors: Sequence[Tensor], tile_rows: int = 8, tile_cols: int = 16, programs: int = 4) -> Layout:
    """Everything that a kernel relies on, for one call: forward, and backward with all gradients and with x's alone."""
    needs = [None, [True] * len(tensors), [i == 0 for i in range(len(tensors))]]
    return [check_one(tensors, need, tile_rows, tile_cols, programs) for need in needs][1]


def check_one(
    tensors: Sequence[Tensor], needs: Sequence[bool] | None, tile_rows: int, tile_cols: int, programs: int
) -> Layout:
    """The same for one of them."""
    layout, expected = layout_of(tensors[0], tensors[1:], needs), torchs(tensors)
    assert layout.shape == expected.shape
    assert layout.dtype == expected.dtype
    assert layout.total == expected.numel()
    assert len(layout.views) == len(tensors)
    if layout.total == 0:
        assert layout.output().shape == expected.shape
        return layout
    assert steps(layout.shape, layout.strides) == steps(expected.shape, expected.stride())
    assert (layout.rows - 1) * layout.cols < layout.total <= layout.rows * layout.cols
    assert layout.rows == 1 or layout.cols % layout.width == 0  # rows are whole accesses
    y = layout.output()
    assert y.shape == expected.shape and y.stride() == layout.strides and y.dtype == expected.dtype

    for i, tensor in enumerate(tensors):
        expected_values = in_memory_order(layout, tensor.expand(layout.shape))
        assert torch.equal(read(layout, i, tensor), expected_values), (layout.views[i], tensor.shape, tensor.stride())
        assert is_dense(tensor.shape, layout.views[i].gradient_strides)

    grid = backward_grid(layout, tile_rows, tile_cols, 1, walking(programs))
    g = torch.randint(-3, 4, layout.shape).double()
    for i, got in enumerate(gradients(layout, tensors, grid, in_memory_order(layout, g))):
        assert got.shape == tensors[i].shape and got.dtype == tensors[i].dtype
        wanted = g.sum_to_size(got.shape).to(got.dtype)
        assert torch.equal(got, wanted), (layout.views[i], got.shape, tensors[i].stride())
    return layout


@settings(max_examples=400)
@given(inputs())
@example([torch.randn(()), torch.randn(1)])
@example([torch.randn(1, 1, 1).transpose(0, 2), torch.randn(1)])
@example([torch.randn(3, 1).expand(3, 4), torch.randn(1, 4).expand(3, 4), torch.randn(())])
@example([torch.randn(4), torch.randn(2, 3, 4), torch.randn(3, 1)])
@example([torch.randn(10).unfold(0, 4, 1)])  # elements that share memory, without a stride of 0
@example([torch.randn(3).as_strided((3, 2), (1, 0)), torch.randn(2)])
def test_a_kernel_reads_and_writes_the_right_elements(tensors: list[Tensor]) -> None:
    check(tensors)


@settings(max_examples=60)
@given(inputs(st.sampled_from([1, 2, 3, 40, 67]), most=2))
def test_larger_sizes(tensors: list[Tensor]) -> None:
    if layout_of(tensors[0], tensors[1:]).total > 200_000:
        tensors = [t[:2] if t.dim() == 5 and t.shape[0] > 1 else t for t in tensors]
    check(tensors, 4, 8, 3)


@given(inputs(st.integers(0, 2)))
def test_empty(tensors: list[Tensor]) -> None:
    check(tensors)


@pytest.mark.parametrize("n", [1, FOLD - 1, FOLD, FOLD + 1, 2 * FOLD, 3 * FOLD + 1, 3 * FOLD - 1])
@pytest.mark.parametrize("scalar", [False, True])
def test_one_long_row_is_folded(n: int, scalar: bool) -> None:
    tensors = [numbered((n,), torch.float32), torch.ones(()) if scalar else numbered((n,), torch.float32)]
    layout = check(tensors, 2, 1024, 2)
    assert layout.cols == min(n, FOLD) and layout.rows == -(-n // FOLD)
    # A tensor of any rank that is dense is one long row as well.
    assert check([numbered((n, 1), torch.float32)]).rows == layout.rows


# ---- nothing is copied -----------------------------------------------------------------------------------------------

randn = torch.randn
READ_AS_IT_LIES = {
    "feature": [randn(6, 8), randn(8)],
    "channel": [randn(2, 3, 4, 5), randn(3, 1, 1)],
    "channel, 5-d": [randn(2, 3, 4, 5, 2), randn(3, 1, 1, 1)],
    "channels_last": [randn(2, 3, 4, 5).to(memory_format=torch.channels_last), randn(3, 1, 1)],
    "per row": [randn(6, 8), randn(6, 1)],
    "per row and per column": [randn(6, 8), randn(6, 1), randn(8)],
    "scalar": [randn(6, 8), randn(()), randn(1)],
    "full": [randn(6, 8), randn(6, 8)],
    "x broadcast": [randn(8), randn(6, 8)],
    "outer sum": [randn(6, 1), randn(1, 8)],
    "position": [randn(5, 6, 8), randn(6, 8)],
    "no middle": [randn(5, 6, 8), randn(5, 1, 8)],
    "narrowed columns": [randn(6, 20)[:, 3:11], randn(8)],
    "narrowed columns and operand": [randn(6, 20)[:, 3:11], randn(6, 9)[:, :8]],
    "narrowed rows": [randn(20, 8)[3:9], randn(8)],
    "every second row": [randn(12, 8)[::2], randn(8)],
    "narrowed middle": [randn(5, 9, 8)[:, 2:8], randn(8)],
    "transposed": [randn(8, 6).t(), randn(8)],
    "transposed, per row": [randn(8, 6).t(), randn(6, 1)],
    "narrowed and transposed": [randn(9, 6)[:8].t(), randn(6, 1)],
    "one dimension of many": [randn(2, 3, 4, 5).permute(3, 0, 2, 1)],
    "overlapping windows": [randn(10).unfold(0, 4, 1)],
    "gaps between columns": [randn(6, 16)[:, ::2], randn(16)[::2]],
    "transposed operand": [randn(8, 6), randn(6, 8).t()],
    "heads of attention": [randn(2, 6, 3, 8).transpose(1, 2), randn(1, 1, 6, 8), randn(2, 3, 6, 8)],
    "odd channels": [randn(2, 3, 7, 7), randn(3, 1, 1)],
    "odd features": [randn(5, 33), randn(33), randn(5, 1)],
    "every other dimension": [randn(2, 3, 4, 5, 6), randn(2, 1, 4, 1, 6), randn(3, 1, 5, 1)],
    "expanded": [randn(1, 8).expand(6, 8), randn(6, 1).expand(6, 8)],
}


@pytest.mark.parametrize("name", READ_AS_IT_LIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_copied(name: str, dtype: torch.dtype) -> None:
    # A case may view other memory than its own, which .to(dtype) would not keep.
    tensors = [t.detach() for t in READ_AS_IT_LIES[name]]
    if dtype != torch.float32:
        tensors = [t.bfloat16() if t.is_contiguous() else torch.empty_like(t, dtype=dtype).copy_(t) for t in tensors]
    layout = check(tensors)
    for tensor in tensors:
        assert layout.readable(tensor) is tensor


BF16, EMPTY = torch.bfloat16, partial(torch.empty, dtype=torch.bfloat16, device="meta")
ACCESSES = {
    "features": ([EMPTY(64, 1000), EMPTY(1000)], (64, 1000), [WIDE, WIDE]),
    "odd features, eight rows in one": ([EMPTY(64, 33), EMPTY(33)], (8, 264), [WIDE, EACH]),
    "odd features, a last row that is shorter": ([EMPTY(63, 33), EMPTY(33)], (8, 264), [WIDE, EACH]),
    "odd channels": ([EMPTY(16, 64, 7, 7), EMPTY(64, 1, 1)], (16, 3136), [WIDE, EACH]),
    "channels of whole accesses": ([EMPTY(16, 64, 8, 8), EMPTY(64, 1, 1)], (16, 4096), [WIDE, ONE]),
    "channels_last": (
        [EMPTY(4, 64, 7, 7).to(memory_format=torch.channels_last), EMPTY(64, 1, 1)],
        (196, 64),
        [WIDE] * 2,
    ),
    "a slice": ([EMPTY(64, 34)[:, 1:-1], EMPTY(32)], (64, 32), [NEAR, WIDE]),
    "a slice of whole accesses": ([EMPTY(64, 48)[:, 8:-8], EMPTY(32)], (64, 32), [WIDE, WIDE]),
    "every second column": ([EMPTY(64, 64)[:, ::2], EMPTY(32)], (64, 32), [EACH, WIDE]),
    "a transposed operand": ([EMPTY(64, 32), EMPTY(32, 64).t()], (64, 32), [WIDE, EACH]),
    "positions": ([EMPTY(4, 64, 3, 8).transpose(1, 2), EMPTY(64, 8)], (768, 8), [WIDE, WIDE]),
}


@pytest.mark.parametrize("name", ACCESSES)
def test_rows_are_whole_accesses(name: str) -> None:
    tensors, size, accesses = ACCESSES[name]
    layout = layout_of(tensors[0], tensors[1:])
    assert ((layout.rows, layout.cols), [v.access for v in layout.views]) == (size, accesses)


def test_sums_along_rows_where_rows_are_whole_accesses() -> None:
    """Forward a long row leaves no thread idle; backward, sums along rows are cheaper than sums of columns."""
    x, channel = EMPTY(16, 64, 8, 8), EMPTY(64, 1, 1)
    backward = layout_of(x, [channel], [True, True])
    assert (backward.rows, backward.cols, backward.views[1].kind) == (1024, 64, ROW)
    assert layout_of(x, [channel], [True, False]) == layout_of(x, [channel], [True, False])


@pytest.mark.parametrize("size", [2, 3, 7, 33, 49, 196, 3136, 2**15, 50257, 2**30, 2**31 - 1])
def test_a_divisor_divides_every_number(size: int) -> None:
    _, multiplier, shift = divisor(size)
    assert 2**31 <= multiplier < 2**32
    multiples = [n for k in (1, 2, 3, (2**31 - 1) // size) for n in (k * size - 1, k * size, k * size + 1)]
    for n in [n for n in (0, 1, size // 2, *multiples, 2**31 - 1) if n < 2**31]:
        assert (n * multiplier >> 32) >> shift == n // size


def test_the_same_call_has_the_same_layout() -> None:
    assert layout_of(randn(6, 8), [randn(8)]) is layout_of(randn(6, 8), [randn(8)])
    assert layout_of(randn(6, 8), [randn(8)]) is not layout_of(randn(6, 8), [randn(8).double()])


# ---- dtypes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", DTYPES, ids=str)
@pytest.mark.parametrize("right", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", [((2, 3), (3,)), ((2, 3), ()), ((), (3,)), ((), ()), ((1,), ())], ids=str)
def test_promotion(left: torch.dtype, right: torch.dtype, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    tensors = [torch.ones(s, dtype=d) for s, d in zip(shapes, (left, right), strict=True)]
    layout = layout_of(tensors[0], tensors[1:])
    assert layout.dtype == torchs(tensors).dtype
    assert layout.accumulator == (torch.float64 if layout.dtype == torch.float64 else torch.float32)
    assert layout.bits == {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8, torch.float64: 53}[layout.dtype]


# ---- sizes beyond 32 bits --------------------------------------------------------------------------------------------


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("tensors", "rows", "cols"),
    [
        ([meta(2**32 + 1)], 2**19 + 1, FOLD),
        ([meta(2**20, 2**13), meta(2**13)], 2**20, 2**13),
        ([meta(2**32, 3), meta(3)], 2**29, 24),
        ([meta(3, 2**32), meta(2**32)], 3, 2**32),
        ([meta(2**32, 3), meta(2**32, 1)], 2**29, 24),
        ([meta(70_000, 70_000), meta()], math.ceil(70_000**2 / FOLD), FOLD),
        ([meta(64, 512, 2**9, 2**9), meta(512, 1, 1)], 64, 2**27),
        ([meta(1), meta(2**33)], 2**20, FOLD),
    ],
    ids=lambda value: " ".join(str(tuple(t.shape)) for t in value) if isinstance(value, list) else str(value),
)
def test_more_than_2_to_the_31_elements(tensors: list[Tensor], rows: int, cols: int) -> None:
    layout = layout_of(tensors[0], tensors[1:])
    assert (layout.rows, layout.cols) == (rows, cols)
    assert layout.total == torch.broadcast_shapes(*(t.shape for t in tensors)).numel() > 2**31
    row, column = torch.tensor((layout.total - 1) // layout.cols), torch.tensor((layout.total - 1) % layout.cols)
    for i, t in enumerate(tensors):  # the last element is read for the last element of the result
        assert offsets(layout, i, row, column) == t.numel() - 1
    # A tile of the CUDA backend's; a grid's first axis ends at 2^31 - 1, the others at 65535.
    width = min(256, power_of_two(-(-layout.cols // 8)))
    tile = (1024 // width, width * 8)
    for grid in (forward_grid(layout, *tile), backward_grid(layout, *tile, 132, Cut(4, 256, 256, 1))):
        assert grid.axes[0] < 2**31 and max(grid.axes[1:]) <= MOST_PROGRAMS
        assert grid.axes[1] * grid.axes[2] == grid.row_programs and grid.axes[0] == grid.col_programs
        covered(layout, grid)
    assert not layout.narrow


# ---- how it is cut into programs -------------------------------------------------------------------------------------


def walking(programs: int) -> Cut:
    """A cut that allows this number of programs."""
    return Cut(1, 1, 1, 1, least=programs, most=programs)


def covered(layout: Layout, grid: Grid) -> None:
    """The programs' tiles cover every row and every column, and hardly a program starts beyond the end."""
    assert grid.steps >= 1 and not (grid.row_step and grid.col_step)
    for size, programs, tile, step in (
        (layout.rows, grid.row_programs, grid.tile_rows, grid.row_step),
        (layout.cols, grid.col_programs, grid.tile_cols, grid.col_step),
    ):
        assert step in (0, tile * programs)
        beyond = programs // MOST_PROGRAMS + 1  # where the grid's second axis does not suffice
        assert (programs - beyond) * tile < size <= programs * tile * (grid.steps if step else 1)


@given(
    st.sampled_from([(7, 5), (1000, 8), (3, 9000), (513, 257), (1, 1), (40_000,)]),
    st.lists(st.sampled_from(["column", "row", "scalar", "full"]), max_size=3),
    st.sampled_from([(4, 256), (64, 16), (1024, 1), (1, 2048)]),
    st.integers(1, 2000),
)
def test_grids_cover_everything(shape: tuple[int, ...], kinds: list[str], tile: tuple[int, int], programs: int) -> None:
    of = {"column": shape[-1:], "row": (*shape[:-1], 1), "scalar": (), "full": shape}
    layout = layout_of(torch.empty(shape, device="meta"), [torch.empty(of[k], device="meta") for k in kinds])
    forward, backward = forward_grid(layout, *tile), backward_grid(layout, *tile, 1, walking(programs))
    covered(layout, forward)
    covered(layout, backward)
    assert forward.steps == 1
    # A program walks only where all that it sums stays in place.
    if backward.row_step and backward.steps > 1:
        assert not any(v.reduced and v.kind & FULL == ROW for v in layout.views)
    if backward.col_step and backward.steps > 1:
        assert not any(v.reduced and v.kind & FULL == COLUMN for v in layout.views)


@pytest.mark.parametrize(
    ("shape", "dtype", "kinds", "width"),
    [
        ((128, 512), torch.bfloat16, ["column"], 64),
        ((256, 256), torch.bfloat16, ["column"], 32),  # 64 bytes would leave too few programs
        ((8, 64), torch.bfloat16, ["column"], 64),  # a single tile is always less than two launches
        ((1024, 8192), torch.float32, ["column"], 64),
        ((1024, 8192), torch.bfloat16, ["column", "full", "scalar"], 64),
        ((2048, 8192), torch.bfloat16, ["column"], 64),
        ((2049, 8192), torch.bfloat16, ["column"], 0),  # more tiles than sixteen
        ((1024, 256), torch.bfloat16, ["column"], 0),  # too few programs for as many tiles
        ((128, 512), torch.bfloat16, ["column", "row"], 0),
        ((128, 512), torch.bfloat16, ["row"], 0),
        ((128, 512), torch.bfloat16, ["scalar"], 0),
        ((128, 512), torch.bfloat16, [], 0),
    ],
    ids=str,
)
def test_tall_tiles_leave_no_partial_sums(
    shape: tuple[int, ...], dtype: torch.dtype, kinds: list[str], width: int
) -> None:
    of = {"column": shape[-1:], "row": (*shape[:-1], 1), "scalar": (), "full": shape}
    layout = layout_of(meta(*shape, dtype=dtype), [meta(*of[kind], dtype=dtype) for kind in kinds])
    cut = Cut(rows=2, threads=128, across=32, resident=1)
    found = Tall(bytes=64, tiles=16).fitted(cut, layout, 132)
    assert (found is not cut) == bool(width)
    if width:
        wide = 16 // dtype.itemsize
        tile = (found.rows * found.threads // found.across, found.across * wide)
        grid = backward_grid(layout, *tile, 132, found)
        covered(layout, grid)
        assert grid.row_programs == 1 and grid.steps <= 16 and grid.tile_cols * dtype.itemsize == width
        assert sums.partial(layout, 1, grid) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "width"),
    [
        ((4096, 8192), torch.bfloat16, 128),
        ((2048, 8192), torch.float32, 256),
        ((4097, 8192), torch.bfloat16, 0),  # more tiles than 32
        ((4096, 4096), torch.bfloat16, 64),
        ((300, 1008), torch.float32, 32),
        ((4096, 5120), torch.bfloat16, 0),  # 80 programs for 132 multiprocessors
        ((4096, 16384), torch.float32, 0),  # wider than has been tried
        ((2048, 2_000_000), torch.bfloat16, 0),  # a row for each multiprocessor is wider than a program has threads
        ((4096, 8200), torch.bfloat16, 0),  # Triton would load an element at a time
        ((65536, 256), torch.bfloat16, 0),
    ],
    ids=str,
)
def test_tall_tiles_give_each_multiprocessor_a_program(shape: tuple[int, ...], dtype: torch.dtype, width: int) -> None:
    layout = layout_of(meta(*shape, dtype=dtype), [meta(shape[-1], dtype=dtype)])
    cut, many = Cut(rows=2, threads=128, across=32, resident=1), Tall(bytes=64, tiles=1)
    assert many.fitted(cut, layout, 132) is cut
    found = replace(many, rows=4).fitted(cut, layout, 132)
    assert (found is not cut) == bool(width)
    if width:
        wide = 16 // dtype.itemsize
        grid = backward_grid(layout, found.rows * found.threads // found.across, found.across * wide, 132, found)
        covered(layout, grid)
        assert found.rows == 4 and grid.tile_cols * dtype.itemsize == width
        assert grid.row_programs == 1 and 119 <= grid.col_programs <= 132


def test_partial_sums_are_few() -> None:
    """The gradient of a feature vector must not cost memory in proportion to the data."""
    layout = layout_of(meta(16384, 8192), [meta(8192)])
    grid = backward_grid(layout, 8, 256, 132, Cut(2, 128, 32, 4))
    assert grid.steps == TILES
    assert math.prod(sums.sum_shape(layout, 1, grid)) <= layout.total // 50


def test_partial_sums_of_segments_are_fewer_than_columns() -> None:
    layout = layout_of(meta(128, 512, 14, 14), [meta(512, 1, 1)], [True, True])
    grid = backward_grid(layout, 16, 256, 132, Cut(2, 256, 32, 4, least=4))
    assert sums.segment(layout, 1) == 196
    assert sums.sum_shape(layout, 1, grid) == (grid.row_programs, 512, 2, 1)


@pytest.mark.parametrize(
    ("tensors", "narrow"),
    [
        ([meta(2**17, 2**13)], True),
        ([meta(2**18, 2**13)], False),
        ([meta(2**10, 2**10).expand(2**10, 2**10), meta(2**10)], True),
        ([meta(2**12, 2**20)[:, : 2**10]], False),  # few elements, far apart
        ([meta(2**11, 1), meta(2**11)], True),
    ],
    ids=lambda value: str([tuple(t.shape) for t in value]) if isinstance(value, list) else str(value),
)
def test_when_32_bits_hold_all_offsets(tensors: list[Tensor], narrow: bool) -> None:
    assert layout_of(tensors[0], tensors[1:]).narrow is narrow


# ---- calls that make no sense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_dtypes_that_are_refused(dtype: torch.dtype) -> None:
    wrong = torch.ones(3).to(dtype)
    with pytest.raises(DtypeError, match=f"x is {str(dtype).removeprefix('torch.')}"):
        validate(wrong, [torch.ones(3)], ["bias"])
    with pytest.raises(DtypeError, match="bias is"):
        validate(torch.ones(3), [wrong], ["bias"])


@pytest.mark.parametrize("shapes", [((4,), (3,)), ((2, 3), (2,)), ((0,), (2,)), ((2, 3), (3, 1, 2))], ids=str)
def test_shapes_that_do_not_broadcast(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, bias = map(torch.ones, shapes)
    with pytest.raises(RuntimeError):
        x + bias  # torch refuses too
    with pytest.raises(ShapeError, match="bias"):
        validate(x, [bias], ["bias"])


PACKED: dict[str, tuple[Callable[[Tensor], Tensor], type[Exception]]] = {
    "sparse_coo": (lambda x: x.to_sparse(), LayoutError),
    "sparse_csr": (lambda x: x.to_sparse_csr(), LayoutError),
    "sparse_csc": (lambda x: x.to_sparse_csc(), LayoutError),
    "sparse_bsr": (lambda x: x.to_sparse_bsr((2, 2)), LayoutError),
    "sparse_bsc": (lambda x: x.to_sparse_bsc((2, 2)), LayoutError),
    "_mkldnn": (lambda x: x.to_mkldnn(), LayoutError),
    "nested, jagged": (lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged), LayoutError),
    "nested, strided": (lambda x: torch.nested.nested_tensor([x, x[:1]]), LayoutError),
    "quint8": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8), DtypeError),
    "qint8": (lambda x: torch.quantize_per_channel(x, torch.ones(2), torch.zeros(2), 0, torch.qint8), DtypeError),
}


@pytest.mark.filterwarnings("ignore")  # torch calls some of these tensors experimental
@pytest.mark.parametrize("kind", PACKED)
def test_what_is_packed_is_refused_with_advice_that_works(kind: str) -> None:
    make, error = PACKED[kind]
    x = make(torch.ones(2, 4))
    op, plain = dualop.chain("add(bias)"), torch.ones(4)
    op(plain, plain, backend="reference")
    with pytest.raises(error, match=f"x is .*{kind.split(',')[0]}") as caught:
        op(x, plain, backend="reference")
    said = str(caught.value)
    for advice in re.findall(r"(?:torch\.\w+\.\w+\()?\bx(?:\.\w+\(\)|, 0\.0\))", said):
        advised = eval(advice, {"torch": torch, "x": x})
        for one in advised if isinstance(advised, tuple) else [advised]:
            assert torch.equal(op(one, plain, backend="reference"), one + 1), advice
    assert re.search(r"pass .*\bx", said)
    with pytest.raises(error, match=r"bias is .* pass .*\bbias"):
        op(plain, x, backend="reference")
    with pytest.raises(error, match=r"x is .* pass "):
        dualop.explain(op, x, plain)


def test_a_nested_tensor_is_refused_while_compiling() -> None:
    op = dualop.chain("relu")
    with pytest.raises(LayoutError, match="nested"):
        torch.compile(lambda x: op(x), backend="eager")(
            torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(1, 4)], layout=torch.jagged)
        )
    assert torch.compile(lambda x: op(x), fullgraph=True, backend="eager")(torch.ones(3)).sum() == 3


def test_what_is_no_tensor() -> None:
    with pytest.raises(OperandError, match="bias"):
        validate(torch.ones(3), [[1.0]], ["bias"])  # type: ignore[list-item]


def test_devices() -> None:
    x, cpu = torch.ones(3, device="meta"), torch.ones(3)
    with pytest.raises(DeviceError, match="meta"):
        device_of(x, [cpu])
    with pytest.raises(DeviceError):
        device_of(cpu, [x])
    with pytest.raises(DeviceError):
        device_of(torch.ones(()), [cpu, x])
    assert device_of(x, [torch.ones(())]).type == "meta"  # as torch: a number on the CPU goes with any device
    assert device_of(torch.ones(()), [x, torch.ones(())]).type == "meta"
    assert device_of(torch.ones(()), [cpu]).type == "cpu"
