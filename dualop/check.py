"""Comparison in ulps, and the cross-check of the backends against each other and against float64.

The measure: an error is divided by the spacing of its dtype at max(|exact|, S / 1024), where S is the largest
magnitude of the exact result in that tensor over its ordinary inputs. So a value counts by its own digits unless it
is a thousand times smaller than what the tensor holds; there its absolute error counts.

The truth is `reference.evaluate` on the exact upcast of the inputs to float64, and its autograd gradients.

Nothing is compared in memory that happened to hold the right answer: `poisoned` fills whatever is allocated with NaN,
so an element that a backend did not write differs.

Nothing is asked where torch itself has no answer: its gradients at NaN and infinity depend on whether its vectorised
loop or the loop's tail met the element (hardtanh, elu), and some of its functions overflow in float32 on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dualop.backends.reference import evaluate
from dualop.cases import SPECIAL, Sample
from dualop.chains import Chain
from dualop.registry import BACKENDS


@dataclass(frozen=True)
class Tolerance:
    """Ulps allowed at an element: `ulp` of its own, and so many of S's as `of_scale` says."""

    ulp: float
    of_scale: float = 0.0

    def at(self, exact: Tensor, scale: float) -> Tensor:
        """Ulps allowed at each element of `exact`."""
        if not self.of_scale or not scale:
            return torch.full_like(exact, self.ulp)
        return self.ulp + self.of_scale * scale / exact.abs().nan_to_num(torch.inf).clamp(min=scale / 1024)


# By the dtype of the quantity: for the result, for an element's gradient.
# 16 bits: float32 arithmetic leaves the final rounding, half an ulp, and a little for fast functions.
# float32: every stage rounds, and a chain multiplies the error of its early stages by the slope of the later ones. A
# gradient that crosses zero (that of swish at -1.28) is a difference of larger terms, whose rounding stays behind.
# float64: as float32, but there torch's own formulas are the truth, and those cancel in the tails (1 - tanh^2,
# 1 + erf): their errors are a few ulps of the largest intermediate value.
TOLERANCE = {
    torch.float16: (Tolerance(1), Tolerance(1)),
    torch.bfloat16: (Tolerance(1), Tolerance(1)),
    torch.float32: (Tolerance(16, 0.25), Tolerance(32, 0.5)),
    torch.float64: (Tolerance(16, 8), Tolerance(32, 16)),
}
# The reference backend has torch's formulas, which cancel likewise in float32.
CANCELLING = {"reference": {torch.float32: TOLERANCE[torch.float64]}}


@dataclass(frozen=True)
class Comparison:
    """The outcome for one tensor. `max_ulp` is infinite where NaN or infinity stands against a number.

    `where` is the index of the element that is closest to its tolerance or furthest beyond it, with its two values.
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
    """The distance of neighbouring numbers of `dtype` at `magnitude` (float64, finite, not negative)."""
    info = torch.finfo(dtype)
    magnitude = magnitude.clamp(min=info.tiny)
    mantissa, _ = torch.frexp(magnitude)
    return magnitude / (2 * mantissa) * info.eps


def ulps(actual: Tensor, exact: Tensor, dtype: torch.dtype, scale: float = 0.0) -> Tensor:
    """The error of each element of `actual` against `exact` (float64) in ulps of `dtype`; `scale` is S.

    NaN equals NaN only, and an infinity itself or what overflows to it. Everything else against them is inf.
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


def largest(exact: Tensor, ordinary: Tensor | None = None) -> float:
    """S: the largest finite magnitude in `exact`, over the `ordinary` elements if there are any."""
    finite = exact.isfinite()
    if ordinary is not None and bool((finite & ordinary).any()):
        finite = finite & ordinary
    return exact[finite].abs().max().item() if bool(finite.any()) else 0.0


