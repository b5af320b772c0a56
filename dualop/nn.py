"""Modules: a chain with parameters for its operands, alone or behind a Linear.

    layer = ChainLayer("add(bias) | mul(scale) | sigmoid", (64, 1, 1), ())
    model = LinearChain(8192, 8192, "add | swish | tanh | gelu | hardtanh(-1, 1)")

Parameters and their names are those of the model written out: `LinearChain` above has `linear.weight`, `linear.bias`
and `add_value`, drawn in this order, so that weights load unchanged and a seed gives the same ones. An operand's
parameter has the operand's name; one that is named after its stage (`add` is `add(add)`) gets `_value` behind it, since
`self.add` would read as a method. To choose another name, write it into the chain: `add(shift)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dualop import gemm, registry
from dualop.chains import MAX_OPERANDS, MAX_STAGES, Chain
from dualop.chains import chain as make_chain
from dualop.errors import OperandError
from dualop.stages import ALIASES, STAGES

Shape = tuple[int, ...] | None
Init = Callable[..., Tensor]


def parameter_name(operand: str) -> str:
    """The name of an operand's parameter: `bias` for `add(bias)`, `add_value` for `add`."""
    return f"{operand}_value" if operand in STAGES or operand in ALIASES else operand


class ChainLayer(nn.Module):
    """`chain(x, *operands)` with operands that are parameters of the layer.

    `shapes` are the operands' shapes in the order of `chain.operands`, or by name. An operand of shape None is no
    parameter, `forward` takes it in order or by name: `ChainLayer("gelu | add(skip)", None)(x, skip)`.
    Parameters are drawn by `init(shape, device=..., dtype=...)`, in the operands' order: torch.randn, torch.zeros, ...
    `backend` is that of every call; None leaves it to `use_backend`, `set_backend` and DUALOP_BACKEND.

    Takes and gives what the chain does: x of any shape that the operands broadcast with; float16, bfloat16, float32 or
    float64. Raises ChainError, OperandError and BackendUnavailable (an unknown backend) here, and what the chain raises
    in `forward`.
    """

    def __init__(
        self,
        chain: str | Chain,
        *shapes: Shape,
        init: Init = torch.randn,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **named: Shape,
    ) -> None:
        super().__init__()
        self.chain = make_chain(chain)
        self._own(self.chain.bind(shapes, named), init, backend, device, dtype)

    def _own(self, shapes: tuple[Shape, ...], init: Init, backend: str | None, device: Any, dtype: Any) -> None:
        self.init, self.backend = init, backend
        if backend is not None:
            registry.requested(backend)
        self.taken = tuple(n for n, shape in zip(self.chain.operands, shapes, strict=True) if shape is None)
        for operand, shape in zip(self.chain.operands, shapes, strict=True):
            if shape is None:
                continue
            name = parameter_name(operand)
            if hasattr(self, name):
                raise OperandError(
                    f"the operand {operand} cannot be the parameter {name} of a {type(self).__name__}, which has an "
                    f"attribute of this name: write another name into the chain, such as {operand}_"
                )
            self.register_parameter(name, nn.Parameter(init(_checked(operand, shape), device=device, dtype=dtype)))

    def operands(self, *given: Tensor, **named: Tensor) -> tuple[Tensor, ...]:
        """All operands in the chain's order: the layer's parameters, and those given for the rest."""
        if len(given) > len(self.taken):
            raise OperandError(f"forward takes ({', '.join(('x', *self.taken))}), not {len(given)} operands")
        named.update({n: getattr(self, parameter_name(n)) for n in self.chain.operands if n not in self.taken})
        return self.chain.bind((), dict(zip(self.taken, given, strict=False)) | named)

    def forward(self, x: Tensor, *operands: Tensor, **named: Tensor) -> Tensor:
        return self.chain(x, *self.operands(*operands, **named), backend=self.backend)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters again, in the order of the first time."""
        for operand in self.chain.operands:
            if operand not in self.taken:
                p = getattr(self, parameter_name(operand))
                p.copy_(self.init(tuple(p.shape), device=p.device, dtype=p.dtype))

    def extra_repr(self) -> str:
        shown = [repr(str(self.chain))]
        shown += [f"{name}={tuple(p.shape)}" for name, p in self.named_parameters(recurse=False)]
        return ", ".join(shown + ([] if self.backend is None else [f"backend={self.backend!r}"]))


class LinearChain(ChainLayer):
    """`chain(nn.Linear(in_features, out_features, bias)(x), *operands)`: a matrix product, and one kernel for the rest.

    The bias is added inside the chain's kernel: the product runs without it. Where the chain starts with an `add` of a
    parameter of shape (out_features,), bias and that parameter have one gradient, which is summed once for both. The
    product keeps its bias where the chain speaks of its own input `x`, which is the Linear's output, bias and all.
    Otherwise product and chain are one Triton kernel where that is faster, with few in_features: see dualop/gemm.py.

    x has shape (..., in_features), the result (..., out_features). Operands are as in ChainLayer, with the shape
    (out_features,) where none is given; one that is called `bias` takes its shape by position. `linear` is the name of
    the Linear among the layer's modules: "matmul" gives `matmul.weight` and `matmul.bias`. The Linear holds the
    parameters; it is not called itself when its bias is folded, so its hooks do not run.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        chain: str | Chain,
        *shapes: Shape,
        bias: bool = True,
        linear: str = "linear",
        init: Init = torch.randn,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **named: Shape,
    ) -> None:
        nn.Module.__init__(self)
        self.chain = make_chain(chain)
        self.in_features, self.out_features, self.linear_name = in_features, out_features, linear
        every = dict.fromkeys(self.chain.operands[len(shapes) :], (out_features,))
        bound = self.chain.bind(shapes, every | named)
        if not linear.isidentifier() or hasattr(self, linear):
            raise OperandError(f"the Linear cannot be called {linear!r} in a LinearChain: choose another name")
        self.add_module(linear, nn.Linear(in_features, out_features, bias, device=device, dtype=dtype))
        self._own(bound, init, backend, device, dtype)
        self.folded = with_bias(self.chain) if bias else None
        self.bias_joins_add = self.folded is not None and starts_with_add(self.chain, bound, (out_features,))

    def forward(self, x: Tensor, *operands: Tensor, **named: Tensor) -> Tensor:
        linear: Any = self.get_submodule(self.linear_name)
        values = self.operands(*operands, **named)
        if self.folded is None and linear.bias is not None:
            return self.chain(linear(x), *values, backend=self.backend)
        if not gemm.reasons(x, linear.weight, (*values, *([] if linear.bias is None else [linear.bias])), self.backend):
            chain, values = self._tail(linear.bias, values)
            return gemm.run(chain, x, linear.weight, values, self.backend)
        z = F.linear(x, linear.weight)
        # As autocast does for a Linear, the bias takes the dtype of the product.
        chain, values = self._tail(None if linear.bias is None else linear.bias.to(z.dtype), values)
        return chain(z, *values, backend=self.backend)

    def _tail(self, bias: Tensor | None, values: tuple[Tensor, ...]) -> tuple[Chain, tuple[Tensor, ...]]:
        """The chain behind a product without bias, and its operands."""
        if bias is None or self.folded is None:
            return self.chain, values
        if self.bias_joins_add and torch.is_grad_enabled():
            # One vector, so that the backward kernel has one to sum up: as two operands they cost it 126 registers in
            # place of 80 (bfloat16, sm_90). With no backward to come they are two, which saves adding them first.
            return self.chain, (bias + values[0], *values[1:])
        return self.folded, (bias, *values)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        linear: Any = self.get_submodule(self.linear_name)
        linear.reset_parameters()
        super().reset_parameters()


def with_bias(chain: Chain) -> Chain | None:
    """The chain with a Linear's bias added in front, its first operand; None where that would be another function."""
    full = len(chain.operands) == MAX_OPERANDS or len(chain.calls) == MAX_STAGES
    if full or any(call.operand == "x" for call in chain.calls):
        return None
    name = "linear_bias"
    while name in chain.operands:
        name += "_"
    return make_chain(f"add({name})", chain)


def starts_with_add(chain: Chain, shapes: tuple[Shape, ...], shape: Shape) -> bool:
    """Whether the chain's first stage adds an operand of this shape, which no other stage takes."""
    first, operands = chain.calls[0], [call.operand for call in chain.calls]
    named = isinstance(first.operand, str) and operands.count(first.operand) == 1
    return named and first.stage.name == "add" and shapes[0] == shape


def _checked(operand: str, shape: Any) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else shape
    if not isinstance(sizes, (tuple, list)) or not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise OperandError(f"the shape of {operand} must be a tuple of sizes or None, not {shape!r}")
    return tuple(sizes)
