"""The backends, which of them runs a call, and why the others do not.

Order of precedence: the `backend=` argument, `use_backend`, `set_backend`, DUALOP_BACKEND (read when dualop is first
used), "auto". A backend that is named runs or raises; only "auto" chooses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dualop.backends import cuda, reference, triton
from dualop.backends.mode import INTERPRET
from dualop.build import locks
from dualop.errors import BackendUnavailable
from dualop.language.slopes import Slope
from dualop.language.syntax import Chain
from dualop.launch.layout import device_of, validate


class Backend(Protocol):
    """Something that runs a chain forward and backward. Its methods get tensors that passed `layout.validate`."""

    name: str

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in an interpreter or on the host, slowly, to be tested."""

    def environment(self) -> list[str]:
        """What this machine lacks for it, each with its remedy; empty if it runs here."""

    def reasons(self, chain: Chain | Slope, device: torch.device) -> list[str]:
        """What keeps it from running this chain on this device; empty if it runs."""

    def forward(self, chain: Chain, x: Tensor, operands: Sequence[Tensor]) -> Tensor: ...

    def backward(
        self, chain: Chain | Slope, gy: Tensor, x: Tensor, operands: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        """The gradients of those of (x, *operands) that `needs` asks for, in that order, each like its tensor."""

    def source(self, chain: Chain) -> str:
        """The text that is compiled for a contiguous float32 x and one feature vector an operand."""


BACKENDS: dict[str, Backend] = {b.name: b for b in (cuda.Cuda(), triton.Triton(), reference.Reference())}
AUTO = "auto"

_context: ContextVar[str | None] = ContextVar("dualop_backend", default=None)
_process: str | None = None
# torch.compile cannot read a ContextVar but guards on a module's global: the choice of the `use_backend` entered last,
# in any thread, of those not left yet.
_entered: list[list[str]] = []
_traced: str | None = None
_environment = os.environ.get("DUALOP_BACKEND") or AUTO


def interpreting() -> bool:
    """Whether DUALOP_INTERPRET=1 lets the cuda and triton backends take CPU tensors."""
    return INTERPRET


def _known(name: str, said_by: str) -> str:
    if name != AUTO and name not in BACKENDS:
        raise BackendUnavailable(f"unknown backend {name!r} in {said_by}; there are {', '.join((AUTO, *BACKENDS))}")
    return name


def set_backend(name: str) -> None:
    """The backend of this process from now on: "auto", "cuda", "triton" or "reference"."""
    global _process
    _process = _known(name, "set_backend")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """The backend within a `with` block, in this thread (and in functions that torch.compile traces meanwhile)."""
    global _traced
    _known(name, "use_backend")
    if torch.compiler.is_compiling():  # Dynamo knows no lock, and that of torch 2.11 cannot set a ContextVar
        before, _traced = _traced, name
        try:
            yield
        finally:
            _traced = before
        return
    token, mine = _context.set(name), [name]
    with locks.brief:
        _entered.append(mine)
        _traced = name
    try:
        yield
    finally:
        _context.reset(token)
        with locks.brief:
            _entered[:] = [choice for choice in _entered if choice is not mine]
            _traced = _entered[-1][0] if _entered else None


def requested(explicit: str | None = None) -> str:
    """The name that has precedence now."""
    if explicit is not None:
        return _known(explicit, "backend=")
    scoped = _traced if torch.compiler.is_compiling() else _context.get()
    return scoped or _process or _known(_environment, "DUALOP_BACKEND")


def resolve(name: str, chain: Chain | Slope, device: torch.device) -> Backend:
    """The backend that runs `chain` on `device` when `name` is asked for; BackendUnavailable with every reason."""
    if name != AUTO:
        backend = BACKENDS[name]
        if reasons := backend.reasons(chain, device):
            able = [b.name for b in BACKENDS.values() if not b.reasons(chain, device)]
            raise BackendUnavailable(
                f"backend {name} cannot run `{chain}` on {device}: {'; '.join(reasons)}. "
                f"Backends that can: {', '.join(able) or 'none'}"
            )
        return backend
    # Interpreted kernels are for tests: they run only when asked for by name.
    for backend in BACKENDS.values():
        if not backend.reasons(chain, device) and not (backend.interpreted and device.type == "cpu"):
            return backend
    raise BackendUnavailable(f"no backend can run `{chain}` on {device}: {explain_device(chain, device)}")


def explain_device(chain: Chain | Slope, device: torch.device) -> str:
    return "; ".join(f"{b.name}: {', '.join(b.reasons(chain, device)) or 'can'}" for b in BACKENDS.values())


@dataclass(frozen=True)
class Explanation:
    """Which backend would run a call (None: the asked one cannot), and each backend's reasons why not."""

    requested: str
    chosen: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"requested {self.requested}: {self.chosen or 'nothing'} runs"]
        for name, reasons in self.reasons.items():
            lines.append(f"  {name}: {'; '.join(reasons) if reasons else 'can run'}")
        return "\n".join(lines)


def explain(chain: Chain, x: Tensor, *operands: Tensor, backend: str | None = None, **named: Tensor) -> Explanation:
    """Which backend `chain(x, *operands, backend=backend)` would run on, and why not on each other one.

    Raises what the call itself would raise for its tensors, but not BackendUnavailable.
    """
    operands = chain.bind(operands, named)
    validate(x, operands, chain.operands)
    device, name = device_of(x, operands), requested(backend)
    reasons = {b.name: list(b.reasons(chain, device)) for b in BACKENDS.values()}
    try:
        chosen = resolve(name, chain, device).name
    except BackendUnavailable:
        chosen = None
    for other in BACKENDS.values():
        if not reasons[other.name] and other.name != chosen:
            asleep = name == AUTO and other.interpreted and device.type == "cpu"
            why = "runs interpreted here, so only when asked for by name" if asleep else f"{chosen or name} was chosen"
            reasons[other.name].append(why)
    return Explanation(name, chosen, reasons)
