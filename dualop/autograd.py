"""The op and the one autograd.Function that every backend shares.

`ChainFunction` is not wrapped around the op `dualop::forward`, it is the op's kernel for the Autograd key: so whatever
traces, fakes, exports or shards sees one op, and functorch meets the Function. Its backward is an op of its own,
`dualop::backward`: one kernel for all gradients, differentiable through the same Function.

Rejected: a Function above the op (torch.compile and export look into it, dispatch modes do not see it);
custom_op with register_autograd (torch.func.grad fails, forward mode silently gives zeros).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _after_autograd_keyset as _AFTER_AUTOGRAD
from torch._C import _any_requires_grad, _are_functorch_transforms_active
from torch._C import _AutoDispatchBelowAutograd as _BelowAutograd
from torch._C._dynamo import eval_frame
from torch._C._functorch import TransformType, is_legacy_batchedtensor, peek_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.compiler import is_compiling
from torch.overrides import is_tensor_like

from dualop import chains, direct, distributed, native, ops, registry
from dualop.backends.reference import reference_gradients, result_dtype
from dualop.chains import Chain
from dualop.layout import checked, device_of, validate
from dualop.native import known
from dualop.slopes import parse, slope

ops.define()
_forward_op = torch.ops.dualop.forward.default
_backward_op = torch.ops.dualop.backward.default


def run(chain: Chain, x: Any, operands: Sequence[Tensor], backend: str | None) -> Tensor:
    """One call of a chain: check the tensors, resolve the backend once, dispatch or take the short way."""
    if not is_compiling():
        calls = known.get((chain.text, registry.requested() if backend is None else backend))
        y = None if calls is None else calls(x, operands)
        if y is not None and y is not False:
            return y
    tensors = (x, *operands)
    if direct.unwatched(tensors):
        device, asked = checked(tensors, chain.operands), registry.requested(backend)
        chosen = registry.resolve(asked, chain, device).name
        calls, arguments = native.calls(chain.text, asked, chosen), (chain.text, chosen)
        if torch.is_grad_enabled() and _any_requires_grad(*tensors):
            return apply(calls, arguments, *tensors)
        return direct.forward(calls, arguments, tensors)
    if any(not isinstance(t, Tensor) and is_tensor_like(t) for t in tensors):  # a proxy: a node of torch.fx's graph
        return _forward_op(x, list(operands), chain.text, registry.requested(backend))
    validate(x, operands, chain.operands)
    distributed.know_dtensor()
    name = registry.requested(backend)
    if not is_compiling() and x.device.type != "meta":
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
    wanted = [t for t, need in zip((x, *operands), needs, strict=True) if need]
    return [torch.empty_like(y, dtype=t.dtype) if t.shape == y.shape else t.new_empty(t.shape) for t in wanted]


class ChainFunction(torch.autograd.Function):
    """apply(op, arguments, *tensors): both ops of dualop with their derivatives, for every backend.

    `tensors` are (x, *operands) for the forward op and (gy, x, *operands) for the backward op, `arguments` the op's
    others. On the short way (dualop/direct.py) of the forward op, `op` is what dualop/native knows of its calls or
    None, and the backend is resolved. It saves the tensors and nothing else. The derivative of the forward op is the
    backward op; that one's is the backward op of the chain's slope (dualop/slopes.py) where there is one, else the
    reference's, by torch's own functions, which torch can differentiate without end.
    """

    @staticmethod
    def forward(op: Any, arguments: tuple[Any, ...], *tensors: Tensor) -> Any:
        if op is not _forward_op and op is not _backward_op:
            return direct.forward(op, arguments, tensors)
        if not _are_functorch_transforms_active():
            with _BelowAutograd():
                return _call(op, arguments, tensors)
        with _outer_levels():
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
        op, tensors = ctx.op, ctx.saved_tensors  # read once: a checkpoint computes them then, and gives them out once
        short = op is not _forward_op and op is not _backward_op and not is_compiling()
        found: Any = False
        if short and op is not None:
            found = op.backward(ctx.needs_input_grad, cotangents[0], *tensors)
        if found:
            return found
        needs = list(ctx.needs_input_grad[2:])
        if op is _backward_op:
            wanted: Sequence[Tensor] = _second(ctx.arguments, cotangents, tensors, needs)
        elif short and not torch.is_grad_enabled() and direct.unwatched((cotangents[0], *tensors)):
            wanted = direct.backward(op if found is None else None, ctx.arguments, cotangents[0], tensors, needs)
        else:
            wanted = _gradients(ctx.arguments, cotangents[0], tensors, needs)
        gradients = iter(wanted)
        return None, None, *[next(gradients) if need else None for need in needs]

    @staticmethod
    def jvp(ctx: Any, _op: None, _arguments: None, *tangents: Tensor | None) -> Tensor:
        # Of the forward op only: see _backward_autograd.
        # The chain is pointwise: with every input at the result's shape, the gradients of its sum are the derivatives.
        dtype = _forward_fake(ctx.saved_tensors[0], ctx.saved_tensors[1:], *ctx.arguments).dtype
        device = device_of(ctx.saved_tensors[0], ctx.saved_tensors[1:])  # a number may lie on the CPU
        x, *operands = torch.broadcast_tensors(*[t.to(device) for t in ctx.saved_tensors])
        y = _forward_fake(x, operands, *ctx.arguments)
        derivatives = _backward_op(torch.ones_like(y), x, operands, *ctx.arguments, [t is not None for t in tangents])
        # Reverse over forward mode of one level needs the products in its graph, functorch has a level for each.
        with _outer_levels() if _are_functorch_transforms_active() else nullcontext():
            terms = [d * t for d, t in zip(derivatives, [t for t in tangents if t is not None], strict=True)]
            return sum(terms[1:], terms[0]).to(dtype)


@contextmanager
def _outer_levels() -> Iterator[None]:
    """Continue at functorch's next level, whose gradients and tangents this level's apply() switched off."""
    with torch.enable_grad(), _set_fwd_grad_enabled(True), _BelowAutograd():
        yield


def _call(op: Any, arguments: tuple[Any, ...], tensors: Sequence[Tensor]) -> Any:
    if op is _forward_op:
        return op(tensors[0], tensors[1:], *arguments)
    return tuple(op(tensors[0], tensors[1], tensors[2:], *arguments))


def _gradients(arguments: tuple[str, str], gy: Tensor, tensors: Sequence[Tensor], needs: list[bool]) -> list[Tensor]:
    """The derivative of the forward op: the gradients of those of (x, *operands) that `needs` asks for."""
    chain, backend = arguments
    x, operands = tensors[0], tensors[1:]
    # torch.autograd.grad(is_grads_batched=True) is a vmap that knows no op with a list of results.
    if not is_compiling() and is_legacy_batchedtensor(gy):
        return reference_gradients(parse(chain), gy, x, operands, needs)
    return _backward_op(gy, x, operands, chain, backend, needs)


def _second(
    arguments: tuple[Any, ...], cotangents: Sequence[Tensor], tensors: Sequence[Tensor], needs: list[bool]
) -> list[Tensor]:
    """The derivative of the backward op: the gradients of those of (gy, x, *operands) that `needs` asks for."""
    chain, backend, _ = arguments
    sloped = slope(chain)
    if sloped is None or (not is_compiling() and is_legacy_batchedtensor(cotangents[0])):
        outputs = torch.func.vjp(_reference_gradients(*arguments), *tensors)
        return [g for g, need in zip(outputs[1](tuple(cotangents)), needs, strict=True) if need]
    gy, x = tensors
    return _backward_op(cotangents[0], x, [gy], sloped, backend, needs[::-1])[::-1]


def _reference_gradients(chain: str, _backend: str, needs: Sequence[bool]) -> Callable[..., tuple[Tensor, ...]]:
    """The backward op as a function of (gy, x, *operands) made of torch's differentiable functions."""
    return lambda gy, x, *operands: tuple(reference_gradients(parse(chain), gy, x, operands, needs))


