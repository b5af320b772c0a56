"""Define the one autograd.Function that every backend shares, and the calls that it is applied to.

`ChainFunction` is not wrapped around the op `dualop::forward`; it is the op's kernel for the Autograd key. So
everything that traces, fakes, exports or shards sees one op, and functorch meets the Function. Its backward is an op of
its own, `dualop::backward`: one kernel for all gradients, differentiable through the same Function. Where nothing
observes a call, the Function is applied to a `ShortCall`, which goes past the dispatcher.

Rejected: a Function above the op (torch.compile and export look into it, dispatch modes do not see it); custom_op with
register_autograd (torch.func.grad fails, forward mode silently gives zeros).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from dualop import replay, torch_private
from dualop.backends.base import Backend
from dualop.backends.reference import reference_gradients, result_dtype
from dualop.language import slopes
from dualop.language.syntax import Chain
from dualop.op import definition, eager
from dualop.op.autograd_kernel import below_function, have_tangents
from dualop.op.calls import backward_chain
from dualop.replay.record import recorded
from dualop.torch_private import FUNCTION, transforms_active

definition.define()
forward_op = torch.ops.dualop.forward.default
backward_op = torch.ops.dualop.backward.default

Gradients = tuple[Tensor | None, ...]  # of the Function's arguments: None for the call and for what nobody needs


class ChainFunction(torch.autograd.Function):
    """Apply a call with its derivatives: apply(call, *tensors). It saves the tensors and nothing else."""

    @staticmethod
    def forward(call: Call, *tensors: Tensor) -> Any:
        return call.result(tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)
        if not isinstance(ctx.call, ShortCall):
            ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Gradients:
        return ctx.call.gradients(ctx.needs_input_grad, cotangents, ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, _call: None, *tangents: Tensor | None) -> Tensor:
        # This serves the forward op only: the backward op's Autograd kernel takes torch's functions in forward mode.
        return ctx.call.tangent(ctx.saved_tensors, tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], call: Forward, *tensors: Tensor) -> tuple[Tensor, int]:
        # This serves where the Function is applied above the forward op; otherwise the ops' own rules do.
        return call.batched(tensors, in_dims[1:])


# A node of one level, as torch's own transforms make it, without the detour through functorch.
apply = torch_private.single_level(ChainFunction).apply


class Call(ABC):
    """Describe what the Function computes of its tensors, and the derivative of that."""

    @abstractmethod
    def result(self, tensors: Sequence[Tensor]) -> Any:
        """Return the result within the Function's forward, so without a graph."""

    @abstractmethod
    def gradients(self, needs: Sequence[bool], cotangents: Sequence[Tensor], tensors: Sequence[Tensor]) -> Gradients:
        """Return what the Function's backward returns. `needs` is ctx.needs_input_grad, the call's False in front."""


# These are not frozen, since the Dynamo of torch 2.11 cannot trace how a frozen dataclass is made.
@dataclass(eq=False)
class Forward(Call):
    """Call `dualop::forward` with (x, *operands)."""

    chain: str
    backend: str

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the result, with whatever derivatives and transforms are active.

        The op's own Autograd kernel handles them. Without the private names that this needs, the Function is applied
        above the op in the public way; Dynamo refuses a Function with a jvp, but traces the op.
        """
        if FUNCTION.works or is_compiling():
            return self.dispatched(tensors)
        return ChainFunction.apply(self, *tensors)

    def dispatched(self, tensors: Sequence[Tensor]) -> Tensor:
        return forward_op(tensors[0], tensors[1:], self.chain, self.backend)

    def result(self, tensors: Sequence[Tensor]) -> Tensor:
        with below_function() if FUNCTION.works else nullcontext():
            return self.dispatched(tensors)

    def gradients(self, needs: Sequence[bool], cotangents: Sequence[Tensor], tensors: Sequence[Tensor]) -> Gradients:
        return _spread(Backward(self.chain, self.backend, needs[1:])((cotangents[0], *tensors)), needs)

    def tangent(self, tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Tensor:
        """Return the directional derivative along `tangents`, for forward mode.

        A chain is pointwise: with every input at the result's shape, the gradients of its sum are the derivatives.
        """
        y = empty_result(tensors[0], tensors[1:])
        device = next((t.device for t in tensors if t.dim()), tensors[0].device)  # a number may lie on the CPU
        inputs = torch.broadcast_tensors(*[t.to(device) for t in tensors])
        ones = torch.ones_like(empty_result(inputs[0], inputs[1:]))
        with nullcontext() if FUNCTION.works else torch.enable_grad():
            derivatives = Backward(self.chain, self.backend, [t is not None for t in tangents])((ones, *inputs))
        # Reverse over forward mode at one level needs the products in its graph; functorch has a level for each.
        with below_function() if FUNCTION.works and transforms_active() else nullcontext():
            terms = [d * t for d, t in zip(derivatives, [t for t in tangents if t is not None], strict=True)]
            return sum(terms[1:], terms[0]).to(y.dtype)

    def batched(self, tensors: Sequence[Tensor], dims: Sequence[int | None]) -> tuple[Tensor, int]:
        """Return the results of all samples, and their batch dimension: the forward op's rule for vmap."""
        # One number per sample promotes as a number does, although one tensor holds the numbers of all samples.
        samples = [t if d is None else t.new_empty(sample_shape(t, d)) for t, d in zip(tensors, dims, strict=True)]
        return self(batch_first(tensors, dims)).to(result_dtype(samples[0], samples[1:])), 0


