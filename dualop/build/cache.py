"""Find the folder where builds, generated Triton files and tuned launches are kept, or a substitute for it.

    folder()            returns DUALOP_CACHE_DIR, else the user's cache folder, else a private temporary folder
    found()             returns the same without a warning, for `dualop doctor`
    write(path, text)   writes a file atomically: other processes see all of it or nothing
    unwritable(error)   returns the error to raise when writing there failed

A container may run as a user without a name and a home, or with the home of another user. Then the folder is
`dualop-UID` in the folder for temporary files, for this user alone, and a warning says so once per process.
"""

from __future__ import annotations

import os
import stat
import tempfile
import threading
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from dualop.errors import BackendUnavailable

REMEDY = "set DUALOP_CACHE_DIR to a folder that is writable"
# The variables that `_of_user` depends on: tests and notebooks change them in a running process.
_VARIABLES = ("HOME", "XDG_CACHE_HOME", "TMPDIR", "TEMP", "TMP")
_warned: set[Path] = set()


def folder() -> Path:
    """Return the cache's folder, which may not exist yet. Raises BackendUnavailable where there can be none."""
    path, problem = found()
    if problem:
        with suppress(OSError):
            path.mkdir(mode=0o700)
        _check(path, problem)
    if problem and path not in _warned:
        _warned.add(path)
        warnings.warn(f"{problem}: kernels are kept in {path}; {REMEDY} and lasts", RuntimeWarning, stacklevel=2)
    return path


def unwritable(error: Exception) -> BackendUnavailable:
    """Return the error for a cache that cannot be written to; its message says what to do."""
    return BackendUnavailable(f"cannot write to {folder()} ({error}): {REMEDY}")


def write(path: Path, text: str) -> None:
    """Write a file atomically, with the permissions of this user's other files. Raises OSError."""
    new = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    new.write_text(text, "utf-8")
    os.replace(new, path)


def usable(path: Path) -> bool:
    """Return True if the folder can be read, and is there or can be made. Changes nothing."""
    try:
        if path.is_dir():
            return os.access(path, os.R_OK | os.X_OK)
        above = next(parent for parent in path.parents if parent.exists())
        return above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    except OSError:  # a folder on the way that may not be looked into
        return False


def found() -> tuple[Path, str]:
    """Return the folder, and why it is a temporary one or "". It never warns, and raises what `folder` raises."""
    chosen = os.environ.get("DUALOP_CACHE_DIR")
    if not chosen:
        return _of_user(tuple(os.environ.get(name) for name in _VARIABLES))
    try:
        return Path(chosen).expanduser().absolute(), ""
    except (RuntimeError, OSError) as error:  # ~ of a user without a home; a working directory that was deleted
        raise BackendUnavailable(f"DUALOP_CACHE_DIR={chosen} cannot be used ({error}): {REMEDY}") from error


@lru_cache(maxsize=8)
def _of_user(variables: tuple[str | None, ...]) -> tuple[Path, str]:
    try:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "dualop"
        if usable(path):
            return path, ""
        problem = f"{path} cannot be used"
    except (RuntimeError, OSError) as error:  # a user without a home; a working directory that was deleted
        problem = f"this user has no cache folder ({error})"
    return _private(problem), problem


def _private(problem: str) -> Path:
    try:
        path = Path(tempfile.gettempdir()).absolute() / f"dualop-{_user()}"
    except OSError as error:
        raise BackendUnavailable(f"{problem}, and there is no temporary folder ({error}): {REMEDY}") from error
    if os.path.lexists(path):
        _check(path, problem)
    return path


def _check(path: Path, problem: str) -> None:
    """Raise BackendUnavailable unless the folder belongs to this user, because libraries in it are loaded."""
    try:
        found = path.lstat()  # of a link itself, which another user may have put there
    except OSError as error:
        raise BackendUnavailable(f"{problem}, and {path} cannot be made ({error}): {REMEDY}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != _user() or found.st_mode & 0o022:
        raise BackendUnavailable(f"{problem}, and {path} is not a folder of this user alone: {REMEDY}")


def _user() -> int:
    return os.geteuid() if hasattr(os, "geteuid") else 0
