"""Make the table of `dualop tune`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from dualop.bench.tuning import Row

TITLE = (
    "launches: rows a thread x threads (side by side), blocks of 256 threads an SM that registers are held down for, "
    "programs an SM where gradients are summed"
)
WORDS = ("backend", "direction", "chain", "x", "dtype", "heuristic", "best", "note")
COLUMNS = (*WORDS[:6], "µs", "best", "µs", "gain", "tried", "failed", "note")


def render(rows: Sequence[Row]) -> Table:
    """Return the table, with a line for each search."""
    table = Table(title=TITLE, title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in WORDS else "right", overflow="fold")
    for row in rows:
        size = "x".join(map(str, row.shape))
        what = (row.backend, row.direction, row.chain, size, row.dtype)
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
