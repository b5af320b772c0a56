"""The rows: every check of this package, with the group, the text and the needs of each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import torch

# The registry first: it switches Triton's interpreter on, where that is asked for, and compilers import Triton.
from dualop.backends import registry
from torch_contract import compilation, derivatives, export, gpu, limits, modes, processes, tensors, transforms
from torch_contract.case import Case, Check, Skip

NOT_ALLOWED = "not allowed by PyTorch"
DISTRIBUTED = "distributed"
MODULES: dict[str, ModuleType] = {
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
class Row:
    """One row. `slow`: takes seconds of a compiler. `gpus`: how many CUDA GPUs it needs.

    A row of the group NOT_ALLOWED passes if PyTorch refuses the thing, of dualop and of its own functions alike.
    """

    group: str
    name: str
    text: str
    check: Check
    slow: bool = False
    gpus: int = 0

    def missing(self, device: torch.device) -> str | None:
        """Return what this machine lacks for the row, None if nothing."""
        if self.gpus and device.type != "cuda":
            return "needs a CUDA GPU" if self.gpus == 1 else f"needs {self.gpus} CUDA GPUs"
        if self.gpus > torch.cuda.device_count():
            return f"needs {self.gpus} CUDA GPUs, here is {torch.cuda.device_count()}"
        return None

    def try_on(self, backend: str, device: torch.device) -> None:
        """Raise what is wrong, or Skip."""
        # A check that broke off inside a compiled function may have left gradients switched off.
        with torch.enable_grad():
            self.check(Case(backend, device))


def _of(group: str, module: ModuleType) -> Iterator[Row]:
    for name, check in vars(module).items():
        own = inspect.isfunction(check) and check.__module__ == module.__name__ and not name.startswith("_")
        if own and list(inspect.signature(check).parameters) == ["case"]:
            slow, gpus = getattr(check, "slow", False), getattr(check, "gpus", 0)
            yield Row(group, name, check.__doc__ or "", check, slow, gpus)


def _distributed() -> Iterator[Row]:
    for check in processes.CHECKS:
        yield Row(DISTRIBUTED, check.__name__, check.__doc__ or "", _in_processes(check.__name__))


def _in_processes(name: str) -> Check:
    def check(case: Case) -> None:
        if case.device.type == "cuda" and torch.cuda.device_count() < processes.WORLD:
            raise Skip(f"needs {processes.WORLD} CUDA GPUs")
        able = tuple(b.name for b in registry.BACKENDS.values() if b.name == case.backend or not b.environment())
        wrong, _ = processes.results(able, case.device.type)[name, case.backend]
        assert not wrong, wrong

    return check


ROWS: tuple[Row, ...] = (
    *(row for group, module in MODULES.items() if group != NOT_ALLOWED for row in _of(group, module)),
    *_distributed(),
    *_of(NOT_ALLOWED, limits),
)
