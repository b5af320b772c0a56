"""Make the tables and the JSON of `dualop bench`."""

from __future__ import annotations

import platform
from collections.abc import Sequence
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


COLUMNS = ("direction", "backend", "µs", "±", "GB/s", "of copy", "launches", "× eager", "× compile", "max ulp", "note")


def render(rows: Sequence[Row], title: str) -> Table:
    """Return one table: a chain, shape and dtype in both directions. Empty columns are left out."""
    lines = [_cells(row) for row in rows]
    shown = [i for i, _ in enumerate(COLUMNS) if any(cells[i] for cells in lines)]
    table = Table(title=title, title_justify="left")
    for i in shown:
        words = COLUMNS[i] in ("direction", "backend", "note")
        table.add_column(COLUMNS[i], justify="left" if words else "right", no_wrap=COLUMNS[i] != "note")
    previous = ""
    for row, cells in zip(rows, lines, strict=True):
        if previous and row.direction != previous:
            table.add_section()
        if row.direction == previous:
            cells = ("", *cells[1:])
        style = "red" if not row.ok else "dim" if row.backend in (COPY, LAUNCH) else None
        table.add_row(*(Text(cells[i]) for i in shown), style=style)
        previous = row.direction
    return table


def _cells(row: Row) -> tuple[str, ...]:
    half = None if row.low_us is None or row.high_us is None else (row.high_us - row.low_us) / 2
    return (
        row.direction,
        row.backend,
        _number(row.time_us),
        _number(half),
        _number(row.gbps),
        "" if row.copy_share is None else f"{row.copy_share:.3f}",
        "" if row.launches is None else f"{row.launches:.2f}",
        "" if row.vs_eager is None else f"{row.vs_eager:.2f}",
        "" if row.vs_compile is None else f"{row.vs_compile:.2f}",
        "" if row.max_ulp is None else f"{row.max_ulp:.4g}",
        "; ".join(filter(None, ("interpreted" if row.interpreted else "", row.note))),
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
