"""Search for `dualop tune`: compile every launch, time it, check the results of the fastest, keep and show it."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from dualop.backends import registry
from dualop.backends.base import Planned
from dualop.backends.registry import BACKENDS
from dualop.bench import measure, timing
from dualop.bench.table import device_info, empty
from dualop.bench.workloads import FORWARD, Workload, shape_text
from dualop.launch import tuning
from dualop.launch.grid import Cut

BUDGET_S = 0.08  # of device time for a measurement: there are many, and those that matter are repeated

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """Describe one search: the launches of one kernel for one workload."""

    work: Workload
    backend: str
    direction: str

    @property
    def subject(self) -> tuning.Subject:
        return tuning.subject(self.backend, self.work.chain, self.work.layout(self.direction), self.direction)

    @property
    def heuristic(self) -> Cut:
        work = self.work
        cut = BACKENDS[self.backend].heuristic(work.chain, work.layout(self.direction), self.direction)
        if cut is None:
            raise ValueError(f"{self.backend} has no launches to choose")
        return cut

    @property
    def candidates(self) -> list[Cut]:
        """Return the heuristic's choice first, and among the others what an earlier search found."""
        known = tuning.lookup(self.subject, self.work.device, Cut)
        others = BACKENDS[self.backend].candidates(self.work.layout(self.direction), self.direction, self.heuristic)
        return list(dict.fromkeys((*others, *([known] if known else []))))

    def __str__(self) -> str:
        return f"{self.backend} {self.direction}, {self.work.dtype}, {shape_text(self.work.shape)}"


@dataclass(frozen=True)
class Row:
    """Hold the result of one search.

    `times` are the first measurements; `failed` says why a launch could not be timed.
    """

    backend: str
    direction: str
    chain: str
    dtype: str
    shape: list[int]
    operands: str
    interpreted: bool
    heuristic: dict[str, int]
    heuristic_us: float | None = None
    best: dict[str, int] | None = None
    best_us: float | None = None
    gain: float | None = None
    tried: int = 0
    times: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    ok: bool = True
    kept: bool = False
    note: str = ""


def timer(workload: Workload, backend: str, direction: str, seed: int) -> tuning.Time[Any]:
    """Return a function from a cut to the microseconds of one call with it.

    It raises what the backend raises when the launch does not fit the GPU.
    """
    sets = timing.sets_beyond_cache(workload.bytes(direction), workload.device)
    samples = [workload.sample(seed + i) for i in range(sets)]
    runs: Any = BACKENDS[backend]

    def time(cut: Any) -> float:
        gc.collect()
        with timing.on_stream(workload.device) as stream:
            if direction == FORWARD:
                calls = [partial(runs.forward, workload.chain, s.x, s.operands, cut=cut) for s in samples]
            else:
                needs = (True,) * len(workload.shapes)
                calls = [partial(runs.backward, workload.chain, s.gy, s.x, s.operands, needs, cut=cut) for s in samples]
            return timing.timed(calls, stream, BUDGET_S).median_us

    return time


def prepare(tasks: Sequence[Task], progress: Progress) -> None:
    """Compile every launch, in as many processes as there are cores. What cannot be compiled fails when it is timed."""
    calls: dict[str, list[Planned]] = {}
    for task in tasks:
        calls.setdefault(task.backend, []).extend(planned(task))
    for name, own in calls.items():
        registry.prepare([name], own, progress)


def planned(task: Task) -> list[Planned]:
    """Return a call for each launch."""
    one, way = task.work.planned, task.direction
    return [replace(one, directions=(way,), cuts=((way, cut),)) for cut in task.candidates]


def run(tasks: Sequence[Task], seed: int, keep: bool, bar: Callable[[str], Progress]) -> list[Row]:
    """Return the rows of all tasks.

    With `keep`, every launch whose results are right is kept on disk, also the heuristic's own choice where it won.
    """
    rows = []
    for task in tasks:
        work = task.work
        row = Row(
            backend=task.backend,
            direction=task.direction,
            chain=str(work.chain),
            dtype=work.dtype,
            shape=list(work.shape),
            operands=", ".join(work.operand_forms),
            interpreted=BACKENDS[task.backend].interpreted,
            heuristic=asdict(task.heuristic),
        )
        time = timer(work, task.backend, task.direction, seed)
        near = partial(tuning.near, work.layout(task.direction), task.direction)
        try:
            result = tuning.search(task.heuristic, task.candidates, time, bar(str(task)), near)
        except Exception as error:  # the heuristic's own launch failed
            rows.append(replace(row, ok=False, note=timing.said(error)))
            continue
        wrong = _wrong(task, result.best, seed)
        if keep and not wrong:
            tuning.keep(task.subject, work.device, result.best, result.microseconds, result.before)
        row = replace(
            row,
            heuristic_us=round(result.before, 3),
            best=asdict(result.best),
            best_us=round(result.microseconds, 3),
            gain=round(result.gain, 4),
            tried=result.tried,
            times=[{**asdict(cut), "us": round(time, 3)} for cut, time in result.first.items()],
            failed=[{**asdict(cut), "why": why} for cut, why in result.failed.items()],
            ok=not wrong,
            kept=keep and not wrong,
            note=wrong,
        )
        rows.append(row)
    registry.forget_launches()
    return rows


def _wrong(task: Task, cut: Cut, seed: int) -> str:
    """Return what is wrong with the results of a launch, or "" if nothing is."""
    of: Any = BACKENDS[task.backend]
    name = f"{task.backend}_as_found"
    fixed = copy.copy(of)  # the same backend under another name, with one kernel cut in a fixed way
    fixed.name, fixed.replays, fixed.reasons = name, False, of.reasons
    fixed.forward, fixed.backward = of.forward, of.backward
    setattr(fixed, task.direction, partial(getattr(of, task.direction), cut=cut))
    registry.register(fixed)
    try:
        work = task.work.first(measure.rows_to_check(task.work))
        functions = {name: partial(work.chain, backend=name)}
        return measure.verdicts(work, functions, seed, None, lambda text: None)[name].wrong.get(task.direction, "")
    finally:
        registry.unregister(name)


TITLE = (
    "launches: rows a thread x threads (side by side), blocks of 256 threads an SM that registers are held down for, "
    "programs an SM where gradients are summed"
)
WORDS = ("backend", "direction", "chain", "x", "dtype", "heuristic", "best", "note")
COLUMNS = (*WORDS[:6], "µs", "best", "µs", "gain", "tried", "failed", "note")


def render(rows: Sequence[Row]) -> Table:
    """Return the table, with a line for each search."""
    table = empty(TITLE, COLUMNS, WORDS)
    for row in rows:
        what = (row.backend, row.direction, row.chain, shape_text(row.shape), row.dtype)
        times = (_launch(row.heuristic), _number(row.heuristic_us), _launch(row.best), _number(row.best_us))
        counts = (_number(row.gain), str(row.tried), str(len(row.failed)))
        table.add_row(*map(Text, (*what, *times, *counts, row.note)), style="red" if not row.ok else None)
    return table


def _launch(cut: dict[str, int] | None) -> str:
    if cut is None:
        return ""
    return "{rows}x{threads}({across}) {resident} {least}-{most}".format(**cut)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def as_json(rows: Sequence[Row], device: torch.device) -> dict[str, Any]:
    """Return the content of the file that `--json` writes."""
    file, launches = tuning.kept(device)
    return {"device": device_info(device), "file": str(file), "launches": launches, "rows": [asdict(r) for r in rows]}
