"""Define the command `dualop verify`."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from dualop.cli import options, output
from dualop.cli.options import DEFAULT_CHAIN, Json


def verify(
    chain: Annotated[
        list[str] | None, typer.Argument(metavar="CHAIN", help="Several are possible (the default chain).")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="Those that `dualop doctor` lists, with commas, or all [default: all that are judged].")
    ] = "",
    dtype: Annotated[str, typer.Option(help="Several with commas.")] = "float32,bfloat16,float16",
    all_stages: Annotated[
        bool, typer.Option("--all-stages", help="Every stage by itself, and the default chain.")
    ] = False,
    operand: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help="What an operand is (0 added, 1.25 times, by 3, 0.5 compared)."),
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Only every so many-th float32, a power of two (1; interpreted 16384).")
    ] = None,
    json_file: Json = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the table as Markdown, too.")] = None,
) -> None:
    """Compare forward and derivative with float64 on every number of a dtype; exit 1 on an error beyond its limit.

    Chains have one variable: operands are numbers. Without a GPU, kernels are interpreted and float32 is sampled.
    """
    device = options.device()
    import dualop
    from dualop.backends.registry import BACKENDS, prepare
    from dualop.bench.table import device_info
    from dualop.errors import BackendUnavailable
    from dualop.language.stages import STAGES
    from dualop.numerics import cases, report
    from dualop.numerics import verify as numbers

    texts = [*(chain or [])]
    if all_stages:
        texts += [*(stage.example for stage in STAGES.values()), 'gelu(approximate="tanh")']
    if all_stages or not chain:
        texts.append(DEFAULT_CHAIN)
    chains = list(dict.fromkeys(map(dualop.chain, texts)))
    given, dtypes = _numbers(operand or []), options.dtypes(dtype)
    if unknown := [name for name in given if not any(name in op.operands for op in chains)]:
        raise typer.BadParameter(f"no chain takes {', '.join(unknown)}", param_hint="--operand")
    names, unavailable = options.backends(backend or "all", chains[0], device)
    names = [name for name in names if backend or not BACKENDS[name].torch_formulas]
    stride = stride if stride is not None else 1 if device.type == "cuda" else cases.SAMPLED_STRIDE
    if stride < 1 or stride & (stride - 1) or stride > 2**16:
        raise typer.BadParameter(f"{stride} is no power of two up to 65536", param_hint="--stride")
    out = output.console()
    output.say_unavailable(out, unavailable)
    if not names:
        raise BackendUnavailable("no backend that is judged runs here")
    where = "on the GPU" if device.type == "cuda" else "interpreted on the CPU"
    sampled = f"; float32 is sampled, every {stride:,}th number" if stride > 1 else ""
    out.print(f"{', '.join(names)} {where}{sampled}", highlight=False)
    rows: list[numbers.Row] = []
    start = time.monotonic()
    with output.bars(out) as bar:
        prepare(names, numbers.planned(chains, dtypes, device), bar("compiling"))
        for i, op in enumerate(chains, 1):
            step = bar(f"{i} of {len(chains)}: {op}")
            own = {name: number for name, number in given.items() if name in op.operands}
            found = numbers.verify(op, dtypes, names, device, stride, own, step)
            out.print(report.verified(found))
            rows += found
    seconds, machine, ok = time.monotonic() - start, device_info(device), all(row.ok for row in rows)
    for text in report.coverage(rows):
        out.print(text, highlight=False)
    out.print(f"{report.summary(rows)}, {seconds:.0f} s", style="green" if ok else "red", highlight=False)
    about = {"ok": ok, "device": machine, "unavailable": unavailable, "seconds": round(seconds, 1)}
    output.write(json_file, {**about, "rows": report.as_json(rows)})
    page = report.markdown(rows, shlex.join(["dualop", *sys.argv[1:]]), machine, seconds)
    output.write(markdown, page, "--markdown")
    if not ok:
        raise typer.Exit(1)


def _numbers(texts: list[str]) -> dict[str, float]:
    numbers = {}
    for text in texts:
        name, _, number = text.partition("=")
        try:
            numbers[name.strip()] = float(number)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not written NAME=NUMBER", param_hint="--operand") from None
    return numbers
