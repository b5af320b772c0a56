"""Make what `dualop verify` prints and writes: the table, for a terminal, as Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from dualop.numerics.verify import EAGER_SLACK, LIMIT, ORDINARY, Row

WORDS = ("dtype", "backend", "of", "verdict")
COLUMNS = (
    "dtype", "backend", "of", "S", "ulp", f"ulp, |x|≤{ORDINARY:g}", "eager", f"eager, |x|≤{ORDINARY:g}", "worst at",
    "bits", "exact", "got", "verdict",
)  # fmt: skip

ABOUT = f"""\
`ulp` is the largest error over all numbers of the dtype, against float64: divided by the spacing of the dtype at
max(|exact|, S / 1024), where S is the largest magnitude that the chain (or its derivative) takes over the float32
inputs with |x| <= {ORDINARY:g}. Beside it the largest over |x| <= {ORDINARY:g} alone, and both for torch eager in the
same dtype. Allowed are {LIMIT["float32"]:g} ulp in float32, {LIMIT["bfloat16"]:g} ulp in bfloat16 and float16, and no
more than eager's (a difference of {EAGER_SLACK:g} ulp is none); no finite input may give NaN. Then the worst input, its
bits, what is exact there and what came.
"""


def verdict(row: Row) -> str:
    """Return ok, or what is wrong; also why an error is allowed, and what was not judged."""
    said = [row.problem or "ok", row.excuse if row.problem else ""]
    said += [f"{row.at_jumps} at a jump"] if row.at_jumps else []
    said += [f"{row.unjudged} not judged"] if row.unjudged else []
    return "; ".join(filter(None, said))


def how(row: Row) -> str:
    """Return what was covered, all numbers or some, and on which kernels."""
    numbers = f"{row.inputs:,} numbers, sampled" if row.sampled else f"all {row.inputs:,} numbers"
    return f"{row.dtype}: {numbers}{', interpreted' if row.interpreted else ''}"


def render(rows: Sequence[Row]) -> Table:
    """Return the table with the rows of one chain."""
    table = Table(title=rows[0].chain, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in WORDS else "right", overflow="fold")
    before = ""
    for row in rows:
        if before and row.dtype != before:
            table.add_section()
        before = row.dtype
        style = "red" if not row.ok else "yellow" if row.problem else None
        table.add_row(*map(Text, _cells(row)), style=style)
    return table


def markdown(rows: Sequence[Row], command: str, machine: dict[str, Any], seconds: float) -> str:
    """Return the page that is kept in the repository, with the command that writes it and the machine."""
    where = ", ".join(f"{key} {machine[key]}" for key in ("torch", "triton", "cuda", "python") if machine.get(key))
    ran = "; ".join(dict.fromkeys(map(how, rows)))
    lines = [
        "# Every number of a dtype against float64", "",
        f"    {command}", "",
        f"{machine['name']}, {where}. {ran}. {seconds:.0f} s. **{summary(rows)}**", "",
        ABOUT,
        "| " + " | ".join(("chain", *(c.replace("|", "\\|") for c in COLUMNS))) + " |",
        "|---|" + "".join("---|" if c in WORDS else "---:|" for c in COLUMNS),
    ]  # fmt: skip
    for row in rows:
        chain = f"`{row.chain}`".replace("|", "\\|")
        lines.append("| " + " | ".join((chain, *_cells(row))) + " |")
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """Return one line on all of it."""
    bad, excused = sum(not row.ok for row in rows), sum(row.ok and bool(row.problem) for row in rows)
    judged = f"{len(rows)} figures of {len({row.chain for row in rows})} chains"
    allowed = f", {excused} allowed for a reason" if excused else ""
    return f"{judged}: {f'{bad} not ok' if bad else 'all ok'}{allowed}"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the fields of every row and its verdict; a figure that is infinite or NaN becomes a text."""
    plain = lambda value: str(value) if isinstance(value, float) and not math.isfinite(value) else value
    fields = [{key: plain(value) for key, value in asdict(row).items()} for row in rows]
    more = [{"ok": row.ok, "verdict": verdict(row)} for row in rows]
    return [a | b for a, b in zip(fields, more, strict=True)]


def _cells(row: Row) -> tuple[str, ...]:
    place = (f"{row.worst:.9g}", row.bits, f"{row.exact:.9g}", f"{row.actual:.9g}") if row.max_ulp else ("",) * 4
    ulps = (row.max_ulp, row.ordinary_ulp, row.eager_ulp, row.eager_ordinary_ulp)
    return (row.dtype, row.backend, row.quantity, f"{row.scale:.4g}", *map(_ulp, ulps), *place, verdict(row))


def _ulp(value: float) -> str:
    return f"{value:.4f}" if value < 100 else f"{value:.4g}"
