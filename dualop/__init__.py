"""dualop: fused add + activation chains for PyTorch, on a CUDA C++ or an equivalent Triton kernel.

    op = dualop.chain("add | swish | tanh | gelu | hardtanh(-1, 1)")
    y = op(x, bias)

Names are loaded on first use, so that `dualop --help` does not import torch. The ops `torch.ops.dualop.*` are there as
soon as torch and dualop have been imported, or, where dualop was first, when torch reads a saved program.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout the kernels' folders lie beside this package; in a wheel they lie inside it.
_checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_checkout, "pyproject.toml")) and os.path.isdir(os.path.join(_checkout, "cuda")):
    __path__.append(_checkout)

# Triton reads this once, when it is imported; dualop may be imported before it.
if os.environ.get("DUALOP_INTERPRET", "0") not in ("", "0"):
    os.environ["TRITON_INTERPRET"] = "1"

_HOME = {
    "chain": "dualop.chains",
    "Chain": "dualop.chains",
    "reference": "dualop.backends.reference",
    "explain": "dualop.registry",
    "set_backend": "dualop.registry",
    "use_backend": "dualop.registry",
}
_MODULES = ("autograd", "backends", "check", "emit", "errors", "export", "nn", "registry", "stages")

__all__ = [*_HOME, "errors", "export", "nn", "stages"]

if TYPE_CHECKING:
    from dualop import errors as errors
    from dualop import export as export
    from dualop import nn as nn
    from dualop import stages as stages
    from dualop.backends.reference import reference as reference
    from dualop.chains import Chain as Chain
    from dualop.chains import chain as chain
    from dualop.registry import explain as explain
    from dualop.registry import set_backend as set_backend
    from dualop.registry import use_backend as use_backend


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"dualop.{name}")
    else:
        raise AttributeError(f"module 'dualop' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Registration:
    """A finder that finds nothing: it sees torch import what it reads saved programs with, and registers the ops."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name in ("torch._export.serde", "torch._inductor"):
            _watch_no_more()
            importlib.import_module("dualop.autograd")


def _watch_no_more() -> None:
    """Take the finder away: dualop.autograd is being imported, and may import from another thread meanwhile."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Registration)]


if "torch" in sys.modules:
    importlib.import_module("dualop.autograd")
else:
    sys.meta_path.insert(0, _Registration())  # type: ignore[arg-type]
