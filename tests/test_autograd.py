"""What a user of PyTorch may do with a pointwise op: every row on every backend, against the written-out torch chain.

A row is a function of `f(x, a)`, the chain on one backend; everything is in float64. CUDA kernels run on the host and
Triton's in its interpreter.
"""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_layout import example, given, inputs, settings, st, steps
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dualop
import dualop.op.library  # registers the ops
from dualop.backends import registry
from dualop.backends.reference import evaluate, reference_gradients
from dualop.backends.registry import BACKENDS
from dualop.language.stages import STAGES

if not registry.interpreting():
    pytest.skip("on CPU tensors, with DUALOP_INTERPRET=1", allow_module_level=True)

NAMES = ("reference", "cuda", "triton")
OP = dualop.chain("add | swish | tanh | gelu | hardtanh(-1, 1)")

Function = Callable[..., Tensor]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


def written_out(x: Tensor, a: Tensor) -> Tensor:
    z = x + a
    return F.hardtanh(F.gelu(torch.tanh(z * torch.sigmoid(z))))  # silu's own gradient has no derivatives everywhere


STAGE_TEXTS = [*(stage.example for stage in STAGES.values()), 'gelu(approximate="tanh")', "minimum(x)"]


def tensors(rows: int = 4, columns: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        torch.randn(rows, columns, dtype=torch.double, requires_grad=True),
        torch.randn(columns, dtype=torch.double, requires_grad=True),
    )


def equal(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def same(f: Function, of: Callable[[Function], Any]) -> None:
    """`of` makes the same of the chain as of the written-out torch functions."""
    equal(of(f), of(written_out))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def f(name: str) -> Function:
    return functools.partial(OP, backend=name)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ---- eager -----------------------------------------------------------------------------------------------------------


def test_grad(f: Function) -> None:
    x, a = tensors()
    same(f, lambda f: torch.autograd.grad((f(x, a) ** 2).sum(), (x, a)))


def test_gradcheck(f: Function) -> None:
    assert torch.autograd.gradcheck(f, tensors(2, 3))


def test_gradcheck_of_forward_mode(f: Function) -> None:
    assert torch.autograd.gradcheck(f, tensors(2, 3), check_forward_ad=True, check_backward_ad=False)


def test_gradcheck_with_batched_gradients(f: Function) -> None:
    assert torch.autograd.gradcheck(f, tensors(2, 3), check_batched_grad=True, check_batched_forward_grad=True,
                                    check_forward_ad=True)  # fmt: skip


def test_gradgradcheck(f: Function) -> None:
    assert torch.autograd.gradgradcheck(f, tensors(2, 3))


def test_gradgradcheck_forward_over_reverse(f: Function) -> None:
    assert torch.autograd.gradgradcheck(f, tensors(2, 3), check_fwd_over_rev=True)


@pytest.mark.parametrize("text", ["mul(s) | add(b) | sigmoid | mul(x)", "add(b) | mish | mul(s) | tanh | div(s)"])
def test_gradcheck_of_several_operands(name: str, text: str) -> None:
    op = dualop.chain(text)
    x = torch.randn(2, 2, 2, dtype=torch.double, requires_grad=True)
    b = torch.randn(2, 1, dtype=torch.double, requires_grad=True)
    s = (torch.rand((), dtype=torch.double) + 0.5).requires_grad_()

    def function(x: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return op(x, b=b, s=s, backend=name)

    assert torch.autograd.gradcheck(function, (x, b, s), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, b, s))


def test_gradcheck_of_a_chain_without_operands(name: str) -> None:
    op = dualop.chain('gelu(approximate="tanh") | softplus(2) | logsigmoid')
    x = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    function = functools.partial(op, backend=name)
    assert torch.autograd.gradcheck(function, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x,))


def test_third_derivative(f: Function) -> None:
    x, a = tensors()

    def third(f: Function) -> Tensor:
        y = f(x, a).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.sum()
        return g

    same(f, third)


