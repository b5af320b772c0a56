"""The slope of a chain: what its backward computes, gy f'(x), as a chain of its own with x and gy as inputs.

Its backward is the double backward of the chain: of v, the gradient of gy f'(x), it makes v gy f''(x) and v f'(x). So a
second derivative is one more call of the op `dualop::backward`, with all that this op can do, and one more kernel.

Only chains of one variable have one: no tensor operands, and x not an operand. A slope has no slope again: further
derivatives are torch's, of the formulas below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dualop import chains
from dualop.chains import Chain
from dualop.stages import Call

MARK = "slope of "  # in front of a chain's text; no chain's text begins so


class Slope(Chain):
    """gy f'(x) for the chain f. It has f's calls and the operand gy, and is run backward only."""

    def __init__(self, of: Chain) -> None:
        super().__init__(of.calls)
        object.__setattr__(self, "operands", ("gy",))
        object.__setattr__(self, "text", MARK + of.text)


@lru_cache(maxsize=4096)
def parse(text: str) -> Chain:
    """The chain that an op's text names, which may be a slope. The same text gives the same object."""
    return Slope(chains.parse(text.removeprefix(MARK))) if text.startswith(MARK) else chains.parse(text)


@lru_cache(maxsize=4096)
def slope(text: str) -> str | None:
    """The text of the slope of a chain, None if it has none."""
    chain = parse(text)
    several = any(isinstance(call.operand, str) for call in chain.calls)
    return None if several or isinstance(chain, Slope) else MARK + chain.text


# ---- second derivatives of the stages --------------------------------------------------------------------------------


def _bump(z: Tensor) -> Tensor:
    """The derivative of sigmoid, without the cancellation of 1 - sigmoid(z)."""
    return torch.sigmoid(z) * torch.sigmoid(-z)


def _bump_slope(z: Tensor) -> Tensor:
    return -_bump(z) * torch.tanh(z / 2)


def _exp_below_zero(z: Tensor, scale: float, inverse: float = 1.0) -> Tensor:
    """Zero from 0 on, as torch has it; clamped, for the exponential that is not taken must not overflow."""
    return torch.where(z < 0, scale * (z.clamp(max=0) * inverse).exp(), 0.0)


def _tanh(z: Tensor) -> Tensor:
    return -8 * torch.tanh(z) * _bump(2 * z)


def _mish(z: Tensor) -> Tensor:
    s, p = torch.sigmoid(z), torch.nn.functional.softplus(z)
    return 4 * _bump(2 * p) * s * (2 + z * (torch.sigmoid(-z) - 2 * torch.tanh(p) * s))


def _gelu(z: Tensor) -> Tensor:
    near = z.clamp(-40, 40)  # behind that it is 0, and z^2 may overflow
    return (-0.5 * near * near).exp() * (2 - near * near) / math.sqrt(2 * math.pi)


def _gelu_tanh(z: Tensor) -> Tensor:
    near, scale, cubic = z.clamp(-20, 20), 2 * math.sqrt(2 / math.pi), 0.044715
    u, u1 = scale * near * (1 + cubic * near * near), scale * (1 + 3 * cubic * near * near)
    u2 = 6 * scale * cubic * near
    return _bump(u) * (2 * u1 + near * u2) + near * u1 * u1 * _bump_slope(u)


# f''(z, numbers) by the kernels' name of the stage; the others' is 0 wherever it exists. `cuda/second.cuh` and
# `triton_kernels/second.py` have the same names in the same order. At kinks it is what torch has.
SECOND: dict[str, Callable[..., Tensor]] = {
    "hardswish": lambda z: torch.where((z > -3) & (z < 3), 1 / 3, torch.zeros_like(z)),
    "elu": lambda z, alpha: _exp_below_zero(z, alpha),
    "selu": lambda z: _exp_below_zero(z, 1.0507009873554804934193349852946 * 1.6732632423543772848170429916717),
    "celu": lambda z, alpha: _exp_below_zero(z, 1 / alpha, 1 / alpha),
    "sigmoid": _bump_slope,
    "silu": lambda z: 2 * _bump(z) + z * _bump_slope(z),
    "tanh": _tanh,
    "tanhshrink": lambda z: -_tanh(z),
    "softplus": lambda z, beta, threshold: torch.where(z * beta > threshold, 0.0, beta * _bump(z * beta)),
    "logsigmoid": lambda z: -_bump(z),
    "mish": _mish,
    "softsign": lambda z: -2 * z.sgn() / (1 + z.abs()) ** 3,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "square": lambda z: torch.full_like(z, 2.0),
    "sqrt": lambda z: -0.25 / (z * z.sqrt()),
    "reciprocal": lambda z: 2 * z.reciprocal() ** 3,
    "exp": torch.exp,
}


def is_curved(function: str) -> bool:
    """Whether the kernels' function of this name has a second derivative; the specialised ones have their stage's."""
    return function in SECOND or function in ("gelu_unit", "gelu_upper", "tanh_approx")


def slope_gradients(chain: Slope, v: Tensor, x: Tensor, gy: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """v gy f''(x) and v f'(x), those of them that `needs` asks for, in the tensors' own dtype.

    What the kernels do, in torch's differentiable functions: v goes down the chain as the tangent of x; gy comes up it
    as the gradient, together with the gradient's own tangent.
    """
    steps, z, tangent = [], x, v
    for call in chain.calls:
        steps.append((call, z, tangent))
        tangent = _gradient(call, tangent, z)
        z = call.stage.reference(z, *call.arguments)
    gradient, turned = gy, torch.zeros_like(gy)
    for call, z, down in reversed(steps):
        turned = _gradient(call, turned, z)
        second = _second(call, z)
        if second is not None:
            turned = turned + second * down * gradient
        gradient = _gradient(call, gradient, z)
    return [g for g, need in zip((turned, tangent), needs, strict=True) if need]


def _gradient(call: Call, gy: Tensor, z: Tensor) -> Tensor:
    gradient = call.stage.gradient(gy, z, *call.arguments)
    return gradient[0] if call.stage.operand else gradient


def _second(call: Call, z: Tensor) -> Tensor | None:
    if call.stage.operand:
        return None
    function, numbers = call.stage.kernel(*call.arguments)
    return SECOND[function](z, *numbers) if function in SECOND else None
