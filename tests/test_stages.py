"""Every stage of the table by itself, on both backends, in four dtypes: accuracy, kinks, infinities, NaN, overflow.

The truth is mpmath where torch's own float64 formulas cancel, torch's float64 functions elsewhere. Errors are measured
in ulps: divided by the spacing of the dtype at max(|exact|, S / 1024), S the largest exact magnitude over |x| <= 4.
The stage's condition counts too: a rounding of an intermediate value is as good as one of x, which the result magnifies
near its zeros and in steep tails.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import dualop
from dualop.backends import registry
from dualop.backends.functions import functions, stage_texts
from dualop.build.sources import folder
from dualop.language.program import SPECIALISED, curved
from dualop.language.slopes import Slope
from dualop.language.stages import STAGES
from dualop.language.syntax import Chain

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
# One rounding of a float32 result is half an ulp of a 16-bit dtype. float32 and float64 formulas have a few roundings.
ULPS = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 4.0, torch.float64: 8.0}
# A rounding of an intermediate value is as good as so many ulps of x.
ROUNDINGS_OF_X = {torch.float16: 2**-8, torch.bfloat16: 2**-8, torch.float32: 1.0, torch.float64: 1.0}
BACKENDS = ("cuda", "triton")
DEVICE = "cpu" if registry.interpreting() else "cuda"
Device = torch.device | str

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no GPU, and kernels are not interpreted", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter computes with NumPy

# ---- the truth -------------------------------------------------------------------------------------------------------

mp = pytest.importorskip("mpmath").mp.clone()  # comes with torch
mp.dps = 60


def _sigmoid(z: Any) -> Any:
    return 1 / (1 + mp.exp(-z)) if z > 0 else mp.exp(z) / (1 + mp.exp(z))


def _bump(z: Any) -> Any:
    """The derivative of sigmoid."""
    e = mp.exp(-abs(z))
    return e / (1 + e) ** 2


def _softplus(z: Any) -> Any:
    return max(z, mp.zero) + mp.log1p(mp.exp(-abs(z)))


def _sech2(z: Any) -> Any:
    return 4 * _bump(2 * z)


def _cdf(z: Any) -> Any:
    return mp.erfc(-z / mp.sqrt(2)) / 2 if abs(z) < 1e6 else mp.mpf(z > 0)


def _pdf(z: Any) -> Any:
    return mp.exp(-z * z / 2) / mp.sqrt(2 * mp.pi)


def _inner(z: Any) -> Any:
    return 2 * mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3)


def _inner_slope(z: Any) -> Any:
    return 2 * mp.sqrt(2 / mp.pi) * (1 + 3 * mp.mpf("0.044715") * z**2)


def _gelu(z: Any, approximate: str) -> Any:
    return z * (_sigmoid(_inner(z)) if approximate == "tanh" else _cdf(z))


def _gelu_slope(z: Any, approximate: str) -> Any:
    if approximate == "tanh":
        return _sigmoid(_inner(z)) + z * _bump(_inner(z)) * _inner_slope(z)
    return _cdf(z) + z * _pdf(z)


ALPHA, SCALE = mp.mpf("1.6732632423543772848170429916717"), mp.mpf("1.0507009873554804934193349852946")

# (value, derivative) of the stages whose formulas in torch cancel somewhere.
EXACT: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "elu": (lambda z, a: z if z > 0 else a * mp.expm1(z), lambda z, a: 1 if z > 0 else a * mp.exp(z)),
    "selu": (
        lambda z: SCALE * (z if z > 0 else ALPHA * mp.expm1(z)),
        lambda z: SCALE * (1 if z > 0 else ALPHA * mp.exp(z)),
    ),
    "celu": (lambda z, a: z if z > 0 else a * mp.expm1(z / a), lambda z, a: 1 if z > 0 else mp.exp(z / a)),
    "sigmoid": (_sigmoid, _bump),
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) + z * _bump(z)),
    "tanh": (mp.tanh, _sech2),
    "tanhshrink": (lambda z: z - mp.tanh(z), lambda z: mp.tanh(z) ** 2),
    "softplus": (
        lambda z, beta, threshold: z if z * beta > threshold else _softplus(z * beta) / beta,
        lambda z, beta, threshold: 1 if z * beta > threshold else _sigmoid(z * beta),
    ),
    "logsigmoid": (lambda z: -_softplus(-z), lambda z: _sigmoid(-z)),
    "mish": (
        lambda z: z * mp.tanh(_softplus(z)),
        lambda z: mp.tanh(_softplus(z)) + z * _sech2(_softplus(z)) * _sigmoid(z),
    ),
    "gelu": (_gelu, _gelu_slope),
    "softsign": (lambda z: z / (1 + abs(z)), lambda z: 1 / (1 + abs(z)) ** 2),
    # torch has its 1 / 6 in float32 here, even for float64.
    "hardsigmoid": (lambda z: min(max(z + 3, 0), 6) / 6, lambda z: mp.mpf(-3 < z < 3) / 6),
    "hardswish": (
        lambda z: z * min(max(z + 3, 0), 6) / 6,
        lambda z: 0 if z <= -3 else z / 3 + mp.mpf(1) / 2 if z < 3 else 1,
    ),
}


def _to_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.copysign(math.inf, value)


@lru_cache(maxsize=None)
def _exactly(name: str, arguments: tuple[Any, ...], z: float) -> tuple[float, float]:
    value, slope = EXACT[name]
    numbers = [mp.mpf(a) if isinstance(a, float) else a for a in arguments]
    return _to_float(value(mp.mpf(z), *numbers)), _to_float(slope(mp.mpf(z), *numbers))


def by_torch(op: Chain, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The chain and its derivatives by torch's functions in `dtype`, all tensors of one shape."""
    leaves = [t.detach().to(dtype).clone().requires_grad_() for t in tensors]
    y = dualop.reference(op, leaves[0], leaves[1:])
    return y.detach(), list(torch.autograd.grad(y.sum(), leaves))


