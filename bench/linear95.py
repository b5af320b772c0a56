"""Measure problem 95, the model that dualop started from: Linear, an added vector, swish, tanh, exact GELU, hardtanh.

The written-out model is compared with dualop.nn.LinearChain with the same weights: on each backend, with product and
chain in one Triton kernel, and as the file that `dualop emit` writes for each backend. Outputs and the gradients of the
input, the weight, the bias and add_value are compared with float64. Then forward and a training step (forward and all
gradients) are timed. A second size, a Linear with few inputs and many outputs, follows, because there the chain takes
as long as the product.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import dualop
from dualop import linear as gemm
from dualop.backends.registry import BACKENDS
from dualop.bench import timing
from dualop.bench.measure import Progress, Row, with_ratios, with_time
from dualop.bench.workloads import COMPILED, EAGER, FORWARD
from dualop.build.generated import imported
from dualop.emit.file import emit
from dualop.nn import LinearChain
from dualop.numerics.cases import DEFAULT_CHAIN, DTYPES

STEP = "training step"
LINEAR = "linear alone"
# Contestants besides the backends: a backend's name, a comma, and the difference.
IN_PRODUCT = "triton, in the product"
EMITTED = {"cuda, emitted": "cuda", "triton, emitted": "triton"}

Size = tuple[int, int, int]  # batch, in_features, out_features
SIZES: tuple[Size, ...] = ((1024, 8192, 8192), (16384, 1024, 8192))
SMALL_SIZES: tuple[Size, ...] = ((8, 64, 64),)  # for the CPU, where kernels run interpreted

# Our error may be this many times that of eager (root mean square, and largest): both have the matrix products' error
# in common, and eager adds one rounding a stage. Float32 sums in another order give a few percent more or less; the
# largest of many errors scatters more. In addition, half an ulp of the result is unavoidable.
RMS_FACTOR, MAX_FACTOR = 1.1, 2.0


class Model(nn.Module):
    """Compute swish, tanh, gelu and hardtanh of `linear(x) + add_value` with torch's functions."""

    def __init__(self, in_features: int, out_features: int, **where: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features, **where)
        self.add_value = nn.Parameter(torch.randn(out_features, **where))

    def forward(self, x: Tensor) -> Tensor:
        z = F.silu(self.linear(x) + self.add_value)
        return F.hardtanh(F.gelu(torch.tanh(z)), -1.0, 1.0)


class Fused(LinearChain):
    """Compute the same with dualop, with product and chain in one kernel or in two."""

    def __init__(self, in_features: int, out_features: int, backend: str, **where: Any) -> None:
        self.switch = "on" if backend == IN_PRODUCT else "off"
        name = "triton" if backend == IN_PRODUCT else backend
        super().__init__(in_features, out_features, DEFAULT_CHAIN, backend=name, **where)

    def forward(self, x: Tensor) -> Tensor:
        with gemm.switched(self.switch):
            return super().forward(x)

    @torch.no_grad()
    def one_kernel(self, x: Tensor) -> bool:
        with gemm.switched(self.switch):
            return not gemm.reasons(x, self.linear.weight, (self.linear.bias, self.add_value), self.backend)


@dataclass(frozen=True)
class Agreement:
    """Hold the error of one result against float64, beside eager's error."""

    backend: str
    dtype: str
    quantity: str  # y, grad_input, grad_weight, grad_bias, grad_add_value
    rms: float
    rms_eager: float
    largest: float
    largest_eager: float
    ok: bool
    interpreted: bool


def sizes(device: torch.device) -> tuple[Size, ...]:
    return SMALL_SIZES if device.type == "cpu" else SIZES


def steps(backends: int, compiled: bool, sizes: int = 1) -> int:
    """Return how often `run` calls `progress` for each dtype."""
    return backends + sizes * 2 * (backends + 2 + compiled)


def run(
    backends: Sequence[str], dtypes: Sequence[str], device: torch.device, compiled: bool, seed: int, progress: Progress
) -> tuple[list[Agreement], list[Row]]:
    """Compare on each backend and dtype, then time; a backend that disagrees is not timed."""
    agreements: list[Agreement] = []
    rows: list[Row] = []
    for dtype in dtypes:
        wrong: set[str] = set()
        for i, size in enumerate(sizes(device)):
            torch.manual_seed(seed)
            models, x, gy = _models(backends, dtype, size, device)
            if i == 0:
                found = _compared(models, dtype, size, x, gy, progress)
                agreements += found
                wrong = {a.backend for a in found if not a.ok}
            rows += _timed(models, dtype, size, x, gy, compiled, wrong, progress)
            del models, x, gy
            gc.collect()
    return agreements, rows


