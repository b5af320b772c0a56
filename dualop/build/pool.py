"""Run one function on many tasks, each in a process of a pool: several compilers run at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any


def each(
    function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], most: int, progress: Callable[[int, int], None]
) -> None:
    """Call function(*task) for each task, in as many processes as there are cores, at most `most`.

    Function and tasks are pickled. `progress(done, total)` is called after each task. When all tasks have ended, the
    error of the first task that failed is raised.
    """
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    if not tasks:
        return
    # Spawn the processes: a forked child of a process that has used a GPU cannot use it.
    with ProcessPoolExecutor(min(len(tasks), os.cpu_count() or 1, most), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(function, *task) for task in tasks]
        for done, _ in enumerate(as_completed(futures), 1):
            progress(done, len(tasks))
    for future in futures:
        future.result()
