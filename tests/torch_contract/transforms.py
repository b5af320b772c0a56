"""torch.func: its transforms, alone and nested in each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, vmap
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, linearize, vjp
from torch.func import grad as fgrad

from torch_contract.case import Case, Function, same, written_out


def _square(f: Function) -> Function:
    return lambda x, a: f(x, a).square().sum()


def _along_a(f: Function, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda a: f(x, a) ** 3


def gradient(case: Case) -> None:
    """grad of both arguments"""
    x, a = case.tensors()
    case.agree(lambda f: fgrad(_square(f), argnums=(0, 1))(x, a))


def gradient_of_gradient(case: Case) -> None:
    """grad of grad"""
    x, a = case.tensors()
    case.agree(lambda f: fgrad(lambda x: fgrad(_square(f))(x, a).pow(2).sum())(x))


def autograd_of_gradient(case: Case) -> None:
    """torch.autograd.grad of grad"""
    x, a = case.tensors()
    case.agree(lambda f: torch.autograd.grad(fgrad(_square(f))(x, a).pow(2).sum(), (x, a)))


def vector_jacobian(case: Case) -> None:
    """vjp"""
    x, a = case.tensors()
    case.agree(lambda f: vjp(f, x, a)[1](torch.ones_like(x)))


def jacobian_vector(case: Case) -> None:
    """jvp, linearize"""
    x, a, u, v = case.tensors((4, 5), (5,), (4, 5), (5,), grad=False)
    case.agree(lambda f: jvp(f, (x, a), (u, v)))
    same(linearize(case.chain, x, a)[1](u, v), jvp(written_out, (x, a), (u, v))[1])


def jacobians(case: Case) -> None:
    """jacrev, jacfwd"""
    x, a = case.tensors((2, 3), (3,))
    case.agree(lambda f: jacrev(f, argnums=(0, 1))(x, a))
    case.agree(lambda f: jacfwd(f, argnums=(0, 1))(x, a))


def hessians(case: Case) -> None:
    """hessian, jacrev of jacrev, jacrev of jacfwd, jacfwd of jacfwd"""
    x, a = case.tensors((2, 3), (3,))
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        case.agree(lambda f, o=outer, i=inner: o(i(lambda a: _square(f)(x, a)))(a))  # type: ignore[misc]
    case.agree(lambda f: hessian(_square(f), argnums=(0, 1))(x, a))


def gradient_of_jvp(case: Case) -> None:
    """grad of jvp, jvp of grad"""
    x, a = case.tensors()
    one = torch.ones_like(a)
    case.agree(lambda f: fgrad(lambda x: jvp(_along_a(f, x), (a,), (one,))[1].sum())(x))
    case.agree(lambda f: jvp(fgrad(partial(_square(f), x)), (a,), (one,)))


def jvp_of_jvp(case: Case) -> None:
    """jvp of jvp"""
    x, a = case.tensors()
    one = torch.ones_like(a)
    case.agree(lambda f: jvp(lambda a: jvp(_along_a(f, x), (a,), (one,))[1], (a,), (one,))[1])


def vmap_of_jvp(case: Case) -> None:
    """vmap of jvp, vmap of vjp"""
    x, a = case.tensors((3, 5), (5,))
    eye = torch.eye(5, dtype=a.dtype, device=a.device)
    case.agree(lambda f: vmap(lambda t: jvp(_along_a(f, x), (a,), (t,))[1])(eye))
    case.agree(lambda f: vmap(vjp(_along_a(f, x), a)[1])(torch.stack([x, 2 * x]))[0])


def vmap_forms(case: Case) -> None:
    """vmap: in_dims, out_dims, nested, in chunks"""
    x, a = case.tensors()
    case.agree(lambda f: vmap(f, in_dims=(0, None))(x, a))
    case.agree(lambda f: vmap(f, in_dims=(1, 0), out_dims=1)(x, a))
    case.agree(lambda f: vmap(f, in_dims=(-1, 0), out_dims=-1)(x, a))
    case.agree(lambda f: vmap(vmap(f), in_dims=(0, None))(x, a))
    case.agree(lambda f: vmap(vmap(f, (None, 0)), (0, None))(x, a))
    case.agree(lambda f: vmap(f, in_dims=(0, None), chunk_size=3)(x, a))


def vmap_of_nothing(case: Case) -> None:
    """vmap over a batch of size 0, and over samples that are empty; their gradients"""
    for shapes in (((0, 4, 5), (5,)), ((0, 4, 5), (0, 5)), ((3, 0, 5), (3, 5)), ((2, 4, 0), (0,)), ((0,), (0,))):
        x, a = case.tensors(*shapes)
        dims = (0, 0 if len(shapes[1]) > 1 or shapes[0] == (0,) else None)
        case.agree(lambda f, x=x, a=a, dims=dims: vmap(f, dims)(x, a))  # type: ignore[misc]
        case.agree(lambda f, x=x, a=a, dims=dims: vmap(fgrad(_square(f), (0, 1)), dims)(x, a))  # type: ignore[misc]
    x, a = case.tensors((4, 0), (0,))
    case.agree(lambda f: jacrev(f)(x, a))
    case.agree(lambda f: jacfwd(f)(x, a))


def vmap_of_operand(case: Case) -> None:
    """vmap: the operand batched and x not, operands of different ranks"""
    x, a, many = case.tensors((4, 5), (5,), (2, 4, 1))
    case.agree(lambda f: vmap(f, in_dims=(None, 0))(x, torch.stack([a, 2 * a])))
    case.agree(lambda f: vmap(f, in_dims=(None, 0))(x, many))
    case.agree(lambda f: vmap(f, in_dims=(0, None))(a, x))


def vmap_of_gradient(case: Case) -> None:
    """vmap of grad, grad of vmap"""
    x, a = case.tensors()
    case.agree(lambda f: vmap(fgrad(_square(f), argnums=(0, 1)), in_dims=(0, None))(x, a))
    case.agree(lambda f: fgrad(lambda x: vmap(f, in_dims=(0, None))(x, a).pow(2).sum())(x))


def per_sample_gradients(case: Case) -> None:
    """per-sample gradients of a module's parameters"""
    x, weight, add = case.tensors((3, 5), (5, 5), (5,), grad=False)

    def gradients(f: Function) -> Any:
        parameters = {"weight": weight, "add": add}
        loss = lambda p, x: f(x @ p["weight"], p["add"]).square().sum()
        return vmap(fgrad(loss), in_dims=(None, 0))(parameters, x)

    case.agree(gradients)


def ensemble(case: Case) -> None:
    """an ensemble of modules: stack_module_state, functional_call, vmap"""
    (x,) = case.tensors((4, 5), grad=False)

    class Shift(torch.nn.Module):
        def __init__(self, f: Function, seed: int) -> None:
            super().__init__()
            self.f = f
            self.add = torch.nn.Parameter(case.tensors((5,), seed=seed)[0].detach())

        def forward(self, x: Tensor) -> Tensor:
            return self.f(x, self.add)

    def together(f: Function) -> Tensor:
        models = [Shift(f, seed) for seed in range(3)]
        parameters, buffers = torch.func.stack_module_state(models)  # type: ignore[arg-type]
        return vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)), (0, 0, None))(parameters, buffers, x)

    case.agree(together)


def functionalized(case: Case) -> None:
    """functionalize"""
    x, a = case.tensors(grad=False)
    case.agree(lambda f: torch.func.functionalize(lambda x, a: f(x, a).mul_(2))(x, a))
