"""Define the right result of a chain, and how far from it a backend may be.

The truth is each stage's definition, one after the other, on the exact upcast of the inputs to float64, and its
gradients by torch's autograd. Stages that torch computes in float64 with constants rounded to float32 have a definition
of their own for it (`Stage.exact`). Some formulas of torch cancel (1 - tanh^2, 1 + erf): their error is a few times
1e-16 of what cancels. An ulp is that of no less than a thousandth of the largest result, so that this counts for less
than 1e-3 of a float32 ulp as long as what cancels is no more than a hundred times as large as the largest result.

Elements where torch itself has no answer are not judged: its gradients at NaN and infinity depend on whether its
vectorised loop or the loop's tail computed the element (hardtanh, elu), and some of its functions overflow in float32
on the way.

A gradient of a broadcast operand is a sum, which is measured against its terms (ulp.py). With many rows their own
errors cancel, and so a float32 or 16-bit sum of 10^6 terms may be off by no more than 2 u * sum|terms|.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dualop.backends.reference import evaluate
from dualop.backends.registry import BACKENDS
from dualop.language.stages import Call
from dualop.language.syntax import Chain
from dualop.numerics.cases import SPECIAL, Sample
from dualop.numerics.ulp import Comparison, compare, largest, ulp

EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
# The ulps allowed at an element, of its own and of S, for a result and for an element's gradient.
# 16 bits: float32 arithmetic leaves the final rounding, half an ulp, and a little for fast functions.
# float32, float64: every stage rounds, and a chain multiplies the error of its early stages by the slope of the later
# ones. A gradient that crosses zero (that of swish at -1.28) is a difference of larger terms, whose rounding stays
# behind in float32.
OWN = {torch.float16: (1, 1), torch.bfloat16: (1, 1), torch.float32: (16, 32), torch.float64: (16, 32)}
OF_SCALE = {torch.float16: (0.0, 0.0), torch.bfloat16: (0.0, 0.0), torch.float32: (0.25, 0.5)}
# torch's formulas cancel in the tails, with errors of a few ulps of the largest intermediate value. So many of S are
# allowed to a backend that has these formulas, and to all in float64, since the truth has them there.
CANCELLED = (16, 64)
# Of u * sum|terms|: one rounding of the result, and what adding up in a tree of float32 leaves, whose last few steps
# count most. One sum after the other would leave the square root of their number.
ADDED_UP = 1.5
SMALLEST = 1e-150  # a divisor whose square is a number, too
ULP, OF_TERMS = "ulp", "u Σ|terms|"  # what an error is measured in: that of a value, and that of a sum


def differentiated(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], gy: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return `function(*tensors)` and, under `gy` (None: ones), the gradients of those tensors that require them."""
    with torch.enable_grad():
        y = function(*tensors)
    leaves = [t for t in tensors if t.requires_grad]
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y) if gy is None else gy, materialize_grads=True)
    return y.detach(), gradients


def eager(chain: Chain) -> Callable[..., Tensor]:
    """Return a function of x and the operands: the chain in eager mode, in the tensors' own dtypes."""
    return lambda x, *operands: evaluate(chain, x, operands)


@lru_cache(maxsize=64)
def precise(chain: Chain) -> Chain:
    """Return the chain for float64, where torch's own constants are float32's."""
    stages = [(c, c.stage.exact) for c in chain.calls]
    return Chain(tuple(Call(replace(c.stage, reference=e), c.arguments) if callable(e) else c for c, e in stages))


@lru_cache(maxsize=64)
def first_rounded(chain: Chain) -> Chain:
    """Return the chain for float64 whose first stage, such as x + bias, is rounded to float32, and no other.

    Its gradients are those of the other stages at the rounded value.
    """
    first, *others = precise(chain).calls

    def rounded(z: Tensor, *arguments: Any) -> Tensor:
        value = first.stage.reference(z, *arguments)
        return value + (value.float().double() - value).detach()  # exact: they differ by a few bits

    return Chain((Call(replace(first.stage, reference=rounded), first.arguments), *others))


