"""Define the command `dualop bench`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dualop.cli import options, output
from dualop.cli.options import DEFAULT_CHAIN, Backends, Json


def bench(
    backend: Backends = "all",
    chain: Annotated[str, typer.Option(help="What to run.")] = DEFAULT_CHAIN,
    shape: Annotated[str, typer.Option(help="Several with commas (16384x8192; on the CPU 64x256).")] = "",
    dtype: Annotated[str, typer.Option(help="Several with commas, or all.")] = "float32,bfloat16",
    operand: Annotated[
        str, typer.Option(help="Form of the operands: last (N,), channel (C, 1, ...), row (M, 1), scalar, full.")
    ] = "last",
    problem: Annotated[str, typer.Option(help="linear95: the whole model, nn.Linear and the chain behind it.")] = "",
    suite: Annotated[
        str,
        typer.Option(metavar="PARTS", help="Many chains in one table: stages, chains, shapes, with commas, or all."),
    ] = "",
    host: Annotated[bool, typer.Option("--host", help="What a call costs the host, on tiny tensors.")] = False,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Leave torch.compile out.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    json_file: Json = None,
) -> None:
    """Time a chain beside a device copy, torch eager and torch.compile, and check the results before timing."""
    device = options.device()
    import dualop
    from dualop.backends.registry import BACKENDS, prepare
    from dualop.bench import linear95, measure, table, workloads
    from dualop.bench import suite as suites

    if problem not in ("", "linear95"):
        raise typer.BadParameter(f"{problem!r} is not known; there is linear95", param_hint="--problem")
    if operand not in workloads.FORMS:
        raise typer.BadParameter(f"{operand!r} is none of {', '.join(workloads.FORMS)}", param_hint="--operand")
    parts = list(suites.SUITE) if suite == "all" else [name.strip() for name in suite.split(",") if suite]
    if unknown := [name for name in parts if name not in suites.SUITE]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(suites.SUITE)}, all", param_hint="--suite")
    op, dtypes = dualop.chain(DEFAULT_CHAIN if problem else chain), options.dtypes(dtype)
    names, unavailable = options.backends(backend, op, device)
    out = output.console()
    more: dict[str, Any] = {"unavailable": unavailable}
    output.say_unavailable(out, unavailable)
    if host:
        from dualop.bench import host as hosts

        costs = hosts.run(names, device, not no_compile)
        for costs_of_direction in hosts.render(costs):
            out.print(costs_of_direction)
        about = {"device": table.device_info(device), "times": "wall clock on the host, microseconds a call"}
        output.write(json_file, {**about, **more, "rows": [vars(row) for row in costs]})
        return
    out.print(table.how(device), markup=False)
    rows: list[measure.Row] = []
    compiled = not no_compile
    if parts:
        names = [name for name in names if not BACKENDS[name].torch_formulas or backend != "all"]
        todo = suites.works(parts, dtypes, device)
        with output.bars(out) as bar:
            prepare(names, [work.planned for work in todo], bar("compiling"))
        with output.steps(out, suites.steps(len(todo), len(names))) as progress:
            rows = suites.run(todo, names, seed, progress)
        out.print(suites.render(rows))
    elif problem:
        total = len(dtypes) * linear95.steps(len(names), compiled, len(linear95.sizes(device)))
        with output.steps(out, total) as progress:
            agreements, rows = linear95.run(names, dtypes, device, compiled, seed, progress)
        out.print(linear95.render(agreements))
        more["agreements"] = [vars(a) for a in agreements]
    else:
        default = "16384x8192" if device.type == "cuda" else "64x256"
        shapes = [workloads.parse_shape(text) for text in (shape or default).split(",")]
        works = [workloads.Workload(op, size, name, device, (operand,)) for size in shapes for name in dtypes]
        with output.steps(out, len(works) * measure.steps(len(names), compiled)) as progress:
            for work in works:
                rows += measure.measure(work, names, compiled, seed, progress)
    groups: dict[tuple[str, str], list[measure.Row]] = {}
    for row in rows if not parts else ():
        groups.setdefault(("x".join(map(str, row.shape)), row.dtype), []).append(row)
    for (size_text, name), group in groups.items():
        out.print(table.render(group, f"{group[0].chain}   {size_text}   {name}"))
    output.write(json_file, table.as_json(rows, device, **more))
    if not all(row.ok for row in rows):
        raise typer.Exit(1)
