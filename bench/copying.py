"""The times that a kernel is measured against: a device copy of the same bytes, and a launch that does nothing.

A copy between buffers whose addresses have the same place in the DRAM's banks takes half as long again: on one H200 398
microseconds instead of 257 for 512 MiB to 512 MiB. So the copy is made to several places, and the fastest counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dualop.bench import timing

# Bytes from the start of a buffer to what is copied there; None: wherever `clone` puts it. Beyond a DRAM page, a bank
# and a channel, by no power of two, and whole accesses of 16 bytes.
SHIFTS = (None, 96 << 10, (5 << 19) + (32 << 10), 33 << 20)

_fastest: dict[tuple[int, int, torch.device], int | None] = {}


def copies(count: int, sets: int, device: torch.device, shift: int | None = None) -> list[Callable[[], Any]]:
    """Device copies that read and write `count` bytes together, each from its own source."""
    size = max(1, count // 8)
    sources = [torch.ones(size, dtype=torch.float32, device=device) for _ in range(sets)]
    if shift is None:
        return [source.clone for source in sources]
    room = [torch.empty(size + shift // 4, dtype=torch.float32, device=device) for _ in range(sets)]
    return [partial(buffer[shift // 4 :].copy_, source) for buffer, source in zip(room, sources, strict=True)]


def copy_time(count: int, sets: int, device: torch.device, stream: torch.cuda.Stream | None) -> timing.Timing:
    """Of the fastest copy of so many bytes. Where that lies is tried once in a process, the time taken every time."""
    key = count, sets, device
    if device.type != "cuda":
        return timing.timed(copies(count, sets, device), stream)
    if key not in _fastest:
        times = {shift: timing.timed(copies(count, sets, device, shift), stream) for shift in SHIFTS}
        _fastest[key] = min(times, key=lambda shift: times[shift].median_us)
    shift = _fastest[key]
    result = timing.timed(copies(count, sets, device, shift), stream)
    return result if shift is None else replace(result, note=f"to an address {shift >> 10} KiB beyond a buffer's start")


def launch_time(device: torch.device, stream: torch.cuda.Stream | None) -> timing.Timing | None:
    """Of a kernel of one thread that does nothing, one after the other in a graph; None on the CPU."""
    return timing.timed([partial(torch.cuda._sleep, 0)], stream) if device.type == "cuda" else None
