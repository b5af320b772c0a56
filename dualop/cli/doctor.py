"""Define the command `dualop doctor`."""

from __future__ import annotations

from dualop.cli import output
from dualop.cli.options import Json


def doctor(json_file: Json = None) -> None:
    """Report what this machine has and lacks, which backends run here, and what to install for the others."""
    from dualop.machine import doctor as examination

    report = examination.examine()
    output.console().print(examination.table(report))
    output.write(json_file, examination.as_json(report))
