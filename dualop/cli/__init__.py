"""Provide the command line, one command per file. Each module imports the rest of dualop late.

torch, triton and the kernels are imported inside the commands, so that `--help` is quick.
"""

from __future__ import annotations

from dualop.cli import bench, check, doctor, emit, show, tune, verify
from dualop.cli.app import app
from dualop.cli.options import DEFAULT_CHAIN as DEFAULT_CHAIN

commands = (bench.bench, check.check, verify.verify, tune.tune, emit.emit, doctor.doctor, show.show, show.stages)
for command in commands:
    app.command()(command)


def main() -> None:
    """Run the script `dualop`."""
    app(prog_name="dualop")
