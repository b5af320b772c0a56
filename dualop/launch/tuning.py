"""Find the fastest launch: the cuts to try, the search among them, and the store of what it found.

    cut = tuning.chosen("triton", chain, layout, "forward", cut)   # what was found, or the same cut

The backends ask when they plan a launch. One JSON file for each GPU and software (versions of torch and triton, and the
text of the kernels) in the folder `tune/` of the cache. It is read once in a process, when the first launch is chosen;
where there is none for the GPU, not even the kernels' text is read. A file that cannot be read is ignored with a
warning, and written anew by the next `keep`; any of them may be deleted at any time. A backend remembers what was
chosen: after `keep` and `forget`, call `registry.forget_launches`.
"""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

import dualop
from dualop.build import cache, locks, sources
from dualop.language.slopes import Slope
from dualop.language.syntax import Chain
from dualop.launch.grid import Cut, ceil_div, power_of_two
from dualop.launch.layout import Layout

FORMAT = 1
KERNELS = {"cuda": "*.cuh", "triton_kernels": "*.py"}
C = TypeVar("C")

# ---- cuts to try -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """Hold what a backend has tried: few enough to time all of them, with every kind of launch that has ever won.

    `registers` are (rows, resident): the more rows a thread has under way, the more registers it needs and the fewer
    threads fit. `summing` are (threads, across) for kernels that sum gradients along the columns or rows.
    """

    registers: tuple[tuple[int, int], ...]
    summing: tuple[tuple[int, int], ...]


# Of Space.registers for float64, which needs twice as many.
WIDE_REGISTERS = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 1))
# (threads, across) for kernels that write every element.
WRITING = ((64, 64), (128, 32), (128, 128), (256, 32), (256, 256))
# (least, most) programs an SM where gradients are summed.
PROGRAMS = ((0, 0), (2, 8), (4, 16), (4, 64), (8, 32), (8, 64), (16, 64), (32, 128))


def sums(layout: Layout, direction: str) -> bool:
    """Return True if the kernel of this direction sums gradients."""
    return direction == "backward" and any(view.reduced for view in layout.views)


def candidates(space: Space, layout: Layout, direction: str, present: Cut) -> list[Cut]:
    """Return at most about 40 cuts, `present` first, that differ for this layout and have its number of programs."""
    registers = space.registers if layout.dtype.itemsize < 8 else WIDE_REGISTERS
    threads = space.summing if sums(layout, direction) else WRITING
    cuts = [
        replace(present, rows=rows, resident=resident, threads=count, across=across)
        for rows, resident in registers
        for count, across in threads
    ]
    tall, found = power_of_two(layout.rows), {_effective(present, layout): present}
    for cut in cuts:
        effective = _effective(cut, layout)
        if effective.rows * (effective.threads // effective.across) <= tall:
            found.setdefault(effective, cut)
    return list(found.values())


def near(layout: Layout, direction: str, best: Cut) -> Sequence[Cut]:
    """Return the best cut with other numbers of programs, if that changes anything; nothing is compiled for it."""
    return [replace(best, least=least, most=most) for least, most in PROGRAMS] if sums(layout, direction) else ()


def _effective(cut: Cut, layout: Layout) -> Cut:
    """Return the cut with no more threads side by side than there are columns for."""
    return replace(cut, across=min(cut.across, power_of_two(ceil_div(layout.cols, 16 // layout.dtype.itemsize))))


# ---- the search ------------------------------------------------------------------------------------------------------

FINALISTS = 4
ROUNDS = 5
# The present choice is only left for one that is better by more than two measurements of one launch differ.
MARGIN = 0.01

Time = Callable[[C], float]


@dataclass(frozen=True)
class Result(Generic[C]):
    """Hold the fastest launch, its time and the present one's in microseconds, and why other launches failed.

    `first` has the first measurement of every launch that did not fail, in microseconds.
    """

    best: C
    microseconds: float
    before: float
    first: dict[C, float]
    failed: dict[C, str] = field(default_factory=dict)

    @property
    def tried(self) -> int:
        return len(self.first) + len(self.failed)

    @property
    def gain(self) -> float:
        """Return the ratio of the time before to the best time."""
        return self.before / self.microseconds


def search(
    present: C,
    candidates: Sequence[C],
    time: Time[C],
    progress: Callable[[int, int], None] = lambda done, total: None,
    near: Callable[[C], Sequence[C]] = lambda best: (),
) -> Result[C]:
    """Return the fastest of `candidates` and the `present` one by `time(launch)`, in microseconds.

    Once these are measured, `near(fastest)` gives more candidates, close to the one that was the fastest. A launch
    whose `time` raises (too many registers, too much shared memory) is left out; if the present one does, its error is
    raised. `progress(done, total)` is called after each of the first measurements.
    """
    todo = list(dict.fromkeys((present, *candidates)))
    first: dict[C, float] = {}
    failed: dict[C, str] = {}

    def measure(launches: Sequence[C]) -> None:
        for launch in launches:
            try:
                first[launch] = time(launch)
            except Exception as error:
                if launch == present:
                    raise
                failed[launch] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            progress(len(first) + len(failed), len(todo))

    measure(tuple(todo))
    more = [launch for launch in near(min(first, key=first.__getitem__)) if launch not in todo]
    todo += dict.fromkeys(more)
    measure(more)
    finalists = sorted(first, key=first.__getitem__)[:FINALISTS]
    if present not in finalists:
        finalists.append(present)
    # In turns, so that a GPU that grows warm or is disturbed for a while does so to all of them.
    times: dict[C, list[float]] = {launch: [] for launch in finalists}
    for _ in range(ROUNDS):
        for launch in finalists:
            times[launch].append(time(launch))
    medians = {launch: statistics.median(values) for launch, values in times.items()}
    best = min(medians, key=medians.__getitem__)
    if medians[best] > (1 - MARGIN) * medians[present]:
        best = present
    return Result(best, medians[best], medians[present], first, failed)


# ---- what was found --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """Name what a launch is chosen for. `shape` is a bucket: rows and columns, each rounded up to a power of two."""

    backend: str
    direction: str
    dtype: str
    shape: str
    inputs: str
    chain: str

    def __str__(self) -> str:
        return " ; ".join((self.backend, self.direction, self.dtype, self.shape, self.inputs, self.chain))


def subject(backend: str, chain: Chain | Slope, layout: Layout, direction: str) -> Subject:
    """Return the subject of a call with this layout; `direction` is "forward" or "backward"."""
    bucket = f"{power_of_two(layout.rows)}x{power_of_two(layout.cols)}"
    kinds = ",".join(f"{view.kind}.{view.access}" for view in layout.views)
    return Subject(backend, direction, str(layout.dtype).removeprefix("torch."), bucket, kinds, chain.text)


def lookup(what: Subject, device: torch.device, kind: type[C]) -> C | None:
    """Return the launch that was found for it, an instance of the dataclass `kind`, or None."""
    entry = _read(_folder(), _name(device)).get(str(what))
    if entry is None:
        return None
    try:
        return kind(**entry["launch"])
    except (KeyError, TypeError):  # of another version: its fields have changed
        return None


def chosen(backend: str, chain: Chain | Slope, layout: Layout, direction: str, default: C) -> C:
    """Return the launch that was found for a call, or the `default`, which is a dataclass too."""
    return lookup(subject(backend, chain, layout, direction), layout.device, type(default)) or default


def keep(what: Subject, device: torch.device, launch: Any, microseconds: float, before: float) -> Path:
    """Write a launch (a dataclass of numbers), its time and the time `before` to a file, and return the file.

    What other processes wrote meanwhile stays. Raises BackendUnavailable if the cache cannot be written to.
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
    return file


