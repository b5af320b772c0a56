"""Report what this machine has of what dualop needs, and what to install for the rest.

    report = examine()      rows of (item, found, advice); what may hang or crash is asked by `dualop.machine.probe`
    table(report)           for a terminal
    as_json(report)         for a program

It needs nothing but the standard library, so it works where torch, triton or rich are missing.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dualop
from dualop import versions
from dualop.build import cache, toolchain
from dualop.errors import DualopError
from dualop.machine import probe

if TYPE_CHECKING:
    from rich.table import Table

VARIABLES = (
    *("DUALOP_BACKEND", "DUALOP_INTERPRET", "DUALOP_CACHE_DIR", "DUALOP_NATIVE", "DUALOP_GEMM"),
    *("DUALOP_VERBOSE", "DUALOP_TRITON36"),
)
SWITCHES = ("DUALOP_INTERPRET", "DUALOP_NATIVE", "DUALOP_VERBOSE")

# The first CUDA toolkit whose nvcc knows the architecture, by the major number of the compute capability.
FIRST_TOOLKIT = {8: (11, 1), 9: (11, 8), 10: (12, 8), 11: (13, 0), 12: (12, 8)}

WALK_SECONDS = 1.0

Facts = dict[str, Any]  # what `probe.facts` answers


@dataclass(frozen=True)
class Row:
    """Describe one thing that was examined: what was found, and what to do about it ("" if nothing has to be done)."""

    item: str
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """Hold everything that `examine` found, in the order in which it is shown."""

    rows: tuple[Row, ...]

    def __getitem__(self, item: str) -> Row:
        """Return the first row called `item`; raise KeyError if there is none."""
        for row in self.rows:
            if row.item == item:
                return row
        raise KeyError(item)


def examine() -> Report:
    """Examine everything. It never raises, changes nothing, and waits no longer than the limits in probe.py."""
    with ThreadPoolExecutor(max_workers=5) as pool:
        asked_facts, asked_driver = pool.submit(probe.facts), pool.submit(probe.nvidia_smi)
        asked_tools = {name: pool.submit(probe.tool, tool.find) for name, tool in toolchain.TOOLS.items()}
        cache = _guarded("cache folder", _cache_rows)
        facts, listed = asked_facts.result(), asked_driver.result()
        tools = {name: asked.result() for name, asked in asked_tools.items()}
    return Report(
        (
            Row("dualop", f"{dualop.__version__}, {Path(dualop.__file__).parent}"),
            Row("python", f"{platform.python_version()}, {sys.executable}"),
            *_guarded("GPU", lambda: _gpu_rows(facts, listed)),
            *_guarded("driver", lambda: _driver_rows(listed)),
            *_answered("torch", "torch", facts, _torch_rows, "pip install 'torch>=2.11'"),
            *_answered("triton", "triton", facts, _triton_rows, "pip install 'triton>=3.6'"),
            *_guarded("tools", lambda: _tool_rows(tools, facts)),
            *cache,
            *_answered("launches", "tuned", facts, _launch_rows),
            *_guarded("environment", lambda: _environment_rows(facts)),
            *_answered("backends", "backends", facts, _backend_rows, "see the rows above"),
            *_answered("native", "native", facts, _native_rows, "see the rows above"),
        )
    )


def table(report: Report) -> Table:
    """Return the report as a rich table; a row that needs an action is yellow."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title="dualop doctor", title_justify="left")
    for column in ("item", "found", "what to do"):
        shown.add_column(column, overflow="fold")
    for row in report.rows:
        # Text, since a path or a compiler's message may hold what rich would read as markup.
        shown.add_row(Text(row.item), Text(row.found), Text(row.advice), style="yellow" if row.advice else "")
    return shown


def as_json(report: Report) -> dict[str, Any]:
    """Return the report as plain data for `json.dump`: `{"rows": [{"item", "found", "advice"}, ...]}`."""
    return {"rows": [asdict(row) for row in report.rows]}


def _guarded(item: str, rows: Callable[[], Iterator[Row]]) -> list[Row]:
    """Return the rows, or one row with the error: a report with a hole is better than none."""
    try:
        return list(rows())
    except Exception as error:
        return [Row(item, f"could not be examined: {type(error).__name__}: {error}")]


