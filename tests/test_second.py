"""Second derivatives of chains of one variable: the slope's backward on every backend, by itself and under autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from named import parse
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap

import dualop
import dualop.op.library  # registers the ops
from dualop.backends import registry
from dualop.backends.reference import evaluate, reference_gradients
from dualop.backends.registry import BACKENDS
from dualop.errors import BackendUnavailable, ChainError
from dualop.language.entry import PIECEWISE_LINEAR, Parameter, Stage
from dualop.language.ranges import EVERYTHING
from dualop.language.slopes import Slope, has_slope
from dualop.language.stages import STAGES
from dualop.language.syntax import Chain

if not registry.interpreting():
    pytest.skip("on CPU tensors, with DUALOP_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter computes with NumPy

NAMES = ("reference", "cuda", "triton")
KERNELS = ("cuda", "triton")
CHAIN = "silu | tanh | gelu | hardtanh(-1, 1)"
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the largest magnitude. 16-bit results are rounded once, which takes half an ulp of their own.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 2**-8, torch.float16: 2**-11}
UNARY = [stage.example for stage in STAGES.values() if not stage.operand]
TEXTS = [
    *(text for text in UNARY if any(call.stage.curved for call in dualop.chain(text).calls)),
    'gelu(approximate="tanh")',
    "elu(2.5)",
    "softplus(2, 10)",
    "tanh | gelu",  # gelu_unit
    "relu | mish",  # mish_upper
    CHAIN,
    "mul(2) | mish | add(0.5) | tanh | rsub(1) | sigmoid | div(3) | softplus | maximum(0.25)",
]


def exact(text: str, v: Tensor, gy: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """v gy f''(x) and v f'(x) by autograd through each stage's gradient in float64."""
    v, gy, x = (t.double().requires_grad_() for t in (v, gy, x))
    (gx,) = reference_gradients(dualop.chain(text), gy, x, (), [True])
    return torch.autograd.grad(gx, (x, gy), v, allow_unused=True, materialize_grads=True)


def drawn(dtype: torch.dtype, *shape: int) -> list[Tensor]:
    """v, gy and x; x avoids 0, where some functions have a pole."""
    v, gy, x = torch.randn(3, *shape, dtype=torch.float64)
    x = torch.linspace(-9, 9, x.numel(), dtype=torch.float64).view(shape) + 0.011
    return [t.to(dtype) for t in (v, gy, x)]


def slope_of(text: str) -> Slope:
    assert has_slope(text)
    return Slope(dualop.chain(text))


def close(got: Tensor, right: Tensor, tolerance: float) -> None:
    assert (got.double() - right).abs().max() <= tolerance * right.abs().max() + 1e-300


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", TEXTS)
def test_second_derivative(text: str, dtype: str, name: str) -> None:
    kind = DTYPES[dtype]
    v, gy, x = drawn(kind, 9, 40)
    if "reciprocal" in text or "sqrt" in text:
        x = x.sign() * (x.abs() + 0.25)
    got = BACKENDS[name].backward(slope_of(text), v, x, [gy], [True, True])
    for one, right in zip(got, exact(text, v, gy, x), strict=True):
        assert one.dtype == kind and one.shape == x.shape
        close(one, right, TOLERANCE[kind])


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("text", UNARY)
def test_kinks_and_far_values_are_torchs(text: str, dtype: str, name: str) -> None:
    bounds = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 3.0, 6.0, 20.0, 90.0, 1e4, 1e20], dtype=DTYPES[dtype])
    x = torch.cat([bounds, -bounds])
    one = torch.ones_like(x)
    got = BACKENDS[name].backward(slope_of(text), one, x, [one], [True, True])
    leaf = x.clone().requires_grad_()
    y = reference_gradients(dualop.chain(text), one, leaf, (), [True])[0]
    right = [torch.zeros_like(x), y.detach()]
    if y.requires_grad:
        right[0] = torch.autograd.grad(y.sum(), leaf, allow_unused=True, materialize_grads=True)[0]
    for a, b in zip(got, right, strict=True):
        known = b.isfinite()  # torch's own formulas overflow far out
        torch.testing.assert_close(a[known], b[known], rtol=1e-5, atol=2e-6)
        if text not in ("abs | sqrt", "reciprocal"):
            assert not a[known].isnan().any()


def derivative(y: Tensor, z: Tensor) -> Tensor:
    if not y.requires_grad:
        return torch.zeros_like(z)
    return torch.autograd.grad(y.sum(), z, create_graph=True, allow_unused=True, materialize_grads=True)[0]


def test_formulas_are_those_of_autograd() -> None:
    """Each entry's second derivative against that of its gradient, other parameters too, and differentiable again."""
    z = torch.linspace(-7.3, 7.6, 97, dtype=torch.double).requires_grad_()
    for text in (*TEXTS, "celu(-2)", "softplus(0.25)", "softplus(1, 3)", "elu(-1)"):
        for call in dualop.chain(text).calls:
            if call.stage.operand:
                continue
            inner = z.abs() if call.stage.name == "sqrt" else z
            second = derivative(call.stage.gradient(torch.ones_like(inner), inner, *call.arguments), inner)
            if not callable(call.stage.second):
                assert not second.any(), call
                continue
            mine = call.stage.second(inner, *call.arguments)
            torch.testing.assert_close(mine, second, rtol=1e-7, atol=1e-10)  # torch's hardswish has a float32 constant
            torch.testing.assert_close(derivative(mine, z), derivative(second, z), rtol=1e-7, atol=1e-9)


