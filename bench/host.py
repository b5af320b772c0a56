"""Measure the host overhead of a call: wall time of calls on a tensor so small that the kernels do not count.

The default chain on 8 x 64 with a bias is timed beside functions of torch itself. A call is timed in loops of some
thousand, and the fastest of several loops counts, because other work on the machine can only add to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import dualop
from dualop import replay
from dualop.bench.table import empty
from dualop.bench.workloads import EAGER, FORWARD, Function, Workload, contestants, without_gradients
from dualop.numerics.cases import DEFAULT_CHAIN

SHAPE = (8, 64)
LOOPS, LOOP_S = 7, 0.05
NOTHING = "a Function that does nothing"
TRAINING = "forward and backward"
SIGMOID = "torch.sigmoid"
BASES = {FORWARD: SIGMOID, TRAINING: EAGER}  # what the times of each direction are compared with


@dataclass(frozen=True)
class Row:
    """Hold the microseconds of a call on the host, and their ratio to those of BASES[direction]."""

    name: str
    direction: str
    time_us: float
    ratio: float


def run(names: Sequence[str], device: torch.device, compiled: bool) -> list[Row]:
    """Return the rows of torch and of these backends, in the order in which they were timed."""
    replay.load()  # without it, the first calls of a process may run in Python
    work = Workload(dualop.chain(DEFAULT_CHAIN), SHAPE, "float32", device)
    sample, chains = work.sample(0), contestants(work, names, compiled)
    stepped = {**chains, NOTHING: _Nothing.apply}
    tensors = (sample.x, *sample.operands)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    calls: dict[str, dict[str, Callable[[], object]]] = {
        FORWARD: {
            "torch.empty_like": partial(without_gradients, torch.empty_like, sample.x),
            SIGMOID: partial(without_gradients, torch.sigmoid, sample.x),
            **{name: partial(without_gradients, chain, *tensors) for name, chain in chains.items()},
        },
        TRAINING: {name: partial(_step, chain, leaves, sample.gy) for name, chain in stepped.items()},
    }
    rows: list[Row] = []
    for direction, base in BASES.items():
        times = {name: time_of(call, device) for name, call in calls[direction].items()}
        rows += [Row(name, direction, round(us, 2), round(us / times[base], 3)) for name, us in times.items()]
    return rows


class _Nothing(torch.autograd.Function):
    """Do nothing but allocate: this measures what torch itself takes for a function with a backward in Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gy: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def _step(chain: Function, leaves: Sequence[Tensor], gy: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(chain(*leaves), leaves, gy)


def time_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the microseconds until a call returns, which on a GPU is before its kernels have ended."""
    _loop(call, 10, device)
    once = min(_loop(call, 10, device) for _ in range(3))
    count = max(1, int(LOOP_S * 1e6 / once))
    return min(_loop(call, count, device) for _ in range(LOOPS))


def _loop(call: Callable[[], object], count: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) * 1e6 / count


def render(rows: Sequence[Row]) -> Iterator[Table]:
    """Return one table for each direction."""
    for direction, base in BASES.items():
        table = empty(f"host, {direction}, {SHAPE[0]} x {SHAPE[1]}", ("", "us", f"of {base}"), {""})
        for row in rows:
            if row.direction == direction:
                table.add_row(row.name, f"{row.time_us:.2f}", f"{row.ratio:.2f}")
        yield table
