"""`dualop capabilities`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

import dualop
from dualop.bench.table import device_info
from dualop.capabilities import CAPABILITIES, run, table
from dualop.cli import options, output
from dualop.cli.options import Backends, Json
from dualop.errors import OperandError


def capabilities(
    backend: Backends = "all",
    name: Annotated[str, typer.Option(help="Only these rows, by the names in the JSON, with commas.")] = "",
    json_file: Json = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as Markdown, too.")] = None,
) -> None:
    """Try what PyTorch users do with an operator, a row each; exit 1 if a row fails."""
    device = options.device()
    names, unavailable = options.backends(backend, dualop.chain(options.DEFAULT_CHAIN), device)
    wanted = [text.strip() for text in name.split(",")] if name else None
    known = {capability.name for capability in CAPABILITIES}
    if unknown := [text for text in wanted or () if text not in known]:
        raise OperandError(f"no row is called {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    out = output.console()
    output.say_unavailable(out, unavailable)
    total, done = len(wanted or CAPABILITIES) * len(names), 0
    with output.bars(out) as bar:
        step = bar("trying")

        def progress(_text: str) -> None:
            nonlocal done
            done += 1
            step(done, total)

        rows = run(names, device, wanted, progress)
    out.print(table.render(rows))
    for note in table.notes(rows):
        out.print(note, markup=False, highlight=False)
    output.write(json_file, table.as_json(rows, device))
    page = table.markdown(rows, shlex.join(["dualop", *sys.argv[1:]]), device_info(device))
    output.write(markdown, page, "--markdown")
    if any(row.ok is False for row in rows):
        raise typer.Exit(1)
