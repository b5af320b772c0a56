"""Define the right result, and how far from it a backend may be.

The truth is `reference.evaluate` on the exact upcast of the inputs to float64, and its autograd gradients, term by
term, so that the error of a sum can be judged by what was summed.

Elements where torch itself has no answer are not judged: its gradients at NaN and infinity depend on whether its
vectorised loop or the loop's tail computed the element (hardtanh, elu), and some of its functions overflow in float32
on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dualop.backends.reference import evaluate
from dualop.backends.registry import BACKENDS
from dualop.language.entry import Exact
from dualop.language.syntax import Chain
from dualop.numerics.cases import SPECIAL, Sample


@dataclass(frozen=True)
class Tolerance:
    """Hold the ulps allowed at an element: `ulp` of its own, plus `of_scale` times one of S."""

    ulp: float
    of_scale: float = 0.0


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
    torch.float64: (Tolerance(16, 16), Tolerance(32, 64)),
}
# Of backends that have torch's formulas, which cancel likewise in float32; rounding to 16 bits hides most of it.
CANCELLING = {
    torch.float32: TOLERANCE[torch.float64],
    torch.float16: (Tolerance(1, 2.0**-9), Tolerance(1, 2.0**-7)),
    torch.bfloat16: (Tolerance(1, 2.0**-12), Tolerance(1, 2.0**-10)),
    torch.float64: TOLERANCE[torch.float64],
}


def largest(exact: Tensor, ordinary: Tensor | None = None) -> float:
    """Return S: the largest finite magnitude in `exact`, over the `ordinary` elements if there are any."""
    finite = exact.isfinite()
    if ordinary is not None and bool((finite & ordinary).any()):
        finite = finite & ordinary
    return exact.abs().masked_fill(~finite, 0.0).max().item() if exact.numel() else 0.0


@dataclass(frozen=True)
class Truth:
    """Hold a quantity's exact value (float64), its S, where it is unsettled, and the parts of its tolerance.

    The parts are in ulps of the element: what one ulp of each of its terms comes to (`terms`: 1 if it is no sum), what
    one ulp of S in each comes to (`scales`), and what adding them up in the accumulator's dtype costs (`adding`, in its
    ulps). Errors of many terms are as often up as down: their root mean square counts, four times over, but never more
    than their sum.
    """

    value: Tensor
    scale: float
    unsettled: Tensor
    terms: Tensor
    scales: Tensor
    adding: Tensor
    inexact: Tolerance | None = None

    def tolerance(self, name: str, backend: str, dtype: torch.dtype, computed: torch.dtype) -> Tensor:
        """Return the ulps of `dtype` that `backend` may be off, with kernels as accurate as `computed` needs."""
        ulp = {d: torch.finfo(d).eps for d in TOLERANCE}
        cancels = backend in BACKENDS and BACKENDS[backend].torch_formulas
        coarse = max(dtype, computed, key=ulp.__getitem__)
        result, gradient = (CANCELLING if cancels else TOLERANCE)[coarse]
        if coarse == torch.float64:
            gradient = self.inexact or gradient
        allowed = result if name == "y" else gradient
        accumulator = torch.float64 if computed == torch.float64 else torch.float32
        term = (allowed.ulp * self.terms + allowed.of_scale * self.scales) * (ulp[coarse] / ulp[dtype])
        return term + self.adding * (ulp[accumulator] / ulp[dtype])


def _differentiated(chain: Chain, sample: Sample, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return y and the terms of every gradient in torch's own arithmetic, with each input at the result's shape."""
    shape, device = sample.gy.shape, sample.gy.device
    leaves = [t.to(device, dtype).expand(shape).clone().requires_grad_() for t in (sample.x, *sample.operands)]
    with torch.enable_grad():
        y = evaluate(chain, leaves[0], leaves[1:])
    return y.detach(), list(torch.autograd.grad(y, leaves, sample.gy.to(dtype), materialize_grads=True))


def truth(chain: Chain, sample: Sample) -> dict[str, Truth]:
    """Return the exact `y` and the gradients `grad_x` and `grad_OPERAND` under `sample.gy`, from float64 arithmetic."""
    y, terms = _differentiated(chain, sample, torch.float64)
    wide = torch.float64 if sample.gy.dtype == torch.float64 else torch.float32
    torchs, torchs_terms = _differentiated(chain, sample, wide)
    x = sample.x.double().expand(y.shape)
    ordinary = torch.isin(x, torch.tensor(SPECIAL, dtype=x.dtype, device=x.device)).logical_not_() & x.isfinite()
    off = max((c.stage.exact.torch_is_off for c in chain.calls if isinstance(c.stage.exact, Exact)), default=0.0)
    inexact = Tolerance(off) if off else None
    exact = {"y": _quantity(y, y.shape, ordinary, torchs.isnan() & ~y.isnan())}
    for i, (name, tensor) in enumerate(zip(("x", *chain.operands), (sample.x, *sample.operands), strict=True)):
        settled = x.isfinite() & torchs.isfinite() & torchs_terms[i].isfinite()
        exact[f"grad_{name}"] = _quantity(terms[i], tensor.shape, ordinary, ~settled, inexact)
    return exact


def _quantity(
    term: Tensor, shape: torch.Size, ordinary: Tensor, unsettled: Tensor, inexact: Tolerance | None = None
) -> Truth:
    """Return the quantity that is the sum of `term` to `shape`."""
    scale = largest(term, ordinary)
    # A tensor that is zero all over has no S, but needs a divisor; and a tolerance must be a number, also for NaN.
    tiny = torch.finfo(torch.float64).tiny
    size = term.abs().clamp(min=max(scale / 1024, tiny)).nan_to_num(torch.inf)
    if term.shape == shape:
        return Truth(term, scale, unsettled, torch.ones_like(size), scale / size, torch.zeros_like(size), inexact)
    count = term.numel() // max(1, shape.numel())
    value = term.sum_to_size(shape)
    total = largest(value)
    unit = value.abs().clamp(min=max(total / 1024, tiny)).nan_to_num(torch.inf)
    sums, squares = size.sum_to_size(shape), size.square().sum_to_size(shape)
    return Truth(
        value,
        total,
        unsettled.double().sum_to_size(shape) > 0,
        1 + (torch.minimum(sums, 4 * squares.sqrt()) / unit).nan_to_num(0.0),
        min(count, 4 * count**0.5) * scale / unit,
        (count**0.5 * sums / unit).nan_to_num(0.0),
        inexact,
    )
