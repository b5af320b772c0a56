"""Provide modules: a chain with parameters for its operands, alone or behind a Linear.

    layer = ChainLayer("add(bias) | mul(scale) | sigmoid", (64, 1, 1), ())
    model = LinearChain(8192, 8192, "add | swish | tanh | gelu | hardtanh(-1, 1)")

Parameters and their names are those of the model written out: `LinearChain` above has `linear.weight`, `linear.bias`
and `add_value`, drawn in this order, so that weights load unchanged and a seed gives the same ones. An operand's
parameter has the operand's name. If the operand is named after its stage (`add` is `add(add)`), its parameter ends in
`_value`, since `self.add` would read as a method. To choose another name, write it into the chain: `add(shift)`.
"""

# No `from __future__ import annotations`: torch.fx writes the annotations of forward into its graph, and pickles types.
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import linear as linear_module
from torch.nn.modules import module as module_module

from dualop import linear as gemm
from dualop import torch_private
from dualop.backends import registry
from dualop.errors import OperandError
from dualop.language.stages import ALIASES, STAGES
from dualop.language.syntax import MAX_OPERANDS, MAX_STAGES
from dualop.op.callable import Chain
from dualop.op.callable import chain as make_chain

Shape = tuple[int, ...] | None
Init = Callable[..., Tensor]


def parameter_name(operand: str) -> str:
    """Return the name of an operand's parameter: `bias` for `add(bias)`, `add_value` for `add`."""
    return f"{operand}_value" if operand in STAGES or operand in ALIASES else operand


class ChainLayer(nn.Module):
    """Compute `chain(x, *operands)` with operands that are parameters of the layer.

    `shapes` are the operands' shapes in the order of `chain.operands`, or by name. An operand of shape None is not a
    parameter; `forward` takes it in order or by name: `ChainLayer("gelu | add(skip)", None)(x, skip)`. Parameters are
    drawn in the operands' order by `init(shape, device=..., dtype=...)`, such as torch.randn or torch.zeros. `backend`
    applies to every call; None leaves the choice to `use_backend`, `set_backend` and DUALOP_BACKEND.

    The layer takes and returns what the chain does: x of any shape that the operands broadcast with, in float16,
    bfloat16, float32 or float64. The constructor raises ChainError, OperandError and BackendUnavailable (for an unknown
    backend), and `forward` raises what the chain raises.
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
        self.init, self.backend = _Init(init), backend
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
        """Return all operands in the chain's order: the layer's parameters, and those given for the rest."""
        return self._operands(given, named)

    def _operands(self, given: Any, named: Any) -> tuple[Tensor, ...]:
        if not isinstance(given, tuple):
            # The layer is the root of a torch.fx trace: `forward` gets one proxy for all operands, one for all named.
            given, named = tuple([given[i] for i in range(len(self.taken))]), {}
        values = dict(zip(self.taken, given, strict=False))
        wrong = [n for n in named if n not in self.taken or n in values]
        missing = [n for n in self.taken if n not in values and n not in named]
        if wrong or missing or len(given) > len(self.taken):
            reasons = [f"not {len(given)} operands"] if len(given) > len(self.taken) else []
            reasons += [f"not taken or given twice: {', '.join(wrong)}"] if wrong else []
            reasons += [f"missing {', '.join(missing)}"] if missing else []
            raise OperandError(f"forward takes ({', '.join(('x', *self.taken))}), {'; '.join(reasons)}")
        values.update(named)
        return tuple([values[n] if n in self.taken else self._parameter(n) for n in self.chain.operands])

    def _parameter(self, operand: str) -> Tensor:
        """Return the operand's current parameter: torch's tools put tensors and properties in its place."""
        name, cause = parameter_name(operand), None
        try:
            value: Any = getattr(self, name)
        except AttributeError as error:
            value, cause = None, error
        if value is None:
            raise OperandError(
                f"the parameter {name} of this {type(self).__name__} is None or was deleted: assign a tensor to it, or "
                f"make the layer with the shape None for {operand} and pass it to forward"
            ) from cause
        return value

    def forward(self, x: Tensor, *operands: Tensor, **named: Tensor) -> Tensor:
        return self.chain(x, *self._operands(operands, named), backend=self.backend)

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
    """Compute `chain(nn.Linear(...)(x), *operands)`: a matrix product, and one kernel for the rest.

    The Linear is `nn.Linear(in_features, out_features, bias)`. The product runs without the bias, and the chain's
    kernel adds it. Where the chain starts with an `add` of a parameter of shape (out_features,), the bias and that
    parameter have one gradient, which is summed once for both. A chain that uses its own input `x` runs on a product
    with its bias, since `x` is the Linear's output. Any other chain runs in inference in one Triton kernel with the
    product where that is faster, with few in_features: see dualop/linear.py.

    All of this holds for an unmodified nn.Linear. Any other module in its place is called like any module, and the
    chain runs on its result: a Linear with hooks (pruning, weight_norm, spectral_norm, offloading), a parametrized or
    quantized one, a wrapper (LoRA, FSDP), any other module. The same holds under tracers: torch.fx and torch.jit.trace
    find the Linear's call in the graph.

    x has shape (..., in_features), the result (..., out_features). Operands are as in ChainLayer, with the shape
    (out_features,) where none is given; an operand called `bias` takes its shape by position. `linear` is the name of
    the Linear among the layer's modules: "matmul" gives `matmul.weight` and `matmul.bias`.
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
        self.folded, self.adds_first = with_bias(self.chain), starts_with_add(self.chain)

    def forward(self, x: Tensor, *operands: Tensor, **named: Tensor) -> Tensor:
        linear: Any = getattr(self, self.linear_name)
        values = self._operands(operands, named)
        if not is_untouched(linear, x) or (self.folded is None and linear.bias is not None):
            return self.chain(linear(x), *values, backend=self.backend)
        weight, bias = linear.weight, linear.bias
        if not gemm.reasons(x, weight, (*values, *([] if bias is None else [bias])), self.backend):
            chain, values = self._tail(bias, values)
            return gemm.launch(chain, x, weight, values)
        z = F.linear(x, weight)
        # As autocast does for a Linear, the bias takes the dtype of the product.
        chain, values = self._tail(None if bias is None else bias.to(z.dtype), values)
        return chain(z, *values, backend=self.backend)

    def _tail(self, bias: Tensor | None, values: tuple[Tensor, ...]) -> tuple[Chain, tuple[Tensor, ...]]:
        """Return the chain behind a product without bias, and its operands."""
        if bias is None or self.folded is None:
            return self.chain, values
        if self.adds_first and values[0].shape == bias.shape and torch.is_grad_enabled():
            # As one vector, so that the backward kernel has one gradient to sum: with two it takes 126 registers
            # instead of 80 (bfloat16, sm_90). Without a backward they stay two, which saves adding them first.
            return self.chain, (bias + values[0], *values[1:])
        return self.folded, (bias, *values)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        linear: Any = getattr(self, self.linear_name)
        linear.reset_parameters()
        super().reset_parameters()


