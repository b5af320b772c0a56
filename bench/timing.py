"""Time calls on the device: by CUDA-graph replay, by events where a call cannot be captured, by a clock on the CPU.

A graph holds many calls, so that neither the host nor the events between them count; one replay is one sample. Where
the data of a call would stay in the L2 cache, the calls alternate between several sets of inputs (`sets_beyond_cache`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

Calls = Sequence[Callable[[], object]]

SAMPLE_US = 300.0  # a replay lasts at least this long: the events around it resolve half a microsecond
BUDGET_S = 0.25  # device time for the samples of one figure
MOST_SAMPLES, FEWEST_SAMPLES = 200, 10
MOST_SETS = 32
MOST_CALLS = 512  # in one graph


@dataclass(frozen=True)
class Timing:
    """Hold the microseconds of a call: the median, and the tenth and the ninetieth percentile of the samples."""

    median_us: float
    low_us: float
    high_us: float
    samples: int
    method: str  # "graph", "events" or "clock"
    note: str = ""

    @property
    def spread(self) -> float:
        """Return the width between the percentiles as a share of the median."""
        return (self.high_us - self.low_us) / self.median_us if self.median_us else 0.0


def sets_beyond_cache(bytes_a_call: int, device: torch.device) -> int:
    """Return how many sets of inputs make four times the L2 cache: 1 where one is enough, at most MOST_SETS."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_SETS, math.ceil(4 * cache / max(1, bytes_a_call))))


@contextmanager
def on_stream(device: torch.device) -> Iterator[torch.cuda.Stream | None]:
    """Yield a side stream for preparing and timing calls.

    A backward runs on the stream of its forward. That stream has to be the captured one, so call the forward in here,
    too.
    """
    if device.type != "cuda":
        yield None
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield stream
        torch.cuda.current_stream().wait_stream(stream)


def timed(calls: Calls, stream: torch.cuda.Stream | None, budget_s: float = BUDGET_S) -> Timing:
    """Time the calls, which do the same on different data; `stream` comes from `on_stream` (None: the CPU)."""
    if stream is None:
        return _clocked(calls, budget_s)
    _repeat(calls, 3)  # compile, tune, and fill the allocator
    (rough,) = _events(partial(_repeat, calls, 2), 1)
    rounds = min(math.ceil(SAMPLE_US / max(rough / 2, 0.1)), max(1, MOST_CALLS // len(calls)))
    samples = int(budget_s * 1e6 / max(rough / 2 * rounds, 1.0))
    method, note = "graph", ""
    run: Callable[[], object] = partial(_repeat, calls, rounds)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        run = graph.replay
    except Exception as error:  # a call that synchronises, or allocates elsewhere
        torch.cuda.synchronize()
        method, note = "events", f"not capturable ({said(error)[:100]}), so the host's time counts too"
    for _ in range(2):
        run()
    times = _events(run, max(FEWEST_SAMPLES, min(MOST_SAMPLES, samples)))
    return _summary([time / (rounds * len(calls)) for time in times], method, note)


def said(error: Exception) -> str:
    """Return the class of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _repeat(calls: Calls, rounds: int) -> None:
    for _ in range(rounds):
        for call in calls:
            call()


def _events(run: Callable[[], object], samples: int) -> list[float]:
    """Return the microseconds between an event before and an event after each of so many runs."""
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def _clocked(calls: Calls, budget_s: float) -> Timing:
    _repeat(calls, 1)
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_s * 1e6 and len(times) < MOST_SAMPLES):
        start = time.perf_counter()
        _repeat(calls, 1)
        times.append((time.perf_counter() - start) * 1e6 / len(calls))
    return _summary(times, "clock", "")


def _summary(times: list[float], method: str, note: str) -> Timing:
    ordered = sorted(times)
    at = lambda share: ordered[round(share * (len(ordered) - 1))]
    return Timing(at(0.5), at(0.1), at(0.9), len(ordered), method, note)