def truth(op: Chain, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The chain and its derivatives, in float64, for finite inputs of one shape."""
    *before, call = op.calls
    if call.stage.name not in EXACT or any(c.stage.name != "hardtanh" for c in before):
        return by_torch(op, torch.float64, *tensors)
    z, slopes = tensors[0].double(), [torch.tensor(1.0)]
    if before:  # a hardtanh, which is exact
        z, slopes = by_torch(Chain(tuple(before)), torch.float64, *tensors)
    pairs = [_exactly(call.stage.name, call.arguments, z) for z in z.tolist()]
    value, slope = torch.tensor(pairs, dtype=torch.float64).T
    return value, [slope * slopes[0]]


# ---- the inputs ------------------------------------------------------------------------------------------------------

KINKS = sorted({0.0, 0.25, *(abs(kink) for stage in STAGES.values() for kink in stage.kinks or ())})


@lru_cache(maxsize=None)
def finite_inputs(dtype: torch.dtype) -> Tensor:
    """Kinks and their neighbours, a grid, small and subnormal numbers, large ones up to the largest."""
    info = torch.finfo(dtype)
    kinks = torch.tensor([*KINKS, *(-k for k in KINKS)], dtype=torch.float64).to(dtype)
    around = [torch.nextafter(kinks, torch.full_like(kinks, side)) for side in (math.inf, -math.inf)]
    grid = torch.cat([torch.linspace(-9.7, 9.9, 90, dtype=torch.float64), torch.linspace(-1.1, 1.2, 60)]).to(dtype)
    small = [2.0**-k for k in (3, 5, 8, 11, 14)] + [info.tiny, info.tiny / 2, info.smallest_normal * info.eps]
    large = [12.0, 15.5, 45.0, 87.0, 89.0, 104.0, 1e3, 1e4, 5e4, 1e19, 1e30, 1e200, info.max / 4, info.max]
    sizes = torch.tensor([s for s in (*small, *large) if s <= info.max], dtype=torch.float64).to(dtype)
    return torch.cat([kinks, *around, grid, sizes, -sizes])


def without_subnormals(backend: str, dtype: torch.dtype) -> bool:
    """Triton's interpreter takes subnormal bfloat16 for zero; its compiled kernels do not."""
    return backend == "triton" and dtype == torch.bfloat16 and registry.interpreting()


def gradient_in(x: Tensor) -> Tensor:
    """Powers of two, so that the truth under them is exact too."""
    return torch.tensor([1.0, -0.5, 2.0], dtype=x.dtype).repeat(x.numel() // 3 + 1)[: x.numel()].reshape(x.shape)


def computed(
    op: Chain, backend: str, *tensors: Tensor, gy: Tensor | None = None, device: Device = DEVICE
) -> tuple[Tensor, list[Tensor]]:
    """The result and the gradients, back on the CPU."""
    leaves = [t.detach().to(device).clone().requires_grad_() for t in tensors]
    y = op(*leaves, backend=backend)
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y) if gy is None else gy.to(device))
    assert all(t.dtype == tensors[0].dtype and t.shape == tensors[0].shape for t in (y, *gradients))
    return y.detach().cpu(), [g.cpu() for g in gradients]


