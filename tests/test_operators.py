"""The ops by their own names, as a compiled graph calls them: known calls are replayed, and watchers see them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_consistency import bits
from test_direct import Dispatch, Functions
from test_native import OP, python, said, variants
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from dualop import replay
from dualop.build.build import Build
from dualop.errors import ChainError, OperandError, ShapeError

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("nothing_known")]
TEXT = OP.text
Pair = tuple[Tensor, Tensor]


def forward(x: Tensor, a: Tensor, backend: str = "cuda", text: str = TEXT) -> Tensor:
    return torch.ops.dualop.forward(x, [a], text, backend)


def backward(gy: Tensor, x: Tensor, a: Tensor, needs: Any = (True, True), backend: str = "cuda") -> list[Tensor]:
    return torch.ops.dualop.backward(gy, x, [a], TEXT, backend, list(needs))


def own(x: Tensor, a: Tensor) -> Tensor:
    return torch.tanh(x + a)


def leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


# ---- replay ----------------------------------------------------------------------------------------------------------


def test_a_known_call_does_not_enter_python(pair: Pair, by_python: list[str], device: torch.device) -> None:
    (x, a), gy = pair, torch.randn(4, 5, device=device)
    entered: list[str] = []
    table = vars(torch.ops.dualop)["_dualop"]["table"]
    kept = dict(table)
    for (name, key), function in kept.items():
        table[name, key] = lambda *given, f=function, at=f"{name} {key}": entered.append(at) or f(*given)
    try:
        first = [forward(x, a), *backward(gy, x, a)]
        assert entered == [f"forward {device.type.upper()}", f"backward {device.type.upper()}"]
        for _ in range(2):
            again = [forward(x, a), *backward(gy, x, a)]
            for one, other in zip(first, again, strict=True):
                assert one.stride() == other.stride() and torch.equal(bits(one), bits(other))
        assert len(entered) == 2 and by_python == ["forward", "backward"]
    finally:
        table.update(kept)
    torch.testing.assert_close(first[0], own(x, a))


def test_chains_and_ops_share_what_they_learn(pair: Pair, by_python: list[str]) -> None:
    x, a = leaves(*pair)
    y = OP(x, a, backend="cuda")
    torch.autograd.grad(y, (x, a), torch.ones_like(y))
    torch.testing.assert_close(forward(*pair), y.detach())
    backward(torch.ones_like(y), *pair)
    assert by_python == ["forward", "backward"]
    replay.known.clear()
    forward(*pair)
    backward(torch.ones_like(y), *pair)
    y = OP(x, a, backend="cuda")
    found = torch.autograd.grad(y, (x, a), torch.ones_like(y))
    torch.testing.assert_close(found, torch.autograd.grad(own(x, a).sum(), (x, a)))
    assert by_python == ["forward", "backward"] * 2


def test_each_layout_and_each_set_of_gradients_has_its_own_record(device: torch.device, by_python: list[str]) -> None:
    some = ((True, False), (False, True), (True, True))
    everything = [(x, a, needs) for x, a in variants(device) for needs in some]
    expected = [(forward(x, a), backward(torch.ones_like(x + a), x, a, needs)) for x, a, needs in everything]
    entered = len(by_python)
    for (x, a, needs), (y, gradients) in reversed(list(zip(everything, expected, strict=True))):
        found = [forward(x, a), *backward(torch.ones_like(y), x, a, needs)]
        for one, other in zip(found, [y, *gradients], strict=True):
            assert one.stride() == other.stride() and torch.equal(bits(one), bits(other)), (x, a, needs)
    assert len(by_python) == entered


def test_no_gradients_at_all(pair: Pair) -> None:
    for _ in range(3):
        assert backward(pair[0], *pair, needs=(False, False)) == []


def test_the_second_derivative_is_replayed(device: torch.device, by_python: list[str]) -> None:
    x, gy, v = (torch.randn(4, 5, device=device) for _ in range(3))
    curve = lambda: torch.ops.dualop.backward(v, x, [gy], "tanh", "cuda", [True, True], 2)
    slope = lambda: torch.ops.dualop.backward(v, x, [], "tanh", "cuda", [True])
    first, one = curve(), slope()
    for _ in range(2):
        assert all(map(torch.equal, curve(), first)) and torch.equal(slope()[0], one[0])
    assert by_python == ["backward"] * 2
    (x,), t = leaves(x), torch.tanh(x)
    torch.testing.assert_close(first[1], v * (1 - t * t))
    torch.testing.assert_close(first[0], -2 * v * gy * t * (1 - t * t))


def test_other_spellings_and_auto_are_known_too(pair: Pair, by_python: list[str]) -> None:
    for _ in range(3):
        torch.testing.assert_close(forward(*pair, text=" add|tanh "), own(*pair))
    assert by_python == ["forward"] and (" add|tanh ", "cuda") in replay.known
    for _ in range(3):
        torch.testing.assert_close(forward(*pair, backend="reference"), own(*pair))
    assert (TEXT, "reference") not in replay.known


def test_after_forget_python_is_asked_again(pair: Pair, by_python: list[str]) -> None:
    for _ in range(2):
        forward(*pair)
    replay.forget()
    for _ in range(2):
        forward(*pair)
    assert by_python == ["forward"] * 2


def test_a_launch_that_fails_goes_python_s_way(pair: Pair, by_python: list[str]) -> None:
    library = Build("fails", 'extern "C" int fails(const void*) { return 1; }\n', host=True).load()
    x, a = pair
    forward(x, a)
    launch = (replay.record.address(library.fails), [0] * 3, [1, 2, 0], [0, 1, 2], 0, None)
    for allowed in (None, lambda: False):
        replay.known[TEXT, "cuda"].learn(None, pair, (torch.empty_like(x),), ((*launch[:5], allowed),), (0,))
        torch.testing.assert_close(forward(x, a), own(x, a))
    assert by_python == ["forward"] * 3


def test_errors_are_those_of_a_first_call(pair: Pair) -> None:
    x, a = pair
    op = torch.ops.dualop.backward
    for _ in range(2):
        forward(x, a), backward(x, x, a), op(x, x, [], "tanh", "cuda", [True])
        with pytest.raises(OperandError, match="has 2 gradients"):
            backward(x, x, a, needs=(True,))
        for needs, order in (([True], 0), ([True], 3), ([True], 2**48 + 1), ([], 2), ([], 3)):
            with pytest.raises((OperandError, ChainError)):
                op(x, x, [], "tanh", "cuda", needs, order)
        with pytest.raises(ShapeError, match="gy has to have"):
            backward(x[:2], x, a)
        with pytest.raises(OperandError, match="takes"):
            torch.ops.dualop.forward(x, [a, a], TEXT, "cuda")
        with pytest.raises(ChainError):
            torch.ops.dualop.forward(x, [a], "add | tan", "cuda")


# ---- who watches -----------------------------------------------------------------------------------------------------


def known(x: Tensor, a: Tensor) -> Pair:
    y = forward(*leaves(x, a))
    backward(torch.ones_like(y), x, a)
    return x, a


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(function)
        return function(*args, **(kwargs or {}))


def test_a_node_of_autograd_s(pair: Pair, by_python: list[str]) -> None:
    known(*pair)
    x, a = leaves(*pair)
    y = forward(x, a)
    assert y.requires_grad and y.grad_fn is not None
    found = torch.autograd.grad(y.sum(), (x, a))
    torch.testing.assert_close(found, torch.autograd.grad(own(x, a).sum(), (x, a)))
    y = forward(x, a)
    torch.autograd.grad(y, (x, a), torch.ones_like(y))
    assert by_python.count("forward") == 1
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            assert not forward(x, a).requires_grad
    assert not forward(*pair).requires_grad
    assert not any(g.requires_grad for g in backward(torch.ones_like(y), *pair))


def test_gradients_of_gradients(pair: Pair) -> None:
    known(*pair)
    x, a = leaves(*(t.double() for t in pair))
    for _ in range(2):
        assert torch.autograd.gradcheck(forward, (x, a))
        assert torch.autograd.gradgradcheck(forward, (x, a))


def test_transforms(pair: Pair) -> None:
    x, a = known(*pair)

    def tangent(f: Callable[[Tensor, Tensor], Tensor]) -> Any:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)), a)).tangent

    for _ in range(2):
        for of in (
            lambda f: torch.func.grad(lambda x: f(x, a).sum())(x),
            lambda f: torch.vmap(f, (0, None))(x, a),
            lambda f: torch.func.jvp(lambda x: f(x, a), (x,), (x,)),
            lambda f: torch.func.hessian(lambda x: f(x, a).sum())(x),
            tangent,
        ):
            torch.testing.assert_close(of(forward), of(own))
        forward(x, a)


def test_modes_see_the_ops(pair: Pair, by_python: list[str]) -> None:
    x, a = known(*pair)
    with Seen() as mode:
        torch.testing.assert_close(forward(x, a), own(x, a))
        backward(x, x, a)
    assert torch.ops.dualop.forward.default in mode.ops and torch.ops.dualop.backward.default in mode.ops
    for other in (Functions, Dispatch):
        with other():
            torch.testing.assert_close(forward(x, a), own(x, a))
    with torch._subclasses.FakeTensorMode() as fakes:
        y = forward(fakes.from_tensor(x), fakes.from_tensor(a))
        assert isinstance(y, torch._subclasses.FakeTensor) and y.shape == x.shape
    assert forward(x.to("meta"), a.to("meta")).is_meta
    assert by_python == ["forward", "backward"], "all others were replayed"


def test_the_profiler_has_the_ops(pair: Pair) -> None:
    x, a = known(*pair)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        forward(x, a)
        backward(x, x, a)
    assert {"dualop::forward", "dualop::backward"} <= {event.key for event in profile.key_averages()}


class Marked(Tensor):
    pass


def test_a_subclass_stays_one(pair: Pair) -> None:
    x, a = known(*pair)
    y = forward(x.as_subclass(Marked), a)
    assert type(y) is Marked
    torch.testing.assert_close(y.as_subclass(Tensor), own(x, a))


# ---- compiled graphs -------------------------------------------------------------------------------------------------


def check_compiled(backend: str, device: torch.device, by_python: list[str], **how: Any) -> None:
    torch._dynamo.reset()
    x, a = (torch.randn(shape, device=device, requires_grad=True) for shape in ((64, 32), (32,)))
    f = torch.compile(lambda x, a: OP(x * 2, a, backend=backend).sin(), fullgraph=True, **how)
    for step in range(5):
        if "mode" in how:
            torch.compiler.cudagraph_mark_step_begin()
        y = f(x, a)
        found = torch.autograd.grad(y.square().sum(), (x, a))
        expected = own(x * 2, a).sin()
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), (x, a)))
        if step == 0:
            assert by_python[:2] == ["forward", "backward"]
    assert len(by_python) == 2


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, {"options": {"cpp_wrapper": True}}], ids=["Python's wrapper", "cpp_wrapper"])
def test_a_compiled_graph_replays(how: dict[str, Any], device: torch.device, by_python: list[str]) -> None:
    check_compiled("cuda", device, by_python, **how)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_compiled_graph_replays_on_a_gpu(mode: str, backend: str, device: torch.device, by_python: list[str]) -> None:
    check_compiled(backend, device, by_python, mode=mode)


# ---- the process -----------------------------------------------------------------------------------------------------

START = """
import gc, sys, threading, torch, dualop
from dualop import replay
from dualop.backends.registry import BACKENDS
x, a = torch.randn(4, 5), torch.randn(5)
forward = torch.ops.dualop.forward.default
def check():
    torch.testing.assert_close(forward(x, [a], "add | tanh", "cuda"), torch.tanh(x + a))