def test_which_chains_have_a_slope() -> None:
    assert has_slope("silu | mul(2)") and slope_of("silu | mul(2)").text == "slope of silu | mul(2)"
    for text in ("mul(x) | silu", "add | silu", "silu | add(b)"):
        assert not has_slope(text)
    chain = parse("slope of silu")
    assert isinstance(chain, Slope) and chain.operands == ("gy",) and chain != dualop.chain("silu")
    assert not isinstance(chain, Chain) and not callable(chain)
    for given in ("slope of silu", chain):
        with pytest.raises(ChainError):
            dualop.chain(given)  # type: ignore[arg-type]


# ---- a new stage -----------------------------------------------------------------------------------------------------

WAVE: dict[str, Any] = {
    "name": "wave",
    "reference": torch.sin,
    "gradient": lambda g, z: g * z.cos(),
    "example": "wave",
    "kinks": (),
}


def add_stage(patch: pytest.MonkeyPatch, **more: Any) -> None:
    """A stage of the table that no kernel language knows; each test names its own, since parsed chains are kept."""
    entry = Stage(**{**WAVE, "range": EVERYTHING, "second": lambda z: -z.sin(), **more})
    patch.setitem(STAGES, entry.name, entry)


def twice(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), x)[0]


@pytest.mark.parametrize("says", [{}, {"second": None}, {"second": 0}, {"second": "zero"}], ids=str)
def test_a_stage_that_says_nothing_of_its_second_derivative_is_refused(says: dict[str, Any]) -> None:
    known = {**WAVE, "range": EVERYTHING}
    with pytest.raises(ChainError, match=r"'wave'.* second"):
        Stage(**known, **says)
    assert not Stage(**known, second=PIECEWISE_LINEAR).curved and Stage(**known, second=torch.sin).curved


@pytest.mark.parametrize(
    ("says", "what"),
    [
        ({}, "range"),
        ({"range": None}, "range"),
        ({"range": 1.0}, "range"),
        ({"range": (1.0, -1.0)}, "range"),
        ({"range": EVERYTHING, "reference": None}, "reference"),
        ({"range": EVERYTHING, "gradient": None}, "gradient"),
        ({"range": EVERYTHING, "exact": None}, "float64"),
        ({"range": EVERYTHING, "kinks": None}, "kinks"),
        ({"range": EVERYTHING, "operand": True}, "number="),
        ({"range": EVERYTHING, "number": 1.0}, "no number="),
    ],
    ids=str,
)
def test_a_stage_that_leaves_out_a_fact_is_refused(says: dict[str, Any], what: str) -> None:
    with pytest.raises(ChainError, match=f"'wave'.* {what}"):
        Stage(**{**WAVE, "second": PIECEWISE_LINEAR, **says})


def test_a_stage_without_its_reference_is_refused() -> None:
    with pytest.raises(TypeError, match="reference"):
        Stage(**{k: v for k, v in WAVE.items() if k != "reference"}, second=PIECEWISE_LINEAR, range=EVERYTHING)


def test_a_new_stage_is_differentiated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    add_stage(monkeypatch)
    x = torch.linspace(-2, 2, 7, dtype=torch.double).requires_grad_()
    for backend in ("auto", "reference"):  # auto finds no kernel of it
        op = functools.partial(dualop.chain("silu | wave | mul(2)"), backend=backend)
        torch.testing.assert_close(twice(op, x), twice(lambda x: 2 * torch.nn.functional.silu(x).sin(), x))
        assert torch.autograd.gradgradcheck(op, (x,))
    assert "wave" in str(dualop.explain(dualop.chain("wave"), x, backend="cuda"))


