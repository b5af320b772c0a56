"""Verify a chain of one variable on every number of a dtype: forward and derivative against float64.

S is the largest magnitude that the chain (or its derivative) takes over the float32 inputs with |x| <= 100. An error is
counted in ulps: divided by the spacing of the dtype at max(|exact|, S / 1024).

- At most 1 ulp is allowed in float16 and bfloat16 and 4 ulp in float32, and no more than torch eager's largest error in
  the same dtype, which is measured too: over all inputs, and over |x| <= 100 (beyond, eager's may be infinite).
- No finite input may give NaN. What overflows the dtype may be infinite. In forward, NaN stays NaN, and an infinity
  gives what torch gives. Gradients there are not judged, nor inputs where the exact value is no number.
- Where a chain jumps (a clamp's gradient behind a tanh), an input so close to the jump that float32 arithmetic cannot
  know its side may give any value between those on both sides.

Operands are numbers here: of the entry of the stage that takes one first, unless told else. The default chain's is 0,
so that z is x.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualop.backends.reference import evaluate
from dualop.backends.registry import BACKENDS
from dualop.errors import DtypeError, OperandError
from dualop.numerics.cases import DTYPES
from dualop.numerics.check import ulps
from dualop.numerics.exact import exact
from dualop.numerics.sweep import BITS, COLUMNS, Progress, Sweep, bits_text
from dualop.op.callable import Chain

QUANTITIES = ("forward", "gradient")
LIMIT = {"float32": 4.0, "bfloat16": 1.0, "float16": 1.0}
ORDINARY = 100.0
# Float32 arithmetic rounded once to 16 bits ends a few thousandths of an ulp beyond one half, in eager and here. Such a
# difference decides nothing.
EAGER_SLACK = 0.01
NEAR = 2.0**-21  # four float32 ulps: what the arithmetic before a jump may be off by


@dataclass(frozen=True)
class Excuse:
    """Say why a chain may be off by up to `ulp` ulps, beyond LIMIT or worse than eager."""

    ulp: float
    why: str


_ROUNDINGS = "five functions round one after the other, and no more instructions fit in the shadow of memory"
# By chain, dtype and quantity. The table shows what stands here, with its reason.
EXCUSES: dict[tuple[str, str, str], Excuse] = {
    ("add | silu | tanh | gelu | hardtanh", "float32", "forward"): Excuse(5.0, _ROUNDINGS),
    ("add | silu | tanh | gelu | hardtanh", "float32", "gradient"): Excuse(5.5, _ROUNDINGS),
    ("gelu", "float16", "gradient"): Excuse(0.56, "a normal distribution good to 1.5e-7, where the gradient is 0.001"),
}


@dataclass
class Row:
    """Hold the largest error of one quantity of one backend over the inputs of one dtype, its place, and eager's.

    `beyond` counts the inputs whose error is above `limit`, `at_jumps` those that a jump of the chain excuses,
    `unjudged` the finite inputs whose exact value is no number. At the worst input, `actual` is the backend's value and
    `exact` the right one.
    """

    chain: str
    dtype: str
    backend: str
    quantity: str
    limit: float
    scale: float
    inputs: int
    sampled: bool
    interpreted: bool
    max_ulp: float = -1.0
    ordinary_ulp: float = 0.0  # the largest over |x| <= ORDINARY
    eager_ulp: float = torch.inf
    eager_ordinary_ulp: float = torch.inf
    beyond: int = 0
    at_jumps: int = 0
    unjudged: int = 0
    worst: float = 0.0
    bits: str = ""
    exact: float = 0.0
    actual: float = 0.0

    @property
    def problem(self) -> str:
        """Return what is wrong, or an empty text."""
        if self.beyond:
            return f"{self.beyond} beyond {self.limit:g} ulp"
        if max(self.max_ulp - self.eager_ulp, self.ordinary_ulp - self.eager_ordinary_ulp) > EAGER_SLACK:
            return "worse than eager"
        return ""

    @property
    def excuse(self) -> str:
        """Return why the error may be as large as it is, or an empty text."""
        if self.backend in BACKENDS and BACKENDS[self.backend].torch_formulas:  # no worse than eager
            return "torch's formulas, not judged"
        excuse = EXCUSES.get((self.chain, self.dtype, self.quantity))
        return excuse.why if excuse and self.max_ulp <= excuse.ulp else ""

    @property
    def ok(self) -> bool:
        return not self.problem or bool(self.excuse)


def verify(
    chain: Chain,
    dtypes: Sequence[str],
    backends: Sequence[str],
    device: torch.device,
    stride: int = 1,
    numbers: Mapping[str, float] | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Row]:
    """Return a row for each dtype, backend and quantity.

    `numbers` are the operands' values by their names; `stride` (a power of two) takes every so many-th float32.
    `progress` is called after each piece. Raises DtypeError for float64, OperandError for a name that the chain does
    not take, and the errors of the backend.
    """
    if wrong := [dtype for dtype in dtypes if dtype not in BITS]:
        raise DtypeError(f"{wrong[0]} has too many numbers to try all of them; there are {', '.join(BITS)}")
    numbers = _numbers(chain, numbers or {})
    sweep = Sweep(device, stride, len(chain.calls))
    total, done = sum(sweep.pieces(dtype) for dtype in ("float32", *dtypes)), 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    scales = _scales(chain, sweep, numbers, step)
    return [row for dtype in dtypes for row in _rows(chain, dtype, backends, sweep, numbers, scales, step)]


def _numbers(chain: Chain, given: Mapping[str, float]) -> dict[str, float]:
    """Return the number of each operand."""
    if wrong := [name for name in given if name not in chain.operands]:
        takes = ", ".join(chain.operands) or "no operand"
        raise OperandError(f"`{chain}` takes {takes}, not {', '.join(wrong)}")
    first = {c.operand: c.stage.number or 0.0 for c in reversed(chain.calls)}
    return {name: given.get(name, first[name]) for name in chain.operands}


def _operands(numbers: Mapping[str, float], dtype: str, device: torch.device) -> list[Tensor]:
    """Return each operand as a vector along the columns, like a user's bias."""
    return [torch.full((COLUMNS,), number, dtype=DTYPES[dtype], device=device) for number in numbers.values()]