def kernel(key):
    table = torch._C._dispatch_dump_table("dualop::forward")
    return next(line.split(": ", 1)[1] for line in table.splitlines() if line.startswith(key + ":"))
"""


@pytest.mark.slow
def test_without_the_extension_python_s_kernels_serve() -> None:
    code = """
for _ in range(3):
    check()
assert not replay.load() and not replay.known
assert "fallthrough" in kernel("BackendSelect") and "definition.py" in kernel("AutogradCPU")
"""
    said(python(START + code, DUALOP_NATIVE="0", DUALOP_INTERPRET="1"))


@pytest.mark.slow
def test_the_kernels_survive_another_import() -> None:
    code = """
assert replay.load()
check()
for _ in range(2):
    for name in [name for name in sys.modules if name.split(".")[0] == "dualop"]:
        del sys.modules[name]
    gc.collect()
    import dualop
    from dualop import replay
    from dualop.backends.registry import BACKENDS
    assert replay.load() and "dualop/replay" in kernel("BackendSelect") and not replay.known
    calls, forward_of = [], BACKENDS["cuda"].forward
    BACKENDS["cuda"].forward = lambda *given: calls.append(1) or forward_of(*given)
    for _ in range(3):
        check()
    assert len(calls) == 1 and len(replay.known["add | tanh", "cuda"]) == 1, "the newest import learns"
