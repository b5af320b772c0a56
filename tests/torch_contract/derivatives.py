"""torch.autograd: gradients of every order, in every mode."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad, grad, gradcheck, gradgradcheck
from torch.autograd.functional import hessian, jacobian
from torch.autograd.graph import saved_tensors_hooks

import dualop
from torch_contract.case import CHAIN, Case, Function, refused, same, two_written_out, written_out

_FORWARD_OVER_REVERSE: dict[str, Any] = dict(
    check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False
)


def gradients(case: Case) -> None:
    """gradients of x and of the operand"""
    x, a = case.tensors()
    case.agree(lambda f: grad(f(x, a).square().sum(), (x, a)))


def gradcheck_float64(case: Case) -> None:
    """gradcheck"""
    x, a = case.tensors((2, 3), (3,))
    gradcheck(case.chain, (x, a))


def gradgradcheck_float64(case: Case) -> None:
    """gradgradcheck, reverse over reverse"""
    x, a = case.tensors((2, 2), (2,))
    gradgradcheck(case.chain, (x, a))


def gradgradcheck_forward(case: Case) -> None:
    """gradgradcheck, forward over reverse"""
    x, a = case.tensors((2, 2), (2,))
    gradgradcheck(case.chain, (x, a), **_FORWARD_OVER_REVERSE)


def third_order(case: Case) -> None:
    """third derivatives"""
    x, a = case.tensors()

    def third(f: Function) -> list[Tensor]:
        y = f(x, a).sum()
        for _ in range(2):
            y = grad(y, x, create_graph=True)[0].sum()
        return list(grad(y, (x, a)))

    case.agree(third)


def forward_mode(case: Case) -> None:
    """forward mode: gradcheck of dual numbers"""
    x, a = case.tensors((2, 3), (3,))
    gradcheck(case.chain, (x, a), check_forward_ad=True, check_backward_ad=False)


def forward_over_reverse(case: Case) -> None:
    """forward mode over reverse mode, with dual numbers"""
    x, a = case.tensors()

    def tangent(f: Function) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            (g,) = grad(f(dual, a).square().sum(), a, create_graph=True)
            return forward_ad.unpack_dual(g).tangent

    case.agree(tangent)


def any_needs(case: Case) -> None:
    """gradients in any combination, and none computed that nobody needs"""
    for needs in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)):
        tensors = case.tensors((4, 5), (5,), (5,))
        for t, need in zip(tensors, needs, strict=True):
            t.requires_grad_(bool(need))
        wanted = [t for t in tensors if t.requires_grad]
        with case.spy("backward") as backward:
            found = grad(case.two(*tensors).square().sum(), wanted)
        same(found, grad(two_written_out(*tensors).square().sum(), wanted))
        (call,) = backward.call_args_list
        assert tuple(call.args[-1]) == tuple(map(bool, needs)), "gradients were computed that nobody needs"
    x, a = case.tensors(grad=False)
    assert not case.chain(x, a).requires_grad


def reused_operand(case: Case) -> None:
    """one tensor as x and as the operand"""
    (x,) = case.tensors((4, 5))
    case.agree(lambda f: grad(f(x, x).square().sum(), x))
    case.agree(lambda f: grad(grad(f(x, x).square().sum(), x, create_graph=True)[0].sum(), x))


def repeated(case: Case) -> None:
    """backward twice with retain_graph, gradients added up"""
    x, a = case.tensors()

    def twice(f: Function) -> list[Tensor]:
        y = f(x, a)
        for _ in range(2):
            y.square().sum().backward(inputs=[x, a], retain_graph=True)
        found = [x.grad.clone(), a.grad.clone()]  # type: ignore[union-attr]
        x.grad = a.grad = None
        return found

    case.agree(twice)


def batched(case: Case) -> None:
    """many cotangents at once: is_grads_batched, jacobian and hessian of torch.autograd.functional, vectorized"""
    x, a = case.tensors()
    cotangents = torch.eye(20, dtype=x.dtype, device=x.device).reshape(20, 4, 5)
    case.agree(lambda f: grad(f(x, a), (x, a), cotangents, is_grads_batched=True))
    case.agree(lambda f: jacobian(f, (x, a), vectorize=True))
    case.agree(lambda f: jacobian(f, (x, a), vectorize=True, strategy="forward-mode"))
    case.agree(lambda f: hessian(lambda x, a: f(x, a).square().sum(), (x, a), vectorize=True))


def strided_cotangents(case: Case) -> None:
    """cotangents that are expanded, transposed, sliced"""
    x, a = case.tensors()
    (drawn,) = case.tensors((5, 8), grad=False)
    for gy in (drawn[0, 0].expand(4, 5), drawn[:, :4].t(), drawn.t()[::2]):
        case.agree(lambda f, gy=gy: grad(f(x, a), (x, a), gy))  # type: ignore[misc]


def physics_informed(case: Case) -> None:
    """a physics-informed loss: the Laplacian of a network, differentiated for its parameters"""
    points, first, add, last = case.tensors((6, 2), (2, 5), (5,), (5, 1))

    def loss_gradients(f: Function) -> Any:
        u = f(points @ first, add) @ last
        (slope,) = grad(u.sum(), points, create_graph=True)
        laplacian = sum(grad(slope[:, i].sum(), points, create_graph=True)[0][:, i] for i in range(2))
        return grad((laplacian + u[:, 0]).square().mean(), (first, add, last))

    case.agree(loss_gradients)


def no_cotangent(case: Case) -> None:
    """a result whose consumer passes no gradient back"""

    class Silent(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
            return y + x

        @staticmethod
        def backward(ctx: Any, *gy: Tensor) -> tuple[None, Tensor]:
            return None, gy[0]

    x, a = case.tensors()
    found = grad(Silent.apply(case.chain(x, a), x).sum(), (x, a), allow_unused=True, materialize_grads=True)
    same(found, (torch.ones_like(x), torch.zeros_like(a)))


def saved_tensors(case: Case) -> None:
    """saved-tensor hooks, which see x and the operand and nothing else; save_on_cpu"""
    x, a = case.tensors()
    seen: list[Tensor] = []
    with saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = case.chain(x, a)
    assert sorted(t.data_ptr() for t in seen) == sorted((x.data_ptr(), a.data_ptr())), f"saved {len(seen)} tensors"
    expected = grad(written_out(x, a).sum(), (x, a))
    same(grad(y.sum(), (x, a)), expected)
    with torch.autograd.graph.save_on_cpu():
        same(grad(case.chain(x, a).sum(), (x, a)), expected)


def changed_input(case: Case) -> None:
    """an input that is changed in place before backward is noticed"""
    x, a = case.tensors()
    b = a * 1
    y = case.chain(x, b)
    b.mul_(2)
    refused(lambda: y.sum().backward(), "modified by an inplace operation")


def anomaly_detection(case: Case) -> None:
    """anomaly detection"""
    x, a = case.tensors()
    with torch.autograd.detect_anomaly(check_nan=True):
        case.agree(lambda f: grad(f(x, a).sum(), (x, a)))


def training(case: Case) -> None:
    """a module: training steps, deepcopy, pickle, state_dict"""
    x, target = case.tensors((4, 5), (4, 5), grad=False)

    def trained(f: Function) -> list[Tensor]:
        torch.manual_seed(0)
        model = _Model(f).to(case.device, torch.float64)
        for net in (model, copy.deepcopy(model)):
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            for _ in range(2):
                optimizer.zero_grad()
                (net(x) - target).square().mean().backward()
                optimizer.step()
        other = _Model(f).to(case.device, torch.float64)
        other.load_state_dict(model.state_dict())
        return [*net.parameters(), *other.parameters()]

    case.agree(trained)
    op = pickle.loads(pickle.dumps(partial(dualop.chain(CHAIN), backend=case.backend)))
    same(op(x, x[0]), case.chain(x, x[0]))


class _Model(torch.nn.Module):
    def __init__(self, f: Function) -> None:
        super().__init__()
        self.f = f
        self.linear = torch.nn.Linear(5, 5)
        self.add = torch.nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.linear(x), self.add)
