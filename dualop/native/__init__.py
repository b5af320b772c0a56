"""The short way in C++: known calls are made again without Python, but for one function.

    calls = native.known.get((chain.text, "cuda"))      # None: Python's way
    y = calls(x, (bias,))                               # a result; None: not seen yet; False: another way

A call's first time goes Python's way and is recorded (dualop/native/record.py): which memory it allocates, what its
launchers are given. Each later call with tensors of the same layouts, dtypes, device and alignment is made again from
the record: `replay` in module.cpp checks that nobody watches, allocates, fills in addresses and calls the launchers.

The extension is compiled once for a Python and a torch, in the background of a process's first call; until it is there,
and wherever it cannot be built, Python's way serves. DUALOP_NATIVE=0 switches it off.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad

from dualop import build
from dualop.errors import DualopError

SOURCES = ("tensors.h", "call.h", "module.cpp")
FLAGS = ("-O2", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden")
LIBRARIES = ("-ltorch_python", "-ltorch_cpu", "-lc10")
SECONDS = 120  # more than any compiler takes, so that a hanging one is given up

# The Calls of a chain's text and the name of a backend, "auto" too.
known: dict[tuple[str, str], Any] = {}
on = os.environ.get("DUALOP_NATIVE", "1") not in ("", "0")
why_not = ""  # the extension is not there

_module: Any = None
_begun = False
_lock = threading.Lock()


class Extension(build.Build):
    """The extension's library. Compiled without load_inline, beside whose builds of kernels it can run."""

    def _made(self, work: Path) -> Path:
        made, source = work / f"{self.name}.so", self.folder / "source.cpp"
        root = Path(torch.__file__).parent
        includes = [f"-I{sysconfig.get_path('include')}", "-isystem", str(root / "include")]
        command = [str(build.find_cxx()), *FLAGS, *includes, str(source), "-o", str(made), f"-L{root / 'lib'}", *LIBRARIES]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return made


def extension() -> Extension:
    """The extension for this Python and this torch."""
    texts = [(Path(__file__).parent / name).read_text() for name in SOURCES]
    text = "\n".join(line for t in texts for line in t.splitlines() if line != "#pragma once" and '#include "' not in line)
    return Extension("native", f"// {sysconfig.get_config_var('SOABI')} {' '.join(FLAGS)}\n{text}\n", host=True)


def calls(chain: str, requested: str, backend: str) -> Any:
    """The Calls of a chain on the `backend` that `requested` chose, made if need be; None without the extension."""
    if not on or backend == "reference":
        return None
    if not _begun:
        _begin()
    if _module is None:
        return None
    found = known.get((chain, backend))
    if found is None:
        found = known[chain, backend] = _module.Calls((chain, backend))
    return known.setdefault((chain, requested), found)


def forget() -> None:
    """Have every call go Python's way again once: another launch may be chosen from now on."""
    known.clear()


def load() -> bool:
    """Compile the extension now unless it is there; whether it is. `why_not` says why if not."""
    global _begun
    if not on:
        return False
    with _lock:
        _begun = True
        if _module is None:
            _build()
    return _module is not None


def _begin() -> None:
    """Load the extension, or have a thread build it, which a process that ends does not wait for."""
    global _begun
    with _lock:
        if _begun:
            return
        _begun = True
    try:
        if extension().try_load() is None:
            threading.Thread(target=_build, name="dualop native build", daemon=True).start()
        else:
            _build()
    except (OSError, RuntimeError) as error:
        _failed(error)


def _build() -> None:
    global _module, why_not
    try:
        if not sysconfig.get_config_var("Py_GIL_DISABLED"):
            _module, why_not = _imported(extension().build()), ""
        else:
            why_not = "a Python without its global lock"
    except (DualopError, ImportError, OSError, RuntimeError) as error:
        _failed(error)


def _failed(error: Exception) -> None:
    global why_not
    why_not = next(iter(str(error).splitlines()), type(error).__name__)


@lru_cache(maxsize=1)
def _imported(path: Path) -> Any:
    """The module, told what it has to know of torch."""
    from dualop.autograd import apply
    from dualop.direct import PLAIN_KEYS

    loader = importlib.machinery.ExtensionFileLoader("dualop_native", str(path))
    spec = importlib.util.spec_from_loader("dualop_native", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    tensor, stream_of = torch.empty(0), getattr(torch._C, "_cuda_getCurrentRawStream", None)
    levels = vars(forward_ad)
    setup = (torch.Tensor, torch.nn.Parameter, sorted(PLAIN_KEYS), _profiler_enabled, levels, stream_of, apply)
    module.setup(tensor, *setup)  # type: ignore[attr-defined]
    return module