apply = super(torch.autograd.Function, ChainFunction).apply  # the C++ apply: the Python one binds a signature, 25 us


def _differentiably(keyset: Any, op: Any, arguments: tuple[Any, ...], *tensors: Tensor) -> Any:
    """The Autograd kernel of both ops: a node if anybody may differentiate, else straight to the backend."""
    if _are_functorch_transforms_active():
        with enable_single_level_autograd_function():
            return apply(op, arguments, *tensors)
    if forward_ad._current_level < 0 and not (torch.is_grad_enabled() and _any_requires_grad(*tensors)):
        if op is _forward_op:
            return op.redispatch(keyset & _AFTER_AUTOGRAD, tensors[0], tensors[1:], *arguments)
        return op.redispatch(keyset & _AFTER_AUTOGRAD, tensors[0], tensors[1], tensors[2:], *arguments)
    return apply(op, arguments, *tensors)


def _forward_autograd(keyset: Any, x: Tensor, operands: Sequence[Tensor], chain: str, backend: str) -> Tensor:
    return _differentiably(keyset, _forward_op, (chain, backend), x, *operands)


def _backward_autograd(
    keyset: Any, gy: Tensor, x: Tensor, operands: Sequence[Tensor], chain: str, backend: str, needs: Sequence[bool]
) -> list[Tensor]:
    arguments = (chain, backend, list(needs))
    if _forward_mode():
        return list(_reference_gradients(*arguments)(gy, x, *operands))
    return list(_differentiably(keyset, _backward_op, arguments, gy, x, *operands))


