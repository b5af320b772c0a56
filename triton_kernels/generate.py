"""Write a chain's Triton file: the chain as straight-line functions, and a forward and a backward kernel around them.

Triton has no variadic templates; a tuple of functions as a constexpr, the other way, launches at twice the host cost
and its stages have no line of their own in a profile.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

# A stage as the generator needs it: the function's name, the numbers compiled into it, and for an operand stage what it
# takes: the number of an input (0 is x), or a float.
Step = tuple[str, Sequence[float], int | float | None]

# Along what an input varies (2 bits) and how its columns are read, as in dualop/launch/layout.py.
COLUMN, ROW, FULL, WIDE, NEAR = 1, 2, 3, 2, 3


class Form(NamedTuple):
    """Describe how the inputs of a kernel lie: (kind, access) of each, and the dimensions of its rows and columns."""

    views: tuple[tuple[int, int], ...]
    rows: int = 1
    cols: int = 1


_HEAD = '''"""{title}: written by dualop, do not edit."""

import triton
import triton.language as tl

from {package} import stages
from {package}.platform import count, let_next_kernel_begin, number, wait_for_kernel_before
from {package}.tile import add, inside, place, programs, read, split, write, write_sum, zeros
'''


def generate(title: str, steps: Sequence[Step], form: Form) -> str:
    """Return the file of a chain of `steps` on inputs of this form, x first."""
    count = len(form.views)
    return file(title, chain_forward(steps, count), chain_backward(steps, count), *kernels(form))


def file(title: str, *functions: str) -> str:
    """Return a file of these functions."""
    return "\n\n\n".join((_HEAD.format(title=title, package=__name__.rpartition(".")[0]).strip(), *functions)) + "\n"


def function(name: str, parameters: str, *body: str) -> str:
    """Return the text of a Triton function."""
    return "\n".join(["@triton.jit", f"def {name}({parameters}):", *(f"    {line}" for line in body)])


def call(step: Step, suffix: str, z: str, *more: str) -> str:
    """Return a call of the stage's function with this suffix, at z, its operand and `more`."""
    name, numbers, operand = step
    values = [z, *more]
    if operand is not None:
        values.insert(1, f"in{operand}" if isinstance(operand, int) else f"number({z}, {_literal(operand)})")
    return f"stages.{name}{suffix}({', '.join((*values, *map(_literal, numbers), 'BITS'))})"


def inner(step: Step, i: int) -> str:
    """Return the line of a backward that makes z behind stage i, by a cheaper function where there is one."""
    return f"z{i + 1} = {call(step, '_inner' if step[0] in _inners() else '', f'z{i}')}"


def gradient(step: Step, i: int, result: str, gy: str) -> str:
    """Return the line that makes `result`, the gradient of z in front of stage i, of `gy`, the one behind it."""
    made = result if step[2] is None else f"{result}, d{i}"
    return f"{made} = {call(step, '_backward', f'z{i}', gy)}"


def _literal(value: float) -> str:
    return f'float("{value}")' if math.isinf(value) else repr(value)


@lru_cache(maxsize=1)
def _inners() -> frozenset[str]:
    """Return the stages that have an inner function."""
    files = (Path(__file__).parent / "stages").glob("*.py")
    return frozenset(
        name for file in files for name in re.findall(r"^def (\w+)_inner\(", file.read_text("utf-8"), re.M)
    )


def chain_forward(steps: Sequence[Step], inputs: int) -> str:
    """Return the function that makes the chain's value of its inputs."""
    return function(
        "chain_forward",
        f"{_given(inputs)}, BITS: tl.constexpr",
        "z0 = in0",
        *(f"z{i + 1} = {call(step, '', f'z{i}')}" for i, step in enumerate(steps)),
        f"return z{len(steps)}",
    )


def chain_backward(steps: Sequence[Step], inputs: int) -> str:
    """Return the function that makes the gradient of each input of the inputs and gy."""
    parts: list[list[str]] = [["g0"], *([] for _ in range(inputs - 1))]
    for i, (_, _, operand) in enumerate(steps):
        if isinstance(operand, int):
            parts[operand].append(f"d{i}")
    return function(
        "chain_backward",
        f"{_given(inputs)}, gy, BITS: tl.constexpr",
        "z0 = in0",
        *(inner(step, i) for i, step in enumerate(steps[:-1])),
        f"g{len(steps)} = gy",
        *reversed([gradient(step, i, f"g{i}", f"g{i + 1}") for i, step in enumerate(steps)]),
        f"return {', '.join(' + '.join(part) for part in parts)}",
    )


def _given(inputs: int) -> str:
    return ", ".join(f"in{i}" for i in range(inputs))


def sizes(form: Form) -> list[str]:
    """Return the parameters that divide rows and columns into coordinates: three a dimension, but for the outermost."""
    dims = [f"row{d}" for d in range(1, form.rows)] + [f"col{d}" for d in range(1, form.cols)]
    return [f"{dim}_{part}" for dim in dims for part in ("size", "multiplier", "shift")]


def view(form: Form, i: int) -> list[str]:
    """Return the parameters of input i: its pointer, and those of its strides that count."""
    kind, access = form.views[i]
    rows = [f"p{i}_row{d}" for d in range(form.rows) if kind & ROW]
    return [f"p{i}", *rows, *[f"p{i}_col{d}" for d in range(form.cols) if kind & COLUMN and access not in (WIDE, NEAR)]]


