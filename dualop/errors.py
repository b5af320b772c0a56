"""Every error that dualop raises on purpose: a child of `DualopError` and of the built-in type that fits."""

from __future__ import annotations

from pathlib import Path


class DualopError(Exception):
    """Base of all errors of dualop."""


class ChainError(DualopError, ValueError):
    """A chain that cannot be read: bad syntax, an unknown stage, a wrong parameter."""


class OperandError(DualopError, TypeError):
    """Operands that do not fit the chain: too few, too many, a wrong name, not a tensor."""


class ShapeError(DualopError, ValueError):
    """Shapes that do not broadcast together."""


class DtypeError(DualopError, TypeError):
    """A dtype that is not a real floating-point one of 16, 32 or 64 bits."""


class LayoutError(DualopError, TypeError):
    """A sparse or otherwise packed tensor where a strided one is needed."""


class DeviceError(DualopError, ValueError):
    """Tensors on devices that do not go together."""


class BackendUnavailable(DualopError, RuntimeError):
    """A backend that was asked for and cannot run this call; the message says why and which one can."""


class BuildError(DualopError, RuntimeError):
    """A compiler that failed.

    `first_error` is its first line that speaks of an error, `log` the file that keeps everything it said.
    """

    def __init__(self, message: str, log: Path | None = None, first_error: str = "") -> None:
        super().__init__(message)
        self.log = log
        self.first_error = first_error
