"""Provide locks that a forked child does not inherit closed.

fork copies the state of a lock, but not the thread that would open it.

    with locks.brief:               a moment's work (a list changed, a module imported): fork waits for its end
    with locks.file(path):          one process at a time; the kernel opens it when its holder dies
    locks.in_child(function)        what else a module has to put right in a forked child

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

# There is one lock for all: its holder waits for nothing but an import, so fork may wait for it.
# An import is one of its cases, since a child waits for ever for a module whose importing thread it does not have.
brief = threading.RLock()

_files: set[int] = set()  # descriptors whose locks this process holds or waits for


def in_child(function: Callable[[], object]) -> None:
    """Call `function` in every child that is forked from now on, before anything else runs there."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


@contextmanager
def file(path: str | Path) -> Iterator[None]:
    """Hold the lock of a file, which is created if needed and stays. Raises OSError where there can be no lock."""
    import fcntl

    with brief:  # a child that had the descriptor and did not know of it would keep the lock for its own lifetime
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _files.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        with brief:
            if descriptor in _files:  # else this is a child, forked within
                _files.remove(descriptor)
                os.close(descriptor)


def _close_files() -> None:
    while _files:
        os.close(_files.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=brief.acquire, after_in_parent=brief.release, after_in_child=brief.release)
in_child(_close_files)


class cached_property(Generic[T]):
    """Provide functools.cached_property of Python 3.12; earlier ones hold a lock that a forked child inherits."""

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
        value = vars(instance)[self.name] = self.function(instance)  # found before this descriptor from now on
        return value
