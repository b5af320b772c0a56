"""Provide what commands print and write: the console, progress bars, files."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress

PIPED_WIDTH = 160  # a pipe has no width, and a table folded to 80 columns is hard to read or search


def console() -> Console:
    """Return the terminal, or what the output is piped into, without colours and wide enough for every table."""
    out = Console()
    return out if out.is_terminal else Console(width=PIPED_WIDTH)


def say_unavailable(out: Console, unavailable: dict[str, list[str]]) -> None:
    """Print which backends are left out, and why."""
    for name, reasons in unavailable.items():
        out.print(f"{name} does not run here and is left out: {'; '.join(reasons)}", style="yellow", markup=False)


@contextlib.contextmanager
def bars(out: Console) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Yield progress bars: `bar("checking")` returns a function of (done, total)."""
    with _progress(out) as progress:

        def bar(what: str) -> Callable[[int, int], None]:
            task = progress.add_task(what, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield bar


@contextlib.contextmanager
def steps(out: Console, total: int) -> Iterator[Callable[[str], None]]:
    """Yield one bar of `total` steps: a function to call with the name of the next step."""
    with _progress(out) as progress:
        task, done = progress.add_task("", total=total), itertools.count()
        yield lambda text: progress.update(task, description=text, completed=next(done))


def _progress(out: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=out, transient=True, disable=not out.is_terminal)


def write(path: Path | None, content: dict[str, Any] | str, option: str = "--json") -> None:
    """Write JSON or text to the file that `option` names, if it names one, and create its folder."""
    if path is None:
        return
    text = content if isinstance(content, str) else json.dumps(content, indent=1, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint=option) from None