def test_penalty_on_the_gradient(f: Function) -> None:
    """Double backward through both inputs, as in a physics-informed network's loss."""
    x, a = tensors()

    def both(f: Function) -> Any:
        gx, ga = torch.autograd.grad(f(x, a).sum(), (x, a), create_graph=True)
        return torch.autograd.grad((gx**2).sum() + (ga**3).sum(), (x, a))

    same(f, both)


def test_broadcasting_x(f: Function) -> None:
    a, x = tensors(2, 3)
    assert torch.autograd.gradcheck(f, (x, a)) and torch.autograd.gradgradcheck(f, (x, a))


@pytest.mark.parametrize("text", STAGE_TEXTS)
def test_every_stage_is_differentiable_without_end(text: str) -> None:
    """The formulas that double backward and forward mode take, against finite differences and against autograd."""
    op = dualop.chain(text)
    x = torch.linspace(-7.3, 7.6, 23, dtype=torch.double)[:, None].requires_grad_()  # between all kinks
    b = torch.tensor([-1.37, 0.83], dtype=torch.double, requires_grad=True)
    leaves = (x, b) if op.operands else (x,)
    function = functools.partial(op, backend="reference")
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("text", STAGE_TEXTS)
def test_the_gradient_formula_is_that_of_autograd(text: str, dtype: torch.dtype) -> None:
    """`stage.gradient` against the gradient of `stage.reference`, at kinks and far out too."""
    op = dualop.chain(text)
    kinks = torch.tensor([0.0, -0.0, 0.25, 0.5, 0.75, 1.0, 3.0, 6.0, 20.0, 25.0, 90.0, 1e4], dtype=dtype)
    x = torch.cat([kinks, -kinks, torch.linspace(-9, 9, 50, dtype=dtype)])[:, None].requires_grad_()
    b = torch.tensor([0.5, -1.0, 3.0], dtype=dtype, requires_grad=True)
    leaves = (x, b) if op.operands else (x,)
    y = evaluate(op, x, leaves[1:])
    gy = torch.randn(y.shape, dtype=dtype)
    expected = torch.autograd.grad(y, leaves, gy)
    got = reference_gradients(op, gy, x, leaves[1:], [True] * len(leaves))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-7  # torch's hardsigmoid has a float32 constant
    torch.testing.assert_close(got, list(expected), rtol=tolerance, atol=tolerance, equal_nan=True)


def test_empty(f: Function) -> None:
    x = torch.randn(0, 5, dtype=torch.double, requires_grad=True)
    a = torch.randn(5, dtype=torch.double, requires_grad=True)
    y = f(x, a)
    y.sum().backward()
    assert y.shape == (0, 5) and x.grad is not None and x.grad.shape == (0, 5)
    equal(a.grad, torch.zeros(5, dtype=torch.double))


def test_mixed_dtypes(f: Function) -> None:
    x = torch.randn(4, 5, dtype=torch.bfloat16, requires_grad=True)
    a = torch.randn(5, requires_grad=True)
    y = f(x, a)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, a.grad.dtype) == (torch.float32, torch.bfloat16, torch.float32)  # type: ignore[union-attr]


def test_inference_mode(f: Function) -> None:
    with torch.inference_mode():
        x, a = torch.randn(4, 5), torch.randn(5)
        y = f(x, a)
        assert y.is_inference()
        torch.testing.assert_close(y, written_out(x, a))
    x = torch.randn(4, 5, requires_grad=True)
    y = f(x, torch.randn(5))  # and out of it again
    y.sum().backward()


def test_no_graph_without_need(f: Function) -> None:
    x, a = tensors()
    assert f(x.detach(), a.detach()).grad_fn is None
    with torch.no_grad():
        assert f(x, a).grad_fn is None
    assert f(x, a.detach()).grad_fn is not None and f(x.detach(), a).requires_grad


