"""List the versions that dualop is tested with, as (major, minor). pyproject.toml and README list the same ones."""

from __future__ import annotations

import re

TORCH = ((2, 11), (2, 13), (2, 14))
TRITON = ((3, 6), (3, 8), (3, 9))


def of(text: str) -> tuple[int, int]:
    """Return (major, minor) of a version such as "2.13.0+cu130", and (0, 0) of a text that is no version."""
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def listed(tested: tuple[tuple[int, int], ...]) -> str:
    """Return the versions as text for a person: `2.11, 2.13, 2.14`."""
    return ", ".join(f"{major}.{minor}" for major, minor in tested)
