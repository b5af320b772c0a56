"""Measure problem 95, the model that dualop started from: Linear, an added vector, swish, tanh, exact GELU, hardtanh.

The written-out model is compared with dualop.nn.LinearChain with the same weights: on each backend, with product and
chain in one Triton kernel, and as the file that `dualop emit` writes for each backend. Outputs and the gradients of the
input, the weight, the bias and add_value are compared with float64. Then forward and a training step (forward and all
gradients) are timed. A second size, a Linear with few inputs and many outputs, follows, because there the chain takes
as long as the product.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn

import dualop
from dualop import linear as gemm
from dualop.bench import timing
from dualop.bench.measure import Progress, Row, interpreted, with_ratios
from dualop.bench.table import empty
from dualop.bench.workloads import COMPILED, EAGER, FORWARD, without_gradients
from dualop.build.generated import imported
from dualop.emit.file import LANGUAGES, emit
from dualop.nn import LinearChain
from dualop.numerics.cases import DEFAULT_CHAIN, DTYPES

STEP = "training step"
LINEAR = "linear alone"
# Contestants besides the backends: a backend's name, a comma, and the difference.
IN_PRODUCT = f"{gemm.BACKEND}, in the product"
EMITTED = {f"{backend}, emitted": backend for backend in LANGUAGES}

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
        super().__init__(in_features, out_features, DEFAULT_CHAIN, backend=backend.partition(",")[0], **where)

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


@dataclass(frozen=True)
class Contest:
    """Hold models with the same weights by contestant, eager first, their input and the gradient of their output."""

    dtype: str
    size: Size
    models: dict[str, nn.Module]
    x: Tensor
    gy: Tensor


def sizes(device: torch.device) -> tuple[Size, ...]:
    return SMALL_SIZES if device.type == "cpu" else SIZES


def steps(backends: int, compiled: bool, sizes: int = 1) -> int:
    """Return how often `run` calls `progress` for each dtype: the contestants besides the backends do not count."""
    return backends + sizes * 2 * (backends + 2 + compiled)


def run(
    backends: Sequence[str], dtypes: Sequence[str], device: torch.device, compiled: bool, seed: int, progress: Progress
) -> tuple[list[Agreement], list[Row]]:
    """Compare on each backend and dtype, then time; a backend that disagrees is not timed."""
    agreements: list[Agreement] = []
    rows: list[Row] = []
    for dtype in dtypes:
        wrong: set[str] = set()
        for size in sizes(device):
            torch.manual_seed(seed)
            contest = _contest(backends, dtype, size, device)
            if size == sizes(device)[0]:
                agreements += _compared(contest, progress)
                wrong = {a.backend for a in agreements if a.dtype == dtype and not a.ok}
            rows += _timed(contest, compiled, wrong, progress)
            del contest
            gc.collect()
    return agreements, rows


def _contest(backends: Sequence[str], dtype: str, size: Size, device: torch.device) -> Contest:
    batch, ins, outs = size
    where: dict[str, Any] = {"device": device, "dtype": DTYPES[dtype]}
    eager = Model(ins, outs, **where)
    models: dict[str, nn.Module] = {EAGER: eager}
    x, gy = torch.randn(batch, ins, **where), torch.randn(batch, outs, **where)
    for name in (*backends, *([IN_PRODUCT] if gemm.BACKEND in backends else [])):
        ours = Fused(ins, outs, name, **where)
        ours.load_state_dict(eager.state_dict())
        if name != IN_PRODUCT or ours.one_kernel(x):
            models[name] = ours
    if device.type == "cuda":  # an emitted file has no interpreted kernels
        weights = {name.replace("linear.", "matmul."): value for name, value in eager.state_dict().items()}
        for name, backend in EMITTED.items():
            if backend in backends:
                module = imported(emit(model=f"linear:{ins}x{outs}", backend=backend, batch=batch, dtypes=(dtype,)))
                models[name] = module.ModelNew(ins, outs, (outs,)).to(**where)
                models[name].load_state_dict(weights)
    return Contest(dtype, size, models, x, gy)


def _compared(contest: Contest, progress: Progress) -> list[Agreement]:
    dtype, models, x, gy = contest.dtype, contest.models, contest.x, contest.gy
    truth = Model(*contest.size[1:], device=x.device, dtype=torch.float64)
    truth.load_state_dict(models[EAGER].state_dict())  # the rounded weights, upcast exactly
    exact = _results(truth, x.double(), gy.double())
    errors = lambda found: {name: _norms(value.double() - exact[name]) for name, value in found.items()}
    eager, half_ulp = errors(_results(models[EAGER], x, gy)), torch.finfo(DTYPES[dtype]).eps / 2
    agreements: list[Agreement] = []
    for name, model in models.items():
        if name == EAGER:
            continue
        if "," not in name:
            progress(f"{dtype}: comparing {name}")
        # One kernel is for inference, so it has no gradients to compare.
        found = {"y": without_gradients(model, x)} if name == IN_PRODUCT else _results(model, x, gy)
        for quantity, (rms, largest) in errors(found).items():
            (rms_eager, largest_eager), (rms_exact, largest_exact) = eager[quantity], _norms(exact[quantity])
            ok = rms <= RMS_FACTOR * rms_eager + half_ulp * rms_exact
            ok &= largest <= MAX_FACTOR * largest_eager + half_ulp * largest_exact
            figures = (rms, rms_eager, largest, largest_eager)
            agreements.append(Agreement(name, dtype, quantity, *figures, ok, interpreted(name)))
    return agreements


def _timed(contest: Contest, compiled: bool, wrong: Collection[str], progress: Progress) -> list[Row]:
    dtype, models, x = contest.dtype, dict(contest.models), contest.x
    if compiled:
        torch.compiler.reset()
        models[COMPILED] = torch.compile(models[EAGER], dynamic=False)
    models[LINEAR] = contest.models[EAGER].linear
    rows: list[Row] = []
    with timing.on_stream(x.device) as stream:
        for direction in (FORWARD, STEP):
            times: list[Row] = []
            for name, model in models.items():
                if name == IN_PRODUCT and direction == STEP:
                    continue
                row = Row(name, direction, f"linear | {dualop.chain(DEFAULT_CHAIN)}", dtype, list(contest.size))
                row = replace(row, interpreted=interpreted(name))
                if name in wrong:
                    times.append(replace(row, ok=False, note="wrong, see the comparison"))
                    continue
                if "," not in name:
                    progress(f"{dtype} {direction}: {name}")
                step = partial(_step, model, x, contest.gy)
                call = partial(without_gradients, model, x) if direction == FORWARD else step
                times.append(row.timed(timing.timed([call], stream)))
            rows += with_ratios(times)
    return rows


def _step(model: nn.Module, x: Tensor, gy: Tensor) -> tuple[Tensor, ...]:
    """Return the output, and the gradients of the input and of all parameters."""
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    return y, *torch.autograd.grad(y, [leaf, *model.parameters()], gy)


def _results(model: nn.Module, x: Tensor, gy: Tensor) -> dict[str, Tensor]:
    names = ["input", *(name.rpartition(".")[2] for name, _ in model.named_parameters())]
    results = zip(["y", *(f"grad_{name}" for name in names)], _step(model, x, gy), strict=True)
    return {name: tensor.detach() for name, tensor in results}


def _norms(tensor: Tensor) -> tuple[float, float]:
    """Return the root mean square and the largest magnitude, both NaN if a number is."""
    return tensor.square().mean().sqrt().item(), tensor.abs().max().item()


def render(agreements: Sequence[Agreement]) -> Table:
    """Return the table of our error beside eager's, both against float64."""
    words = ("dtype", "backend", "quantity")
    title = "linear95: error against float64, ours / eager's"
    table = empty(title, (*words, "root mean square", "largest", ""), words)
    for a in agreements:
        rms, largest = f"{a.rms:.3g} / {a.rms_eager:.3g}", f"{a.largest:.3g} / {a.largest_eager:.3g}"
        verdict, style = ("ok", None) if a.ok else ("DIFFERS", "red")
        table.add_row(a.dtype, a.backend, a.quantity, rms, largest, verdict, style=style)
    return table
