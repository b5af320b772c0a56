"""Define the application that the commands register with: it imports a command when it runs, and shows errors."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from dualop.cli.options import device
from dualop.errors import DualopError


class Lazy(TyperCommand):
    """Import the module of a command when it runs; until then only the command's name and summary are known.

    `place` is "module:function"; the function is a Typer command.
    """

    def __init__(self, name: str, place: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self.place = place

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the command when the group is about to parse the command's own arguments, `--help` among them."""
        return self.command().make_context(info_name, args, parent, **extra)

    def command(self) -> Any:
        module, function = self.place.split(":")
        device()  # switches interpreting on where there is no GPU, before that module imports the backends
        app = typer.Typer(add_completion=False)
        app.command(self.name)(getattr(importlib.import_module(module), function))
        return typer.main.get_command(app)


class Commands(TyperGroup):
    """End a command with one line and exit code 2 when dualop raises an error on purpose."""

    lazy: dict[str, Lazy] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *self.lazy]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return self.lazy.get(cmd_name) or super().get_command(ctx, cmd_name)

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
