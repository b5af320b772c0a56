"""Define the command `dualop check`."""

from __future__ import annotations

from typing import Annotated

import typer

from dualop.cli import options, output
from dualop.cli.options import Backends, Json


def check(
    backend: Backends = "all",
    chain: Annotated[str, typer.Option(help="Only this one, in all cases (every stage and some chains).")] = "",
    dtype: Annotated[str, typer.Option(help="Several with commas, or all.")] = "all",
    seed: Annotated[int | None, typer.Option(help="Of the random inputs (a fresh one, printed).")] = None,
    json_file: Json = None,
) -> None:
    """Compare every backend with every other and with float64, forward and backward; exit 1 on a mismatch."""
    device = options.device()
    import secrets

    import dualop
    from dualop.backends.base import Planned
    from dualop.backends.registry import prepare
    from dualop.numerics import cases, report
    from dualop.numerics.check import Row, cross_check

    seed = secrets.randbelow(2**31) if seed is None else seed
    todo = [(chain, cases.CASES)] if chain else cases.checked_chains()
    plan = [(dualop.chain(text), case) for text, some in todo for case in some if device.type == "cuda" or not case.gpu]
    names, unavailable = options.backends(backend, plan[0][0], device)
    out = output.console()
    output.say_unavailable(out, unavailable)
    calls = [(op, case, name) for op, case in plan for name in options.dtypes(dtype) if case.has(name)]
    samples = [(op, cases.sample(op, case, name, device, seed)) for op, case, name in calls]
    where = "interpreted on the CPU" if device.type == "cpu" else "on the GPU"
    out.print(f"{len(samples)} calls of {', '.join(names)} {where}, seed {seed}; new kernels are compiled first")
    rows: list[Row] = []
    with output.bars(out) as bar:
        prepare(names, [Planned.of(op, s.x, s.operands) for op, s in samples], bar("compiling"))
        step = bar("checking")
        for i, (op, s) in enumerate(samples):
            rows += cross_check(op, s, names)
            step(i + 1, len(samples))
    ok = all(row.ok for row in rows)
    out.print(*report.checked(rows, by_quantity=bool(chain)), sep="\n")
    out.print(report.MEASURES, markup=False, highlight=False)
    out.print(
        f"{'ok' if ok else 'MISMATCH'}: {', '.join(names)} {where}, {len(samples)} calls, {len(rows)} comparisons, "
        f"seed {seed}",
        style="green" if ok else "red",
        highlight=False,
    )
    about = {"ok": ok, "seed": seed, "device": str(device), "unavailable": unavailable}
    output.write(json_file, {**about, "rows": report.as_json(rows)})
    if not ok:
        raise typer.Exit(1)