def _answered(
    item: str, step: str, facts: Facts, rows: Callable[[Facts], Iterator[Row]], repair: str = ""
) -> list[Row]:
    """Return the rows that need this step of the probe, or one row with its error and how to repair it."""
    error = _error(facts, step)
    return [Row(item, error, repair)] if error else _guarded(item, lambda: rows(facts))


def _error(facts: Facts, step: str) -> str:
    """Return why a step of the probe found nothing, or ""."""
    fact = facts.get(step)
    if fact is None:
        return "not examined, since Python died before"
    return str(fact.get("error", "")) if isinstance(fact, dict) else ""


def _gpu_rows(facts: Facts, listed: list[dict[str, str]]) -> Iterator[Row]:
    gpus = facts.get("gpus")
    if isinstance(gpus, list) and gpus:
        for index, gpu in enumerate(gpus):
            capability = ".".join(map(str, gpu["capability"]))
            size = f"{gpu['bytes'] / 2**30:.0f} GiB"
            item = "GPU" if index == 0 else f"GPU {index}"
            yield Row(item, f"{gpu['name']}, compute capability {capability}, {gpu['sms']} SMs, {size}")
    elif listed:
        names = ", ".join(gpu["name"] for gpu in listed)
        yield Row("GPU", f"{names}: the driver sees it, torch does not", _why_torch_sees_none(facts, listed))
    elif (error := _error(facts, "gpus")) and not _error(facts, "torch"):
        yield Row("GPU", f"none that torch can use: {error}", "update the driver, or install torch for an older CUDA")
    else:
        yield Row("GPU", "none", "kernels run interpreted on CPU tensors only: DUALOP_INTERPRET=1 before the start")


def _why_torch_sees_none(facts: Facts, listed: list[dict[str, str]]) -> str:
    if _error(facts, "torch"):
        return "repair torch first"
    if facts["torch"]["cuda"] is None:
        return "this torch is a CPU build: install a CUDA build of torch"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r} may hide it"
    driver = listed[0]["driver_version"]
    return _error(facts, "gpus") or f"driver {driver} may be too old for CUDA {facts['torch']['cuda']}: update it"


def _driver_rows(listed: list[dict[str, str]]) -> Iterator[Row]:
    said = Path("/proc/driver/nvidia/version")
    if listed:
        yield Row("driver", f"NVIDIA {listed[0]['driver_version']}")
    elif said.exists():
        number = re.search(r"\d+\.\d+(?:\.\d+)?", said.read_text())
        yield Row("driver", f"NVIDIA {number[0] if number else 'of an unknown version'}")
    else:
        advice = "there is an NVIDIA GPU on the bus: install NVIDIA's driver" if _on_the_bus() else ""
        yield Row("driver", "none", advice)


def _on_the_bus() -> bool:
    """Return True if the machine has a display controller (class 0x03) by NVIDIA (vendor 0x10de)."""
    for device in Path("/sys/bus/pci/devices").glob("*"):
        vendor, kind = device / "vendor", device / "class"
        if vendor.is_file() and vendor.read_text().strip() == "0x10de" and kind.read_text().startswith("0x03"):
            return True
    return False


def _torch_rows(facts: Facts) -> Iterator[Row]:
    torch = facts["torch"]
    kind = f"built for CUDA {torch['cuda']}" if torch["cuda"] else "CPU build"
    yield Row("torch", f"{torch['version']}, {kind}, {Path(torch['file']).parent}", _tested("torch", torch["version"]))
    private = facts.get("private")
    for without in private if isinstance(private, list) else ():
        yield Row("torch", without, f"install a tested version: torch {versions.listed(versions.TORCH)}")


def _tested(package: str, version: str) -> str:
    """Return what to do about a version that is too old or not tested, or ""."""
    tested = {"torch": versions.TORCH, "triton": versions.TRITON}[package]
    if versions.of(version) < tested[0]:
        return f"dualop needs {package} {versions.listed(tested[:1])} or newer"
    if versions.of(version) in tested:
        return ""
    return f"not tested; tested are {versions.listed(tested)}"


def _triton_rows(facts: Facts) -> Iterator[Row]:
    triton = facts["triton"]
    yield Row("triton", f"{triton['version']}, {Path(triton['file']).parent}", _tested("triton", triton["version"]))


