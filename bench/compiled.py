"""Measure chains inside compiled graphs: `python -m dualop.bench.compiled`, some two minutes on a GPU.

The first table has what a call of the op costs the host: as a chain, by its own name, and inside a graph that
torch.compile made, as the difference between a graph of many calls and a graph of one. The second has a training step
of blocks that mix chains with what torch.compile fuses itself, beside torch.compile alone: how long a step takes when
steps follow each other, how long the device and the host are busy with it, and how often a backend was entered in
Python, which is 0 if all calls were replayed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import dualop
from dualop import replay
from dualop.backends.registry import BACKENDS
from dualop.bench.host import SHAPE, time_of
from dualop.bench.table import device_info, empty
from dualop.bench.workloads import COMPILED, Function, without_gradients
from dualop.nn import LinearChain
from dualop.numerics.cases import DEFAULT_CHAIN

MANY = 9  # calls in the larger graph of the first table
STEPS, ROUNDS = 20, 5
AHEAD_MS = 150.0  # of work that the device is given before it is timed, so that the host is ahead of it

Act = Callable[[Tensor], Tensor]


# ---- the host's part of one call -------------------------------------------------------------------------------------


def host(backend: str, device: torch.device) -> dict[str, float]:
    """Return the microseconds of a call by what is called."""
    x, gy = (torch.randn(SHAPE, device=device) for _ in range(2))
    bias, leaf = torch.randn(SHAPE[1], device=device), x.clone().requires_grad_()
    op = partial(dualop.chain(DEFAULT_CHAIN), backend=backend)
    names = (dualop.chain(DEFAULT_CHAIN).text, backend)
    forward, backward = torch.ops.dualop.forward.default, torch.ops.dualop.backward.default
    one, many = (_graph(op, count) for count in (1, MANY))

    def between(call: Callable[[Function], object]) -> float:
        return (time_of(partial(call, many), device) - time_of(partial(call, one), device)) / (MANY - 1)

    return {
        "the chain": time_of(lambda: without_gradients(op, x, bias), device),
        "the chain, with a node of autograd": time_of(lambda: op(leaf, bias), device),
        "forward by its name": time_of(lambda: forward(x, [bias], *names), device),
        "forward by its name, with a node": time_of(lambda: forward(leaf, [bias], *names), device),
        "backward by its name": time_of(lambda: backward(gy, x, [bias], *names, [True, True]), device),
        "forward in a compiled graph": between(lambda f: without_gradients(f, x, bias)),
        "forward and backward in a compiled step": between(lambda f: torch.autograd.grad(f(leaf, bias), leaf, gy)),
    }


def _graph(op: Function, count: int) -> Function:
    """Return a compiled function with so many calls, one on the result of the other."""

    def repeated(x: Tensor, bias: Tensor) -> Tensor:
        for _ in range(count):
            x = op(x, bias)
        return x

    return torch.compile(repeated, fullgraph=True, dynamic=False)


# ---- a training step of a block --------------------------------------------------------------------------------------


def linears(act: Act, **where: Any) -> nn.Module:
    """Return Linear 768 -> 3072, the activation, and a Linear back."""
    return _Behind(act, nn.Linear(768, 3072, **where), nn.Linear(3072, 768, **where), last=False)


def convolutions(act: Act, **where: Any) -> nn.Module:
    """Return two 3 x 3 convolutions of 128 channels in channels_last, each with the activation."""
    convolution = lambda: nn.Conv2d(128, 128, 3, padding=1, **where)
    return _Behind(act, convolution(), convolution(), last=True).to(memory_format=torch.channels_last)


class _Behind(nn.Module):
    """Run modules one after the other, and a function behind each, or behind all but the last."""

    def __init__(self, act: Act, *parts: nn.Module, last: bool) -> None:
        super().__init__()
        self.act, self.last, self.parts = act, last, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for i, part in enumerate(self.parts):
            x = part(x)
            if self.last or i + 1 < len(self.parts):
                x = self.act(x)
        return x


class _Layer(nn.Module):
    """Run LinearChain in place of the first Linear of `linears`, and of its activation."""

    def __init__(self, backend: str, **where: Any) -> None:
        super().__init__()
        self.first = LinearChain(768, 3072, "mish", backend=backend, **where)
        self.second = nn.Linear(3072, 768, **where)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


Block = tuple[str, tuple[int, ...], dict[str, nn.Module]]


def blocks(names: Sequence[str], device: torch.device, rows: int, size: tuple[int, ...]) -> Iterator[Block]:
    """Return title, shape of x, and modules with the same weights by contestant."""
    where: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    chains = {name: partial(dualop.chain("mish"), backend=name) for name in names}
    for title, shape, make in (
        ("Linear 768 -> 3072, mish, Linear", (rows, 768), linears),
        ("two channels_last convolutions 3 x 3 with mish", size, convolutions),
    ):
        modules = {COMPILED: make(F.mish, **where)} | {name: make(act, **where) for name, act in chains.items()}
        if make is linears:
            modules |= {f"{name}, LinearChain": _Layer(name, **where) for name in names}
        alone = list(modules[COMPILED].parameters())
        for module in modules.values():
            with torch.no_grad():
                for mine, theirs in zip(module.parameters(), alone, strict=True):
                    mine.copy_(theirs)
        yield title, shape, modules


def step_of(module: nn.Module, x: Tensor, gy: Tensor) -> Callable[[], Sequence[Tensor]]:
    """Return one training step: the compiled forward, and the gradients of x and of all parameters."""
    compiled, wanted = torch.compile(module, fullgraph=True, dynamic=False), [x, *module.parameters()]
    return lambda: torch.autograd.grad(compiled(x), wanted, gy)


@contextmanager
def entered() -> Iterator[list[str]]:
    """Yield a list that gets the name of each backend whose forward or backward runs in Python."""
    seen: list[str] = []
    with ExitStack() as stack:
        for backend, way in itertools.product(BACKENDS.values(), ("forward", "backward")):
            function = getattr(backend, way)
            noted = lambda *given, f=function, name=backend.name: seen.append(name) or f(*given)
            stack.enter_context(mock.patch.object(backend, way, noted))
        yield seen


def times(step: Callable[[], object], device: torch.device) -> tuple[float, float, float]:
    """Return the microseconds of a step: one after the other, on the device, on the host."""
    loop = lambda: [step() for _ in range(STEPS)]
    if device.type != "cuda":
        each = _seconds(loop)
        return each, each, each
    torch.cuda.synchronize()
    start = time.perf_counter()
    loop()
    on_host = time.perf_counter() - start
    torch.cuda.synchronize()
    each = time.perf_counter() - start
    return each * 1e6 / STEPS, _on_device(loop) * 1e3 / STEPS, on_host * 1e6 / STEPS


def _on_device(loop: Callable[[], object]) -> float:
    """Return the milliseconds of the device, which has other work until the host has launched everything."""
    a = torch.empty(8192, 8192, device="cuda", dtype=torch.bfloat16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.mm(a, a)  # the first one also loads the kernel
    start.record()
    torch.mm(a, a)
    end.record()
    torch.cuda.synchronize()
    for _ in range(int(AHEAD_MS / start.elapsed_time(end)) + 1):
        torch.mm(a, a)
    start.record()
    loop()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def steps(names: Sequence[str], device: torch.device, rows: int, size: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return a row for each block and contestant. Raises AssertionError if gradients differ from torch.compile's."""
    found: list[dict[str, Any]] = []
    for title, shape, modules in blocks(names, device, rows, size):
        x, gy = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
        if len(shape) == 4:
            x, gy = (t.contiguous(memory_format=torch.channels_last) for t in (x, gy))
        x.requires_grad_()
        every = {name: step_of(module, x, gy) for name, module in modules.items()}
        expected = every[COMPILED]()
        best: dict[str, list[tuple[float, float, float]]] = {}
        calls: dict[str, int] = {}
        for name, step in every.items():
            for one, other in zip(step(), expected, strict=True):
                difference = (one.double() - other.double()).norm() / other.double().norm()
                assert difference < 0.02, f"{title}, {name}: a gradient differs by {difference:.3f} of its norm"
            step()
            with entered() as seen:
                step()
            calls[name] = len(seen)
        for _, (name, step) in itertools.product(range(ROUNDS), every.items()):
            best.setdefault(name, []).append(times(step, device))
        for name, samples in best.items():
            each, on_device, on_host = (min(column) for column in zip(*samples, strict=True))
            found.append(
                dict(block=title, name=name, step_us=each, device_us=on_device, host_us=on_host, python=calls[name])
            )
        torch.compiler.reset()
    return found


