"""The time of a workload with one launch or another: what `dualop tune` compares."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

from dualop import tuned
from dualop.bench import timing
from dualop.bench.workloads import Workload, calls
from dualop.layout import layout


def timer(
    workload: Workload, backend: str, direction: str, seed: int
) -> tuple[tuned.Subject, Callable[[object], float]]:
    """What the launch is for, and a function from a launch to the microseconds of one call with it.

    That function raises what the backend raises when the launch does not fit the GPU.
    """
    sets = timing.sets_beyond_cache(workload.bytes(direction), workload.device)
    samples = [workload.sample(seed + i) for i in range(sets)]
    what = tuned.subject(backend, workload.chain, layout(samples[0].x, samples[0].operands), direction)

    def time(launch: object) -> float:
        gc.collect()
        with tuned.trying(what, launch), timing.on_stream(workload.device) as stream:
            function = partial(workload.chain, backend=backend)
            return timing.timed(calls(function, direction, samples), stream).median_us

    return what, time
