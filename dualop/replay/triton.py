"""Describe a launch by Triton in words for `launch_triton` (triton.h), which replaces Triton's launcher in Python.

This relies on a property of triton 3.6 to 3.9: a kernel's parameters are those of its signature that are no constants,
and two pointers to scratch memory, which kernels that ask for none do not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from dualop import replay
from dualop.replay import record
from dualop.replay.record import Word

WARP = 32
PLAIN = {"num_ctas": 1, "launch_cooperative_grid": False, "global_scratch_size": 0, "profile_scratch_size": 0}


def launched(compiled: Any, grid: Sequence[int], values: Sequence[Any], named: Mapping[str, Any]) -> None:
    """Record a launch: the value of the kernel's call (None: interpreted), its grid, and its arguments."""
    if compiled is not None and record.recording():
        words = _words(compiled, grid, values, named)
        if words is not None:
            record.launched(replay.triton_launcher(), words, 0, _quiet(compiled))


def _words(compiled: Any, grid: Sequence[int], values: Sequence[Any], named: Mapping[str, Any]) -> list[Word] | None:
    """Return the words, or None if triton.h cannot make this launch."""
    metadata, signature = compiled.metadata, compiled.src.signature
    if any(getattr(metadata, name, None) != value for name, value in PLAIN.items()):
        return None
    given = dict(zip(signature, values, strict=False)) | dict(named)
    parameters: list[Word] = []
    for name, kind in signature.items():
        if kind == "constexpr":
            continue
        fits = Tensor if kind.startswith("*") else int if kind in ("i32", "i64") else ()
        if not isinstance(given[name], fits):
            return None
        parameters.append(given[name])
    parameters += (0, 0)
    size = (metadata.num_warps * WARP, metadata.shared, int(metadata.launch_pdl))
    return [0, compiled.function, *grid, *[1] * (3 - len(grid)), *size, len(parameters), *parameters]


def _quiet(compiled: Any) -> Callable[[], bool]:
    """Return True if nobody has hooked into Triton's launches. It holds the kernel, which Triton may forget."""
    from triton import knobs

    runtime = knobs.runtime
    return partial(_unhooked, runtime, runtime.launch_enter_hook, runtime.launch_exit_hook, compiled)


def _unhooked(runtime: Any, enter: Any, leave: Any, _compiled: Any) -> bool:
    same = runtime.launch_enter_hook is enter and runtime.launch_exit_hook is leave
    return same and not (getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
