"""The op and the one autograd.Function that every backend shares.

`ChainFunction` is not wrapped around the op `dualop::forward`, it is the op's kernel for the Autograd key: so whatever
traces, fakes, exports or shards sees one op, and functorch meets the Function. Its backward is an op of its own,
`dualop::backward`: one kernel for all gradients. That one is differentiable too, by the reference's formulas.

Rejected: a Function above the op (torch.compile and export look into it, dispatch modes do not see it);
custom_op with register_autograd (torch.func.grad fails, forward mode silently gives zeros).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _after_autograd_keyset as _AFTER_AUTOGRAD
from torch._C import _any_requires_grad, _are_functorch_transforms_active
from torch._C import _AutoDispatchBelowAutograd as _BelowAutograd
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from dualop import registry
from dualop.backends.reference import reference
from dualop.chains import Chain, parse
from dualop.layout import device_of, validate

_LIBRARY = torch.library.Library("dualop", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_LIBRARY.define("forward(Tensor x, Tensor[] operands, str chain, str backend) -> Tensor", tags=_TAGS)
_LIBRARY.define(
    "backward(Tensor gy, Tensor x, Tensor[] operands, str chain, str backend, bool[] needs) -> Tensor[]", tags=_TAGS
)
_forward_op = torch.ops.dualop.forward.default
_backward_op = torch.ops.dualop.backward.default


def run(chain: Chain, x: Tensor, operands: Sequence[Tensor], backend: str | None) -> Tensor:
    """One call of a chain: check the tensors, resolve the backend once, dispatch."""
    validate(x, operands, chain.operands)
    name = registry.requested(backend)
    if not torch.compiler.is_compiling() and x.device.type != "meta":
        name = registry.resolve(name, chain, device_of(x, operands)).name
    return _forward_op(x, list(operands), chain.text, name)


def _forward(x: Tensor, operands: Sequence[Tensor], chain: str, backend: str) -> Tensor:
    parsed = parse(chain)
    return registry.resolve(backend, parsed, device_of(x, operands)).forward(parsed, x, operands)


def _backward(
    gy: Tensor, x: Tensor, operands: Sequence[Tensor], chain: str, backend: str, needs: Sequence[bool]
) -> list[Tensor]:
    parsed = parse(chain)
    chosen = registry.resolve(backend, parsed, device_of(x, operands))
    return chosen.backward(parsed, gy, x, operands, needs)


def _forward_fake(x: Tensor, operands: Sequence[Tensor], chain: str, backend: str) -> Tensor:
    y = x
    for operand in operands:
        y = y + operand
    return torch.empty_like(y)


def _backward_fake(
    gy: Tensor, x: Tensor, operands: Sequence[Tensor], chain: str, backend: str, needs: Sequence[bool]
) -> list[Tensor]:
    y = _forward_fake(x, operands, chain, backend)
    return [
        torch.empty_like(y, dtype=t.dtype) if t.shape == y.shape else torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t, need in zip((x, *operands), needs, strict=True)
        if need
    ]


class ChainFunction(torch.autograd.Function):
    """apply(chain, backend, x, *operands); saves x and the operands and nothing else."""

    @staticmethod
    def forward(chain: str, backend: str, x: Tensor, *operands: Tensor) -> Tensor:
        if not _are_functorch_transforms_active():
            with _BelowAutograd():
                return _forward_op(x, operands, chain, backend)
        # apply() switched gradients off, but the outer levels of functorch need them.
        with torch.enable_grad(), _set_fwd_grad_enabled(True), _BelowAutograd():
            return _forward_op(x, operands, chain, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.chain, ctx.backend, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, *operands = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[2:])
        gradients = iter(_backward_op(gy, x, operands, ctx.chain, ctx.backend, needs))
        return None, None, *(next(gradients) if need else None for need in needs)

    @staticmethod
    def jvp(ctx: Any, _chain: None, _backend: None, *tangents: Tensor | None) -> Tensor:
        # The chain is pointwise: with every input at the result's shape, the gradients of the sum are the derivatives.
        full = torch.broadcast_tensors(*ctx.saved_tensors)
        needs = [t is not None for t in tangents]
        dtype = _forward_fake(full[0], full[1:], ctx.chain, ctx.backend).dtype if len(full) > 1 else full[0].dtype
        ones = torch.ones_like(full[0], dtype=dtype)
        derivatives = _backward_op(ones, full[0], full[1:], ctx.chain, ctx.backend, needs)
        terms = [d * t for d, t in zip(derivatives, (t for t in tangents if t is not None), strict=True)]
        return sum(terms[1:], terms[0]).to(dtype)


_apply = super(torch.autograd.Function, ChainFunction).apply  # the C++ apply: the Python one binds a signature, 25 us


def _forward_autograd(keyset: Any, x: Tensor, operands: Sequence[Tensor], chain: str, backend: str) -> Tensor:
    if _are_functorch_transforms_active():
        with enable_single_level_autograd_function():
            return _apply(chain, backend, x, *operands)
    if forward_ad._current_level < 0 and not (torch.is_grad_enabled() and _any_requires_grad(x, *operands)):
        return _forward_op.redispatch(keyset & _AFTER_AUTOGRAD, x, operands, chain, backend)
    return _apply(chain, backend, x, *operands)


def _backward_autograd(
    keyset: Any, gy: Tensor, x: Tensor, operands: Sequence[Tensor], chain: str, backend: str, needs: Sequence[bool]
) -> list[Tensor]:
    plain = forward_ad._current_level < 0 and not _are_functorch_transforms_active()
    if plain and not (torch.is_grad_enabled() and _any_requires_grad(gy, x, *operands)):
        return _backward_op.redispatch(keyset & _AFTER_AUTOGRAD, gy, x, operands, chain, backend, needs)
    # Somebody differentiates the gradient: torch's own formulas, differentiable without end.
    parsed = parse(chain)
    _, pullback = torch.func.vjp(lambda x, *operands: reference(parsed, x, operands), x, *operands)
    return [gradient for gradient, need in zip(pullback(gy), needs, strict=True) if need]


def _vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, operands: Sequence[Tensor], chain: str, backend: str) -> Any:
    tensors, dims = (x, *operands), (in_dims[0], *(in_dims[1] or [None] * len(operands)))
    rank = max(t.dim() - (d is not None) for t, d in zip(tensors, dims, strict=True))

    def batched(t: Tensor, d: int | None) -> Tensor:
        if d is None:
            return t
        t = t.movedim(d, 0)
        return t.reshape(t.shape[0], *[1] * (rank - t.dim() + 1), *t.shape[1:])

    x, *rest = [batched(t, d) for t, d in zip(tensors, dims, strict=True)]
    return _forward_op(x, rest, chain, backend), 0


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("forward", _forward, _key)
    _LIBRARY.impl("backward", _backward, _key)
_LIBRARY.impl("forward", _forward_autograd, "Autograd", with_keyset=True)
_LIBRARY.impl("backward", _backward_autograd, "Autograd", with_keyset=True)
torch.library.register_fake("dualop::forward", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("dualop::backward", _backward_fake, lib=_LIBRARY)
torch.library.register_vmap("dualop::forward", _vmap, lib=_LIBRARY)
