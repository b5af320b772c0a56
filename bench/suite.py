"""Run `dualop bench --suite`: one table with a line for each chain and dtype, relative to the speed of a copy.

The parts of the suite:

- `stages`: each stage alone
- `chains`
- `shapes`: channels, a residual
- `rows`: images of 7 x 7 to 112 x 112, odd features, a slice: rows that are no whole 16-byte vectors, or start anywhere
- `strided`: every second element, a transposed x or operand, q of an attention layer
- `medium`: tensors that a copy moves in a few microseconds

Every kernel is compiled before the first one is timed, in as many processes as there are cores. Results are checked on
the first rows only; `dualop check` and `dualop verify` check them thoroughly. torch.compile is not checked here, since
it would compile everything once more for these rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.table import Table
from rich.text import Text

import dualop
from dualop.bench import measure
from dualop.bench.table import empty
from dualop.bench.workloads import BACKWARD, COPY, FORWARD, LAUNCH, Workload
from dualop.language.stages import STAGES
from dualop.numerics.cases import DEFAULT_CHAIN

TITLE = "time over that of a copy of the same bytes, forward and backward"
WAYS = (FORWARD, BACKWARD)
GOAL = 1.1  # times the copy's time
CHECKED = 1 << 21  # elements of x

LARGE, NCHW = (16384, 8192), (64, 256, 56, 56)
IMAGES = ((64, 256, 7, 7), (128, 512, 14, 14), (64, 256, 28, 28), (32, 256, 56, 56))
SQUARE, GATED, HEADS = (8192, 8192), (8192, 14336), (4, 16, 2048, 128)
MEDIUM = ((1024, 8192), (4096, 1024), (8192, 768), (16384, 256), (2048, 2048), (1024, 4096), (256, 4096), (128, 512))
SMALL = {  # on the CPU
    LARGE: (8, 64),
    NCHW: (2, 3, 4, 5),
    **dict(zip(IMAGES, ((2, 3, 7, 7), (3, 5, 2, 2), (2, 4, 4, 4), (3, 2, 3, 3)), strict=True)),
    (64, 64, 112, 112): (2, 2, 5, 4),
    (16, 32, 16, 64, 64): (2, 3, 2, 4, 3),
    (8192, 1000): (4, 20),
    (4096, 50257): (3, 41),
    (8192, 33): (8, 33),
    (8192, 4096): (5, 32),
    SQUARE: (8, 12),
    GATED: (4, 36),
    HEADS: (2, 3, 4, 8),
    **dict(zip(MEDIUM, ((4, 32), (8, 16), (8, 12), (16, 8), (6, 24), (4, 28), (2, 40), (2, 16)), strict=True)),
}


class Entry(NamedTuple):
    """Describe a line of the suite, without its dtype: the fields of a Workload, of which the chain is a text."""

    chain: str
    shape: tuple[int, ...]
    operands: tuple[str, ...] = ("last",)
    arrange: str = "dense"
    operand_arrange: str = "dense"


def entry(chain: str, shape: tuple[int, ...], operands: str = "last", *arrange: str) -> Entry:
    """Return an Entry; `operands` is a text such as "position, full"."""
    return Entry(chain, shape, tuple(operands.split(", ")), *arrange)


TWO = (DEFAULT_CHAIN, "add | gelu")
SUITE: dict[str, tuple[Entry, ...]] = {
    "stages": (
        *(entry(stage.example, LARGE) for stage in STAGES.values()),
        entry('gelu(approximate="tanh")', LARGE),
    ),
    "chains": (
        entry(DEFAULT_CHAIN, LARGE),
        entry("add | gelu", LARGE),
        entry("add | mish", LARGE),
        entry("add | softplus | tanh", LARGE),
        entry("add | silu | mul(scale)", LARGE),
        entry("sigmoid | mul(x)", LARGE),
    ),
    "shapes": (
        entry("add | relu", NCHW, "channel"),
        entry(DEFAULT_CHAIN, NCHW, "channel"),
        entry("add", LARGE, "full"),
        entry("add | gelu", LARGE, "full"),
        entry("add | gelu", LARGE, "row"),
    ),
    "rows": tuple(
        entry(chain, shape, operands, arrange)
        for shape, operands, arrange in (
            *((shape, "channel", "dense") for shape in (*IMAGES, (64, 64, 112, 112), (16, 32, 16, 64, 64))),
            *((shape, "channel", "channels_last") for shape in IMAGES),
            *((shape, "last", "dense") for shape in ((8192, 1000), (4096, 50257), (8192, 33))),
            ((8192, 4096), "last", "inner"),  # x[:, 1:-1] of 8192 x 4098
        )
        for chain in TWO
    ),
    "strided": (
        entry("add | gelu", GATED, "last", "every second"),  # h[..., ::2]
        entry("silu | mul(up)", GATED, "full", "every second", "beside"),  # h[..., ::2] and h[..., 1::2]
        entry("gelu", SQUARE, "last", "transposed"),
        entry("add | gelu", SQUARE, "last", "transposed"),
        entry("add | gelu", SQUARE, "full", "dense", "transposed"),
        entry("add | gelu", SQUARE, "full", "transposed", "transposed"),
        # q of rotary embeddings: (batch, length, heads, size), transposed.
        entry("mul(cos)", HEADS, "position", "heads"),
        entry("mul(cos) | add(rotated)", HEADS, "position, full", "heads", "dense"),
        entry("mul(cos) | add(rotated)", HEADS, "position, full", "heads", "heads"),
    ),
    "medium": tuple(entry(chain, shape) for shape in MEDIUM for chain in TWO),
}


def works(names: Sequence[str], dtypes: Sequence[str], device: torch.device) -> list[Workload]:
    """Return the workloads of the named parts; on the CPU, where kernels are interpreted, they have small shapes."""
    sized = lambda shape: SMALL[shape] if device.type == "cpu" else shape
    return [
        Workload(dualop.chain(text), sized(shape), dtype, device, *lies)
        for name in names
        for text, shape, *lies in SUITE[name]
        for dtype in dtypes
    ]


def run(
    todo: Sequence[Workload], backends: Sequence[str], compiled: bool, seed: int, progress: measure.Progress
) -> list[measure.Row]:
    """Return the rows of all workloads: the copy, the backends and, on request, torch.compile."""
    rows: list[measure.Row] = []
    for work in todo:
        say = lambda text, about=f"{work.chain}, {work.dtype}": progress(f"{about}: {text}")
        checked = max(1, CHECKED * work.shape[0] // math.prod(work.shape))
        rows += measure.measure(work, backends, compiled, seed, say, eager=False, checked_rows=checked)
    return rows


def render(rows: Sequence[measure.Row]) -> Table:
    """Return the table: a line for each chain, shape and dtype, relative to the copy, or to an empty launch if tiny."""
    groups: dict[tuple[str, str, str, str], dict[tuple[str, str], measure.Row]] = {}
    for row in rows:
        key = (row.chain, row.size, row.operands, row.dtype)
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
