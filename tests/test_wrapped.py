"""What torch's tools and other people's wrappers do to a Linear, they do to the Linear of a LinearChain.

Each wrap is put around both, a LinearChain and the model written out by torch's functions, and both train beside each
other. The fold of the bias is taken where it can be proved harmless, so the wraps also say that it is not taken.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor, nn
from torch.nn.modules import module as module_module
from torch.nn.utils import parametrizations, parametrize, prune

from dualop import linear as gemm
from dualop import torch_private
from dualop.nn import ChainLayer, LinearChain, is_untouched

pytestmark = pytest.mark.filterwarnings("ignore")
SIZE = 6  # in_features and out_features, so that an identity fits
CHAIN = "add | swish | tanh | gelu"


class WrittenOut(nn.Module):
    """Linear and chain by torch's functions."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE, bias)
        self.add_value = nn.Parameter(torch.randn(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        z = F.silu(self.linear(x) + self.add_value)
        return F.gelu(torch.tanh(z))


class Ours(LinearChain):
    """The same as a LinearChain. A class of its own, since torch's tools may change an instance's class."""

    def __init__(self, bias: bool) -> None:
        super().__init__(SIZE, SIZE, CHAIN, bias=bias, backend="reference")


def pair(bias: bool, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """Ours and the written-out one with the same weights."""
    models = []
    for make in (Ours, WrittenOut):
        torch.manual_seed(3)
        models.append(make(bias).to(dtype))
    return models[0], models[1]


def trained(model: nn.Module, steps: int = 4) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of some steps with momentum, and all weights and buffers after them."""
    torch.manual_seed(5)
    dtype = next((p.dtype for p in model.parameters()), torch.float64)
    x, goal = torch.randn(2, 5, SIZE, dtype=dtype), torch.randn(2, 5, SIZE, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def assert_train_alike(ours: nn.Module, theirs: nn.Module) -> None:
    (losses, state), (their_losses, their_state) = trained(ours), trained(theirs)
    assert losses == pytest.approx(their_losses, rel=1e-6)
    assert losses[0] != losses[-1] and list(state) == list(their_state)
    for name, value in state.items():
        torch.testing.assert_close(value, their_state[name], msg=lambda text, name=name: f"{name}: {text}")


# ---- the wraps -------------------------------------------------------------------------------------------------------


class Double(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Lora(nn.Module):
    """An adapter as peft's: it holds the Linear, has its weight and bias, and adds a product of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        where: dict[str, Any] = {"dtype": base.weight.dtype}
        self.a, self.b = nn.Linear(SIZE, 2, False, **where), nn.Linear(2, SIZE, False, **where)
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class Scaled(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _becomes(make: Callable[[Any], nn.Module]) -> Callable[[Any], Any]:
    """Put what `make` gives for the Linear in its place, with the same random numbers for both models."""

    def wrap(model: Any) -> None:
        torch.manual_seed(7)
        model.linear = make(model.linear)

    return wrap


def _scaled(linear: nn.Linear) -> nn.Module:
    made = Scaled(SIZE, SIZE, linear.bias is not None, dtype=linear.weight.dtype)
    made.load_state_dict(linear.state_dict())
    return made


def _plus_one(module: nn.Module, arguments: Any, *rest: Any) -> Any:
    return (arguments[0] + 1, *arguments[1:])


def _plus_one_with_keywords(module: nn.Module, arguments: Any, keywords: Any) -> Any:
    return (arguments[0] + 1, *arguments[1:]), keywords


def _negative(module: nn.Module, arguments: Any, result: Tensor) -> Tensor:
    return -result


def _double_gradient(module: nn.Module, grad_input: Any, grad_output: Any = None) -> Any:
    return tuple(g if g is None else 2 * g for g in grad_input)


def _forward_of_its_own(model: Any) -> None:
    inner = model.linear.forward
    model.linear.forward = lambda x: inner(2 * x)


def _offloaded(model: Any) -> None:
    """Weights are on the meta device, but for the Linear's own forward: as with accelerate, by hooks."""
    linear, kept = model.linear, {}

    def bring(module: nn.Module, arguments: Any) -> None:
        for name in list(module._parameters):
            if module._parameters[name] is not None:
                module._parameters[name] = kept[name]

    def take(module: nn.Module, arguments: Any, result: Any) -> None:
        for name, value in list(module._parameters.items()):
            if value is not None:
                kept[name] = value
                module._parameters[name] = nn.Parameter(value.detach().to("meta"), requires_grad=False)

    linear.register_forward_pre_hook(bring)
    linear.register_forward_hook(take)
    take(linear, (), None)


def _prepare_qat(model: Any) -> None:
    from torch.ao import quantization

    model.linear.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model.train(), inplace=True)


WRAPS: dict[str, Callable[[Any], Any]] = {
    "prune.l1_unstructured": lambda m: prune.l1_unstructured(m.linear, "weight", 0.4),
    "prune.ln_structured, twice": lambda m: [prune.ln_structured(m.linear, "weight", 2, 2, dim=0) for _ in "12"],
    "weight_norm": lambda m: nn.utils.weight_norm(m.linear),
    "spectral_norm": _becomes(lambda linear: nn.utils.spectral_norm(linear)),
    "parametrizations.weight_norm": lambda m: parametrizations.weight_norm(m.linear),
    "parametrizations.spectral_norm": _becomes(lambda linear: parametrizations.spectral_norm(linear)),
    "parametrizations.orthogonal": lambda m: parametrizations.orthogonal(m.linear),
    "a parametrization": lambda m: parametrize.register_parametrization(m.linear, "weight", Double()),
    "LoRA": _becomes(Lora),
    "Sequential": _becomes(lambda linear: nn.Sequential(linear, nn.Tanh())),
    "Identity": _becomes(lambda linear: nn.Identity()),
    "a subclass": _becomes(_scaled),
    "a forward of its own": _forward_of_its_own,
    "a pre-hook": lambda m: m.linear.register_forward_pre_hook(_plus_one),
    "a pre-hook with keywords": lambda m: m.linear.register_forward_pre_hook(_plus_one_with_keywords, with_kwargs=True),
    "a hook": lambda m: m.linear.register_forward_hook(_negative),
    "a hook that is always called": lambda m: m.linear.register_forward_hook(_negative, always_call=True),
    "a backward pre-hook": lambda m: m.linear.register_full_backward_pre_hook(_double_gradient),
    "a backward hook": lambda m: m.linear.register_full_backward_hook(_double_gradient),
    "an old backward hook": lambda m: m.linear.register_backward_hook(lambda module, grads, _: None),
    "offloading": _offloaded,
    "prepare_qat": _prepare_qat,
}  # fmt: skip
OF_BIAS: dict[str, Callable[[Any], Any]] = {
    "prune of the bias": lambda m: prune.random_unstructured(m.linear, "bias", 3),
    "a parametrization of the bias": lambda m: parametrize.register_parametrization(m.linear, "bias", Double()),
    "weight_norm of the bias": lambda m: nn.utils.weight_norm(m.linear, "bias", dim=None),
}
CASES = [(n, b) for n in WRAPS for b in (True, False)] + [(n, True) for n in OF_BIAS]


def wrapped(name: str, bias: bool) -> tuple[nn.Module, nn.Module]:
    wrap = (WRAPS | OF_BIAS)[name]
    models = pair(bias, torch.float32 if name == "prepare_qat" else torch.float64)
    for model in models:
        torch.manual_seed(11)
        wrap(model)
    return models


@pytest.mark.parametrize(("name", "bias"), CASES)
def test_a_wrapped_linear_trains_as_in_eager(name: str, bias: bool) -> None:
    ours, theirs = wrapped(name, bias)
    x = torch.randn(2, SIZE, dtype=torch.float64)
    assert not is_untouched(ours.linear, x)
    assert_train_alike(ours, theirs)


@pytest.mark.parametrize(("name", "bias"), CASES)
def test_inference_and_copies(name: str, bias: bool) -> None:
    """Copies work where those of the written-out model do, and give its results."""
    x = torch.randn(2, SIZE)
    for way in (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        results = []
        for model in wrapped(name, bias):
            try:
                twin = way(model).eval()
            except Exception as error:
                results.append(type(error))
            else:
                with torch.no_grad():
                    results.append(twin(x.to(torch.float32 if name == "prepare_qat" else torch.float64)))
        if isinstance(results[1], Tensor):
            torch.testing.assert_close(*results)
        else:
            assert results[0] is results[1]


COMPILED = [
    "parametrizations.weight_norm", "a parametrization", "LoRA", "Sequential", "Identity", "a subclass",
    "a pre-hook", "a pre-hook with keywords", "a hook", "a forward of its own", "prune.l1_unstructured", "weight_norm",
]  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_a_wrapped_linear_under_compile(name: str) -> None:
    torch._dynamo.reset()
    ours, theirs = wrapped(name, True)
    assert_train_alike(torch.compile(ours, fullgraph=True, backend="aot_eager"), torch.compile(theirs, backend="eager"))


def test_untouched_again_once_hooks_are_removed() -> None:
    ours, x = pair(True)[0], torch.randn(2, SIZE, dtype=torch.float64)
    assert is_untouched(ours.linear, x)
    for register in (
        ours.linear.register_forward_pre_hook, ours.linear.register_forward_hook,
        ours.linear.register_full_backward_hook, ours.linear.register_full_backward_pre_hook,
    ):  # fmt: skip
        handle = register(lambda *_: None)
        assert not is_untouched(ours.linear, x)
        handle.remove()
        assert is_untouched(ours.linear, x)
    prune.l1_unstructured(ours.linear, "weight", 0.4)
    prune.remove(ours.linear, "weight")
    ours.linear._is_hf_initialized = True  # attributes that torch does not look at
    ours.linear.register_state_dict_pre_hook(lambda *_: None)
    assert is_untouched(ours.linear, x)


@contextmanager
def _removed(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


GLOBAL_HOOKS = {
    "register_module_forward_pre_hook": lambda m, a: (2 * a[0],) if isinstance(m, nn.Linear) else None,
    "register_module_forward_hook": lambda m, a, y: 2 * y if isinstance(m, nn.Linear) else None,
    "register_module_full_backward_hook": lambda m, g, _: (
        tuple(2 * t for t in g) if isinstance(m, nn.Linear) and g[0] is not None else None
    ),
    "register_module_full_backward_pre_hook": lambda m, g: (2 * g[0],) if isinstance(m, nn.Linear) else None,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_hooks_of_all_modules(register: str, bias: bool) -> None:
    ours, theirs = pair(bias)
    called = []
    hook = GLOBAL_HOOKS[register]
    with _removed(getattr(module_module, register)(lambda m, *a: called.append(type(m)) or hook(m, *a))):
        assert_train_alike(ours, theirs)
    assert called.count(nn.Linear) == 8


@pytest.mark.parametrize("owner", [nn.Linear, nn.Module])
def test_a_replaced_method_of_the_class(owner: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """As tools do that patch all Linears at once."""
    name = "forward" if owner is nn.Linear else "__call__"
    original = getattr(owner, name)

    def doubled(self: nn.Module, x: Tensor) -> Tensor:
        return original(self, 2 * x if isinstance(self, nn.Linear) else x)

    monkeypatch.setattr(owner, name, doubled)
    assert_train_alike(*pair(True))


def test_a_forward_that_was_replaced_before_dualop_was_imported() -> None:
    code = """
import torch
from torch import nn
forward = nn.Linear.forward
nn.Linear.forward = lambda self, x: 2 * forward(self, x)
from dualop.nn import LinearChain
layer, x = LinearChain(3, 4, "add | tanh", backend="reference"), torch.randn(2, 3)
torch.testing.assert_close(layer(x), torch.tanh(layer.linear(x) + layer.add_value))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_a_torch_without_the_question_for_global_hooks_calls_the_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private.FOLD, "why_not", "it is missing")
    ours, theirs = pair(True)
    assert not is_untouched(ours.linear, torch.randn(2, SIZE, dtype=torch.float64))
    assert_train_alike(ours, theirs)


def test_a_linear_that_was_compiled_by_itself_is_called() -> None:
    ours, theirs = pair(True)
    for model in (ours, theirs):
        model.linear.compile(backend="eager")
    assert not is_untouched(ours.linear, torch.randn(2, SIZE, dtype=torch.float64))
    assert_train_alike(ours, theirs)


def test_quantize_dynamic() -> None:
    from torch.ao import quantization

    with torch.no_grad():
        x = torch.randn(5, SIZE)
        ours, theirs = (quantization.quantize_dynamic(m.eval(), {nn.Linear}) for m in pair(True, torch.float32))
        assert "quantized" in type(ours.linear).__module__
        torch.testing.assert_close(ours(x), theirs(x))


def test_qat_observes_the_weights() -> None:
    ours, theirs = pair(True, torch.float32)
    for model in (ours, theirs):
        _prepare_qat(model)
        trained(model)
    assert (ours.linear.weight_fake_quant.scale != 1).all()
    torch.testing.assert_close(ours.linear.state_dict(), theirs.linear.state_dict())


# ---- the state of a plain Linear -------------------------------------------------------------------------------------


def test_a_bias_that_comes_and_goes() -> None:
    ours, theirs = pair(True)
    for model in (ours, theirs):
        model.linear.bias = None
    assert_train_alike(ours, theirs)
    for model in (ours, theirs):
        torch.manual_seed(2)
        model.linear.bias = nn.Parameter(torch.randn(SIZE, dtype=torch.float64))
    assert_train_alike(ours, theirs)
    ours, theirs = pair(False)
    for model in (ours, theirs):
        torch.manual_seed(2)
        model.linear.bias = nn.Parameter(torch.randn(SIZE, dtype=torch.float64))
    assert_train_alike(ours, theirs)


def test_what_a_linear_refuses_is_refused() -> None:
    for change in (
        lambda linear: setattr(linear, "bias", nn.Parameter(torch.randn(7, SIZE))),
        lambda linear: setattr(linear, "bias", nn.Parameter(torch.randn(SIZE, dtype=torch.float64))),
    ):
        ours, theirs = pair(True, torch.float32)
        for model in (ours, theirs):
            change(model.linear)
            with pytest.raises(RuntimeError):
                model(torch.randn(1, SIZE))


def test_other_dtypes_tied_weights_and_assigned_states() -> None:
    ours, theirs = pair(True)
    for model in (ours, theirs):
        model.to(torch.float32).double()
    assert_train_alike(ours, theirs)
    tied = []
    for model in pair(True):
        second = copy.deepcopy(model)
        second.linear.weight, second.linear.bias = model.linear.weight, model.linear.bias
        tied.append(nn.Sequential(model, second))
    assert_train_alike(*tied)
    ours, theirs = pair(True)
    torch.manual_seed(4)
    state = {name: torch.randn_like(value) for name, value in theirs.state_dict().items()}
    for model in (ours, theirs):
        model.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    assert_train_alike(ours, theirs)
    ours, theirs = pair(True)
    for model in (ours, theirs):
        torch.manual_seed(6)
        other = nn.Parameter(torch.randn(SIZE, SIZE, dtype=torch.float64))
        torch.utils.swap_tensors(model.linear.weight, other)
    assert_train_alike(ours, theirs)


def test_an_operand_of_another_shape_than_at_first() -> None:
    ours, theirs = pair(True)
    for model in (ours, theirs):
        torch.manual_seed(8)
        model.add_value = nn.Parameter(torch.randn(5, 1, dtype=torch.float64))
    assert_train_alike(ours, theirs)


def test_functional_call() -> None:
    ours, theirs = pair(True)
    x = torch.randn(5, SIZE, dtype=torch.float64)
    state = {name: torch.randn_like(value) for name, value in theirs.state_dict().items()}
    loss = lambda model: lambda state: torch.func.functional_call(model, state, (x,)).square().sum()
    torch.testing.assert_close(torch.func.grad(loss(ours))(state), torch.func.grad(loss(theirs))(state))
    torch.testing.assert_close(torch.func.hessian(loss(ours))(state), torch.func.hessian(loss(theirs))(state))
    batched = {name: torch.stack([value, 2 * value]) for name, value in state.items()}
    torch.testing.assert_close(torch.vmap(loss(ours))(batched), torch.vmap(loss(theirs))(batched))
    frozen = {name: value.detach() for name, value in state.items()}
    with torch.no_grad():
        torch.testing.assert_close(
            torch.func.functional_call(ours, frozen, (x,)), torch.func.functional_call(theirs, frozen, (x,))
        )


# ---- ChainLayer's own parameters -------------------------------------------------------------------------------------

OF_LAYER: dict[str, Callable[[Any], Any]] = {
    "prune": lambda m: prune.l1_unstructured(m, "add_value", 3),
    "weight_norm": lambda m: nn.utils.weight_norm(m, "add_value", dim=None),
    "parametrization": lambda m: parametrize.register_parametrization(m, "add_value", Double()),
    "a plain tensor": lambda m: (delattr(m, "add_value"), setattr(m, "add_value", torch.ones(SIZE).double())),
    "a buffer": lambda m: (delattr(m, "add_value"), m.register_buffer("add_value", torch.ones(SIZE).double())),
    "a number": lambda m: setattr(m, "add_value", nn.Parameter(torch.tensor(0.5).double())),
    "a hook": lambda m: m.register_forward_hook(_negative),
    "a pre-hook": lambda m: m.register_forward_pre_hook(_plus_one),
}


@pytest.mark.parametrize("name", OF_LAYER)
def test_wraps_of_the_layer_itself(name: str) -> None:
    ours, theirs = pair(True)
    for model in (ours, theirs):
        torch.manual_seed(11)
        OF_LAYER[name](model)
    assert is_untouched(ours.linear, torch.randn(2, SIZE, dtype=torch.float64))
    assert_train_alike(ours, theirs)


# ---- product and chain in one kernel ---------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The kernel is taken wherever it can run; gives what was launched."""
    monkeypatch.setattr(gemm, "mode", "on")
    monkeypatch.setattr(gemm, "TILE", gemm.Tile(rows=32, columns=32, depth_bytes=32, group=2))
    found: list[Any] = []
    launch = gemm.launch
    monkeypatch.setattr(gemm, "launch", lambda *a, **k: found.append(a) or launch(*a, **k))
    return found


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs interpreted kernels")
def test_the_kernel_with_the_product_asks_the_same(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.overrides import TorchFunctionMode
    from torch.utils.flop_counter import FlopCounterMode

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
            return function(*arguments, **(keywords or {}))

    layer = LinearChain(16, 24, CHAIN, backend="triton", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(8, 16, dtype=torch.bfloat16)
    y = layer(x)
    assert len(launches) == 1
    with torch.profiler.profile():
        layer(x)
    assert len(launches) == 2
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 8 * 16 * 24
    with Functions():
        layer(x)
    torch.testing.assert_close(make_fx(layer)(x)(x + 1), layer(x + 1), atol=0.03, rtol=0.03)
    assert len(launches) == 3
    traced = torch.jit.trace(layer, x, check_trace=False)
    torch.testing.assert_close(traced(x + 1), layer(x + 1), atol=0.03, rtol=0.03)
    assert len(launches) == 4
    negative = torch._neg_view(-x)
    torch.testing.assert_close(layer(negative), y, atol=0.03, rtol=0.03)
    handle = layer.linear.register_forward_hook(_negative)
    assert not torch.equal(layer(x), y)
    handle.remove()
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: torch.zeros(8, 24, dtype=torch.bfloat16))
    assert not torch.equal(layer(x), y)
    assert len(launches) == 4


# ---- tracers ---------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A chain with an operand of forward, between Linears."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first = LinearChain(SIZE, SIZE, CHAIN, bias=bias, backend="reference")
        self.layer = ChainLayer("mul(scale) | gelu | add(skip)", (SIZE,), None, backend="reference")
        self.last = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(self.layer(y, skip=x) + self.layer(y, x))


def kinds(graph: torch.fx.Graph) -> list[str]:
    return [f"{n.op} {n.target}" for n in graph.nodes if n.op in ("call_module", "call_function")]


@pytest.mark.parametrize("bias", [True, False])
def test_symbolic_trace_in_a_model(bias: bool) -> None:
    model = Model(bias)
    traced = torch.fx.symbolic_trace(model)
    found = kinds(traced.graph)
    assert found[:2] == ["call_module first.linear", "call_function dualop.forward.default"]
    assert found[-1] == "call_module last" and len(found) == 6
    x = torch.randn(3, SIZE)
    for grown in (traced, copy.deepcopy(traced), torch.fx.symbolic_trace(traced)):
        torch.testing.assert_close(grown(x), model(x))
    traced(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("bias", [True, False])
def test_symbolic_trace_of_the_layer_itself(bias: bool) -> None:
    x, skip = torch.randn(3, SIZE), torch.randn(3, SIZE)
    linear = LinearChain(SIZE, SIZE, CHAIN, bias=bias, backend="reference")
    traced = torch.fx.symbolic_trace(linear)
    assert kinds(traced.graph) == ["call_module linear", "call_function dualop.forward.default"]
    torch.testing.assert_close(traced(x), linear(x))
    layer = ChainLayer("mul(scale) | gelu", (SIZE,), backend="reference")
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(x), layer(x))
    layer = ChainLayer("mul(scale) | gelu | add(skip) | mul(gate)", (SIZE,), None, None, backend="reference")
    traced = torch.fx.symbolic_trace(layer)  # takes operands in order
    for grown in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        torch.testing.assert_close(grown(x, skip, x), layer(x, skip, x))
    with pytest.raises(IndexError):
        traced(x, skip)


@pytest.mark.parametrize("where", ["model", "root"])
@pytest.mark.parametrize("training", [False, True], ids=["static", "QAT"])
def test_fx_quantisation(where: str, training: bool) -> None:
    from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping, quantize_fx

    torch.manual_seed(0)
    model = Model() if where == "model" else LinearChain(SIZE, SIZE, CHAIN, backend="reference")
    x = torch.randn(64, SIZE)
    if training:
        prepared = quantize_fx.prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("fbgemm"), (x,))
        prepared(x).sum().backward()
    else:
        prepared = quantize_fx.prepare_fx(model.eval(), get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    converted = quantize_fx.convert_fx(prepared.eval())
    name = "first.linear" if where == "model" else "linear"
    assert "quantized" in type(converted.get_submodule(name)).__module__
    assert "call_function dualop.forward.default" in kinds(converted.graph)
    torch.testing.assert_close(converted(x), model.eval()(x), atol=0.15, rtol=0.1)


def test_fx_quantisation_of_a_layer() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    layer = ChainLayer("mul(scale) | gelu", (SIZE,), backend="reference").eval()
    x = torch.randn(64, SIZE)
    prepared = quantize_fx.prepare_fx(layer, get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    torch.testing.assert_close(quantize_fx.convert_fx(prepared)(x), layer(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("chain", [CHAIN, "gelu | add", "add | sigmoid | mul(x)"])
@pytest.mark.parametrize("bias", [True, False])
def test_jit_trace_gives_one_graph_in_every_grad_mode(chain: str, bias: bool) -> None:
    layer = LinearChain(SIZE, SIZE, chain, bias=bias, backend="reference")
    x, other = torch.randn(3, SIZE), torch.randn(4, 7, SIZE)
    traced = torch.jit.trace(layer, x, check_inputs=[(torch.randn(5, SIZE),)])
    torch.testing.assert_close(traced(other), layer(other))
    with torch.no_grad():
        again = torch.jit.trace(layer, x)
    kinds = [[node.kind() for node in t.inlined_graph.nodes()] for t in (traced, again)]
    assert kinds[0] == kinds[1] and kinds[0].count("aten::linear") == kinds[0].count("dualop::forward") == 1
    torch.testing.assert_close(torch.jit.trace(Model(bias), x)(x).shape, x.shape)


def test_it_compiles_as_often_as_a_linear() -> None:
    """Several layers of one class, forward and backward, in training and not, share their graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    class Block(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    graphs = []
    for make in (lambda: LinearChain(SIZE, SIZE, CHAIN, backend="reference"), lambda: nn.Linear(SIZE, SIZE)):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        blocks = [Block(make()) for _ in range(3)]
        for block in blocks:
            block.compile(backend=counter, fullgraph=True)
        for training in (True, False, True):
            x = torch.randn(4, SIZE)
            for block in blocks:
                x = block.train(training)(x)
            x.sum().backward()
        graphs.append(counter.graphs)
    assert len(graphs[0]) == len(graphs[1])
    nodes = [n for n in graphs[0][0].graph.nodes if n.op == "call_function"]
    linear, chain = ([n for n in nodes if name in str(n.target)] for name in ("linear", "dualop.forward"))
    assert len(linear) == len(chain) == 1 and len(linear[0].args) == 2  # the bias is the chain's


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_export(strict: bool, bias: bool) -> None:
    ours, theirs = pair(bias)
    x = torch.randn(4, SIZE, dtype=torch.float64)
    program = torch.export.export(ours, (x,), strict=strict, dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.testing.assert_close(program.module()(torch.cat([x, x])), theirs(torch.cat([x, x])))


# ---- several processes -----------------------------------------------------------------------------------------------

PROCESS = """
import sys, traceback, warnings
from datetime import timedelta
import torch, torch.distributed as dist
from torch import nn
warnings.simplefilter("ignore")
rank, path = int(sys.argv[1]), sys.argv[2]
meeting = {"init_method": f"file://{path}", "timeout": timedelta(seconds=60)}
dist.init_process_group("gloo", rank=rank, world_size=2, **meeting)
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
sys.path.insert(0, "tests")
from test_wrapped import pair, SIZE
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))

def of_linear(model):
    fully_shard(model.linear, mesh=mesh)
    return model

def fsdp1(model, policy, orig):
    policy = ModuleWrapPolicy({nn.Linear}) if policy else None
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=orig, device_id=cpu)

def sharded(module, name):
    if getattr(module, name) is not None:
        setattr(module, name, nn.Parameter(distribute_tensor(getattr(module, name).detach(), mesh, [Shard(0)])))

def tensor_parallel(model):
    parallelize_module(model, mesh, {"linear": ColwiseParallel(use_local_output=False)})
    sharded(model, "add_value")
    return model

def dtensor(model):  # no hook
    for module, name in ((model.linear, "weight"), (model.linear, "bias"), (model, "add_value")):
        sharded(module, name)
    return model

CASES = {
    "DDP": nn.parallel.DistributedDataParallel,
    "fully_shard": lambda m: fully_shard(m, mesh=mesh),
    "fully_shard(linear)": of_linear,
    "fully_shard(linear), fully_shard": lambda m: fully_shard(of_linear(m), mesh=mesh),
    "FSDP1": lambda m: fsdp1(m, False, False),
    "FSDP1, own parameters": lambda m: fsdp1(m, False, True),
    "FSDP1, Linear": lambda m: fsdp1(m, True, False),
    "FSDP1, Linear, own parameters": lambda m: fsdp1(m, True, True),
    "tensor parallel": tensor_parallel,
    "DTensor": dtensor,
}

def losses(model, whole):
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    x, goal = torch.randn(2, 4, SIZE).double(), torch.randn(2, 4, SIZE).double()
    x, goal = (distribute_tensor(t, mesh, [Replicate()]) if whole else t[rank] for t in (x, goal))
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(x) - goal).square().mean()
        loss = loss.full_tensor() if whole else loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found

failed = []
for name, wrap in CASES.items():
    for bias in (True, False):
        try:
            ours, theirs = (losses(wrap(model), "ensor" in name) for model in pair(bias))
            torch.testing.assert_close(ours, theirs)
            assert ours[0] != ours[-1]
        except Exception:
            failed.append(f"{name}, bias={bias}: {traceback.format_exc()[-1500:]}")
print("\\n".join(failed))
dist.destroy_process_group()
sys.exit(len(failed))
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes_train_as_in_eager(tmp_path: Path) -> None:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", PROCESS]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting")],
            env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        texts = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(texts)