def _seconds(loop: Callable[[], object]) -> float:
    """Return the microseconds of a step on the CPU."""
    start = time.perf_counter()
    loop()
    return (time.perf_counter() - start) * 1e6 / STEPS


# ---- the command -----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables, and write them to the file that `--json` names."""
    parser = argparse.ArgumentParser(prog="python -m dualop.bench.compiled", description=main.__doc__)
    parser.add_argument("--backend", default="cuda,triton", help="backends, with commas")
    parser.add_argument("--json", type=Path, help="a file to write to")
    given = parser.parse_args(arguments)
    names = given.backend.split(",")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Console(width=None if sys.stdout.isatty() else 120)
    out.print(device_info(device), markup=False)
    if not replay.load():
        out.print(f"calls run in Python: {replay.why_not}", style="red")
    calls = {name: host(name, device) for name in names}
    table = empty(f"host, us a call, {SHAPE[0]} x {SHAPE[1]}", ("", *names), {""})
    for what in calls[names[0]]:
        table.add_row(what, *(f"{calls[name][what]:.1f}" for name in names))
    out.print(table)
    rows = steps(names, device, *((16384, (32, 128, 56, 56)) if device.type == "cuda" else (8, (1, 128, 2, 2))))
    for block, group in itertools.groupby(rows, lambda row: row["block"]):
        table = empty(block, ("", "us a step", "of torch.compile", "device", "host", "in Python"), {""})
        alone = 0.0
        for row in group:
            alone = alone or row["step_us"]
            numbers = [f"{row[key]:,.0f}" for key in ("step_us", "device_us", "host_us", "python")]
            table.add_row(row["name"], numbers[0], f"{row['step_us'] / alone:.3f}", *numbers[1:])
        out.print(table)
    if given.json:
        given.json.write_text(json.dumps({"device": device_info(device), "calls": calls, "steps": rows}, indent=1))


if __name__ == "__main__":
    main()