@pytest.mark.usefixtures("python_way")
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "x", "add"])
def test_only_the_gradients_that_are_needed(f: Function, name: str, wanted: tuple[bool, bool], monkeypatch) -> None:
    asked: list[list[bool]] = []
    backward = BACKENDS[name].backward

    def watched(*arguments: Any) -> list[Tensor]:
        asked.append(list(arguments[-1]))
        results = backward(*arguments)
        assert len(results) == sum(arguments[-1])
        return results

    monkeypatch.setattr(BACKENDS[name], "backward", watched)
    x, a = (t.detach().requires_grad_(w) for t, w in zip(tensors(), wanted))
    f(x, a).sum().backward()
    assert [x.grad is not None, a.grad is not None] == list(wanted)
    assert asked == [list(wanted)]
    full = tensors()
    expected = torch.autograd.grad(written_out(*full).sum(), full)
    for t, e in zip((x, a), expected):
        if t.grad is not None:
            equal(t.grad, e)


def test_grad_for_one_of_two_leaves(f: Function) -> None:
    """Both require a gradient and one is asked for: torch.autograd.grad(y, a)."""
    x, a = tensors()
    same(f, lambda f: torch.autograd.grad(f(x, a).sum(), a))
    same(f, lambda f: torch.autograd.grad(f(x, a).sum(), x))


def test_inputs_are_not_written(f: Function) -> None:
    x, a = tensors()
    kept, versions = (x.clone(), a.clone()), (x._version, a._version)
    gy = torch.randn(4, 5, dtype=torch.double)
    kept_gy = gy.clone()
    torch.autograd.grad(f(x, a), (x, a), gy)
    assert torch.equal(x, kept[0]) and torch.equal(a, kept[1]) and torch.equal(gy, kept_gy)
    assert (x._version, a._version) == versions


def test_no_result_is_an_input(name: str) -> None:
    """Not even where a chain does nothing."""
    x = torch.rand(3, 4, requires_grad=True)
    for text in ("relu", "add(0)", "mul(1) | clamp(-inf, 100)", "hardtanh(-inf, inf)"):
        y = dualop.chain(text)(x, backend=name)
        assert y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        gy = torch.ones_like(y)
        (gx,) = torch.autograd.grad(y, x, gy)
        assert gx.untyped_storage().data_ptr() not in (gy.untyped_storage().data_ptr(), x.untyped_storage().data_ptr())
    b = torch.rand(3, 4, requires_grad=True)
    y = dualop.chain("add")(x, b, backend=name)
    gy = torch.ones_like(y)
    results = [*torch.autograd.grad(y, (x, b), gy), gy, y, x, b]
    assert len({t.untyped_storage().data_ptr() for t in results}) == len(results)


def test_an_input_changed_in_place_is_noticed(f: Function) -> None:
    x, a = tensors()
    y = f(x, a)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_only_x_and_the_operands_are_saved(f: Function) -> None:
    x, a = tensors()
    saved: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f(x, a)
    assert sorted(t.data_ptr() for t in saved) == sorted([x.data_ptr(), a.data_ptr()])
    equal(torch.autograd.grad(y.sum(), (x, a)), torch.autograd.grad(written_out(x, a).sum(), (x, a)))


def test_saved_tensors_on_their_way(f: Function) -> None:
    """Hooks may store something else, as offloading to the CPU or to disk does."""
    x, a = tensors()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        y = f(x, a)
    equal(torch.autograd.grad(y.sum(), (x, a)), torch.autograd.grad(written_out(x, a).sum(), (x, a)))


