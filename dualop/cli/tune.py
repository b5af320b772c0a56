"""Define the command `dualop tune`."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from dualop.cli import options, output
from dualop.cli.options import DEFAULT_CHAIN, Backends, Dtypes, Json, Operand, Seed, Shapes

NO_GPU = "a search needs a GPU, and torch sees none; with DUALOP_INTERPRET=1 it times interpreted kernels"


def tune(
    backend: Backends = "all",
    chain: Annotated[str, typer.Option(help="What to search for.")] = DEFAULT_CHAIN,
    shape: Shapes = "",
    dtype: Dtypes = "float32,bfloat16",
    operand: Operand = "last",
    direction: Annotated[str, typer.Option(help="forward, backward or both.")] = "both",
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Search, and keep nothing.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Only delete what was kept for this GPU.")] = False,
    json_file: Json = None,
) -> None:
    """Search for the fastest launch (tile, threads, rows a thread) and keep it on disk, where later calls find it.

    An entry belongs to one GPU, chain, dtype and shape, rounded up to powers of two. A launch is kept if its results
    are right.
    """
    asked = os.environ.get("DUALOP_INTERPRET", "") not in ("", "0")  # options.device() sets it where there is no GPU
    device = options.device()
    import dualop
    from dualop.backends import registry
    from dualop.bench import tuning, workloads
    from dualop.errors import BackendUnavailable
    from dualop.launch import tuning as launches

    if device.type == "cpu" and not asked:
        raise BackendUnavailable(NO_GPU)
    out = output.console()
    if forget:
        files = launches.forget(device)
        registry.forget_launches()
        out.print("\n".join(f"deleted {file}" for file in files) or "nothing was kept", markup=False, highlight=False)
        return
    options.one_of(operand, workloads.FORMS, "--operand")
    both = (workloads.FORWARD, workloads.BACKWARD)
    directions = both if direction == "both" else (options.one_of(direction, (*both, "both"), "--direction"),)
    op = dualop.chain(chain)
    names, unavailable = options.backends(backend, op, device)
    works = options.workloads(op, shape, "8x64", dtype, operand, device)
    chooses = lambda name: registry.BACKENDS[name].heuristic(op, works[0].layout(), workloads.FORWARD) is not None
    if backend == "all":
        output.say_unavailable(out, unavailable)
        names = [name for name in names if chooses(name)]
    elif mute := [name for name in names if not chooses(name)]:
        raise typer.BadParameter(f"{mute[0]} has no launches to choose", param_hint="--backend")
    if not names:
        raise BackendUnavailable("no backend that has launches to choose runs here")
    tasks = [tuning.Task(work, name, way) for work in works for name in names for way in directions]
    if device.type == "cpu":
        out.print("Interpreted kernels: these times say nothing about a GPU.", style="yellow")
    with output.bars(out) as bar:
        tuning.prepare(tasks, bar("compiling"))
        rows = tuning.run(tasks, seed, not dry_run, bar)
    out.print(tuning.render(rows))
    file, count = launches.kept(device)
    said = "nothing was kept" if dry_run else f"{file} holds {count} launches"
    out.print(said, markup=False, highlight=False)
    output.write(json_file, tuning.as_json(rows, device))
    if not all(row.ok for row in rows):
        raise typer.Exit(1)
