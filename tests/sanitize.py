"""Run every form of kernel under compute-sanitizer's four tools: `make sanitize`. Exit 1 on a finding, 2 without them.

    python tests/sanitize.py [--backend cuda] [--tool racecheck] [--only "loop"]

memcheck finds accesses outside an allocation or not aligned, racecheck hazards in shared memory, initcheck reads of
memory that nothing has written, synccheck barriers that not all threads reach. tests/sanitize_calls.py has the calls.
They are compiled first and run once without a tool; then each tool and backend has a process of its own, all at the
same time. torch's caching allocator is off, for it hands out parts of one large allocation, whose ends no tool sees.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CALLS = Path(__file__).with_name("sanitize_calls.py")
BACKENDS = ("cuda", "triton")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
VARIABLE = "COMPUTE_SANITIZER"  # the path of the program, where it is not on PATH or beside nvcc
LIMIT_S = 900
MOST_PRINTED = 20  # findings of one kind in one kernel count as one here

DONE = re.compile(r"^(\d+) calls were made$", re.MULTILINE)
CALL = re.compile(r"^call: (.*)$")
# "========= ERROR SUMMARY: 3 errors", "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)". The line
# "ERROR SUMMARY: 90 errors were not printed" tells nothing new.
SUMMARY = re.compile(
    r"^=+ \w+ SUMMARY: (?:(\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)|(\d+) errors?)\s*$", re.MULTILINE
)
# The first line of a finding: what follows it is indented further. It may have the place, or the next line has it.
FINDING = re.compile(r"^=+ (?! )(?!COMPUTE-SANITIZER|\w+ SUMMARY|and |Target application)(.+?)(?: at (.+))?$")
PLACE = re.compile(r"^=+  +at (.+)$")
KERNEL = re.compile(r"^(?:0x[0-9a-f]+ in )?(.+?)(?:\+0x[0-9a-f]+)?(?: in \S+:\d+)?(?: \[\d+ hazards?\])?$")


@dataclass(frozen=True)
class Report:
    """What one tool said of one backend: how many errors, or why it came to no end; each kind of finding, and where."""

    tool: str
    backend: str
    errors: int | None
    calls: int
    findings: tuple[str, ...] = ()
    failure: str = ""
    seconds: float = 0.0

    @property
    def clean(self) -> bool:
        return self.errors == 0 and not self.failure


def parsed(tool: str, backend: str, text: str, code: int, seconds: float = 0.0) -> Report:
    """Read the output of a run: that of compute-sanitizer and that of the calls, mixed, and its exit status.

    A run without a summary, or whose calls did not come to their end, has failed, even if it found nothing.
    """
    summaries = [[int(n) for n in found if n] for found in SUMMARY.findall(text)]
    # Of racecheck: hazards displayed, errors, warnings. There may be more of them than are displayed, or fewer.
    errors = sum(max(numbers[0], sum(numbers[1:])) for numbers in summaries) if summaries else None
    done = DONE.search(text)
    count = int(done.group(1)) if done else 0
    failure = ""
    if errors is None:
        failure = f"no summary of {tool}: {_last(text)}"
    elif not count:
        failure = f"the calls did not come to their end: {_last(text)}"
    elif code and not errors:
        failure = f"exit status {code}: {_last(text)}"
    return Report(tool, backend, errors, count, findings(text), failure, seconds)


def findings(text: str) -> tuple[str, ...]:
    """Each kind of finding in each kernel once, with the call it was first seen in and how often it was printed."""
    found: list[list[str]] = []  # kind, place, call
    call = "no call"
    for line in text.splitlines():
        if started := CALL.match(line):
            call = started.group(1)
        elif first := FINDING.match(line):
            found.append([first.group(1), first.group(2) or "", call])
        elif (place := PLACE.match(line)) and found and not found[-1][1]:
            found[-1][1] = place.group(1)
    calls: dict[str, list[str]] = {}
    for kind, where, seen in found:
        kernel = match.group(1) if (match := KERNEL.match(where)) else ""
        calls.setdefault(f"{kind} in {kernel}" if kernel else kind, []).append(seen)
    return tuple(f"{what}: {len(seen)} times, first in `{seen[0]}`" for what, seen in calls.items())


def _last(text: str) -> str:
    lines = [line.strip("= ") for line in text.splitlines() if line.strip("= ")]
    return " / ".join(lines[-3:]) or "it printed nothing"


def program() -> str | None:
    """The path of compute-sanitizer, or None."""
    from dualop.build.toolchain import find_nvcc

    named, nvcc = os.environ.get(VARIABLE), find_nvcc()
    places = [named] if named else ["compute-sanitizer", *([str(nvcc.parent / "compute-sanitizer")] if nvcc else [])]
    return next((found for place in places if (found := shutil.which(place))), None)


def missing() -> list[str]:
    """What this machine lacks, each with its remedy."""
    import torch

    lacks = []
    if not torch.cuda.is_available():
        lacks.append("there is no GPU that torch can use")
    if program() is None:
        remedy = f"install it with the CUDA toolkit (package cuda-sanitizer-*) or give its path in {VARIABLE}"
        lacks.append(f"compute-sanitizer is missing: {remedy}")
    return lacks


def environment() -> dict[str, str]:
    """That of a process that makes the calls: kernels on the GPU, exact allocations, and this checkout's modules."""
    own = {name: value for name, value in os.environ.items() if name not in ("DUALOP_INTERPRET", "TRITON_INTERPRET")}
    path = os.pathsep.join(filter(None, (str(ROOT), str(CALLS.parent), own.get("PYTHONPATH"))))
    return {**own, "PYTHONPATH": path, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "DUALOP_NATIVE": "0"}