# ---- the measure -----------------------------------------------------------------------------------------------------


def ulp_errors(actual: Tensor, exact: Tensor, scale: float) -> Tensor:
    """In ulps of actual's dtype; inf where one is NaN or infinite and the other is not (or cannot round to it)."""
    info = torch.finfo(actual.dtype)
    magnitude = exact.abs().clamp(max(scale / 1024, info.tiny), info.max)
    spacing = torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps
    got = actual.double()
    error = (got - exact).abs() / spacing
    beyond = exact.abs() > info.max * (1 - 4 * info.eps)  # rounds to infinity, or an ulp more would
    overflowed = got.isinf() & (got.sign() == exact.sign())
    return torch.where(overflowed, torch.where(beyond, 0.0, math.inf), error.nan_to_num(math.inf, math.inf))


def scale_of(exact: Tensor, x: Tensor) -> float:
    ordinary = exact[(x.abs() <= 4) & exact.isfinite()]
    return ordinary.abs().max().item()


def wrong(what: str, x: Tensor, got: Tensor, expected: Tensor, errors: Tensor, bad: Tensor) -> list[str]:
    """A line for each of the first bad elements."""
    at = bad.flatten().nonzero().flatten()[:6]
    rows = zip(*(t.flatten()[at].tolist() for t in (x, got, expected, errors)), strict=True)
    return [f"{what} at {a!r}: {b!r} where {c!r} is right, {d:.3g} ulp ({int(bad.sum())} such)" for a, b, c, d in rows]


def conditions(op: Chain, x: Tensor, exact: list[Tensor], scales: list[float]) -> list[Tensor]:
    """By how many of its ulps each exact result changes when x changes by one; the flatter side of a kink counts."""
    changes = []
    for side in (math.inf, -math.inf):
        value, (slope,) = truth(op, torch.nextafter(x, torch.full_like(x, side)))
        changes.append([ulp_errors(e.to(x.dtype), t, s) for e, t, s in zip(exact, (value, slope), scales, strict=True)])
    return [torch.minimum(a, b).nan_to_num(0.0, 0.0) for a, b in zip(*changes, strict=True)]


def accuracy_problems(op: Chain, backend: str, dtype: torch.dtype, device: Device = DEVICE) -> list[str]:
    """Finite inputs: within so many ulps of the truth, so also no NaN, and torch's gradient at kinks."""
    x = finite_inputs(dtype)
    if without_subnormals(backend, dtype):
        x = x[(x == 0) | (x.abs() >= torch.finfo(dtype).tiny)]
    gy = gradient_in(x)
    y, (gx,) = computed(op, backend, x, gy=gy, device=device)
    exact, (slope,) = truth(op, x)
    pairs = [exact, slope]
    scales = [scale_of(e, x) for e in pairs]
    share = ROUNDINGS_OF_X[dtype]
    allowed = [ULPS[dtype] * (1 + share * c) for c in conditions(op, x, pairs, scales)]
    if dtype == torch.float64 and str(op) == "tanhshrink":  # z - tanh(z), as torch has it: as good as z, not as y
        allowed[0] = allowed[0] * (1 + (x / exact).abs().nan_to_num(0.0))
    problems = []
    for what, got, right, scale, limit in (
        ("y", y, exact, scales[0], allowed[0]),
        ("gradient", gx, slope * gy.double(), scales[1], allowed[1]),
    ):
        # abs | sqrt at zero is no number in torch either.
        errors = ulp_errors(got, right, scale).masked_fill(right.isnan(), 0.0)
        problems += wrong(what, x, got, right, errors, errors > limit)
    return problems


