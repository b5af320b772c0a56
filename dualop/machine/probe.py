"""Ask this machine questions that may hang, crash or meet something broken, each in a child process.

    facts()       what torch, the GPUs, triton and the backends answer, from one Python that imports them step by step
    tool(find)    a compiler's path and version
    nvidia_smi()  what the driver lists

Every child has a time limit, and nothing here raises. So there is an answer even where importing torch ends in a
segmentation fault; this module imports neither torch nor triton into its own process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOOL_SECONDS = 5.0
FACTS_SECONDS = 60.0  # torch on a cold disk takes its time; with warm files it is two to three seconds

_MARK = "dualop-probe "


def facts() -> dict[str, Any]:
    """Return the answers of `answer_all` from a child that runs this file with this Python and this sys.path.

    The keys are those of STEPS. A step that failed has `{"error": why}` instead, and so has the one in which the child
    died; the steps after that one are missing.
    """
    status, out, err = run([sys.executable, __file__, json.dumps(sys.path)], FACTS_SECONDS)
    answers: dict[str, Any] = {}
    begun = "torch"
    for line in out.splitlines():
        if line.startswith(_MARK):
            with suppress(ValueError):  # the last line of a killed child may be cut
                said = json.loads(line[len(_MARK) :])
                begun = said.pop("begun", begun)
                answers.update(said)
    if begun not in answers:
        died = f"Python died: {signal.strsignal(-status)}" if status is not None and status < 0 else ""
        answers[begun] = {"error": died or next(iter(err.strip().splitlines()), f"exit status {status}")}
    return answers


def answer_all() -> None:
    """Print the findings of each step as a marked line of JSON. Other lines come from packages that print."""
    for name, step in STEPS.items():
        print(f"\n{_MARK}{json.dumps({'begun': name})}", flush=True)
        try:
            answer = {name: step()}
        except BaseException as error:  # a broken package raises what it likes, SystemExit too
            answer = {name: {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}}
        print(f"\n{_MARK}{json.dumps(answer)}", flush=True)


def _torch() -> dict[str, Any]:
    import torch

    return {"version": str(torch.__version__), "cuda": torch.version.cuda, "file": torch.__file__}


def _private() -> list[str]:
    """Return the purposes that fall back, because this torch has other private names."""
    with warnings.catch_warnings():  # dualop tries the names out on a torch that is not tested
        warnings.simplefilter("ignore")
        from dualop import torch_private
    return [f"{p.why_not}; {p.fallback}" for p in torch_private.PURPOSES if not p.works]


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    seen = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "capability": [p.major, p.minor], "sms": p.multi_processor_count, "bytes": p.total_memory}
        for p in seen
    ]


def _triton() -> dict[str, Any]:
    import triton

    return {"version": str(triton.__version__), "file": triton.__file__}


def _backends() -> dict[str, Any]:
    from dualop.backends.registry import BACKENDS

    answers: dict[str, Any] = {}
    for name, backend in BACKENDS.items():
        try:
            answers[name] = {"reasons": list(backend.environment()), "interpreted": bool(backend.interpreted)}
        except Exception as error:
            answers[name] = {"reasons": [f"{type(error).__name__}: {error}"], "interpreted": False}
    return answers


def _tuned() -> dict[str, Any]:
    import torch

    from dualop.launch import tuning

    file, launches = tuning.kept(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    return {"file": str(file), "launches": launches}


def _native() -> dict[str, Any]:
    from dualop import replay

    built = replay.on and replay.extension().try_load() is not None
    return {"on": replay.on, "why": replay.why_not, "built": built, "missing": replay.missing()}


STEPS: dict[str, Callable[[], Any]] = {
    "torch": _torch,
    "gpus": _gpus,
    "private": _private,
    "triton": _triton,  # after dualop was imported, which decides whether triton starts as its interpreter
    "backends": _backends,
    "tuned": _tuned,
    "native": _native,
}


@dataclass(frozen=True)
class FoundTool:
    """Hold what a compiler answers: `path` is None where it is missing; `problem` says why it does not answer."""

    path: Path | None
    version: str = ""
    problem: str = ""


def tool(find: Callable[[], Path | None]) -> FoundTool:
    """Ask the program that `find` finds for its version."""
    try:
        path = find()
    except Exception as error:  # CXX may hold what no shell would read
        return FoundTool(None, problem=str(error))
    if path is None:
        return FoundTool(None)
    status, out, err = run([str(path), "--version"], TOOL_SECONDS)
    if status != 0:
        return FoundTool(path, problem=next(iter((err or out).strip().splitlines()), f"exit status {status}"))
    # nvcc says "release 13.0, V13.0.88", g++ "g++ (Debian 12.2.0-14) 12.2.0", ninja just "1.11.1".
    version = re.search(r"release (\d+(?:\.\d+)+)", out) or re.search(r"(?:^|\s)(\d+(?:\.\d+)+)", out)
    return FoundTool(path, version[1] if version else "")


def nvidia_smi() -> list[dict[str, str]]:
    """Return name and driver_version of each GPU that the driver's tool lists; empty if it gives no answer."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return []
    query = ("name", "driver_version")
    status, out, _ = run([path, f"--query-gpu={','.join(query)}", "--format=csv,noheader"], TOOL_SECONDS)
    lines = [[field.strip() for field in line.split(",")] for line in out.splitlines()] if status == 0 else []
    return [dict(zip(query, fields)) for fields in lines if len(fields) == len(query)]


def run(command: list[str], seconds: float) -> tuple[int | None, str, str]:
    """Return exit status (None: it timed out or could not start), stdout and stderr of `command`.

    The command gets a process group of its own, which is killed as a whole: the child of a wrapper script would
    otherwise keep the pipes open.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return None, "", str(error)
    try:
        out, err = process.communicate(timeout=seconds)
        return process.returncode, out, err
    except subprocess.TimeoutExpired:
        try:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate(timeout=1.0)  # what it said before
        except (OSError, subprocess.TimeoutExpired):
            out, err = "", ""
        return None, out, f"no answer within {seconds:g} s\n{err}"


if __name__ == "__main__":  # the child, which must not import dualop, and torch with it, before the step "torch"
    sys.path[:] = json.loads(sys.argv[1])
    answer_all()
