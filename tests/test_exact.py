"""The float64 truth against a hundred digits: what its formulas lose must not count in ulps of float32."""

from __future__ import annotations

import pytest
import torch

import dualop
from dualop.language.stages import STAGES
from dualop.numerics.cases import DEFAULT_CHAIN
from dualop.numerics.truth import exact

mpmath = pytest.importorskip("mpmath")  # torch brings it along
mp = mpmath.mp
DIGITS = 100

SIZES = (
    1e-30,
    1e-8,
    3e-4,
    0.003,
    0.1,
    0.3,
    0.7,
    1.28,
    2.1,
    2.9,
    4.0,
    5.5,
    7.9,
    10.3,
    13.1,
    19.5,
    30.0,
    61.7,
    88.0,
    100.0,
)
SELU = [mp.mpf(text) for text in ("1.0507009873554804934193349852946", "1.6732632423543772848170429916717")]


def sigmoid(z):
    return 1 / (1 + mp.exp(-z))


def softplus(z):
    return mp.log1p(mp.exp(z)) if z <= 20 else z


def elu(z, alpha=1):
    return z if z > 0 else alpha * mp.expm1(z)


def gelu(z):
    return z * mp.erfc(-z / mp.sqrt(2)) / 2


DEFINED = {
    "hardsigmoid": lambda z: min(max(z + 3, mp.mpf(0)), mp.mpf(6)) / 6,
    "hardswish": lambda z: z * min(max(z + 3, mp.mpf(0)), mp.mpf(6)) / 6,
    "leaky_relu": lambda z: z if z > 0 else z * mp.mpf(0.01),
    "elu": elu,
    "selu": lambda z: SELU[0] * elu(z, SELU[1]),
    "celu(1.5)": lambda z: z if z > 0 else mp.mpf(1.5) * mp.expm1(z / mp.mpf(1.5)),
    "sigmoid": sigmoid,
    "silu": lambda z: z * sigmoid(z),
    "tanh": mp.tanh,
    "tanhshrink": lambda z: z - mp.tanh(z),
    "softplus": softplus,
    "logsigmoid": lambda z: -mp.log1p(mp.exp(-z)),
    "mish": lambda z: z * mp.tanh(mp.log1p(mp.exp(z))),
    "softsign": lambda z: z / (1 + abs(z)),
    "gelu": gelu,
    'gelu(approximate="tanh")': lambda z: z / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (z + mp.mpf(0.044715) * z**3))),
    "square": lambda z: z * z,
    "abs | sqrt": lambda z: mp.sqrt(abs(z)),
    "reciprocal": lambda z: 1 / z,
    "exp": mp.exp,
    DEFAULT_CHAIN.removeprefix("add | "): lambda z: gelu(mp.tanh(z * sigmoid(z))),
    "softplus | tanh": lambda z: mp.tanh(softplus(z)),
}
# Those whose torch function bears mpmath's name need no line of their own.
DEFINED |= {
    stage.example: getattr(mp, stage.name)
    for stage in STAGES.values()
    if stage.example == stage.name not in DEFINED and callable(getattr(mp, stage.name, None))
}
# Those that only choose, or add, or multiply once: float64 has nothing to lose there.
PLAIN = ("clamp", "relu", "hardtanh", "relu6", "threshold", "hardshrink", "softshrink", "abs", "neg")


def test_every_stage_is_defined_here():
    named = {call.stage.name for text in DEFINED for call in dualop.chain(text).calls}
    assert named | set(PLAIN) >= {name for name, stage in STAGES.items() if not stage.operand}


@pytest.mark.parametrize("text", DEFINED)
def test_float64_is_as_good_as_exact(text):
    check(text, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("text", DEFINED)
def test_float64_of_a_gpu_is_as_good(text):
    """The GPU's functions are others, and have other constants in float32."""
    check(text, "cuda")


def check(text, device):
    points = [sign * size for size in SIZES for sign in (1, -1)]
    with mp.workdps(DIGITS):
        right = [DEFINED[text](mp.mpf(p)) for p in points]
        # Small steps: a derivative must not reach over a kink, nor end in the digits that cancel.
        slopes = [mp.diff(DEFINED[text], mp.mpf(p), h=mp.mpf(p) * mp.mpf(10) ** -40) for p in points]
    x = torch.tensor(points, dtype=torch.float64, device=device)
    for got, want in zip(exact(dualop.chain(text), x, ()), (right, slopes)):
        value = torch.tensor([float(v) for v in want], dtype=torch.float64)
        error = torch.tensor([float(abs(mp.mpf(g) - v)) for g, v in zip(got.tolist(), want)], dtype=torch.float64)
        assert (float32_ulps(error, value, value.abs().max().item()) < 1e-3).all()


def float32_ulps(error, value, scale):
    """As `dualop verify` counts; none where float32 overflows."""
    largest = torch.finfo(torch.float32).max
    magnitude = value.abs().clamp(min=min(scale, largest) / 1024, max=largest)
    return torch.where(value.abs() > largest, 0.0, error / torch.exp2(torch.floor(torch.log2(magnitude)) - 23))


def test_it_can_tell():
    one = torch.ones(1, dtype=torch.float64)
    assert float32_ulps(torch.full((1,), 2.0**-23), one, 1.0).item() == 1.0
    # Why a formula of torch's own would not do: a hundredth of a float32 ulp and more.
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.nn.functional.hardsigmoid(x), x)
    assert float32_ulps((slope - 1 / 6).abs(), slope, 1 / 6).item() > 1e-2


def test_an_operand_is_a_number_and_x_may_be_one(rng):
    x = torch.randn(50, dtype=torch.float64, generator=rng)
    two = torch.tensor(2.0, dtype=torch.float64)
    y, slope = exact(dualop.chain("mul(scale) | add(x)"), x, (two,))
    torch.testing.assert_close(y, 3 * x)
    torch.testing.assert_close(slope, torch.full_like(x, 3.0))
