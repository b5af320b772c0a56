"""Search for `dualop tune`: compile every launch, time it, check the results of the fastest and keep it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualop.backends import cuda, triton
from dualop.backends.registry import BACKENDS
from dualop.bench import measure, timing
from dualop.bench.workloads import Workload, calls
from dualop.build import pool
from dualop.errors import BuildError
from dualop.language.syntax import Chain
from dualop.launch import candidates, tune, tuned
from dualop.launch.grid import Cut
from dualop.launch.layout import Layout

BUDGET_S = 0.08  # device time per measurement: there are many, and those that matter are repeated
MOST_PROCESSES = 16  # for compiling Triton kernels: each has a CUDA context and one workload's tensors
HEURISTICS = {"cuda": cuda.heuristic, "triton": triton.heuristic}  # the backends that have launches to choose

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Task:
    """Describe one search: the launches of one kernel for one workload."""

    work: Workload
    backend: str
    direction: str

    @property
    def subject(self) -> tuned.Subject:
        return subject_of(self, self.work.layout)

    @property
    def heuristic(self) -> Cut:
        return HEURISTICS[self.backend](self.work.chain, self.work.layout, self.direction, self.work.device)

    @property
    def candidates(self) -> list[Cut]:
        """Return the launches to time: the heuristic's choice first, then others, also an earlier search's result."""
        known = tuned.lookup(self.subject, self.work.device, Cut)
        others = candidates.candidates(self.backend, self.work.layout, self.direction, self.heuristic)
        return list(dict.fromkeys((*others, *([known] if known else []))))

    def __str__(self) -> str:
        return f"{self.backend} {self.direction}, {self.work.dtype}, {'x'.join(map(str, self.work.shape))}"


def subject_of(task: Task, view: Layout) -> tuned.Subject:
    return tuned.subject(task.backend, task.work.chain, view, task.direction)


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


def timer(workload: Workload, backend: str, direction: str, seed: int) -> tuple[tuned.Subject, tune.Time[Any]]:
    """Return what the launch is for, and a function from a launch to the microseconds of one call with it.

    That function raises what the backend raises when the launch does not fit the GPU.
    """
    sets = timing.sets_beyond_cache(workload.bytes(direction), workload.device)
    samples = [workload.sample(seed + i) for i in range(sets)]
    what = tuned.subject(backend, workload.chain, workload.layout, direction)

    def time(launch: object) -> float:
        gc.collect()
        with tuned.trying(what, launch), timing.on_stream(workload.device) as stream:
            function = partial(workload.chain, backend=backend)
            return timing.timed(calls(function, direction, samples), stream, BUDGET_S).median_us

    return what, time


def prepare(tasks: Sequence[Task], progress: Progress) -> None:
    """Compile every launch, in as many processes as there are cores. A failure is reported when the launch is timed."""
    built = [task for task in tasks if task.backend == "cuda"]
    if built:
        with contextlib.suppress(BuildError):
            cuda.prepare(_calls(built), progress)
    compiled = [task for task in tasks if task.backend == "triton" and task.work.device.type == "cuda"]
    launches = [(task, cut) for task in compiled for cut in task.candidates]
    pool.each(_launch_once, launches, MOST_PROCESSES, progress)


def _calls(tasks: Sequence[Task]) -> Iterator[tuple[Chain, Tensor, Sequence[Tensor]]]:
    """Return a call for each launch; a launch stays chosen until the next call is requested."""
    for task in tasks:
        sample = task.work.sample(0)
        for cut in task.candidates:
            with tuned.trying(task.subject, cut):
                yield task.work.chain, sample.x, sample.operands


def _launch_once(task: Task, cut: Cut) -> None:
    """Launch once in a child process: Triton keeps the compiled kernel on disk for the measuring process."""
    with contextlib.suppress(Exception), tuned.trying(task.subject, cut):
        (call,) = calls(partial(task.work.chain, backend=task.backend), task.direction, [task.work.sample(0)])
        call()


def run(tasks: Sequence[Task], seed: int, keep: bool, bar: Callable[[str], Progress]) -> list[Row]:
    """Return the rows of all tasks.

    With `keep`, every launch whose results are right is kept on disk, also the heuristic's own choice where it won.
    """
    rows = []
    for work in dict.fromkeys(task.work for task in tasks):
        found: dict[Task, tune.Result[Cut]] = {}
        failed: dict[Task, str] = {}
        for task in (task for task in tasks if task.work == work):
            try:
                found[task] = _search(task, seed, bar(str(task)))
            except Exception as error:  # the heuristic's own launch failed
                failed[task] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        wrong = _wrong(work, {task: result.best for task, result in found.items()}, seed)
        for task, note in failed.items():
            rows.append(replace(_row(task), ok=False, note=note))
        for task, result in found.items():
            if keep and not wrong[task]:
                tuned.keep(task.subject, work.device, result.best, result.microseconds, result.before)
            rows.append(_filled(_row(task), result, wrong[task], keep))
    return rows


def _search(task: Task, seed: int, progress: Progress) -> tune.Result[Cut]:
    _, time = timer(task.work, task.backend, task.direction, seed)
    near = partial(candidates.near, task.work.layout, task.direction)
    return tune.search(task.heuristic, task.candidates, time, progress, near)


def _wrong(work: Workload, launches: dict[Task, Cut], seed: int) -> dict[Task, str]:
    """Return for each task what is wrong with the results of its launch, or "" if nothing is."""
    rows = measure.rows_to_check(work)
    checked = work if rows is None else replace(work, shape=(min(rows, work.shape[0]), *work.shape[1:]))
    names = dict.fromkeys(task.backend for task in launches)
    with contextlib.ExitStack() as stack:
        for task, cut in launches.items():
            stack.enter_context(tuned.trying(subject_of(task, checked.layout), cut))
        functions: dict[str, Any] = {name: partial(work.chain, backend=name) for name in names}
        verdicts = measure.verdicts(checked, functions, seed, None, lambda text: None) if names else {}
    return {task: verdicts[task.backend].wrong.get(task.direction, "") for task in launches}


def _row(task: Task) -> Row:
    work = task.work
    return Row(
        backend=task.backend,
        direction=task.direction,
        chain=str(work.chain),
        dtype=work.dtype,
        shape=list(work.shape),
        operands=", ".join(work.operand_forms),
        interpreted=BACKENDS[task.backend].interpreted,
        heuristic=asdict(task.heuristic),
    )


def _filled(row: Row, result: tune.Result[Cut], wrong: str, keep: bool) -> Row:
    return replace(
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


def as_json(rows: Sequence[Row], device: torch.device) -> dict[str, Any]:
    """Return the content of the file that `--json` writes."""
    from dualop.bench.table import device_info

    file, launches = tuned.kept(device)
    return {"device": device_info(device), "file": str(file), "launches": launches, "rows": [asdict(r) for r in rows]}
