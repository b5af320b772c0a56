"""Make what `dualop check` prints: the largest error of every pair, and the mismatches."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from dualop.numerics.check import Row

MOST_MISMATCHES = 40


def summary(rows: Sequence[Row], by_quantity: bool = False) -> Table:
    """Return a line for each dtype and pair, results and gradients apart, with the comparison nearest to its tolerance.

    `by_quantity` gives every gradient a line of its own.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        kind = row.quantity if by_quantity or row.quantity == "y" else "gradients"
        groups.setdefault((row.dtype, row.backend, row.against, kind), []).append(row)
    table = Table(title="largest errors", title_justify="left")
    for column in ("dtype", "backend", "against", "of"):
        table.add_column(column, no_wrap=True)
    for column in ("compared", "ulp", "allowed"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in ("where", ""):
        table.add_column(column)
    before = ""
    for (dtype, backend, against, kind), group in groups.items():
        if before and dtype != before:
            table.add_section()
        worst = max(group, key=_severity)
        bad = sum(not row.ok for row in group)
        cells = (
            dtype if dtype != before else "", backend, against, kind, str(len(group)), _ulp(worst),
            f"{worst.allowed_ulp:.4g}", _place(worst), f"{bad} differ" if bad else "ok",
        )  # fmt: skip
        table.add_row(*map(Text, cells), style="red" if bad else None)
        before = dtype
    return table


def mismatches(rows: Sequence[Row]) -> Table:
    """Return the comparisons that failed, the worst first, at most MOST_MISMATCHES."""
    bad = sorted((row for row in rows if not row.ok), key=_severity, reverse=True)
    shown = f", the worst {MOST_MISMATCHES}" if len(bad) > MOST_MISMATCHES else ""
    table = Table(title=f"{len(bad)} mismatches{shown}", title_justify="left", style="red")
    for column in ("backend", "against", "dtype", "ulp", "allowed", "where", "found"):
        table.add_column(column, overflow="fold")
    for row in bad[:MOST_MISMATCHES]:
        cells = (row.backend, row.against, row.dtype, _ulp(row), f"{row.allowed_ulp:.4g}", _place(row), row.note)
        table.add_row(*map(Text, cells))
    return table


def _severity(row: Row) -> float:
    """Return how close the error is to its tolerance; it is above 1 beyond it."""
    if row.max_ulp is None:
        return float("inf")
    return (0.0 if row.ok else 1.0) + (row.max_ulp / row.allowed_ulp if row.allowed_ulp else 0.0)


def _ulp(row: Row) -> str:
    return "inf" if row.max_ulp is None else f"{row.max_ulp:.4g}"


def _place(row: Row) -> str:
    index = "" if row.where is None else f"[{', '.join(map(str, row.where))}]"
    shape = "x".join(map(str, row.shape)) or "()"
    return f"{row.quantity}{index} of `{row.chain}`, {shape} {row.layout}"
