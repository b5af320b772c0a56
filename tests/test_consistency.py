"""cuda against triton against reference against float64: chains, shapes, operand forms, layouts in memory, dtypes.

`CASES` and `check_case` are what tests/test_gpu.py runs on CUDA tensors too.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import reduce

import pytest
import torch
from torch import Tensor

import dualop
from dualop.language.syntax import Chain
from dualop.launch.layout import COLUMN, EACH, FULL, NEAR, ONE, ROW, SHARED, WIDE, layout_of
from dualop.numerics.check import poisoned

BACKENDS = ("reference", "cuda", "triton")
DEFAULT = "add | swish | tanh | gelu | hardtanh(-1, 1)"
NARROW = "add | swish | tanh | gelu | hardtanh(-0.1, 0.3)"
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64

Form = tuple[tuple[int, ...], str]


@dataclass(frozen=True)
class Case:
    """One call: `x` and `operands` are (shape, how it lies in memory), `dtypes` those of x and of the operands."""

    name: str
    text: str
    x: Form
    operands: tuple[Form, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (F32,)
    gy: str = "dense"

    def dtype(self, index: int) -> torch.dtype:
        return self.dtypes[min(index, len(self.dtypes) - 1)]


def arranged(values: Tensor, how: str) -> Tensor:
    """The same values, lying in memory as `how` says."""
    shape, rank = tuple(values.shape), values.dim()
    if how == "transposed":
        return values.transpose(0, rank - 1).contiguous().transpose(0, rank - 1)
    if how == "heads":  # as an attention layer makes them of its sequence
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    if how == "sliced":  # rows stay contiguous
        return values.new_full((*shape[:-1], shape[-1] + 11), torch.nan)[..., 4 : 4 + shape[-1]].copy_(values)
    if how == "sliced in the middle":
        return values.new_full((shape[0], shape[1] + 2, *shape[2:]), torch.nan)[:, 1:-1].copy_(values)
    if how == "every second":
        return values.new_full((*shape[:-1], 2 * shape[-1]), torch.nan)[..., ::2].copy_(values)
    if how == "offset":  # of one element: no vector access is aligned
        return values.new_full((values.numel() + 1,), torch.nan)[1:].view(shape).copy_(values)
    if how == "expanded":
        return values[:1].expand(shape)
    assert how == "dense"
    return values.contiguous()


def make(case: Case, device: torch.device | str, scale: float = 2.0) -> tuple[Tensor, list[Tensor], Tensor]:
    """x, the operands and gy: the same values in every run and on every device."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))

    def normal(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=F64).to(dtype).to(device)

    x = arranged(normal(case.x[0], case.dtype(0)) * scale, case.x[1])
    operands = []
    for i, (shape, how) in enumerate(case.operands):
        values = normal(shape, case.dtype(i + 1))
        operands.append(arranged(values + values.sign() / 4, how))  # no divisor near zero
    result = reduce(torch.add, operands, x)
    gy = normal(tuple(result.shape), result.dtype)
    if case.gy == "expanded":  # as the backward of y.sum() has it
        return x, operands, torch.full((), 0.75, dtype=result.dtype, device=device).expand(result.shape)
    return x, operands, arranged(gy, case.gy)


@dataclass
class Result:
    y: Tensor
    gradients: list[Tensor]

    @property
    def all(self) -> list[Tensor]:
        return [self.y, *self.gradients]


def run(op: Chain, x: Tensor, operands: list[Tensor], gy: Tensor, backend: str, only: int | None = None) -> Result:
    """One call in poisoned memory: what a kernel leaves unwritten is NaN. `only` asks for one input's gradient."""
    leaves = [t.detach().requires_grad_() for t in (x, *operands)]
    with poisoned():
        y = op(*leaves, backend=backend)
        gradients = torch.autograd.grad(y, leaves if only is None else leaves[only], gy)
    return Result(y.detach(), list(gradients))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def spacing(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(magnitude.clamp(info.tiny, info.max)))) * info.eps


