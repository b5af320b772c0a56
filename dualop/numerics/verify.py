"""Verify a chain of one variable on every number of a dtype: forward and derivative against the truth.

S is the largest magnitude that the chain (or its derivative) takes over the float32 inputs with |x| <= 100.

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

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dualop.backends.base import Planned, Progress
from dualop.backends.registry import BACKENDS
from dualop.errors import DtypeError, OperandError
from dualop.language.entry import Excuse
from dualop.language.stages import STAGES
from dualop.numerics.cases import COLUMNS, DTYPES, SWEPT, Sweep
from dualop.numerics.truth import differentiated, eager, exact
from dualop.numerics.ulp import bits_text, largest, may_exceed, measured_at, ulps
from dualop.op.callable import Chain

QUANTITIES = ("forward", "gradient")
LIMIT = {"float32": 4.0, "bfloat16": 1.0, "float16": 1.0}
ORDINARY = 100.0
# Float32 arithmetic rounded once to 16 bits ends a few thousandths of an ulp beyond one half, in eager and here. Such a
# difference decides nothing.
EAGER_SLACK = 0.01
NEAR = 2.0**-21  # four float32 ulps: what the arithmetic before a jump may be off by

_ROUNDINGS = "five functions round one after the other, and no more instructions fit in the shadow of memory"
# By chain, then by dtype and quantity: those of a stage stand in its table entry, those of longer chains here. What
# `dualop verify` prints shows which one applies, with its reason.
EXCUSES: dict[str, Mapping[tuple[str, str], Excuse]] = {stage.example: stage.excuses for stage in STAGES.values()} | {
    "add | silu | tanh | gelu | hardtanh": {
        ("float32", "forward"): Excuse(5.0, _ROUNDINGS),
        ("float32", "gradient"): Excuse(5.5, _ROUNDINGS),
    }
}

Exact = Callable[[Tensor], tuple[Tensor, Tensor]]


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
    max_ulp: float = 0.0
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
        excuse = EXCUSES.get(self.chain, {}).get((self.dtype, self.quantity))
        return excuse.why if excuse and self.max_ulp <= excuse.ulp else ""

    @property
    def ok(self) -> bool:
        return not self.problem or bool(self.excuse)

    @property
    def verdict(self) -> str:
        """Return ok, or what is wrong; also why an error is allowed, and what was not judged."""
        said = [self.problem or "ok", self.excuse if self.problem else ""]
        said += [f"{self.at_jumps} at a jump"] if self.at_jumps else []
        said += [f"{self.unjudged} not judged"] if self.unjudged else []
        return "; ".join(filter(None, said))

    def add(self, x: Tensor, actual: Tensor, right: Tensor, chosen: Tensor, truth: Exact) -> None:
        """Add the results of one piece of the inputs, those that are `chosen`: no other changes the row."""
        places = chosen.view(-1).nonzero().view(-1)
        if not places.numel():
            return
        x, actual, right = (t.reshape(-1)[places] for t in (x, actual, right))
        error = ulps(actual, right, actual.dtype, self.scale)
        beyond = error > self.limit
        if bool(beyond.any()):
            excused = self._at_jump(truth, x[beyond].double(), actual[beyond])
            error[beyond] = error[beyond].masked_fill_(excused, 0.0)
            self.at_jumps += int(excused.sum())
            self.beyond += excused.numel() - int(excused.sum())
        self.ordinary_ulp = max(self.ordinary_ulp, error.masked_fill(~(x.abs() <= ORDINARY), 0.0).max().item())
        worst, place = error.max(0)
        if worst.item() > self.max_ulp:
            value = x[place]
            self.max_ulp, self.worst, self.bits = worst.item(), value.item(), bits_text(value)
            self.exact, self.actual = right[place].item(), actual[place].item()

    def _at_jump(self, truth: Exact, x: Tensor, actual: Tensor) -> Tensor:
        """Return where the exact value jumps and the actual value lies between both sides.

        It jumps where it differs as much between very close inputs as between inputs eight times as far apart.
        """
        quantity = QUANTITIES.index(self.quantity)
        low, high, lower, higher = (truth(x * (1 + k * NEAR))[quantity] for k in (-1, 1, -8, 8))
        between = actual.double().clamp(torch.minimum(low, high), torch.maximum(low, high))
        inside = ulps(actual, between, actual.dtype, self.scale) <= self.limit
        return inside & (low != high) & ((high - low).abs() > (higher - lower).abs() / 2)


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
    if wrong := [dtype for dtype in dtypes if dtype not in SWEPT]:
        raise DtypeError(f"{wrong[0]} has too many numbers to try all of them; there are {', '.join(SWEPT)}")
    values = _numbers(chain, numbers or {})
    sweep = Sweep(device, stride, len(chain.calls))
    total, done = sum(sweep.pieces(dtype) for dtype in ("float32", *dtypes)), itertools.count(1)

    def pieces(dtype: str) -> Iterator[Tensor]:
        for x in sweep.inputs(dtype):
            yield x
            progress(next(done), total)

    def operands(dtype: str) -> list[Tensor]:
        """Return each operand as a vector along the columns, like a user's bias."""
        return [torch.full((COLUMNS,), number, dtype=DTYPES[dtype], device=device) for number in values]

    scales, wide = (0.0, 0.0), [t[0].double() for t in operands("float32")]
    for x in pieces("float32"):
        if x[0, 0].abs() <= ORDINARY:  # magnitudes rise from one input to the next
            y, slope = exact(chain, x[x.abs() <= ORDINARY].double(), wide)
            scales = max(scales[0], largest(y)), max(scales[1], largest(slope))
    functions = {"eager": eager(chain)} | {name: partial(chain, backend=name) for name in backends}
    rows = []
    for dtype in dtypes:
        covered: Any = dict(limit=LIMIT[dtype], inputs=sweep.count(dtype), sampled=sweep.stride_of(dtype) > 1)
        found = {name: _rows(chain, dtype, name, scales, **covered) for name in functions}
        vectors = operands(dtype)
        for x in pieces(dtype):
            _add(chain, functions, found, x, vectors)
        for name in backends:
            for row, other in zip(found[name], found["eager"], strict=True):
                row.eager_ulp, row.eager_ordinary_ulp = other.max_ulp, other.ordinary_ulp
                rows.append(row)
    return rows


