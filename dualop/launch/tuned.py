"""What `dualop tune` found, kept on disk: the launch that was fastest, by GPU, software, chain, dtype and shape.

    cut = tuned.chosen("triton", chain, view, "forward", device, cut)   # what was found, or the same cut

The backends ask when they plan a launch. One JSON file for each GPU and software (versions of torch and triton, and the
text of the kernels) in the folder `tune/` of the cache. It is read once in a process, when the first launch is chosen;
where there is none for the GPU, not even the kernels' text is read. A file that cannot be read is
ignored with a warning, and written anew by the next `keep`; any of them may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

import dualop
from dualop.build import cache, locks, sources
from dualop.language.slopes import Slope
from dualop.language.syntax import Chain
from dualop.launch.grid import power_of_two
from dualop.launch.layout import Layout

FORMAT = 1
KERNELS = {"cuda": "*.cuh", "triton_kernels": "*.py"}
C = TypeVar("C")


@dataclass(frozen=True)
class Subject:
    """What a launch is chosen for. `shape` is a bucket: rows and columns, each rounded up to a power of two."""

    backend: str
    direction: str
    dtype: str
    shape: str
    inputs: str
    chain: str

    def __str__(self) -> str:
        return " ; ".join((self.backend, self.direction, self.dtype, self.shape, self.inputs, self.chain))


def subject(backend: str, chain: Chain | Slope, view: Layout, direction: str) -> Subject:
    """Of a call with this layout; `direction` is "forward" or "backward"."""
    bucket = f"{power_of_two(view.rows)}x{power_of_two(view.cols)}"
    kinds = ",".join(str(v.kind) for v in view.views)
    return Subject(backend, direction, str(view.dtype).removeprefix("torch."), bucket, kinds, chain.text)


def lookup(what: Subject, device: torch.device, kind: type[C]) -> C | None:
    """The launch found for it, an instance of the dataclass `kind`, or None; within `trying` the one being tried."""
    for tried, launch in reversed(_tried):
        if tried == what:
            return launch if isinstance(launch, kind) else None
    entry = _read(_folder(), _name(device)).get(str(what))
    if entry is None:
        return None
    try:
        return kind(**entry["launch"])
    except (KeyError, TypeError):  # of another version: its fields have changed
        return None


def chosen(backend: str, chain: Chain | Slope, view: Layout, direction: str, device: torch.device, default: C) -> C:
    """The launch found for a call, or the `default`, a dataclass too."""
    return lookup(subject(backend, chain, view, direction), device, type(default)) or default


def keep(what: Subject, device: torch.device, launch: Any, microseconds: float, before: float) -> Path:
    """Write down a launch (a dataclass of numbers) and its time, and what it took `before`; gives the file.

    What other processes wrote meanwhile stays. Raises BackendUnavailable where the cache cannot be written to.
    """
    file = _file(device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with locks.file(f"{file}.lock"):
            found = _entries(file) or {}
            found[str(what)] = {"launch": asdict(launch), "us": round(microseconds, 3), "before_us": round(before, 3)}
            text = json.dumps({"format": FORMAT, "found": dict(sorted(found.items()))}, indent=1, allow_nan=False)
            cache.write(file, text + "\n")
    except OSError as error:
        raise cache.unwritable(error) from error
    _read.cache_clear()
    _changed()
    return file


def forget(device: torch.device) -> list[Path]:
    """Delete all that was kept for this GPU, with any software; gives the files."""
    files = sorted(_folder().glob(f"{_name(device)}_*.json"))
    for file in files:
        file.unlink(missing_ok=True)
    _read.cache_clear()
    _changed()
    return files


def kept(device: torch.device) -> tuple[Path, int]:
    """The file for this GPU and software, whether it is there or not, and how many launches are found in it."""
    file = _file(device)
    return file, len(_entries(file) or {})


_tried: list[tuple[Subject, object]] = []
_listeners: list[Callable[[], object]] = []


def on_change(forget: Callable[[], object]) -> None:
    """Have `forget` called whenever another launch may be chosen from now on: a backend's cache_clear."""
    _listeners.append(forget)


@contextmanager
def trying(what: Subject, launch: object) -> Iterator[None]:
    """Within it, in this process, `lookup` gives `launch` for this subject. Several may be tried at once."""
    _tried.append((what, launch))
    _changed()
    try:
        yield
    finally:
        _tried.pop()
        _changed()


def _changed() -> None:
    for forget in _listeners:
        forget()


def _folder() -> Path:
    return cache.folder() / "tune"


def _name(device: torch.device) -> str:
    """The GPU's, fit for a file's name."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub("[^A-Za-z0-9]+", "-", gpu)


def _file(device: torch.device) -> Path:
    return _folder() / f"{_name(device)}_{_software()}.json"


@lru_cache(maxsize=1)
def _software() -> str:
    """A short digest of all that makes another launch fastest: versions, and the kernels' sources."""
    digest = hashlib.sha256(f"{dualop.__version__} {torch.__version__} {_triton()}".encode())
    for folder, pattern in KERNELS.items():
        for file in sorted(sources.folder(folder).rglob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


@lru_cache(maxsize=None)
def _read(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """What is kept for a GPU; read once in a process."""
    try:
        if not any(folder.glob(f"{name}_*.json")):  # so that the first call of most people digests no sources
            return {}
    except OSError:  # a folder that may not be looked into
        return {}
    file = folder / f"{name}_{_software()}.json"
    found = _entries(file)
    if found is None:
        warnings.warn(f"{file} cannot be read and is ignored; `dualop tune` writes it anew", stacklevel=2)
    return found or {}


def _entries(file: Path) -> dict[str, dict[str, Any]] | None:
    """The entries of a file, none if there is no file, None if it is no such file."""
    try:
        content = json.loads(file.read_text("utf-8"))
        found = content["found"]
        return found if content["format"] == FORMAT and all(isinstance(v, dict) for v in found.values()) else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
