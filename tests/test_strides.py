"""Memory format: a result and its gradients have the strides that tracers are told, whatever computes them.

Strides are compared as torch compares them (opcheck, Inductor): those of empty tensors and of dimensions of size 1 say
nothing, and torch's own kernels and meta kernels differ there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import dualop
from dualop.backends import registry
from dualop.language.stages import STAGES

assert dualop.op.library  # registers the ops

if not registry.interpreting():
    pytest.skip("on CPU tensors, with DUALOP_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("reference", "cuda", "triton")
forward, backward = torch.ops.dualop.forward, torch.ops.dualop.backward
randn, last = torch.randn, torch.channels_last

FORMS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: randn(2, 3, 4, 5),
    "channels_last": lambda: randn(2, 3, 4, 5).to(memory_format=last),
    "channels_last_3d": lambda: randn(2, 3, 2, 4, 5).to(memory_format=torch.channels_last_3d),
    "transposed": lambda: randn(4, 6).t(),
    "permuted": lambda: randn(2, 3, 4).permute(2, 0, 1),
    "sliced": lambda: randn(6, 33)[:, 3:20],
    "stepped": lambda: randn(6, 32)[:, ::2],
    "sliced and transposed": lambda: randn(9, 6)[:8].t(),
    "sliced channels_last": lambda: randn(2, 3, 4, 6).to(memory_format=last)[..., 1:4],
    "expanded": lambda: randn(5).expand(4, 5),
    "expanded columns": lambda: randn(4, 1).expand(4, 5),
    "expanded number": lambda: randn(()).expand(4, 5),
    "overlapping": lambda: randn(10).unfold(0, 4, 1),
    "no rows": lambda: randn(0, 4),
    "no matrices": lambda: randn(0, 3, 4),
    "no middle": lambda: randn(4, 0, 3),
    "no rows, transposed": lambda: randn(4, 0).t(),
    "no channels, channels_last": lambda: randn(2, 0, 4, 5).to(memory_format=last),
    "size 1": lambda: randn(1, 3, 1, 5),
    "size 1, transposed": lambda: randn(1, 3, 1).transpose(0, 2),
    "one channel, channels_last": lambda: randn(2, 1, 4, 5).to(memory_format=last),
    "one pixel, channels_last": lambda: randn(1, 3, 1, 1).to(memory_format=last),
    "size 1, odd strides": lambda: randn(40).as_strided((1, 5), (100, 1)),
    "no dimension": lambda: randn(()),
}
# Forms of an operand, for x.
OPERANDS: dict[str, Callable[[Tensor], Tensor]] = {
    "vector": lambda x: randn(x.shape[-1:]),
    "number": lambda x: randn(()),
    "like x": lambda x: x.clone(),
    "contiguous": lambda x: randn(x.shape),
    "reversed": lambda x: randn(x.shape[::-1]).permute(tuple(range(x.dim()))[::-1]),
    "expanded": lambda x: randn(()).expand(x.shape),
    "column": lambda x: randn((*x.shape[:-1], 1) if x.dim() else ()),
    "larger": lambda x: randn(2, *x.shape),
    "transposed tail": lambda x: randn(x.shape[:-3:-1]).t(),
}


def steps(tensor: Tensor) -> list[int]:
    return [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1] if tensor.numel() else []


def check(text: str, name: str, tensors: Sequence[Tensor]) -> None:
    """The result's and the gradients' strides against those of fake tensors, and the result's against torch's."""
    x, *operands = tensors
    needs = [True] * len(tensors)
    with FakeTensorMode() as mode:
        fake_x, *fake_operands = map(mode.from_tensor, tensors)
        told = forward(fake_x, fake_operands, text, name)
        told_gradients = backward(told, fake_x, fake_operands, text, name, needs)
    y = forward(x, operands, text, name)
    assert y.shape == told.shape and steps(y) == steps(told)
    assert steps(y) == steps(sum(operands, x) if operands else -x)
    for gy in (randn(y.shape), randn(()).expand(y.shape), torch.empty_like(y).normal_()):
        for gradient, told_gradient in zip(backward(gy, x, operands, text, name, needs), told_gradients, strict=True):
            assert gradient.shape == told_gradient.shape and steps(gradient) == steps(told_gradient)
    storages = {t.untyped_storage().data_ptr() for t in tensors if t.numel()}
    assert y.untyped_storage().data_ptr() not in storages


# The kernels write into memory that does not depend on the stage; compiling them for each form would take minutes.
DENSE = ("contiguous", "channels_last", "transposed", "sliced", "expanded", "no rows", "size 1")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage(stage: str, name: str) -> None:
    text = STAGES[stage].example
    for form in FORMS if name == "reference" else DENSE:
        x = FORMS[form]()
        operands = [torch.zeros_like(x) for _ in dualop.chain(text).operands]
        check(text, name, [x, *operands])


@pytest.mark.parametrize("name", ["reference", "triton"])
@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_operand(form: str, operand: str, name: str) -> None:
    x = FORMS[form]()
    check("mul(scale) | logsigmoid", name, [x, OPERANDS[operand](x)])


@pytest.mark.parametrize("form", ["contiguous", "channels_last", "transposed", "expanded", "no rows"])
@pytest.mark.parametrize("text", ["logsigmoid", "mul(scale) | logsigmoid"])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str, text: str, form: str) -> None:
    if name != "reference" and form not in ("contiguous", "channels_last"):
        pytest.skip("as above")
    x = FORMS[form]().detach().requires_grad_()
    operands = [torch.randn_like(x).requires_grad_() for _ in dualop.chain(text).operands]
    torch.library.opcheck(forward.default, (x, operands, text, name))
    gy = torch.randn(x.shape, requires_grad=True)
    torch.library.opcheck(backward.default, (gy, x, operands, text, name, [True] * (1 + len(operands))))


@pytest.mark.parametrize("form", ["channels_last", "transposed", "sliced channels_last"])
def test_a_compiled_logsigmoid_keeps_the_memory_format(form: str) -> None:
    x, op = FORMS[form](), dualop.chain("logsigmoid")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: op(x, backend="reference") * 2, fullgraph=True)
    leaf, twin = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, right = compiled(leaf), op(twin, backend="reference") * 2
    torch.testing.assert_close(y, right, check_stride=True)
    torch.testing.assert_close(y, 2 * torch.nn.functional.logsigmoid(x))
    y.sum().backward()
    right.sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad, check_stride=True)
    torch._dynamo.reset()
