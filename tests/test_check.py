"""The check itself: its measure, its truth, and that it finds what is planted."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import dualop
from dualop.backends.reference import Reference, evaluate
from dualop.backends.registry import BACKENDS
from dualop.language.stages import STAGES
from dualop.numerics import cases, check, ulp
from dualop.numerics.truth import ADDED_UP, truth

DTYPES = list(cases.DTYPES.values())
SPECIAL_CASE, PLAIN_CASE = cases.STAGE_CASES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spacing_is_the_distance_to_the_next_number(dtype):
    info = torch.finfo(dtype)
    values = torch.tensor([1.0, 1.5, 2.0, 1000.0, 0.1, info.tiny, info.tiny * info.eps], dtype=dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    following = (values.view(bits) + 1).view(dtype)
    torch.testing.assert_close(
        ulp.spacing(values.double(), dtype), following.double() - values.double(), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ulps_count_numbers_in_between(dtype):
    exact = torch.tensor([1.25, -3.0, 100.0], dtype=dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[exact.element_size()]
    actual = (exact.view(bits) + torch.tensor([3, 1, -2], dtype=bits)).view(dtype)
    assert ulp.ulps(actual, exact.double(), dtype).tolist() == [3.0, 1.0, 2.0]


def test_small_values_are_measured_by_the_largest_over_1024():
    exact = torch.tensor([1024.0, 1e-6], dtype=torch.float64)
    actual = torch.tensor([1024.0, 1e-6 + 2.0**-23], dtype=torch.float32)
    result = ulp.compare(actual, exact, 1.0)
    assert result.ok and result.error == pytest.approx(1.0, abs=0.01) and result.where == (1,)


@pytest.mark.parametrize(
    ("actual", "exact", "expected"),
    [
        (math.nan, math.nan, 0.0),
        (math.nan, 1.0, math.inf),
        (1.0, math.nan, math.inf),
        (math.inf, math.inf, 0.0),
        (-math.inf, math.inf, math.inf),
        (65504.0, math.inf, math.inf),
        (math.inf, 1.0, None),
        (math.inf, 1e9, 0.0),  # what overflows is infinite
        (65504.0, 1e9, math.inf),  # and not the largest number
        (math.inf, 65504.0, 1.0),  # at the limit it is a matter of rounding
        (65504.0, 65519.0, 0.46875),
        (-0.0, 0.0, 0.0),
    ],
)
def test_special_values(actual, exact, expected):
    found = ulp.ulps(torch.tensor([actual]).half(), torch.tensor([exact], dtype=torch.float64), torch.float16).item()
    assert found > 1e6 if expected is None else found == expected


def test_compare_finds_the_place():
    exact = torch.ones(3, 4, dtype=torch.float64)
    actual = exact.float()
    actual[1, 2] += 2.0**-20
    actual[2, 0] += 2.0**-21
    result = ulp.compare(actual, exact, 2.0)
    assert (result.ok, result.error, result.where) == (False, 8.0, (1, 2))
    unsettled = torch.zeros(3, 4, dtype=torch.bool)
    unsettled[1, 2] = True
    result = ulp.compare(actual, exact, 2.0, unsettled=unsettled)
    assert (result.ok, result.error, result.where) == (False, 4.0, (2, 0))
    allowed = torch.full((3, 4), 2.0)
    allowed[1, 2] = 10.0  # the larger error is allowed, so the smaller one is what is wrong
    assert ulp.compare(actual, exact, allowed).where == (2, 0)
    assert ulp.compare(actual, exact, 8.0).ok
    assert ulp.compare(actual[:0], exact[:0], 0.0) == ulp.Comparison(True, 0.0)
    with pytest.raises(ValueError, match="shapes differ"):
        ulp.compare(actual[0], exact, 1.0)


def test_poisoned_memory_is_nan_and_ends():
    with check.poisoned():
        fresh = torch.empty(5), torch.empty_like(torch.ones(3).bfloat16()), torch.empty_strided((2, 3), (1, 2))
    assert all(t.isnan().all() for t in fresh)
    assert not torch.are_deterministic_algorithms_enabled()


def test_truth_of_a_sum_has_the_terms_errors():
    op = dualop.chain("add")
    sample = cases.sample(op, cases.Case("sum", (400, 5)), "float32", "cpu", 0)
    exact = truth(op, sample)
    torch.testing.assert_close(exact["grad_add"].value, sample.gy.double().sum(0), rtol=1e-14, atol=1e-14)
    one = exact["grad_x"].tolerance("cuda", torch.float32)
    many = exact["grad_add"].tolerance("cuda", torch.float32)
    assert (many > ADDED_UP).all() and (many < 2 * one.min()).all()  # in units of half an epsilon
    # But a row left out is far beyond it.
    missing = sample.gy[1:].sum(0)
    units = exact["grad_add"].units(torch.float32)
    assert not ulp.compare(missing, exact["grad_add"].value, many, units).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sum_is_measured_against_its_terms(dtype):
    """Of 1000 and -1000 a 1 is left: an error of 3 u * 2001 counts as 3, however many ulps of 1 it is."""
    op = dualop.chain("add")
    gy = torch.tensor([[1000.0], [1.0], [-1000.0]], dtype=dtype)
    x, operand = torch.zeros(3, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
    exact = truth(op, cases.Sample(x, (operand,), gy, "", ""))
    right, u = exact["grad_add"], torch.finfo(dtype).eps / 2
    assert right.summed and right.unit == "u Σ|terms|" and not exact["grad_x"].summed
    assert right.units(dtype).item() == u * 2001
    off = torch.tensor([1 + 3 * u * 2001], dtype=torch.float64)
    assert ulp.errors(off, right.value, dtype, right.units(dtype)).item() == pytest.approx(3)
    assert ulp.ulps(off, right.value, dtype, 1.0).item() > 1000
    assert exact["grad_x"].units(dtype).tolist() == ulp.spacing(gy.double().abs(), dtype).tolist()


def test_many_terms_may_be_off_by_two_roundings_of_theirs():
    """However large the terms' errors and S are: at 10^6 rows, the tolerance of a sum is below 2."""
    op = dualop.chain(cases.DEFAULT_CHAIN)
    for dtype in ("float32", "bfloat16", "float16"):
        sample = cases.sample(op, cases.Case("a million rows", (1_000_000, 1)), dtype, "cpu", 0)
        allowed = truth(op, sample)["grad_add"].tolerance("cuda", cases.DTYPES[dtype])
        assert 1.0 <= allowed.max() <= 2.0


