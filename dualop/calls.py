"""What a call of the ops by their own names, `torch.ops.dualop.*`, has to be.

`dualop.autograd.run` makes no other, but anybody can call an op. A kernel trusts what it is given: with a gy of another
shape than the result's it would read memory that is not gy's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dualop import chains, registry, slopes
from dualop.chains import Chain
from dualop.errors import DeviceError, OperandError, ShapeError
from dualop.slopes import Slope


def forward_chain(operands: Sequence[Tensor], text: str, backend: str) -> Chain:
    """The chain that a `dualop::forward` runs. Raises ChainError, OperandError, BackendUnavailable."""
    chain = chains.parse(text)
    _check(chain, operands, backend)
    return chain


def backward_chain(operands: Sequence[Tensor], text: str, backend: str, needs: Sequence[bool]) -> Chain | Slope:
    """What a `dualop::backward` runs: a chain, or the slope of one. Raises as `forward_chain`."""
    chain = slopes.parse(text)
    _check(chain, operands, backend)
    if len(needs) != 1 + len(operands):
        raise OperandError(
            f"`{chain}` has {1 + len(operands)} gradients, of x and each operand; needs says {len(needs)}"
        )
    return chain


def check_gradient(gy: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Raise ShapeError or DeviceError if gy is no gradient of a result of this shape on this device.

    Sizes that a tracer does not know yet are taken to be right.
    """
    same = gy.dim() == len(shape)
    pairs = zip(gy.shape, shape, strict=True) if same else ()
    if not same or any(type(m) is int and type(n) is int and m != n for m, n in pairs):
        raise ShapeError(f"gy has to have the result's shape {tuple(shape)}, not {tuple(gy.shape)}")
    if gy.device != device:
        raise DeviceError(f"gy has to be on the result's device {device}, not on {gy.device}")


def _check(chain: Chain | Slope, operands: Sequence[Tensor], backend: str) -> None:
    registry.requested(backend)
    if len(operands) != len(chain.operands):
        takes = ", ".join(("x", *chain.operands))
        raise OperandError(f"`{chain}` takes ({takes}); {len(operands)} operands given")
