"""Check results, then time them: this module makes the rows of `dualop bench`."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dualop import torch_private
from dualop.backends.registry import BACKENDS
from dualop.bench import timing
from dualop.bench.copying import copy_time, launch_time
from dualop.bench.workloads import (
    BACKWARD,
    COMPILED,
    COPY,
    EAGER,
    FORWARD,
    LAUNCH,
    Function,
    Workload,
    calls,
    contestants,
    shape_text,
)
from dualop.numerics import check, truth

Progress = Callable[[str], None]
# Up to this size a call takes about as long as a launch, so it is also compared with an empty launch.
TINY_BYTES = 4 << 20


@dataclass(frozen=True)
class Row:
    """Hold one figure of the benchmark.

    `copy_share` is the time of a device copy of the same bytes divided by this time: 1 is the copy's speed. `launches`
    is this time divided by that of an empty launch, for tiny tensors only. `operands` are the forms of the operands
    and how they lie in memory, `arrange` is how x lies (Workload).

    Errors are the largest against float64; None means infinite, unknown, or that there is no such result. `max_ulp` is
    that of y (forward) or grad x (backward), `beyond_rounding` what is left of it where float64 starts from x + bias as
    rounded to float32. `operand_ulp` is that of operands' gradients of full size, `operand_sum` that of those which are
    sums, in units of u * sum|terms| (dualop/numerics/ulp.py).
    """

    backend: str
    direction: str
    chain: str
    dtype: str
    shape: list[int]
    time_us: float | None = None
    low_us: float | None = None
    high_us: float | None = None
    gbps: float | None = None
    copy_share: float | None = None
    vs_eager: float | None = None
    vs_compile: float | None = None
    max_ulp: float | None = None
    beyond_rounding: float | None = None
    operand_ulp: float | None = None
    operand_sum: float | None = None
    ok: bool = True
    interpreted: bool = False
    method: str = ""
    sets: int = 1
    note: str = ""
    launches: float | None = None
    operands: str = ""
    arrange: str = "dense"

    @property
    def size(self) -> str:
        """Return the shape of x, and how x lies in memory unless it is contiguous."""
        return shape_text(self.shape) + ("" if self.arrange == "dense" else f", {self.arrange}")

    @property
    def half_width_us(self) -> float | None:
        """Return half the width from the tenth to the ninetieth percentile."""
        return None if self.low_us is None or self.high_us is None else (self.high_us - self.low_us) / 2

    @property
    def remark(self) -> str:
        """Return the note, after a word on interpreted kernels."""
        return "; ".join(filter(None, ("interpreted" if self.interpreted else "", self.note)))

    def timed(self, result: timing.Timing) -> Row:
        """Return this row with the time."""
        median, low, high = map(_rounded, (result.median_us, result.low_us, result.high_us))
        return replace(self, time_us=median, low_us=low, high_us=high, method=result.method, note=result.note)


def steps(backends: int, compiled: bool, eager: bool = True) -> int:
    """Return how often `measure` calls `progress` for so many backends."""
    functions = backends + eager + compiled
    return functions + 2 * (functions + 1)


def measure(
    workload: Workload,
    backends: Sequence[str],
    compiled: bool,
    seed: int,
    progress: Progress,
    eager: bool = True,
    checked_rows: int | None = None,
) -> list[Row]:
    """Return the rows of one workload: device copy, eager, torch.compile and the backends, forward and backward.

    A backend whose results are wrong has a row that is not ok, with no time. `checked_rows` checks only the first so
    many rows of x.
    """
    if compiled:
        torch.compiler.reset()  # otherwise the next shape would be compiled for all shapes
    rows: list[Row] = []
    functions = contestants(workload, backends, compiled, eager)
    if checked_rows is None:
        checked_rows = rows_to_check(workload)
    with torch_private.kept_buffers():  # a compiled backward may otherwise run only once
        found = verdicts(workload, functions, seed, checked_rows, progress)
        for direction in (FORWARD, BACKWARD):
            rows += _rows(workload, direction, functions, found, seed, progress)
    return rows


@dataclass(frozen=True)
class Verdict:
    """Hold what the check found: the errors of each direction by fields of Row, and what is wrong, if anything."""

    errors: dict[str, dict[str, float]]
    wrong: dict[str, str]


def verdicts(
    workload: Workload, functions: dict[str, Function], seed: int, rows: int | None, progress: Progress
) -> dict[str, Verdict]:
    """Compare what each function computes with float64, on the first `rows` rows of x if given.

    torch.compile would compile once more for these rows, and is not checked then.
    """
    sample = workload.sample(seed, rows)
    exact = truth.truth(workload.chain, sample)
    judged = {}
    for name, function in functions.items():
        progress(f"checking {name}")
        if rows is not None and name == COMPILED:
            judged[name] = Verdict({FORWARD: {}, BACKWARD: {}}, {})
            continue
        errors: dict[str, dict[str, float]] = {FORWARD: {}, BACKWARD: {}}
        wrong: dict[str, str] = {}
        try:
            # Poisoning is a global switch, which would make torch.compile compile once more.
            found = check.results(function, workload.chain.operands, sample, poison=name in BACKENDS)
        except Exception as error:
            judged[name] = Verdict({}, dict.fromkeys((FORWARD, BACKWARD), timing.said(error)))
            continue
        for quantity, value in found.items():
            direction = FORWARD if quantity == "y" else BACKWARD
            right = exact[quantity]
            result = right.judge(value, name)
            field = "max_ulp" if quantity in ("y", "grad_x") else "operand_sum" if right.summed else "operand_ulp"
            errors[direction][field] = max(errors[direction].get(field, 0.0), result.error)
            if field == "max_ulp" and (beyond := right.beyond_rounding(value)) is not None:
                errors[direction]["beyond_rounding"] = beyond
            # Eager and torch.compile round between the stages: their error is shown, not judged.
            if name in BACKENDS and not result.ok:
                wrong[direction] = f"wrong: {quantity}{list(result.where or ())} is {result.note()}"
        judged[name] = Verdict(errors, wrong)
        del found
    return judged


def rows_to_check(workload: Workload) -> int | None:
    """Return all rows if the float64 truth fits into half of the free memory, else as many of the first rows as fit."""
    if workload.device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(workload.device)
    elements = torch.Size(workload.shape).numel()
    # Upcast inputs, every stage's result kept twice, their gradients, those with the first stage rounded, and the
    # temporaries of a comparison.
    needed = elements * 8 * (5 * len(workload.chain.operands) + 4 * len(workload.chain.calls) + 18)
    return None if needed < free / 2 else max(1, int(workload.shape[0] * free / 2 / needed))


def _rows(
    workload: Workload,
    direction: str,
    functions: dict[str, Function],
    verdicts: dict[str, Verdict],
    seed: int,
    progress: Progress,
) -> list[Row]:
    device, count = workload.device, workload.bytes(direction)
    sets = timing.sets_beyond_cache(count, device)
    common = Row("", direction, str(workload.chain), workload.dtype, list(workload.shape), sets=sets)
    common = replace(common, operands=workload.operand_text, arrange=workload.arrange)
    samples = [workload.sample(seed + i) for i in range(sets)]
    rows: list[Row] = []
    with timing.on_stream(device) as stream:
        progress(f"{direction}: {COPY}")
        copy = copy_time(count, sets, device, stream)
        empty = launch_time(device, stream) if count <= TINY_BYTES else None

        def timed(row: Row, result: timing.Timing) -> Row:
            took = result.median_us
            launches = _rounded(took / empty.median_us) if empty else None
            row = replace(row, gbps=_rounded(count / took / 1e3), copy_share=_rounded(copy.median_us / took))
            return replace(row.timed(result), launches=launches)

        if empty:
            rows.append(replace(common, backend=LAUNCH, launches=1.0).timed(empty))
        rows.append(timed(replace(common, backend=COPY), copy))
        for name, function in functions.items():
            row, verdict = replace(common, backend=name, interpreted=interpreted(name)), verdicts[name]
            if direction in verdict.wrong:
                rows.append(replace(row, ok=name not in BACKENDS, note=verdict.wrong[direction]))
                continue
            progress(f"{direction}: {name}")
            gc.collect()
            finite = {field: _rounded(e) for field, e in verdict.errors[direction].items() if e < torch.inf}
            row = replace(row, **finite)
            rows.append(timed(row, timing.timed(calls(function, direction, samples), stream)))
    return with_ratios(rows)


def interpreted(name: str) -> bool:
    """Return True if a contestant, which may be "BACKEND, DIFFERENCE", runs interpreted kernels."""
    backend = BACKENDS.get(name.partition(",")[0])
    return backend is not None and backend.interpreted


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of one direction together with their ratios to eager and to torch.compile."""
    times = {row.backend: row.time_us for row in rows}

    def ratio(other: str, row: Row) -> float | None:
        base = times.get(other)
        return _rounded(base / row.time_us) if base and row.time_us and row.backend not in (COPY, LAUNCH) else None

    return [replace(row, vs_eager=ratio(EAGER, row), vs_compile=ratio(COMPILED, row)) for row in rows]


def _rounded(value: float) -> float:
    """Round to five significant digits, so that a share of 0.03 keeps as many digits as one of 3."""
    return float(f"{value:.5g}")
