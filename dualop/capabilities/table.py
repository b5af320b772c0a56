"""What `dualop capabilities` prints: a line a capability, a column a backend, and what went wrong below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from dualop.capabilities import NOT_ALLOWED, Row

_MARKS = {True: ("ok", "green"), False: ("FAILS", "red"), None: ("-", "yellow")}


def render(rows: Sequence[Row]) -> Table:
    """A line for each capability; `-` where this machine cannot tell."""
    backends = list(dict.fromkeys(row.backend for row in rows))
    table = Table(title=f"torch {torch.__version__}", title_justify="left")
    table.add_column("")
    table.add_column("what a user may do", overflow="fold")
    for backend in backends:
        table.add_column(backend, no_wrap=True)
    before = ""
    for group, text, cells in _lines(rows, backends):
        if before and group != before:
            table.add_section()
        table.add_row(Text(group if group != before else ""), Text(text), *cells)
        before = group
    return table


def markdown(rows: Sequence[Row], command: str, machine: dict[str, Any]) -> str:
    """The page that is kept in the repository, with the command that writes it and what it ran on."""
    backends = list(dict.fromkeys(row.backend for row in rows))
    where = ", ".join(f"{key} {machine[key]}" for key in ("torch", "triton", "python") if machine.get(key))
    interpreted = "" if machine.get("cuda") else ", kernels interpreted"
    lines = [
        "# What a PyTorch user may do with a chain", "", f"    {command}", "",
        f"{machine['name']}, {where}{interpreted}. `-` where that machine cannot tell.", "",
        "| | | " + " | ".join(backends) + " |", "|---|---|" + "---|" * len(backends),
    ]  # fmt: skip
    for group, text, cells in _lines(rows, backends):
        lines.append(f"| {group} | {text} | ".replace("\n", " ") + " | ".join(cell.plain for cell in cells) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(rows))]) + "\n"


def _lines(rows: Sequence[Row], backends: Sequence[str]) -> Iterator[tuple[str, str, list[Text]]]:
    """(group, capability, a cell for each backend)."""
    lines: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        lines.setdefault((row.group, row.name), {})[row.backend] = row
    for (group, _), line in lines.items():
        yield group, next(iter(line.values())).capability, [_cell(line.get(backend)) for backend in backends]


def _cell(row: Row | None) -> Text:
    if row is None:
        return Text("")
    mark, style = _MARKS[row.ok]
    return Text("refused" if row.group == NOT_ALLOWED and row.ok else mark, style)


def notes(rows: Sequence[Row]) -> list[str]:
    """A line for each failure, then one for each reason why something could not be tried."""
    failures = [f"{row.backend}, {row.capability}: {row.note}" for row in rows if row.ok is False]
    skipped: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.ok is None:
            skipped.setdefault(row.note, {})[row.name] = None
    return [*failures, *(f"not tried, {reason}: {', '.join(names)}" for reason, names in skipped.items())]


def as_json(rows: Sequence[Row], device: torch.device) -> dict[str, Any]:
    return {
        "ok": all(row.ok is not False for row in rows),
        "torch": torch.__version__,
        "device": str(device),
        "rows": [vars(row) for row in rows],
    }
