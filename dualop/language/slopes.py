"""Describe the slope of a chain: what its backward computes, gy f'(x), as a function of x and gy.

The backward of a slope is the double backward of the chain: from v, the gradient of gy f'(x), it makes v gy f''(x) and
v f'(x). So a second derivative is one more call of the op `dualop::backward`, with all that this op can do, and one
more kernel.

Only chains of one variable have one: no tensor operands, and x not an operand. A slope has no slope again: further
derivatives are torch's, of the formulas in the table of stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from dualop.errors import ChainError
from dualop.language import syntax
from dualop.language.stages import Call
from dualop.language.syntax import Chain

if TYPE_CHECKING:
    from typing_extensions import TypeIs


@dataclass(frozen=True)
class Slope:
    """Hold the chain f, `of`, whose gy f'(x) is a function of x and the operand gy that is run backward only.

    A slope is not a Chain: code that took it for one would compute f.
    """

    of: Chain
    order: ClassVar[int] = 2
    operands: ClassVar[tuple[str, ...]] = ("gy",)

    def __post_init__(self) -> None:
        if not _has_slope(self.of):
            raise ChainError(f"`{self.of}` has no slope as a function of the kernels: it has operands")

    @property
    def text(self) -> str:
        return f"slope of {self.of.text}"

    def __str__(self) -> str:
        return self.text


def is_slope(chain: Chain | Slope) -> TypeIs[Slope]:
    """Return True for a slope. Its class does not tell, since it is another one after a reload of this module."""
    return chain.order == 2


@lru_cache(maxsize=4096)
def of_order(text: str, order: int) -> Chain | Slope:
    """Return what the backward of this order runs on: the chain, or for order 2 its slope. Raises ChainError."""
    chain = syntax.parse(text)
    return Slope(chain) if order == 2 else chain


@lru_cache(maxsize=4096)
def has_slope(text: str) -> bool:
    """Return True if the kernels have a second derivative of the chain."""
    return _has_slope(syntax.parse(text))


def _has_slope(chain: Chain) -> bool:
    """Return True for a chain of one variable whose operand stages, beside numbers, have no second derivative.

    The kernels have second derivatives of the other stages only.
    """
    beside = [call for call in chain.calls if call.stage.operand]
    return not any(isinstance(call.operand, str) or call.stage.curved for call in beside)


def slope_gradients(sloped: Slope, v: Tensor, x: Tensor, gy: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """Return v gy f''(x) and v f'(x), those of them that `needs` asks for, in the tensors' own dtype.

    It does what the kernels do, in torch's differentiable functions: v goes down the chain as the tangent of x; gy
    comes up it as the gradient, together with the gradient's own tangent.
    """
    steps, z, tangent = [], x, v
    for call in sloped.of.calls:
        steps.append((call, z, tangent))
        tangent = _gradient(call, tangent, z)
        z = call.stage.reference(z, *call.numbers(z.dtype))
    gradient, turned = gy, None  # None behind the last stage that turns it: zero, also beside an infinite slope
    for call, z, down in reversed(steps):
        if turned is not None:
            turned = _gradient(call, turned, z)
        if callable(call.stage.second):
            more = call.stage.second(z, *call.numbers(z.dtype)) * down * gradient
            turned = more if turned is None else turned + more
        gradient = _gradient(call, gradient, z)
    found = (torch.zeros_like(gy) if turned is None else turned, tangent)
    return [g for g, need in zip(found, needs, strict=True) if need]


def _gradient(call: Call, gy: Tensor, z: Tensor) -> Tensor:
    gradient = call.stage.gradient(gy, z, *call.numbers(z.dtype))
    return gradient[0] if call.stage.operand else gradient
