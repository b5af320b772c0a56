"""Run a chain's calls, and implement the two ops for every key and transform that torch dispatches them by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import is_tensor_like

from dualop import replay, torch_private, versions
from dualop.backends import registry
from dualop.language import syntax
from dualop.language.syntax import Chain
from dualop.launch.checks import check_shapes, checked, validate
from dualop.op import autograd_kernel, definition, dtensor, eager, function
from dualop.op.autograd_kernel import differentiably, forward_mode
from dualop.op.calls import backward_chain, check_gradient, check_shape, forward_chain
from dualop.op.function import Backward, ChainFunction, Forward, ShortCall, batch_first, empty_result, sample_shape
from dualop.replay.record import recorded

if versions.of(torch.__version__) not in versions.TORCH:
    autograd_kernel.try_out()
    eager.try_out()


def run(chain: Chain, x: Any, operands: Sequence[Tensor], backend: str | None) -> Tensor:
    """Run one call of a chain: replay it in C++, or take the short way, or go through torch's dispatcher."""
    if not is_compiling():
        calls = replay.known.get((chain.text, registry.requested() if backend is None else backend))
        if calls is not None and (y := calls(x, operands)) is not None:
            return y
    tensors, name = (x, *operands), registry.requested(backend)
    if eager.unwatched(tensors):
        chosen = registry.resolve(name, chain, checked(tensors, chain.operands))
        call = ShortCall(chain, chosen)
        calls = _calls((chain.text, name), call)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return function.apply(call, *tensors)
        return call.first(calls, tensors)
    if not any(not isinstance(t, Tensor) and is_tensor_like(t) for t in tensors):  # a proxy: a node of torch.fx's graph
        validate(x, operands, chain.operands)
        if dtensor.lacks_rules(tensors):
            return dtensor.without_rules(chain, x, operands, name)
    return Forward(chain.text, name)(tensors)


def _calls(asked: replay.Names, call: ShortCall) -> Any:
    """Return the Calls that replay such a call, or None where Python makes all of them."""
    chosen = (call.chain.text, call.backend.name)
    return replay.calls(asked, chosen, function.apply, call) if call.backend.replays else None


# ---- the kernels of the devices --------------------------------------------------------------------------------------


# `arguments` are those of the op behind its tensors: the chain's text and the backend, and of the backward op the
# wanted gradients and the order. torch leaves out an order of 1, which is the default. A known call does not come here:
# the kernels of dualop/replay/operators.h replay it.


def _forward(x: Tensor, operands: Sequence[Tensor], text: str, backend: str) -> Tensor:
    chain = forward_chain(operands, text, backend)
    tensors = (x, *operands)
    call = ShortCall(chain, registry.resolve(backend, chain, checked(tensors, chain.operands)))
    return call.first(_calls((text, backend), call), tensors)