def compare(
    actual: Tensor,
    exact: Tensor,
    tolerance: float | Tensor,
    scale: float | None = None,
    unsettled: Tensor | None = None,
) -> Comparison:
    """Compare `actual` with `exact`, of one shape and any floating dtypes, in ulps of `actual`'s dtype.

    `tolerance` is in ulps, for all or for each element; `scale` is S, by default taken from `exact`; where `unsettled`
    (bool) is true anything goes.
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
    ratio = error / tolerance
    flat = int(ratio.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), exact.shape))
    ok = bool((error <= tolerance).all())
    return Comparison(ok, error.max().item(), where, actual[where].item(), exact[where].item())


@dataclass(frozen=True)
class Truth:
    """A quantity's exact value (float64), its S, where it is unsettled, and how the error of a term adds up in it.

    A sum of many terms has the errors of all of them, which are as often up as down: their root mean square counts,
    four times over, but never more than their sum: that many times a term's tolerance is `growth`. `rounding` is what
    adding up in float32 costs, in ulps of float32.
    """

    value: Tensor
    scale: float
    unsettled: Tensor
    growth: float | Tensor = 1.0
    rounding: float | Tensor = 0.0

    def tolerance(self, name: str, backend: str, dtype: torch.dtype, computed: torch.dtype) -> Tensor:
        """Ulps of `dtype` that `backend` may be off, with kernels that compute as accurately as `computed` needs."""
        ulp = {d: torch.finfo(d).eps for d in TOLERANCE}
        coarse = max(dtype, computed, key=ulp.__getitem__)
        result, gradient = CANCELLING.get(backend, {}).get(coarse, TOLERANCE[coarse])
        if name == "y":
            return result.at(self.value, self.scale)
        term = gradient.at(self.value, self.scale) * (ulp[coarse] / ulp[dtype])
        accumulator = torch.float64 if computed == torch.float64 else torch.float32
        return self.growth * term + self.rounding * (ulp[accumulator] / ulp[dtype])


def _differentiated(chain: Chain, sample: Sample, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """y and the terms of every gradient in torch's own arithmetic, each input first at the result's shape."""
    shape, device = sample.gy.shape, sample.gy.device
    leaves = [t.to(device, dtype).expand(shape).clone().requires_grad_() for t in (sample.x, *sample.operands)]
    with torch.enable_grad():
        y = evaluate(chain, leaves[0], leaves[1:])
    return y.detach(), list(torch.autograd.grad(y, leaves, sample.gy.to(dtype), materialize_grads=True))


def truth(chain: Chain, sample: Sample) -> dict[str, Truth]:
    """The exact `y`, and the gradients `grad_x` and `grad_OPERAND` under `sample.gy`, from float64 arithmetic."""
    y, terms = _differentiated(chain, sample, torch.float64)
    wide = torch.float64 if sample.gy.dtype == torch.float64 else torch.float32
    torchs, torchs_terms = _differentiated(chain, sample, wide)
    x = sample.x.double().expand(y.shape)
    ordinary = torch.isin(x, torch.tensor(SPECIAL, dtype=x.dtype, device=x.device)).logical_not_() & x.isfinite()
    exact = {"y": Truth(y, largest(y, ordinary), torchs.isnan() & ~y.isnan())}
    for i, (name, tensor) in enumerate(zip(("x", *chain.operands), (sample.x, *sample.operands), strict=True)):
        settled = x.isfinite() & torchs.isfinite() & torchs_terms[i].isfinite()
        exact[f"grad_{name}"] = _summed(terms[i], tensor.shape, ordinary, ~settled)
    return exact


def _summed(term: Tensor, shape: torch.Size, ordinary: Tensor, unsettled: Tensor) -> Truth:
    scale = largest(term, ordinary)
    if term.shape == shape:
        return Truth(term, scale, unsettled)
    count = term.numel() // max(1, shape.numel())
    unsettled = unsettled.double().sum_to_size(shape) > 0
    value = term.sum_to_size(shape)
    total = largest(value)
    size = term.abs().clamp(min=scale / 1024)
    sums, squares = size.sum_to_size(shape), size.square().sum_to_size(shape)
    unit = value.abs().clamp(min=max(total / 1024, torch.finfo(torch.float64).tiny))
    growth = 1 + torch.minimum(sums, 4 * squares.sqrt()) / unit
    return Truth(value, total, unsettled, growth.nan_to_num(1.0), (count**0.5 * sums / unit).nan_to_num(1.0))


@contextmanager
def poisoned() -> Iterator[None]:
    """Within it, whatever torch allocates uninitialised is full of NaN, on every device."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling


def results(
    function: Callable[..., Tensor], operands: Sequence[str], sample: Sample, poison: bool = True
) -> dict[str, Tensor]:
    """`y` and the gradients as `function(x, *operands)` and autograd compute them, in poisoned memory if not told else.

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
    """One quantity of one backend against float64 or another backend."""

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
    """A row for each quantity of each backend against float64, and against each backend that follows it.

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