def test_a_graph_is_freed(f: Function) -> None:
    x, a = tensors()
    y = f(x, a).sum()
    y.backward(retain_graph=True)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_hooks_and_non_leaves(f: Function) -> None:
    x, a = tensors()
    seen: list[Tensor] = []

    def through(f: Function) -> Any:
        hidden = x * 2
        y = f(hidden, a.exp())
        y.register_hook(seen.append)
        return torch.autograd.grad(y.pow(2).sum(), (x, a))

    same(f, through)
    equal(seen[0], seen[1])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(f: Function, reentrant: bool) -> None:
    x, a = tensors()
    same(f, lambda f: torch.autograd.grad((checkpoint(f, x, a, use_reentrant=False) ** 2).sum(), (x, a)))
    if reentrant:
        (checkpoint(f, x, a, use_reentrant=True) ** 2).sum().backward()
        equal((x.grad, a.grad), torch.autograd.grad((written_out(x, a) ** 2).sum(), (x, a)))


def test_selective_checkpoint_sees_the_op(f: Function) -> None:
    seen: list[str] = []

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        seen.append(str(op))
        return CheckpointPolicy.PREFER_RECOMPUTE

    x, a = tensors()
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    checkpoint(lambda x, a: f(x, a) ** 2, x, a, use_reentrant=False, context_fn=contexts).sum().backward()
    assert any("dualop.forward" in s for s in seen)


def test_a_dispatch_mode_sees_both_ops(f: Function) -> None:
    seen: list[str] = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, a = tensors()
    with Mode():
        torch.autograd.grad(f(x, a).sum(), (x, a))
    assert seen.count("dualop.forward.default") == 1 and seen.count("dualop.backward.default") == 1


# ---- torch.func ------------------------------------------------------------------------------------------------------


def cube(f: Function, x: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda a: f(x, a) ** 3


TRANSFORMS: dict[str, Callable[[Function, Tensor, Tensor], Any]] = {
    "grad": lambda f, x, a: grad(lambda x, a: (f(x, a) ** 2).sum(), argnums=(0, 1))(x, a),
    "grad of grad": lambda f, x, a: grad(lambda x: grad(lambda x: (f(x, a) ** 3).sum())(x).pow(2).sum())(x),
    "vmap": lambda f, x, a: vmap(f, in_dims=(0, None))(x, a),
    "vmap, both": lambda f, x, a: vmap(f, in_dims=(1, 0), out_dims=1)(x, a),
    "vmap, operand alone": lambda f, x, a: vmap(f, in_dims=(None, 0))(x, torch.stack([a, 2 * a])),
    "vmap, operand's elements": lambda f, x, a: vmap(f, in_dims=(None, 0))(x, a),
    "vmap of vmap": lambda f, x, a: vmap(vmap(f, in_dims=(0, 0)), in_dims=(0, None))(x, a),
    "vmap of grad": lambda f, x, a: vmap(grad(lambda x, a: (f(x, a) ** 2).sum(), argnums=(0, 1)), (0, None))(x, a),
    "grad of vmap": lambda f, x, a: grad(lambda x: (vmap(f, in_dims=(0, None))(x, a) ** 2).sum())(x),
    "gradients per sample": lambda f, x, a: vmap(grad(lambda a, x: f(x, a).pow(2).sum()), in_dims=(None, 0))(a, x),
    "jacrev": lambda f, x, a: jacrev(f, argnums=(0, 1))(x, a),
    "jacfwd": lambda f, x, a: jacfwd(f, argnums=(0, 1))(x, a),
    "hessian": lambda f, x, a: hessian(lambda a: (f(x, a) ** 2).sum())(a),
    "jacrev of jacrev": lambda f, x, a: jacrev(jacrev(lambda a: (f(x, a) ** 2).sum()))(a),
    "jacfwd of jacfwd": lambda f, x, a: jacfwd(jacfwd(lambda a: (f(x, a) ** 2).sum()))(a),
    "jacrev of jacfwd": lambda f, x, a: jacrev(jacfwd(lambda a: (f(x, a) ** 2).sum()))(a),
    "jvp": lambda f, x, a: jvp(f, (x, a), (torch.ones_like(x), torch.full_like(a, 0.5))),
    "jvp, operand alone": lambda f, x, a: jvp(cube(f, x), (a,), (torch.ones_like(a),)),
    "jvp of jvp": lambda f, x, a: jvp(
        lambda a: jvp(cube(f, x), (a,), (torch.ones_like(a),))[1], (a,), (torch.ones_like(a),)
    ),
    "vmap of jvp": lambda f, x, a: vmap(lambda t: jvp(cube(f, x), (a,), (t,))[1])(torch.eye(5, dtype=torch.double)),
    "grad of jvp": lambda f, x, a: grad(lambda x: jvp(cube(f, x), (a,), (torch.ones_like(a),))[1].sum())(x),
    "autograd of grad": lambda f, x, a: torch.autograd.grad(
        grad(lambda x: (f(x, a) ** 3).sum())(x).pow(2).sum(), (x, a)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_func(f: Function, transform: str) -> None:
    x, a = tensors()
    if transform != "autograd of grad":
        x, a = x.detach(), a.detach()
    same(f, lambda f: TRANSFORMS[transform](f, x, a))


def test_dual_numbers_through_reverse_mode(f: Function) -> None:
    def tangent_of_the_gradient(f: Function) -> Tensor:
        x, a = tensors()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            (g,) = torch.autograd.grad((f(dual, a) ** 2).sum(), a, create_graph=True)
            return forward_ad.unpack_dual(g).tangent

    same(f, tangent_of_the_gradient)


def test_reverse_mode_through_dual_numbers(f: Function) -> None:
    def gradient_of_the_tangent(f: Function) -> Any:
        x, a = tensors()
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)), a)).tangent
        return torch.autograd.grad((tangent**2).sum(), (x, a))

    same(f, gradient_of_the_tangent)


