"""Say what errors are measured in, measure them, and word them.

An error of a value is divided by an ulp: the spacing of its dtype at max(|exact|, S / 1024), where S is the largest
magnitude of the exact result over ordinary inputs. So a value counts by its own digits unless it is a thousand times
smaller than what the tensor holds; there its absolute error counts.

An error of a sum is divided by u * sum|terms|, where u is the unit roundoff of its dtype (half of eps): what is left of
the terms may be a thousand times smaller than they are, and no order of adding them up is accurate to its last digit.
This is the measure of the error analysis of summation (N. J. Higham, Accuracy and Stability of Numerical Algorithms,
2nd edition, section 4.2). Here too sum|terms| counts as at least S / 1024, where S is the largest in the tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of as many bytes as a floating dtype


def spacing(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance of neighbouring numbers of `dtype` at `magnitude` (float64, finite, not negative)."""
    info = torch.finfo(dtype)
    magnitude = magnitude.clamp(min=info.tiny)
    mantissa, _ = torch.frexp(magnitude)
    return magnitude / (2 * mantissa) * info.eps


def measured_at(exact: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Return the magnitudes whose spacing is the ulp: max(|exact|, S / 1024), where `scale` is S."""
    info = torch.finfo(dtype)
    return exact.abs().clamp_(min=max(min(scale, info.max) / 1024, info.tiny))


def ulp(exact: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """Return the ulp of each element of `exact` (float64) in `dtype`; `scale` is S."""
    return spacing(measured_at(exact, dtype, scale).clamp_(max=torch.finfo(dtype).max).nan_to_num_(), dtype)


def ulps(actual: Tensor, exact: Tensor, dtype: torch.dtype, scale: float = 0.0) -> Tensor:
    """Return the error of each element of `actual` against `exact` (float64) in ulps of `dtype`; `scale` is S."""
    return errors(actual, exact, dtype, ulp(exact, dtype, scale))


def errors(actual: Tensor, exact: Tensor, dtype: torch.dtype, unit: Tensor) -> Tensor:
    """Return the error of each element of `actual`, a number of `dtype`, against `exact` (float64) in units of `unit`.

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
    error = (actual.clamp(-beyond, beyond) - exact.clamp(-beyond, beyond)).abs() / unit
    error = torch.where(torch.isinf(exact), torch.where(actual == exact, 0.0, torch.inf), error)
    both, either = exact.isnan() & actual.isnan(), exact.isnan() | actual.isnan()
    return error.masked_fill(either, torch.inf).masked_fill(both, 0.0)


def may_exceed(actual: Tensor, exact: Tensor, magnitude: Tensor, limit: float) -> Tensor:
    """Return where the error may be above `limit` ulps, with `magnitude` from `measured_at`.

    It passes over memory a few times, `ulps` many times. An ulp is at least eps / 2 of a magnitude.
    """
    least = limit * torch.finfo(actual.dtype).eps / 2
    return ((actual - exact).abs_().sub_(magnitude, alpha=least) <= 0).logical_not_()


def largest(exact: Tensor, ordinary: Tensor | None = None) -> float:
    """Return S: the largest finite magnitude in `exact`, over the `ordinary` elements if there are any."""
    finite = exact.isfinite()
    if ordinary is not None and bool((finite & ordinary).any()):
        finite = finite & ordinary
    return exact.abs().masked_fill(~finite, 0.0).max().item() if exact.numel() else 0.0


@dataclass(frozen=True)
class Comparison:
    """Hold the outcome for one tensor: the largest error (beyond its tolerance, if any is), and where it is.

    `error` and `allowed`, the tolerance there, are in ulps or in the unit that was given; `error` is infinite where NaN
    or infinity stands against a number. `actual` and `exact` are the values there.
    """

    ok: bool
    error: float
    where: tuple[int, ...] | None = None
    actual: float = 0.0
    exact: float = 0.0
    allowed: float = 0.0

    def note(self, other: str = "") -> str:
        """Return what stands against what `other` has, by default against the truth."""
        if self.where is None:
            return ""
        right = f"{other} has {self.exact:.9g}" if other else f"{self.exact:.9g} is exact"
        return f"{self.actual:.9g} where {right}"


def compare(
    actual: Tensor,
    exact: Tensor,
    tolerance: float | Tensor,
    unit: Tensor | None = None,
    unsettled: Tensor | None = None,
) -> Comparison:
    """Compare `actual` with `exact`, of one shape and any floating dtypes.

    `unit` is what an error of 1 is at each element, by default an ulp of `actual`'s dtype with S taken from `exact`.
    `tolerance` is in this unit, for all or for each element; where `unsettled` (bool) is true, any value is accepted.
    Raises ValueError if the shapes differ.
    """
    if actual.shape != exact.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(exact.shape)}")
    if actual.numel() == 0:
        return Comparison(True, 0.0)
    exact = exact.detach().double()
    actual = actual.detach().to(exact.device)
    error = errors(actual, exact, actual.dtype, ulp(exact, actual.dtype, largest(exact)) if unit is None else unit)
    if unsettled is not None:
        error = error.masked_fill(unsettled, 0.0)
    beyond = ~(error <= tolerance)
    ok = not bool(beyond.any())
    flat = int((error if ok else error.masked_fill(~beyond, -1.0)).argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), exact.shape))
    allowed = tolerance[where].item() if isinstance(tolerance, Tensor) else tolerance
    return Comparison(ok, error[where].item(), where, actual[where].item(), exact[where].item(), allowed)


def bits_text(value: Tensor) -> str:
    """Return the bits of one number, such as 0x3f800000."""
    size = value.element_size()
    return f"0x{value.view(INTEGERS[size]).item() % 2 ** (8 * size):0{2 * size}x}"
