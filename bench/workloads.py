"""Define the benchmarks: a chain on tensors of one shape and dtype, and the contestants that compute it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualop.backends.base import Planned
from dualop.backends.reference import evaluate
from dualop.errors import ShapeError
from dualop.language.syntax import Chain
from dualop.launch.layout import Layout, layout_of
from dualop.numerics.cases import DTYPES, OPERAND_FORMS, Case, Sample, sample

EAGER, COMPILED, COPY, LAUNCH = "eager", "torch.compile", "copy", "empty launch"
FORWARD, BACKWARD = "forward", "backward"

FORMS = ("last", "row", "channel", "scalar", "full")  # forms of operands, as in OPERAND_FORMS

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Workload:
    """Describe `chain` on x of `shape` and `dtype`.

    The operands take the forms of `operands` in turn (OPERAND_FORMS).
    """

    chain: Chain
    shape: tuple[int, ...]
    dtype: str
    device: torch.device
    operands: tuple[str, ...] = ("last",)

    def __post_init__(self) -> None:
        if "channel" in self.operands and len(self.shape) < 2:
            raise ShapeError(f"x of shape {self.shape} has no channel; give it two dimensions or more")

    @property
    def operand_forms(self) -> list[str]:
        """Return the form of each operand."""
        return [self.operands[i % len(self.operands)] for i in range(len(self.chain.operands))]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of x and of the operands."""
        return [self.shape, *(OPERAND_FORMS[form](self.shape) for form in self.operand_forms)]

    def first(self, rows: int | None) -> Workload:
        """Return this workload on the first `rows` of x only; None means all of them."""
        return self if rows is None else replace(self, shape=(min(rows, self.shape[0]), *self.shape[1:]))

    @property
    def layout(self) -> Layout:
        """Return the layout of a call with these samples."""
        x, *operands = self.planned.tensors
        return layout_of(x, operands, self.device)

    @property
    def planned(self) -> Planned:
        """Return a call with these samples, to have it compiled ahead."""
        tensors = (torch.empty(shape, dtype=DTYPES[self.dtype], device="meta") for shape in self.shapes)
        return Planned(self.chain, tuple(tensors), self.device)

    def sample(self, seed: int, rows: int | None = None) -> Sample:
        """Make one set of inputs and a gy; only the first `rows` of x if given."""
        if self.device.type == "cpu" or rows is not None:
            shape = self.first(rows).shape
            return sample(self.chain, Case("bench", shape, self.operands), self.dtype, self.device, seed)
        # On the device itself: a random number a nanosecond on the CPU would take longer than all the timing.
        generator = torch.Generator(self.device).manual_seed(seed)
        like: dict[str, Any] = {"dtype": DTYPES[self.dtype], "device": self.device, "generator": generator}
        x, gy, *operands = (torch.randn(size, **like) for size in (self.shape, *self.shapes))
        return Sample(x, tuple(operands), gy, self.dtype, "bench")

    def bytes(self, direction: str) -> int:
        """Return how many bytes must cross the memory bus.

        Forward reads x and writes y; backward reads x and gy and writes grad x. Both read the operands, and backward
        writes their gradients.
        """
        x, *operands = map(math.prod, self.shapes)
        numbers = 2 * x + sum(operands) if direction == FORWARD else 3 * x + 2 * sum(operands)
        return DTYPES[self.dtype].itemsize * numbers


def contestants(workload: Workload, backends: Sequence[str], compiled: bool, eager: bool = True) -> dict[str, Function]:
    """Return a function of (x, *operands) by name: torch eager, torch.compile and the backends.

    Eager and torch.compile get the chain as a user would write it: torch's functions one after the other on the
    tensors in their own dtype.
    """
    written_out = lambda x, *operands: evaluate(workload.chain, x, operands)
    functions: dict[str, Function] = {EAGER: written_out} if eager else {}
    if compiled:
        functions[COMPILED] = torch.compile(written_out, dynamic=False)
    return functions | {name: partial(workload.chain, backend=name) for name in backends}


def calls(function: Function, direction: str, sets: list[Sample]) -> list[Callable[[], Any]]:
    """Return one call for each set of inputs.

    Forward runs under no_grad, as in inference. Backward is what autograd launches: `torch.autograd.grad` through a
    graph whose forward ran once, outside.
    """
    if direction == FORWARD:
        return [partial(without_gradients, function, s.x, *s.operands) for s in sets]
    backwards = []
    for s in sets:
        leaves = [t.detach().requires_grad_() for t in (s.x, *s.operands)]
        y = function(*leaves)
        backwards.append(partial(torch.autograd.grad, y, leaves, s.gy, retain_graph=True))
    return backwards


def without_gradients(function: Function, *tensors: Tensor) -> Tensor:
    """Call the function under no_grad, as in inference."""
    with torch.no_grad():
        return function(*tensors)


def parse_shape(text: str) -> tuple[int, ...]:
    """Return the numbers of a text such as 16384x8192; raise ShapeError if it is no shape."""
    parts = text.lower().replace("×", "x").split("x")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ShapeError(f"a shape is written like 16384x8192, not {text!r}")
    return tuple(map(int, parts))


def shape_text(shape: Sequence[int]) -> str:
    """Return the text of a shape, which `parse_shape` reads."""
    return "x".join(map(str, shape))