def test_what_the_rounding_of_x_plus_bias_accounts_for_stands_apart():
    """float32 gradients that are right at the rounded x + bias are off by many ulps at the exact one."""
    op = dualop.chain(cases.DEFAULT_CHAIN)
    sample = cases.sample(op, cases.Case("", (2000, 64)), "float32", "cpu", 0)
    bias, right = sample.operands[0], truth(op, sample)
    z = (sample.x + bias).double().requires_grad_()
    (slope,) = torch.autograd.grad(dualop.chain(op.text.partition(" | ")[2])(z), z, sample.gy.double())
    found = slope.float()
    assert right["grad_x"].judge(found, "cuda").error > 20 and right["grad_x"].beyond_rounding(found) <= 0.5
    found[7, 5] += 9 * right["grad_x"].units(torch.float32)[7, 5].item()
    assert right["grad_x"].beyond_rounding(found) == pytest.approx(9, abs=1)
    # Of sums, of 16 bits and of chains whose first stage takes no operand it says nothing.
    assert right["grad_add"].beyond_rounding(torch.zeros(64)) is None
    for text, dtype in (("add | gelu", "bfloat16"), ("add | gelu", "float64"), ("gelu | add", "float32")):
        other = dualop.chain(text)
        exact = truth(other, cases.sample(other, PLAIN_CASE, dtype, "cpu", 0))
        assert all(quantity.first_rounded is None for quantity in exact.values())


