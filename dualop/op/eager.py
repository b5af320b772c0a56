"""Go the short way to a kernel: past torch's dispatcher, where nothing observes a call.

torch's dispatcher takes some microseconds to call a Python kernel, as long as torch takes for a whole pointwise
function, and a chain's op has two of them, for autograd and for the device. The dispatcher serves subclasses, modes,
transforms, tracers, the profiler, lazily negated tensors and so on. All of these show in the tensors' types and keys
and in a few switches of the thread. If none of them is present, calling the backend gives the same result.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.overrides import has_torch_function

from dualop import torch_private
from dualop.torch_private import SHORT_WAY

_TYPES = frozenset((Tensor, torch.nn.Parameter))


def unwatched(tensors: Sequence[Tensor]) -> bool:
    """Return True if no subclass, mode, transform, tracer or profiler can observe a call with these tensors.

    Return False where that is not certain.
    """
    return plain(tensors) and not torch_private.profiling()


def plain(tensors: Sequence[Tensor]) -> bool:
    """Return True if all are plain tensors in memory and no mode, transform or tracer is active; a profiler may be."""
    if torch.compiler.is_compiling() or not SHORT_WAY.works:
        return False
    for tensor in tensors:
        if type(tensor) not in _TYPES or torch_private.dispatch_keys(tensor).raw_repr() not in torch_private.PLAIN_KEYS:
            return False
    return not (
        has_torch_function(tensors)
        or torch_private.dispatch_modes()
        or torch_private.transformed()
        or torch.jit.is_tracing()
    )


def try_out() -> None:
    """Give up SHORT_WAY if a call that something watches passes for an unwatched one.

    The profiler is left out: starting it takes long, and without it nothing but a row of a profile would be missing.
    """
    if not SHORT_WAY.works:
        return
    with ThreadPoolExecutor(1) as pool:  # the calling thread may be watched itself
        seen = pool.submit(_unseen_watcher).result()
    if seen:
        SHORT_WAY.give_up(seen)


def _unseen_watcher() -> str:
    """Return what is wrong, or ""."""
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.ones(2)
    passed: list[str] = []

    def see(watcher: str, tensor: Tensor) -> Tensor:
        if unwatched((tensor,)):
            passed.append(watcher)
        return tensor.clone()

    try:
        with torch.autograd.forward_ad.dual_level():
            see("a dual level", x)
        with FlopCounterMode(display=False):
            see("a dispatch mode", x)
        with torch.device("cpu"):
            see("a function mode", x)
        torch.func.vmap(lambda t: see("a transform of torch.func", x) + t)(x)
        see("a lazy negation", torch.ones(2, dtype=torch.complex64).conj().imag)
        see("a meta tensor", torch.ones(2, device="meta"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.jit.trace(lambda t: see("torch.jit.trace", t), x, check_trace=False)
    except Exception as error:
        return f"a trial of the private names failed ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    return f"a call under {passed[0]} passes for an unwatched one" if passed else ""
