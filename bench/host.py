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
from dualop.bench.workloads import COMPILED, EAGER, evaluate_on
from dualop.cli.options import DEFAULT_CHAIN

SHAPE = (8, 64)
LOOPS, LOOP_S = 7, 0.05
NOTHING = "a Function that does nothing"
FORWARD, TRAINING = "forward", "forward and backward"


@dataclass(frozen=True)
class Row:
    """Hold the microseconds of a call on the host, and their ratio to the reference function of its direction.

    The reference is torch.sigmoid for forward, and the eager chain for forward and backward.
    """

    name: str
    direction: str
    time_us: float
    ratio: float


def run(names: Sequence[str], device: torch.device, compiled: bool) -> list[Row]:
    """Return the rows of torch and of these backends, in the order in which they were timed."""
    replay.load()  # without it, the first calls of a process may run in Python
    op = dualop.chain(DEFAULT_CHAIN)
    x, bias = torch.randn(SHAPE, device=device), torch.randn(SHAPE[1], device=device)
    written_out = partial(evaluate_on, op)
    chains: dict[str, Callable[..., Tensor]] = {EAGER: written_out}
    if compiled:
        chains[COMPILED] = torch.compile(written_out, dynamic=False)
    chains |= {name: partial(op, backend=name) for name in names}
    times: dict[tuple[str, str], float] = {}
    for name, call in {"torch.empty_like": torch.empty_like, "torch.sigmoid": torch.sigmoid}.items():
        times[name, FORWARD] = _time(partial(_without_gradients, call, x), device)
    for name, chain in chains.items():
        times[name, FORWARD] = _time(partial(_without_gradients, chain, x, bias), device)
    leaves = [t.clone().requires_grad_() for t in (x, bias)]
    gy = torch.randn(SHAPE, device=device)
    chains[NOTHING] = _Nothing.apply
    for name, chain in chains.items():
        times[name, TRAINING] = _time(partial(_step, chain, leaves, gy), device)
    base = {FORWARD: times["torch.sigmoid", FORWARD], TRAINING: times[EAGER, TRAINING]}
    return [Row(name, way, round(us, 2), round(us / base[way], 3)) for (name, way), us in times.items()]


class _Nothing(torch.autograd.Function):
    """Do nothing but allocate: this measures what torch itself takes for a function with a backward in Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gy: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


def _without_gradients(call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    with torch.no_grad():
        return call(*tensors)


def _step(chain: Callable[..., Tensor], leaves: Sequence[Tensor], gy: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(chain(*leaves), leaves, gy)


def _time(call: Callable[[], object], device: torch.device) -> float:
    """Return the microseconds until a call returns, which on a GPU is before its kernels have ended."""
    for _ in range(10):
        call()
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
    for direction, base in ((FORWARD, "torch.sigmoid"), (TRAINING, EAGER)):
        table = Table(title=f"host, {direction}, {SHAPE[0]} x {SHAPE[1]}", title_justify="left")
        for column in ("", "us", f"of {base}"):
            table.add_column(column, justify="left" if not column else "right")
        for row in rows:
            if row.direction == direction:
                table.add_row(row.name, f"{row.time_us:.2f}", f"{row.ratio:.2f}")
        yield table
