"""Tensors: dtypes, shapes, layouts, and what happens to memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import grad

import dualop
from dualop.language.stages import STAGES
from dualop.launch.layout import DTYPES, layout_of
from torch_contract.case import Case, refused, same, written_out

LOOSE = 2e-2  # of 16-bit results of size 1 that torch has rounded after every function, dualop once


def type_promotion(case: Case) -> None:
    """type promotion: the dtype of x + operand, for all pairs of dtypes, 0-d tensors too"""
    for one, other, shape, operand in itertools.product(DTYPES, DTYPES, ((4, 5), ()), ((5,), ())):
        x, a = torch.empty(shape, dtype=one, device="meta"), torch.empty(operand, dtype=other, device="meta")
        expected = (x + a).dtype
        assert layout_of(x, [a]).dtype == case.chain(x, a).dtype == expected, f"{one} {shape} and {other} {operand}"
    for one, other, operand in (
        (torch.bfloat16, torch.float32, (5,)),
        (torch.bfloat16, torch.float32, ()),
        (torch.float16, torch.bfloat16, (5,)),
        (torch.float32, torch.float64, (5,)),
    ):
        (x,), (a,) = case.tensors((4, 5), dtype=one), case.tensors(operand, dtype=other)
        case.agree(lambda f, x=x, a=a: [f(x, a), *grad(f(x, a).square().sum(), (x, a))], LOOSE)  # type: ignore[misc]


def autocast(case: Case) -> None:
    """autocast: the op, which no list of it names, promotes as ever; behind a Linear too"""
    low, high, double = torch.bfloat16, torch.float32, torch.float64
    pairs = ((low, low), (low, high), (high, low), (low, double), (torch.float16, low))
    for kind in ("cpu", "cuda"):
        with FakeTensorMode(), _autocast(kind):  # fake tensors say what becomes of CUDA tensors, without a GPU too
            for stage, (one, other) in itertools.product(STAGES.values(), pairs):
                op = dualop.chain(stage.example)
                x, a = torch.empty(4, 5, dtype=one, device=kind), torch.empty(5, dtype=other, device=kind)
                expected = torch.promote_types(one, other) if op.operands else one
                found = torch.ops.dualop.forward(x, [a] * len(op.operands), op.text, case.backend).dtype
                assert found == expected, f"{op} of {kind} {one}, {other} gives {found}, not {expected}"
    kind = case.device.type
    linear = torch.nn.Linear(5, 5).to(case.device)
    x, a = case.tensors(dtype=torch.float32)
    with torch.autocast(kind, torch.bfloat16):
        case.agree(lambda f: f(linear(x), a), LOOSE)
        case.agree(lambda f: f(linear(x), a.bfloat16()), LOOSE)
        y = case.chain(linear(x), a)
    same(grad(y.square().sum(), (x, a)), grad(written_out(linear(x), a).square().sum(), (x, a)), LOOSE)


@contextmanager
def _autocast(kind: str) -> Iterator[None]:
    """torch.autocast to bfloat16, which without a GPU would switch itself off for CUDA."""
    before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    torch.set_autocast_enabled(kind, True)
    torch.set_autocast_dtype(kind, torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(kind, before[0])
        torch.set_autocast_dtype(kind, before[1])
        torch.clear_autocast_cache()


def broadcasting(case: Case) -> None:
    """broadcasting, of x against the operand too, and gradients summed back"""
    for one, other in (
        ((2, 3, 4), (4,)),
        ((2, 3, 4), (3, 1)),
        ((2, 3, 4), ()),
        ((4,), (3, 4)),
        ((3, 1), (1, 4)),
        ((), (3,)),
        ((2, 1, 4), (3, 1)),
        ((2, 3), (2, 3)),
    ):
        x, a = case.tensors(one, other)
        case.agree(lambda f, x=x, a=a: [f(x, a), *grad(f(x, a).square().sum(), (x, a))])  # type: ignore[misc]


def memory_format(case: Case) -> None:
    """memory format kept: channels_last, permuted, sliced, expanded; also by gradients and by fake tensors"""
    (wide,) = case.tensors((2, 3, 4, 6), grad=False)
    (channel,) = case.tensors((3, 1, 1), grad=False)
    for x in (
        wide.contiguous(memory_format=torch.channels_last),
        wide.permute(2, 1, 0, 3),
        wide[..., 1:5],
        wide[..., ::2],
        wide[:1].expand(2, 3, 4, 6),
    ):
        a = channel if x.shape[1] == 3 else channel[:, 0]
        case.agree(lambda f, x=x, a=a: f(x, a), strides=True)  # type: ignore[misc]
        with FakeTensorMode() as mode:
            fake = case.chain(mode.from_tensor(x), mode.from_tensor(a))
        assert fake.stride() == written_out(x, a).stride(), "fake tensors have other strides"
    x = wide.contiguous(memory_format=torch.channels_last).requires_grad_()
    case.agree(lambda f: grad(f(x, channel).square().sum(), x), strides=True)


def empty(case: Case) -> None:
    """empty tensors, forward and backward"""
    for one, other in (((0, 5), (5,)), ((4, 0), (0,)), ((0,), ())):
        x, a = case.tensors(one, other)
        case.agree(lambda f, x=x, a=a: [f(x, a), *grad(f(x, a).sum(), (x, a))])  # type: ignore[misc]


def no_write(case: Case) -> None:
    """no input is written, forward or backward"""
    tensors = case.tensors((4, 5), (5,), (4, 5))
    before = [(t._version, t.detach().clone()) for t in tensors]
    x, a, gy = tensors
    grad(case.chain(x, a), (x, a), gy.detach())
    for t, (version, values) in zip(tensors, before, strict=True):
        assert t._version == version and torch.equal(t, values), "an input was written"


def no_alias(case: Case) -> None:
    """the result is new memory, even of a chain that changes nothing, and may be changed in place"""
    x, a = case.tensors()
    identity = dualop.chain("clamp(-1000, 1000)")(x, backend=case.backend)
    assert identity.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    same(identity, x)
    case.agree(lambda f: grad(f(x, a).mul_(2).square().sum(), (x, a)))


def modes_of_grad(case: Case) -> None:
    """no_grad, inference_mode, set_grad_enabled"""
    x, a = case.tensors()
    for mode in (torch.no_grad(), torch.inference_mode(), torch.set_grad_enabled(False)):
        with mode:
            case.agree(lambda f: f(x, a))
            assert not case.chain(x, a).requires_grad
    torch.set_grad_enabled(True)
    assert case.chain(x, a).requires_grad


def views(case: Case) -> None:
    """views, views with a negative bit, views at an odd storage offset"""
    drawn = torch.view_as_complex(case.tensors((4, 5, 2), grad=False)[0])
    (a,) = case.tensors((5,), grad=False)
    negative = drawn.conj().imag
    assert negative.is_neg()
    case.agree(lambda f: f(negative, a))
    (long,) = case.tensors((41,), grad=False)
    case.agree(lambda f: f(long[1:21].view(4, 5), long[3:8]))


def subclass(case: Case) -> None:
    """tensor subclasses are kept"""

    class Marked(torch.Tensor):
        pass

    x, a = case.tensors(grad=False)
    y = case.chain(x.as_subclass(Marked), a)
    assert type(y) is Marked
    same(y.as_subclass(Tensor), written_out(x, a))


def errors(case: Case) -> None:
    """errors of its own, before anything is computed"""
    x, a = case.tensors(grad=False)
    for call, kind, words in (
        (lambda: case.chain(x, a[:3]), dualop.errors.ShapeError, "shapes do not broadcast"),
        (lambda: case.chain(x.to(torch.complex64), a), dualop.errors.DtypeError, "x is complex64"),
        (lambda: case.chain(x, 2.0), dualop.errors.OperandError, "add must be a tensor"),  # type: ignore[arg-type]
        (lambda: case.chain(x, a.to("meta")), dualop.errors.DeviceError, "one device"),
    ):
        try:
            call()
        except kind as error:
            assert words in str(error), str(error)
        else:
            raise AssertionError(f"no {kind.__name__}")
    refused(lambda: torch.ops.dualop.forward(x, [a], "add | nonsense", case.backend), "unknown stage")
