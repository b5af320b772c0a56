"""Define the commands `dualop show` and `dualop stages`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from dualop.cli import output


def show(
    chain: Annotated[str, typer.Argument(metavar="CHAIN")],
    backend: Annotated[str, typer.Option(help="One that `dualop doctor` lists (the first).")] = "",
) -> None:
    """Print the source that a backend compiles for a chain."""
    import dualop
    from dualop.backends.registry import BACKENDS
    from dualop.errors import BackendUnavailable

    backend = backend or next(iter(BACKENDS))
    if backend not in BACKENDS:
        raise BackendUnavailable(f"unknown backend {backend!r}; there are {', '.join(BACKENDS)}")
    source = BACKENDS[backend].source(dualop.chain(chain))
    out = Console()
    if out.is_terminal:
        from rich.syntax import Syntax

        out.print(Syntax(source, "cuda" if "__global__" in source else "python"))
    else:
        typer.echo(source, nl=not source.endswith("\n"))


def stages() -> None:
    """Print the table of stages with their parameters and defaults."""
    from rich.table import Table
    from rich.text import Text

    from dualop.language.stages import STAGES

    table = Table("stage", "also", "written", "alone, as a chain", title="stages", title_justify="left")
    for name, stage in STAGES.items():
        table.add_row(*map(Text, (name, ", ".join(stage.aliases), stage.signature, stage.example)))
    output.console().print(table)
