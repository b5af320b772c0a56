"""Time what kernels are compared with: a device copy of the same bytes, and an empty launch.

torch copies by cudaMemcpyAsync, which for some sizes takes a quarter longer than for similar sizes, at all addresses:
on one H100 444 microseconds for 512 MiB to 512 MiB, and 359 for 16 KiB more. So a kernel of torch's that reads and
writes the same bytes is timed as well, and the faster one counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dualop.bench import timing

KERNEL = partial(torch.mul, other=1)
COPIES: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (torch.clone, KERNEL)

_fastest: dict[tuple[int, int, torch.device], int] = {}


def copies(count: int, sets: int, device: torch.device, way: int = 0) -> list[Callable[[], Any]]:
    """Return calls of COPIES[way] that read and write `count` bytes together, each from its own source."""
    size = max(1, count // 8)
    sources = [torch.ones(size, dtype=torch.float32, device=device) for _ in range(sets)]
    return [partial(COPIES[way], source) for source in sources]


def copy_time(count: int, sets: int, device: torch.device, stream: torch.cuda.Stream | None) -> timing.Timing:
    """Return the time of the fastest copy of so many bytes.

    A process tries once which copy is the fastest, and takes its time on every call.
    """
    time = lambda way: timing.timed(copies(count, sets, device, way), stream)
    if device.type != "cuda":
        return time(0)
    key = count, sets, device
    if key not in _fastest:
        _fastest[key] = min(range(len(COPIES)), key=lambda way: time(way).median_us)
    result = time(_fastest[key])
    return replace(result, note="by a kernel, which is faster here") if COPIES[_fastest[key]] is KERNEL else result


def launch_time(device: torch.device, stream: torch.cuda.Stream | None) -> timing.Timing | None:
    """Return the time of a kernel that writes one number, from a graph of such launches; None on the CPU."""
    if device.type != "cuda":
        return None
    one = torch.ones(1, device=device)
    return timing.timed([partial(torch.neg, one, out=one)], stream)
