"""Define the op and the one autograd.Function that every backend shares.

`ChainFunction` is not wrapped around the op `dualop::forward`; it is the op's kernel for the Autograd key. So
everything that traces, fakes, exports or shards sees one op, and functorch meets the Function. Its backward is an op of
its own, `dualop::backward`: one kernel for all gradients, differentiable through the same Function.

Rejected: a Function above the op (torch.compile and export look into it, dispatch modes do not see it); custom_op with
register_autograd (torch.func.grad fails, forward mode silently gives zeros).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import is_tensor_like

import dualop
from dualop import replay, torch_private, versions
from dualop.backends import registry
from dualop.backends.reference import reference_gradients, result_dtype
from dualop.language.slopes import parse, slope
from dualop.language.syntax import Chain
from dualop.launch.layout import check_shapes, checked, device_of, validate
from dualop.op import autograd_kernel, definition, dtensor, eager
from dualop.op.autograd_kernel import below_function, differentiably, forward_mode, have_tangents
from dualop.op.calls import backward_chain, check_gradient, check_shape, forward_chain
from dualop.replay import known
from dualop.torch_private import FUNCTION, transforms_active

dualop._watch_no_more()
if versions.of(torch.__version__) not in versions.TORCH:
    autograd_kernel.try_out()
    eager.try_out()

definition.define()
_forward_op = torch.ops.dualop.forward.default
_backward_op = torch.ops.dualop.backward.default


def run(chain: Chain, x: Any, operands: Sequence[Tensor], backend: str | None) -> Tensor:
    """Run one call of a chain: check the tensors, resolve the backend once, dispatch or take the short way."""
    if not is_compiling():
        calls = known.get((chain.text, registry.requested() if backend is None else backend))
        y = None if calls is None else calls(x, operands)
        if y is not None and y is not False:
            return y
    tensors = (x, *operands)
    if eager.unwatched(tensors):
        device, asked = checked(tensors, chain.operands), registry.requested(backend)
        chosen = registry.resolve(asked, chain, device)
        calls = replay.calls(chain.text, asked, chosen.name, apply) if chosen.replays else None
        arguments = (chain.text, chosen.name)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return apply(calls, arguments, *tensors)
        return eager.forward(calls, arguments, tensors)
    if any(not isinstance(t, Tensor) and is_tensor_like(t) for t in tensors):  # a proxy: a node of torch.fx's graph
        return _forward_op(x, list(operands), chain.text, registry.requested(backend))
    validate(x, operands, chain.operands)
    name = registry.requested(backend)
    if dtensor.lacks_rules(tensors):
        return dtensor.without_rules(chain, x, operands, name)
    if not is_compiling() and x.device.type != "meta":
        name = registry.resolve(name, chain, device_of(x, operands)).name
    return _operate(_forward_op, (chain.text, name), tensors)


def _forward(x: Tensor, operands: Sequence[Tensor], chain: str, backend: str) -> Tensor:
    parsed = forward_chain(operands, chain, backend)
    device = checked((x, *operands), parsed.operands)
    return registry.resolve(backend, parsed, device).forward(parsed, x, operands)


def _backward(
    gy: Tensor, x: Tensor, operands: Sequence[Tensor], chain: str, backend: str, needs: Sequence[bool]
) -> list[Tensor]:
    parsed = backward_chain(operands, chain, backend, needs)
    device = checked((x, *operands), parsed.operands)
    check_gradient(gy, x, operands)
    chosen = registry.resolve(backend, parsed, device)
    return chosen.backward(parsed, gy, x, operands, needs)


def _forward_fake(x: Tensor, operands: Sequence[Tensor], chain: str, backend: str) -> Tensor:
    check_shapes((x, *operands), forward_chain(operands, chain, backend).operands)
    return _result_fake(x, operands)


def _result_fake(x: Tensor, operands: Sequence[Tensor]) -> Tensor:
    y = x
    for operand in operands:
        y = y + operand
    return torch.empty_like(y)


def _backward_fake(
    gy: Tensor, x: Tensor, operands: Sequence[Tensor], chain: str, backend: str, needs: Sequence[bool]
) -> list[Tensor]:
    backward_chain(operands, chain, backend, needs)
    check_gradient(gy, x, operands)
    y = _result_fake(x, operands)
    wanted = [t for t, need in zip((x, *operands), needs, strict=True) if need]
    return [torch.empty_like(y, dtype=t.dtype) if _same_shape(t, y) else t.new_empty(t.shape) for t in wanted]


def _same_shape(t: Tensor, y: Tensor) -> bool:
    """Return True if they have one shape, as far as symbolic sizes are known."""
    if t.dim() != y.dim():
        return False
    if all(type(n) is int for n in (*t.shape, *y.shape)):
        return t.shape == y.shape
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # which has been imported by then

    return all(statically_known_true(a == b) for a, b in zip(t.shape, y.shape, strict=True))


class ChainFunction(torch.autograd.Function):
    """Apply an op of dualop with its derivatives, for every backend: apply(op, arguments, *tensors).

    `tensors` are (x, *operands) for the forward op and (gy, x, *operands) for the backward op; `arguments` are the op's
    others. On the short way (dualop/op/eager.py) of the forward op, `op` is what dualop/replay knows of its calls or
    None, and the backend is resolved. The Function saves the tensors and nothing else. The derivative of the forward op
    is the backward op. The derivative of the backward op is the backward op of the chain's slope
    (dualop/language/slopes.py) where there is one, else the reference's: torch's own functions, which torch can
    differentiate to any order.
    """

    @staticmethod
    def forward(op: Any, arguments: tuple[Any, ...], *tensors: Tensor) -> Any:
        if op is not _forward_op and op is not _backward_op:
            return eager.forward(op, arguments, tensors)
        if not FUNCTION.works:
            return _call(op, arguments, tensors)
        with below_function():
            return _call(op, arguments, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op, ctx.arguments = inputs[0], inputs[1]
        tensors = inputs[2:]
        ctx.save_for_backward(*tensors)
        if ctx.op is _forward_op or ctx.op is _backward_op:
            ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        op, tensors = ctx.op, ctx.saved_tensors  # read once: a checkpoint recomputes them then, and returns them once
        short = op is not _forward_op and op is not _backward_op and not is_compiling()
        found: Any = False
        if short and op is not None:
            found = op.backward(ctx.needs_input_grad, cotangents[0], *tensors)
        if found:
            return found
        needs = list(ctx.needs_input_grad[2:])
        if op is _backward_op:
            wanted: Sequence[Tensor] = _second(ctx.arguments, cotangents, tensors, needs)
        elif short and not torch.is_grad_enabled() and eager.unwatched((cotangents[0], *tensors)):
            wanted = eager.backward(op if found is None else None, ctx.arguments, cotangents[0], tensors, needs)
        else:
            wanted = _gradients(ctx.arguments, cotangents[0], tensors, needs)
        gradients = iter(wanted)
        return None, None, *[next(gradients) if need else None for need in needs]

    @staticmethod
    def jvp(ctx: Any, _op: None, _arguments: None, *tangents: Tensor | None) -> Tensor:
        # This serves the forward op only: see _backward_autograd.
        # The chain is pointwise: with every input at the result's shape, the gradients of its sum are the derivatives.
        dtype = _result_fake(ctx.saved_tensors[0], ctx.saved_tensors[1:]).dtype
        device = device_of(ctx.saved_tensors[0], ctx.saved_tensors[1:])  # a number may lie on the CPU
        x, *operands = torch.broadcast_tensors(*[t.to(device) for t in ctx.saved_tensors])
        y = _result_fake(x, operands)
        arguments = (*ctx.arguments, [t is not None for t in tangents])
        with nullcontext() if FUNCTION.works else torch.enable_grad():
            derivatives = _operate(_backward_op, arguments, (torch.ones_like(y), x, *operands))
        # Reverse over forward mode at one level needs the products in its graph; functorch has a level for each.
        with below_function() if FUNCTION.works and transforms_active() else nullcontext():
            terms = [d * t for d, t in zip(derivatives, [t for t in tangents if t is not None], strict=True)]
            return sum(terms[1:], terms[0]).to(dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], op: Any, arguments: tuple[Any, ...], *tensors: Tensor) -> Any:
        # This serves where the Function is applied above the forward op; otherwise the ops' own rules do.
        return _forward_vmap(info, (in_dims[2], in_dims[3:]), tensors[0], tensors[1:], *arguments)


def _operate(op: Any, arguments: tuple[Any, ...], tensors: Sequence[Tensor]) -> Any:
    """Return the op's result, with whatever derivatives and transforms are active.

    The op's own Autograd kernel handles them. Without the private names that this needs, the Function is applied above
    the forward op in the public way (Dynamo refuses a Function with a jvp, but traces the op), and a gradient that may
    be differentiated again is made of torch's own functions.
    """
    if FUNCTION.works or is_compiling():
        return _call(op, arguments, tensors)
    if op is _forward_op:
        return ChainFunction.apply(op, arguments, *tensors)
    if torch.is_grad_enabled() or have_tangents(tensors):
        return _reference_gradients(*arguments)(*tensors)
    return _call(op, arguments, tensors)


def _call(op: Any, arguments: tuple[Any, ...], tensors: Sequence[Tensor]) -> Any:
    if op is _forward_op:
        return op(tensors[0], tensors[1:], *arguments)
    return tuple(op(tensors[0], tensors[1], tensors[2:], *arguments))


def _gradients(
    arguments: tuple[str, str], gy: Tensor, tensors: Sequence[Tensor], needs: list[bool]
) -> Sequence[Tensor]:
    """Return the derivative of the forward op: the gradients of those of (x, *operands) that `needs` asks for."""
    return _operate(_backward_op, (*arguments, needs), (gy, *tensors))


def _second(
    arguments: tuple[Any, ...], cotangents: Sequence[Tensor], tensors: Sequence[Tensor], needs: list[bool]
) -> Sequence[Tensor]:
    """Return the derivative of the backward op: the gradients of those of (gy, x, *operands) that `needs` asks for."""
    chain, backend, _ = arguments
    sloped = slope(chain)
    if sloped is None:
        outputs = torch.func.vjp(_reference_gradients(*arguments), *tensors)
        return [g for g, need in zip(outputs[1](tuple(cotangents)), needs, strict=True) if need]
    gy, x = tensors
    return _operate(_backward_op, (sloped, backend, needs[::-1]), (cotangents[0], x, gy))[::-1]


def _reference_gradients(chain: str, _backend: str, needs: Sequence[bool]) -> Callable[..., tuple[Tensor, ...]]:
    """Return the backward op as a function of (gy, x, *operands), made of torch's differentiable functions."""
    return lambda gy, x, *operands: tuple(reference_gradients(parse(chain), gy, x, operands, needs))


