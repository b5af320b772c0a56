"""Define how DTensor shards a chain: the rules of both ops, for torch.distributed.tensor.

A chain is pointwise, so whatever dimension of the result is sharded, every tensor that has this dimension is sharded
along with it, and one that is broadcast along it is replicated; that one's gradient is then a partial sum. Gradients
are linear in gy: of a partial gy they are partial, with no communication.

`know_dtensor` registers the rules as soon as torch.distributed.tensor has been imported, by whomever; dualop does not
import it. torch's public `register_sharding` is not used: it counts one result for an op that returns a list, and its
cache does not see which gradients are wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualop import torch_private
from dualop.backends.reference import reference
from dualop.errors import BackendUnavailable
from dualop.language.syntax import Chain

known = False


@torch_private.as_constant
def know_dtensor() -> bool:
    """Register the rules once if this process has DTensors; until then this costs one look into a dictionary."""
    global known
    if not known and "torch.distributed.tensor" in sys.modules:
        known = _register()
    return known


def lacks_rules(tensors: Sequence[Tensor]) -> bool:
    """Return True if one of these is a DTensor and this torch takes no rules for it."""
    know_dtensor()
    if torch_private.DTENSOR.works:
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(t, DTensor) for t in tensors)


def without_rules(chain: Chain, x: Tensor, operands: Sequence[Tensor], backend: str) -> Tensor:
    """Compute the chain of DTensors with torch's own functions. Raises BackendUnavailable for a named backend."""
    if backend not in ("auto", "reference"):
        raise BackendUnavailable(
            f"backend {backend} cannot run DTensors on torch {torch.__version__}: {torch_private.DTENSOR.why_not}. "
            "Backends that can: reference"
        )
    return reference(chain, x, operands)


def _register() -> bool:
    names = torch_private.sharding_names()
    if names is None:
        return True  # there is nothing more to be done
    propagator, schema_info, _ = names
    # All arguments behind the first tensor are part of the cache's key; operands are a list, hence pytree.
    info = schema_info(static_argnum=1, needs_pytree=True)
    propagator.register_op_strategy(torch.ops.dualop.forward.default, _forward_strategy, info)
    propagator.register_op_strategy(torch.ops.dualop.backward.default, _backward_strategy, info)
    return True


def sharded(shapes: Sequence[Sequence[int]]) -> list[tuple[Any, list[Any]]]:
    """Return (placement of the result, placement of each tensor) for one mesh dimension, one for each way to shard.

    The shapes broadcast together, and are sharded along each dimension of the result that has more than one element.
    """
    from torch.distributed.tensor import Replicate, Shard

    result = torch.broadcast_shapes(*shapes)
    found: list[tuple[Any, list[Any]]] = []
    for dim, size in enumerate(result):
        own = [dim - len(result) + len(shape) for shape in shapes]
        has = [d >= 0 and shape[d] == size for d, shape in zip(own, shapes, strict=True)]
        if size != 1:
            found.append((Shard(dim), [Shard(d) if h else Replicate() for d, h in zip(own, has, strict=True)]))
    return found


def _forward_strategy(schema: Any) -> Any:
    """Return the strategy of dualop::forward(x, operands, chain, backend) -> y."""
    from torch.distributed.tensor import Replicate

    shapes = _shapes(schema)
    rules = [[Replicate()] * (1 + len(shapes))]
    rules += [[result, *inputs] for result, inputs in sharded(shapes)]
    return _expand(schema, rules, 1)


def _backward_strategy(schema: Any) -> Any:
    """Return the strategy of dualop::backward(gy, x, operands, chain, backend, needs) -> the requested gradients."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    _, *shapes = _shapes(schema)
    needs = schema.args_schema[5]

    def rule(gy: Any, inputs: list[Any], gradients: list[Any]) -> list[Any]:
        return [*[g for g, need in zip(gradients, needs, strict=True) if need], gy, *inputs]

    replicated, partial = [Replicate()] * len(shapes), [Partial()] * len(shapes)
    rules = [rule(Replicate(), replicated, replicated), rule(Partial(), replicated, partial)]
    for result, inputs in sharded(shapes):
        gradients = [p if isinstance(p, Shard) else Partial() for p in inputs]
        rules.append(rule(result, inputs, gradients))
    return _expand(schema, rules, sum(needs))


def _shapes(schema: Any) -> list[tuple[int, ...]]:
    return [tuple(strategy.shape) for strategy in schema.args_strategy]


def _expand(schema: Any, rules: list[list[Any]], results: int) -> Any:
    """Return all combinations of rules over the mesh's dimensions, in the form that DTensor takes."""
    names = torch_private.sharding_names()
    assert names is not None
    expanded = names[2](schema.get_mesh_from_args(), schema, rules, input_index=results)
    if schema.op is torch.ops.dualop.backward.default:
        for strategy in expanded.strategies:  # it takes one result for a tensor where it is a list of one
            if not isinstance(strategy.output_specs, tuple):
                strategy.output_specs = (strategy.output_specs,)
    return expanded