def _scales(chain: Chain, sweep: Sweep, numbers: Mapping[str, float], step: Callable[[], None]) -> tuple[float, ...]:
    """Return S of the chain and of its derivative."""
    operands = [t[0].double() for t in _operands(numbers, "float32", sweep.device)]
    scales = [0.0, 0.0]
    for x in sweep.inputs("float32"):
        if x[0, 0].abs() <= ORDINARY:  # magnitudes rise from one input to the next
            for i, values in enumerate(exact(chain, x[x.abs() <= ORDINARY].double(), operands)):
                scales[i] = max(scales[i], values.abs().nan_to_num_(0.0, 0.0).max().item())
        step()
    return tuple(scales)


def _rows(
    chain: Chain,
    dtype: str,
    backends: Sequence[str],
    sweep: Sweep,
    numbers: Mapping[str, float],
    scales: Sequence[float],
    step: Callable[[], None],
) -> list[Row]:
    operands = _operands(numbers, dtype, sweep.device)
    wide = [t[0].double() for t in operands]
    functions: dict[str, Callable[..., Tensor]] = {"eager": lambda x, *operands: evaluate(chain, x, operands)}
    functions |= {name: partial(chain, backend=name) for name in backends}
    common: dict[str, Any] = dict(inputs=sweep.count(dtype), sampled=sweep.stride_of(dtype) > 1, limit=LIMIT[dtype])
    found = {
        name: [
            Row(str(chain), dtype, name, quantity, scale=scale, interpreted=_interpreted(name), **common)
            for quantity, scale in zip(QUANTITIES, scales, strict=True)
        ]
        for name in functions
    }
    for x in sweep.inputs(dtype):
        right = exact(chain, x.double(), wide)
        finite = x.isfinite()
        unsettled = right[0].isnan() & ~x.isnan(), right[1].isnan() | ~finite
        sizes = [_size(values, scale, x.dtype) for values, scale in zip(right, scales, strict=True)]
        unjudged = [int((mask & finite).sum()) for mask in unsettled]
        for name, function in functions.items():
            for i, actual in enumerate(_differentiated(function, x, operands)):
                row = found[name][i]
                row.unjudged += unjudged[i]
                chosen = _larger(row, actual, right[i], sizes[i]).logical_and_(~unsettled[i])
                if (lost := _lost(row, x)) is not None:
                    chosen &= ~lost
                    row.unjudged += int((lost & ~unsettled[i]).sum())
                _add(row, x, actual, right[i], chosen, lambda x: exact(chain, x, wide))
        step()
    rows = []
    for name in backends:
        for row, eager in zip(found[name], found["eager"], strict=True):
            row.eager_ulp, row.eager_ordinary_ulp = eager.max_ulp, eager.ordinary_ulp
            rows.append(row)
    return rows


