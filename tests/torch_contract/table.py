"""The table that a run of the tests writes: a line for each row, a column for each backend, and notes below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch_contract.rows import NOT_ALLOWED, Row

_MARKS = {True: "ok", False: "FAILS", None: "-"}


class Outcome(NamedTuple):
    """What came of one row on one backend: `ok` is None if this machine cannot try it, and `note` says why."""

    ok: bool | None
    note: str = ""


Outcomes = Mapping[tuple[str, str], Outcome]
"""By the row's name and the backend's. A pair that is not there was not run."""


def page(
    rows: Sequence[Row], backends: Sequence[str], outcomes: Outcomes, command: str, machine: Mapping[str, Any]
) -> str:
    """Return the page in Markdown, with the command that writes it and the machine that it ran on."""
    where = ", ".join(f"{key} {machine[key]}" for key in ("torch", "triton", "python") if machine.get(key))
    interpreted = "" if machine.get("cuda") else ", kernels interpreted"
    lines = [
        "# What a PyTorch user may do with a chain", "", f"    {command}", "",
        f"{machine['name']}, {where}{interpreted}. `-` where that machine cannot tell.", "",
        "| | | " + " | ".join(backends) + " |", "|---|---|" + "---|" * len(backends),
    ]  # fmt: skip
    for row in rows:
        cells = (_cell(row, outcomes.get((row.name, backend))) for backend in backends)
        lines.append(f"| {row.group} | {row.text} | ".replace("\n", " ") + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(rows, backends, outcomes))]) + "\n"


def _cell(row: Row, outcome: Outcome | None) -> str:
    if outcome is None:
        return ""
    return "refused" if row.group == NOT_ALLOWED and outcome.ok else _MARKS[outcome.ok]


def notes(rows: Sequence[Row], backends: Sequence[str], outcomes: Outcomes) -> list[str]:
    """Return a line for each failure, then one for each reason why something was not tried."""
    failures: list[str] = []
    skipped: dict[str, dict[str, None]] = {}
    for row in rows:
        for backend in backends:
            outcome = outcomes.get((row.name, backend), Outcome(None, "not part of that run"))
            note = " ".join(outcome.note.split())
            if outcome.ok is False:
                failures.append(f"{backend}, {row.text}: {note}")
            elif outcome.ok is None:
                skipped.setdefault(note, {})[row.name] = None
    return [*failures, *(f"not tried, {reason}: {', '.join(names)}" for reason, names in skipped.items())]
