"""Define what a backend answers, and what the two that launch kernels on a GPU share.

`Backend` is the contract. The rest of dualop asks a backend through it and knows none by name, so that a new one is a
class and a line in `registry.py`, or an entry point (CONTRIBUTING.md, "Add a backend").
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dualop.backends.functions import lacking
from dualop.backends.mode import CPU_REASON, INTERPRET
from dualop.language.slopes import Slope
from dualop.language.syntax import Chain
from dualop.launch import sums, tuning
from dualop.launch.checks import device_of
from dualop.launch.grid import Cut, Grid
from dualop.launch.layout import Layout, layout_of

Progress = Callable[[int, int], None]
Needs = tuple[bool, ...] | None  # which gradients of (x, *operands) a backward kernel gives; None: forward
NO_GPU = "no GPU that torch can use; set DUALOP_INTERPRET=1 to run its kernels on CPU tensors"


@dataclass(frozen=True)
class Planned:
    """Describe a call whose kernels are to be compiled ahead.

    `tensors` are x and the operands. Only shapes, strides and dtypes count, so meta tensors do; `device` is where the
    call will run. `needs` says which of their gradients it will ask for (None: all), `directions` which kernels it
    launches, and `cuts` how some of them are cut, in place of what the backend would choose.
    """

    chain: Chain
    tensors: tuple[Tensor, ...]
    device: torch.device
    needs: tuple[bool, ...] | None = None
    directions: tuple[str, ...] = ("forward", "backward")
    cuts: tuple[tuple[str, Cut], ...] = ()

    @classmethod
    def of(cls, chain: Chain, x: Tensor, operands: Sequence[Tensor]) -> Planned:
        """Return a call with these tensors, on the device where they are."""
        return cls(chain, (x, *operands), device_of(x, operands))


class Backend(ABC):
    """Run a chain forward and backward, or say why that cannot be done.

    `forward` and `backward` get tensors that passed `layout.validate`, and only where `reasons` is empty. They write no
    input, and write their results to memory of their own.
    """

    name: str
    # Its kernels run in an interpreter or on the host, slowly, for tests: "auto" leaves CPU tensors to others then.
    interpreted: bool = False
    # It tells dualop/replay/record.py of every launch, so that C++ may make a known call again.
    replays: bool = False
    # It computes by torch's own formulas, which cancel in float32: `check` allows for it, `verify` does not judge it.
    torch_formulas: bool = False
    # Dtypes whose subnormal inputs do not reach its kernels, so that `verify` leaves them out.
    flushed: frozenset[torch.dtype] = frozenset()

    @abstractmethod
    def environment(self) -> list[str]:
        """Return what this machine lacks for it, each with its remedy; empty if it runs here."""

    @abstractmethod
    def reasons(self, chain: Chain | Slope, device: torch.device) -> list[str]:
        """Return what keeps it from running this chain on this device; empty if it runs."""

    @abstractmethod
    def forward(self, chain: Chain, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        """Return the result, in the layout's memory format."""

    @abstractmethod
    def backward(
        self, chain: Chain | Slope, gy: Tensor, x: Tensor, operands: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        """Return the gradients of those of (x, *operands) that `needs` asks for, in order, each like its tensor."""

    @abstractmethod
    def source(self, chain: Chain) -> str:
        """Return the text that is compiled for a contiguous float32 x and one feature vector an operand."""

    def heuristic(self, chain: Chain | Slope, layout: Layout, direction: str) -> Cut | None:
        """Return how a kernel is cut where nobody searched for this call; None if there is nothing to choose.

        A backend that returns a Cut has `forward` and `backward` take another one as `cut=`.
        """
        return None

    def candidates(self, layout: Layout, direction: str, present: Cut) -> list[Cut]:
        """Return the cuts that `dualop tune` tries, `present` first."""
        return [present]

    def prepare(  # noqa: B027
        self, calls: Iterable[Planned], progress: Progress = lambda done, total: None
    ) -> None:
        """Compile what these calls need, in parallel; without it, each call compiles its own.

        `progress(done, total)` is called after each. May raise the first compiler's error after all have ended; the
        call meets it again.
        """

    def forget(self) -> None:  # noqa: B027
        """Forget which launches were chosen: others may have been kept since."""


class Launch(Protocol):
    """Describe a kernel's launch, except for the addresses."""

    @property
    def grid(self) -> Grid:
        """Return how the layout is cut."""

    def forward(self, y: Tensor, inputs: Sequence[Tensor]) -> None:
        """Write y."""

    def backward(
        self,
        gy: Tensor,
        inputs: Sequence[Tensor],
        partials: Sequence[Tensor | None],
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Write the gradients; a gradient that has partial sums is summed from these."""


class GpuBackend(Backend):
    """Launch one kernel forward and one backward, of a kernel language that functions.py knows by `name`.

    With DUALOP_INTERPRET=1 the same kernels run on CPU tensors.
    """

    interpreted = INTERPRET
    replays = True
    space: tuning.Space  # of the cuts worth trying

    @abstractmethod
    def missing(self, host: bool) -> list[str]:
        """Return the tools that this machine lacks, each with its remedy; `host`: to run kernels on CPU tensors."""

    @abstractmethod
    def launch(
        self, chain: Chain | Slope, layout: Layout, needs: Needs, cut: Cut | None, tensors: Sequence[Tensor]
    ) -> Launch:
        """Return the launch of the forward kernel, or of the backward kernel with these gradients.

        `tensors` are what it reads and writes in full: y or gy, then x and the operands.
        """

    def environment(self) -> list[str]:
        if not INTERPRET and not torch.cuda.is_available():
            return [NO_GPU, *self.missing(False)]
        return list(self.missing(INTERPRET))

    def reasons(self, chain: Chain | Slope, device: torch.device) -> list[str]:
        if device.type == "cpu" and not INTERPRET:
            return [CPU_REASON]
        if device.type not in ("cpu", "cuda"):
            return [f"has no kernels for {device.type} tensors"]
        return [*self.missing(device.type == "cpu"), *lacking(self.name, chain)]

    def candidates(self, layout: Layout, direction: str, present: Cut) -> list[Cut]:
        return tuning.candidates(self.space, layout, direction, present)

    def forward(self, chain: Chain, x: Tensor, operands: Sequence[Tensor], cut: Cut | None = None) -> Tensor:
        layout = layout_of(x, operands)
        y = layout.output()
        if layout.total:
            inputs = _readable(layout, (x, *operands))
            self.launch(chain, layout, None, cut, (y, *inputs)).forward(y, inputs)
        return y

    def backward(
        self,
        chain: Chain | Slope,
        gy: Tensor,
        x: Tensor,
        operands: Sequence[Tensor],
        needs: Sequence[bool],
        cut: Cut | None = None,
    ) -> list[Tensor]:
        tensors, layout = (x, *operands), layout_of(x, operands, needs)
        if not layout.total:
            return [layout.like(t).zero_() for t, need in zip(tensors, needs, strict=True) if need]
        inputs = _readable(layout, tensors)
        if gy.stride() != layout.strides or gy.dtype != layout.dtype:
            gy = layout.output().copy_(gy)
        launch = self.launch(chain, layout, tuple(needs), cut, (gy, *inputs))
        grid = launch.grid
        partials = [sums.partial(layout, i, grid) if need else None for i, need in enumerate(needs)]
        gradients = [
            layout.gradient(i, t) if need and not view.expanded else None
            for i, (t, need, view) in enumerate(zip(tensors, needs, layout.views, strict=True))
        ]
        launch.backward(gy, inputs, partials, gradients)
        return layout.finished(gradients, partials, tensors)

    def chosen(self, chain: Chain | Slope, layout: Layout, direction: str, cut: Cut | None = None) -> Cut:
        """Return `cut`, else what `dualop tune` found for this call, else the heuristic's choice."""
        if cut is not None:
            return cut
        default: Any = self.heuristic(chain, layout, direction)
        return tuning.chosen(self.name, chain, layout, direction, default)


def _readable(layout: Layout, tensors: Sequence[Tensor]) -> list[Tensor]:
    return [layout.readable(t) for t in tensors]
