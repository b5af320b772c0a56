"""Writes a chain's Triton file: the chain as straight-line functions, and a forward and a backward kernel around them.

Triton has no variadic templates; a tuple of functions as a constexpr, the other way, launches at twice the host cost
and its stages have no line of their own in a profile.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

# A stage as the generator needs it: the function's name, the numbers compiled into it, and for an operand stage what it
# takes: the number of an input (0 is x), or a float.
Step = tuple[str, Sequence[float], int | float | None]

_HEAD = '''"""{title}: written by dualop, do not edit."""

import triton
import triton.language as tl

from {package} import stages
from {package}.platform import count, let_next_kernel_begin, number, wait_for_kernel_before
from {package}.tile import add, inside, place, programs, read, write, write_sum, zeros
'''


def generate(title: str, steps: Sequence[Step], kinds: Sequence[int]) -> str:
    """The file's text for a chain of `steps` on inputs of `kinds` (dualop/launch/layout.py), x first."""
    package = __name__.rpartition(".")[0]
    parts = [_HEAD.format(title=title, package=package), _chain(steps, len(kinds)), *_kernels(kinds)]
    return "\n\n\n".join(part.strip("\n") for part in parts) + "\n"


def _literal(value: float) -> str:
    if math.isinf(value):
        return f'float("{value}")'
    return repr(value)


def _taken(operand: int | float, z: str) -> str:
    return f"in{operand}" if isinstance(operand, int) else f"number({z}, {_literal(operand)})"


@lru_cache(maxsize=1)
def _inners() -> frozenset[str]:
    files = (Path(__file__).parent / "stages").glob("*.py")
    return frozenset(
        name for file in files for name in re.findall(r"^def (\w+_inner)\(", file.read_text("utf-8"), re.M)
    )


def _inner(name: str) -> str:
    """The ending of the stage's function for its value on the way in a backward."""
    return "_inner" if f"{name}_inner" in _inners() else ""


def _chain(steps: Sequence[Step], inputs: int) -> str:
    names = [f"in{i}" for i in range(inputs)]
    forward, inner, backward = [], [], []
    uses: dict[int, list[str]] = {i: [] for i in range(inputs)}
    for i, (name, numbers, operand) in enumerate(steps):
        more = "".join(f", {_literal(n)}" for n in numbers)
        z = f"z{i}"
        if operand is None:
            forward.append(f"z{i + 1} = stages.{name}({z}{more}, BITS)")
            inner.append(f"z{i + 1} = stages.{name}{_inner(name)}({z}{more}, BITS)")
            backward.append(f"g{i} = stages.{name}_backward({z}, g{i + 1}{more}, BITS)")
        else:
            forward.append(f"z{i + 1} = stages.{name}({z}, {_taken(operand, z)}, BITS)")
            inner.append(forward[-1])
            taken = f"stages.{name}_backward({z}, {_taken(operand, z)}, g{i + 1}, BITS)"
            backward.append(f"g{i}, d{i} = {taken}")
            if isinstance(operand, int):
                uses[operand].append(f"d{i}")
    uses[0].insert(0, "g0")
    last = f"z{len(steps)}"
    gradients = ", ".join(" + ".join(uses[i]) for i in range(inputs))
    lines = [
        "@triton.jit",
        f"def chain_forward({', '.join(names)}, BITS: tl.constexpr):",
        "    z0 = in0",
        *(f"    {line}" for line in forward),
        f"    return {last}",
        "",
        "",
        "@triton.jit",
        f"def chain_backward({', '.join(names)}, gy, BITS: tl.constexpr):",
        "    z0 = in0",
        *(f"    {line}" for line in inner[:-1]),
        f"    g{len(steps)} = gy",
        *(f"    {line}" for line in reversed(backward)),
        f"    return {gradients}",
    ]
    return "\n".join(lines)


def _kernels(kinds: Sequence[int]) -> tuple[str, str]:
    """The forward and the backward kernel around a `chain_forward` and a `chain_backward`."""
    count = range(len(kinds))
    views = ", ".join(f"p{i}, div{i}, mod{i}, stride{i}, outer{i}" for i in count)
    reads = [
        f"in{i} = read(p{i}, div{i}, mod{i}, stride{i}, outer{i}, row, column, rows, cols, mask, {kind}, BITS)"
        for i, kind in enumerate(kinds)
    ]
    inputs = ", ".join(f"in{i}" for i in count)
    # Plain numbers that Triton sees to be multiples of 16, so that it moves 16 bytes at once.
    shape = "rows, cols, total, steps, row_step, col_step"
    tile_shape = "BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr"
    options = f"MASK: tl.constexpr, NARROW: tl.constexpr, EARLY: tl.constexpr, {tile_shape}, BITS: tl.constexpr"
    start = [
        "wait_for_kernel_before(EARLY)",
        "row_program, col_program = programs(NARROW)",
        "first_row = row_program * BLOCK_ROWS",
        "first_column = col_program * BLOCK_COLS",
    ]
    tile = [
        "row, column = place(first_row + step * row_step, first_column + step * col_step, BLOCK_ROWS, BLOCK_COLS)",
        "mask = None",
        "if MASK:",
        "    mask = inside(row, column, rows, cols, total, MASK)",
        *reads,
    ]
    whole = [kind & 3 == 3 for kind in kinds]
    sums = [f"sum{i} = zeros(BLOCK_ROWS, BLOCK_COLS, BITS)" for i in count if not whole[i]]
    gradients = ", ".join(f"d{i}" for i in count)
    gather, finish = [], []
    for i, kind in enumerate(kinds):
        if whole[i]:
            gather += [f"if NEEDS & {1 << i}:", f"    write(g{i}, row * cols + column, d{i}, mask)"]
        else:
            gather += [f"if NEEDS & {1 << i}:", f"    sum{i} = add(sum{i}, d{i}, mask)"]
            where = "row, column, rows, cols, row_program, col_program"
            finish += [f"if NEEDS & {1 << i}:", f"    write_sum(g{i}, sum{i}, {where}, {kind})"]
    if finish:
        finish.insert(0, "row, column = place(first_row, first_column, BLOCK_ROWS, BLOCK_COLS)")
    outs = ", ".join(f"g{i}" for i in count)
    more = "NEEDS: tl.constexpr, STAGES: tl.constexpr"
    forward = [
        "@triton.jit",
        f"def forward_kernel(y, {views}, {shape}, {options}):",
        *(f"    {line}" for line in start),
        "    for step in range(count(steps)):",
        *(f"        {line}" for line in tile),
        f"        write(y, row * cols + column, chain_forward({inputs}, BITS), mask)",
    ]
    backward = [
        "@triton.jit",
        f"def backward_kernel(gy, {outs}, {views}, {shape}, {more}, {options}):",
        *(f"    {line}" for line in (*start, *sums)),
        "    for step in tl.range(0, count(steps), num_stages=STAGES):",
        *(f"        {line}" for line in tile),
        "        gradient = read(gy, 1, 1, cols, 0, row, column, rows, cols, mask, 3, BITS)",
        f"        {gradients} = chain_backward({inputs}, gradient, BITS)",
        *(f"        {line}" for line in gather),
        "    let_next_kernel_begin(EARLY)",
        *(f"    {line}" for line in finish),
    ]
    return "\n".join(forward), "\n".join(backward)