# A node of one level, as torch's own transforms make it, without the detour through functorch.
apply = torch_private.single_level(ChainFunction).apply


def _forward_autograd(keyset: Any, x: Tensor, operands: Sequence[Tensor], chain: str, backend: str) -> Tensor:
    arguments, tensors = (chain, backend), (x, *operands)
    below = lambda keys: _forward_op.redispatch(keys, x, operands, *arguments)
    return differentiably(keyset, lambda: apply(_forward_op, arguments, *tensors), below, tensors)


def _backward_autograd(
    keyset: Any, gy: Tensor, x: Tensor, operands: Sequence[Tensor], chain: str, backend: str, needs: Sequence[bool]
) -> list[Tensor]:
    arguments, tensors = (chain, backend, list(needs)), (gy, x, *operands)
    backward_chain(operands, *arguments)
    check_gradient(gy, x, operands)
    if forward_mode(tensors):  # compute it by functions that torch has tangents for
        return list(_reference_gradients(*arguments)(*tensors))
    below = lambda keys: _backward_op.redispatch(keys, gy, x, operands, *arguments)
    return list(differentiably(keyset, lambda: apply(_backward_op, arguments, *tensors), below, tensors))


def _backward_legacy_vmap(
    gy: Tensor, x: Tensor, operands: Sequence[Tensor], chain: str, backend: str, needs: Sequence[bool]
) -> list[Tensor]:
    """Implement the vmap of torch.autograd.grad(is_grads_batched=True), which supports no op that returns a list."""
    return list(_reference_gradients(chain, backend, needs)(gy, x, *operands))


