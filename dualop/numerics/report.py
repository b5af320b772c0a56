"""Report what `dualop check` and `dualop verify` have found, as a table for a terminal, as Markdown and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from dualop.numerics import check, verify
from dualop.numerics.verify import EAGER_SLACK, LIMIT, ORDINARY

WORDS = ("chain", "dtype", "backend", "against", "of", "in", "where", "verdict")  # columns of words, not of numbers
MOST_MISMATCHES = 40
# What `dualop check` and `dualop bench` print with their figures.
MEASURES = (
    "Errors are against float64. y, grad x and the gradient of an operand of full size are in ulps: the error divided "
    "by the spacing of the dtype at max(|exact|, S / 1024), S the largest magnitude in the tensor. The gradient of a "
    "broadcast operand is a sum: its error is divided by u Σ|terms|, u the unit roundoff of its dtype (half of eps). "
    "In float32 the rounding of x + bias alone moves grad x by many ulps where a slope is near 0; 'beyond rounding' is "
    "the error against float64 that starts from x + bias (or another first stage with an operand) as float32 rounds it."
)


def ulp_text(ulp: float | None) -> str:
    """Return a number of ulps as tables show it; None is infinite."""
    return "inf" if ulp is None else f"{ulp:.4f}" if ulp < 100 else f"{ulp:.4g}"


def table(title: str, columns: Mapping[str, Callable[[Any], str]], items: Iterable[Any], style: Any) -> Table:
    """Return a table of what `columns` say of each item, dtype by dtype; `style(item)` is the row's colour."""
    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column, justify="left" if column in WORDS else "right", overflow="fold")
    before = ""
    for item in items:
        cells = {name: text(item) for name, text in columns.items()}
        if before and cells["dtype"] != before:
            made.add_section()
        before = cells["dtype"]
        made.add_row(*map(Text, cells.values()), style=style(item))
    return made


def as_json(rows: Sequence[check.Row] | Sequence[verify.Row]) -> list[dict[str, Any]]:
    """Return the fields of every row and its verdict; a figure that is infinite or NaN becomes a text."""
    plain = lambda value: str(value) if isinstance(value, float) and not math.isfinite(value) else value
    fields = [{**vars(row), "ok": row.ok, "verdict": row.verdict} for row in rows]
    return [{key: plain(value) for key, value in row.items()} for row in fields]


# ---- check -----------------------------------------------------------------------------------------------------------


def _place(row: check.Row) -> str:
    index = "" if row.where is None else f"[{', '.join(map(str, row.where))}]"
    shape = "x".join(map(str, row.shape)) or "()"
    return f"{row.quantity}{index} of `{row.chain}`, {shape} {row.layout}"


def _verdict(rows: Sequence[check.Row]) -> str:
    bad = sum(not row.ok for row in rows)
    return rows[0].verdict if len(rows) == 1 else f"{bad} differ" if bad else "ok"


def _kind(row: check.Row) -> str:
    """Return y, grad_x or operands: which comparisons of one unit stand in one line."""
    return row.quantity if row.quantity in ("y", "grad_x") else "operands"


# Of comparisons of one dtype, pair and unit, the one nearest to its tolerance first.
CHECKED: dict[str, Callable[[Sequence[check.Row]], str]] = {
    "dtype": lambda rows: rows[0].dtype,
    "backend": lambda rows: rows[0].backend,
    "against": lambda rows: rows[0].against,
    "of": lambda rows: _kind(rows[0]) if len({row.quantity for row in rows}) > 1 else rows[0].quantity,
    "compared": lambda rows: str(len(rows)),
    "in": lambda rows: rows[0].unit,
    "error": lambda rows: ulp_text(rows[0].error),
    "allowed": lambda rows: f"{rows[0].allowed:.4g}",
    "beyond rounding": lambda rows: "" if rows[0].beyond_rounding is None else ulp_text(rows[0].beyond_rounding),
    "where": lambda rows: _place(rows[0]),
    "verdict": _verdict,
}


def checked(rows: Sequence[check.Row], by_quantity: bool = False) -> list[Table]:
    """Return a table with a line for each dtype and pair, and one of what failed, if any.

    Results, gradients of x, of operands of full size and of broadcast operands stand apart. A line shows the comparison
    nearest to its tolerance. `by_quantity` gives every operand a line of its own. Of the
    failures there are at most MOST_MISMATCHES, the worst.
    """
    kind = lambda row: row.quantity if by_quantity else _kind(row)
    group = lambda row: (row.dtype, row.backend, row.against, kind(row), row.unit)
    groups: dict[tuple[str, ...], list[check.Row]] = {group(row): [] for row in rows}
    worst = sorted(rows, key=lambda row: row.severity, reverse=True)
    for row in worst:
        groups[group(row)].append(row)
    red = lambda rows: None if all(row.ok for row in rows) else "red"
    tables = [table("largest errors", CHECKED, groups.values(), red)]
    if bad := [row for row in worst if not row.ok]:
        shown = f", the worst {MOST_MISMATCHES}" if len(bad) > MOST_MISMATCHES else ""
        ones = [[row] for row in sorted(bad[:MOST_MISMATCHES], key=lambda row: row.dtype)]
        tables.append(table(f"{len(bad)} mismatches{shown}", CHECKED, ones, red))
    return tables