def _rows(chain: Chain, dtype: str, backend: str, scales: Sequence[float], **covered: Any) -> list[Row]:
    """Return a row for each quantity, to which no result was added."""
    covered["interpreted"] = backend in BACKENDS and BACKENDS[backend].interpreted
    each = zip(QUANTITIES, scales, strict=True)
    return [Row(str(chain), dtype, backend, quantity, scale=scale, **covered) for quantity, scale in each]


def _numbers(chain: Chain, given: Mapping[str, float]) -> list[float]:
    """Return the number of each operand."""
    if wrong := [name for name in given if name not in chain.operands]:
        takes = ", ".join(chain.operands) or "no operand"
        raise OperandError(f"`{chain}` takes {takes}, not {', '.join(wrong)}")
    first = {c.operand: c.stage.number or 0.0 for c in reversed(chain.calls)}
    return [given.get(name, first[name]) for name in chain.operands]


def _add(
    chain: Chain,
    functions: Mapping[str, Callable[..., Tensor]],
    found: Mapping[str, Sequence[Row]],
    x: Tensor,
    operands: Sequence[Tensor],
) -> None:
    """Add what the functions compute from one piece of the inputs to their rows."""
    truth = partial(exact, chain, operands=[t[0].double() for t in operands])
    right, finite = truth(x.double()), x.isfinite()
    unsettled = right[0].isnan() & ~x.isnan(), right[1].isnan() | ~finite
    magnitudes = [measured_at(r, x.dtype, row.scale) for r, row in zip(right, found["eager"], strict=True)]
    for name, function in functions.items():
        y, (slope,) = differentiated(function, (x.detach().requires_grad_(), *operands))
        for row, actual, r, magnitude, left_out in zip(
            found[name], (y, slope), right, magnitudes, unsettled, strict=True
        ):
            if name in BACKENDS and x.dtype in BACKENDS[name].flushed:  # subnormals do not reach its kernels
                left_out = left_out | (x != 0) & (x.abs() < torch.finfo(x.dtype).tiny)
            row.unjudged += int((left_out & finite).sum())
            # The error is counted in ulps only where it may be larger than what the row has seen or allows.
            chosen = may_exceed(actual, r, magnitude, min(row.max_ulp, row.ordinary_ulp, row.limit))
            row.add(x, actual, r, chosen.logical_and_(~left_out), truth)


def planned(chains: Iterable[Chain], dtypes: Iterable[str], device: torch.device) -> list[Planned]:
    """Return a call for each chain and dtype, shaped as those of `verify`, without operands' gradients."""
    calls = []
    for chain, dtype in itertools.product(chains, [d for d in dtypes if d in SWEPT]):
        shape = Sweep(device, 1, len(chain.calls)).shape(dtype)
        x, vector = (torch.empty(s, dtype=DTYPES[dtype], device="meta") for s in (shape, COLUMNS))
        needs = (True, *[False] * len(chain.operands))
        calls.append(Planned(chain, (x, *[vector] * len(chain.operands)), device, needs))
    return calls
