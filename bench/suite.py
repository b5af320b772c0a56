"""Run `dualop bench --suite`: one table with a line for each chain and dtype, relative to the speed of a copy.

The parts of the suite are `stages` (each stage alone), `chains` and `shapes` (small ones, channels, a residual). Every
kernel is compiled before the first one is timed, in as many processes as there are cores. Results are checked on the
first rows only; `dualop check` and `dualop verify` check them thoroughly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from rich.table import Table
from rich.text import Text

import dualop
from dualop.bench import measure
from dualop.bench.table import empty
from dualop.bench.workloads import BACKWARD, COPY, FORWARD, LAUNCH, Workload, shape_text
from dualop.language.stages import STAGES
from dualop.numerics.cases import DEFAULT_CHAIN

TITLE = "time over that of a copy of the same bytes, forward and backward"
WAYS = (FORWARD, BACKWARD)
GOAL = 1.1  # times the copy's time
CHECKED = 1 << 21  # elements of x

LARGE, NCHW = (16384, 8192), (64, 256, 56, 56)
SMALL = {LARGE: (8, 64), NCHW: (2, 3, 4, 5), (1024, 8192): (4, 32), (128, 512): (2, 16)}  # on the CPU

Entry = tuple[str, tuple[int, ...], str]  # chain, shape of x, form of the operands
SUITE: dict[str, tuple[Entry, ...]] = {
    "stages": (
        *((stage.example, LARGE, "last") for stage in STAGES.values()),
        ('gelu(approximate="tanh")', LARGE, "last"),
    ),
    "chains": (
        (DEFAULT_CHAIN, LARGE, "last"),
        ("add | gelu", LARGE, "last"),
        ("add | mish", LARGE, "last"),
        ("add | softplus | tanh", LARGE, "last"),
        ("add | silu | mul(scale)", LARGE, "last"),
        ("sigmoid | mul(x)", LARGE, "last"),
    ),
    "shapes": (
        ("add | relu", NCHW, "channel"),
        (DEFAULT_CHAIN, NCHW, "channel"),
        ("add", LARGE, "full"),
        ("add | gelu", LARGE, "full"),
        ("add | gelu", LARGE, "row"),
        (DEFAULT_CHAIN, (1024, 8192), "last"),
        (DEFAULT_CHAIN, (128, 512), "last"),
        ("add | gelu", (128, 512), "last"),
    ),
}


def works(names: Sequence[str], dtypes: Sequence[str], device: torch.device) -> list[Workload]:
    """Return the workloads of the named parts; on the CPU, where kernels are interpreted, they have small shapes."""
    return [
        Workload(dualop.chain(text), SMALL[shape] if device.type == "cpu" else shape, dtype, device, (form,))
        for name in names
        for text, shape, form in SUITE[name]
        for dtype in dtypes
    ]


def run(todo: Sequence[Workload], backends: Sequence[str], seed: int, progress: measure.Progress) -> list[measure.Row]:
    """Return the rows of all workloads: the copy and the backends, without eager and torch.compile."""
    rows: list[measure.Row] = []
    for work in todo:
        say = lambda text, about=f"{work.chain}, {work.dtype}": progress(f"{about}: {text}")
        checked = max(1, CHECKED * work.shape[0] // math.prod(work.shape))
        rows += measure.measure(work, backends, False, seed, say, eager=False, checked_rows=checked)
    return rows


def render(rows: Sequence[measure.Row]) -> Table:
    """Return the table: a line for each chain, shape and dtype, relative to the copy, or to an empty launch if tiny."""
    groups: dict[tuple[str, str, str, str], dict[tuple[str, str], measure.Row]] = {}
    for row in rows:
        key = (row.chain, shape_text(row.shape), row.operands, row.dtype)
        groups.setdefault(key, {})[row.backend, row.direction] = row
    names = list(dict.fromkeys(row.backend for row in rows if row.backend not in (COPY, LAUNCH)))
    words = ("chain", "x", "operand", "dtype")
    times = [*(f"copy, {way} µs" for way in WAYS), *(f"{name}, {way}" for name in names for way in WAYS)]
    table = empty(TITLE, (*words, *times, "note"), {*words, "note"})
    for (chain, size, operands, dtype), group in groups.items():
        copies = [f"{group[COPY, way].time_us:.4g}" for way in WAYS]
        shares = [_share(group.get((name, way))) for name in names for way in WAYS]
        table.add_row(*map(Text, (chain, size, operands, dtype, *copies)), *shares, Text(_note(group, names)))
    return table


def _share(row: measure.Row | None) -> Text:
    if row is None or not row.copy_share:
        return Text("-" if row is None or row.ok else "WRONG", style="red")
    over = 1 / row.copy_share
    return Text(f"{over:.3f}" if over < 100 else f"{over:.4g}", style="yellow" if over > GOAL else "")


def _note(group: dict[tuple[str, str], measure.Row], names: Sequence[str]) -> str:
    notes = []
    for name in names:
        both = [row for way in WAYS if (row := group.get((name, way)))]
        launches = [f"{row.launches:.2f}" for row in both if row.launches]
        notes += [f"{name} {' '.join(launches)} launches"] if launches else []
        notes += list(dict.fromkeys(f"{name}: {row.note}" for row in both if row.note))
    return "; ".join(notes)
