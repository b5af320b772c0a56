"""Fill in the templates of an emitted file, which lie in `templates/`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

Value = str | int | Sequence[str]

_IF = re.compile(r"^@if (\w+)@\n(.*?)^@end@\n", re.MULTILINE | re.DOTALL)
_LINES = re.compile(r"^( *)@(\w+)@\n", re.MULTILINE)


def filled(name: str, **values: Value) -> str:
    """Return `templates/NAME` with its marks replaced.

    `@NAME@` stands for a value; alone on a line it stands for lines, which get its indentation, or for no line at all.
    `@if NAME@` to `@end@` stays if the value is true.
    """
    text = (Path(__file__).parent / "templates" / name).read_text("utf-8")
    text = _IF.sub(lambda m: m[2] if values[m[1]] else "", text)
    text = _LINES.sub(lambda m: "".join(_indented(m[1], line) for line in _lines(values[m[2]])), text)
    return re.sub(r"@([A-Z_]+)@", lambda m: str(values[m[1]]), text)


def _lines(value: Value) -> Sequence[str]:
    return value.splitlines() if isinstance(value, str) else [] if isinstance(value, int) else value


def _indented(space: str, line: str) -> str:
    return f"{space}{line}\n" if line and not line.startswith("#pragma") else f"{line}\n"