def command(tool: str, backend: str, only: str) -> list[str]:
    """The command line of one run. Errors that CUDA's functions return are torch's and ours to check, not a tool's."""
    options = ["--target-processes", "all", "--print-limit", "100", "--report-api-errors", "no"]
    return [str(program()), "--tool", tool, *options, *plain(backend, only)]


def plain(backend: str, only: str, *more: str) -> list[str]:
    """The command line of the calls without a tool."""
    return [sys.executable, str(CALLS), backend, *more, *(["--only", only] if only else [])]


def run(line: Sequence[str]) -> tuple[str, int, float]:
    """Run a command; return what it printed, its exit status, and its seconds. One that is too long ends with 124."""
    start = time.monotonic()
    # In a session of its own: compute-sanitizer starts the calls as a child, which must end with it.
    with subprocess.Popen(
        line, cwd=ROOT, env=environment(), text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            text, code = process.communicate(timeout=LIMIT_S)[0], process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            text, code = f"{process.communicate()[0]}\nended after {LIMIT_S} s", 124
    return text, code, time.monotonic() - start


def sanitize(backends: Sequence[str], tools: Sequence[str], only: str, say: Callable[[str], None]) -> list[Report]:
    """Compile, run once without a tool, then run every tool on every backend at the same time."""
    with ThreadPoolExecutor(len(backends) * len(tools)) as pool:
        say(f"compiling what {' and '.join(backends)} need, and running it without a tool")
        for backend, (text, code, seconds) in zip(
            backends, pool.map(lambda b: run(plain(b, only, "--prepare")), backends), strict=True
        ):
            if code:
                raise SystemExit(f"{text}\nwithout a tool, the calls of {backend} end with exit status {code}")
            say(f"{backend}: {text.splitlines()[-1]}, {seconds:.0f} s")
        jobs = [(tool, backend) for tool in tools for backend in backends]
        say(f"{len(jobs)} runs at the same time")

        def one(job: tuple[str, str]) -> Report:
            text, code, seconds = run(command(*job, only))
            report = parsed(*job, text, code, seconds)
            say(f"{report.tool} {report.backend}: {seconds:.0f} s{'' if report.clean else f'{os.linesep}{text}'}")
            return report

        return list(pool.map(one, jobs))


def table(reports: Sequence[Report]) -> str:
    """The summary: a line for each tool, a column for each backend, and what was found below it."""
    backends = list(dict.fromkeys(report.backend for report in reports))
    cell = {(r.tool, r.backend): "failed" if r.failure else f"{r.errors} errors" for r in reports}
    rows = [("tool", *backends)]
    rows += [(tool, *(cell[tool, b] for b in backends)) for tool in dict.fromkeys(r.tool for r in reports)]
    counts = dict.fromkeys((r.backend, r.calls) for r in reports if r.calls)
    lines = ["".join(f"{text:<16}" for text in row).rstrip() for row in rows]
    lines.append("calls: " + ", ".join(f"{backend} {count}" for backend, count in counts))
    for report in reports:
        found = [*report.findings[:MOST_PRINTED], *([report.failure] if report.failure else [])]
        lines += [f"{report.tool} {report.backend}: {text}" for text in found]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="Several are possible (both).")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="Several are possible (all four).")
    parser.add_argument("--only", default="", help="Calls whose names contain this text.")
    chosen = parser.parse_args()
    if lacks := missing():
        print(f"error: {'; '.join(lacks)}", file=sys.stderr)
        return 2
    start = time.monotonic()
    say = lambda text: print(text, flush=True)
    reports = sanitize(chosen.backend or BACKENDS, chosen.tool or TOOLS, chosen.only, say)
    clean = all(report.clean for report in reports)
    print(f"\n{table(reports)}\n{'clean' if clean else 'NOT CLEAN'}, {time.monotonic() - start:.0f} s")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
