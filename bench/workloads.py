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
from dualop.numerics.cases import DTYPES, OPERAND_FORMS, Case, Sample, allocated, sample

EAGER, COMPILED, COPY, LAUNCH = "eager", "torch.compile", "copy", "empty launch"
FORWARD, BACKWARD = "forward", "backward"

FORMS = ("last", "row", "channel", "position", "scalar", "full")  # forms of operands, as in OPERAND_FORMS
SECTOR = 32  # bytes: what a GPU reads from memory at the least, a quarter of a cache line

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Workload:
    """Describe `chain` on x of `shape` and `dtype`.

    The operands take the forms of `operands` in turn (OPERAND_FORMS). `arrange` says how x lies in memory, and
    `operand_arrange` how operands of the form `full` do (ARRANGEMENTS, or `beside`: between the elements of an x that
    is `every second` of a wider tensor's); other operands are contiguous. gy lies as the result, which torch decides.
    Raises ShapeError if x of this shape cannot lie so or has no channel or position.
    """

    chain: Chain
    shape: tuple[int, ...]
    dtype: str
    device: torch.device
    operands: tuple[str, ...] = ("last",)
    arrange: str = "dense"
    operand_arrange: str = "dense"

    def __post_init__(self) -> None:
        for form in ("channel", "position"):
            if form in self.operands and len(self.shape) < 2:
                raise ShapeError(f"x of shape {self.shape} has no {form}; give it two dimensions or more")
        for how, dimensions in (("channels_last", 4), ("heads", 3)):
            if how in (self.arrange, self.operand_arrange) and len(self.shape) < dimensions:
                raise ShapeError(f"x of shape {self.shape} cannot lie as {how}; give it {dimensions} dimensions")
        if self.operand_arrange == "beside" and self.arrange != "every second":
            raise ShapeError("an operand lies beside x only where x is every second element of a wider tensor")

    @property
    def operand_forms(self) -> list[str]:
        """Return the form of each operand."""
        return [self.operands[i % len(self.operands)] for i in range(len(self.chain.operands))]

    @property
    def operand_text(self) -> str:
        """Return the form of each operand, and how it lies in memory unless it is contiguous."""
        lies = "" if self.operand_arrange == "dense" else f" {self.operand_arrange}"
        return ", ".join(f"{form}{lies}" if form == "full" else form for form in self.operand_forms)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of x and of the operands."""
        return [self.shape, *(OPERAND_FORMS[form](self.shape) for form in self.operand_forms)]

    def first(self, rows: int | None) -> Workload:
        """Return this workload on the first `rows` of x only; None means all of them."""
        return self if rows is None else replace(self, shape=(min(rows, self.shape[0]), *self.shape[1:]))

    def layout(self, direction: str = FORWARD) -> Layout:
        """Return the layout of a call with these samples, or of its backward with all gradients."""
        x, *operands = self.planned.tensors
        needs = None if direction == FORWARD else (True,) * (1 + len(operands))
        return layout_of(x, operands, needs, device=self.device)

    @property
    def planned(self) -> Planned:
        """Return a call with these samples, to have it compiled ahead."""
        return Planned(self.chain, tuple(self._inputs(torch.device("meta"))), self.device)

    def _inputs(self, device: torch.device) -> list[Tensor]:
        """Return x and the operands as they lie in memory, of zeros."""
        x = allocated(self.shape, self.arrange, DTYPES[self.dtype], device)
        tensors = [x]
        for shape, form in zip(self.shapes[1:], self.operand_forms, strict=True):
            how = self.operand_arrange if form == "full" else "dense"
            tensors.append(allocated(shape, how, DTYPES[self.dtype], device, x))
        return tensors

    def sample(self, seed: int, rows: int | None = None) -> Sample:
        """Make one set of inputs and a gy; only the first `rows` of x if given."""
        if self.device.type == "cpu" or rows is not None:
            lies: Any = {"arrange": self.arrange, "operand_arrange": self.operand_arrange, "gradient": "result"}
            case = Case("bench", self.first(rows).shape, self.operands, **lies)
            return sample(self.chain, case, self.dtype, self.device, seed)
        return self._drawn(seed)

    def _drawn(self, seed: int) -> Sample:
        """Make the inputs on the device: a random number a nanosecond on the CPU takes longer than all the timing."""
        generator = torch.Generator(self.device).manual_seed(seed)
        x, *operands = (t.normal_(generator=generator) for t in self._inputs(self.device))
        gy = self.layout().output().normal_(generator=generator)
        return Sample(x, tuple(operands), gy, self.dtype, "bench")

    def bytes(self, direction: str) -> int:
        """Return how many bytes must cross the memory bus.

        Forward reads x and writes y; backward reads x and gy and writes grad x. Both read the operands, and backward
        writes their gradients. An input that is not dense is read in whole sectors of 32 bytes (`touched`), as are an
        operand beside x and x in one go; results and gradients are dense. A copy of a contiguous tensor of as many
        bytes is what times are compared with.
        """
        each = zip(self._inputs(torch.device("meta")), ("x", *self.operand_forms), strict=True)
        read = sum(touched(t) for t, form in each if (self.operand_arrange, form) != ("beside", "full"))
        x, *operands = (DTYPES[self.dtype].itemsize * math.prod(shape) for shape in self.shapes)
        return read + x if direction == FORWARD else read + 2 * x + sum(operands)


def touched(tensor: Tensor) -> int:
    """Return the bytes of the 32-byte sectors that hold a tensor's elements; of a dense one, its own bytes.

    Its dimensions are taken from the innermost outwards. Copies of a run that lie less than a sector apart make one
    run, for no sector in between stays unread. Copies that lie further apart are read one by one, in sectors that are
    filled as far as they can be: a run of 40 bytes counts 64, though it takes 96 if it starts within a sector.
    """
    item = tensor.element_size()
    run, count = item, 1
    for stride, size in sorted((s * item, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if count == 1 and stride - run < SECTOR:
            run += stride * (size - 1)
        else:
            count *= size
    return run if run == tensor.numel() * item else count * math.ceil(run / SECTOR) * SECTOR


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