@pytest.mark.parametrize("name", KERNELS)
def test_a_stage_without_kernels_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add_stage(monkeypatch)
    where = {"cuda": "cuda/stages/", "triton": "triton_kernels/stages/"}[name]
    with pytest.raises(BackendUnavailable, match=f"{where} has no function wave.*can: reference"):
        dualop.chain("wave")(torch.ones(3), backend=name)


@pytest.mark.parametrize("name", KERNELS)
def test_a_second_derivative_that_the_kernels_lack_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The chain runs, forward and backward; differentiated twice it is an error, and not zero."""
    six = {"reference": lambda z: z.clamp(-3, 3) / 6 + 0.5, "gradient": STAGES["hardsigmoid"].gradient}
    add_stage(monkeypatch, name=f"six_{name}", kernel_name=lambda: "hardsigmoid", **six)
    op, x = dualop.chain(f"six_{name}"), torch.linspace(-2, 2, 7, requires_grad=True)
    (g,) = torch.autograd.grad(op(x, backend=name).sum(), x, create_graph=True)
    torch.testing.assert_close(g, torch.full_like(g, 1 / 6))
    lacks = {
        "cuda": "cuda/stages/ has no function hardsigmoid::second",
        "triton": "triton_kernels/stages/ has no function hardsigmoid_second",
    }
    with pytest.raises(BackendUnavailable, match=lacks[name]):
        torch.autograd.grad(g.sum(), x)


def test_an_operand_stage_with_a_second_derivative_has_no_slope(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a number it is a chain of one variable, but the kernels have no such function: torch's formulas do it."""
    add_stage(
        monkeypatch,
        name="hypot",
        reference=lambda z, b: (z * z + b * b).sqrt(),
        gradient=lambda g, z, b: (g * z / (z * z + b * b).sqrt(), g * b / (z * z + b * b).sqrt()),
        second=lambda z, b: b * b / (z * z + b * b) ** 1.5,
        example="hypot",
        parameters=(Parameter("operand", "hypot"),),
        operand=True,
        number=1.0,
    )
    assert not has_slope("hypot(2)") and not has_slope("silu | hypot(2)")
    x = torch.linspace(-2, 2, 7, dtype=torch.double).requires_grad_()
    right = twice(lambda x: (x * x + 4).sqrt(), x)
    torch.testing.assert_close(twice(functools.partial(dualop.chain("hypot(2)"), backend="reference"), x), right)
    with pytest.raises(ChainError, match="no slope"):
        parse("slope of hypot(2)")


def test_what_has_no_slope_is_refused_as_one() -> None:
    for text in ("slope of add", "slope of mul(x)", "slope of slope of silu", "slope of ", "slope of nothing"):
        with pytest.raises(ChainError):
            parse(text)


@pytest.mark.parametrize("name", NAMES)
def test_zero_beside_an_infinite_slope_stays_zero(name: str) -> None:
    """Behind the last curved stage nothing turns: 0 * inf must not get in."""
    x = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    for text in ("mul(inf)", "div(0)", "leaky_relu(inf)"):
        g, one = torch.ones(3, requires_grad=True), torch.ones(3)
        (turned,) = BACKENDS[name].backward(slope_of(text), one, x.detach(), [g.detach()], [True, False])
        assert torch.equal(turned, torch.zeros(3)), text


@pytest.mark.parametrize("name", KERNELS)
def test_a_slopes_source_has_no_forward(name: str) -> None:
    text = BACKENDS[name].source(parse("slope of silu | relu"))
    assert "slope of silu | relu" in text
    if name == "triton":
        assert "forward_kernel" not in text and "stages.silu_second" in text
    else:
        assert "Curved<stage::silu>" in text and "int dualop_backward" in text
        assert "Curved<stage" not in BACKENDS[name].source(dualop.chain("silu | relu"))


# ---- under autograd --------------------------------------------------------------------------------------------------


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def f(name: str) -> Callable[[Tensor], Tensor]:
    return functools.partial(dualop.chain(CHAIN), backend=name)


def written_out(x: Tensor) -> Tensor:
    z = x * torch.sigmoid(x)
    return torch.nn.functional.hardtanh(torch.nn.functional.gelu(torch.tanh(z)))


@pytest.mark.parametrize("text", [CHAIN, 'gelu(approximate="tanh") | softplus(2) | logsigmoid', "mish | mul(2)"])
def test_gradgradcheck(text: str, name: str) -> None:
    x = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    function = functools.partial(dualop.chain(text), backend=name)
    assert torch.autograd.gradgradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,), check_fwd_over_rev=True)
    assert torch.autograd.gradgradcheck(function, (x,), check_batched_grad=True)