def _interpreted(name: str) -> bool:
    return name in BACKENDS and BACKENDS[name].interpreted


def _differentiated(function: Callable[..., Tensor], x: Tensor, operands: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        y = function(leaf, *operands)
    (gradient,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach(), gradient


def _lost(row: Row, x: Tensor) -> Tensor | None:
    """Inputs that do not reach the kernel: an interpreter may make zeros of most subnormals."""
    if row.backend not in BACKENDS or x.dtype not in BACKENDS[row.backend].flushed:
        return None
    return (x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)


Exact = Callable[[Tensor], tuple[Tensor, Tensor]]


def _add(row: Row, x: Tensor, actual: Tensor, right: Tensor, chosen: Tensor, truth: Exact) -> None:
    """Add the result of one piece of the inputs to a row; everything that matters in the row is `chosen`."""
    row.max_ulp = max(row.max_ulp, 0.0)
    places = chosen.view(-1).nonzero().view(-1)
    if not places.numel():
        return
    x, actual, right = (t.reshape(-1)[places] for t in (x, actual, right))
    error = ulps(actual, right, actual.dtype, row.scale)
    beyond = error > row.limit
    if bool(beyond.any()):
        excused = _at_jump(truth, x[beyond].double(), actual[beyond], row)
        error[beyond] = error[beyond].masked_fill_(excused, 0.0)
        row.at_jumps += int(excused.sum())
        row.beyond += excused.numel() - int(excused.sum())
    row.ordinary_ulp = max(row.ordinary_ulp, error.masked_fill(~(x.abs() <= ORDINARY), 0.0).max().item())
    largest, place = error.max(0)
    if largest.item() > row.max_ulp:
        value = x[place]
        row.max_ulp, row.worst, row.bits = largest.item(), value.item(), bits_text(value)
        row.exact, row.actual = right[place].item(), actual[place].item()


def _size(right: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Return the magnitudes whose spacing is the ulp."""
    info = torch.finfo(dtype)
    return right.abs().clamp_(min=max(min(scale, info.max) / 1024, info.tiny))


def _larger(row: Row, actual: Tensor, right: Tensor, size: Tensor) -> Tensor:
    """Return where the error may be larger than what the row has seen or allows.

    The error is counted in ulps only there, since that takes many passes over memory. An ulp is at least eps / 2 of a
    number.
    """
    seen = min(row.max_ulp, row.ordinary_ulp, row.limit) * torch.finfo(actual.dtype).eps / 2
    return ((actual - right).abs_().sub_(size, alpha=seen) <= 0).logical_not_()


def _at_jump(truth: Exact, x: Tensor, actual: Tensor, row: Row) -> Tensor:
    """Return where the exact value jumps and the actual value lies between both sides.

    It jumps where it differs as much between very close inputs as between inputs eight times as far apart.
    """
    quantity = QUANTITIES.index(row.quantity)
    low, high, lower, higher = (truth(x * (1 + k * NEAR))[quantity] for k in (-1, 1, -8, 8))
    between = actual.double().clamp(torch.minimum(low, high), torch.maximum(low, high))
    inside = ulps(actual, between, actual.dtype, row.scale) <= row.limit
    return inside & (low != high) & ((high - low).abs() > (higher - lower).abs() / 2)
