"""What a PyTorch user may do with a chain: one check a function, whose docstring is the row that the table shows.

    rows = run(["cuda", "triton"], torch.device("cuda"))

A check takes a `Case` (case.py) and raises what it finds wrong. Each is made against torch's own functions, most on the
chain `add | swish | tanh | gelu | hardtanh(-1, 1)` in float64. To add one, write a function in the module of its group.
"""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

# The registry first: it switches Triton's interpreter on, where that is asked for, and compilers import Triton.
from dualop.backends import registry
from dualop.capabilities import compilation, derivatives, export, gpu, limits, modes, processes, tensors, transforms
from dualop.capabilities.case import Case, Check, Skip

NOT_ALLOWED = "not allowed by PyTorch"
_MODULES: dict[str, ModuleType] = {
    "torch.autograd": derivatives,
    "torch.func": transforms,
    "torch.compile": compilation,
    "torch.export": export,
    "tensors": tensors,
    "modes and tools": modes,
    "GPU": gpu,
    NOT_ALLOWED: limits,
}


@dataclass(frozen=True)
class Capability:
    """One row. `slow`: takes seconds of a compiler. `gpus`: how many CUDA GPUs it needs."""

    group: str
    name: str
    text: str
    check: Check
    slow: bool = False
    gpus: int = 0

    def missing(self, device: torch.device) -> str | None:
        """What this machine lacks for it, if anything."""
        if self.gpus and device.type != "cuda":
            return "needs a CUDA GPU" if self.gpus == 1 else f"needs {self.gpus} CUDA GPUs"
        if self.gpus > torch.cuda.device_count():
            return f"needs {self.gpus} CUDA GPUs, here is {torch.cuda.device_count()}"
        return None

    def try_on(self, backend: str, device: torch.device) -> str:
        """What the check has to say of its success, most often nothing; raises what is wrong, or Skip."""
        # A check that broke off inside a compiled function may have left gradients switched off.
        with torch.enable_grad():
            return self.check(Case(backend, device)) or ""


@dataclass(frozen=True)
class Row:
    """What came of one check on one backend: `ok` is None where it could not be made, and `note` says why.

    In the group NOT_ALLOWED ok means that PyTorch refuses it, of dualop and of its own functions alike.
    """

    group: str
    name: str
    capability: str
    backend: str
    ok: bool | None
    note: str
    seconds: float


def _of(group: str, module: ModuleType) -> Iterator[Capability]:
    for name, check in vars(module).items():
        own = inspect.isfunction(check) and check.__module__ == module.__name__ and not name.startswith("_")
        if own and list(inspect.signature(check).parameters) == ["case"]:
            slow, gpus = getattr(check, "slow", False), getattr(check, "gpus", 0)
            yield Capability(group, name, check.__doc__ or "", check, slow, gpus)


def _distributed() -> Iterator[Capability]:
    for row in processes.ROWS:
        yield Capability("distributed", row.__name__, row.__doc__ or "", _in_processes(row.__name__))


def _in_processes(name: str) -> Check:
    def check(case: Case) -> None:
        if case.device.type == "cuda" and torch.cuda.device_count() < processes.WORLD:
            raise Skip(f"needs {processes.WORLD} CUDA GPUs")
        able = tuple(b.name for b in registry.BACKENDS.values() if b.name == case.backend or not b.environment())
        wrong, _ = processes.results(able, case.device.type)[name, case.backend]
        assert not wrong, wrong

    return check


CAPABILITIES: tuple[Capability, ...] = (
    *(c for group, module in _MODULES.items() if group != NOT_ALLOWED for c in _of(group, module)),
    *_distributed(),
    *_of(NOT_ALLOWED, limits),
)


def run(
    backends: Sequence[str],
    device: torch.device,
    names: Sequence[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """A row for each capability (of these names, or all) and each backend; the backends must run on `device`.

    `progress(text)` is called before each check.
    """
    rows = []
    for capability in CAPABILITIES:
        if names is None or capability.name in names:
            for backend in backends:
                progress(f"{capability.text}, {backend}")
                rows.append(_row(capability, backend, device))
    return rows


def _row(capability: Capability, backend: str, device: torch.device) -> Row:
    begin = time.perf_counter()
    ok, note = None, capability.missing(device)
    if note is None:
        try:
            with _quiet():
                note = capability.try_on(backend, device)
            ok = True
        except Skip as skipped:
            note = str(skipped)
        except Exception as error:
            ok, note = False, f"{type(error).__name__}: {str(error).strip()[:1000]}"
    seconds = round(time.perf_counter() - begin, 3)
    return Row(capability.group, capability.name, capability.text, backend, ok, note, seconds)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and no logs of the compilers: what goes wrong is in the row."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
