"""What looks at the ops from outside: fake tensors, dispatch modes, checkpoints, tracers, the profiler, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import grad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dualop
from dualop.backends.registry import BACKENDS
from torch_contract.case import CHAIN, Case, Function, Skip, same, slow, written_out


class _Names(TorchDispatchMode):
    """The names of the ops of dualop that pass."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "dualop":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


@slow
def opcheck(case: Case) -> None:
    """torch.library.opcheck of both ops"""
    x, a, gy = case.tensors((4, 5), (5,), (4, 5))
    text = dualop.chain(CHAIN).text
    torch.library.opcheck(torch.ops.dualop.forward.default, (x, [a], text, case.backend))
    torch.library.opcheck(torch.ops.dualop.forward.default, (x.detach(), [a.detach()], text, case.backend))
    for needs in ([True, True], [False, True]):
        torch.library.opcheck(torch.ops.dualop.backward.default, (gy, x, [a], text, case.backend, needs))


def meta(case: Case) -> None:
    """meta tensors, forward and backward"""
    x, a = (t.detach().to("meta").requires_grad_() for t in case.tensors())
    y = case.chain(x, a)
    assert y.device.type == "meta" and y.shape == (4, 5) and y.dtype == x.dtype
    assert [g.shape for g in grad(y.sum(), (x, a))] == [(4, 5), (5,)]


def fake_tensors(case: Case) -> None:
    """FakeTensorMode, forward and backward"""
    with FakeTensorMode():
        x = torch.empty(4, 5, device=case.device, requires_grad=True)
        a = torch.empty(5, device=case.device, requires_grad=True)
        y = case.chain(x, a)
        gradients = grad(y.sum(), (x, a))
    assert y.shape == (4, 5) and y.device.type == case.device.type
    assert [g.shape for g in gradients] == [(4, 5), (5,)]


def dispatch_mode(case: Case) -> None:
    """dispatch modes see one op forward and one backward"""
    x, a = case.tensors()
    with _Names() as seen:
        y = case.chain(x, a)
        found = grad(y.square().sum(), (x, a))
    same(found, grad(written_out(x, a).square().sum(), (x, a)))
    assert seen.names == ["forward", "backward"], f"saw {seen.names}"


def function_mode(case: Case) -> None:
    """__torch_function__ modes see the op"""
    from torch.overrides import TorchFunctionMode

    seen: list[str] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, a = case.tensors()
    with Functions():
        case.chain(x, a)
    assert sum("dualop" in name for name in seen) == 1, f"saw {seen}"


def checkpointing(case: Case) -> None:
    """activation checkpointing, reentrant too"""
    x, a = case.tensors()
    for reentrant in (False, True):
        again = partial(checkpoint, use_reentrant=reentrant)
        case.agree(lambda f, again=again: _backward(again(f, x, a), x, a))  # type: ignore[misc]


def _backward(y: Tensor, x: Tensor, a: Tensor) -> list[Tensor]:
    y.square().sum().backward()
    gradients = [x.grad, a.grad]
    x.grad = a.grad = None
    return gradients  # type: ignore[return-value]


def selective_checkpointing(case: Case) -> None:
    """selective activation checkpointing: the op may be saved, or computed again"""
    x, a = case.tensors()
    for policy, calls in ((CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.MUST_RECOMPUTE, 2)):

        def choose(context: Any, op: Any, *args: Any, policy: Any = policy, **kwargs: Any) -> Any:
            return policy if op is torch.ops.dualop.forward.default else CheckpointPolicy.MUST_RECOMPUTE

        def gradients(f: Function, choose: Any = choose) -> Any:
            contexts = partial(create_selective_checkpoint_contexts, choose)
            y = checkpoint(lambda x, a: f(x, a).sin(), x, a, use_reentrant=False, context_fn=contexts)
            return grad(y.sum(), (x, a))

        with case.spy("forward") as forward:
            case.agree(gradients)
        assert forward.call_count == calls, f"{policy.name}: the kernel ran {forward.call_count} times"


def tracing(case: Case) -> None:
    """make_fx, torch.fx.symbolic_trace, torch.jit.trace"""
    x, a = case.tensors(grad=False)
    for traced in (make_fx(case.chain)(x, a), torch.fx.symbolic_trace(case.chain)):
        ops = [node.target for node in traced.graph.nodes if node.op == "call_function"]
        assert ops == [torch.ops.dualop.forward.default], f"traced {ops}"
        same(traced(2 * x, a), written_out(2 * x, a))
    same(torch.fx.symbolic_trace(lambda a: case.chain(x, a))(2 * a), written_out(x, 2 * a))
    same(torch.jit.trace(case.chain, (x, a))(2 * x, a), written_out(2 * x, a))


class _Scripted(torch.nn.Module):
    def __init__(self, chain: str, backend: str) -> None:
        super().__init__()
        self.chain, self.backend = chain, backend

    def forward(self, x: Tensor, add: Tensor) -> Tensor:
        return torch.ops.dualop.forward(x, [add], self.chain, self.backend)


def scripted(case: Case) -> None:
    """torch.jit.script, of the op itself: torch.ops.dualop.forward(x, [add], chain, backend)"""
    x, a = case.tensors()
    model = torch.jit.script(_Scripted(dualop.chain(CHAIN).text, case.backend))
    same(grad(model(x, a).square().sum(), (x, a)), grad(written_out(x, a).square().sum(), (x, a)))


def profiler(case: Case) -> None:
    """the profiler names the ops"""
    from torch.profiler import ProfilerActivity, profile

    x, a = case.tensors()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        case.chain(x, a).sum().backward()
    names = {event.name for event in profiled.events() or ()}
    assert {"dualop::forward", "dualop::backward"} <= names, f"named {sorted(names)}"


def threads(case: Case) -> None:
    """calls from several threads at once"""
    if case.backend == "triton" and BACKENDS["triton"].interpreted:
        raise Skip("in Triton's interpreter, which patches its language's functions for one thread")
    x, a = case.tensors()
    inputs = [((x * i).detach().requires_grad_(), a) for i in range(1, 5)]

    def gradients(f: Function) -> list[Any]:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(lambda pair: grad(f(*pair).square().sum(), pair), inputs))

    case.agree(gradients)
