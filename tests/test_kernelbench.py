"""The pointwise chains of KernelBench, each beside the model written out by hand as its users write it.

Levels 1 and 2 of KernelBench, numbered as there; what it lacks of stages and forms of operands stands at the end. Both
backends, float32 and bfloat16, the result and every gradient. The written-out model on a float64 copy is the truth; in
the tensors' own dtype it says which dtype, shape and strides are due, and how far PyTorch itself is off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import HAS_GPU, INTERPRETED
from torch import Tensor

import dualop
from dualop.backends.reference import evaluate
from dualop.language.stages import STAGES
from dualop.numerics.check import poisoned
from dualop.numerics.ulp import spacing

pytestmark = [pytest.mark.gpu] if HAS_GPU and not INTERPRETED else []
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What a Linear, a Conv2d and a Conv3d leave behind, small: the columns of the first and the last are whole vectors.
GEMM, CONV2D, CONV3D = (12, 40), (2, 6, 3, 5), (2, 3, 2, 3, 4)
FEATURE, CHANNEL, CHANNEL3D, ROW, ONE, SCALAR = (40,), (6, 1, 1), (3, 1, 1, 1), (12, 1), (1,), ()


@dataclass(frozen=True)
class Problem:
    """A chain, its model written out on (x, *operands), x's shape and the operands' shapes."""

    name: str
    chain: str
    model: Callable[..., Tensor]
    shape: tuple[int, ...]
    operands: tuple[tuple[int, ...], ...] = ()


def new_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * (x + 0.044715 * torch.pow(x, 3.0))))


def low(x: Tensor, c: float) -> Tensor:
    return torch.min(x, torch.tensor(c, dtype=x.dtype))


p = Problem
PROBLEMS = (
    p("1.25 Swish", "sigmoid | mul(x)", lambda x: x * torch.sigmoid(x), GEMM),
    p("1.27 SELU", "selu", torch.selu, GEMM),
    p("1.28 HardSigmoid", "hardsigmoid", F.hardsigmoid, GEMM),
    p("1.30 Softsign", "softsign", lambda x: x / (1 + torch.abs(x)), GEMM),
    p("1.31 ELU", "elu(1.0)", lambda x: F.elu(x, alpha=1.0), GEMM),
    p("1.88 MinGPTNewGelu", 'gelu(approximate="tanh")', new_gelu, GEMM),
    p(
        "2.2 bias, clamp, scale, clamp, divide",
        "add(bias) | clamp(0, 1) | mul(2) | clamp(0, 1) | div(2)",
        lambda x, bias: torch.clamp(torch.clamp(x + bias, min=0.0, max=1.0) * 2.0, min=0.0, max=1.0) / 2.0,
        CONV2D,
        (CHANNEL,),
    ),
    p("2.5 subtract, tanh", "sub(bias) | tanh", lambda x, bias: torch.tanh(x - bias), CONV2D, (CHANNEL,)),
    p(
        "2.7 ReLU, LeakyReLU, GELU, sigmoid, bias",
        "relu | leaky_relu(0.01) | gelu | sigmoid | add(bias)",
        lambda x, bias: torch.sigmoid(F.gelu(F.leaky_relu(torch.relu(x), negative_slope=0.01))) + bias,
        CONV3D,
        (CHANNEL3D,),
    ),
    p("2.9 subtract, multiply, ReLU", "sub(2) | mul(1.5) | relu", lambda x: torch.relu((x - 2.0) * 1.5), GEMM),
    p(
        "2.16 Mish, add, Hardtanh, scale",
        "mish | add(0.5) | hardtanh(-1, 1) | mul(2)",
        lambda x: F.hardtanh(F.mish(x) + 0.5, min_val=-1, max_val=1) * 2,
        CONV2D,
    ),
    p(
        "2.20 sum, residual, multiply, residual",
        "add(bias) | add(x) | mul(x) | add(x)",
        lambda x, bias: ((x + bias) + x) * x + x,
        CONV3D,
        (CHANNEL3D,),
    ),
    p(
        "2.21 bias, scale, sigmoid",
        "add(bias) | mul(scale) | sigmoid",
        lambda x, bias, scale: torch.sigmoid((x + bias) * scale),
        CONV2D,
        (CHANNEL, CHANNEL),
    ),
    p("2.22 x * mish(x)", "mish | mul(x)", lambda x: x * F.mish(x), GEMM),
    p("2.26 x * hardswish(x)", "hardswish | mul(x)", lambda x: x * F.hardswish(x), CONV3D),
    p(
        "2.31 min, bias, scale",
        "minimum(0.5) | add(bias) | mul(2)",
        lambda x, bias: (low(x, 0.5) + bias) * 2.0,
        CONV2D,
        (CHANNEL,),
    ),
    p("2.37 Swish, sum", "swish | add(bias)", lambda x, bias: torch.sigmoid(x) * x + bias, GEMM, (FEATURE,)),
    p(
        "2.48 scale, tanh, multiply, sigmoid",
        "mul(scale) | tanh | mul(bias) | sigmoid",
        lambda x, scale, bias: torch.sigmoid(torch.tanh(x * scale) * bias),
        CONV3D,
        (CHANNEL3D, CHANNEL3D),
    ),
    p(
        "2.50 scale, bias, scale",
        "mul(scale1) | add(bias) | mul(scale2)",
        lambda x, scale1, bias, scale2: (x * scale1 + bias) * scale2,
        CONV3D,
        (SCALAR, CHANNEL3D, SCALAR),
    ),
    p("2.52 tanh(softplus(x)) * x", "softplus | tanh | mul(x)", lambda x: torch.tanh(F.softplus(x)) * x, CONV2D),
    p(
        "2.53 scale, Hardtanh, GELU",
        "mul(0.5) | hardtanh(-2, 2) | gelu",
        lambda x: F.gelu(F.hardtanh(x * 0.5, min_val=-2, max_val=2)),
        GEMM,
    ),
    p(
        "2.57 ReLU, HardSwish with clamp's kinks",
        "relu | add(3) | div(6) | clamp(0, 1) | mul(x) | relu",
        lambda x: torch.relu(x) * torch.clamp((torch.relu(x) + 3) / 6, 0, 1),
        CONV2D,
    ),
    p(
        "2.58 x * sigmoid(x + 3) / 6, subtract, clamp",
        "add(3) | sigmoid | mul(x) | div(6) | sub(bias) | clamp(-1, 1)",
        lambda x, bias: torch.clamp(x * torch.sigmoid(x + 3) / 6 - bias, min=-1, max=1),
        CONV3D,
        ((1, 1, 1, 1),),
    ),
    p(
        "2.68 min, subtract: one scalar twice",
        "minimum(constant) | sub(constant)",
        lambda x, constant: torch.min(x, constant) - constant,
        GEMM,
        (SCALAR,),
    ),
    p("2.70 sigmoid, scale, residual", "sigmoid | mul(2) | add(x)", lambda x: torch.sigmoid(x) * 2.0 + x, GEMM),
    p(
        "2.74 LeakyReLU, multiply, LeakyReLU",
        "leaky_relu(0.2) | mul(multiplier) | leaky_relu(0.2)",
        lambda x, multiplier: F.leaky_relu(F.leaky_relu(x, 0.2) * multiplier, 0.2),
        CONV3D,
        (CHANNEL3D,),
    ),
    p("2.82 tanh, scale, bias", "tanh | mul(2) | add(bias)", lambda x, b: torch.tanh(x) * 2.0 + b, CONV2D, (CHANNEL,)),
    p(
        "2.88 Swish, multiply, Swish",
        "swish | mul(weight) | swish",
        lambda x, weight: F.silu(F.silu(x) * weight),
        GEMM,
        (FEATURE,),
    ),
    p(
        "2.90 LeakyReLU, sum, clamp, GELU",
        "leaky_relu(0.2) | add(sum) | clamp(-1, 1) | gelu",
        lambda x, added: F.gelu(torch.clamp(F.leaky_relu(x, negative_slope=0.2) + added, min=-1.0, max=1.0)),
        CONV3D,
        (CHANNEL3D,),
    ),
    p(
        "2.93 add, min, GELU, multiply",
        "add(0.5) | minimum(0.0) | gelu | mul(2)",
        lambda x: F.gelu(low(x + 0.5, 0.0)) * 2.0,
        CONV2D,
    ),
    p(
        "2.95 add, Swish, tanh, GELU, Hardtanh",
        "add | swish | tanh | gelu | hardtanh(-1, 1)",
        lambda x, add: F.hardtanh(F.gelu(torch.tanh(torch.sigmoid(x + add) * (x + add))), min_val=-1, max_val=1),
        GEMM,
        (FEATURE,),
    ),
    p(
        "2.97 bias, divide, Swish",
        "add(bias) | div(2) | swish",
        lambda x, bias: (x + bias) / 2.0 * torch.sigmoid((x + bias) / 2.0),
        GEMM,
        (ONE,),
    ),
    p("2.100 clamp, divide", "clamp(min=-1) | div(2)", lambda x: torch.clamp(x, min=-1.0) / 2.0, CONV3D),
    # What KernelBench has no problem for.
    p("of a row", "sub(mean) | div(scale)", lambda x, mean, scale: (x - mean) / scale, GEMM, (ROW, ROW)),
    p(
        "row, feature and scalar",
        "add(row) | mul(feature) | maximum(scalar)",
        lambda x, row, feature, scalar: torch.maximum((x + row) * feature, scalar),
        GEMM,
        (ROW, FEATURE, SCALAR),
    ),
    p(
        "ties with tensors and with itself",
        "minimum(high) | maximum(low) | minimum(x)",
        lambda x, high, low: torch.minimum(torch.maximum(torch.minimum(x, high), low), x),
        GEMM,
        (FEATURE, GEMM),
    ),
    p(
        "one operand three times",
        "mul(w) | rsub(w) | relu6 | add(w)",
        lambda x, w: F.relu6(w - x * w) + w,
        CONV2D,
        (CHANNEL,),
    ),
    p(
        "shrinks and threshold",
        "hardshrink | softshrink(0.25) | threshold(-1, 0.5) | neg",
        lambda x: -F.threshold(F.softshrink(F.hardshrink(x), 0.25), -1, 0.5),
        GEMM,
    ),
    p(
        "smooth ones that it lacks",
        "celu(1.5) | tanhshrink | logsigmoid | exp",
        lambda x: torch.exp(F.logsigmoid(F.tanhshrink(F.celu(x, 1.5)))),
        GEMM,
    ),
    p("square root", "square | add(1) | sqrt | reciprocal", lambda x: 1 / torch.sqrt(x**2 + 1), GEMM),
    p("absolute value", "abs | div(scale)", lambda x, scale: x.abs() / scale, CONV2D, (CONV2D,)),
)
# A stage that none of those has, such as sin, by itself.
_HAVE = {call.stage.name for problem in PROBLEMS for call in dualop.chain(problem.chain).calls}
PROBLEMS += tuple(
    p(f"none {stage.name}", stage.example, partial(evaluate, dualop.chain(stage.example), operands=()), GEMM)
    for stage in STAGES.values()
    if stage.name not in _HAVE
)

# Errors that are allowed: in float32 roundings of a term, and in ulps of a bfloat16 result.
FLOAT32_ROUNDINGS = 8.0
BFLOAT16_ULPS = 0.51


def inputs(problem: Problem, dtype: torch.dtype, rng: torch.Generator) -> list[Tensor]:
    """(gy, x, *operands). Every second number is a multiple of 1/4: ties and bounds are met, and met exactly."""

    def values(shape: tuple[int, ...]) -> Tensor:
        drawn = 2 * torch.randn(shape, generator=rng, dtype=torch.float64)
        if drawn.numel() == 1:
            return drawn / 8  # one number for all must not push everything beyond a bound
        drawn.view(-1)[::2] = (drawn.view(-1)[::2] * 4).round() / 4
        return drawn

    gy, x, *operands = (values(shape) for shape in (problem.shape, problem.shape, *problem.operands))
    operands = [torch.where(t < 0, t / 2 - 0.25, t / 2 + 0.25) for t in operands]  # no divisor near zero
    return [t.to(dtype) for t in (gy, x, *operands)]


def forward_and_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    gy, *inputs = tensors
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, gy)]


def allowed(exact: Tensor, terms: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a result may be off that is the sum of `terms` (float64): each may be as wrong as the largest."""
    of_term = FLOAT32_ROUNDINGS * torch.finfo(torch.float32).eps
    if dtype == torch.bfloat16:  # polynomials good to 2^-19; tanh.approx to 2^-11 on a GPU, and exact on the host
        of_term = 2.0**-10 if terms.is_cuda else 2.0**-18
    error = of_term * (terms.abs() + terms.abs().max()).sum_to_size(exact.shape)
    return error + BFLOAT16_ULPS * spacing(exact.abs(), dtype) if dtype == torch.bfloat16 else error


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter divides where a tile has no elements, too
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_forward_and_gradients(problem: Problem, dtype: str, backend: str, device, rng) -> None:
    tensors = [t.to(device) for t in inputs(problem, DTYPES[dtype], rng)]
    op = dualop.chain(problem.chain)
    assert len(op.operands) == len(problem.operands)
    whole = [t.double().expand(problem.shape) for t in tensors]
    exact = forward_and_gradients(problem.model, whole)
    eager = forward_and_gradients(problem.model, tensors)
    with poisoned():
        found = forward_and_gradients(lambda *inputs: op(*inputs, backend=backend), tensors)
        again = forward_and_gradients(lambda *inputs: op(*inputs, backend=backend), tensors)
    for name, ours, second, theirs, terms in zip(("y", "x", *op.operands), found, again, eager, exact):
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride()), name
        assert torch.equal(ours, second), f"{name} differs from run to run"
        assert terms.any(), f"{name} is zero everywhere: this says nothing"
        value = terms.sum_to_size(ours.shape)
        limit = allowed(value, terms, ours.dtype)
        error = (ours.double() - value).abs()
        of_torch = (theirs.double() - value).abs()
        assert (error <= limit).all(), f"{name}: {error.max()} off, of {limit.max()} allowed; torch {of_torch.max()}"


def test_every_stage_is_in_some_problem_and_there_are_enough() -> None:
    chains = [dualop.chain(problem.chain) for problem in PROBLEMS]
    assert len(set(chains)) >= 40
    missing = STAGES.keys() - {call.stage.name for chain in chains for call in chain.calls}
    assert not missing


def test_every_form_of_operand_is_in_some_problem() -> None:
    forms = {form for problem in PROBLEMS for form in problem.operands}
    assert {FEATURE, CHANNEL, CHANNEL3D, (1, 1, 1, 1), ROW, ONE, SCALAR, GEMM, CONV2D} <= forms
    assert any(call.operand == "x" for problem in PROBLEMS for call in dualop.chain(problem.chain).calls)
