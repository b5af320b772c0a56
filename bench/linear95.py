"""The model that dualop was born from: Linear, an added vector, swish, tanh, exact GELU, hardtanh.

The written-out model and the same weights with the fused chain behind the Linear, on each backend: outputs and the
gradients of the input, the weight, the bias and add_value are compared with float64, then forward and a training step
(forward and all gradients) are timed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import dualop
from dualop.bench import timing
from dualop.bench.measure import Progress, Row, with_ratios, with_time
from dualop.bench.workloads import COMPILED, EAGER, FORWARD
from dualop.cases import DEFAULT_CHAIN, DTYPES
from dualop.registry import BACKENDS

STEP = "training step"
LINEAR = "linear alone"
BATCH, FEATURES = 1024, 8192
SMALL_BATCH, SMALL_FEATURES = 8, 64  # on the CPU, where kernels run interpreted

# Our error may be this many times that of eager (root mean square, and largest): both have the matrix products' error
# in common, and eager adds one rounding a stage. Float32 sums in another order give a few percent more or less; the
# largest of many errors scatters more. Besides, half an ulp of the result is nobody's fault.
RMS_FACTOR, MAX_FACTOR = 1.1, 2.0


class Model(nn.Module):
    """swish, tanh, gelu and hardtanh of `linear(x) + add_value`, by torch's functions or by `fused(z, add_value)`."""

    def __init__(self, features: int, fused: Callable[..., Tensor] | None = None, **where: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(features, features, **where)
        self.add_value = nn.Parameter(torch.randn(features, **where))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        if self.fused is not None:
            return self.fused(z, self.add_value)
        z = F.silu(z + self.add_value)
        return F.hardtanh(F.gelu(torch.tanh(z)), -1.0, 1.0)


@dataclass(frozen=True)
class Agreement:
    """The error of one result against float64, beside that of eager."""

    backend: str
    dtype: str
    quantity: str  # y, grad_input, grad_weight, grad_bias, grad_add_value
    rms: float
    rms_eager: float
    largest: float
    largest_eager: float
    ok: bool
    interpreted: bool


def steps(backends: int, compiled: bool) -> int:
    """How often `run` calls `progress` for each dtype."""
    return backends + 2 * (backends + 2 + compiled)


def run(
    backends: Sequence[str], dtypes: Sequence[str], device: torch.device, compiled: bool, seed: int, progress: Progress
) -> tuple[list[Agreement], list[Row]]:
    """Compare, then time, on each backend and dtype; a backend that disagrees is not timed."""
    agreements: list[Agreement] = []
    rows: list[Row] = []
    for dtype in dtypes:
        found, timed = _run(backends, dtype, device, compiled, seed, progress)
        agreements += found
        rows += timed
    return agreements, rows


def _run(
    backends: Sequence[str], dtype: str, device: torch.device, compiled: bool, seed: int, progress: Progress
) -> tuple[list[Agreement], list[Row]]:
    small = device.type == "cpu"
    batch, features = (SMALL_BATCH, SMALL_FEATURES) if small else (BATCH, FEATURES)
    torch.manual_seed(seed)
    where: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype]}
    written_out = Model(features, **where)
    op = dualop.chain(DEFAULT_CHAIN)
    models: dict[str, nn.Module] = {EAGER: written_out}
    for name in backends:
        models[name] = Model(features, partial(op, backend=name), **where)
        models[name].load_state_dict(written_out.state_dict())
    x, gy = torch.randn(batch, features, **where), torch.randn(batch, features, **where)

    truth = Model(features, device=device, dtype=torch.float64)
    truth.load_state_dict(written_out.state_dict())  # the rounded weights, upcast exactly
    exact = _results(truth, x.double(), gy.double())
    del truth
    agreements: list[Agreement] = []
    eager = _errors(_results(written_out, x, gy), exact)
    for name in backends:
        progress(f"{dtype}: comparing {name}")
        agreements += _agreements(name, dtype, _errors(_results(models[name], x, gy), exact), eager, exact)
    del exact
    gc.collect()

    wrong = {a.backend for a in agreements if not a.ok}
    if compiled:
        torch._dynamo.reset()
        models[COMPILED] = torch.compile(written_out, dynamic=False)
    models[LINEAR] = written_out.linear
    common = Row("", FORWARD, f"linear | {op}", dtype, [batch, features])
    rows: list[Row] = []
    with timing.on_stream(device) as stream:
        for direction in (FORWARD, STEP):
            times: list[Row] = []
            for name, model in models.items():
                row = replace(common, backend=name, direction=direction)
                row = replace(row, interpreted=name in BACKENDS and BACKENDS[name].interpreted)
                if name in wrong:
                    times.append(replace(row, ok=False, note="wrong, see the comparison"))
                    continue
                progress(f"{dtype} {direction}: {name}")
                call = partial(_forward, model, x) if direction == FORWARD else partial(_step, model, x, gy)
                times.append(with_time(row, timing.timed([call], stream)))
            rows += with_ratios(times)
    return agreements, rows


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _step(model: nn.Module, x: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    """Forward and the gradients of the input and all parameters."""
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(model(leaf), [leaf, *model.parameters()], gy)


def _results(model: nn.Module, x: Tensor, gy: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    names = ["input", *(name.removeprefix("linear.") for name, _ in model.named_parameters())]
    gradients = torch.autograd.grad(y, [leaf, *model.parameters()], gy)
    return {"y": y.detach()} | {f"grad_{n}": g for n, g in zip(names, gradients, strict=True)}


Errors = dict[str, tuple[float, float]]


def _errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> Errors:
    """Root mean square and largest error of each quantity; NaN counts as infinite."""
    errors: Errors = {}
    for name, value in found.items():
        error = (value.double() - exact[name]).abs_().nan_to_num_(nan=torch.inf)
        errors[name] = error.square().mean().sqrt().item(), error.max().item()
    return errors


def _agreements(backend: str, dtype: str, errors: Errors, eager: Errors, exact: dict[str, Tensor]) -> list[Agreement]:
    half_ulp = torch.finfo(DTYPES[dtype]).eps / 2
    agreements = []
    for name, (rms, largest) in errors.items():
        size = exact[name].abs()
        ok = (
            rms <= RMS_FACTOR * eager[name][0] + half_ulp * size.square().mean().sqrt().item()
            and largest <= MAX_FACTOR * eager[name][1] + half_ulp * size.max().item()
        )
        agreements.append(
            Agreement(
                backend, dtype, name, rms, eager[name][0], largest, eager[name][1], ok, BACKENDS[backend].interpreted
            )
        )
    return agreements


def render(agreements: Sequence[Agreement]) -> Table:
    """Ours beside eager's error, both against float64."""
    table = Table(title="linear95: error against float64, ours / eager's", title_justify="left")
    for column in ("dtype", "backend", "quantity"):
        table.add_column(column, no_wrap=True)
    for column in ("root mean square", "largest", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for a in agreements:
        table.add_row(
            a.dtype, a.backend, a.quantity, f"{a.rms:.3g} / {a.rms_eager:.3g}",
            f"{a.largest:.3g} / {a.largest_eager:.3g}", "ok" if a.ok else "DIFFERS", style=None if a.ok else "red",
        )  # fmt: skip
    return table