def test_double_backward_is_one_launch(f: Callable[[Tensor], Tensor], name: str, monkeypatch: Any) -> None:
    asked: list[tuple[str, list[bool]]] = []
    backward = BACKENDS[name].backward

    def watched(chain: Any, *arguments: Any) -> list[Tensor]:
        asked.append((str(chain), list(arguments[-1])))
        return backward(chain, *arguments)

    monkeypatch.setattr(BACKENDS[name], "backward", watched)
    x = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    gy = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    (gx,) = torch.autograd.grad(f(x), x, gy, create_graph=True)
    asked.clear()
    torch.autograd.grad(gx.square().sum(), (x, gy))
    assert asked == [("slope of silu | tanh | gelu | hardtanh", [True, True])]
    asked.clear()
    (gx,) = torch.autograd.grad(f(x), x, gy.detach(), create_graph=True)
    asked.clear()
    torch.autograd.grad(gx.square().sum(), x)
    assert asked == [("slope of silu | tanh | gelu | hardtanh", [True, False])]


def test_a_physics_informed_loss(f: Callable[[Tensor], Tensor]) -> None:
    """The residual of u'' = u' u for a small network: its loss is differentiated by the weights."""

    def gradients(f: Callable[[Tensor], Tensor]) -> Any:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(1, 5), torch.nn.Linear(5, 5), torch.nn.Linear(5, 1)).double()
        t = torch.linspace(-1, 1, 7, dtype=torch.double)[:, None].requires_grad_()
        u = model[2](f(model[1](f(model[0](t)))))
        (first,) = torch.autograd.grad(u.sum(), t, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), t, create_graph=True)
        return torch.autograd.grad((second - first * u).square().mean(), list(model.parameters()), allow_unused=True)

    for got, right in zip(gradients(f), gradients(written_out), strict=True):
        assert (got is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-10)


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]] = {
    "grad of grad": lambda f, x: grad(lambda x: grad(lambda x: (f(x) ** 3).sum())(x).pow(2).sum())(x),
    "grad of grad of grad": lambda f, x: grad(
        lambda x: grad(lambda x: grad(lambda x: (f(x) ** 3).sum())(x).pow(2).sum())(x).sum()
    )(x),
    "vmap of grad of grad": lambda f, x: vmap(grad(lambda x: grad(lambda x: (f(x) ** 3).sum())(x).pow(2).sum()))(x),
    "hessian": lambda f, x: hessian(lambda x: (f(x) ** 2).sum())(x),
    "jacrev of jacrev": lambda f, x: jacrev(jacrev(lambda x: (f(x) ** 2).sum()))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_func(f: Callable[[Tensor], Tensor], transform: str) -> None:
    x = torch.randn(2, 3, dtype=torch.double)
    got, right = (TRANSFORMS[transform](function, x) for function in (f, written_out))
    torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-10)
    if transform in ("grad of grad", "jacrev of jacrev"):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: TRANSFORMS[transform](f, x), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), right, rtol=1e-9, atol=1e-10)
        torch._dynamo.reset()


@pytest.mark.parametrize("form", ["expanded", "transposed", "0-d", "empty", "bfloat16"])
def test_forms_of_tensors(f: Callable[[Tensor], Tensor], form: str) -> None:
    x = {
        "expanded": torch.randn(5, dtype=torch.double).expand(4, 5),
        "transposed": torch.randn(5, 4, dtype=torch.double).t(),
        "0-d": torch.randn((), dtype=torch.double),
        "empty": torch.randn(0, 4, dtype=torch.double),
        "bfloat16": torch.randn(4, 5).bfloat16(),
    }[form].requires_grad_()
    first = [torch.autograd.grad(function(x).sum(), x, create_graph=True)[0] for function in (f, written_out)]
    got, right = (torch.autograd.grad(g.square().sum(), x)[0] for g in first)
    assert got.dtype == x.dtype and got.shape == x.shape
    tolerance = 0.05 if form == "bfloat16" else 1e-10  # the written-out chain rounds on every step
    torch.testing.assert_close(got, right, rtol=tolerance, atol=tolerance)


def test_opcheck(name: str) -> None:
    v, gy, x = (t.requires_grad_() for t in torch.randn(3, 4, 5, dtype=torch.double))
    for needs in ([True, True], [True, False], [False, True]):
        arguments = (v, x, [gy], CHAIN, name, needs, 2)
        torch.library.opcheck(torch.ops.dualop.backward.default, arguments)


def test_third_derivative(f: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(4, 5, dtype=torch.double, requires_grad=True)
    found = []
    for function in (f, functools.partial(evaluate, dualop.chain(CHAIN), operands=())):
        y = function(x).sum()
        for _ in range(3):
            (g,) = torch.autograd.grad(y, x, create_graph=True)
            y = g.sum()
        found.append(g.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)