def special_problems(op: Chain, backend: str, dtype: torch.dtype, device: Device = DEVICE) -> list[str]:
    """At infinity and NaN: what torch has where that is a number, otherwise NaN or the limit."""
    x = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)
    y, (gx,) = computed(op, backend, x, device=device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # torch's vectorised loop and its tail do not always agree at NaN and infinity: either will do.
    alone, (alone_slope,) = by_torch(op, wide, x)
    many, (many_slope,) = by_torch(op, wide, x.repeat_interleave(64))
    far, (far_slope,) = truth(op, torch.tensor([1e30, -1e30, 1e30], dtype=torch.float64))
    problems = []
    for what, got, one, other, limit in (
        ("y", y, alone, many[::64], far),
        ("gradient", gx, alone_slope, many_slope[::64], far_slope),
    ):
        for i, at in enumerate(x.tolist()):
            value, torchs = got[i].item(), (one[i].to(dtype).item(), other[i].to(dtype).item())
            undefined = any(map(math.isnan, torchs))
            end = math.copysign(math.inf, limit[i]) if abs(limit[i]) > 1e29 else limit[i].item()
            near_end = value == end or abs(value - end) < 1e-6
            fine = any(value == t or abs(value - t) <= 4 * torch.finfo(dtype).eps * abs(t) < math.inf for t in torchs)
            fine = fine or (undefined and (math.isnan(value) or near_end))
            if math.isnan(at):
                fine = math.isnan(value) or (what == "gradient" and value in torchs)
            if not fine:
                problems.append(f"{what} at {at}: {value} where torch has {torchs}")
    return problems


# ---- every stage -----------------------------------------------------------------------------------------------------

# Behind a stage that ends in [-1, 1], gelu is another function; so is mish behind one that ends above -0.31.
RANGED = ["hardtanh | gelu", "hardtanh(-0.296875, 40) | mish"]
UNARY = [*(s.example for s in STAGES.values() if not s.operand), 'gelu(approximate="tanh")', *RANGED]
OPERAND_STAGES = [stage.name for stage in STAGES.values() if stage.operand]
# Other parameters than the example's: negative slopes, no bounds, bounds that float32 rounds, overflowing ones.
VARIANTS = [
    "clamp(max=0.5)",
    "clamp(0.25)",
    "clamp(1, -1)",
    "clamp(-1e39, 1e300)",
    "hardtanh(-0.1, 0.3)",
    "hardtanh(0, inf)",
    "leaky_relu(-0.5)",
    "leaky_relu(2)",
    "threshold(-1, 20)",
    "threshold(20, -0.1)",
    "hardshrink(0)",
    "hardshrink(2.5)",
    "softshrink(0)",
    "softshrink(3)",
    "elu(2.5)",
    "elu(-1)",
    "elu(0)",
    "celu(0.1)",
    "celu(-2)",
    "softplus(2, 10)",
    "softplus(0.25)",
    "softplus(1, 3)",
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", UNARY)
def test_stage(text: str, dtype: str, backend: str) -> None:
    check_stage(text, dtype, backend)


def check_stage(text: str, dtype: str, backend: str, device: Device = DEVICE) -> None:
    op, kind = dualop.chain(text), DTYPES[dtype]
    problems = accuracy_problems(op, backend, kind, device) + special_problems(op, backend, kind, device)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ["silu", "gelu", 'gelu(approximate="tanh")', "mish", "silu | tanh"])
def test_zero_times_minus_infinity(text: str, dtype: str, backend: str) -> None:
    """No number, as in torch, though the limit is 0."""
    x = torch.tensor([-math.inf], dtype=DTYPES[dtype])
    y, _ = computed(dualop.chain(text), backend, x)
    assert by_torch(dualop.chain(text), torch.float64, x)[0].isnan().all() and y.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", VARIANTS)
def test_stage_with_other_parameters(text: str, backend: str) -> None:
    op = dualop.chain(text)
    problems = accuracy_problems(op, backend, torch.float32)
    assert not problems, "\n".join(problems)


# ---- infinity --------------------------------------------------------------------------------------------------------

# Stages whose gradient at plus and minus infinity is NaN by torch's formulas, though it has a limit.
LIMITS = ("silu", "mish", "gelu", 'gelu(approximate="tanh")')


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", [text for text in UNARY if text not in RANGED])
def test_infinity_is_as_the_readme_says(text: str, dtype: str, backend: str) -> None:
    """torch's number wherever it has one; else the limit or NaN, in float32 the kernels have the limit of a slope."""
    op, kind = dualop.chain(text), DTYPES[dtype]
    x = torch.tensor([math.inf, -math.inf], dtype=kind)
    y, (gx,) = computed(op, backend, x)
    wide = torch.float64 if kind == torch.float64 else torch.float32
    lone, torchs = by_torch(op, wide, x), by_torch(op, wide, x.repeat_interleave(64))  # a loop's tail and its vectors
    (value, slope), (one, one_slope) = ((v.to(kind), s[0].to(kind)) for v, s in (torchs, lone))
    assert (slope.isnan().all() and one_slope.isnan().all()) == (text in LIMITS or bool(value.isnan().all()))
    assert text != "softsign" or value.isnan().all()
    for got, many, few in ((y, value[::64], one), (gx, slope[::64], one_slope)):
        right = (got == many) | (got == few) | many.isnan() | few.isnan()
        assert right.all(), (got, many, few)
    if text in LIMITS:
        limit = torch.tensor([1.0, 0.0], dtype=kind)
        assert backend == "reference" or ((gx - limit).abs() < 1e-6).logical_or(gx.isnan()).all()
        if backend == "reference":
            assert gx.isnan().all()
        elif dtype == "float32":
            assert torch.equal(gx, limit)
        assert y[1].isnan() and (y[0] == math.inf or y[0].isnan())
    elif text == "softsign":
        assert y.isnan().all() and torch.equal(gx, torch.zeros_like(gx))


def test_the_documentation_names_the_stages_that_have_a_limit() -> None:
    page = folder("cuda").parent / "docs" / "limits.md"
    if not page.exists():
        pytest.skip("installed, without docs")
    (paragraph,) = [p for p in page.read_text().split("\n- ") if "minus infinity" in p]
    assert all(f"`{text}`" in paragraph for text in (*LIMITS, "softsign"))


# ---- numbers beyond float32 ------------------------------------------------------------------------------------------


def beyond(numbers: tuple[str, ...] = ("1e39", "-1e39", "1e300", "-1e300")) -> list[str]:
    """Every stage with a number, with each of these in each place where the chain is accepted."""
    texts = []
    for stage in STAGES.values():
        given = ["0.5" if p.default is None or stage.operand else repr(p.default) for p in stage.parameters]
        for i, parameter in enumerate(stage.parameters):
            if not parameter.words:
                texts += [f"{stage.name}({', '.join([*given[:i], n, *given[i + 1 :]])})" for n in numbers]
    return [text for text in texts if accepted(text)]


def accepted(text: str) -> bool:
    try:
        dualop.chain(text)
    except dualop.errors.ChainError:
        return False
    return True


FEW = ("1e39",)  # a compiler takes its time


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_numbers_beyond_float32_are_infinite_on_every_backend(dtype: str) -> None:
    """As the kernels round them; torch refuses some. In float64 they are what they are."""
    kind = DTYPES[dtype]
    large = min(torch.finfo(kind).max / 2, 1e38)
    x = torch.tensor([-large, -5.0, -0.5, -0.0, 0.0, 0.5, 5.0, large, math.inf, -math.inf, math.nan], dtype=kind)
    for text in beyond():
        op, by_kernel = dualop.chain(text), {}
        backends = ("triton", "cuda") if dtype == "float32" and text in beyond(FEW) else ("triton",)
        for backend in ("reference", *backends):
            leaf = x.clone().to(DEVICE).requires_grad_()
            y = op(leaf, backend=backend)
            (g,) = torch.autograd.grad(y, leaf, torch.ones_like(y), create_graph=True)
            turned = torch.autograd.grad(g.sum(), leaf)[0] if g.requires_grad else torch.zeros_like(g)
            by_kernel[backend] = [t.detach().cpu() for t in (y, g, turned)]
        for got in (by_kernel[b] for b in backends):
            for mine, right in zip(got, by_kernel["reference"], strict=True):
                known = right.isfinite() | (x.abs() < large)
                if text.startswith("softplus(1.0, "):  # without threshold torch's exp overflows, the kernels' does not
                    known &= x < 80
                torch.testing.assert_close(mine[known], right[known], equal_nan=True, msg=f"{text}: {mine} {right}")
    assert len(beyond()) > 60 and {dualop.chain(t).calls[0].stage.name for t in beyond()} >= {"clamp", "maximum"}


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_bounds_beyond_float32_do_not_bind(backend: str) -> None:
    x = torch.tensor([-3e38, -1.0, 0.0, 2.0, 3e38])
    for text in ("clamp(-1e39, 1e300)", "hardtanh(-1e39, 1e39)", "minimum(1e39)", "maximum(-1e39)", "softshrink(0)"):
        assert torch.equal(computed(dualop.chain(text), backend, x)[0], x), text
    for text in ("clamp(min=1e39)", "maximum(1e39)"):
        assert (computed(dualop.chain(text), backend, x)[0] == math.inf).all(), text
        half, _ = computed(dualop.chain(text), backend, x[1:4].half())
        assert (half == math.inf).all(), text
    largest = torch.finfo(torch.float32).max
    for number in (largest, largest * (1 + 2.0**-26)):  # rounds to the largest float32
        assert (computed(dualop.chain(f"clamp(min={number!r})"), backend, x)[0] == largest).all(), number


def test_celu_is_refused_where_its_inverse_is_no_float32() -> None:
    """torch refuses these too, but in float64."""
    for alpha in (1e39, -1e39, 1e-39, math.inf, 0):
        with pytest.raises(dualop.errors.ChainError, match="alpha must be from"):
            dualop.stages.celu(alpha)
    assert dualop.stages.celu(1e-38) and dualop.stages.celu(-1e38)


OPERAND_VALUES = (0.0, -0.0, 1.0, -1.0, 0.5, 3.0, -20.0, 1e-3, 1e4, 0.3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERAND_STAGES)
def test_operand_stage(name: str, dtype: str, backend: str) -> None:
    check_operand_stage(name, dtype, backend)


def check_operand_stage(name: str, dtype: str, backend: str, device: Device = DEVICE) -> None:
    """All pairs of some values: the result and both gradients; ties, zeros, subnormals and the largest among them."""
    op, kind = dualop.chain(name), DTYPES[dtype]
    values = torch.tensor([*OPERAND_VALUES, *(-v for v in OPERAND_VALUES)], dtype=torch.float64).to(kind)
    far, coarse = finite_inputs(kind)[-44:], without_subnormals(backend, kind)
    if coarse:
        far = far[far.abs() >= torch.finfo(kind).tiny]
    values = torch.cat([values, far])
    x, b = (t.contiguous() for t in torch.meshgrid(values, values, indexing="ij"))
    gy = gradient_in(x)
    y, got = computed(op, backend, x, b, gy=gy, device=device)
    exact, slopes = truth(op, x, b)
    torchs, torchs_slopes = by_torch(op, torch.float64 if kind == torch.float64 else torch.float32, x, b)
    problems = []
    pairs = [("y", y, exact, torchs)]
    pairs += [(f"gradient {i}", g, s * gy.double(), t) for i, (g, s, t) in enumerate(zip(got, slopes, torchs_slopes))]
    for what, value, right, at_torch in pairs:
        # 0 / 0, and what overflows halfway in torch's own formula too.
        errors = ulp_errors(value, right, 0.0).masked_fill(right.isnan() | ~at_torch.isfinite(), 0.0)
        if coarse:
            errors = errors.masked_fill(right.abs() < torch.finfo(kind).tiny, 0.0)
        problems += wrong(what, x, value, right, errors, errors > ULPS[kind])
        problems += wrong(what, x, value, right, errors, value.isnan() & right.isfinite() & ~at_torch.isnan())
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPERAND_STAGES)
def test_operand_stage_with_infinities_and_nan(name: str, dtype: str, backend: str) -> None:
    check_operand_stage_with_infinities_and_nan(name, dtype, backend)