# ---- verify ----------------------------------------------------------------------------------------------------------

_at_worst = lambda text: lambda row: text(row) if row.max_ulp else ""
VERIFIED: dict[str, Callable[[verify.Row], str]] = {
    "dtype": lambda row: row.dtype,
    "backend": lambda row: row.backend,
    "of": lambda row: row.quantity,
    "S": lambda row: f"{row.scale:.4g}",
    "ulp": lambda row: ulp_text(row.max_ulp),
    f"ulp, |x|≤{ORDINARY:g}": lambda row: ulp_text(row.ordinary_ulp),
    "eager": lambda row: ulp_text(row.eager_ulp),
    f"eager, |x|≤{ORDINARY:g}": lambda row: ulp_text(row.eager_ordinary_ulp),
    "worst at": _at_worst(lambda row: f"{row.worst:.9g}"),
    "bits": _at_worst(lambda row: row.bits),
    "exact": _at_worst(lambda row: f"{row.exact:.9g}"),
    "got": _at_worst(lambda row: f"{row.actual:.9g}"),
    "verdict": lambda row: row.verdict,
}

ABOUT = f"""\
`ulp` is the largest error over all numbers of the dtype, against float64: divided by the spacing of the dtype at
max(|exact|, S / 1024), where S is the largest magnitude that the chain (or its derivative) takes over the float32
inputs with |x| <= {ORDINARY:g}. Beside it the largest over |x| <= {ORDINARY:g} alone, and both for torch eager in the
same dtype. Allowed are {LIMIT["float32"]:g} ulp in float32, {LIMIT["bfloat16"]:g} ulp in bfloat16 and float16, and no
more than eager's (a difference of {EAGER_SLACK:g} ulp is none); no finite input may give NaN. Then the worst input, its
bits, what is exact there and what came.
"""


def verified(rows: Sequence[verify.Row]) -> Table:
    """Return the table of one chain's rows."""
    colour = lambda row: "red" if not row.ok else "yellow" if row.problem else None
    return table(rows[0].chain, VERIFIED, rows, colour)


def coverage(rows: Sequence[verify.Row]) -> list[str]:
    """Return for each dtype what was covered, all numbers or some, and on which kernels."""

    def covered(row: verify.Row) -> str:
        numbers = f"{row.inputs:,} numbers, sampled" if row.sampled else f"all {row.inputs:,} numbers"
        return f"{row.dtype}: {numbers}{', interpreted' if row.interpreted else ''}"

    return list(dict.fromkeys(map(covered, rows)))


def summary(rows: Sequence[verify.Row]) -> str:
    """Return one line on all of it."""
    bad, excused = sum(not row.ok for row in rows), sum(row.ok and bool(row.problem) for row in rows)
    judged = f"{len(rows)} figures of {len({row.chain for row in rows})} chains"
    allowed = f", {excused} allowed for a reason" if excused else ""
    return f"{judged}: {f'{bad} not ok' if bad else 'all ok'}{allowed}"


def markdown(rows: Sequence[verify.Row], command: str, machine: Mapping[str, Any], seconds: float) -> str:
    """Return the page that is kept in the repository, with the command that writes it and the machine."""
    where = ", ".join(f"{key} {machine[key]}" for key in ("torch", "triton", "cuda", "python") if machine.get(key))
    escape = "|", r"\|"
    columns = {"chain": lambda row: f"`{row.chain}`", **VERIFIED}
    line = lambda cells: f"| {' | '.join(cell.replace(*escape) for cell in cells)} |"
    return "\n".join(
        [
            "# Every number of a dtype against float64", "", f"    {command}", "",
            f"{machine['name']}, {where}. {'; '.join(coverage(rows))}. {seconds:.0f} s. **{summary(rows)}**", "",
            ABOUT,
            line(columns),
            "|---|" + "".join("---|" if column in WORDS else "---:|" for column in VERIFIED),
            *(line(text(row) for text in columns.values()) for row in rows),
            "",
        ]
    )  # fmt: skip
