"""Replay known calls in C++, without Python except for one function.

    calls = replay.known.get((chain.text, "cuda"))      # None: use Python
    y = calls(x, (bias,))                               # None: use Python
    y = torch.ops.dualop.forward(x, [bias], chain.text, "cuda")     # replays too, as a compiled graph calls it

The first call of its kind runs in Python and is recorded (dualop/replay/record.py): which memory it allocates, and what
its launchers receive. Each later call with tensors of the same layouts, dtypes, device and alignment is replayed from
the record: allocate, fill in addresses, call the launchers. There are two ways to the records. `replay` in calls.h
serves the short way of a chain that is called in Python, and checks that nothing observes the call. The kernels in
operators.h serve the ops by their own names; torch's dispatcher calls them where nothing observes the call any more.

The extension is compiled once for a Python and a torch, in the background of a process's first call. Until it is ready,
and wherever it cannot be built, calls run in Python. DUALOP_NATIVE=0 switches it off.
"""

from __future__ import annotations

import atexit
import importlib.machinery
import importlib.util
import os
import signal
import subprocess
import sysconfig
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from dualop import torch_private
from dualop.build import build, locks, toolchain

SOURCES = ("tensors.h", "triton.h", "call.h", "calls.h", "operators.h", "module.cpp")
FLAGS = ("-O2", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden")
LIBRARIES = ("-ltorch_python", "-ltorch_cpu", "-lc10")
SECONDS = 120  # longer than any compiler needs, so that a hanging one is abandoned

Names = tuple[str, str]  # of a call: a chain's text, and a backend's name or "auto"

known: dict[Names, Any] = {}  # the Calls of each, which the ops' kernels in C++ look up, too
# Python's global lock prevents changes of the records while they are read.
on = os.environ.get("DUALOP_NATIVE", "1") not in ("", "0") and not sysconfig.get_config_var("Py_GIL_DISABLED")
why_not = "" if on else "DUALOP_NATIVE=0"  # the extension is not there

_module: Any = None
_begun = False
_building = False  # a thread is building


class Extension(build.Build):
    """Build the extension's library without load_inline, so that it can be compiled while kernels are built."""

    def _made(self, work: Path) -> Path:
        made, root = work / f"{self.name}.so", Path(torch.__file__).parent
        compiler, source = toolchain.cxx_command(), str(self.folder / "source.cpp")
        headers = (f"-I{sysconfig.get_path('include')}", "-isystem", str(root / "include"))
        command = [*compiler, *FLAGS, *headers, source, "-o", str(made), f"-L{root / 'lib'}", *LIBRARIES]
        status, said = _run(command)
        if status:
            raise RuntimeError(said)
        return made


def _run(command: list[str]) -> tuple[int, str]:
    """Return exit status and output of a compiler that ends with this process; nobody waits for its daemon thread."""
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process, owner = subprocess.Popen(command, **pipes, start_new_session=True), os.getpid()

    def stop() -> None:
        if os.getpid() == owner:  # a forked child has this function too
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    atexit.register(stop)
    try:
        out, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        stop()
        raise
    finally:
        atexit.unregister(stop)
    return process.returncode, out.decode(errors="replace")


def extension() -> Extension:
    """Return the extension for this Python and this torch."""
    lines = [line for name in SOURCES for line in (Path(__file__).parent / name).read_text("utf-8").splitlines()]
    own = [line for line in lines if line != "#pragma once" and '#include "' not in line]
    about = f"// {sysconfig.get_config_var('SOABI')} {' '.join(FLAGS)}"
    return Extension("native", "\n".join([about, *own, ""]), host=True)


def missing() -> list[str]:
    """Return what keeps this machine from compiling the extension, each with advice."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return [*toolchain.missing_tools(True), *([] if header.is_file() else [f"no {header}: install Python's headers"])]


def calls(asked: Names, chosen: Names, apply: Callable[..., Any], first: Any) -> Any:
    """Return the Calls of a chain on the backend that was `chosen`, or None without the extension.

    They are created if needed, and known as `asked` from now on, too. `apply(first, *tensors)` makes a node of the
    autograd.Function where a call needs one.
    """
    if not on or not torch_private.SHORT_WAY.works:
        return None
    if not _begun:
        _begin()
    if _module is None:
        return None
    found = known.get(chosen)
    if found is None:
        found = known[chosen] = _module.Calls(first, apply)
    known.setdefault(asked, found)
    return found


def triton_launcher() -> int:
    """Return the address of `launch_triton` in triton.h."""
    return _module.triton_launcher


def forget() -> None:
    """Forget all records, so that every call runs in Python once more: another launch may be chosen from now on."""
    for found in list(known.values()):
        found.forget()


def load() -> bool:
    """Compile the extension now unless it exists, and return whether it exists. `why_not` says why if not."""
    global _begun
    if on and _module is None:
        _begun = True
        _build()
    return _module is not None


def _begin() -> None:
    """Load the extension, or build it in a thread that the end of the process does not wait for."""
    global _begun, _building
    with locks.brief:
        if _begun:
            return
        _begun = _building = True
    try:
        built = extension().try_load() is not None
    except Exception:  # the build will fail in the same way and report it
        built = False
    if built:
        _build()
    else:
        threading.Thread(target=_build, name="dualop native build", daemon=True).start()


def _build() -> None:
    global _module, why_not, _building
    try:
        _module, why_not = _imported(extension().load()._name), ""
    except Exception as error:  # whatever it is, calls run in Python
        why_not = next(iter(str(error).splitlines()), type(error).__name__)
    _building = False


def _in_child() -> None:
    """Start anew in a child that was forked while a thread was building, because the child lacks that thread."""
    global _begun, _building
    if _building:
        _begun = _building = False


locks.in_child(_in_child)


@lru_cache(maxsize=1)
def _imported(path: str) -> Any:
    """Import the module, and tell it what it has to know of torch."""
    loader = importlib.machinery.ExtensionFileLoader("dualop_native", path)
    spec = importlib.util.spec_from_loader("dualop_native", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    plain, watchers = sorted(torch_private.PLAIN_KEYS), (torch_private.profiling, vars(forward_ad))
    setup: Any = module.setup  # type: ignore[attr-defined]
    setup(torch.empty(0), torch.Tensor, torch.nn.Parameter, plain, *watchers, known)
    return module
