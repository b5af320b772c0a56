"""Write the part of an emitted file that both kernel languages share: tensors as rows and columns, and their cuts.

The rules are the library's own text, from dualop/launch/grid.py and dualop/launch/layout.py, so a file launches what
the library would. Values that depend only on the model's shape are written as numbers.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dualop.errors import OperandError
from dualop.launch import grid
from dualop.launch import layout as layouts
from dualop.launch.layout import COLUMN, FOLD, FULL, ROW, SPLIT, WRAP, Layout, layout_of

Shape = tuple[int, ...]

_TEXT = '''
# ---- tensors as rows and columns, cut into programs ------------------------------------------------------------------

COLUMN, ROW, WRAP, SPLIT, FULL = @KINDS@


class View(NamedTuple):
    """An input at row r and column c: data[r // div % mod * row_stride + c].

    The kind is COLUMN where it varies along the columns, ROW where along the rows, WRAP where div and mod matter.
    """

    kind: int
    div: int
    mod: int
    row_stride: int
    size: int  # elements

    @property
@REDUCED@

@SUM_SHAPE@


class Layout(NamedTuple):
    """The result: `total` elements, less than rows * cols where the last row is short."""

    rows: int
    cols: int
    total: int
    dtype: torch.dtype
    views: tuple


@COPIED@


FORWARD = {
@FORWARD_CUTS@
}
BACKWARD = {
@BACKWARD_CUTS@
}
TALL = {
@TALL@
}

# Of @NAMES@.
VIEWS = (
@VIEWS@
)


@functools.lru_cache(maxsize=None)
def layout_of(shape, dtype):
    """z, contiguous, of this shape."""
    total = math.prod(shape)
@CHECKS@
    return Layout(ceil_div(total, cols), cols, total, dtype, VIEWS)
'''


@dataclass(frozen=True)
class Plan:
    """Hold what an emitted file knows of its tail's tensors.

    `view` is the library's layout of z and the operands, `trailing` what z's shape must end in, any batch in front of
    it, and `names` are the operands'.
    """

    view: Layout
    trailing: Shape
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def kinds(self) -> tuple[int, ...]:
        return tuple(v.kind for v in self.view.views)

    @property
    def folded(self) -> bool:
        """Return True if nothing runs along the columns alone, so that rows may be cut anywhere."""
        return set(self.kinds) <= {FULL, 0}


def plan(shape: Shape, operands: Mapping[str, Shape]) -> Plan:
    """Return the plan for z of this shape. Raises OperandError for operands that no single pass over z can read."""
    shapes = tuple(operands.values())
    for name, given in operands.items():
        if len(given) > len(shape) or any(n not in (1, m) for n, m in zip(given[::-1], shape[::-1], strict=False)):
            raise OperandError(f"{name} has the shape {given}, which does not broadcast with {shape}")
    of_one_batch = any(len(s) == len(shape) and s[0] > 1 for s in shapes)
    # Along a batch of one nothing would be seen to repeat, and the file is to take any batch.
    whole = shape if of_one_batch else (max(shape[0], 2), *shape[1:])
    view = layout_of(*_meta(whole, shapes))
    for (name, given), v in zip(operands.items(), view.views[1:], strict=True):
        if v.copy is not None or v.kind & SPLIT:
            raise OperandError(
                f"{name} has the shape {given} on {shape}; an emitted file takes operands that vary along neighbouring "
                "dimensions, such as a vector (N,), a channel (C, 1, 1), a row (B, 1), a number () or the full shape"
            )
    found = Plan(view, (), tuple(operands), tuple(torch.Size(s).numel() for s in shapes))
    trailing = shape if of_one_batch else () if found.folded else shape[1:]
    return Plan(view, trailing, found.names, found.sizes)


def _meta(shape: Shape, operands: Sequence[Shape]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x, *rest = (torch.empty(s, device="meta") for s in (shape, *operands))
    return x, rest


def emitted(plan: Plan, forward: Mapping[Any, Any], backward: Mapping[Any, Any], tall: Mapping[Any, Any]) -> str:
    """Return Python text: `layout_of(shape, dtype)`, FORWARD, BACKWARD, `forward_grid` and `backward_grid`.

    `forward` and `backward` are the grid.Cut of each dtype, or of its size, `tall` its grid.Tall.
    The text needs functools, math, torch and NamedTuple.
    """
    filled = {
        "@KINDS@": ", ".join(map(str, (COLUMN, ROW, WRAP, SPLIT, FULL))),
        "@REDUCED@": _method(layouts.View.reduced.fget).partition("\n")[2],  # type: ignore[attr-defined]
        "@SUM_SHAPE@": _method(layouts.View.sum_shape),
        "@COPIED@": copied(
            grid.Cut, grid.Grid, grid.ceil_div, grid.power_of_two, grid.forward_grid, grid.summed,
            grid.Tall, grid.backward_grid, grid._launchable,
        ),
        "@FORWARD_CUTS@": _table(forward),
        "@BACKWARD_CUTS@": _table(backward),
        "@TALL@": _table(tall),
        "@NAMES@": ", ".join(("z", *plan.names)),
        "@VIEWS@": "\n".join(f"    {line}," for line in _views(plan)),
        "@CHECKS@": textwrap.indent(_checks(plan), "    "),
    }  # fmt: skip
    text = _TEXT
    for mark, value in filled.items():
        text = text.replace(mark, value)
    return text


def copied(*objects: Any) -> str:
    """Return their source, readable without this library: public names, and named tuples in place of dataclasses.

    A dataclass looks for its module in sys.modules, which a file that is executed as a string has not.
    """
    text = "\n\n\n".join(inspect.getsource(one).strip("\n") for one in objects)
    text = re.sub(r"@dataclass\(frozen=True\)\nclass (\w+):", r"class \1(NamedTuple):", text)
    text = re.sub(r"\b_(launchable|tile|mask|stages)\b", r"\1", text)
    text = re.sub(r"\breplace\((\w+), ", r"\1._replace(", text)
    return re.sub(
        r"\b(MOST_PROGRAMS|TILES|TALL_THREADS|TALL_ROWS|SECTOR|WIDEST|FILLED|MOST_TILES|MOST_WHOLE)\b",
        lambda match: str(getattr(grid, match[1])),
        text,
    )


def _method(function: Any) -> str:
    return textwrap.indent(textwrap.dedent(inspect.getsource(function)).rstrip("\n"), "    ")


def _table(cuts: Mapping[Any, Any]) -> str:
    return "\n".join(f"    {dtype}: {cuts.get(dtype) or cuts[dtype.itemsize]!r}," for dtype in layouts.DTYPES)


def _views(plan: Plan) -> list[str]:
    names = ("0", "COLUMN", "ROW", "FULL")
    lines = []
    for v, size in zip(plan.view.views, (None, *plan.sizes), strict=True):
        kind = names[v.kind & FULL] + (" | WRAP" if v.kind & WRAP else "")
        # A full row's stride is the number of columns, which in a folded layout of one row does not matter.
        stride = FOLD if plan.folded and v.kind == FULL else v.row_stride
        div, mod = (v.div, v.mod) if v.kind & FULL == ROW or v.kind & WRAP else (1, 1)
        lines.append(f"View({kind}, div={div}, mod={mod}, row_stride={stride}, size={size})")
    return lines


def _checks(plan: Plan) -> str:
    lines = []
    if plan.trailing:
        lines += [
            f"if shape[-{len(plan.trailing)}:] != {plan.trailing}:",
            f'    raise ValueError(f"{{tuple(shape)}} does not end in {plan.trailing}: it needs other kernels")',
        ]
    lines.append(f"cols = min(total, {FOLD})" if plan.folded else f"cols = {plan.view.cols}")
    if plan.view.narrow:
        lines += [
            "if total + cols >= 2**31 - 2**26:",  # the same condition as in Layout.narrow
            '    raise ValueError(f"{tuple(shape)} is too large for 32-bit indexes: it needs other kernels")',
        ]
    return "\n".join(lines)
