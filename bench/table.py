"""Make the tables and the JSON of `dualop bench`."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from dualop.backends.registry import BACKENDS
from dualop.bench.measure import Row
from dualop.bench.workloads import COPY, LAUNCH


def device_info(device: torch.device) -> dict[str, Any]:
    """Describe the machine and the software on which the figures were measured."""
    versions: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version()}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = None
    if device.type != "cuda":
        name = platform.processor() or platform.machine()
        return {"type": "cpu", "name": name, "threads": torch.get_num_threads(), **versions}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        **versions,
    }


def how(device: torch.device) -> str:
    """Return one sentence on what the times mean."""
    if device.type == "cuda":
        return (
            "Device time by CUDA-graph replay, the median; ± is half the width from the 10th to the 90th percentile. "
            "copy is the faster of torch's copy and a kernel of torch's that moves the same bytes; empty launch is a "
            "kernel of one thread that does nothing. Calls follow each other at once; from compute capability 9.0 on, "
            "dualop's kernels are launched while the one before ends, which torch's are not."
        )
    slow = " and ".join(name for name, backend in BACKENDS.items() if backend.interpreted)
    kernels = f" The kernels of {slow} are interpreted: their times say nothing about a GPU." if slow else ""
    return f"No GPU: times are wall clock on the CPU.{kernels}"


def as_json(rows: Sequence[Row], device: torch.device, **more: Any) -> dict[str, Any]:
    """Return the content of the file that `--json` writes."""
    return {"device": device_info(device), "times": how(device), **more, "rows": [asdict(row) for row in rows]}


def empty(title: str, columns: Sequence[str], words: Collection[str]) -> Table:
    """Return a table without rows: columns of `words` are aligned to the left, those of numbers to the right."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right", overflow="fold")
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# The columns of `render`: an attribute of a Row, and how its value is written.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "direction": ("direction", str),
    "backend": ("backend", str),
    "µs": ("time_us", _number),
    "±": ("half_width_us", _number),
    "GB/s": ("gbps", _number),
    "of copy": ("copy_share", "{:.3f}".format),
    "launches": ("launches", "{:.2f}".format),
    "× eager": ("vs_eager", "{:.2f}".format),
    "× compile": ("vs_compile", "{:.2f}".format),
    "ulp": ("max_ulp", "{:.4g}".format),
    "beyond rounding": ("beyond_rounding", "{:.4g}".format),
    "grad operand, ulp": ("operand_ulp", "{:.4g}".format),
    "grad operand, u Σ|terms|": ("operand_sum", "{:.4g}".format),
    "note": ("remark", str),
}


def render(rows: Sequence[Row], title: str) -> Table:
    """Return one table: a chain, shape and dtype in both directions. Empty columns are left out.

    `ulp` is the error of y in forward's rows and of grad x in backward's.
    """
    shown: dict[str, list[str]] = {}
    for name, (field, written) in COLUMNS.items():
        values = [getattr(row, field) for row in rows]
        texts = ["" if value is None else written(value) for value in values]
        if any(texts):
            shown[name] = texts
    table = empty(title, list(shown), {"direction", "backend", "note"})
    previous = ""
    for row, (direction, *cells) in zip(rows, zip(*shown.values(), strict=True), strict=True):
        if previous and direction != previous:
            table.add_section()
        style = "red" if not row.ok else "dim" if row.backend in (COPY, LAUNCH) else None
        table.add_row(*map(Text, ("" if direction == previous else direction, *cells)), style=style)
        previous = direction
    return table
