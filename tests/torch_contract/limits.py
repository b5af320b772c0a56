"""What PyTorch does not allow. Each check sees that it refuses dualop and something of PyTorch's own alike.

A check fails once PyTorch allows the thing: then the row is to be moved to where dualop shows that it works.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.autograd import grad

import dualop
from torch_contract.case import Case, Function, refused, slow, written_out
from torch_contract.compilation import compiled, generated_kernels


def double_backward_compiled(case: Case) -> None:
    """double backward through a compiled function (compile a function that takes the gradient itself)"""
    x, a = case.tensors()
    for f in (case.chain, written_out):
        (g,) = grad(compiled(f)(x, a).sum(), x, create_graph=True)
        refused(lambda g=g: grad(g.sum(), x), "does not currently support double backward")  # type: ignore[misc]


def saved_inference_tensor(case: Case) -> None:
    """gradients with a tensor that was made in inference mode (clone it)"""
    x, _ = case.tensors()
    with torch.inference_mode():
        a = torch.ones(5, dtype=x.dtype, device=x.device)
    for f in (case.chain, lambda x, a: x * a):
        refused(lambda f=f: f(x, a), "Inference tensors cannot be saved for backward")  # type: ignore[misc]


def unwanted_gradient(case: Case) -> None:
    """in torch.autograd.grad(y, x), leaving out the gradient of an operand that requires one as well (detach it)"""
    asked: list[tuple[bool, ...]] = []

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, a: Tensor) -> Tensor:
            ctx.save_for_backward(x, a)
            return x * a

        @staticmethod
        def backward(ctx: Any, *gy: Tensor) -> tuple[Tensor, Tensor]:
            asked.append(tuple(ctx.needs_input_grad))
            x, a = ctx.saved_tensors
            return gy[0] * a, (gy[0] * x).sum(0)

    x, a = case.tensors()
    grad(Product.apply(x, a).sum(), x)
    with case.spy("backward") as backward:
        grad(case.chain(x, a).sum(), x)
    asked.append(tuple(backward.call_args_list[0].args[-1]))
    assert asked == [(True, True)] * 2, f"asked for {asked}: this row is out of date"


@slow
def recompiled_text(case: Case) -> None:
    """one compilation for several chains: each chain is a constant of the compiled function, as every string is"""
    (x,) = case.tensors((4, 5), grad=False)
    chains = [dualop.chain(text) for text in ("gelu", 'gelu(approximate="tanh")')]
    for f, values in (
        (lambda x, op: op(x, backend=case.backend), chains),
        (lambda x, form: F.gelu(x, approximate=form), ["none", "tanh"]),
    ):
        counter = CompileCounter()
        g = compiled(f, counter)
        for value in values:
            g(x, value)
        assert counter.frame_count == 2, f"compiled {counter.frame_count} times: this row is out of date"


@slow
def fusion_barrier(case: Case) -> None:
    """Inductor's fusion with the neighbours of any op that it did not generate itself"""
    from torch._inductor.utils import run_and_get_code

    @torch.library.custom_op("dualop_torch_contract::sine", mutates_args=())
    def sine(x: Tensor) -> Tensor:
        return x.sin()

    sine.register_fake(torch.empty_like)

    def kernels(f: Function) -> int:
        x, a = case.tensors(grad=False)
        _, (code,) = run_and_get_code(compiled(lambda x, a: f(x.exp(), a) + 1, "inductor"), x, a)
        return len(generated_kernels(code))

    counts = [kernels(f) for f in (case.chain, lambda x, a: sine(x), written_out)]
    assert counts == [2, 2, 1], f"kernels beside dualop's, beside a custom op's, beside nothing: {counts}"
