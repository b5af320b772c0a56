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
)
from dualop.numerics import check, truth
from dualop.numerics.cases import Sample

Progress = Callable[[str], None]
# Up to this size a call takes about as long as a launch, so it is also compared with an empty launch.
TINY_BYTES = 4 << 20


@dataclass(frozen=True)
class Row:
    """Hold one figure of the benchmark.

    `copy_share` is the time of a device copy of the same bytes divided by this time: 1 is the copy's speed. `launches`
    is this time divided by that of an empty launch, for tiny tensors only. `operands` are the forms of the operands.
    `max_ulp` is the largest error against float64 over the results of this direction; None means infinite or unknown.
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
    ok: bool = True
    interpreted: bool = False
    method: str = ""
    sets: int = 1
    note: str = ""
    launches: float | None = None
    operands: str = ""


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
    functions = contestants(workload, list(backends), compiled, eager)
    if checked_rows is None:
        checked_rows = rows_to_check(workload)
    with torch_private.kept_buffers():  # a compiled backward may otherwise run only once
        found = verdicts(workload, functions, seed, checked_rows, progress)
        for direction in (FORWARD, BACKWARD):
            rows += _rows(workload, direction, functions, found, seed, progress)
    return rows


@dataclass(frozen=True)
class Verdict:
    """Hold what the check found: the largest error of each direction, and what is wrong with it, if anything."""

    max_ulp: dict[str, float]
    wrong: dict[str, str]


def verdicts(
    workload: Workload, functions: dict[str, Function], seed: int, rows: int | None, progress: Progress
) -> dict[str, Verdict]:
    """Compare what each function computes with float64, on the first `rows` rows of x if given."""
    sample = workload.sample(seed, rows)
    exact = truth.truth(workload.chain, sample)
    judged = {}
    for name, function in functions.items():
        progress(f"checking {name}")
        worst, wrong = {FORWARD: 0.0, BACKWARD: 0.0}, {}
        try:
            # Poisoning is a global switch, which would make torch.compile compile once more.
            found = check.results(function, workload.chain.operands, sample, poison=name in BACKENDS)
        except Exception as error:
            note = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            judged[name] = Verdict({}, {FORWARD: note, BACKWARD: note})
            continue
        for quantity, value in found.items():
            direction = FORWARD if quantity == "y" else BACKWARD
            result = exact[quantity].judge(value, name)
            worst[direction] = max(worst[direction], result.max_ulp)
            # Eager and torch.compile round between the stages: their error is shown, not judged.
            if name in BACKENDS and not result.ok:
                wrong[direction] = f"wrong: {quantity}{list(result.where or ())} is {result.note()}"
        judged[name] = Verdict(worst, wrong)
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
    # Upcast inputs, every stage's result kept twice, their gradients, and the temporaries of a comparison.
    needed = elements * 8 * (4 * len(workload.chain.operands) + 4 * len(workload.chain.calls) + 16)
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
    operands = ", ".join(workload.operand_forms)
    common = Row("", direction, str(workload.chain), workload.dtype, list(workload.shape), sets=sets, operands=operands)
    samples: list[Sample] = [workload.sample(seed + i) for i in range(sets)]
    rows: list[Row] = []
    with timing.on_stream(device) as stream:
        progress(f"{direction}: {COPY}")
        copy = copy_time(count, sets, device, stream)
        empty = launch_time(device, stream) if count <= TINY_BYTES else None
        if empty:
            rows.append(with_time(replace(common, backend=LAUNCH, launches=1.0), empty))
        rows.append(_filled(replace(common, backend=COPY), copy, count, copy, empty))
        for name, function in functions.items():
            row = replace(common, backend=name, interpreted=name in BACKENDS and BACKENDS[name].interpreted)
            verdict = verdicts[name]
            if direction in verdict.wrong:
                rows.append(replace(row, ok=name not in BACKENDS, note=verdict.wrong[direction]))
                continue
            progress(f"{direction}: {name}")
            gc.collect()
            result = timing.timed(calls(function, direction, samples), stream)
            worst = verdict.max_ulp[direction]
            row = replace(row, max_ulp=_rounded(worst) if worst < torch.inf else None)
            rows.append(_filled(row, result, count, copy, empty))
    return with_ratios(rows)


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Return the rows of one direction together with their ratios to eager and to torch.compile."""
    times = {row.backend: row.time_us for row in rows}

    def ratio(other: str, row: Row) -> float | None:
        base = times.get(other)
        return _rounded(base / row.time_us) if base and row.time_us and row.backend not in (COPY, LAUNCH) else None

    return [replace(row, vs_eager=ratio(EAGER, row), vs_compile=ratio(COMPILED, row)) for row in rows]


def with_time(row: Row, result: timing.Timing) -> Row:
    return replace(
        row,
        time_us=_rounded(result.median_us),
        low_us=_rounded(result.low_us),
        high_us=_rounded(result.high_us),
        method=result.method,
        note=result.note,
    )


def _filled(row: Row, result: timing.Timing, count: int, copy: timing.Timing, empty: timing.Timing | None) -> Row:
    gbps, share = count / result.median_us / 1e3, copy.median_us / result.median_us
    launches = _rounded(result.median_us / empty.median_us) if empty else None
    return replace(with_time(row, result), gbps=_rounded(gbps), copy_share=_rounded(share), launches=launches)


def _rounded(value: float) -> float:
    """Round to five significant digits, so that a share of 0.03 keeps as many digits as one of 3."""
    return float(f"{value:.5g}")