@pytest.mark.parametrize("case", [case for case in cases.CASES if not case.gpu], ids=lambda case: case.name)
def test_samples_are_reproducible_and_arranged(case):
    op = dualop.chain("add | mul")
    first, again, other = (cases.sample(op, case, "float16", "cpu", seed) for seed in (1, 1, 2))
    for a, b, c in zip((first.x, first.gy), (again.x, again.gy), (other.x, other.gy), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert a.stride() == b.stride()
        assert a.numel() == 0 or not torch.equal(a.nan_to_num(), c.nan_to_num())
    expected = sum(first.operands, first.x)
    assert first.gy.shape == expected.shape and first.gy.dtype == expected.dtype
    dense = {"dense", "channels_last", "transposed", "offset"}
    assert first.x.numel() < 2 or (case.arrange == "dense") == (
        first.x.is_contiguous() and first.x.data_ptr() % 16 == 0
    )
    assert case.arrange in dense or not first.x.is_contiguous()


def test_special_inputs_hold_every_special_value():
    x = cases.sample(dualop.chain("relu"), SPECIAL_CASE, "bfloat16", "cpu", 0).x.double()
    for value in cases.SPECIAL:
        found = x.isnan() if math.isnan(value) else (x == value) & (x.signbit() == (math.copysign(1, value) < 0))
        assert found.any(), value


# What may be wrong with a backend, and the quantity in which it shows.


class Planted(Reference):
    """The reference with something wrong: `spoil(quantity, tensor)` returns the spoilt tensor."""

    name = "planted"

    def __init__(self, spoil):
        self.spoil = spoil

    def forward(self, chain, x, operands):
        return self.spoil("y", super().forward(chain, x, operands))

    def backward(self, chain, gy, x, operands, needs):
        found = super().backward(chain, gy, x, operands, needs)
        names = [n for n, need in zip(("x", *chain.operands), needs, strict=True) if need]
        return [self.spoil(f"grad_{n}", g) for n, g in zip(names, found, strict=True)]


def off_by(ulps):
    def spoil(quantity, tensor):
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        spoilt = tensor.clone()
        index = spoilt.abs().nan_to_num(0, 0, 0).flatten().argmax()
        flat = spoilt.view(-1)
        flat[index] = (flat[index].view(bits) + ulps).view(tensor.dtype)
        return spoilt

    return spoil


def leaves_unwritten(quantity, tensor):
    spoilt = torch.empty_like(tensor)
    spoilt.view(-1)[:-1] = tensor.reshape(-1)[:-1]
    return spoilt


def drops_nan(quantity, tensor):
    return tensor.nan_to_num(0.0, math.inf, -math.inf)


def wrong_dtype(quantity, tensor):
    return tensor.double()


WRONG = {
    "3 ulp": (off_by(3), "float16", PLAIN_CASE, {"y", "grad_x", "grad_add"}),
    "60 ulp": (off_by(60), "bfloat16", PLAIN_CASE, {"y", "grad_x", "grad_add"}),
    "unwritten": (leaves_unwritten, "float32", PLAIN_CASE, {"y", "grad_x", "grad_add"}),
    "NaN lost": (drops_nan, "float32", SPECIAL_CASE, {"y"}),
}


def plant(monkeypatch, backend):
    monkeypatch.setitem(BACKENDS, "planted", backend)


def planted(monkeypatch, spoil):
    plant(monkeypatch, Planted(spoil))


def rows_of(text, case, dtype, backends):
    op = dualop.chain(text)
    return check.cross_check(op, cases.sample(op, case, dtype, "cpu", 7), backends)


@pytest.mark.parametrize("wrong", WRONG)
def test_planted_errors_are_found(monkeypatch, wrong):
    spoil, dtype, case, quantities = WRONG[wrong]
    planted(monkeypatch, spoil)
    rows = rows_of("add | tanh", case, dtype, ["planted", "reference"])
    bad = {(row.against, row.quantity) for row in rows if not row.ok}
    assert {q for against, q in bad if against == "float64"} == quantities
    assert {"y"} <= {q for against, q in bad if against == "reference"} <= quantities
    assert all(row.ok for row in rows if row.backend == "reference")


def test_swapped_gradients_are_found(monkeypatch):
    class Swapped(Reference):
        name = "planted"

        def backward(self, *call):
            x, a, b = super().backward(*call)
            return [x, b, a]

    plant(monkeypatch, Swapped())
    rows = rows_of("add(a) | mul(b)", PLAIN_CASE, "float32", ["planted"])
    assert {row.quantity for row in rows if not row.ok} == {"grad_a", "grad_b"}


def test_a_missing_row_of_many_is_found(monkeypatch):
    class Short(Reference):
        name = "planted"

        def backward(self, chain, gy, x, operands, needs):
            g, _ = super().backward(chain, gy, x, operands, needs)
            return [g, g[1:].sum(0)]

    plant(monkeypatch, Short())
    many = next(case for case in cases.CASES if case.name == "many rows")
    for dtype in ("float32", "float16"):
        rows = rows_of("add | swish", many, dtype, ["planted"])
        assert {row.quantity for row in rows if not row.ok} == {"grad_add"}


@pytest.mark.parametrize(
    ("spoil", "note"), [(wrong_dtype, "float64"), (lambda quantity, tensor: 1 / 0, "ZeroDivisionError")]
)
def test_errors_become_rows(monkeypatch, spoil, note):
    planted(monkeypatch, spoil)
    rows = rows_of("add | tanh", PLAIN_CASE, "float32", ["planted", "reference"])
    assert [row.ok for row in rows if row.backend == "planted"] == [False] and note in rows[0].note
    assert rows[0].error is None
    assert sum(row.ok for row in rows) == 3  # the reference against float64


def test_a_written_input_is_found(monkeypatch):
    class Writing(Reference):
        name = "planted"

        def forward(self, chain, x, operands):
            x.data.view(-1)[0] = 5.0
            return super().forward(chain, x, operands)

    plant(monkeypatch, Writing())
    assert "x was written" in rows_of("relu", SPECIAL_CASE, "float32", ["planted"])[0].note


def test_rows_name_every_pair_once(monkeypatch):
    plant(monkeypatch, Planted(lambda quantity, tensor: tensor))
    rows = rows_of("add(b) | relu", SPECIAL_CASE, "float32", ["planted", "reference"])
    assert [(r.backend, r.against) for r in rows if r.quantity == "grad_b"] == [
        ("planted", "float64"),
        ("planted", "reference"),
        ("reference", "float64"),
    ]
    assert {r.quantity for r in rows} == {"y", "grad_x", "grad_b"}
    assert all(r.ok and r.error <= r.allowed and r.shape == [13, 37] for r in rows)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("text", [*(stage.example for stage in STAGES.values()), *cases.FORMS])
def test_the_reference_passes(text, dtype):
    for case in cases.STAGE_CASES:
        bad = [row for row in rows_of(text, case, dtype, ["reference"]) if not row.ok]
        assert not bad, bad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_kernels_pass_on_the_default_chain(backend, dtype, device):
    op = dualop.chain(cases.DEFAULT_CHAIN)
    if reasons := BACKENDS[backend].reasons(op, device):
        pytest.skip("; ".join(reasons))
    for case in cases.STAGE_CASES:
        sample = cases.sample(op, replace(case, operands=("last",)), dtype, device, 3)
        bad = [row for row in check.cross_check(op, sample, [backend, "reference"]) if not row.ok]
        assert not bad, bad


MILLION = cases.Case("a million rows", (1_000_000, 2))
ONE_SIGN = replace(MILLION, gradient="one sign")


@pytest.mark.parametrize(
    ("backend", "text", "case"),
    [
        ("reference", cases.DEFAULT_CHAIN, MILLION),
        ("cuda", cases.DEFAULT_CHAIN, MILLION),
        ("cuda", cases.DEFAULT_CHAIN, ONE_SIGN),
        ("cuda", "add | mul(scale) | gelu", MILLION),
        # Interpreted, a hundredth of a second a tile. NumPy adds up the rows of a tile one after the other, which terms
        # of one sign would show.
        pytest.param("triton", "add", MILLION, marks=pytest.mark.slow),
    ],
)
def test_a_sum_of_a_million_rows_is_off_by_two_roundings_of_its_terms_at_most(backend, text, case, device):
    op = dualop.chain(text)
    if reasons := BACKENDS[backend].reasons(op, device):
        pytest.skip("; ".join(reasons))
    sample = cases.sample(op, case, "float32", device, 3)
    needs = (False, *[True] * len(op.operands))
    found = BACKENDS[backend].backward(op, sample.gy, sample.x, sample.operands, needs)
    for name, value in zip(op.operands, found, strict=True):
        right = truth(op, sample)[f"grad_{name}"]
        judged = right.judge(value, backend)
        assert right.unit == "u Σ|terms|" and judged.ok and judged.error <= 2, judged


def test_adding_up_one_by_one_is_found():
    """Of terms of one sign: what is lost grows with the square root of their number."""
    op = dualop.chain(cases.DEFAULT_CHAIN)
    sample = cases.sample(op, ONE_SIGN, "float32", "cpu", 3)
    x = sample.x.clone().requires_grad_()
    (terms,) = torch.autograd.grad(evaluate(op, x, sample.operands), x, sample.gy)
    one_by_one = torch.from_numpy(np.cumsum(terms.numpy(), axis=0, dtype=np.float32)[-1].copy())
    right = truth(op, sample)["grad_add"]
    assert right.judge(terms.sum(0), "cuda").ok
    found = right.judge(one_by_one, "cuda")
    assert not found.ok and found.error > 4


@pytest.mark.gpu
@pytest.mark.parametrize("case", [MILLION, ONE_SIGN], ids=["both signs", "one sign"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("text", ["add", "add | mul(scale) | gelu", cases.DEFAULT_CHAIN])
def test_sums_of_a_million_rows_on_the_gpu(text, dtype, case, device):
    op = dualop.chain(text)
    for cols in (8, 24):
        sample = cases.sample(op, replace(case, shape=(1_000_000, cols)), dtype, device, 3)
        rows = check.cross_check(op, sample, ["cuda", "triton"])
        sums = [row for row in rows if row.unit == "u Σ|terms|"]
        assert len(sums) == 3 * len(op.operands) and all(row.ok and row.error <= 2 for row in sums), sums
