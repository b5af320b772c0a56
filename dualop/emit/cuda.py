"""Write the CUDA part of an emitted file: the kernels, straight for one layout, and Python that launches them."""

from __future__ import annotations

import torch

from dualop.backends import cuda
from dualop.emit import plan as plans
from dualop.emit.cpp import Headers
from dualop.emit.plan import Plan
from dualop.emit.template import Value, filled
from dualop.language.program import Step, steps
from dualop.language.syntax import Chain
from dualop.launch.grid import Cut, Grid, backward_grid, forward_grid, power_of_two
from dualop.launch.layout import BITS, COLUMN, FULL, ROW

# What the templates define themselves, and what has the same name in the headers.
OWN = ("Bytes", "load_raw", "store_raw", "Pack", "Input", "word", "float16", "bfloat16")
SUM_THREADS, TERMS = 1024, 8  # of a block of the kernel that adds up partial sums, and what a thread reads at once


def emitted(chain: Chain, plan: Plan) -> str:
    """Return the part of the file that defines `launch_forward` and `launch_backward`."""
    types, forward, backward = [], [], []
    outputs = max((size for size, v in zip(plan.sizes, plan.views[1:], strict=True) if v.reduced), default=1)
    sum_x = min(32, power_of_two(outputs))
    for dtype, layout in plan.layouts.items():
        cuts = cuda._untuned(chain, dtype, len(plan.views))
        tall = cuda.TALL[dtype].fitted(cuts[1], layout, plans.MULTIPROCESSORS)
        numbers, grid = _cut(tall, plan, dtype, backward=True)
        terms = max((outer * inner for outer, _, inner, _ in plan.sum_sizes(layout, grid)), default=1)
        sum_y = min(power_of_two(-(-terms // TERMS)), SUM_THREADS // sum_x)
        real = "double" if dtype == torch.float64 else "float"
        types.append(f'{dtype}: ("{cuda.C_TYPES[dtype]}", "{real}", {BITS[dtype]}, {plan.vector(dtype)}, {sum_y}),')
        forward.append(f"{dtype}: {_cut(cuts[0], plan, dtype, backward=False)[0]},")
        backward.append(f"{dtype}: {numbers},")
    return filled(
        "cuda.py.in",
        SOURCE=_source(chain, plan, outputs, sum_x),
        TYPES=types,
        FORWARD_CUTS=forward,
        BACKWARD_CUTS=backward,
        STEPS="" if plan.across else " * cut[5]",
        COLS=plan.cols,
    )


def _cut(cut: Cut, plan: Plan, dtype: torch.dtype, backward: bool) -> tuple[tuple[int, ...], Grid]:
    """Return a cut's numbers, ROWS, X, Y, RESIDENT, ACROSS and STEPS, and the grid."""
    layout, wide = plan.layouts[dtype], plan.vector(dtype)
    x = min(cut.across if wide > 1 else max(cut.across, 32), power_of_two(-(-layout.cols // wide)))
    y = cut.threads // x
    tile = (y * cut.rows, x * wide)
    grid = backward_grid(layout, *tile, plans.MULTIPROCESSORS, cut) if backward else forward_grid(layout, *tile)
    return (cut.rows, x, y, cut.resident, grid.col_programs, grid.steps), grid


def _source(chain: Chain, plan: Plan, outputs: int, sum_x: int) -> str:
    """Return the C++ of the file; DTYPE and the other macros come from Python."""
    kinds, names = [v.kind for v in plan.views], [cuda.C_TYPES[t] for t in plan.layouts]
    headers = Headers(OWN, {"float16", "bfloat16", "double"} - set(names))
    summed = [i for i, v in enumerate(plan.views) if v.reduced and v.kind & FULL != FULL]
    forward, backward = _forward(steps(chain)), _backward(steps(chain), len(kinds), headers)
    values: dict[str, Value] = dict(
        **{name: name in names for name in ("float", "float16", "bfloat16", "double")},
        SUMS=any(v.reduced for v in plan.views),
        BLOCK_SUMS=bool(summed),
        STORE_PARTIAL=any(v.reduced and v.kind & FULL == FULL for v in plan.views),
        CHAIN=str(chain),
        IN_PARAMETERS=", ".join(f"R in{i}" for i in range(len(kinds))),
        OUT_PARAMETERS=", ".join(f"R& g{i}" for i in range(len(kinds))),
        FORWARD=forward,
        BACKWARD=backward,
        INDEX="int" if plan.layout.narrow else "long long",
        COLS=plan.cols,
        COUNT=len(kinds),
        SUM_X=sum_x,
        SUM_BLOCKS=-(-outputs // sum_x),
        SUM_THREADS=SUM_THREADS,
        TERMS=TERMS,
        TILE_DOWN="down" if plan.across else "down + step * static_cast<index_t>(gridDim.x / C::ACROSS)",
        TILE_ACROSS="(across + step * C::ACROSS)" if plan.across else "across",
        FIRST="true" if plan.across else "step == 0",
        **_inputs(plan, summed),
        DEVICE="",
        FUNCTIONS="",
        GROUP_SUM="",
    )
    text = filled("kernels.cu.in", **values)
    for dtype in plan.layouts:
        headers.use(text.replace("\n".join(backward), ""), BITS[dtype])
        headers.use("\n".join(backward), max(BITS[dtype], 11))
    values |= dict(
        DEVICE=headers.printed("device"),
        FUNCTIONS=headers.printed("types", "float32", "math", "stages"),
        GROUP_SUM=headers.printed("view"),
    )
    return filled("kernels.cu.in", **values).rstrip("\n")


def _inputs(plan: Plan, summed: list[int]) -> dict[str, list[str] | str]:
    """Return the code that reads each input, and writes or sums its gradient."""
    values: dict[str, list[str]] = {name: [] for name in ("VALUES", "READ_FIRST", "READ", "UNPACK")}
    results: dict[str, list[str]] = {name: [] for name in ("SUM", "STORE", "ADD", "FINISH")}
    registers, elements, gradients = [], [], []
    for i, view in enumerate(plan.views):
        width, rows = ("VEC" if view.kind & COLUMN else "1"), view.kind & ROW
        u, element = ("[u]" if rows else ""), f"a{i}[{'v' if view.kind & COLUMN else '0'}]"
        registers.append(f"a{i}[{width}]")
        elements.append(element)
        values["VALUES"].append(f"Pack<{width}> p{i}{'[C::ROWS]' if rows else ''};")
        where = "at.ok[u]" if rows else f"first && column < {plan.cols}"
        at = f"a.in[{i}].data + {plan.offset(i, '/') or '0'}"
        values["READ" if rows else "READ_FIRST"].append(f"if ({where}) p{i}{u} = load<{width}>({at});")
        values["UNPACK"].append(f"unpack(T{{}}, in.p{i}{u}, a{i});")
        if i in summed:
            size, index = ("VEC", "v") if view.kind & COLUMN else ("Backward::ROWS", "u") if rows else ("1", "0")
            results["SUM"].append(f"R sum{i}[{size}] = {{}};")
            results["ADD"].append(f"sum{i}[{index}] += g{i};")
            results["FINISH"] += _finish(i, view.kind, plan.cols)
        else:
            gradients.append(f"g{i}[VEC]")
            to, partial = f"at.rows[u] * {plan.cols} + at.column, g{i});", f"a.in[{i}].partial"
            if view.reduced:
                results["STORE"].append(f"if ({partial} != nullptr) store_partial({partial} + {to}")
            condition = f"{'else ' if view.reduced else ''}if (a.in[{i}].gradient != nullptr)"
            results["STORE"].append(f"{condition} store(a.in[{i}].gradient + {to}")
    targets = [f"g{i}" if i in summed else f"g{i}[v]" for i in range(len(plan.views))]
    declared = [f"R {', '.join(f'g{i}' for i in summed)};"] if summed else []
    call = f"chain_backward<GRADIENT_BITS>({', '.join(elements)}, gy[v], {', '.join(targets)});"
    return {
        **values,
        **results,
        "COMPUTE": [*declared, call, *results["ADD"]],
        "REGISTERS": ", ".join(registers),
        "ELEMENTS": ", ".join(elements),
        "GRADIENTS": ", ".join(gradients),
    }


def _finish(index: int, kind: int, cols: int) -> list[str]:
    """Return the lines that add up a block's sums for one input."""
    each, first = "", "threadIdx.x == 0 && threadIdx.y == 0"
    total = "threadIdx.y * Backward::X + threadIdx.x, Backward::X * Backward::Y, 1"
    value, place = "0", "down * Backward::ACROSS + at.across"
    if kind & COLUMN:
        each, first = "for (int v = 0; v < VEC; v++)", f"threadIdx.y == 0 && at.column < {cols}"
        total, value, place = "threadIdx.y, Backward::Y, Backward::X", "v", f"down * {cols} + at.column + v"
    elif kind & ROW:
        each, first = "for (int u = 0; u < Backward::ROWS; u++)", "threadIdx.x == 0 && at.ok[u]"
        total, value, place = "threadIdx.x, Backward::X, 1", "u", "rows[u] * Backward::ACROSS + at.across"
    return [
        f"if (a.in[{index}].gradient != nullptr) {{",
        f"    group_sum(sum{index}, {total});",
        *(["#pragma unroll"] if each else []),
        f"    {each} {{" if each else "    {",
        f"        if ({first}) leave(a.in[{index}], at.{place}, sum{index}[{value}]);",
        "    }",
        "}",
    ]


def _number(value: float) -> str:
    if abs(value) == float("inf"):
        return f"{'-' if value < 0 else ''}__builtin_huge_val()"
    return repr(value)


def _call(step: Step, member: str, z: str, more: str = "") -> str:
    numbers = f"<{', '.join(f'number({_number(n)})' for n in step.numbers)}>" if step.numbers else ""
    if step.operand is not None:
        z += f", in{step.operand}" if isinstance(step.operand, int) else f", R({_number(step.operand)})"
    return f"stage::{step.function}{numbers}::{member}<bits>({z}{more})"


def _forward(lowered: tuple[Step, ...]) -> list[str]:
    lines = [f"const R z{i + 1} = {_call(s, 'forward', f'z{i}' if i else 'in0')};" for i, s in enumerate(lowered)]
    return [*lines, f"return z{len(lowered)};"]


def _backward(lowered: tuple[Step, ...], inputs: int, headers: Headers) -> list[str]:
    """Return the lines of the backward: gradients of one input are added up from the last stage to the first."""
    z = ["in0", *(f"z{i + 1}" for i in range(len(lowered)))]
    lines, uses = [], [list[str]() for _ in range(inputs)]
    for i, step in enumerate(lowered[:-1]):
        member = "inner" if headers.has_member(step.function, "inner") else "forward"
        lines.append(f"const R {z[i + 1]} = {_call(step, member, z[i])};")
    g = "gy"
    for i, step in reversed([*enumerate(lowered)]):
        if step.operand is not None:
            lines.append(f"R e{i};")
        more = f", {g}" if step.operand is None else f", {g}, e{i}"
        lines.append(f"const R d{i} = {_call(step, 'backward', z[i], more)};")
        g = f"d{i}"
        if isinstance(step.operand, int):
            uses[step.operand].append(f"e{i}")
    uses[0].append(g)
    return [*lines, *(f"g{i} = {' + '.join(use)};" for i, use in enumerate(uses))]