def test_gradients_of_many_outputs_at_once(f: Function) -> None:
    x, a = tensors()
    many = torch.randn(3, 4, 5, dtype=torch.double)
    same(f, lambda f: torch.autograd.grad(f(x, a), (x, a), many, is_grads_batched=True))


PROMOTING = {
    "0-d float32": ((torch.bfloat16, (4, 5)), (torch.float32, ())),
    "0-d float64": ((torch.float32, (4, 5)), (torch.float64, ())),
    "1-d float32": ((torch.bfloat16, (4, 5)), (torch.float32, (5,))),
    "two halves": ((torch.float16, (4, 5)), (torch.bfloat16, (5,))),
    "0-d x": ((torch.float32, ()), (torch.bfloat16, (5,))),
}


@pytest.mark.parametrize("form", PROMOTING)
def test_tangents_have_the_dtype_of_the_result(f: Function, form: str) -> None:
    """A number beside a tensor does not promote it, in forward mode neither."""
    x, a = (torch.randn(shape).to(dtype) for dtype, shape in PROMOTING[form])
    y, tangent = jvp(f, (x, a), (torch.ones_like(x), torch.ones_like(a)))
    expected, expected_tangent = jvp(written_out, (x, a), (torch.ones_like(x), torch.ones_like(a)))
    assert y.dtype == tangent.dtype == expected.dtype == expected_tangent.dtype
    exact = jvp(written_out, (x.double(), a.double()), (torch.ones_like(x).double(), torch.ones_like(a).double()))[1]
    torch.testing.assert_close(tangent.double(), exact, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("form", ["0-d float32", "0-d float64", "1-d float32"])
def test_vmap_over_a_number_does_not_promote(f: Function, form: str) -> None:
    """Under vmap an operand without dimensions is one for every sample: the dtype is that of a loop."""
    (x_dtype, _), (a_dtype, shape) = PROMOTING[form]
    x, a = torch.randn(3, 4, 5).to(x_dtype), torch.randn(3, *shape).to(a_dtype)
    got = vmap(f)(x, a)
    assert got.dtype == vmap(written_out)(x, a).dtype == f(x[0], a[0]).dtype
    torch.testing.assert_close(got, torch.stack([f(x[i], a[i]) for i in range(3)]))


# ---- fakes -----------------------------------------------------------------------------------------------------------


def test_meta(f: Function) -> None:
    x = torch.empty(4, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
    a = torch.empty(5, device="meta", requires_grad=True)
    y = f(x, a)
    y.sum().backward()
    assert y.device.type == "meta" and y.shape == (4, 5) and y.dtype == torch.float32
    assert x.grad is not None and x.grad.dtype == torch.bfloat16 and a.grad is not None and a.grad.shape == (5,)


def test_fake_tensors(f: Function) -> None:
    with FakeTensorMode():
        x, a = torch.empty(4, 5, requires_grad=True), torch.empty(5, requires_grad=True)
        y = f(x, a)
        gx, ga = torch.autograd.grad(y.sum(), (x, a))
    assert y.shape == gx.shape == (4, 5) and ga.shape == (5,)


PERMUTED = torch.randn(3, 2, 4).permute(2, 0, 1)
TEXTS = ["tanh", "add(a) | tanh", "add(a) | mul(b) | tanh", "add(a) | mul(b) | maximum(c) | tanh"]


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_fake_results_lie_as_real_ones(name: str) -> None:
    """Strides and dtypes of the result and of every gradient: compiled code relies on what the fakes promise."""

    @settings(max_examples=150 if name == "reference" else 40)
    @given(inputs(st.integers(2, 3)))
    @example([PERMUTED, torch.randn(4, 3, 2)])
    @example([torch.randn(4, 3, 2), PERMUTED, torch.randn(2)])
    @example([torch.randn(4, 1, 2).expand(4, 3, 2), PERMUTED])
    @example([PERMUTED[..., :1], torch.randn(4, 3, 2), PERMUTED[:1]])
    def check(drawn: list[Tensor]) -> None:
        text = str(dualop.chain(TEXTS[len(drawn) - 1]))
        forward, backward = torch.ops.dualop.forward.default, torch.ops.dualop.backward.default
        x, *operands = drawn
        needs = [True] * len(drawn)
        y = forward(x, operands, text, name)
        real = [y, *backward(torch.ones_like(y), x, operands, text, name, needs)]
        with FakeTensorMode() as mode:
            fx, *fakes = [mode.from_tensor(t) for t in drawn]
            fy = forward(fx, fakes, text, name)
            fake = [fy, *backward(torch.ones_like(fy), fx, fakes, text, name, needs)]
        for r, p in zip(real, fake, strict=True):
            assert (r.shape, r.dtype) == (p.shape, p.dtype)
            assert steps(r.shape, r.stride()) == steps(p.shape, p.stride()), [(t.shape, t.stride()) for t in drawn]

    check()


@pytest.mark.parametrize("form", ["dense", "no gradient", "channels_last", "sliced", "x broadcast"])
def test_opcheck(name: str, form: str) -> None:
    x, a = tensors()
    if form == "no gradient":
        x, a = x.detach(), a.detach()
    if form == "channels_last":
        x = torch.randn(2, 3, 2, 2, dtype=torch.double).to(memory_format=torch.channels_last).requires_grad_()
        a = torch.randn(1, 3, 2, 2, dtype=torch.double, requires_grad=True)
    if form == "sliced":
        x = torch.randn(4, 9, dtype=torch.double)[:, 2:7].requires_grad_()
    if form == "x broadcast":
        x, a = a, x
    torch.library.opcheck(torch.ops.dualop.forward.default, (x, [a], str(OP), name))
    gy = torch.randn(torch.broadcast_shapes(x.shape, a.shape), dtype=torch.double)
    gy = gy.contiguous(memory_format=torch.channels_last) if form == "channels_last" else gy
    gy = gy if form == "no gradient" else gy.requires_grad_()
    for needs in ([True, True], [False, True], [True, False]):
        torch.library.opcheck(torch.ops.dualop.backward.default, (gy, x, [a], str(OP), name, needs))


# ---- torch.compile and export ----------------------------------------------------------------------------------------


def check_compiled(f: Function, backend: str, dynamic: bool | None = None) -> Function:
    x, a = tensors()
    compiled = torch.compile(f, fullgraph=True, backend=backend, dynamic=dynamic)
    equal(compiled(x, a), written_out(x, a))
    g = torch.autograd.grad((compiled(x, a) ** 2).sum(), (x, a))
    equal(g, torch.autograd.grad((written_out(x, a) ** 2).sum(), (x, a)))
    with torch.no_grad():
        equal(compiled(x, a), written_out(x, a))
    return compiled


def test_compile(f: Function) -> None:
    check_compiled(lambda x, a: f(x, a), "aot_eager")


def test_compile_with_dynamic_shapes(f: Function) -> None:
    compiled = check_compiled(lambda x, a: f(x, a), "aot_eager", True)
    x, a = tensors()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (7, 12):
            many = x.detach()[:1].repeat(rows, 1).requires_grad_()
            equal(compiled(many, a), written_out(many, a))


def test_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Inductor's generated code, whose buffers have the strides that the fakes promised."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    check_compiled(lambda x, a: OP(x * 2 - x, a, backend="cuda") + 0, "inductor")
    compiled = torch.compile(lambda x, a: OP(x.relu(), a, backend="cuda") * 2, backend="inductor", fullgraph=True)
    x = torch.randn(2, 3, 4, 4, dtype=torch.double).to(memory_format=torch.channels_last).requires_grad_()
    a = torch.randn(1, 3, 4, 4, dtype=torch.double, requires_grad=True)
    y = compiled(x, a)
    equal(y, written_out(x.relu(), a) * 2)
    equal(torch.autograd.grad(y.sum(), (x, a)), torch.autograd.grad((written_out(x.relu(), a) * 2).sum(), (x, a)))


def test_compiled_model_has_one_node_and_no_break(f: Function) -> None:
    targets: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        targets.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    x, a = tensors()
    torch.compile(lambda x, a: (f(x, a) + 1).relu(), fullgraph=True, backend=backend)(x, a)
    assert [t for t in targets if "dualop" in t] == ["dualop.forward.default"]


def test_compile_of_transforms(f: Function) -> None:
    x, a = (t.detach() for t in tensors())
    for transform in ("grad", "vmap", "jvp, operand alone", "jacrev of jacrev"):
        function = functools.partial(TRANSFORMS[transform], lambda x, a: f(x, a))
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        equal(compiled(x, a), TRANSFORMS[transform](written_out, x, a))


def test_compiled_autograd(f: Function) -> None:
    x, a = tensors()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        got = torch.autograd.grad((f(x, a) ** 2).sum(), (x, a))
    equal(got, torch.autograd.grad((written_out(x, a) ** 2).sum(), (x, a)))


class Model(torch.nn.Module):
    def __init__(self, f: Function) -> None:
        super().__init__()
        self.f = f
        self.bias = torch.nn.Parameter(torch.randn(5, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, self.bias)


@pytest.mark.parametrize("strict", [False, True])
def test_export(f: Function, strict: bool) -> None:
    x, _ = tensors()
    model = Model(lambda x, a: f(x, a))
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (x.detach(),), dynamic_shapes=dynamic, strict=strict)
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert targets == ["dualop.forward.default"]
    equal(program.module()(x.detach()[:3]), model(x.detach()[:3]))
    trained = program.module()
    trained(x.detach()).pow(2).sum().backward()
    (gradient,) = [p.grad for p in trained.parameters()]
    equal(gradient, torch.autograd.grad(model(x.detach()).pow(2).sum(), model.bias)[0])
    saved = io.BytesIO()
    torch.export.save(program.run_decompositions(), saved)
    saved.seek(0)
    equal(torch.export.load(saved).module()(x.detach()), model(x.detach()))


def test_nothing_warns(f: Function) -> None:
    x, a = tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (gx,) = torch.autograd.grad(f(x, a).sum(), x, create_graph=True)
        gx.sum().backward()