def _backward(gy: Tensor, x: Tensor, operands: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    chain, call = backward_chain(operands, *arguments), Backward(*arguments)
    device = checked((x, *operands), chain.operands)
    check_gradient(gy, x, operands, device)
    backend = registry.resolve(call.backend, chain, device)
    calls = _calls((call.chain, call.backend), ShortCall(syntax.parse(call.chain), backend))
    wanted, run = (call.order, *call.needs), lambda: backend.backward(chain, gy, x, operands, call.needs)
    return list(recorded(calls, (gy, x, *operands), wanted, run))


def _forward_fake(x: Tensor, operands: Sequence[Tensor], text: str, backend: str) -> Tensor:
    check_shapes((x, *operands), forward_chain(operands, text, backend).operands)
    return empty_result(x, operands)


def _backward_fake(gy: Tensor, x: Tensor, operands: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    backward_chain(operands, *arguments)
    check_gradient(gy, x, operands)
    y = empty_result(x, operands)
    wanted = [t for t, need in zip((x, *operands), Backward(*arguments).needs, strict=True) if need]
    return [torch.empty_like(y, dtype=t.dtype) if _same_shape(t, y) else t.new_empty(t.shape) for t in wanted]


def _same_shape(t: Tensor, y: Tensor) -> bool:
    """Return True if they have one shape, as far as symbolic sizes are known."""
    if t.dim() != y.dim():
        return False
    if all(type(n) is int for n in (*t.shape, *y.shape)):
        return t.shape == y.shape
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # which has been imported by then

    return all(statically_known_true(a == b) for a, b in zip(t.shape, y.shape, strict=True))


# ---- autograd --------------------------------------------------------------------------------------------------------


def _forward_autograd(keyset: Any, x: Tensor, operands: Sequence[Tensor], *arguments: Any) -> Tensor:
    tensors = (x, *operands)
    below = lambda keys: function.forward_op.redispatch(keys, x, operands, *arguments)
    return differentiably(keyset, lambda: function.apply(Forward(*arguments), *tensors), below, tensors)


def _backward_autograd(keyset: Any, gy: Tensor, x: Tensor, operands: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    call, tensors = Backward(*arguments), (gy, x, *operands)
    if forward_mode(tensors):  # compute it by functions that torch has tangents for
        check_gradient(gy, x, operands)
        return list(call.reference(*tensors))
    below = lambda keys: function.backward_op.redispatch(keys, gy, x, operands, *arguments)
    return list(differentiably(keyset, lambda: function.apply(call, *tensors), below, tensors))


# Where this torch lacks the names that make a Function an op's Autograd kernel, torch's own way takes these.


def _keep_forward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, operands, *arguments = inputs
    ctx.call = Forward(*arguments)
    ctx.save_for_backward(x, *operands)


def _forward_rule(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    of_x, of_operands = ctx.needs_input_grad[:2]
    _, gx, *rest = ctx.call.gradients((False, of_x, *of_operands), (gy,), ctx.saved_tensors)
    return gx, rest, None, None


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gy, x, operands, *arguments = inputs
    ctx.call = Backward(*arguments)
    ctx.save_for_backward(gy, x, *operands)


def _backward_rule(ctx: Any, cotangents: Sequence[Tensor]) -> tuple[Any, ...]:
    of_gy, of_x, of_operands = ctx.needs_input_grad[:3]
    _, ggy, gx, *rest = ctx.call.gradients((False, of_gy, of_x, *of_operands), cotangents, ctx.saved_tensors)
    return ggy, gx, rest, None, None, None, None


# ---- vmap ------------------------------------------------------------------------------------------------------------


def _backward_legacy_vmap(gy: Tensor, x: Tensor, operands: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    """Implement the vmap of torch.autograd.grad(is_grads_batched=True), which supports no op that returns a list."""
    return list(Backward(*arguments).reference(gy, x, *operands))


def _operand_dims(dims: Any, operands: Sequence[Tensor]) -> list[int | None]:
    return list(dims) if dims else [None] * len(operands)


def _forward_vmap(
    info: Any, dims: tuple[Any, ...], x: Tensor, operands: Sequence[Tensor], *arguments: Any
) -> tuple[Tensor, int]:
    return Forward(*arguments).batched((x, *operands), (dims[0], *_operand_dims(dims[1], operands)))


def _backward_vmap(
    info: Any, dims: tuple[Any, ...], gy: Tensor, x: Tensor, operands: Sequence[Tensor], *arguments: Any
) -> tuple[list[Tensor], list[int]]:
    backward_chain(operands, *arguments)
    places = (*dims[:2], *_operand_dims(dims[2], operands))
    sample, *shapes = [sample_shape(t, d) for t, d in zip((gy, x, *operands), places, strict=True)]
    check_shape(sample, shapes)
    # Every sample has its own gradient, also for an input that all samples share.
    size = info.batch_size
    batched = [t.expand(size, *t.shape[1:]) for t in batch_first((gy, x, *operands), places)]
    call = Backward(*arguments)
    gradients = call(batched)
    wanted = [shape for shape, need in zip(shapes, call.needs, strict=True) if need]
    return [g.reshape(size, *shape) for g, shape in zip(gradients, wanted, strict=True)], [0] * len(gradients)


IMPLEMENTED: dict[str, dict[str, Callable[..., Any]]] = {
    "forward": {
        "CPU": _forward,
        "CUDA": _forward,
        "fake": _forward_fake,
        "vmap": _forward_vmap,
        "Autograd": _forward_autograd,
        "setup_context": _keep_forward,
        "backward": _forward_rule,
    },
    "backward": {
        "CPU": _backward,
        "CUDA": _backward,
        "Batched": _backward_legacy_vmap,
        "fake": _backward_fake,
        "vmap": _backward_vmap,
        "Autograd": _backward_autograd,
        "setup_context": _keep_backward,
        "backward": _backward_rule,
    },
}
for _name, _functions in IMPLEMENTED.items():
    definition.implement(_name, **_functions)

_SKIPPED = [
    *(f for functions in IMPLEMENTED.values() for f in functions.values() if "_rule" not in f.__name__),
    *(ChainFunction.forward, ChainFunction.setup_context, ChainFunction.backward, ChainFunction.jvp),
    *(getattr(c, name) for c in (Forward, Backward, ShortCall) for name in ("result", "gradients")),
    *(Forward.__call__, Forward.dispatched, Backward.__call__, Backward.dispatched, ShortCall.first, empty_result),
]
torch_private.skip_frames([definition.entry(), *(f.__code__ for f in _SKIPPED)])