def _tool_rows(tools: dict[str, probe.FoundTool], facts: Facts) -> Iterator[Row]:
    gpus = facts.get("gpus")
    major = gpus[0]["capability"][0] if isinstance(gpus, list) and gpus else 0
    first = FIRST_TOOLKIT.get(major, (0, 0))
    for name, tool in tools.items():
        missing = toolchain.TOOLS[name].advice
        if tool.path is None:
            yield Row(name, tool.problem or toolchain.wrong_choice(name) or "none", missing)
        elif tool.problem:
            yield Row(name, f"{tool.path}: {tool.problem}", f"it does not work; {missing}")
        else:
            old = name == "nvcc" and versions.of(tool.version) < first
            advice = f"compute capability {major}.x needs a CUDA toolkit {first[0]}.{first[1]} or newer" if old else ""
            yield Row(name, f"{tool.version or 'unknown version'}, {tool.path}", advice)


def _cache_rows() -> Iterator[Row]:
    try:
        folder, problem = cache.found()
    except DualopError as error:
        yield Row("cache folder", "none", str(error))
        return
    if not os.path.isdir(folder):
        advice = _temporary(problem) if cache.usable(folder) else f"it cannot be made: {cache.REMEDY}"
        yield Row("cache folder", f"{folder}, not there yet", advice)
        return
    try:
        with tempfile.TemporaryFile(dir=folder):
            writable = True
    except OSError:
        writable = False
    advice = _temporary(problem) if writable else cache.REMEDY
    yield Row("cache folder", f"{folder}, {'' if writable else 'not '}writable, {_contents(folder)}", advice)


def _temporary(problem: str) -> str:
    return f"{problem}, so builds are kept in a temporary folder: {cache.REMEDY} and lasts" if problem else ""


def _contents(folder: Path) -> str:
    """Return how many libraries the cache has, and its size, counted for at most `WALK_SECONDS`."""
    size, builds, until, more = 0, 0, time.monotonic() + WALK_SECONDS, ""
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(root, name)).st_size
            except OSError:
                continue  # another process has removed it
            builds += name.endswith(".so")
        if time.monotonic() > until:
            more = "more than "
            break
    return f"{more}{builds} {'build' if builds == 1 else 'builds'}, {more}{size / 2**20:.1f} MiB"


def _launch_rows(facts: Facts) -> Iterator[Row]:
    count, file = facts["tuned"]["launches"], facts["tuned"]["file"]
    yield Row("launches", f"{count} found by `dualop tune`, {file}" if count else "by the heuristic")


def _environment_rows(facts: Facts) -> Iterator[Row]:
    names = () if _error(facts, "backends") else ("auto", *facts["backends"])
    mine = {name: value for name, value in sorted(os.environ.items()) if name.startswith("DUALOP_")}
    if not mine:
        yield Row("environment", "no DUALOP_* variable is set")
    for name, value in mine.items():
        advice = ""
        if name not in VARIABLES:
            advice = f"dualop reads no such variable; it reads {', '.join(VARIABLES)}"
        elif name == "DUALOP_BACKEND" and names and value not in ("", *names):
            advice = f"not a backend: use one of {', '.join(names)}"
        elif name in SWITCHES and value not in ("", "0", "1"):
            advice = "use 1 or 0"
        yield Row(name, value, advice)


def _backend_rows(facts: Facts) -> Iterator[Row]:
    for name, answer in facts["backends"].items():
        if answer["reasons"]:
            yield Row(f"backend {name}", "does not run here", "; ".join(answer["reasons"]))
        else:
            yield Row(f"backend {name}", "runs here, interpreted" if answer["interpreted"] else "runs here")


def _native_rows(facts: Facts) -> Iterator[Row]:
    """Return the rows of the extension that replays known calls without Python (dualop/replay)."""
    native = facts["native"]
    if not native["on"]:
        yield Row("native", f"off: {native['why']}")
    elif native["built"]:
        yield Row("native", "built")
    elif native["missing"]:
        advice = f"calls work, and cost the host some ten microseconds more; {'; '.join(native['missing'])}"
        yield Row("native", "cannot be built here", advice)
    else:
        yield Row("native", "not built yet; the first call has it built in the background")