def _forward_mode() -> bool:
    """Whether tangents may flow here: then the gradient is computed by functions that torch has tangents for."""
    if not torch._C._is_fwd_grad_enabled():  # as inside ChainFunction.jvp: this level is being taken care of
        return False
    if _are_functorch_transforms_active():
        return peek_interpreter_stack().key() == TransformType.Jvp
    return forward_ad._current_level >= 0


def _batched(tensors: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
    """The batch dimension first, then dimensions of size 1 up to a common rank, so that broadcasting still holds."""
    rank = max(t.dim() - (d is not None) for t, d in zip(tensors, dims, strict=True))
    moved = [t.unsqueeze(0) if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
    return [t.reshape(t.shape[0], *[1] * (rank + 1 - t.dim()), *t.shape[1:]) for t in moved]


def _operand_dims(dims: Any, operands: Sequence[Tensor]) -> list[int | None]:
    return list(dims) if dims else [None] * len(operands)


def _forward_vmap(
    info: Any, dims: tuple[Any, ...], x: Tensor, operands: Sequence[Tensor], chain: str, backend: str
) -> tuple[Tensor, int]:
    tensors, places = (x, *operands), (dims[0], *_operand_dims(dims[1], operands))
    # A number a sample promotes as a number does, though all samples' numbers lie in one tensor.
    sample = [t if d is None else t.select(d, 0) for t, d in zip(tensors, places, strict=True)]
    x, *operands = _batched(tensors, places)
    return _forward_op(x, operands, chain, backend).to(result_dtype(sample[0], sample[1:])), 0


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
    inputs = (x, *operands)
    shapes = [
        t.shape if d is None else t.movedim(d, 0).shape[1:]
        for t, d in zip(inputs, (dims[1], *_operand_dims(dims[2], operands)), strict=True)
    ]
    gy, *batched = _batched((gy, *inputs), (dims[0], dims[1], *_operand_dims(dims[2], operands)))
    # Every sample has a gradient of its own, also of an input that all samples share.
    size = info.batch_size
    x, *operands = [t.expand(size, *t.shape[1:]) for t in batched]
    gy = gy.expand(size, *gy.shape[1:])
    gradients = _backward_op(gy, x, operands, chain, backend, needs)
    wanted = [shape for shape, need in zip(shapes, needs, strict=True) if need]
    return [g.reshape(size, *shape) for g, shape in zip(gradients, wanted, strict=True)], [0] * len(gradients)


ops.implement(
    "forward", CPU=_forward, CUDA=_forward, Autograd=_forward_autograd, fake=_forward_fake, vmap=_forward_vmap
)
ops.implement(
    "backward", CPU=_backward, CUDA=_backward, Autograd=_backward_autograd, fake=_backward_fake, vmap=_backward_vmap
)

chains._run = run

# Around a compiled function that broke off, Dynamo tries to compile each Python function that it meets: not these.
_SKIP = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)
for _kernel in (
    *(_forward, _backward, _forward_autograd, _backward_autograd, _forward_fake, _backward_fake),
    *(_forward_vmap, _backward_vmap, ChainFunction.forward, ChainFunction.setup_context),
    *(ChainFunction.backward, ChainFunction.jvp, _gradients, _second),
):
    eval_frame.set_code_exec_strategy(_kernel.__code__, _SKIP)
eval_frame.set_code_exec_strategy(ops.entry(), _SKIP)
