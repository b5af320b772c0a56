"""Check the backends against each other and against the truth, on samples of many shapes and layouts.

Memory that happens to hold the right answer must not count as a result. So `poisoned` fills all newly allocated memory
with NaN, and an element that a backend did not write differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualop.backends.registry import BACKENDS
from dualop.numerics.cases import Sample
from dualop.numerics.truth import differentiated, truth
from dualop.numerics.ulp import INTEGERS, Comparison, compare
from dualop.op.callable import Chain


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill whatever torch allocates uninitialised with NaN, on every device, while this context is active."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switch: Any = torch.utils.deterministic
    filling = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switch.fill_uninitialized_memory = filling


def results(
    function: Callable[..., Tensor], operands: Sequence[str], sample: Sample, poison: bool = True
) -> dict[str, Tensor]:
    """Return `y` and the gradients that `function(x, *operands)` and autograd compute, by default in poisoned memory.

    Raises AssertionError if an input was written, or a result has the wrong shape or dtype.
    """
    names, tensors = ("x", *operands), (sample.x, *sample.operands)
    before = [t.clone() for t in (*tensors, sample.gy)]
    with poisoned() if poison else nullcontext():
        y, gradients = differentiated(function, [t.detach().requires_grad_() for t in tensors], sample.gy)
    for name, kept, now in zip((*names, "gy"), before, (*tensors, sample.gy), strict=True):
        # NaN is not equal to itself, its bits are.
        bits = INTEGERS[kept.element_size()]
        if not torch.equal(kept.contiguous().view(bits), now.contiguous().view(bits)):
            raise AssertionError(f"{name} was written")
    found = {"y": y} | {f"grad_{n}": g for n, g in zip(names, gradients, strict=True)}
    for (name, tensor), like in zip(found.items(), (sample.gy, *tensors), strict=True):
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise AssertionError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {like.dtype} {tuple(like.shape)}"
            )
    return found


@dataclass(frozen=True)
class Row:
    """Hold one quantity of one backend against float64 or another backend.

    `error` and what is `allowed` are in `unit`: ulps, or u * sum|terms| of a sum (ulp.py). `beyond_rounding` is what is
    left of the error where float64 starts from x + bias as rounded to float32 (None where that says nothing).
    """

    backend: str
    against: str
    chain: str
    dtype: str
    shape: list[int]
    layout: str
    quantity: str
    unit: str
    error: float | None  # None: infinite
    allowed: float
    beyond_rounding: float | None
    where: list[int] | None
    note: str
    ok: bool
    interpreted: bool

    @property
    def verdict(self) -> str:
        return "ok" if self.ok else self.note

    @property
    def severity(self) -> float:
        """Return how close the error is to its tolerance; it is above 1 beyond it."""
        if self.error is None:
            return torch.inf
        return (not self.ok) + (self.error / self.allowed if self.allowed else 0.0)


def cross_check(chain: Chain, sample: Sample, backends: Sequence[str]) -> list[Row]:
    """Return a row for each quantity of each backend against float64 and against each backend after it.

    An error that a backend raises is a row that is not ok, with the error as its note.
    """
    call: dict[str, Any] = dict(chain=str(chain), dtype=sample.dtype, shape=list(sample.x.shape), layout=sample.layout)

    def row(
        backend: str, against: str, quantity: str, result: Comparison, note: str, beyond: float | None = None
    ) -> Row:
        figure = lambda error: round(error, 4) if error is not None and error < torch.inf else None
        return Row(
            backend=backend,
            against=against,
            quantity=quantity,
            unit=exact[quantity].unit,
            error=figure(result.error),
            allowed=round(result.allowed, 3),
            beyond_rounding=figure(beyond),
            where=None if result.where is None else list(result.where),
            note=note,
            ok=result.ok,
            interpreted=BACKENDS[backend].interpreted,
            **call,
        )

    exact, rows = truth(chain, sample), []
    found: dict[str, dict[str, Tensor]] = {}
    for backend in backends:
        try:
            found[backend] = results(partial(chain, backend=backend), chain.operands, sample)
        except Exception as error:
            note = f"{type(error).__name__}: {error}"
            rows.append(row(backend, "float64", "y", Comparison(False, torch.inf), note))
    names = list(found)
    for i, backend in enumerate(names):
        for quantity, value in found[backend].items():
            right = exact[quantity]
            result = right.judge(value, backend)
            rows.append(row(backend, "float64", quantity, result, result.note(), right.beyond_rounding(value)))
            for other in names[i + 1 :]:
                both = right.tolerance(backend, value.dtype) + right.tolerance(other, value.dtype)
                result = compare(value, found[other][quantity], both, right.units(value.dtype), right.unsettled)
                rows.append(row(backend, other, quantity, result, result.note(other)))
    return rows