def check_operand_stage_with_infinities_and_nan(name: str, dtype: str, backend: str, device: Device = DEVICE) -> None:
    op = dualop.chain(name)
    values = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, 1.0, -2.0], dtype=DTYPES[dtype])
    x, b = (t.contiguous() for t in torch.meshgrid(values, values, indexing="ij"))
    y, gradients = computed(op, backend, x, b, device=device)
    right, slopes = by_torch(op, DTYPES[dtype], x, b)
    torch.testing.assert_close(y, right, rtol=0, atol=0, equal_nan=True)
    for got, slope in zip(gradients, slopes, strict=True):
        # Next to a NaN the gradient is torch's or NaN.
        different = (got != slope) & ~(got.isnan() & (slope.isnan() | x.isnan() | b.isnan()))
        assert not different.any(), wrong("gradient", x, got, slope, b, different)


TIES = (
    "hardtanh(-0.1, 0.3)",
    "clamp(-0.1, 0.3)",
    "hardshrink(0.1)",
    "softshrink(0.3)",
    "threshold(0.1, 5)",
    "minimum(0.3)",
)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("text", TIES)
def test_a_bound_that_is_no_float32_number_is_met_by_its_float32_neighbour(text: str, backend: str) -> None:
    """torch rounds a bound to the tensor's dtype and so has ties there."""
    op = dualop.chain(text)
    x = torch.tensor([0.1, -0.1, 0.3, -0.3])
    x = torch.cat([x, torch.nextafter(x, torch.zeros(())), torch.nextafter(x, 2 * x)])
    y, (gx,) = computed(op, backend, x)
    right, (slope,) = by_torch(op, torch.float32, x)
    assert torch.equal(y, right) and torch.equal(gx, slope)


