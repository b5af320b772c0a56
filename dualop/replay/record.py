"""A call's record: what Python's way allocates and launches, as places of addresses, for C++ to do again.

A word of a launch is a number, or a tensor where the launcher wants its address. A tensor that the call was not given
is memory that it allocated, uninitialised. So it is if nothing was copied, which shows: a tensor that no kernel read
itself is missing among the words, and so is a result that torch computed. Then there is no record.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Word = int | Tensor | None
# The launcher's address, its words, the stream's place among them, and whether it may be called, or None if always.
Launched = tuple[int, Sequence[Word], int, Callable[[], bool] | None]

_here = threading.local()


def number(word: Word) -> int:
    """The word that the launcher gets."""
    return word if isinstance(word, int) else 0 if word is None else word.data_ptr()


def address(launcher: Any) -> int:
    """Of a ctypes function."""
    return ctypes.cast(launcher, ctypes.c_void_p).value or 0


def recording() -> bool:
    """Whether this thread records a call."""
    return getattr(_here, "launches", None) is not None


def launched(launcher: Any, words: Sequence[Word], stream: int, allowed: Callable[[], bool] | None = None) -> None:
    """Said by a backend of each launch: a ctypes function of a block of words, or its address, and these words."""
    if recording():
        at = launcher if isinstance(launcher, int) else address(launcher)
        _here.launches.append((at, words, stream, allowed))


def recorded(
    calls: Any, tensors: Sequence[Tensor], needs: Sequence[bool] | None, call: Callable[[], Sequence[Tensor]]
) -> Sequence[Tensor]:
    """The results of `call`, after which `calls` (dualop/replay/module.cpp) knows how they are made.

    `needs` is None forward; backward it says for each of (x, *operands) whether its gradient is among the results.
    """
    if len({id(t) for t in tensors}) < len(tensors):  # the record could not tell them apart
        return call()
    launches: list[Launched] = []
    _here.launches = launches
    try:
        results = call()
    finally:
        _here.launches = None
    calls.learn(*_record(tensors, needs, launches, results))
    return results


def _record(
    tensors: Sequence[Tensor], needs: Sequence[bool] | None, launches: Sequence[Launched], results: Sequence[Tensor]
) -> tuple[Any, ...]:
    """What Calls.learn takes. Without launches where there is no record."""
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    used = [[(slot, t) for slot, t in enumerate(words) if isinstance(t, Tensor)] for _, words, *_ in launches]
    buffers = {id(t): t for pairs in used for _, t in pairs if id(t) not in places}
    read = {id(t) for pairs in used for _, t in pairs}
    flags = None if needs is None else (False, False, *needs)
    whole = all(id(t) in read for t in tensors) and all(id(t) in buffers for t in results)
    if not whole:
        return flags, tuple(tensors), (), (), ()
    made = {key: place for place, key in enumerate(buffers)}
    places |= {key: len(tensors) + place for key, place in made.items()}
    given = iter(results)
    order = (True,) if flags is None else flags
    return (
        flags,
        tuple(tensors),
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
        tuple(made[id(next(given))] if wanted else -1 for wanted in order),
    )
