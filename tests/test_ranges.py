"""Intervals contain what they claim, and what is left out or replaced because of them changes nothing."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from named import parse
from torch import Tensor

import dualop
from dualop.backends.reference import evaluate
from dualop.language.program import EVERYTHING, Interval, Step, output, steps
from dualop.language.stages import STAGES

CALLS = [call for stage in STAGES.values() if not stage.operand for call in dualop.chain(stage.example).calls]
CALLS += dualop.chain('gelu(approximate="tanh") | clamp(max=0.25) | hardtanh(-0.1, 0.3) | softplus(2, 5)').calls
ENDS = (-math.inf, -30.0, -3.0, -1.0, -0.3, 0.0, 0.2, 1.0, 2.5, 30.0, math.inf)
INTERVALS = [(low, high) for low, high in itertools.combinations(ENDS, 2)]


def inside(interval: Interval) -> Tensor:
    """Numbers in the interval, dense and far out."""
    low, high = max(interval[0], -1e4), min(interval[1], 1e4)
    return torch.cat([torch.linspace(low, high, 2001), torch.linspace(max(low, -8), min(high, 8), 2001)]).double()


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_an_output_lies_in_its_interval(call) -> None:
    for interval in INTERVALS:
        z = inside(interval)
        y = call.stage.reference(z[(z >= interval[0]) & (z <= interval[1])], *call.arguments)
        low, high = output(call, interval)
        if y.isnan().all():
            continue
        assert low - 1e-9 <= y[~y.isnan()].min() and y[~y.isnan()].max() <= high + 1e-9, interval


def test_the_default_chain_loses_its_clamp_and_takes_the_polynomial() -> None:
    chain = dualop.chain("add | swish | tanh | gelu | hardtanh(-1, 1)")
    assert [step.function for step in steps(chain)] == ["add", "silu_tanh_approx", "gelu_upper"]


@pytest.mark.parametrize(
    ("text", "functions"),
    [
        ("hardtanh(-1, 1)", ["hardtanh"]),
        ("tanh | hardtanh(-1, 1)", ["tanh_approx", "hardtanh"]),  # tanh reaches 1, where hardtanh's gradient is 0
        ("tanh | hardtanh(-2, 2)", ["tanh_approx"]),
        ("tanh | mul(scale) | hardtanh(-2, 2)", ["tanh", "mul", "hardtanh"]),
        ("silu | tanh | gelu | hardtanh(-0.1, 0.3)", ["silu_tanh_approx", "gelu_upper", "hardtanh"]),
        ("sigmoid | gelu | relu6", ["sigmoid", "gelu_upper", "relu6"]),
        ("tanh | add(3) | relu | clamp(max=9)", ["tanh", "add", "relu", "clamp"]),
        ("relu6 | hardtanh(-1, 7)", ["relu6"]),
        ("gelu | hardtanh(-1, inf)", ["gelu"]),
        ("relu6 | clamp(-1, 7)", ["relu6", "clamp"]),  # clamp has a gradient of its own at NaN
        ("silu | gelu", ["silu", "gelu"]),
        ("mish | mish", ["mish", "mish_upper"]),
        ("silu | mish | relu | mish", ["silu", "mish_upper", "relu", "mish_upper"]),
        ("sub(0.31) | mish", ["sub", "mish"]),
        ("slope of relu | mish", ["relu", "mish_upper"]),
        ("tanh | gelu", ["tanh_approx", "gelu_unit"]),
        ("silu | tanh | sub(1)", ["silu_tanh", "sub"]),
        ("slope of silu | tanh | gelu", ["silu", "tanh_approx", "gelu_upper"]),  # whose stages have second derivatives
        ("tanh | sub(1)", ["tanh", "sub"]),  # a difference, which shows the error of an approximation
        ("tanh | square", ["tanh", "square"]),  # whose slope at 0 is 0
        ('tanh | gelu(approximate="tanh")', ["tanh_approx", "gelu_tanh"]),
    ],
)
def test_what_the_kernels_run(text: str, functions: list[str]) -> None:
    assert [step.function for step in steps(parse(text))] == functions


def test_an_operand_step_names_its_input() -> None:
    chain = dualop.chain("mul(b) | add(a) | mul(b) | add(x) | sub(2)")
    taken = [Step("mul", (), 1), Step("add", (), 2), Step("mul", (), 1), Step("add", (), 0), Step("sub", (), 2.0)]
    assert list(steps(chain)) == taken


@pytest.mark.parametrize(
    "text", ["relu6 | hardtanh(-1, 7)", "silu | tanh | gelu | hardtanh(-1, 1)", "sigmoid | gelu", "mish | mish"]
)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_shorter_chain_has_the_values_and_gradients_of_the_whole(text: str, backend: str, device) -> None:
    chain = dualop.chain(text)
    z = torch.cat([inside(EVERYTHING), torch.tensor([math.nan])])
    x, exact = z.float().to(device).requires_grad_(), z.float().double().requires_grad_()
    y, truth = chain(x, backend=backend), evaluate(chain, exact, [])
    (gradient,) = torch.autograd.grad(y.sum(), x)
    (true_gradient,) = torch.autograd.grad(truth.sum(), exact)
    torch.testing.assert_close(y.cpu().double(), truth, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(gradient.cpu().double(), true_gradient, rtol=1e-5, atol=1e-6, equal_nan=True)
