"""Define the application that the commands register with, and how errors end a command."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from dualop.errors import DualopError


class Commands(TyperGroup):
    """Errors that dualop raises on purpose end a command with one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DualopError as error:
            Console(stderr=True, soft_wrap=True).print(f"error: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    help="Fused add + activation chains for PyTorch, on a CUDA C++ kernel or an equivalent Triton kernel.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
