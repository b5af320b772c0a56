"""Describe how tensors meet a kernel: promotion, broadcasting, and one view of everything as rows and columns.

The result's dimensions, in the order of its memory, are merged as far as every tensor allows. The innermost merged
dimension is the **columns**, all others together are the **rows**. At row r and column c a tensor's element is

    data[(r // div % mod) * row_stride + r // (div * mod) * outer_stride + c]        (kind says which terms there are)

A feature vector (N,) varies along the columns only, a channel (C, 1, 1) of NCHW data along the rows with div 1 and
mod C, a per-sample (B, 1) along the rows, a full-size tensor along both; channels_last data makes a channel a column.
A slice x[:, :k] of three dimensions has rows in two strides, which is what outer_stride is for. A tensor that has no
such form is copied into one that has. Where all tensors are merged into one long row, it is folded into rows of `FOLD`
columns, the last of them shorter; so `total` bounds the last row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from dualop.build.locks import cached_property

# Varies along the columns; along the rows; is repeated along the rows; has rows in two strides.
COLUMN, ROW, WRAP, SPLIT = 1, 2, 4, 8
FULL = COLUMN | ROW
FOLD = 8192

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Significant bits of a result: how accurate the arithmetic that is rounded to it has to be.
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 24, torch.float64: 53}


@dataclass(frozen=True)
class View:
    """Describe where the elements of one input lie, and what becomes of its gradient.

    `copy` is None, or the strides (of the result's rank, 0 where it is broadcast) of the dense copy that the kernel
    reads in its place. `gradient_strides` are those of a dense gradient of the input's own shape.
    """

    kind: int
    div: int
    mod: int
    row_stride: int
    outer_stride: int
    copy: tuple[int, ...] | None
    gradient_strides: tuple[int, ...]
    # The input is broadcast in a way that no view has: its gradient is written in full and summed by torch.
    expanded: bool = False

    @property
    def reduced(self) -> bool:
        """Return True if several elements of the result share an element of this input."""
        return self.kind & ~SPLIT != FULL

    def extent(self, rows: int, cols: int) -> int:
        """Return an upper bound of every offset in this input, and of the rows themselves."""
        run = self.mod if self.kind & (WRAP | SPLIT) else rows
        return max(run * self.row_stride + math.ceil(rows / max(self.mod, 1)) * self.outer_stride + cols, rows * cols)

    def sum_shape(self, rows: int, cols: int, row_programs: int, col_programs: int) -> tuple[int, int, int, int]:
        """Return (outer, kept, inner, columns), the partial sums in memory; the gradient sums over outer and inner."""
        if self.kind == 0:
            return row_programs * col_programs, 1, 1, 1
        if self.kind == COLUMN:
            return row_programs, 1, 1, cols
        if self.kind & SPLIT:
            return 1, rows, col_programs, 1
        outer = rows // (self.div * self.mod)
        if self.kind & COLUMN:
            return outer, self.mod, self.div, cols
        return outer, self.mod, self.div * col_programs, 1


@dataclass(frozen=True)
class Layout:
    """Hold the result's shape, strides, dtype and device, the rows and columns, and a View of x and each operand."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    rows: int
    cols: int
    total: int
    views: tuple[View, ...]
    device: torch.device

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
        return all(view.extent(self.rows, self.cols) < 2**31 - 2**26 for view in self.views)

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

    def partial(self, index: int, row_programs: int, col_programs: int) -> Tensor | None:
        """Return uninitialised memory for the partial sums of input `index`, one for each program or row.

        Return None if there are none: nothing is summed, or one program has all of a sum and writes the gradient
        itself.
        """
        view = self.views[index]
        shape = view.sum_shape(self.rows, self.cols, row_programs, col_programs)
        if not view.reduced or (shape[0] * shape[2] == 1 and not view.expanded):
            return None
        return torch.empty(math.prod(shape), dtype=self.accumulator, device=self.device)

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

    def readable(self, index: int, tensor: Tensor) -> Tensor:
        """Return the tensor as the kernel reads it: itself, or a copy where the view or the device requires one."""
        if tensor.device != self.device:  # a number on the CPU
            tensor = tensor.to(self.device, non_blocking=True)
        strides = self.views[index].copy
        if strides is None:
            return tensor
        shape = tuple(n if s else 1 for n, s in zip(self.shape, strides, strict=True))
        copy = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
        return copy.copy_(tensor)


def layout_of(x: Tensor, operands: Sequence[Tensor], device: torch.device | None = None) -> Layout:
    """Return the layout of a call that passed `validate`; tensors of the same form give the same object.

    `device` is where the call will run if these tensors, such as meta tensors, only show its form.
    """
    return _layout(tuple([(t.shape, t.stride(), t.dtype, t.device) for t in (x, *operands)]), device)


# The shape, strides, dtype and device of a tensor.
TensorForm = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


@lru_cache(maxsize=4096)
def _layout(tensors: tuple[TensorForm, ...], device: torch.device | None) -> Layout:
    # Meta tensors ask torch itself for the promoted dtype, the broadcast shape and the strides of `x + operands`.
    metas = [torch.empty_strided(shape, strides, dtype=dtype, device="meta") for shape, strides, dtype, _ in tensors]
    result = metas[0].neg() if len(metas) == 1 else metas[0]
    for meta in metas[1:]:
        result = result + meta
    shape, strides = tuple(result.shape), tuple(result.stride())
    order = [d for d in sorted(range(len(shape)), key=lambda d: -strides[d]) if shape[d] > 1]

    compacts = [_compact(meta, shape, order) for meta in metas]
    full = tuple(strides[d] if shape[d] > 1 else 0 for d in range(len(shape)))
    candidates = [[_own_strides(m, shape, c), c, full] for m, c in zip(metas, compacts, strict=True)]
    # Replace a tensor that has no row and column form by a dense copy, then by a copy of the result's size.
    levels = [0 if c[0] is not None else 1 for c in candidates]
    while True:
        chosen = [c[level] for c, level in zip(candidates, levels, strict=True)]
        dims = _merge(order, shape, full, chosen)  # type: ignore[arg-type]
        bad = [i for i, form in enumerate(_forms(dims, len(metas))) if form is None]
        if not bad:
            break
        for i in bad:
            levels[i] += 1
    rows, cols = math.prod(size for size, _ in dims[:-1]), dims[-1][0]
    total = math.prod(shape)
    if len(dims) == 1 and total > FOLD:  # only whole and scalar tensors
        rows, cols = math.ceil(total / FOLD), FOLD
    views = []
    for i, (meta, compact, level) in enumerate(zip(metas, compacts, levels, strict=True)):
        form = _forms(dims, len(metas))[i]
        assert form is not None
        kind, div, mod, row_stride, outer_stride = form
        if len(dims) == 1 and kind == COLUMN:
            kind, row_stride = FULL, cols
        expanded = level == 2 and compact != full
        if expanded:
            kind, div, mod, outer_stride = FULL | WRAP, 1, rows, 0
        own = compact[len(shape) - meta.dim() :]
        dense = tuple(s if n > 1 else 1 for s, n in zip(own, meta.shape, strict=True))
        dense = strides if meta.shape == shape else dense
        views.append(View(kind, div, mod, row_stride, outer_stride, (None, compact, full)[level], dense, expanded))
    if device is None:  # of what is no number on the CPU, if anything is
        device = next((d for shape, _, _, d in tensors if shape or d.type != "cpu"), tensors[0][3])
    return Layout(shape, strides, result.dtype, rows, cols, total, tuple(views), device)


def _own_strides(meta: Tensor, shape: tuple[int, ...], compact: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return its strides at the result's rank, 0 where it is broadcast; None if its own elements share memory."""
    pad = len(shape) - meta.dim()
    strides = tuple(s if n > 1 else 0 for n, s in zip(meta.shape, meta.stride(), strict=True))
    return None if any(s == 0 < n - 1 for n, s in zip(meta.shape, meta.stride(), strict=True)) else (0,) * pad + strides


def _compact(meta: Tensor, shape: tuple[int, ...], order: list[int]) -> tuple[int, ...]:
    """Return the strides of a dense copy whose dimensions lie in the order of the result's memory."""
    pad, strides, step = len(shape) - meta.dim(), [0] * len(shape), 1
    for d in reversed(order):
        if d >= pad and meta.shape[d - pad] > 1:
            strides[d] = step
            step *= meta.shape[d - pad]
    return tuple(strides)


Dims = list[tuple[int, tuple[int, ...]]]
Form = tuple[int, int, int, int, int]


def _merge(order: list[int], shape: tuple[int, ...], full: tuple[int, ...], chosen: list[tuple[int, ...]]) -> Dims:
    """Return the dimensions as (size, stride of each tensor), outermost first, neighbours merged where all allow it."""
    dims: Dims = []
    for d in order:
        strides = tuple(c[d] for c in chosen)
        if dims and all(outer == inner * shape[d] for outer, inner in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * shape[d], strides)
        else:
            dims.append((shape[d], strides))
    return dims or [(1, (0,) * len(chosen))]


def _forms(dims: Dims, count: int) -> list[Form | None]:
    """Return (kind, div, mod, row_stride, outer_stride) of each tensor, None where it has no such form."""
    rows = math.prod(size for size, _ in dims[:-1])
    forms: list[Form | None] = []
    for i in range(count):
        column = dims[-1][1][i]
        varying = [d for d, (_, strides) in enumerate(dims[:-1]) if strides[i]]
        # Runs of neighbouring dimensions that are one dimension for this tensor: [first, last].
        runs: list[list[int]] = []
        for d in varying:
            stride, step = dims[d][1][i], dims[d][0]
            if runs and runs[-1][1] == d - 1 and dims[d - 1][1][i] == stride * step:
                runs[-1][1] = d
            else:
                runs.append([d, d])
        sizes = [math.prod(dims[d][0] for d in range(first, last + 1)) for first, last in runs]
        strides = [dims[last][1][i] for _, last in runs]
        if column not in (0, 1):
            forms.append(None)
        elif not runs:
            forms.append((column, 1, 1, 0, 0))
        elif len(runs) == 1:
            div = math.prod(dims[d][0] for d in range(runs[0][1] + 1, len(dims) - 1))
            forms.append((ROW | column | (WRAP if sizes[0] < rows else 0), div, sizes[0], strides[0], 0))
        elif len(runs) == 2 and sizes[0] * sizes[1] == rows:
            forms.append((ROW | column | SPLIT, 1, sizes[1], strides[1], strides[0]))
        else:
            forms.append(None)
    return forms