def with_bias(chain: Chain) -> Chain | None:
    """Return the chain behind an `add` of the Linear's bias, its first operand; None if that would differ."""
    full = len(chain.operands) == MAX_OPERANDS or len(chain.calls) == MAX_STAGES
    if full or any(call.operand == "x" for call in chain.calls):
        return None
    name = "linear_bias"
    while name in chain.operands:
        name += "_"
    return make_chain(f"add({name})", chain)


def starts_with_add(chain: Chain) -> bool:
    """Return True if the chain's first stage adds an operand that no other stage takes."""
    first, operands = chain.calls[0], [call.operand for call in chain.calls]
    return first.stage.name == "add" and isinstance(first.operand, str) and operands.count(first.operand) == 1


# An instance of nn.Linear is modified if it holds what a new one does not. A new module shows, for the hooks of any
# torch, which containers must be empty. No attribute of the instance may hide a name of the class, such as `forward`
# or what `Module.compile` leaves behind.
_NEW = vars(nn.Module())
_EMPTY = tuple(
    name for name, value in _NEW.items()
    if isinstance(value, (dict, set)) and name != "_parameters" and "state_dict" not in name
)  # fmt: skip
_OF_CLASS = frozenset(dir(nn.Linear)) - _NEW.keys()
_TENSORS = (Tensor, nn.Parameter)


def _original(function: Any, module: Any) -> Any:
    """Return the function if this module of torch defines it, and None if it was replaced; None equals no function."""
    return function if getattr(function, "__globals__", None) is vars(module) else None


_FORWARD = _original(nn.Linear.forward, linear_module)
_CALL = _original(nn.Linear.__call__, module_module)


def is_untouched(linear: Any, x: Any) -> bool:
    """Return True if `linear(x)` is exactly `F.linear(x, linear.weight, linear.bias)` of plain tensors.

    Only then may the product run without the bias, or in the chain's kernel. Return False where that is not certain:
    with hooks of any kind, also global ones, a `forward` or weights of another class than usual, tracers, proxies.
    """
    if type(linear) is not nn.Linear or nn.Linear.forward is not _FORWARD or nn.Linear.__call__ is not _CALL:
        return False
    if torch.jit.is_tracing() or not torch_private.FOLD.works or torch_private.has_global_hooks():
        return False
    for name in _EMPTY:
        if getattr(linear, name):
            return False
    # Dynamo of torch 2.11 knows no more of __dict__ than `in`.
    if "forward" in linear.__dict__ or not (torch.compiler.is_compiling() or _OF_CLASS.isdisjoint(linear.__dict__)):
        return False
    weight: Any = linear.weight
    bias: Any = linear.bias
    if type(x) not in _TENSORS or type(weight) not in _TENSORS or x.device != weight.device:
        return False
    if bias is None:
        return True
    same = type(bias) in _TENSORS and bias.device == weight.device and bias.dtype == weight.dtype
    return same and bias.shape == weight.shape[:1]


class _Init:
    """Hold the function that draws a layer's parameters; a pickle leaves it out if it cannot hold it (a lambda)."""

    def __init__(self, draw: Init | None) -> None:
        self.draw = draw

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        if self.draw is None:
            raise OperandError(
                "this layer was unpickled without its init, a function that pickle refuses (a lambda or a function "
                "within a function): assign one to layer.init, such as torch.randn"
            )
        return self.draw(*arguments, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Init":
        return self

    def __reduce__(self) -> Any:
        try:
            pickle.dumps(self.draw)
        except Exception:
            return _Init, (None,)
        return _Init, (self.draw,)


def _checked(operand: str, shape: Any) -> tuple[int, ...]:
    sizes = (shape,) if isinstance(shape, int) else shape
    if not isinstance(sizes, (tuple, list)) or not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise OperandError(f"the shape of {operand} must be a tuple of sizes or None, not {shape!r}")
    return tuple(sizes)
