"""Define the command `dualop bench`."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Annotated, Any

import typer

from dualop.cli import options, output
from dualop.cli.options import DEFAULT_CHAIN, Backends, Dtypes, Json, Memory, Operand, Seed, Shapes


def bench(
    backend: Backends = "all",
    chain: Annotated[str, typer.Option(help="What to run.")] = DEFAULT_CHAIN,
    shape: Shapes = "",
    dtype: Dtypes = "float32,bfloat16",
    operand: Operand = "last",
    memory: Memory = "dense",
    problem: Annotated[str, typer.Option(help="linear95: the whole model, nn.Linear and the chain behind it.")] = "",
    suite: Annotated[
        str,
        typer.Option(
            metavar="PARTS",
            help="Many in one table: stages, chains, shapes, rows, strided, medium, with commas, or all.",
        ),
    ] = "",
    host: Annotated[bool, typer.Option("--host", help="What a call costs the host, on tiny tensors.")] = False,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="With torch.compile (yes, but in a suite no).")
    ] = None,
    seed: Seed = 0,
    json_file: Json = None,
) -> None:
    """Time a chain beside a device copy, torch eager and torch.compile, and check the results before timing."""
    device = options.device()
    import dualop
    from dualop.backends.registry import BACKENDS, prepare
    from dualop.bench import linear95, measure, table, workloads
    from dualop.bench import suite as suites
    from dualop.numerics import cases, report

    options.one_of(problem, ("", "linear95"), "--problem")
    options.one_of(operand, workloads.FORMS, "--operand")
    options.one_of(memory, cases.ARRANGEMENTS, "--memory")
    asked = [options.one_of(name.strip(), (*suites.SUITE, "all"), "--suite") for name in suite.split(",") if suite]
    parts = list(suites.SUITE) if "all" in asked else asked
    op, dtypes = dualop.chain(DEFAULT_CHAIN if problem else chain), options.dtypes(dtype)
    names, unavailable = options.backends(backend, op, device)
    out = output.console()
    more: dict[str, Any] = {"unavailable": unavailable}
    compiled = not parts if compiled is None else compiled
    output.say_unavailable(out, unavailable)
    if host:
        from dualop.bench import host as hosts

        costs = hosts.run(names, device, compiled)
        out.print(*hosts.render(costs), sep="\n")
        about = {"device": table.device_info(device), "times": "wall clock on the host, microseconds a call"}
        output.write(json_file, {**about, **more, "rows": [vars(row) for row in costs]})
        return
    out.print(table.how(device), markup=False)
    rows: list[measure.Row] = []
    if parts:
        names = [name for name in names if not BACKENDS[name].torch_formulas or backend != "all"]
        todo = suites.works(parts, dtypes, device)
        with output.bars(out) as bar:
            prepare(names, [work.planned for work in todo], bar("compiling"))
        with output.steps(out, len(todo) * measure.steps(len(names), compiled, eager=False)) as progress:
            rows = suites.run(todo, names, compiled, seed, progress)
        out.print(suites.render(rows))
    elif problem:
        total = len(dtypes) * linear95.steps(len(names), compiled, len(linear95.sizes(device)))
        with output.steps(out, total) as progress:
            agreements, rows = linear95.run(names, dtypes, device, compiled, seed, progress)
        out.print(linear95.render(agreements))
        more["agreements"] = [vars(a) for a in agreements]
    else:
        works = options.workloads(op, shape, "64x256", dtype, operand, device)
        works = [dataclasses.replace(work, arrange=memory) for work in works]
        with output.steps(out, len(works) * measure.steps(len(names), compiled)) as progress:
            for work in works:
                rows += measure.measure(work, names, compiled, seed, progress)
    title_of = lambda row: f"{row.chain}   {row.size}   {row.dtype}"
    for title, group in itertools.groupby(rows if not parts else (), title_of):
        out.print(table.render(list(group), title))
    if not (parts or problem):
        out.print(report.MEASURES, markup=False, highlight=False)
    output.write(json_file, table.as_json(rows, device, **more))
    if not all(row.ok for row in rows):
        raise typer.Exit(1)
