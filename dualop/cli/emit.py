"""Define the command `dualop emit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualop.cli.options import DEFAULT_CHAIN
from dualop.cli.output import write


def emit(
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="[default: print it]")] = None,
    backend: Annotated[str, typer.Option(help="cuda or triton.")] = "cuda",
    chain: Annotated[str, typer.Option(help="What follows the Linear.")] = DEFAULT_CHAIN,
    model: Annotated[
        str, typer.Option(help="linear:INxOUT, or input:AxBx... for the chain alone.")
    ] = "linear:8192x8192",
    batch: Annotated[int, typer.Option(help="Rows of the Linear's input.")] = 1024,
    operand: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SHAPE", help="8192, 16x1x1 (a channel), 128x1 (a row) or scalar. [default: (OUT,)]"),
    ] = None,
    linear: Annotated[str, typer.Option(help="Name of the Linear in the model.")] = "matmul",
    dtype: Annotated[str, typer.Option(help="Several with commas, or all.")] = "float32,bfloat16",
    no_bias: Annotated[bool, typer.Option("--no-bias", help="The Linear has no bias.")] = False,
) -> None:
    """Write one self-contained file in KernelBench's form: ModelNew with the chain's kernels, forward and backward.

    Without options, the model is that of level 2, problem 95.
    """
    from dualop.cli.options import dtypes
    from dualop.emit.file import emit as emitted
    from dualop.emit.file import parse_operands

    shapes = parse_operands(operand or [])
    text = emitted(
        chain, model, backend, batch=batch, bias=not no_bias, linear=linear, shapes=shapes, dtypes=dtypes(dtype)
    )
    if output is None:
        typer.echo(text, nl=False)
    else:
        write(output, text, "--output")
