"""Fuse add + activation chains for PyTorch, on a CUDA C++ kernel or an equivalent Triton kernel.

    op = dualop.chain("add | swish | tanh | gelu | hardtanh(-1, 1)")
    y = op(x, bias)

The ops `torch.ops.dualop.*` exist once dualop has been imported. Only the command `dualop` imports torch later, so that
`dualop --help` is quick; without torch, `dualop.machine.doctor` can still be imported. Other names are loaded on first
use.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout the kernels' folders lie beside this package; in a wheel they lie inside it.
_checkout = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if os.path.isfile(os.path.join(_checkout, "pyproject.toml")) and os.path.isdir(os.path.join(_checkout, "cuda")):
    __path__.append(_checkout)

# Triton reads this when it is imported; where that was before, dualop/backends/mode.py finds out.
if os.environ.get("DUALOP_INTERPRET", "0") not in ("", "0") and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

# Where each public name lies: (module, attribute), or the module itself.
_HOME = {
    "chain": ("dualop.op.callable", "chain"),
    "Chain": ("dualop.op.callable", "Chain"),
    "reference": ("dualop.backends.reference", "reference"),
    "explain": ("dualop.backends.registry", "explain"),
    "set_backend": ("dualop.backends.registry", "set_backend"),
    "use_backend": ("dualop.backends.registry", "use_backend"),
    "errors": ("dualop.errors", ""),
    "export": ("dualop.export", ""),
    "nn": ("dualop.nn", ""),
    "stages": ("dualop.language.stages", ""),
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from dualop import errors as errors
    from dualop import export as export
    from dualop import nn as nn
    from dualop.backends.reference import reference as reference
    from dualop.backends.registry import explain as explain
    from dualop.backends.registry import set_backend as set_backend
    from dualop.backends.registry import use_backend as use_backend
    from dualop.language import stages as stages
    from dualop.op.callable import Chain as Chain
    from dualop.op.callable import chain as chain


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dualop' has no attribute {name!r}")
    module, attribute = _HOME[name]
    value = importlib.import_module(module)
    globals()[name] = value = getattr(value, attribute) if attribute else value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


# The script is called dualop; `python -m dualop` imports this package before it says what it runs.
_is_command = os.path.basename(sys.argv[0] if sys.argv else "") == "dualop" or sys.orig_argv[1:3] == ["-m", "dualop"]
if not _is_command and importlib.util.find_spec("torch"):
    importlib.import_module("dualop.op.library")
