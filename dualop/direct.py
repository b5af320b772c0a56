"""The short way to a kernel: past torch's dispatcher, where nothing could be watching a call.

torch's dispatcher calls a Python kernel in some microseconds, as long as torch takes for a whole pointwise function,
and a chain's op has two of them, for autograd and for the device. What the dispatcher is there for (subclasses, modes,
transforms, tracers, the profiler, lazily negated tensors ...) shows in the tensors' types and keys and in a few
switches of the thread; if none of it does, calling the backend is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _are_functorch_transforms_active
from torch._C import _dispatch_keys as keys_of
from torch._C import _get_tracing_state as jit_tracer
from torch._C import _has_torch_function as has_torch_function
from torch._C import _len_torch_dispatch_stack as dispatch_modes
from torch._C._autograd import _profiler_enabled as profiler
from torch.autograd import forward_ad

from dualop import registry
from dualop.native.record import recorded
from dualop.slopes import parse

_TYPES = frozenset((Tensor, torch.nn.Parameter))


def _keys(*names: str) -> int:
    keys = DispatchKeySet(getattr(DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | DispatchKeySet(getattr(DispatchKey, name))
    return keys.raw_repr()


# The keys of a strided tensor in memory, and those of one made in inference mode.
PLAIN_KEYS = frozenset(
    _keys(device, f"Autocast{device}", *more)
    for device in ("CPU", "CUDA")
    for more in ((), ("ADInplaceOrView", f"Autograd{device}"))
)


def unwatched(tensors: Sequence[Tensor]) -> bool:
    """Whether a call with these tensors is nobody's business but the backend's: False where that is not certain."""
    return plain(tensors) and not profiler()


def plain(tensors: Sequence[Tensor]) -> bool:
    """Whether all are plain tensors in memory and no mode, transform or tracer is active; a profiler may watch."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) not in _TYPES or keys_of(tensor).raw_repr() not in PLAIN_KEYS:
            return False
    return not (
        has_torch_function(tensors)
        or dispatch_modes()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or jit_tracer()
    )


def forward(calls: Any, arguments: tuple[str, str], tensors: Sequence[Tensor]) -> Tensor:
    """The backend's result for (x, *operands), unwatched and checked; by `calls` (dualop/native) if they know how."""
    y = None if calls is None else calls(tensors[0], tensors[1:])
    if y is not None and y is not False:
        return y
    backend, chain = registry.BACKENDS[arguments[1]], parse(arguments[0])
    if calls is None or y is False:
        return backend.forward(chain, tensors[0], tensors[1:])
    return recorded(calls, tensors, None, lambda: (backend.forward(chain, tensors[0], tensors[1:]),))[0]


def backward(
    calls: Any, arguments: tuple[str, str], gy: Tensor, tensors: Sequence[Tensor], needs: Sequence[bool]
) -> Sequence[Tensor]:
    """The backend's gradients, unwatched; `calls` do not know how yet, or are None."""
    backend, chain = registry.BACKENDS[arguments[1]], parse(arguments[0])
    if calls is None:
        return backend.backward(chain, gy, tensors[0], tensors[1:], needs)
    call = lambda: backend.backward(chain, gy, tensors[0], tensors[1:], needs)
    return recorded(calls, (gy, *tensors), needs, call)
