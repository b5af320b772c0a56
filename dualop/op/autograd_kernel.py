"""Make an op's Autograd kernel of a torch.autograd.Function: each level of torch.func gets a node of its own.

    apply = torch_private.single_level(F).apply   # F's forward calls the op again within `below_function()`
    def kernel(keyset, x): return differentiably(keyset, lambda: apply(x), lambda keys: op.redispatch(keys, x), (x,))
    library.impl("op", kernel, "Autograd", with_keyset=True)

The mechanism needs private names of torch (dualop/torch_private.py). On a version of torch that dualop is not tested
with, `try_out` runs it on an op of its own, whose derivatives are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dualop import torch_private
from dualop.torch_private import FUNCTION, transforms_active


def differentiably(
    keyset: Any, apply: Callable[[], Any], below: Callable[[Any], Any], tensors: Sequence[Tensor]
) -> Any:
    """Return apply(), which makes a node, if anybody may differentiate; else return below(the keys below autograd)."""
    if transforms_active():
        with torch_private.single_level_allowed():
            return apply()
    if (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)) or have_tangents(tensors):
        return apply()
    return below(keyset & torch_private.after_autograd_keyset)


@contextmanager
def below_function() -> Iterator[None]:
    """Continue below the Function whose forward this is, with gradients and tangents for outer levels of torch.func."""
    with torch_private.below_autograd():
        if transforms_active():
            with torch.enable_grad(), torch_private.set_forward_mode_enabled(True):
                yield
        else:
            yield


def have_tangents(tensors: Sequence[Tensor]) -> bool:
    """Return True if one of the tensors is a dual tensor of torch.autograd.forward_ad."""
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def forward_mode(tensors: Sequence[Tensor]) -> bool:
    """Return True if this level's derivative is taken by forward mode, and not within a Function's own jvp."""
    if not torch_private.forward_mode_enabled():
        return False
    if transforms_active():
        return torch_private.peek_interpreter_stack().key() == torch_private.transform_type.Jvp
    return have_tangents(tensors)


def try_out() -> None:
    """Give up FUNCTION if an op made of its names has wrong derivatives. Imports all of torch.func, some seconds."""
    if not FUNCTION.works:
        return
    with ThreadPoolExecutor(1) as pool:  # the calling thread may be inside of a mode or a transform
        error = pool.submit(_error_of_trial).result()
    if error:
        FUNCTION.give_up(error)


def _error_of_trial() -> str:
    try:
        found = [round(value.item(), 3) for value in _trial()]
    except Exception as error:
        return f"a trial of the private names failed ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    return "" if found == EXPECTED else f"a trial of the private names gave {found} for {EXPECTED}"


# f(x) = x * x^2 at 3 with x^2 as the op: f'' by reverse over reverse, by forward over reverse; f' by each mode alone;
# and whether the op is differentiated by forward mode where it is, and where it is not.
EXPECTED = [18.0, 18.0, 27.0, 27.0, 27.0, 1.0, 0.0]


def _trial() -> list[Tensor]:
    library = torch.library.Library("dualop_trial", "FRAGMENT")
    library.define("square(Tensor x) -> Tensor")
    op = torch.ops.dualop_trial.square.default

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            with below_function():
                return op(x)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)

        @staticmethod
        def backward(ctx: Any, *gy: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * gy[0]

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * tangents[0]

    apply = torch_private.single_level(Square).apply

    modes: list[bool] = []

    def kernel(keyset: Any, x: Tensor) -> Tensor:
        modes.append(forward_mode((x,)))
        return differentiably(keyset, lambda: apply(x), lambda below: op.redispatch(below, x), (x,))

    library.impl("square", torch.square, "CPU")
    library.impl("square", kernel, "Autograd", with_keyset=True)
    f = lambda x: x * op(x)
    x, one = torch.tensor(3.0), torch.tensor(1.0)
    first = torch.func.grad(f)
    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, one))).tangent
    (by_autograd,) = torch.autograd.grad(f(leaf), leaf)
    found = [torch.func.grad(first)(x), torch.func.jvp(first, (x,), (one,))[1], first(x), by_autograd, tangent]
    for transform in (lambda: torch.func.jvp(op, (x,), (one,)), lambda: torch.func.grad(op)(x)):
        modes.clear()
        transform()
        found.append(torch.tensor(float(modes[0])))
    return found