def exact(chain: Chain, x: Tensor, operands: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the chain at x and its derivative by x, both of x's shape; everything is float64."""
    y, (slope,) = differentiated(eager(precise(chain)), (x.detach().requires_grad_(), *operands))
    return y, slope


@dataclass(frozen=True)
class Truth:
    """Hold the exact value of a result or gradient (float64), where it is unsettled, and what it is summed from.

    `sizes` are the magnitudes of its terms, at least S / 1024 of theirs, which is `term_scale`; it may be its own term.
    `magnitudes` are what errors are measured at: the sums of the terms' magnitudes, and at least S / 1024 of theirs,
    which is `scale`. `first_rounded` is the exact value if the first stage is rounded to float32 and nothing else is;
    None where that says nothing: in sums, in other dtypes, and where the first stage takes no operand. `computed` is
    the dtype of the chain's result, which says in which dtype kernels calculate. `rounded` says that torch's own
    formulas have constants rounded to float32.
    """

    value: Tensor
    scale: float
    unsettled: Tensor
    magnitudes: Tensor
    sizes: Tensor
    term_scale: float
    first_rounded: Tensor | None
    gradient: bool
    computed: torch.dtype
    rounded: bool

    @property
    def summed(self) -> bool:
        """Return True if each element is a sum of other than one term."""
        return self.sizes.numel() != self.value.numel()

    @property
    def unit(self) -> str:
        """Return what errors are measured in, ULP or OF_TERMS."""
        return OF_TERMS if self.summed else ULP

    def units(self, dtype: torch.dtype) -> Tensor:
        """Return the unit of each element in `dtype`: an ulp, or u * sum|terms|."""
        return EPS[dtype] / 2 * self.magnitudes if self.summed else ulp(self.value, dtype, self.scale)

    def tolerance(self, backend: str, dtype: torch.dtype) -> Tensor:
        """Return the units of `dtype` that `backend` may be off at each element."""
        torch_formulas = backend in BACKENDS and BACKENDS[backend].torch_formulas
        wide = torch.float64 if self.computed == torch.float64 else torch.float32
        coarse = max(dtype, self.computed, key=EPS.__getitem__)
        own = EPS[coarse] * OWN[coarse][self.gradient]
        if torch_formulas or coarse == torch.float64:
            of_scale = EPS[wide] * CANCELLED[self.gradient]
        else:
            of_scale = EPS[coarse] * OF_SCALE[coarse][self.gradient]
        if torch_formulas and self.rounded and coarse == torch.float64:
            own = of_scale = EPS[torch.float32]
        sizes, shape = self.sizes, self.value.shape
        count, sums = sizes.numel() // max(1, shape.numel()), sizes.sum_to_size(shape)
        # Errors of many terms are as often up as down: their root mean square counts, four times over, but never more
        # than their sum.
        spread = torch.minimum(sums, 4 * sizes.square().sum_to_size(shape).sqrt())
        allowed = own * spread + of_scale * self.term_scale * min(count, 4 * count**0.5)
        unit = EPS[dtype] * self.magnitudes
        if self.summed:  # both errors are as often up as down, independently
            added = ADDED_UP * (2 if coarse == torch.float64 else 1)  # the truth adds up in float64, too
            allowed, unit = torch.hypot(allowed, added * EPS[coarse] / 2 * self.magnitudes), unit / 2
        return (allowed / unit).nan_to_num(1.0)

    def judge(self, value: Tensor, backend: str) -> Comparison:
        """Compare what `backend` has computed with the truth."""
        allowed = self.tolerance(backend, value.dtype)
        return compare(value, self.value, allowed, self.units(value.dtype), self.unsettled)

    def beyond_rounding(self, value: Tensor) -> float | None:
        """Return the largest error against `first_rounded`, if there is one: rounding x + bias does not explain it."""
        if self.first_rounded is None:
            return None
        units = self.units(value.dtype)
        return compare(value, self.first_rounded, torch.inf, units, self.unsettled).error


def _sizes(values: Tensor, scale: float) -> Tensor:
    """Return the magnitudes whose ulps count: positive, since they divide, and numbers also where the value is NaN."""
    return values.abs().clamp(min=max(scale / 1024, SMALLEST)).nan_to_num(torch.inf)


def truth(chain: Chain, sample: Sample) -> dict[str, Truth]:
    """Return the exact `y` and the gradients `grad_x` and `grad_OPERAND` under `sample.gy`, from float64 arithmetic."""
    gy, tensors = sample.gy, (sample.x, *sample.operands)

    def in_dtype(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Give each input the result's shape: its gradient is then the terms of a sum, each with its own error."""
        leaves = [t.to(gy.device, dtype).expand(gy.shape).clone().requires_grad_() for t in tensors]
        return differentiated(function, leaves, gy.to(dtype))

    y, terms = in_dtype(eager(precise(chain)), torch.float64)
    eager_y, eager_terms = in_dtype(eager(chain), torch.float64 if gy.dtype == torch.float64 else torch.float32)
    x = sample.x.double().expand(y.shape)
    ordinary = torch.isin(x, torch.tensor(SPECIAL, dtype=x.dtype, device=x.device)).logical_not_() & x.isfinite()
    rounded = any(callable(c.stage.exact) for c in chain.calls)

    after: Sequence[Tensor | None] = [None] * (len(terms) + 1)
    if gy.dtype == torch.float32 and chain.calls[0].stage.operand:
        first, after_terms = in_dtype(eager(first_rounded(chain)), torch.float64)
        after = first, *after_terms

    def quantity(term: Tensor, shape: torch.Size, unsettled: Tensor, after: Tensor | None, gradient: bool) -> Truth:
        """Return the quantity that is the sum of `term` to `shape`."""
        value, term_scale = term.sum_to_size(shape), largest(term, ordinary)
        sums = term.abs().sum_to_size(shape)
        scale = term_scale if term.numel() == value.numel() else largest(sums)
        return Truth(
            value=value,
            scale=scale,
            unsettled=unsettled.double().sum_to_size(shape) > 0,
            magnitudes=_sizes(sums, scale),
            sizes=_sizes(term, term_scale),
            term_scale=term_scale,
            first_rounded=None if after is None or after.numel() != value.numel() else after.view(shape),
            gradient=gradient,
            computed=gy.dtype,
            rounded=rounded,
        )

    found = {"y": quantity(y, y.shape, eager_y.isnan() & ~y.isnan(), after[0], False)}
    settled = x.isfinite() & eager_y.isfinite()
    each = zip(("x", *chain.operands), tensors, terms, eager_terms, after[1:], strict=True)
    for name, tensor, own, eager_own, own_after in each:
        found[f"grad_{name}"] = quantity(own, tensor.shape, ~(settled & eager_own.isfinite()), own_after, True)
    return found