MASKING = (
    "relu",
    "relu6",
    "hardtanh",
    "clamp(-0.5, 0.75)",
    "threshold(0.5, 0.25)",
    "hardshrink",
    "softshrink",
    "hardsigmoid",
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("text", MASKING)
@pytest.mark.parametrize("incoming", [math.inf, math.nan])
def test_an_infinite_gradient_stays_behind_a_mask(text: str, backend: str, incoming: float) -> None:
    x = torch.tensor([-7.0, -0.25, 0.0, 0.25, 7.0])
    gy = torch.full_like(x, incoming)
    _, (gx,) = computed(dualop.chain(text), backend, x, gy=gy)
    leaf = x.clone().requires_grad_()
    (right,) = torch.autograd.grad(dualop.reference(dualop.chain(text), leaf), leaf, gy)
    torch.testing.assert_close(gx, right, rtol=0, atol=0, equal_nan=True)
    assert (gx == 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_operand_stages_with_numbers_and_with_x(backend: str) -> None:
    x = finite_inputs(torch.float32)
    x = x[x.abs() < 1e4]
    for text in (
        "mul(2.5) | sub(0.5) | div(3) | rsub(1) | minimum(0.75) | maximum(-0.5) | add(0.25) | minimum(inf)",
        "mul(x) | sub(x) | maximum(x) | rsub(x) | minimum(x) | add(x)",
        "minimum(x)",  # a tie everywhere: each side gets half
    ):
        op = dualop.chain(text)
        y, (gx,) = computed(op, backend, x)
        right, (slope,) = by_torch(op, torch.float32, x)
        torch.testing.assert_close(y, right, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gx, slope, rtol=1e-6, atol=1e-6)


# ---- the three tables ------------------------------------------------------------------------------------------------


def kernel_names() -> list[str]:
    """What the table of dualop/language/table.py asks of a kernel language, in its order."""
    names: list[str] = []
    for stage in STAGES.values():
        calls = [c for p in stage.parameters for w in p.words if (c := dualop.chain(f'{stage.name}("{w}")').calls[0])]
        for call in calls or dualop.chain(stage.example).calls[-1:]:
            name = stage.name if stage.operand else stage.kernel(*call.arguments)[0]
            if name not in names:
                names.append(name)
    return names


def parameters_of(name: str) -> int:
    """How many numbers the kernels' function takes."""
    for stage in STAGES.values():
        call = dualop.chain(stage.example).calls[-1]
        if not stage.operand and name == stage.name:
            return len(stage.kernel(*call.arguments)[1])
    return 0


def cuda_stages() -> list[tuple[str, int]]:
    """The structs of the stages' headers, and how many numbers each takes."""
    text = "".join(stage_texts("cuda").values())
    found = re.findall(r"^(?:template <([^>]*)> )?struct (\w+)", text, re.MULTILINE)
    return [(name, len(parameters.split(",")) if parameters else 0) for parameters, name in found]


def triton_functions(second: bool = False) -> dict[str, list[str]]:
    """Without those that take the place of a forward inside a backward; the second derivatives or all the others."""
    functions = [f for text in stage_texts("triton").values() for f in ast.parse(text).body]
    functions = [f for f in functions if isinstance(f, ast.FunctionDef) and not f.name.endswith("_inner")]
    return {f.name: [a.arg for a in f.args.args] for f in functions if f.name.endswith("_second") == second}


def test_the_three_tables_name_the_same_stages_in_the_same_order() -> None:
    expected = kernel_names()
    functions = [name for name in triton_functions() if name.removesuffix("_backward") not in SPECIALISED]
    forward = [name for name in functions if not name.endswith("_backward")]
    assert [name for name, _ in cuda_stages() if name not in SPECIALISED] == expected
    assert forward == expected
    assert [name.removesuffix("_backward") for name in functions if name.endswith("_backward")] == expected
    assert [name for name, _ in cuda_stages()] == [n for n in triton_functions() if not n.endswith("_backward")]


def test_the_three_tables_have_the_same_parameters() -> None:
    functions = triton_functions()
    for name, count in cuda_stages():
        assert count == parameters_of(name), name
        operand = name in STAGES and STAGES[name].operand
        assert len(functions[name]) == 2 + operand + count, name  # z, BITS
        assert len(functions[f"{name}_backward"]) == 3 + operand + count, name  # and gy


def test_the_three_tables_have_the_same_second_derivatives() -> None:
    """The table says which stages have one; the kernels have these and those of their specialised forms."""
    ours = [name for name, _ in cuda_stages() if name in curved_names()]
    assert {name for name in ours if name not in SPECIALISED} == curved_names() - {
        "gelu_unit",
        "gelu_upper",
        "mish_upper",
        "tanh_approx",
    }
    seconds = triton_functions(second=True)
    assert list(seconds) == [f"{name}_second" for name in ours]
    assert [name for name in functions("cuda") if name.endswith("::second")] == [f"{name}::second" for name in ours]
    for name, count in cuda_stages():
        assert name not in ours or len(seconds[f"{name}_second"]) == 2 + count, name  # z, BITS


def test_the_kernel_languages_have_their_stages_in_the_same_files() -> None:
    """Each function at the same place: the file of a stage, and in it forward, backward, second derivative."""
    cuda, triton = stage_texts("cuda"), stage_texts("triton")
    assert [path.partition(".")[0] for path in cuda] == [path.partition(".")[0] for path in triton]
    for mine, other in zip(cuda.values(), triton.values(), strict=True):
        structs = re.findall(r"^(?:template <[^>]*> )?struct (\w+)", mine, re.MULTILINE)
        names = re.findall(r"^def (\w+)\(", other, re.MULTILINE)
        assert structs == [n for n in names if not n.endswith(("_inner", "_backward", "_second"))]
        for name in structs:
            mine_of_it = [n for n in names if n in {name, f"{name}_inner", f"{name}_backward", f"{name}_second"}]
            start = names.index(name)
            assert names[start : start + len(mine_of_it)] == mine_of_it, name
            assert f"{name}_second" not in names or mine_of_it[-1] == f"{name}_second", name


def curved_names() -> set[str]:
    """The kernel functions that have a second derivative."""
    texts = [s.example for s in STAGES.values() if not s.operand]
    texts += ['gelu(approximate="tanh")', "tanh | gelu", "sigmoid | gelu", "relu | mish", "tanh | sub(1)"]
    return {name for text in texts for name in curved(Slope(dualop.chain(text)))}


def test_every_stage_is_complete() -> None:
    for name, stage in STAGES.items():
        op = dualop.chain(stage.example)
        assert op.calls[-1].stage.name == name
        assert all(p.default is None or isinstance(p.default, (float, str)) for p in stage.parameters)
        assert stage.signature.startswith(name)