def forget(device: torch.device) -> list[Path]:
    """Delete all that was kept for this GPU, with any software, and return the files."""
    files = sorted(_folder().glob(f"{_name(device)}_*.json"))
    for file in files:
        file.unlink(missing_ok=True)
    _read.cache_clear()
    return files


def kept(device: torch.device) -> tuple[Path, int]:
    """Return the file for this GPU and software, which may not exist, and the number of launches in it."""
    file = _file(device)
    return file, len(_entries(file) or {})


def _folder() -> Path:
    return cache.folder() / "tune"


def _name(device: torch.device) -> str:
    """Return the name of the GPU, fit for a file's name."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return re.sub("[^A-Za-z0-9]+", "-", gpu)


def _file(device: torch.device) -> Path:
    return _folder() / f"{_name(device)}_{_software()}.json"


@lru_cache(maxsize=1)
def _software() -> str:
    """Return a short digest of all that may make another launch the fastest: versions and the kernels' sources."""
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
    """Return what is kept for a GPU; it is read once in a process."""
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
    """Return the entries of a file; none if there is no file, None if it is not such a file."""
    try:
        content = json.loads(file.read_text("utf-8"))
        found = content["found"]
        return found if content["format"] == FORMAT and all(isinstance(v, dict) for v in found.values()) else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