def _models(
    backends: Sequence[str], dtype: str, size: Size, device: torch.device
) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """Return the written-out model and ours with the same weights, x and gy."""
    batch, ins, outs = size
    where: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype]}
    models: dict[str, nn.Module] = {EAGER: Model(ins, outs, **where)}
    x, gy = torch.randn(batch, ins, **where), torch.randn(batch, outs, **where)
    for name in (*backends, *([IN_PRODUCT] if "triton" in backends else [])):
        ours = Fused(ins, outs, name, **where)
        ours.load_state_dict(models[EAGER].state_dict())
        if name != IN_PRODUCT or ours.one_kernel(x):
            models[name] = ours
    if device.type == "cuda":  # an emitted file has no interpreted kernels
        for name, backend in EMITTED.items():
            if backend in backends:
                model = imported(emit(model=f"linear:{ins}x{outs}", backend=backend, batch=batch, dtypes=(dtype,)))
                models[name] = model.ModelNew(ins, outs, (outs,)).to(**where)
                weights = models[EAGER].state_dict()
                models[name].load_state_dict({k.replace("linear.", "matmul."): w for k, w in weights.items()})
    return models, x, gy


def _beside(name: str) -> bool:
    """Return True if this is neither a backend by itself nor torch, so that `steps` does not count it."""
    return "," in name


def _compared(
    models: dict[str, nn.Module], dtype: str, size: Size, x: Tensor, gy: Tensor, progress: Progress
) -> list[Agreement]:
    truth = Model(*size[1:], device=x.device, dtype=torch.float64)
    truth.load_state_dict(models[EAGER].state_dict())  # the rounded weights, upcast exactly
    exact = _results(truth, x.double(), gy.double())
    eager = _errors(_results(models[EAGER], x, gy), exact)
    agreements: list[Agreement] = []
    for name, model in models.items():
        if name != EAGER:
            if not _beside(name):
                progress(f"{dtype}: comparing {name}")
            # One kernel is for inference, so it has no gradients to compare.
            found = {"y": _forward(model, x)} if name == IN_PRODUCT else _results(model, x, gy)
            agreements += _agreements(name, dtype, _errors(found, exact), eager, exact)
    return agreements


def _timed(
    models: dict[str, nn.Module],
    dtype: str,
    size: Size,
    x: Tensor,
    gy: Tensor,
    compiled: bool,
    wrong: set[str],
    progress: Progress,
) -> list[Row]:
    others: dict[str, nn.Module] = {}
    if compiled:
        torch.compiler.reset()
        others[COMPILED] = torch.compile(models[EAGER], dynamic=False)
    others[LINEAR] = models[EAGER].linear
    common = Row("", FORWARD, f"linear | {dualop.chain(DEFAULT_CHAIN)}", dtype, list(size))
    rows: list[Row] = []
    with timing.on_stream(x.device) as stream:
        for direction in (FORWARD, STEP):
            times: list[Row] = []
            for name, model in {**models, **others}.items():
                if name == IN_PRODUCT and direction == STEP:
                    continue
                row = replace(common, backend=name, direction=direction, interpreted=_interpreted(name))
                if name in wrong:
                    times.append(replace(row, ok=False, note="wrong, see the comparison"))
                    continue
                if not _beside(name):
                    progress(f"{dtype} {direction}: {name}")
                call = partial(_forward, model, x) if direction == FORWARD else partial(_step, model, x, gy)
                times.append(with_time(row, timing.timed([call], stream)))
            rows += with_ratios(times)
    return rows


def _interpreted(name: str) -> bool:
    name = name.partition(",")[0]
    return name in BACKENDS and BACKENDS[name].interpreted


@torch.no_grad()
def _forward(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _step(model: nn.Module, x: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    """Run forward, and compute the gradients of the input and of all parameters."""
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(model(leaf), [leaf, *model.parameters()], gy)


def _results(model: nn.Module, x: Tensor, gy: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    names = ["input", *(name.rpartition(".")[2] for name, _ in model.named_parameters())]
    gradients = torch.autograd.grad(y, [leaf, *model.parameters()], gy)
    return {"y": y.detach()} | {f"grad_{n}": g for n, g in zip(names, gradients, strict=True)}


Errors = dict[str, tuple[float, float]]


def _errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> Errors:
    """Return the root mean square and the largest error of each quantity; NaN counts as infinite."""
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
            Agreement(backend, dtype, name, rms, eager[name][0], largest, eager[name][1], ok, _interpreted(backend))
        )
    return agreements


def render(agreements: Sequence[Agreement]) -> Table:
    """Return the table of our error beside eager's, both against float64."""
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
