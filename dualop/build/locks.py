"""Provide locks that a forked child never finds locked.

fork copies the state of a lock, but not the thread that would release it.

    with locks.brief:               for a short step (change a list, import a module): fork waits until it has ended
    with locks.file(path):          for one process at a time; the kernel releases it when its holder dies
    locks.in_child(function)        registers what else a module must repair in a forked child

A build takes minutes, so fork does not wait for one: the child gets a new lock and undoes what the build had changed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")

# All modules share one lock: its holder waits for nothing but an import, so fork may wait for it.
# It covers imports, because a child would wait forever for a module that a thread of its parent was importing.
brief = threading.RLock()

_files: set[int] = set()  # descriptors whose locks this process holds or waits for


def in_child(function: Callable[[], object]) -> None:
    """Call `function` in every child that is forked from now on, before anything else runs there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


@contextmanager
def file(path: str | Path) -> Iterator[None]:
    """Hold the lock of a file, which is created if needed and stays. Raises OSError if it cannot be locked."""
    import fcntl

    with brief:  # a child that inherits a descriptor outside of `_files` would keep the lock as long as it lives
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _files.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with brief:
            if descriptor in _files:  # otherwise this is a child that was forked meanwhile, and it has closed its copy
                _files.remove(descriptor)
                os.close(descriptor)


def _close_files() -> None:
    while _files:
        os.close(_files.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=brief.acquire, after_in_parent=brief.release, after_in_child=brief.release)
in_child(_close_files)


class cached_property(Generic[T]):
    """Behave as functools.cached_property does since Python 3.12: earlier ones hold a lock that a child inherits."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> cached_property[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Any:
        if instance is None:
            return self
        value = vars(instance)[self.name] = self.function(instance)  # Python will find it before this descriptor
        return value
