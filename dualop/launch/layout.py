"""Describe how tensors meet a kernel: promotion, broadcasting, and one view of everything as rows and columns.

The result's dimensions, in the order of its memory, are merged as far as every tensor allows and cut in two: the outer
ones together are the **rows**, the inner ones the **columns**. A tensor's element at row r and column c is

    data[sum of row_strides[d] * (coordinate d of r) + sum of col_strides[d] * (coordinate d of c)]

where the coordinates are those of r within `row_sizes` and of c within `col_sizes`, the last one fastest. So a tensor
is read where it lies, whatever its strides; where it is broadcast, its strides are zero.

A thread takes neighbouring columns of a row with accesses of 16 bytes, so rows have to be whole numbers of them: a row
is made of as many dimensions, or as large a part of one, as that takes. Eight rows of 33 bfloat16 are one row of 33
accesses, all 7 x 7 elements of all channels (NCHW) are another. An input that cannot be read in such accesses, such as
the bias of 33, is read by elements; the result is never written so. Where the outermost dimension does not divide, the
last row is shorter: `total` bounds it. Where all tensors are merged into one long row, it is folded into rows of `FOLD`
columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dualop.build.locks import cached_property

# Varies along the columns; along the rows; varies along both, yet several elements of the result share one of its own.
COLUMN, ROW, SHARED = 1, 2, 4
FULL = COLUMN | ROW
# How a thread reads its neighbouring columns of an input: element by element; one for all of them; in one access; or,
# where they are neighbours in memory that do not begin at one, out of two.
EACH, ONE, WIDE, NEAR = 0, 1, 2, 3
FOLD = 8192
ACCESS = 16  # bytes

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Significant bits of a result: how accurate the arithmetic that is rounded to it has to be.
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}

Kept = tuple[int, bool]  # a dimension's size, and whether a gradient keeps it
# The sizes (outer, kept, inner, columns) of partial sums in memory; a gradient sums them over outer and inner.
SumShape = tuple[int, int, int, int]


@dataclass(frozen=True)
class View:
    """Describe where the elements of one input lie, and what becomes of its gradient.

    `kept_rows` and `kept_cols` say along which dimensions of the rows and of the columns the input has elements of its
    own; along the others it is broadcast. `access` says how it is read along the columns, if its data are aligned.
    `gradient_strides` are those of a dense gradient of the input's own shape. `shape` is that of the partial
    sums of a SHARED one; None where they have no such form: then the gradient is written in full and summed by torch.
    """

    kind: int
    row_strides: tuple[int, ...]
    col_strides: tuple[int, ...]
    kept_rows: tuple[bool, ...]
    kept_cols: tuple[bool, ...]
    access: int
    gradient_strides: tuple[int, ...]
    shape: SumShape | None = None

    @property
    def reduced(self) -> bool:
        """Return True if several elements of the result share an element of this input."""
        return self.kind != FULL

    @property
    def expanded(self) -> bool:
        """Return True if the gradient is written in full and summed by torch."""
        return bool(self.kind & SHARED) and self.shape is None


@dataclass(frozen=True)
class Layout:
    """Hold the result's shape, strides, dtype and device, the rows and columns, and a View of x and each operand."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    row_sizes: tuple[int, ...]
    col_sizes: tuple[int, ...]
    total: int
    views: tuple[View, ...]
    device: torch.device

    @cached_property
    def rows(self) -> int:
        return math.prod(self.row_sizes)

    @cached_property
    def cols(self) -> int:
        return math.prod(self.col_sizes)

    @property
    def width(self) -> int:
        """Return the elements of an access to the result."""
        return ACCESS // self.dtype.itemsize

    @property
    def ragged(self) -> bool:
        """Return True if the last access to the result is not a whole one."""
        return self.total % self.width > 0

    @cached_property
    def turned(self) -> bool:
        """Return True if neighbours in memory of an input lie below each other."""
        ends = [
            (v.row_strides[-1], v.col_strides[-1]) for v in self.views if v.kind & FULL == FULL and v.access == EACH
        ]
        return any(0 < down < across for down, across in ends)

    @property
    def bits(self) -> int:
        return BITS[self.dtype]

    @property
    def gradient_bits(self) -> int:
        """Return the significant bits for gradients.

        bfloat16 uses float16's functions, which share parts with their derivatives.
        """
        return max(self.bits, BITS[torch.float16])

    @cached_property
    def narrow(self) -> bool:
        """Return True if 32 bits hold every row, column and offset of a kernel, also in programs beyond the end."""
        sizes = (*self.row_sizes, *self.col_sizes)
        ends = [
            sum((n - 1) * s for n, s in zip(sizes, (*v.row_strides, *v.col_strides), strict=True)) for v in self.views
        ]
        return max(self.rows * self.cols, *ends) < 2**31 - 2**26

    @property
    def accumulator(self) -> torch.dtype:
        """Return the dtype of all arithmetic and of partial sums."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def output(self) -> Tensor:
        """Return uninitialised memory for the result."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)

    def gradient(self, index: int, like: Tensor) -> Tensor:
        """Return uninitialised memory for the gradient of input `index`."""
        return torch.empty_strided(like.shape, self.views[index].gradient_strides, dtype=like.dtype, device=self.device)

    def like(self, tensor: Tensor) -> Tensor:
        """Return uninitialised memory for a gradient: in the result's order if it has its size, else contiguous."""
        if tensor.shape == self.shape:
            return torch.empty_strided(self.shape, self.strides, dtype=tensor.dtype, device=tensor.device)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    def finished(
        self, gradients: Sequence[Tensor | None], partials: Sequence[Tensor | None], tensors: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the requested gradients for autograd, after the kernels have written gradients and partial sums."""
        done = []
        for view, gradient, partial, tensor in zip(self.views, gradients, partials, tensors, strict=True):
            if view.expanded and partial is not None:
                whole = partial[: self.total].as_strided(self.shape, self.strides)
                gradient = whole.sum_to_size(tensor.shape).to(tensor.dtype)
            if gradient is not None:
                whole_size = gradient.shape == self.shape
                done.append((gradient if whole_size else gradient.contiguous()).to(tensor.device))
        return done

    def readable(self, tensor: Tensor) -> Tensor:
        """Return the tensor as the kernel reads it: itself, or where it is a number on the CPU, a copy."""
        return tensor if tensor.device == self.device else tensor.to(self.device, non_blocking=True)


def layout_of(
    x: Tensor,
    operands: Sequence[Tensor],
    needs: Sequence[bool] | None = None,
    *,
    device: torch.device | None = None,
    whole: bool = True,
) -> Layout:
    """Return the layout of a call that passed `validate`; tensors of the same form give the same object.

    `needs` says which gradients of (x, *operands) a backward gives; None: a forward. `device` is where the call will
    run if these tensors, such as meta tensors, only show its form. Without `whole`, the columns are the innermost
    dimension, merged as far as every tensor allows, whatever its size, for both directions.
    """
    forms = tuple([(t.shape, t.stride(), t.dtype, t.device) for t in (x, *operands)])
    return _layout(forms, None if needs is None else tuple(needs), device, whole)


def divisor(size: int) -> tuple[int, int, int]:
    """Return (size, multiplier, shift) for a size from 2 on, so that n // size is n * multiplier >> 32 + shift.

    That holds for n below 2^31. The multiplier has 32 bits, of which the first is 1. Source: Granlund and Montgomery,
    "Division by Invariant Integers using Multiplication", 1994.
    """
    bits = (size - 1).bit_length()
    return size, -(-(1 << 31 + bits) // size), bits - 1


# The shape, strides, dtype and device of a tensor.
TensorForm = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


class Dim(NamedTuple):
    """Describe a dimension of the result: its size, and of each input the stride and whether it is not broadcast."""

    size: int
    strides: tuple[int, ...]
    kept: tuple[bool, ...]


Cutting = tuple[list[Dim], list[Dim]]  # the dimensions of the rows and those of the columns


@lru_cache(maxsize=4096)
def _layout(
    tensors: tuple[TensorForm, ...], needs: tuple[bool, ...] | None, device: torch.device | None, whole: bool
) -> Layout:
    # Meta tensors ask torch itself for the promoted dtype, the broadcast shape and the strides of `x + operands`.
    metas = [torch.empty_strided(shape, strides, dtype=dtype, device="meta") for shape, strides, dtype, _ in tensors]
    result = metas[0].neg() if len(metas) == 1 else metas[0]
    for meta in metas[1:]:
        result = result + meta
    shape, strides = tuple(result.shape), tuple(result.stride())
    order = [d for d in sorted(range(len(shape)), key=lambda d: -strides[d]) if shape[d] > 1]
    dims = _merged(order, shape, metas)
    wide, total = ACCESS // result.dtype.itemsize, math.prod(shape)
    rows, cols = _cut(dims, wide, needs) if whole else _folded(dims) if len(dims) == 1 else (dims[:-1], dims[-1:])
    views = []
    for i, meta in enumerate(metas):
        own = _compact(meta, len(shape), order)
        dense = tuple(s if n > 1 else 1 for s, n in zip(own, meta.shape, strict=True))
        views.append(_view(i, dims, rows, cols, wide, strides if meta.shape == shape else dense))
    if device is None:  # of what is no number on the CPU, if anything is
        device = next((d for shape, _, _, d in tensors if shape or d.type != "cpu"), tensors[0][3])
    row_sizes, col_sizes = (tuple(d.size for d in part) for part in (rows, cols))
    return Layout(shape, strides, result.dtype, row_sizes, col_sizes, total, tuple(views), device)


def _merged(order: Sequence[int], shape: Sequence[int], metas: Sequence[Tensor]) -> list[Dim]:
    """Return the result's dimensions, outermost in memory first, neighbours merged where every tensor allows it."""
    pads = [len(shape) - meta.dim() for meta in metas]
    size_of = lambda meta, d: meta.shape[d] if d >= 0 else 1
    dims: list[Dim] = []
    for d in order:
        kept = tuple(size_of(meta, d - pad) > 1 for meta, pad in zip(metas, pads, strict=True))
        strides = tuple(m.stride(d - p) if k else 0 for m, p, k in zip(metas, pads, kept, strict=True))
        fits = lambda outer, inner, n=shape[d]: outer == inner * n
        if dims and dims[-1].kept == kept and all(map(fits, dims[-1].strides, strides)):
            dims[-1] = Dim(dims[-1].size * shape[d], strides, kept)
        else:
            dims.append(Dim(shape[d], strides, kept))
    return dims or [Dim(math.prod(shape), (0,) * len(metas), (False,) * len(metas))]


def _compact(meta: Tensor, rank: int, order: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a dense copy whose dimensions lie in the order of the result's memory."""
    pad, strides, step = rank - meta.dim(), [0] * meta.dim(), 1
    for d in reversed(order):
        if d >= pad and meta.shape[d - pad] > 1:
            strides[d - pad] = step
            step *= meta.shape[d - pad]
    return tuple(strides)


def _cut(dims: list[Dim], wide: int, needs: Sequence[bool] | None) -> Cutting:
    """Return the dimensions of the rows and of the columns: rows are whole numbers of accesses of `wide` elements."""
    if len(dims) == 1:
        return _folded(dims)
    return min(_cuttings(dims, wide), key=lambda cutting: _cost(cutting, wide, needs or ()))


def _folded(dims: list[Dim]) -> Cutting:
    """Return the rows and columns of a single dimension."""
    ((size, strides, kept),) = dims
    cols = max(min(size, FOLD), 1)
    return [Dim(-(-size // cols), tuple(s * cols for s in strides), kept)], [Dim(cols, strides, kept)]


def _cuttings(dims: list[Dim], wide: int) -> Iterator[Cutting]:
    """Yield the ways to cut the dimensions in two, short rows first."""
    for first in range(len(dims) - 1, 0, -1):
        rows, cols = dims[:first], dims[first:]
        more = wide // math.gcd(math.prod(d.size for d in cols), wide)  # so many rows are whole accesses
        if more == 1:
            yield rows, cols
            continue
        size, strides, kept = rows.pop()
        if size % more and rows:  # only the last row of all may be shorter
            continue
        more = min(more, size)
        left = Dim(-(-size // more), tuple(s * more for s in strides), kept)
        yield [*rows, *([left] if left.size > 1 or not rows else [])], [Dim(more, strides, kept), *cols]


def _cost(cutting: Cutting, wide: int, needs: Sequence[bool]) -> tuple[int, int, int]:
    """Return what a cutting costs: needed gradients that are written in full before they are summed, reading, rows.

    Inputs that are read by elements cost the most, less where the rows of a thread share them. Forward, rows that end
    within a program's columns leave some of its threads idle, so a long row is better. Sums of neighbouring columns
    cost more than sums along rows.
    """
    rows, cols = cutting
    kinds = [(_kind(i, rows, cols), _access(i, rows, cols, wide)) for i in range(len(rows[0].strides))]
    in_full = sum(need and kind & SHARED > 0 for (kind, _), need in zip(kinds, needs, strict=False))
    by_elements = sum(2 - (kind == COLUMN) for kind, access in kinds if access == EACH)
    return in_full, by_elements, 0 if needs else sum(kind == ROW for kind, _ in kinds)


def _kind(index: int, rows: Sequence[Dim], cols: Sequence[Dim]) -> int:
    kept = [[d.kept[index] for d in part if d.size > 1] for part in (rows, cols)]
    kind = ROW * any(kept[0]) | COLUMN * any(kept[1])
    if all(kept[0]) and all(kept[1]):
        return FULL
    if kind == FULL:
        return FULL | SHARED
    dims = [(d.size, d.kept[index]) for d in (rows if kind == ROW else cols)]
    programs = (2, False)  # whose sums are added up
    return kind if alternating([*dims, programs] if kind == ROW else [programs, *dims]) else FULL | SHARED


def _access(index: int, rows: Sequence[Dim], cols: Sequence[Dim], wide: int) -> int:
    if not any(d.kept[index] for d in cols) or (cols[-1].strides[index] == 0 and cols[-1].size % wide == 0):
        return ONE
    step = 1
    for d in reversed(cols):
        if d.strides[index] != step:
            return EACH
        step *= d.size
    return NEAR if any(d.strides[index] % wide for d in rows if d.size > 1) else WIDE


def _view(index: int, dims: list[Dim], rows: list[Dim], cols: list[Dim], wide: int, gradient: tuple[int, ...]) -> View:
    of = lambda part: tuple(d.strides[index] for d in part)
    kept_rows, kept_cols = (tuple(d.kept[index] for d in part) for part in (rows, cols))
    kind, access = _kind(index, rows, cols), _access(index, rows, cols, wide)
    shape = alternating([(d.size, d.kept[index]) for d in dims]) if kind & SHARED else None
    return View(kind, of(rows), of(cols), kept_rows, kept_cols, access, gradient, shape)


def alternating(dims: Sequence[Kept]) -> SumShape | None:
    """Return (outer, kept, inner, columns) of these dimensions, None where they do not alternate like that."""
    runs: list[Kept] = []
    for size, kept in dims:
        if size == 1:
            continue
        if runs and runs[-1][1] == kept:
            runs[-1] = (runs[-1][0] * size, kept)
        else:
            runs.append((size, kept))
    shape, place = [1, 1, 1, 1], 0
    for i, (size, kept) in enumerate(runs):
        if kept and i == len(runs) - 1:
            place = max(place, 3)
        elif (place % 2 == 1) != kept:
            place += 1
        if place > 3:
            return None
        shape[place] = size
        place += 1
    return (shape[0], shape[1], shape[2], shape[3])