def coordinates(axis: str, dims: int) -> list[str]:
    """Return the lines that make the coordinates row0, row1 ... of `row`, or col0 ... of `column`."""
    short, rest, lines = axis[:3], axis, []
    for d in range(dims - 1, 0, -1):
        size = ", ".join(f"{short}{d}_{part}" for part in ("size", "multiplier", "shift"))
        above = f"{short}0" if d == 1 else f"{short}_above{d}"
        lines.append(f"{above}, {short}{d} = split({rest}, {size}, NARROW)")
        rest = above
    return lines or [f"{short}0 = {axis}"]


def value(form: Form, i: int) -> str:
    """Return the line that reads input i; strides of rows that are read in accesses count these."""
    kind, access = form.views[i]
    terms = [f"row{d} * p{i}_row{d}" for d in range(form.rows) if kind & ROW]
    if kind & ROW and access == WIDE:
        terms = [f"({' + '.join(terms)}) * STEP"]
    if kind & COLUMN:
        terms += ["column"] if access in (WIDE, NEAR) else [f"col{d} * p{i}_col{d}" for d in range(form.cols)]
    offset = " + ".join(terms or ["tl.zeros([1, 1], tl.int32)"])
    mask = {FULL: "mask", COLUMN: "col_mask", ROW: "row_mask", 0: "None"}[kind & FULL]
    return f"in{i} = read(p{i} + {offset}, {mask}, BITS)"


def tile_of(form: Form, first: int = 0) -> list[str]:
    """Return the lines that read the inputs from `first` on at `row` and `column`, where MASK says which there are."""
    views = form.views[first:]
    lines = ["row_mask = None", "col_mask = None", "mask = None", "if MASK:"]
    masks = ("row_mask = row < rows", "col_mask = column < cols", "mask = inside(row, column, rows, cols, total, MASK)")
    lines += [f"    {mask}" for mask in masks]
    if any(kind & ROW for kind, _ in views):
        lines += coordinates("row", form.rows)
    if any(kind & COLUMN and access not in (WIDE, NEAR) for kind, access in views):
        lines += coordinates("column", form.cols)
    # Tensors of the result's size last, read in accesses: Triton lays out a tile as what is read last. In another
    # layout, of an operand with one value a column, the tile would pass through shared memory on its way.
    order = sorted(range(len(views)), key=lambda i: (views[i][0] & FULL == FULL, views[i][1] in (WIDE, NEAR)))
    return lines + [value(form, first + i) for i in order]


def kernels(form: Form) -> tuple[str, str]:
    """Return the forward and the backward kernel around a `chain_forward` and a `chain_backward`."""
    kinds = [kind for kind, _ in form.views]
    count = range(len(kinds))
    views = ", ".join(part for i in count for part in view(form, i))
    inputs = _given(len(kinds))
    # Plain numbers that Triton sees to be multiples of 16, so that it moves 16 bytes at once; columns and elements are
    # counted in accesses (STEP elements), which all of them are whole.
    shape = ", ".join(["rows, cols, total, steps, row_step, col_step", *sizes(form)])
    tile_shape = "STEP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr"
    options = f"MASK: tl.constexpr, NARROW: tl.constexpr, EARLY: tl.constexpr, {tile_shape}, BITS: tl.constexpr"
    start = [
        "wait_for_kernel_before(EARLY)",
        "cols = cols * STEP",
        "total = total * STEP",
        "row_program, col_program = programs(NARROW)",
        "first_row = row_program * BLOCK_ROWS",
        "first_column = col_program * BLOCK_COLS",
    ]
    tile = [
        "row, column = place(first_row + step * row_step, first_column + step * col_step, BLOCK_ROWS, BLOCK_COLS)",
        *tile_of(form),
    ]
    whole = [kind & FULL == FULL for kind in kinds]
    sums = [f"sum{i} = zeros(BLOCK_ROWS, BLOCK_COLS, BITS)" for i in count if not whole[i]]
    gradients = ", ".join(f"d{i}" for i in count)
    gather, finish, numbers, constants = [], [], [], []
    for i, kind in enumerate(kinds):
        if whole[i]:
            gather += [f"if NEEDS & {1 << i}:", f"    write(g{i}, row * cols + column, d{i}, mask)"]
            continue
        gather += [f"if NEEDS & {1 << i}:", f"    sum{i} = add(sum{i}, d{i}, mask)"]
        numbers += [f"segment{i}", f"slots{i}"]
        constants.append(f"SEGMENTS{i}: tl.constexpr")
        where = f"row, column, rows, cols, row_program, col_program, segment{i}, slots{i}"
        finish += [f"if NEEDS & {1 << i}:", f"    write_sum(g{i}, sum{i}, {where}, {kind}, SEGMENTS{i})"]
    if finish:
        finish.insert(0, "row, column = place(first_row, first_column, BLOCK_ROWS, BLOCK_COLS)")
    outs = ", ".join(f"g{i}" for i in count)
    more = "NEEDS: tl.constexpr, STAGES: tl.constexpr"
    return function(
        "forward_kernel",
        f"y, {views}, {shape}, {options}",
        *start,
        "for step in range(count(steps)):",
        *(f"    {line}" for line in tile),
        f"    write(y, row * cols + column, chain_forward({inputs}, BITS), mask)",
    ), function(
        "backward_kernel",
        ", ".join(["gy", outs, views, shape, *numbers, more, *constants, options]),
        *start,
        *sums,
        "for step in tl.range(0, count(steps), num_stages=STAGES):",
        *(f"    {line}" for line in tile),
        "    gradient = read(gy + row * cols + column, mask, BITS)",
        f"    {gradients} = chain_backward({inputs}, gradient, BITS)",
        *(f"    {line}" for line in gather),
        "let_next_kernel_begin(EARLY)",
        *finish,
    )
