"""The short way past torch's dispatcher: taken where nothing watches a call, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dualop
from dualop.errors import DeviceError, DtypeError, LayoutError, ShapeError
from dualop.launch import checks
from dualop.op import function
from dualop.op.eager import unwatched

OP = dualop.chain("add | tanh")
pytestmark = pytest.mark.filterwarnings("ignore")


class Marked(Tensor):
    pass


class Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    def dispatched(*arguments: Any) -> None:
        raise AssertionError("went through the dispatcher")

    monkeypatch.setattr(function, "forward_op", dispatched)
    monkeypatch.setattr(function, "backward_op", dispatched)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [lambda t: t, torch.nn.Parameter])
def test_plain_calls_take_it(make: Callable[[Tensor], Tensor], mode: Any, no_dispatch: None) -> None:
    x, a = make(torch.randn(4, 5)), make(torch.randn(5))
    with mode():
        y = OP(x, a, backend="reference")
    torch.testing.assert_close(y, torch.tanh(x + a))
    assert y.requires_grad == (torch.tanh(x + a).requires_grad and mode is nullcontext)
    if y.requires_grad:
        found = torch.autograd.grad(y, (x, a), torch.ones_like(y))
        torch.testing.assert_close(found, torch.autograd.grad(torch.tanh(x + a).sum(), (x, a)))


def _jvp(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda x: torch.func.jvp(f, (x,), (x,))[1]


def _compiled(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    torch._dynamo.reset()
    return torch.compile(f, backend="eager", fullgraph=True)


def _dual(f: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def inside(x: Tensor) -> Any:
        with forward_ad.dual_level():
            return f(x)

    return inside


WATCHERS: dict[str, Callable[[Callable[[Tensor], Any]], Callable[[Tensor], Any]]] = {
    "compile": _compiled,
    "vmap": lambda f: torch.vmap(f),
    "jvp": _jvp,
    "grad": lambda f: torch.func.grad(f),
    "dual numbers": _dual,
    "jit": lambda f: lambda x: torch.jit.trace(f, (x,), check_trace=False)(x),
}


@pytest.mark.parametrize("name", WATCHERS)
def test_transforms_and_tracers_are_seen(name: str) -> None:
    seen: list[bool] = []

    def inside(x: Tensor) -> Tensor:
        seen.append(unwatched((x,)))
        return x.sin().sum()

    WATCHERS[name](inside)(torch.randn(3))
    assert seen and not any(seen)
    assert unwatched((torch.randn(3),)), "a switch is left on"


def _profile() -> AbstractContextManager[Any]:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])


@pytest.mark.parametrize("mode", [Functions, Dispatch, _profile, torch._subclasses.FakeTensorMode])
def test_modes_are_seen(mode: Any) -> None:
    x = torch.randn(3)
    with mode():
        assert not unwatched((x,))
    assert unwatched((x,))


SPECIAL: dict[str, Callable[[Tensor], Any]] = {
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "meta": lambda x: x.to("meta"),
    "negative": lambda x: torch.view_as_complex(x.reshape(2, 2)).conj().imag,
    "zero": lambda x: torch._efficientzerotensor((4,)),
    "nested": lambda x: torch.nested.nested_tensor([x]),
    "functional": lambda x: torch._to_functional_tensor(x),
    "subclass": lambda x: x.as_subclass(Marked),
    "number": lambda x: 2.0,
    "none": lambda x: None,
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_tensors_are_seen(name: str) -> None:
    x = torch.randn(4)
    special = SPECIAL[name](x)
    assert not unwatched((x, special)) and not unwatched((special, x))


def test_backward_with_create_graph_takes_the_op() -> None:
    x, a = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 5), (5,)))
    y = OP(x, a, backend="reference")
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    expected = torch.autograd.grad(torch.tanh(x + a).sum(), x, create_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(g.sum(), (x, a)), torch.autograd.grad(expected.sum(), (x, a)))


def test_a_wrong_call_is_noticed_behind_a_right_one() -> None:
    x, a = torch.randn(4, 5), torch.randn(5)
    for _ in range(2):
        OP(x, a, backend="reference")
        with pytest.raises(ShapeError, match=r"x \(4, 5\), add \(3,\)"):
            OP(x, a[:3], backend="reference")
        with pytest.raises(DtypeError, match="add is int64"):
            OP(x, a.long(), backend="reference")
        with pytest.raises(DeviceError):
            OP(x, a.to("meta"), backend="reference")
        with pytest.raises(LayoutError, match=r"add is sparse_coo.*to_dense"):
            OP(x, a.to_sparse(), backend="reference")


def test_what_was_checked_is_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CHECKED", 3)
    monkeypatch.setattr(checks, "_checked", {})
    for n in range(1, 9):
        assert OP(torch.ones(n, 2), torch.ones(2), backend="reference").shape == (n, 2)
    assert 1 <= len(checks._checked) <= 3
