"""Search for the fastest launch of a kernel: every candidate once, then the fastest few again, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

FINALISTS = 4
ROUNDS = 5
# The present choice is only left for one that is better by more than two measurements of one launch differ.
MARGIN = 0.01

C = TypeVar("C")
Time = Callable[[C], float]


@dataclass(frozen=True)
class Result(Generic[C]):
    """The fastest launch, its time and that of the present one in microseconds, and why those that failed did.

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
        """How many times as fast it is."""
        return self.before / self.microseconds


def search(
    present: C,
    candidates: Sequence[C],
    time: Time[C],
    progress: Callable[[int, int], None] = lambda done, total: None,
    near: Callable[[C], Sequence[C]] = lambda best: (),
) -> Result[C]:
    """The fastest of `candidates` and the `present` one (hashable launches) by `time(launch)` in microseconds.

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
