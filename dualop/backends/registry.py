"""Keep the table of backends, and choose which of them runs a call.

Order of precedence: the `backend=` argument, `use_backend`, `set_backend`, DUALOP_BACKEND (read when dualop is first
used), "auto". A backend that is named runs or raises; only "auto" chooses, in the table's order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import torch
from torch import Tensor

from dualop import replay
from dualop.backends import cuda, reference, triton
from dualop.backends.base import Backend, Planned, Progress
from dualop.backends.mode import INTERPRET
from dualop.build import locks
from dualop.errors import BackendUnavailable, BuildError
from dualop.language.slopes import Slope
from dualop.language.syntax import Chain
from dualop.launch.checks import validate

ENTRY_POINTS = "dualop.backends"  # the group by which an installed package has its backends registered

BACKENDS: dict[str, Backend] = {b.name: b for b in (cuda.Cuda(), triton.TRITON, reference.Reference())}
AUTO = "auto"

_context: ContextVar[str | None] = ContextVar("dualop_backend", default=None)
_process: str | None = None
# torch.compile cannot read a ContextVar but guards on a module's global: the choice of the `use_backend` entered last,
# in any thread, of those not left yet.
_entered: list[list[str]] = []
_traced: str | None = None
_environment = os.environ.get("DUALOP_BACKEND") or AUTO


def register(backend: Backend) -> None:
    """Add a backend to the table: it can be asked for by its name, and every command knows it.

    "auto" takes it where no backend before it in the table can run. Raises BackendUnavailable for a name that is taken
    or that could not be asked for.
    """
    name = backend.name
    if name in (AUTO, *BACKENDS) or not name.isidentifier():
        raise BackendUnavailable(f"a backend cannot be called {name!r}: it takes an identifier that is not in use")
    BACKENDS[name] = backend


def unregister(name: str) -> None:
    """Take a backend out of the table again, and forget its calls."""
    del BACKENDS[name]
    replay.forget()


def forget_launches() -> None:
    """Make every backend choose its launches again, after `tuning.keep` or `tuning.forget`."""
    for backend in BACKENDS.values():
        backend.forget()
    replay.forget()


def prepare(names: Sequence[str], calls: Sequence[Planned], progress: Progress) -> None:
    """Compile what these calls need on these backends. What cannot be compiled is left to the call, which says so."""
    for name in names:
        with suppress(BuildError):
            BACKENDS[name].prepare(calls, progress)


class Broken(Backend):
    """Stand for a backend of another package that could not be loaded, and say why."""

    def __init__(self, name: str, why: str) -> None:
        self.name, self._why = name, why

    def environment(self) -> list[str]:
        return [self._why]

    def reasons(self, chain: Chain | Slope, device: torch.device) -> list[str]:
        return [self._why]

    def forward(self, chain: Chain, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        raise BackendUnavailable(self._why)

    def backward(
        self, chain: Chain | Slope, gy: Tensor, x: Tensor, operands: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        raise BackendUnavailable(self._why)

    def source(self, chain: Chain) -> str:
        raise BackendUnavailable(self._why)


def _load(entry: EntryPoint) -> None:
    """Register what an installed package has under the group: a class of backends, or what else makes one."""
    try:
        register(entry.load()())
    except Exception as error:  # somebody else's code: it must not keep the other backends from running
        first = next(iter(str(error).splitlines()), "")
        broken = Broken(entry.name, f"{entry.value} could not be loaded: {type(error).__name__}: {first}")
        with suppress(BackendUnavailable):
            register(broken)


for _entry in entry_points(group=ENTRY_POINTS):
    _load(_entry)


def interpreting() -> bool:
    """Return True if DUALOP_INTERPRET=1 lets backends of GPU kernels take CPU tensors."""
    return INTERPRET


def _known(name: str, said_by: str) -> str:
    if name != AUTO and name not in BACKENDS:
        raise BackendUnavailable(f"unknown backend {name!r} in {said_by}; there are {', '.join((AUTO, *BACKENDS))}")
    return name


def set_backend(name: str) -> None:
    """Use this backend in this process from now on: "auto" or the name of a backend. Raises BackendUnavailable."""
    global _process
    _process = _known(name, "set_backend")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use this backend within a `with` block, in this thread and in functions that torch.compile traces there."""
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
    """Return the name of the backend that has precedence now, which may be "auto"."""
    if explicit is not None:
        return _known(explicit, "backend=")
    scoped = _traced if torch.compiler.is_compiling() else _context.get()
    return scoped or _process or _known(_environment, "DUALOP_BACKEND")


def resolve(name: str, chain: Chain | Slope, device: torch.device) -> Backend:
    """Return the backend that runs `chain` on `device` if `name` is asked for.

    Raises BackendUnavailable with every reason.
    """
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
    """Hold which backend would run a call (None: the asked one cannot), and each backend's reasons why not."""

    requested: str
    chosen: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"requested {self.requested}: {self.chosen or 'nothing'} runs"]
        for name, reasons in self.reasons.items():
            lines.append(f"  {name}: {'; '.join(reasons) if reasons else 'can run'}")
        return "\n".join(lines)


def explain(chain: Chain, x: Tensor, *operands: Tensor, backend: str | None = None, **named: Tensor) -> Explanation:
    """Return which backend `chain(x, *operands, backend=backend)` would use, and why not each other one.

    Raises what the call itself would raise for its tensors, but not BackendUnavailable.
    """
    operands = chain.bind(operands, named)
    device, name = validate(x, operands, chain.operands), requested(backend)
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
