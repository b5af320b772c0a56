"""Define the errors that dualop raises: each derives from `DualopError` and from the built-in error that fits."""

from __future__ import annotations

from pathlib import Path


class DualopError(Exception):
    """Serve as the base class of every error that dualop raises on purpose."""


class ChainError(DualopError, ValueError):
    """Report a chain that cannot be read: bad syntax, an unknown stage or a wrong parameter."""


class OperandError(DualopError, TypeError):
    """Report operands that do not fit the chain: too few, too many, a wrong name, or not a tensor."""


class ShapeError(DualopError, ValueError):
    """Report shapes that do not broadcast together."""


class DtypeError(DualopError, TypeError):
    """Report a dtype that is not a real floating-point one of 16, 32 or 64 bits."""


class LayoutError(DualopError, TypeError):
    """Report a sparse or otherwise packed tensor where a strided one is needed."""


class DeviceError(DualopError, ValueError):
    """Report tensors on devices that do not go together."""


class BackendUnavailable(DualopError, RuntimeError):
    """Report that no backend, or not the one that was asked for, can run here; the message says why."""


class BuildError(DualopError, RuntimeError):
    """Report a compiler that failed.

    `first_error` is the first line of the compiler's output that mentions an error. `log` is the path of the file with
    the whole output, None where there is none.
    """

    def __init__(self, message: str, log: Path | None = None, first_error: str = "") -> None:
        super().__init__(message)
        self.log = log
        self.first_error = first_error
