"""Check calls of the ops by their own names, `torch.ops.dualop.*`.

`dualop.op.library.run` makes only correct calls, but anybody can call an op. A kernel trusts its arguments: with a gy
of another shape than the result's it would read memory that does not belong to gy.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from dualop.backends import registry
from dualop.errors import DeviceError, OperandError, ShapeError
from dualop.language import slopes, syntax
from dualop.language.slopes import Slope
from dualop.language.syntax import Chain
from dualop.launch.checks import device_of


def forward_chain(operands: Sequence[Tensor], text: str, backend: str) -> Chain:
    """Return the chain that a `dualop::forward` runs. Raises ChainError, OperandError, BackendUnavailable."""
    chain = syntax.parse(text)
    _check(chain, operands, backend)
    return chain


def backward_chain(
    operands: Sequence[Tensor], text: str, backend: str, needs: Sequence[bool], order: int = 1
) -> Chain | Slope:
    """Return what a `dualop::backward` runs: the chain, or for order 2 its slope.

    Raises the errors of `forward_chain`.
    """
    if order not in (1, 2):
        raise OperandError(f"the order of a derivative is 1 or 2, not {order}")
    chain = slopes.of_order(text, order)
    _check(chain, operands, backend)
    if len(needs) != 1 + len(operands):
        raise OperandError(
            f"`{chain}` has {1 + len(operands)} gradients, of x and each operand; needs says {len(needs)}"
        )
    return chain


def check_gradient(gy: Tensor, x: Tensor, operands: Sequence[Tensor], device: torch.device | None = None) -> None:
    """Raise ShapeError or DeviceError if gy is no gradient of a result of these tensors, which are on `device`."""
    check_shape(gy.shape, [t.shape for t in (x, *operands)])
    if gy.device != (device := device or device_of(x, operands)):
        raise DeviceError(f"gy has to be on the result's device {device}, not on {gy.device}")


def check_shape(gy: Sequence[int], tensors: Sequence[Sequence[int]]) -> None:
    """Raise ShapeError if `gy` is not the shape of the result of tensors of these shapes.

    Sizes that a tracer does not know yet are assumed to be right.
    """
    shape = [_broadcast(sizes) for sizes in zip_longest(*map(reversed, tensors), fillvalue=1)][::-1]
    if len(gy) != len(shape) or any(type(n) is int and m not in (n, None) for n, m in zip(gy, shape, strict=True)):
        raise ShapeError(f"gy has to have the result's shape {tuple(shape)}, not {tuple(gy)}")


def _broadcast(sizes: Sequence[int]) -> int | None:
    """Return the size that these sizes broadcast to, None if a tracer does not know it yet."""
    wide = [n for n in sizes if type(n) is not int or n != 1]
    if not wide:
        return 1
    return wide[0] if all(type(n) is int for n in wide) else None


def _check(chain: Chain | Slope, operands: Sequence[Tensor], backend: str) -> None:
    registry.requested(backend)
    if len(operands) != len(chain.operands):
        takes = ", ".join(("x", *chain.operands))
        raise OperandError(f"`{chain}` takes ({takes}); {len(operands)} operands given")
