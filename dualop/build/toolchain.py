"""Find the programs that compile kernels: the C++ compiler, ninja, and nvcc with its CUDA toolkit.

Everything is looked up anew on each call, because PATH and the variables may change in a running process.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

USUAL_CUDA = "/usr/local/cuda"


class Tool(NamedTuple):
    """Describe a program that builds need: how it is found, and what to do where it is missing."""

    find: Callable[[], Path | None]
    advice: str


def missing_tools(host: bool) -> list[str]:
    """Return what a build lacks on this machine, each with advice; empty if nothing is missing. nvcc is for GPUs."""
    lacking = [name for name, tool in TOOLS.items() if not (host and name == "nvcc") and tool.find() is None]
    return [f"{wrong_choice(name) or f'no {name}'}: {TOOLS[name].advice}" for name in lacking]


def wrong_choice(name: str) -> str:
    """Return what to say of a missing C++ compiler that CXX names; "" if the environment chooses no such tool."""
    chosen = os.environ.get("CXX") if name == "g++" else None
    return f"CXX={chosen} is not there" if chosen else ""


def cxx_command() -> list[str]:
    """Return the words of the C++ compiler's command from CXX, or CXX as one word if it is a program as a whole."""
    text = os.environ.get("CXX") or "c++"
    words = [text]
    if _which(text) is None:
        with suppress(ValueError):  # a quotation mark without its partner
            words = shlex.split(text) or ["c++"]
    if os.sep in words[0]:  # ninja starts it in another folder
        words[0] = os.path.abspath(words[0])
    return words


def cxx_problem() -> str:
    """Return why the C++ compiler cannot be started, else ""."""
    try:
        done = subprocess.run([*cxx_command(), "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{error}\n"
    return (done.stderr or done.stdout).decode(errors="replace") if done.returncode else ""


def find_cxx() -> Path | None:
    """Return the path of the C++ compiler that a build calls; of CXX="ccache g++" it is the first word."""
    return _which(cxx_command()[0])


def find_ninja() -> Path | None:
    """Return the path of ninja on PATH, or beside this Python."""
    return _which("ninja") or _which("ninja", sysconfig.get_path("scripts"))


def find_nvcc() -> Path | None:
    """Return the path of nvcc in the CUDA toolkit that `cuda_home` finds."""
    home = cuda_home()
    return home / "bin" / "nvcc" if home else None


def cuda_home() -> Path | None:
    """Return the root of the CUDA toolkit: CUDA_HOME or CUDA_PATH, else that of the nvcc on PATH, else the usual place.

    An nvcc on PATH may be a script that calls the real one, so a root counts only with CUDA's headers in it.
    """
    chosen = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if chosen:
        return Path(chosen) if (Path(chosen) / "bin" / "nvcc").is_file() else None
    nvcc = _which("nvcc")
    for root in (nvcc.resolve().parents[1] if nvcc else Path(USUAL_CUDA), Path(USUAL_CUDA)):
        headers = (root / "include", *root.glob("targets/*/include"))
        if (root / "bin" / "nvcc").is_file() and any((folder / "cuda_runtime.h").is_file() for folder in headers):
            return root
    return None


def _which(name: str, path: str | None = None) -> Path | None:
    found = shutil.which(name, path=path)
    return Path(found) if found else None


TOOLS = {
    "g++": Tool(find_cxx, "apt-get install g++, or set CXX to a C++ compiler"),
    "ninja": Tool(find_ninja, "pip install ninja"),
    "nvcc": Tool(find_nvcc, "install the CUDA toolkit (for kernels on a GPU), with its bin/ on PATH or CUDA_HOME set"),
}