# Ulps at max(|exact|, S / 1024), S the largest exact magnitude. 16 bits: one rounding of what float32 computed (lean in
# float16). float32 and float64: every stage rounds, and a chain magnifies the roundings of its early stages, most where
# its own value or derivative crosses zero: there some epsilons of S count. Formulas of torch cancel more (1 - t * t),
# in the reference and in the truth for float64.
ULPS = {BF16: 1.0, F16: 1.5, F32: 16.0, F64: 16.0}
OF_S = {BF16: 0.0, F16: 0.0, F32: 1.0, F64: 16.0}
REFERENCE_OF_S = 16.0
# Relative error of a term of a sum: terms are not rounded to 16 bits before they are added up.
TERM = {BF16: 2.0**-9, F16: 2.0**-12, F32: 2.0**-19, F64: 2.0**-48}


def truth(op: Chain, x: Tensor, operands: list[Tensor], gy: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y, the gradients and the sums of their terms' magnitudes, in float64."""
    leaves = [t.double().expand(gy.shape).clone().requires_grad_() for t in (x, *operands)]
    y = dualop.reference(op, leaves[0], leaves[1:])
    terms = torch.autograd.grad(y, leaves, gy.double())
    shapes = [t.shape for t in (x, *operands)]
    sums = [t.sum_to_size(s) for t, s in zip(terms, shapes, strict=True)]
    return y.detach(), sums, [t.abs().sum_to_size(s) for t, s in zip(terms, shapes, strict=True)]


def close(what: str, got: Tensor, exact: Tensor, sizes: Tensor, computed: torch.dtype) -> None:
    """`sizes`: |exact|, or where terms were summed the sum of their magnitudes. `computed`: the result's dtype."""
    if got.numel() == 0:
        return
    scale = exact.abs().max().item()
    coarse = max(got.dtype, computed, key=lambda dtype: torch.finfo(dtype).eps)
    of_scale = OF_S[coarse]
    if what.startswith("reference") and coarse in (F32, F64):
        of_scale = REFERENCE_OF_S
    limit = ULPS[coarse] * spacing(exact.abs().clamp(min=scale / 1024), coarse)
    limit = limit + of_scale * torch.finfo(coarse).eps * scale
    limit = limit + torch.where(sizes > exact.abs(), TERM[computed] * sizes, 0.0)
    error = (got.double() - exact).abs()
    bad = ~(error <= limit)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise AssertionError(
            f"{what} at {at}: {got[at].item()!r} where {exact[at].item()!r} is exact, "
            f"{(error / limit).max().item():.3g} times too much ({int(bad.sum())} of {bad.numel()} such)"
        )


def check_case(case: Case, device: torch.device | str, backends: tuple[str, ...] = BACKENDS) -> dict[str, Result]:
    """Values, shapes, dtypes, strides, reproducibility and partial needs of every backend in one case."""
    op = dualop.chain(case.text)
    x, operands, gy = make(case, device)
    inputs = [x, *operands]
    before = [t.clone() for t in (*inputs, gy)]
    exact, gradients, sizes = truth(op, x, operands, gy)
    torchs = reduce(torch.add, operands, x) if operands else -x
    results = {}
    for backend in backends:
        result = results[backend] = run(op, x, operands, gy, backend)
        assert result.y.shape == torchs.shape and result.y.dtype == torchs.dtype
        if backend != "reference":
            dims = [d for d, n in enumerate(torchs.shape) if n > 1]
            assert [result.y.stride(d) for d in dims] == [torchs.stride(d) for d in dims]
        close(f"{backend} y", result.y, exact, exact.abs(), torchs.dtype)
        for i, (got, like) in enumerate(zip(result.gradients, inputs, strict=True)):
            assert got.shape == like.shape and got.dtype == like.dtype and got.device == like.device
            close(f"{backend} gradient of {('x', *op.operands)[i]}", got, gradients[i], sizes[i], torchs.dtype)
        for now, kept in zip((*inputs, gy), before, strict=True):
            assert torch.equal(bits(now), bits(kept)), "an input was written"
    for backend in backends[-2:]:
        again = run(op, x, operands, gy, backend)
        for one, other in zip(results[backend].all, again.all, strict=True):
            assert torch.equal(bits(one), bits(other)), f"{backend} is not the same from run to run"
        for i in range(len(inputs)):
            (alone,) = run(op, x, operands, gy, backend, only=i).gradients
            assert torch.equal(bits(alone), bits(results[backend].gradients[i])), f"{backend}: not the same alone"
    return results


def default(name: str, x: Form, *operands: Form, dtypes: tuple[torch.dtype, ...] = (F32,), gy: str = "dense") -> Case:
    return Case(name, DEFAULT, x, operands, dtypes, gy)


def d(*shape: int) -> Form:
    return shape, "dense"


FORMS = [
    default("features", d(33, 64), d(64)),
    default("features, odd", d(7, 37), d(37)),
    default("features, one column", d(300, 1), d(1)),
    default("features, one row", d(1, 130), d(130)),
    default("one element", d(1), d(1)),
    default("no dimension", d(), d()),
    default("scalar", d(9, 70), d()),
    default("scalar of one dimension", d(9, 70), d(1)),
    default("scalar, x without dimension", d(), d(5, 7)),
    default("per row", d(33, 50), d(33, 1)),
    default("per row, long rows", d(3, 5000), d(3, 1)),
    default("channel", d(3, 5, 4, 6), d(5, 1, 1)),
    default("channel, one image", d(1, 5, 7, 7), d(5, 1, 1)),
    default("channels in a row", d(20, 40, 7, 7), d(40, 1, 1)),
    default("channels in a row, bfloat16", d(20, 40, 7, 7), d(40, 1, 1), dtypes=(BF16,)),
    default("channels beyond a program, bfloat16", d(17, 3, 19, 19), d(3, 1, 1), dtypes=(BF16,)),
    default("channels beyond a program, a short last row", d(17, 3, 19, 19), d(3, 1, 1)),
    default("channel of a volume", d(2, 3, 4, 5, 3), d(3, 1, 1, 1)),
    default("full", d(9, 70), d(9, 70)),
    default("full, folded", d(2, 8192), d(2, 8192)),
    default("full, folded and one more", d(16385), d(16385)),
    default("folded and one more, scalar", d(8193), d()),
    default("many rows, partial sums", d(3001, 8), d(8)),
    default("many rows, partial sums of bfloat16", d(2100, 72), d(72), dtypes=(BF16,)),
    default("many rows, partial sums, odd", d(2100, 37), d(37), dtypes=(F16,)),
    default("large primes", d(211, 307), d(307)),
    default("x smaller than the operand", d(7), d(5, 7)),
    default("both broadcast", d(6, 1), d(1, 40)),
    default("x per row, operand full", d(6, 1), d(6, 40)),
    default("position", d(4, 6, 10), d(6, 10)),
    default("without the middle", d(4, 6, 10), d(4, 1, 10)),
    default("middle alone", d(2, 3, 4, 5), d(1, 3, 1, 5)),
    default("alternating", d(2, 3, 4, 5), d(2, 1, 4, 1)),
    default("no rows", d(0, 8), d(8)),
    default("no columns", d(8, 0), d(0)),
    default("nothing, operand with elements", d(0, 8), d()),
]

MEMORY = [
    default("x transposed", ((20, 24), "transposed"), d(24)),
    default("x and operand transposed", ((20, 24), "transposed"), ((20, 24), "transposed")),
    default("x transposed, operand not", ((20, 24), "transposed"), d(20, 24)),
    default("operand transposed", d(20, 24), ((20, 24), "transposed")),
    default("operand transposed, bfloat16", d(70, 48), ((70, 48), "transposed"), dtypes=(BF16,)),
    default("heads, positions", ((2, 3, 20, 8), "heads"), d(1, 1, 20, 8)),
    default("heads, operand not", ((2, 3, 20, 8), "heads"), d(2, 3, 20, 8)),
    default("x sliced", ((9, 33), "sliced"), d(33)),
    default("x sliced, whole rows", ((9, 64), "sliced"), d(64), dtypes=(BF16,)),
    default("x and operand sliced", ((9, 40), "sliced"), ((9, 40), "sliced")),
    default("x sliced in the middle", ((3, 4, 16), "sliced in the middle"), d(16)),
    default("x with gaps", ((9, 32), "every second"), ((32,), "every second")),
    default("x misaligned", ((9, 64), "offset"), d(64)),
    default("operand misaligned", d(9, 64), ((64,), "offset")),
    default("x[1:] of odd size", ((4099,), "offset"), ((4099,), "offset")),
    default("x expanded", ((9, 32), "expanded"), d(32)),
    default("operand expanded", d(9, 32), ((9, 32), "expanded")),
    default("channels_last", ((2, 8, 4, 4), "channels_last"), d(8, 1, 1)),
    default("channels_last, operand not", ((2, 8, 4, 4), "channels_last"), d(1, 8, 4, 4)),
    default("gy of a sum", d(12, 40), d(40), gy="expanded"),
    default("gy transposed", d(12, 40), d(40), gy="transposed"),
    default("gy sliced", d(12, 40), d(40), gy="sliced"),
    default("gy misaligned", d(12, 40), d(40), gy="offset"),
    default("gy of a sum, channel", d(2, 3, 4, 4), d(3, 1, 1), gy="expanded"),
]

DTYPES = [
    *[
        default(f"{form}, {str(dtype).removeprefix('torch.')}", x, operand, dtypes=(dtype,))
        for dtype in (BF16, F16, F64)
        for form, x, operand in (
            ("features", d(33, 64), d(64)),
            ("features, odd", d(17, 37), d(37)),
            ("channel", d(2, 5, 4, 4), d(5, 1, 1)),
            ("full, folded", d(16385), d(16385)),
            ("per row", d(9, 72), d(9, 1)),
        )
    ],
    default("bfloat16 with float32 features", d(33, 64), d(64), dtypes=(BF16, F32)),
    default("bfloat16 with float32 features, odd", ((9, 37), "offset"), d(37), dtypes=(BF16, F32)),
    default("float32 with bfloat16 features", d(33, 64), d(64), dtypes=(F32, BF16)),
    default("float16 with bfloat16 features", d(33, 64), d(64), dtypes=(F16, BF16)),
    default("bfloat16 with a float64 scalar", d(33, 64), d(), dtypes=(BF16, F64)),
    default("float32 with a float64 scalar", d(33, 64), d(), dtypes=(F32, F64)),
    default("float32 with float64 features", d(33, 64), d(64), dtypes=(F32, F64)),
    default("float64 with bfloat16, full", d(9, 64), d(9, 64), dtypes=(F64, BF16)),
]

CHAINS = [
    Case("clamp that is reached", NARROW, d(40, 64), (d(64),)),
    Case("clamp that is reached, bfloat16", NARROW, d(40, 64), (d(64),), (BF16,)),
    Case("no operand", "sub(0.5) | hardswish", d(13, 50)),
    Case("no operand, folded", 'gelu(approximate="tanh") | tanh', d(2, 8195), (), (F16,)),
    Case("bias and scale", "add(bias) | mul(scale) | sigmoid", d(6, 8, 5, 5), (d(8, 1, 1), d(8, 1, 1))),
    Case("bias and scale, bfloat16", "add(bias) | mul(scale) | sigmoid", d(33, 72), (d(72), d(72)), (BF16,)),
    Case("a residual sum", "leaky_relu(0.2) | add(sum) | clamp(-1, 1) | gelu", d(3, 4, 6, 8), (d(4, 1, 1),)),
    Case("scaled tanh", "tanh | mul(2.0) | add(bias)", d(33, 40), (d(40),), (F32,)),
    Case("x again", "add(3) | sigmoid | mul(x) | div(6)", d(33, 40)),
    Case("x again, bfloat16", "add(3) | sigmoid | mul(x) | div(6)", d(33, 40), (), (BF16,)),
    Case("residual", "add(bias) | mish | add(x)", d(33, 40), (d(40),)),
    Case("x again and broadcast", "mul(s) | sub(x)", d(40), (d(6, 40),)),
    Case("all forms", "mul(r) | add(c) | div(s) | maximum(f) | tanh", d(12, 40), (d(12, 1), d(40), d(), d(12, 40))),
    Case("three forms, bfloat16", "mul(r) | add(c) | div(s) | tanh", d(120, 72), (d(120, 1), d(72), d()), (BF16,)),
    Case("one operand twice", "mul(s) | add(b) | softsign | mul(s)", d(12, 40), (d(40), d(40))),
    Case("ties", "minimum(a) | maximum(b)", d(12, 40), (d(40), d(12, 1))),
    Case("eight operands", " | ".join(f"add(b{i})" for i in range(8)), d(5, 24), (*[d(24)] * 4, *[d()] * 4)),
    Case("mixed operands", "mul(a) | add(b) | tanh", d(9, 40), (d(40), d(9, 1)), (BF16, F32, F16)),
]

CASES = [*FORMS, *MEMORY, *DTYPES, *CHAINS]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backends_agree(case: Case, device: torch.device) -> None:
    check_case(case, device)


def test_case_names_differ() -> None:
    """Their values come from their names."""
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_cases_reach_every_kind_of_view() -> None:
    kinds = set()
    for case in CASES:
        x, operands, _ = make(case, "cpu")
        layout = layout_of(x, operands, [True] * (1 + len(operands)))
        kinds |= {(v.kind, v.access, v.expanded) for v in layout.views}
    assert {kind for kind, _, _ in kinds} == {0, COLUMN, ROW, FULL, FULL | SHARED}
    assert {(kind & COLUMN, access) for kind, access, _ in kinds} == {
        (1, EACH),
        (1, ONE),
        (1, WIDE),
        (1, NEAR),
        (0, ONE),
    }
    assert {expanded for _, _, expanded in kinds} == {False, True}


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_special_values_among_ordinary_ones(backend: str, device: torch.device) -> None:
    """NaN and infinity stay where they are: no neighbour in a vector or a sum of another column sees them."""
    op = dualop.chain("add | relu")
    x = torch.randn(40, 64)
    x[3, 5], x[7, 9], x[11, 13] = math.nan, math.inf, -math.inf
    bias = torch.randn(64)
    gy = torch.randn(40, 64)
    gy[20, 21] = math.nan
    leaves = [t.to(device).requires_grad_() for t in (x, bias)]
    y = op(*leaves, backend=backend)
    gx, gb = torch.autograd.grad(y, leaves, gy.to(device))
    expected = torch.relu(x + bias)
    torch.testing.assert_close(y.detach().cpu(), expected, equal_nan=True)
    assert gx.isnan().sum() <= 2 and not gx.isnan()[0].any()
    columns = gb.isnan().nonzero().flatten().tolist()
    assert set(columns) <= {5, 21}


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_long_sum_is_accurate(backend: str, dtype: torch.dtype, device: torch.device) -> None:
    """The gradient of a bias sums many terms: their errors must not add up as they would in its own dtype."""
    op = dualop.chain("add | relu")
    x = torch.ones(20_000, 8, dtype=dtype, device=device)
    bias = torch.ones(8, dtype=dtype, device=device, requires_grad=True)
    gy = torch.full_like(x, 0.1)
    (got,) = torch.autograd.grad(op(x, bias, backend=backend), bias, gy)
    exact = torch.full((8,), 20_000 * gy[0, 0].double().item())
    # One after the other in float32 they would be off by 1e-4.
    torch.testing.assert_close(got.double().cpu(), exact.double(), rtol=4e-6 if dtype == F32 else 2**-8, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_tensor_twice(backend: str, device: torch.device) -> None:
    op = dualop.chain("mul(a) | add(b)")
    x = torch.randn(6, 6, device=device, requires_grad=True)
    y = op(x, x, x, backend=backend)
    torch.testing.assert_close(y, x * x + x)
    (got,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(got, 2 * x.detach() + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_transposed_view_of_x_as_the_operand(backend: str, device: torch.device) -> None:
    op = dualop.chain("sub(t) | tanh")
    x = torch.randn(6, 6, device=device, requires_grad=True)
    (got,) = torch.autograd.grad(op(x, x.t(), backend=backend).sum(), x)
    (expected,) = torch.autograd.grad(torch.tanh(x - x.t()).sum(), x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_nn_parameters_and_subclasses(backend: str, device: torch.device) -> None:
    op = dualop.chain("add | silu")
    bias = torch.nn.Parameter(torch.randn(8, device=device))
    x = torch.nn.Buffer(torch.randn(4, 8, device=device))
    y = op(x, bias, backend=backend)
    assert type(y) is Tensor
    y.sum().backward()
    assert bias.grad is not None and bias.grad.shape == (8,)