"""
    said(python(START + code, DUALOP_INTERPRET="1"))


@pytest.mark.slow
def test_threads_that_call_the_op_while_the_kernels_are_registered() -> None:
    code = """
replay.on = False
check()
assert "fallthrough" in kernel("BackendSelect")
replay.on, stop, wrong = True, False, []
def work():
    while not stop:
        try:
            check()
        except BaseException as error:
            wrong.append(error)
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
assert replay.load() and "dualop/replay" in kernel("BackendSelect")
for _ in range(50):
    check()
stop = True
for thread in threads:
    thread.join()
assert not wrong, wrong[0]
"""
    said(python(START + code, DUALOP_INTERPRET="1"))


@pytest.mark.slow
def test_threads_that_python_has_never_seen(tmp_path: Path) -> None:
    """torch's own, in which TorchScript runs forks."""
    code = """
from typing import List
assert replay.load()
@torch.jit.script
def call(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return torch.ops.dualop.forward(x, [a], "add | tanh", "cuda")
@torch.jit.script
def calls(x: torch.Tensor, a: torch.Tensor) -> List[torch.Tensor]:
    futures = torch.jit.annotate(List[torch.jit.Future[torch.Tensor]], [])
    for _ in range(20):
        futures.append(torch.jit.fork(call, x, a))
    return [torch.jit.wait(one) for one in futures]
for _ in range(5):
    for wanted in (False, True):
        for y in calls(x.clone().requires_grad_(wanted), a):
            assert y.requires_grad == wanted and torch.allclose(y, torch.tanh(x + a))
assert len(replay.known["add | tanh", "cuda"]) == 1
"""
    script = tmp_path / "script.py"
    script.write_text(START + code)
    said(python(f"import runpy; runpy.run_path({str(script)!r})", DUALOP_INTERPRET="1"))
