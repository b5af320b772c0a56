"""Compute the first and second derivatives of stages for which torch has no function.

All formulas are made of torch's differentiable functions, so that torch can differentiate them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

# ---- first derivatives -----------------------------------------------------------------------------------------------


def kept(condition: Tensor, gy: Tensor) -> Tensor:
    """Return gy where the condition holds, else zero, also where gy is infinite or NaN."""
    return torch.where(condition, gy, torch.zeros_like(gy))


@lru_cache(maxsize=1)
def clamp_gradient_at_bound() -> float:
    """Return clamp's derivative at its own bounds, 1.0 or 0.0, which differs between releases of torch.

    A thread of its own computes it: the calling one may be inside an op, a transform or a fake mode.
    """

    def ask() -> float:
        bound = torch.ones((), requires_grad=True)
        (gradient,) = torch.autograd.grad(bound.clamp(-1, 1), bound)
        return gradient.item()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()


def like(z: Tensor, other: Tensor | float) -> Tensor:
    return other if isinstance(other, Tensor) else torch.full((), other, dtype=z.dtype, device=z.device)


def clamp(z: Tensor, low: float, high: float) -> Tensor:
    # torch wants one bound at least, where both were rounded to infinity, too.
    return z.clamp(low if low > -math.inf or high == math.inf else None, high if high < math.inf else None)


def clamp_gradient(gy: Tensor, z: Tensor, low: float, high: float) -> Tensor:
    # An infinite bound is none, so the derivative at infinity is 1 there.
    at_bound = clamp_gradient_at_bound()
    above = z >= low if at_bound or low == -math.inf else z > low
    below = z <= high if at_bound or high == math.inf else z < high
    return kept(above & below, gy)


def extremum(
    choose: Callable[[Tensor, Tensor], Tensor], loses: Callable[[Any, Any], Tensor]
) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """Return torch's minimum or maximum and its gradients of z and b: each side of a tie gets half."""

    def gradient(gy: Tensor, z: Tensor, b: Tensor | float) -> tuple[Tensor, Tensor]:
        share = torch.where(z == b, gy / 2, gy)
        return kept(~loses(z, b), share), kept(~loses(-z, -b), share)

    return lambda z, b: choose(z, like(z, b)), gradient


# aten's silu_backward, mish_backward and hardsigmoid_backward cannot be differentiated again.
def silu_gradient(gy: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return gy * (s * (1 + z * (1 - s)))


def mish_gradient(gy: Tensor, z: Tensor) -> Tensor:
    t = torch.tanh(F.softplus(z))
    return gy * (t + z * torch.sigmoid(z) * (1 - t * t))


def hardsigmoid(z: Tensor) -> Tensor:
    """Return hardsigmoid(z) without torch's constants rounded to float32; its autograd has torch's values at kinks."""
    return torch.where(z.abs() >= 3, (z > 0).to(z.dtype), (z + 3) / 6)


# ---- second derivatives ----------------------------------------------------------------------------------------------
# f''(z), at kinks what torch has. The kernels have the same formulas.


def sigmoid_slope(z: Tensor) -> Tensor:
    """Return the derivative of sigmoid, without the cancellation of 1 - sigmoid(z)."""
    return torch.sigmoid(z) * torch.sigmoid(-z)


def sigmoid_second(z: Tensor) -> Tensor:
    return -sigmoid_slope(z) * torch.tanh(z / 2)


def hardswish_second(z: Tensor) -> Tensor:
    return torch.where((z > -3) & (z < 3), 1 / 3, torch.zeros_like(z))


def exp_below_zero(z: Tensor, scale: float, inverse: float = 1.0) -> Tensor:
    """Return scale * exp(z * inverse) below zero, and zero from 0 on, as torch has it.

    The clamp keeps the exponential that is not taken from overflowing.
    """
    return torch.where(z < 0, scale * (z.clamp(max=0) * inverse).exp(), 0.0)


def silu_second(z: Tensor) -> Tensor:
    return 2 * sigmoid_slope(z) + z * sigmoid_second(z)


def tanh_second(z: Tensor) -> Tensor:
    return -8 * torch.tanh(z) * sigmoid_slope(2 * z)


def softplus_second(z: Tensor, beta: float, threshold: float) -> Tensor:
    return torch.where(z * beta > threshold, 0.0, beta * sigmoid_slope(z * beta))


def mish_second(z: Tensor) -> Tensor:
    s, p = torch.sigmoid(z), F.softplus(z)
    return 4 * sigmoid_slope(2 * p) * s * (2 + z * (torch.sigmoid(-z) - 2 * torch.tanh(p) * s))


def gelu_second(z: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        near, scale, cubic = z.clamp(-20, 20), 2 * math.sqrt(2 / math.pi), 0.044715
        u, u1 = scale * near * (1 + cubic * near * near), scale * (1 + 3 * cubic * near * near)
        u2 = 6 * scale * cubic * near
        return sigmoid_slope(u) * (2 * u1 + near * u2) + near * u1 * u1 * sigmoid_second(u)
    near = z.clamp(-40, 40)  # behind that it is 0, and z^2 may overflow
    return (-0.5 * near * near).exp() * (2 - near * near) / math.sqrt(2 * math.pi)


def softsign_second(z: Tensor) -> Tensor:
    return -2 * z.sgn() / (1 + z.abs()) ** 3
