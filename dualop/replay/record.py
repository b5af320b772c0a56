"""Record a call: what Python allocates and launches, with places for addresses, so that C++ can repeat it.

A word of a launch is a number, or a tensor where the launcher needs its address. A tensor that the call did not receive
is assumed to be memory that it allocated, uninitialised. That is right if nothing was copied, which is detected: a
tensor that no kernel read itself is missing among the words, and so is a result that torch computed. In these cases the
call is not recorded and keeps running in Python.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Word = int | Tensor | None
Wanted = tuple[int | bool, ...] | None  # None: forward; (order of the derivative, *which gradients of x and operands)
# The launcher's address, its words, the stream's place among them, and whether it may be called, or None if always.
Launched = tuple[int, Sequence[Word], int, Callable[[], bool] | None]

_here = threading.local()


def number(word: Word) -> int:
    """Return the word that the launcher gets."""
    return word if isinstance(word, int) else 0 if word is None else word.data_ptr()


def address(launcher: Any) -> int:
    """Return the address of a ctypes function."""
    return ctypes.cast(launcher, ctypes.c_void_p).value or 0


def recording() -> bool:
    """Return True if this thread records a call."""
    return getattr(_here, "launches", None) is not None


def launched(launcher: Any, words: Sequence[Word], stream: int, allowed: Callable[[], bool] | None = None) -> None:
    """Record a launch; backends call this once per kernel, with a ctypes function or its address, and its words."""
    if recording():
        at = launcher if isinstance(launcher, int) else address(launcher)
        _here.launches.append((at, words, stream, allowed))


def recorded(
    calls: Any, tensors: Sequence[Tensor], wanted: Wanted, call: Callable[[], Sequence[Tensor]]
) -> Sequence[Tensor]:
    """Return the results of `call`; afterwards `calls` (dualop/replay/module.cpp) knows how they are made.

    `tensors` are x and the operands, behind gy if the results are the gradients that `wanted` asks for.
    """
    tensors = tuple(tensors)
    known = calls is None or not calls.unknown(wanted, tensors)
    if known or len({id(t) for t in tensors}) < len(tensors):  # the record could not tell equal ones apart
        return call()
    launches: list[Launched] = []
    _here.launches = launches
    try:
        results = call()
    finally:
        _here.launches = None
    calls.learn(*_record(tensors, wanted, launches, results))
    return results


def _record(
    tensors: tuple[Tensor, ...],
    wanted: Wanted,
    launches: Sequence[Launched],
    results: Sequence[Tensor],
) -> tuple[Any, ...]:
    """Return what Calls.learn takes. It has no launches where the call cannot be recorded."""
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    used = [[(slot, t) for slot, t in enumerate(words) if isinstance(t, Tensor)] for _, words, *_ in launches]
    buffers = {id(t): t for pairs in used for _, t in pairs if id(t) not in places}
    read = {id(t) for pairs in used for _, t in pairs}
    whole = all(id(t) in read for t in tensors) and all(id(t) in buffers for t in results)
    if not whole:
        return wanted, tensors, (), (), ()
    made = {key: place for place, key in enumerate(buffers)}
    places |= {key: len(tensors) + place for key, place in made.items()}
    given = iter(results)
    return (
        wanted,
        tensors,
        tuple(buffers.values()),
        tuple(
            (
                function,
                [0 if isinstance(word, Tensor) else number(word) for word in words],
                [slot for slot, _ in pairs],
                [places[id(t)] for _, t in pairs],
                stream,
                allowed,
            )
            for (function, words, stream, allowed), pairs in zip(launches, used, strict=True)
        ),
        tuple(made[id(next(given))] if need else -1 for need in (wanted[1:] if wanted else (True,))),
    )
