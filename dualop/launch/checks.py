"""Check the tensors of a call: what a chain takes, with an error that names the tensor and says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dualop.errors import DeviceError, DtypeError, LayoutError, OperandError, ShapeError
from dualop.launch.layout import DTYPES


def device_of(x: Tensor, operands: Sequence[Tensor]) -> torch.device:
    """Return the device of a call, to which CPU scalars may be added. Raises DeviceError if other devices are mixed."""
    device = x.device
    if all(tensor.device == device for tensor in operands):
        return device
    devices = {t.device for t in (x, *operands) if t.dim() > 0 or t.device.type != "cpu"}
    if len(devices) > 1:
        listed = ", ".join(str(t.device) for t in (x, *operands))
        raise DeviceError(f"all tensors of a chain must be on one device, these are on {listed}")
    return devices.pop()


def validate(x: Any, operands: Sequence[Any], names: Sequence[str]) -> torch.device:
    """Return the device of a call. Raise the error that fits, with the name of the tensor, if it makes no sense."""
    for name, tensor in zip(("x", *names), (x, *operands), strict=True):
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise OperandError(f"{name} must be a tensor, not {kind}; write a number in the chain's text")
        if tensor.dtype not in DTYPES:
            takes = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            more = f": pass {name}.dequantize()" if tensor.is_quantized else ""
            raise DtypeError(f"{name} is {str(tensor.dtype).removeprefix('torch.')}; a chain takes {takes}{more}")
        if tensor.is_nested:  # jagged or strided, neither of which has a dense form
            advice = f"torch.nested.to_padded_tensor({name}, 0.0), or the tensors of {name}.unbind() one by one"
            raise LayoutError(f"{name} is a nested tensor; pass {advice}")
        if tensor.layout is not torch.strided:
            raise LayoutError(f"{name} is {str(tensor.layout).removeprefix('torch.')}; pass {name}.to_dense()")
    if not torch.compiler.is_compiling():  # Dynamo may not compare sizes that it does not know; the fake kernels may
        check_shapes((x, *operands), names)
    return device_of(x, operands)


def checked(tensors: Sequence[Tensor], names: Sequence[str]) -> torch.device:
    """Return the device of a call with (x, *operands); `validate` sees each combination only the first time.

    This holds for strided tensors in memory without a tracer: their shapes, dtypes and devices say everything.
    """
    like = tuple([(t.shape, t.dtype, t.device) for t in tensors])
    device = _checked.get(like)
    if device is None:
        device = validate(tensors[0], tensors[1:], names)
        if len(_checked) >= CHECKED:
            _checked.clear()
        _checked[like] = device
    return device


CHECKED = 4096
_checked: dict[tuple[Any, ...], torch.device] = {}


def check_shapes(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise ShapeError if (x, *operands) do not broadcast together. Symbolic sizes are left to torch's own check."""
    if not _broadcast(tuple([tuple([n if type(n) is int else 1 for n in t.shape]) for t in tensors])):
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(("x", *names), tensors, strict=True))
        raise ShapeError(f"shapes do not broadcast together: {shapes}")


@lru_cache(maxsize=4096)
def _broadcast(shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Return True if the shapes broadcast together."""
    try:
        torch.broadcast_shapes(*shapes)
    except RuntimeError:
        return False
    return True