@dataclass(eq=False)
class Backward(Call):
    """Call `dualop::backward` with (gy, x, *operands): the derivative of the forward op.

    Its own derivative is the backward op of order 2 where the chain has a slope (dualop/language/slopes.py), else the
    reference's: torch's own functions, which torch can differentiate to any order.
    """

    chain: str
    backend: str
    needs: Sequence[bool]
    order: int = 1

    def __call__(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the gradients that `needs` asks for, with whatever derivatives and transforms are active.

        Without the private names that the op's Autograd kernel needs, a gradient that may be differentiated again is
        made of torch's own functions.
        """
        if FUNCTION.works or is_compiling() or not (torch.is_grad_enabled() or have_tangents(tensors)):
            return self.dispatched(tensors)
        return self.reference(*tensors)

    def dispatched(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        needs = list(self.needs)
        return tuple(backward_op(tensors[0], tensors[1], tensors[2:], self.chain, self.backend, needs, self.order))

    def result(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with below_function() if FUNCTION.works else nullcontext():
            return self.dispatched(tensors)

    def reference(self, gy: Tensor, x: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        """Return the same, made of torch's differentiable functions."""
        chain = backward_chain(operands, self.chain, self.backend, self.needs, self.order)
        return tuple(reference_gradients(chain, gy, x, operands, self.needs))

    def gradients(self, needs: Sequence[bool], cotangents: Sequence[Tensor], tensors: Sequence[Tensor]) -> Gradients:
        if self.order == 1 and slopes.has_slope(self.chain):
            gy, x = tensors
            of_gy, of_x = needs[1:]
            found = Backward(self.chain, self.backend, (of_x, of_gy), order=2)((cotangents[0], x, gy))
            return _spread(reversed(found), needs)
        derivative = torch.func.vjp(self.reference, *tensors)[1]
        return (None, *[g if need else None for g, need in zip(derivative(tuple(cotangents)), needs[1:], strict=True)])


@dataclass(eq=False)
class ShortCall(Call):
    """Call a resolved backend with (x, *operands), checked and unobserved; C++ replays what is known of such calls."""

    chain: Chain
    backend: Backend

    def result(self, tensors: Sequence[Tensor]) -> Tensor:
        calls = replay.known.get((self.chain.text, self.backend.name))
        if calls is not None and (y := calls(tensors[0], tensors[1:])) is not None:
            return y
        return self.first(calls, tensors)

    def first(self, calls: Any, tensors: Sequence[Tensor]) -> Tensor:
        """Return the result by way of Python; `calls` learns of it."""
        run = lambda: (self.backend.forward(self.chain, tensors[0], tensors[1:]),)
        return recorded(calls, tensors, None, run)[0]

    def gradients(self, needs: Sequence[bool], cotangents: Sequence[Tensor], tensors: Sequence[Tensor]) -> Gradients:
        gy = cotangents[0]
        calls = None if is_compiling() else replay.known.get((self.chain.text, self.backend.name))
        if calls is not None and (found := calls.backward(needs, gy, *tensors)) is not None:
            return found
        if torch.is_grad_enabled() or not eager.unwatched((gy, *tensors)):
            return Forward(self.chain.text, self.backend.name).gradients(needs, cotangents, tensors)
        run = lambda: self.backend.backward(self.chain, gy, tensors[0], tensors[1:], needs[1:])
        return _spread(recorded(calls, (gy, *tensors), (1, *needs[1:]), run), needs)


def _spread(found: Iterable[Tensor], needs: Sequence[bool]) -> Gradients:
    """Return these gradients at the places that `needs` names, None at the others."""
    rest = iter(found)
    return tuple([next(rest) if need else None for need in needs])


def empty_result(x: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """Return memory of the result's form, as torch's own addition promotes, broadcasts and lays it out."""
    y = x
    for operand in operands:
        y = y + operand
    return torch.empty_like(y)


def batch_first(tensors: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
    """Move the batch dimension first and pad with dimensions of size 1 to a common rank, which keeps broadcasting."""
    rank = max(t.dim() - (d is not None) for t, d in zip(tensors, dims, strict=True))
    moved = [t.unsqueeze(0) if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims, strict=True)]
    return [t.reshape(t.shape[0], *[1] * (rank + 1 - t.dim()), *t.shape[1:]) for t in moved]


def sample_shape(tensor: Tensor, dim: int | None) -> torch.Size:
    """Return the shape of one sample of a tensor with this batch dimension."""
    return tensor.shape if dim is None else tensor.movedim(dim, 0).shape[1:]