def _keep_forward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, operands, *arguments = inputs
    ctx.arguments = tuple(arguments)
    ctx.save_for_backward(x, *operands)


def _forward_rule(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    of_x, of_operands = ctx.needs_input_grad[:2]
    needs = [of_x, *of_operands]
    found = iter(_gradients(ctx.arguments, gy, ctx.saved_tensors, needs))
    gx, *rest = [next(found) if need else None for need in needs]
    return gx, rest, None, None


def _keep_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    gy, x, operands, *arguments = inputs
    ctx.arguments = tuple(arguments)
    ctx.save_for_backward(gy, x, *operands)


def _backward_rule(ctx: Any, cotangents: Sequence[Tensor]) -> tuple[Any, ...]:
    of_gy, of_x, of_operands = ctx.needs_input_grad[:3]
    needs = [of_gy, of_x, *of_operands]
    found = iter(_second(ctx.arguments, cotangents, ctx.saved_tensors, needs))
    ggy, gx, *rest = [next(found) if need else None for need in needs]
    return ggy, gx, rest, None, None, None


def _batched(tensors: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
    """Move the batch dimension first and pad with dimensions of size 1 to a common rank, which keeps broadcasting."""
    rank = max(t.dim() - (d is not None) for t, d in zip(tensors, dims, strict=True))
    moved = [t.unsqueeze(0) if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
    return [t.reshape(t.shape[0], *[1] * (rank + 1 - t.dim()), *t.shape[1:]) for t in moved]


def _operand_dims(dims: Any, operands: Sequence[Tensor]) -> list[int | None]:
    return list(dims) if dims else [None] * len(operands)


def _forward_vmap(
    info: Any, dims: tuple[Any, ...], x: Tensor, operands: Sequence[Tensor], chain: str, backend: str
) -> tuple[Tensor, int]:
    tensors, places = (x, *operands), (dims[0], *_operand_dims(dims[1], operands))
    # One number per sample promotes as a number does, although one tensor holds the numbers of all samples.
    sample = [t if d is None else t.new_empty(t.movedim(d, 0).shape[1:]) for t, d in zip(tensors, places, strict=True)]
    x, *operands = _batched(tensors, places)
    return _operate(_forward_op, (chain, backend), (x, *operands)).to(result_dtype(sample[0], sample[1:])), 0


def _backward_vmap(
    info: Any,
    dims: tuple[Any, ...],
    gy: Tensor,
    x: Tensor,
    operands: Sequence[Tensor],
    chain: str,
    backend: str,
    needs: Sequence[bool],
) -> tuple[list[Tensor], list[int]]:
    backward_chain(operands, chain, backend, needs)
    inputs = (x, *operands)
    shapes = [
        t.shape if d is None else t.movedim(d, 0).shape[1:]
        for t, d in zip(inputs, (dims[1], *_operand_dims(dims[2], operands)), strict=True)
    ]
    check_shape(gy.shape if dims[0] is None else gy.movedim(dims[0], 0).shape[1:], shapes)
    gy, *batched = _batched((gy, *inputs), (dims[0], dims[1], *_operand_dims(dims[2], operands)))
    # Every sample has its own gradient, also for an input that all samples share.
    size = info.batch_size
    x, *operands = [t.expand(size, *t.shape[1:]) for t in batched]
    gy = gy.expand(size, *gy.shape[1:])
    gradients = _operate(_backward_op, (chain, backend, needs), (gy, x, *operands))
    wanted = [shape for shape, need in zip(shapes, needs, strict=True) if need]
    return [g.reshape(size, *shape) for g, shape in zip(gradients, wanted, strict=True)], [0] * len(gradients)


definition.implement(
    "forward",
    CPU=_forward,
    CUDA=_forward,
    fake=_forward_fake,
    vmap=_forward_vmap,
    Autograd=_forward_autograd,
    setup_context=_keep_forward,
    backward=_forward_rule,
)
definition.implement(
    "backward",
    CPU=_backward,
    CUDA=_backward,
    Batched=_backward_legacy_vmap,
    fake=_backward_fake,
    vmap=_backward_vmap,
    Autograd=_backward_autograd,
    setup_context=_keep_backward,
    backward=_backward_rule,
)

_KERNELS = (
    *(_forward, _backward, _forward_autograd, _backward_autograd, _forward_fake, _backward_fake, _result_fake),
    *(_forward_vmap, _backward_vmap, ChainFunction.forward, ChainFunction.setup_context),
    *(ChainFunction.backward, ChainFunction.jvp, _gradients, _second),
)
torch_private.skip_frames([definition.entry(), *(kernel.__code__ for kernel in _KERNELS)])
