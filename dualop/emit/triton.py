"""Write the Triton part of an emitted file: the kernels, straight for one layout, and Python that launches them."""

from __future__ import annotations

import re

import torch

from dualop.backends import triton
from dualop.emit import plan as plans
from dualop.emit.jit import Library
from dualop.emit.plan import Plan
from dualop.emit.template import Value, filled
from dualop.language.syntax import Chain
from dualop.launch.grid import Cut, backward_grid, forward_grid, power_of_two
from dualop.launch.layout import BITS, COLUMN, FULL, ROW

REAL = "tl.float64 if BITS == 53 else tl.float32"


def emitted(chain: Chain, plan: Plan) -> str:
    """Return the part of the file that defines `launch_forward` and `launch_backward`."""
    forward, backward = [], []
    for dtype, layout in plan.layouts.items():
        cut = triton.backward_cut(layout, False, plans.MULTIPROCESSORS)
        forward.append(f"{dtype}: dict({_cut(triton.FORWARD[dtype], plan, dtype, BITS[dtype], backward=False)}),")
        backward.append(f"{dtype}: dict({_cut(cut, plan, dtype, max(BITS[dtype], 11), backward=True)}),")
    library, bits = Library(), {BITS[dtype] for dtype in plan.layouts}
    sums = any(v.reduced for v in plan.views)
    chains = triton.source(chain, triton.form_of(plan.layout))
    chain_forward, chain_backward, *_ = re.findall(r"^@triton.jit\n.*?(?=^@)", chains, re.MULTILINE | re.DOTALL)
    forward_kernel, backward_kernel = _kernels(plan).split("\n\n\n")
    kernels = [
        library.use(chain_forward + forward_kernel, bits),
        library.use(chain_backward + backward_kernel, {max(b, 11) for b in bits}),
    ]
    if sums:
        library.use("sum_kernel", {24})
    parts = {name: library.printed(*modules) for name, modules in SECTIONS.items()}
    text = "".join((*parts.values(), *kernels))
    names = [n for n in ("gdc_launch_dependents", "gdc_wait", "libdevice") if re.search(rf"\b{n}\b", text)]
    return filled(
        "triton.py.in",
        IMPORTS=f"from triton.language.extra.cuda import {', '.join(names)}",
        **parts,
        KERNELS="\n\n\n".join(kernels),
        SUMS=sums,
        FORWARD_CUTS=forward,
        BACKWARD_CUTS=backward,
        RESERVED=triton.RESERVED,
        STAGES=triton.STAGES,
        WHOLE=1 + sum(v.kind & FULL == FULL for v in plan.views),
        LIMIT="z.numel()" if plan.folded else "rows",
        STEPS="" if plan.across else ' * cut.get("steps", 1)',
        STEPS_ACROSS=' * cut.get("steps", 1)' if plan.across else "",
        COLS=plan.cols,
    )


SECTIONS = {"PLATFORM": ("platform",), "FUNCTIONS": ("float32", "math", "stages"), "TILE": ("tile",)}


def _cut(cut: Cut, plan: Plan, dtype: torch.dtype, bits: int, backward: bool) -> str:
    layout, wide = plan.layouts[dtype], 16 // dtype.itemsize
    columns = min(power_of_two(layout.cols), cut.across * wide)
    rows = cut.rows * cut.threads * wide // columns
    sms = plans.MULTIPROCESSORS
    grid = backward_grid(layout, rows, columns, sms, cut) if backward else forward_grid(layout, rows, columns)
    steps = f", steps={grid.steps}" if backward else ""
    limit = f", maxnreg={65536 // (256 * cut.resident)}" if cut.resident > 1 else ""
    return (
        f"BLOCK_ROWS={rows}, BLOCK_COLS={columns}, ACROSS={grid.col_programs}{steps}, BITS={bits}, "
        f"num_warps={cut.threads // 32}{limit}"
    )


def _kernels(plan: Plan) -> str:
    """Return the forward and the backward kernel, with the library's names and with BITS."""
    reads, sums, gather, finish = [], [], [], []
    for i, view in enumerate(plan.views):
        kind = view.kind
        mask = {FULL: "mask", COLUMN: f"column < {plan.cols}", ROW: "row < limit", 0: "None"}[kind & FULL]
        offset = plan.offset(i, "//") or "tl.zeros([1, 1], tl.int32)"
        reads.append(f"in{i} = load(p{i} + ({offset}), {mask}).to({REAL})")
        gather.append(f"if NEEDS & {1 << i}:")
        if kind & FULL == FULL:
            gather.append(f"    write(g{i}, row * {plan.cols} + column, d{i}, mask)")
            continue
        sums.append(f"sum{i} = zeros(BLOCK_ROWS, BLOCK_COLS, BITS)")
        gather.append(f"    sum{i} = add(sum{i}, d{i}, mask)")
        place, total, inside = "down * ACROSS + across + tl.zeros([1, 1], tl.int32)", f"sum{i}", "None"
        if kind & COLUMN:
            place, inside = f"down * {plan.cols} + first_column", f"first_column < {plan.cols}"
        elif kind & ROW:
            place, inside = "first_row * ACROSS + across", "first_row < limit"
        for axis, other in ((1, COLUMN), (0, ROW)):
            if not kind & other:
                total = f"tl.sum({total}, axis={axis}, keep_dims=True)"
        finish += [f"if NEEDS & {1 << i}:", f"    write(g{i}, {place}, {total}, {inside})"]
    count = range(len(plan.views))
    names = lambda letter: ", ".join(f"{letter}{i}" for i in count)
    down, across = " + step * (tl.num_programs(0) // ACROSS * BLOCK_ROWS)", " + step * (ACROSS * BLOCK_COLS)"
    values: dict[str, Value] = dict(
        POINTERS=names("p"),
        GRADIENTS=names("g"),
        PARTS=names("d"),
        INPUTS=names("in"),
        PROGRAM="tl.program_id(0)" if plan.layout.narrow else "tl.program_id(0).to(tl.int64)",
        INSIDE=f"row * {plan.cols} + column < limit" if plan.folded else f"(row < limit) & (column < {plan.cols})",
        READS=[reads[i] for i in sorted(count, key=lambda i: plan.views[i].kind & FULL == FULL)],  # as generate.py
        SUMS=sums,
        GATHER=gather,
        FINISH=finish,
        STEP_ROW="first_row" + ("" if plan.across else down),
        STEP_COLUMN="first_column" + (across if plan.across else ""),
        COLS=plan.cols,
        REAL=REAL,
    )
    return filled("kernels.triton.in", **values)
