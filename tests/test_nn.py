"""dualop.nn beside the modules written out: weights, random numbers, values, gradients, what torch does to modules."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dualop
from dualop.backends.registry import BACKENDS
from dualop.errors import BackendUnavailable, ChainError, OperandError, ShapeError
from dualop.nn import ChainLayer, LinearChain

CHAIN = "add | swish | tanh | gelu | hardtanh(-1, 1)"
INS, OUTS = 16, 24


class WrittenOut(nn.Module):
    """KernelBench level 2, problem 95."""

    def __init__(
        self, in_features: int, out_features: int, add_value_shape: tuple[int, ...], bias: bool = True
    ) -> None:
        super().__init__()
        self.matmul = nn.Linear(in_features, out_features, bias)
        self.add_value = nn.Parameter(torch.randn(add_value_shape))

    def forward(self, x: Tensor) -> Tensor:
        x = self.matmul(x)
        x = x + self.add_value
        x = torch.sigmoid(x) * x
        x = torch.tanh(x)
        x = F.gelu(x)
        return F.hardtanh(x, min_val=-1, max_val=1)


def pair(device: torch.device, chain: str = CHAIN, **options) -> tuple[LinearChain, WrittenOut]:
    """The two with the same seed."""
    torch.manual_seed(3)
    ours = LinearChain(INS, OUTS, chain, linear="matmul", **options)
    torch.manual_seed(3)
    return ours.to(device), WrittenOut(INS, OUTS, (OUTS,), options.get("bias", True)).to(device)


def gradients(module: nn.Module, x: Tensor, gy: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    y.backward(gy)
    return {"y": y.detach(), "x": leaf.grad} | {name: p.grad for name, p in module.named_parameters()}


def assert_as_close_to_exact(ours: nn.Module, written_out: nn.Module, x: Tensor) -> None:
    """Values and gradients: hardly further from the float64 model than the written-out one is."""
    roundings = 16 if x.dtype == torch.float32 else 1  # of the largest value: float32 sums cancel this way or that
    gy = torch.randn(*x.shape[:-1], OUTS, dtype=x.dtype, device=x.device)
    exact = gradients(copy.deepcopy(written_out).double(), x.double(), gy.double())
    theirs = gradients(written_out, x, gy)
    for name, value in gradients(ours, x, gy).items():
        assert (value.dtype, value.shape, value.stride()) == (x.dtype, theirs[name].shape, theirs[name].stride()), name
        scale = roundings * torch.finfo(x.dtype).eps * exact[name].abs().max()
        off, off_there = ((t.double() - exact[name]).abs().max() for t in (value, theirs[name]))
        assert off <= 1.5 * off_there + scale, (
            f"{name}: off by {off / scale:.3g} of what is due, written out {off_there / scale:.3g}"
        )


# ---- weights and random numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_the_same_seed_gives_the_weights_of_the_written_out_model(bias: bool) -> None:
    ours, theirs = pair(torch.device("cpu"), bias=bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_weights_go_from_one_to_the_other_and_back() -> None:
    ours, theirs = pair(torch.device("cpu"))
    other = WrittenOut(INS, OUTS, (OUTS,))
    ours.load_state_dict(other.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert all(torch.equal(theirs.state_dict()[name], value) for name, value in other.state_dict().items())


def test_names_and_shapes() -> None:
    chain = "add(shift) | mul | sigmoid | minimum(cap) | silu | mul(shift)"
    layer = LinearChain(INS, OUTS, chain, cap=(), mul=(1,))
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "shift": (OUTS,),
        "mul_value": (1,),
        "cap": (),
        "linear.weight": (OUTS, INS),
        "linear.bias": (OUTS,),
    }
    assert [n for n, _ in ChainLayer("add(b) | mul(a)", (3,), (2, 1)).named_parameters()] == ["b", "a"]
    assert ChainLayer("add | gelu", 5).add_value.shape == (5,)


def test_initialisation_may_be_chosen_and_repeated() -> None:
    layer = LinearChain(INS, OUTS, "mul(scale) | gelu | add(shift)", init=torch.ones)
    assert torch.equal(layer.scale, torch.ones(OUTS)) and torch.equal(layer.shift, torch.ones(OUTS))
    torch.manual_seed(3)
    again, theirs = LinearChain(INS, OUTS, CHAIN, linear="matmul", device="meta"), pair(torch.device("cpu"))[1]
    assert again.add_value.is_meta and again.matmul.weight.is_meta and again(torch.empty(2, INS, device="meta")).is_meta
    torch.manual_seed(3)
    again.to_empty(device="cpu").reset_parameters()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in theirs.state_dict().items())


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cuda", "triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_and_gradients(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    ours, theirs = pair(device, backend=backend)
    assert_as_close_to_exact(ours.to(dtype), theirs.to(dtype), torch.randn(2, 5, INS, dtype=dtype, device=device))


def test_without_bias(device: torch.device) -> None:
    ours, theirs = pair(device, bias=False, backend="triton")
    assert_as_close_to_exact(ours, theirs, torch.randn(5, INS, device=device))


CASES = {
    "tanh | mul(add) | sigmoid": lambda z, add: torch.sigmoid(torch.tanh(z) * add),
    "add | mul(add)": lambda z, add: (z + add) * add,
    "sub(add) | gelu": lambda z, add: F.gelu(z - add),
    # x is the Linear's output with its bias.
    "add | sigmoid | mul(x) | add(x)": lambda z, add: torch.sigmoid(z + add) * z + z,
    "add(2) | mul(add)": lambda z, add: (z + 2) * add,
}


@pytest.mark.parametrize("chain", CASES)
@pytest.mark.parametrize("shape", [(OUTS,), (), (5, 1)], ids=str)
def test_chains_that_fold_in_other_ways(chain: str, shape: tuple[int, ...], device: torch.device) -> None:
    class Other(WrittenOut):
        def forward(self, x: Tensor) -> Tensor:
            return CASES[chain](self.matmul(x), self.add_value)

    ours = LinearChain(INS, OUTS, chain, shape, linear="matmul", backend="triton").to(device)
    theirs = Other(INS, OUTS, shape).to(device)
    theirs.load_state_dict(ours.state_dict())
    assert_as_close_to_exact(ours, theirs, torch.randn(5, INS, device=device))


@pytest.mark.usefixtures("python_way")
def test_bias_and_add_have_one_gradient_from_one_reduction(monkeypatch: pytest.MonkeyPatch, device) -> None:
    calls = []
    for method in ("forward", "backward"):
        original = getattr(BACKENDS["triton"], method)

        def watched(*arguments, method=method, original=original):
            last = list(arguments[-1]) if method == "backward" else len(arguments[-1])
            calls.append((method, str(arguments[0]), last))
            return original(*arguments)

        monkeypatch.setattr(BACKENDS["triton"], method, watched)
    ours, _ = pair(device, backend="triton")
    x = torch.randn(5, INS, device=device)
    y = ours(x)
    y.sum().backward()
    chain = str(dualop.chain(CHAIN))
    assert calls == [("forward", chain, 1), ("backward", chain, [True, True])]
    assert torch.equal(ours.matmul.bias.grad, ours.add_value.grad)
    assert ours.matmul.bias.grad.data_ptr() != ours.add_value.grad.data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), y)
    assert calls[2:] == [("forward", f"add(linear_bias) | {chain}", 2)]


def test_the_matrix_product_runs_without_bias(monkeypatch: pytest.MonkeyPatch, device) -> None:
    ours, theirs = pair(device)
    seen = []
    monkeypatch.setattr(F, "linear", lambda *arguments: seen.append(len(arguments)) or torch.matmul(*_t(arguments)))
    x = torch.randn(5, INS, device=device)
    y = ours(x)
    assert seen == [2]
    monkeypatch.undo()
    torch.testing.assert_close(y, theirs(x))


def _t(arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    return arguments[0], arguments[1].t()


def test_chain_layer(device: torch.device) -> None:
    layer = ChainLayer("add(bias) | mul(scale) | sigmoid | add(skip)", (6, 1, 1), (), None, backend="triton").to(device)
    x, skip = torch.randn(2, 6, 4, 8, device=device), torch.randn(2, 6, 4, 8, device=device)
    expected = torch.sigmoid((x + layer.bias) * layer.scale) + skip
    torch.testing.assert_close(layer(x, skip), expected)
    torch.testing.assert_close(layer(x, skip=skip), expected)
    wanted = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    got = torch.autograd.grad(layer(x, skip).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(got, wanted)


# ---- what torch does to modules --------------------------------------------------------------------------------------


def test_double_backward_and_forward_mode(device: torch.device) -> None:
    layer = LinearChain(3, 4, "add | tanh | gelu", backend="cuda", device=device, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))

    inputs = (torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True), *layer.parameters())
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_compiled_in_one_graph(device: torch.device) -> None:
    torch._dynamo.reset()
    ours, _ = pair(device)
    x, gy = torch.randn(5, INS, device=device), torch.randn(5, OUTS, device=device)
    torch.testing.assert_close(gradients(torch.compile(ours, fullgraph=True, backend="aot_eager"), x, gy),
                               {("_orig_mod." if "." in n or n == "add_value" else "") + n: g
                                for n, g in gradients(ours, x, gy).items()})  # fmt: skip


@pytest.mark.parametrize("chain", [CHAIN, "gelu | mul(add)"])
def test_autocast_gives_the_dtype_of_the_written_out_model(chain: str, device: torch.device) -> None:
    ours, theirs = pair(device, chain)
    if chain != CHAIN:
        theirs.forward = lambda x: F.gelu(theirs.matmul(x)) * theirs.add_value
    x = torch.randn(5, INS, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y, expected = ours(x), theirs(x)
        bare = LinearChain(INS, OUTS, "gelu", device=device)(x)
    assert y.dtype == expected.dtype == torch.float32 and bare.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, atol=0.02, rtol=0.02)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())


def test_copies_pickles_dtypes_and_representation(device: torch.device) -> None:
    ours, _ = pair(device, backend="reference")
    x = torch.randn(5, INS, device=device)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(twin(x), ours(x)) and twin.chain == ours.chain and twin.add_value is not ours.add_value
    assert ours.half()(x.half()).dtype == torch.float16
    assert repr(ours) == (
        "LinearChain(\n  'add | silu | tanh | gelu | hardtanh', add_value=(24,), backend='reference'\n"
        "  (matmul): Linear(in_features=16, out_features=24, bias=True)\n)"
    )


def test_a_layer_is_pickled_whatever_draws_its_parameters() -> None:
    offset = 3.0
    layer = LinearChain(INS, OUTS, CHAIN, init=lambda shape, **where: torch.full(shape, offset, **where))
    for twin in (copy.copy(layer), copy.deepcopy(layer)):
        twin.reset_parameters()
        assert torch.equal(twin.add_value, torch.full((OUTS,), offset))
    x = torch.randn(2, INS)
    twin = pickle.loads(pickle.dumps(layer))
    assert torch.equal(twin(x), layer(x))
    with pytest.raises(OperandError, match="without its init"):
        twin.reset_parameters()
    twin.init = torch.zeros
    twin.reset_parameters()
    assert not twin.add_value.any()
    named = pickle.loads(pickle.dumps(ChainLayer("add", (3,), init=partial(torch.full, fill_value=2.0))))
    named.reset_parameters()
    assert torch.equal(named.add_value, torch.full((3,), 2.0))


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    with pytest.raises(ChainError, match="unknown stage"):
        LinearChain(INS, OUTS, "ad")
    with pytest.raises(OperandError, match="missing scale"):
        ChainLayer("add(bias) | mul(scale)", (3,))
    with pytest.raises(OperandError, match="unknown sclae"):
        LinearChain(INS, OUTS, "mul(scale)", sclae=())
    with pytest.raises(OperandError, match="2 operands given"):
        LinearChain(INS, OUTS, "add", (OUTS,), (OUTS,))
    with pytest.raises(OperandError, match="the operand forward cannot be the parameter forward"):
        ChainLayer("add(forward)", (3,))
    with pytest.raises(OperandError, match="the operand add_value cannot be the parameter add_value"):
        ChainLayer("add | mul(add_value)", (3,), (3,))
    with pytest.raises(OperandError, match="cannot be called 'chain'"):
        LinearChain(INS, OUTS, "relu", linear="chain")
    with pytest.raises(OperandError, match="shape of add must be a tuple of sizes"):
        ChainLayer("add", "3")
    with pytest.raises(BackendUnavailable, match="unknown backend 'cud'"):
        ChainLayer("relu", backend="cud")
    with pytest.raises(OperandError, match="missing skip"):
        ChainLayer("add(skip)", None)(torch.randn(3))
    with pytest.raises(OperandError, match=r"forward takes \(x\), not 1 operands"):
        ChainLayer("add", (3,))(torch.randn(3), torch.randn(3))
    with pytest.raises(ShapeError, match="do not broadcast"):
        dualop.nn.LinearChain(INS, OUTS, "add", (OUTS + 1,))(torch.randn(2, INS))


def test_operands_of_forward_are_given_once_and_no_others() -> None:
    layer, x = ChainLayer("add(bias) | add(skip) | mul(gate)", (3,), None, None, backend="reference"), torch.randn(2, 3)
    y = layer(x, x, gate=x)
    assert torch.equal(layer(x, gate=x, skip=x), y) and torch.equal(layer(x, x, x), y)
    for call, message in (
        (lambda: layer(x, x, x, bias=x), r"takes \(x, skip, gate\), not taken or given twice: bias"),
        (lambda: layer(x, x, x, skip=x), "not taken or given twice: skip"),
        (lambda: layer(x, x, gat=x), "not taken or given twice: gat; missing gate"),
        (lambda: layer(x, x, x, x), "not 3 operands"),
    ):
        with pytest.raises(OperandError, match=message):
            call()


def test_a_parameter_that_is_gone_is_named() -> None:
    for remove in (lambda layer: setattr(layer, "add_value", None), lambda layer: delattr(layer, "add_value")):
        for layer in (ChainLayer("add | gelu", (INS,)), LinearChain(INS, OUTS, "add | gelu")):
            remove(layer)
            with pytest.raises(OperandError, match=r"the parameter add_value of this .* is None or was deleted"):
                layer(torch.randn(2, INS))
