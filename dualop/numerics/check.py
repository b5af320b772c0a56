"""Compare in ulps, and check the backends against each other and against float64.

An error is divided by the spacing of its dtype at max(|exact|, S / 1024), where S is the largest magnitude of the exact
result in that tensor over its ordinary inputs. So a value counts by its own digits unless it is a thousand times
smaller than what the tensor holds; there its absolute error counts.

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
from dualop.numerics.truth import largest, truth
from dualop.op.callable import Chain


@dataclass(frozen=True)
class Comparison:
    """Hold the outcome for one tensor: the largest error (beyond its tolerance, if any is), and where it is.

    `max_ulp` is infinite where NaN or infinity stands against a number. `actual` and `exact` are the values there.
    """

    ok: bool
    max_ulp: float
    where: tuple[int, ...] | None = None
    actual: float = 0.0
    exact: float = 0.0

    @property
    def note(self) -> str:
        return "" if self.where is None else f"{self.actual:.9g} where {self.exact:.9g} is exact"


def spacing(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbouring numbers of `dtype` at `magnitude` (float64, finite, not negative)."""
    info = torch.finfo(dtype)
    magnitude = magnitude.clamp(min=info.tiny)
    mantissa, _ = torch.frexp(magnitude)
    return magnitude / (2 * mantissa) * info.eps


def ulps(actual: Tensor, exact: Tensor, dtype: torch.dtype, scale: float = 0.0) -> Tensor:
    """Return the error of each element of `actual` against `exact` (float64) in ulps of `dtype`; `scale` is S.

    NaN equals only NaN. An infinity equals itself or a value that overflows to it. Every other error with a NaN or an
    infinity is inf.
    """
    info = torch.finfo(dtype)
    # The next number after the largest, had the exponent one more value: infinity counts as it when it is rounded to.
    beyond = info.max if dtype == torch.float64 else 2.0 ** torch.tensor(info.max).double().log2().ceil().item()
    actual = actual.double()
    certain = exact.abs() > 1.01 * beyond  # so large that not even an error of an ulp leaves a finite number
    infinite = torch.where(exact > 0, torch.inf, -torch.inf).to(exact.dtype)
    exact = torch.where(certain, infinite, exact)
    bounded = exact.clamp(-beyond, beyond)
    magnitude = bounded.abs().clamp(min=min(scale, info.max) / 1024, max=info.max)
    error = (actual.clamp(-beyond, beyond) - bounded).abs() / spacing(magnitude.nan_to_num(), dtype)
    error = torch.where(torch.isinf(exact), torch.where(actual == exact, 0.0, torch.inf), error)
    both, either = exact.isnan() & actual.isnan(), exact.isnan() | actual.isnan()
    return error.masked_fill(either, torch.inf).masked_fill(both, 0.0)


def compare(
    actual: Tensor,
    exact: Tensor,
    tolerance: float | Tensor,
    scale: float | None = None,
    unsettled: Tensor | None = None,
) -> Comparison:
    """Compare `actual` with `exact`, of one shape and any floating dtypes, in ulps of `actual`'s dtype.

    `tolerance` is in ulps, for all or for each element; `scale` is S, by default taken from `exact`; where `unsettled`
    (bool) is true, any value is accepted.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(exact.shape)}")
    if actual.numel() == 0:
        return Comparison(True, 0.0)
    exact = exact.detach().double()
    actual = actual.detach().to(exact.device)
    error = ulps(actual, exact, actual.dtype, largest(exact) if scale is None else scale)
    if unsettled is not None:
        error = error.masked_fill(unsettled, 0.0)
    beyond = ~(error <= tolerance)
    ok = not bool(beyond.any())
    flat = int((error if ok else error.masked_fill(~beyond, -1.0)).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), exact.shape))
    return Comparison(ok, error[where].item(), where, actual[where].item(), exact[where].item())


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
    leaves = [t.detach().requires_grad_() for t in tensors]
    with poisoned() if poison else nullcontext(), torch.enable_grad():
        y = function(*leaves)
        gradients = torch.autograd.grad(y, leaves, sample.gy)
    for name, kept, now in zip((*names, "gy"), before, (*tensors, sample.gy), strict=True):
        # NaN is not equal to itself, its bits are.
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[kept.element_size()]
        if not torch.equal(kept.contiguous().view(bits), now.contiguous().view(bits)):
            raise AssertionError(f"{name} was written")
    found = {"y": y.detach()} | {f"grad_{n}": g for n, g in zip(names, gradients, strict=True)}
    for (name, tensor), like in zip(found.items(), (sample.gy, *tensors), strict=True):
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise AssertionError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {like.dtype} {tuple(like.shape)}"
            )
    return found


@dataclass(frozen=True)
class Row:
    """Hold one quantity of one backend against float64 or another backend."""

    backend: str
    against: str
    chain: str
    dtype: str
    shape: list[int]
    layout: str
    quantity: str
    max_ulp: float | None  # None: infinite
    allowed_ulp: float
    where: list[int] | None
    note: str
    ok: bool
    interpreted: bool


def cross_check(chain: Chain, sample: Sample, backends: Sequence[str]) -> list[Row]:
    """Return a row for each quantity of each backend against float64 and against each backend after it.

    An error that a backend raises is a row that is not ok, with the error as its note.
    """
    exact = truth(chain, sample)
    rows: list[Row] = []
    found: dict[str, dict[str, Tensor]] = {}

    def row(backend: str, against: str, quantity: str, result: Comparison, allowed: Tensor, note: str) -> None:
        limit = 0.0 if result.where is None else allowed[result.where].item()
        rows.append(
            Row(
                backend=backend,
                against=against,
                chain=str(chain),
                dtype=sample.dtype,
                shape=list(sample.x.shape),
                layout=sample.layout,
                quantity=quantity,
                max_ulp=round(result.max_ulp, 4) if result.max_ulp < torch.inf else None,
                allowed_ulp=round(limit, 3),
                where=None if result.where is None else list(result.where),
                note=note,
                ok=result.ok,
                interpreted=BACKENDS[backend].interpreted,
            )
        )

    for backend in backends:
        try:
            found[backend] = results(partial(chain, backend=backend), chain.operands, sample)
        except Exception as error:
            note = f"{type(error).__name__}: {error}"
            row(backend, "float64", "y", Comparison(False, torch.inf), torch.zeros(()), note)
    names = list(found)
    for i, backend in enumerate(names):
        for quantity, value in found[backend].items():
            expected = exact[quantity]
            own = expected.tolerance(quantity, backend, value.dtype, sample.gy.dtype)
            result = compare(value, expected.value, own, expected.scale, expected.unsettled)
            row(backend, "float64", quantity, result, own, result.note)
            for other in names[i + 1 :]:
                both = own + expected.tolerance(quantity, other, value.dtype, sample.gy.dtype)
                result = compare(value, found[other][quantity], both, expected.scale, expected.unsettled)
                row(backend, other, quantity, result, both, result.note.replace("is exact", f"{other} has"))
    return rows
