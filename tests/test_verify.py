"""`dualop verify`: it goes over every number, counts ulps as it says, and finds what is wrong anywhere."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from test_cli import run

import dualop
from dualop.backends.reference import Reference
from dualop.backends.registry import BACKENDS
from dualop.errors import DtypeError, OperandError
from dualop.numerics import verify as verification
from dualop.numerics.cases import DEFAULT_CHAIN, DTYPES, SAMPLED_STRIDE, Sweep
from dualop.numerics.truth import exact
from dualop.numerics.ulp import bits_text
from dualop.numerics.verify import EXCUSES, Excuse, Row, verify

CPU = torch.device("cpu")


class Right(Reference):
    """The exact value, rounded once; `spoil(x, y)` and `spoil_gradient(x, g)` change what comes out."""

    name = "right"
    torch_formulas = False

    def __init__(self, spoil=lambda x, y: y, spoil_gradient=lambda x, g: g):
        self.spoil, self.spoil_gradient = spoil, spoil_gradient

    def forward(self, chain, x, operands):
        return self.spoil(x, self.exact(chain, x, operands)[0]).to(x.dtype)

    def backward(self, chain, gy, x, operands, needs):
        assert (gy == 1).all() and needs[0] and not any(needs[1:])
        return [self.spoil_gradient(x, self.exact(chain, x, operands)[1]).to(x.dtype)]

    def exact(self, chain, x, operands):
        return exact(chain, x.double(), [t.double() for t in operands])


@pytest.fixture
def found(monkeypatch):
    """Rows of a Right backend that is spoilt, forward and gradient."""

    def rows(text, dtype, device=CPU, **spoilt):
        monkeypatch.setitem(BACKENDS, "right", Right(**spoilt))
        return verify(dualop.chain(text), [dtype], ["right"], device, SAMPLED_STRIDE)

    return rows


def at(dtype, bits):
    integer = torch.int32 if dtype == "float32" else torch.int16
    return torch.tensor(bits, dtype=torch.int64).to(integer).view(DTYPES[dtype])


# ---- the inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [2**13, 2**26])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_number_of_16_bits_once(dtype, at_once):
    sweep = Sweep(CPU, 8, 1)
    sweep.at_once = at_once
    pieces = list(sweep.inputs(dtype))
    assert len(pieces) == sweep.pieces(dtype) and {x.dtype for x in pieces} == {DTYPES[dtype]}
    bits = torch.cat([x.view(torch.int16).flatten() for x in pieces])
    assert bits.numel() == sweep.count(dtype) == 2**16 and bits.unique().numel() == 2**16


def test_every_number_of_float32_is_in_turn():
    sweep = Sweep(CPU, 1, 1)
    sweep.at_once = 2**13
    first = next(sweep.inputs("float32")).view(torch.int32)
    assert sweep.pieces("float32") * sweep.at_once == sweep.count("float32") == 2**32
    assert first.flatten().tolist() == list(range(-(2**31), -(2**31) + 2**13))


def test_a_stride_takes_different_lower_bits():
    sweep = Sweep(CPU, SAMPLED_STRIDE, 1)
    bits = torch.cat([x.view(torch.int32).flatten() for x in sweep.inputs("float32")]).long()
    assert bits.numel() == sweep.count("float32") == 2**18
    assert (bits // SAMPLED_STRIDE).unique().numel() == 2**18  # one in each interval
    assert (bits % SAMPLED_STRIDE).unique().numel() == SAMPLED_STRIDE


def test_bits():
    assert bits_text(torch.tensor(1.0)) == "0x3f800000" and bits_text(torch.tensor(-0.0)) == "0x80000000"
    assert bits_text(torch.tensor(1.0, dtype=torch.bfloat16)) == "0x3f80"


# ---- the judgement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("text", [DEFAULT_CHAIN, "exp", "square", "abs | sqrt", "mul(scale) | gelu | div"])
def test_what_is_rounded_once_passes(found, text, dtype, device):
    rows = found(text, dtype, device)
    assert [row.quantity for row in rows] == ["forward", "gradient"]
    for row in rows:
        assert row.ok and not row.problem and row.beyond == 0
        assert row.ordinary_ulp <= row.max_ulp <= 0.5001  # torch rounds float64 to 16 bits by way of float32
        assert row.inputs == (2**18 if dtype == "float32" else 2**16) and row.sampled == (dtype == "float32")
    # The slope of a root at zero is 0 * infinity in torch: not judged, but counted.
    assert rows[1].unjudged == (2 if "sqrt" in text else 0)


def test_one_wrong_number_of_65536_is_found(found):
    place = at("bfloat16", 0x3FA5)
    (row, gradient) = found("tanh", "bfloat16", spoil=lambda x, y: torch.where(x == place, y + 0.01, y))
    assert gradient.ok and not row.ok and row.beyond == 1 and row.problem == "1 beyond 1 ulp"
    assert row.bits == "0x3fa5" and row.worst == place.item()
    assert row.exact == pytest.approx(math.tanh(place.item())) and abs(row.actual - row.exact - 0.01) < 2**-9
    assert row.max_ulp == pytest.approx(abs(row.actual - row.exact) * 2**8)  # the spacing just below 1
    (forward, row) = found("tanh", "bfloat16", spoil_gradient=lambda x, g: torch.where(x == place, -g, g))
    assert forward.ok and not row.ok and row.beyond == 1 and row.bits == "0x3fa5" and row.actual < 0 < row.exact


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_no_finite_input_gives_nan_or_infinity(found, wrong):
    largest = torch.finfo(torch.float16).max
    (row, _) = found("neg", "float16", spoil=lambda x, y: torch.where(x == largest, wrong, y))
    assert not row.ok and row.beyond == 1 and row.max_ulp == (math.inf if math.isnan(wrong) else row.max_ulp) > 1


def test_nan_stays_nan_and_infinity_counts_forward(found):
    (row, gradient) = found("relu", "bfloat16", spoil=lambda x, y: y.nan_to_num(0.0, math.inf, -math.inf))
    assert gradient.ok and not row.ok and row.beyond == 2 * 127 and math.isnan(row.worst)
    (row, _) = found("relu", "bfloat16", spoil=lambda x, y: torch.where(x == math.inf, 3e38, y))
    assert not row.ok and row.beyond == 1 and row.worst == math.inf
    beyond = lambda x, g: torch.where(x.isfinite(), g, 7.0)
    assert all(row.ok for row in found("relu", "bfloat16", spoil_gradient=beyond))


def test_overflow_may_be_infinite(found):
    (row, _) = found("square", "float16", spoil=lambda x, y: torch.where(y > 65520, math.inf, y))
    assert row.ok and row.max_ulp <= 0.5
    (row, _) = found("square", "float16", spoil=lambda x, y: torch.where(y > 65520, 65504.0, y))
    assert not row.ok and row.beyond > 1000


def test_a_small_value_counts_by_the_largest_one(found):
    """Below S / 1024 an absolute error: one ulp of S / 1024 is allowed, more is not."""
    unit = 2.0**-10 * 2.0**-7  # S is 1
    small = lambda x: (x.abs() < 2.0**-12) & (x != 0)
    (row, _) = found("tanh", "bfloat16", spoil=lambda x, y: torch.where(small(x), y + 0.75 * unit, y))
    assert row.beyond == 0 and row.max_ulp == pytest.approx(0.75, abs=0.15)
    (row, _) = found("tanh", "bfloat16", spoil=lambda x, y: torch.where(small(x), y + 4 * unit, y))
    assert row.beyond > 1000


def test_worse_than_eager_is_not_ok(found):
    """Within an ulp, but eager's relu is exact; where eager is worse, the same error passes."""
    off = lambda x, y: torch.where(x.float() == 5.0, y + 0.75 * 2.0**-5, y)
    (row, _) = found("relu", "bfloat16", spoil=off)
    assert row.beyond == 0 and row.problem == "worse than eager" and not row.ok and row.eager_ulp == 0.0
    (row, _) = found("mish | add(x)", "bfloat16", spoil=off)
    assert row.ok and row.eager_ulp > 0.7


def test_eager_beyond_100_does_not_hide_an_error_below(found):
    """float16 eager's mul | mul(0.001) overflows in between, from 500 on."""
    off = lambda x, y: torch.where(x.float() == 5.0, y + 0.9 * 2.0**-8, y)
    (row, _) = found("mul(128) | mul(0.0078125)", "float16", spoil=off)
    assert row.eager_ulp > 100 and row.eager_ordinary_ulp == 0.0
    assert row.beyond == 0 and row.problem == "worse than eager"


def test_scale_is_the_largest_over_ordinary_inputs(found):
    y, gradient = found(DEFAULT_CHAIN, "bfloat16")
    x = torch.linspace(-100, 100, 1_000_001, dtype=torch.float64)
    for row, values in zip((y, gradient), exact(dualop.chain(DEFAULT_CHAIN), x, (x.new_zeros(()),))):
        assert row.scale == pytest.approx(values.abs().max().item(), rel=1e-3)
    assert found("square", "bfloat16")[0].scale == pytest.approx(1e4, rel=5e-3)


def test_the_reference_is_shown_and_not_judged():
    rows = verify(dualop.chain("tanh"), ["float32"], ["reference"], CPU, SAMPLED_STRIDE)
    assert rows[1].problem and rows[1].ok and "not judged" in rows[1].verdict


def test_an_excuse_has_a_bound(found, monkeypatch):
    off = lambda x, y: torch.where(x.float() == 5.0, y + 2.0**-4, y)  # two ulps
    monkeypatch.setitem(EXCUSES, "relu", {("bfloat16", "forward"): Excuse(2.5, "a reason")})
    (row, _) = found("relu", "bfloat16", spoil=off)
    assert row.problem and row.ok and "a reason" in row.verdict
    monkeypatch.setitem(EXCUSES, "relu", {("bfloat16", "forward"): Excuse(1.5, "a reason")})
    assert not found("relu", "bfloat16", spoil=off)[0].ok


# ---- jumps -----------------------------------------------------------------------------------------------------------


def judged(text, x, actual):
    """A row to which the results `actual` at float32 x were added."""
    op = dualop.chain(text)
    row = Row(text, "float32", "right", "forward", limit=4.0, scale=1.0, inputs=0, sampled=False, interpreted=False)
    truth = lambda x: exact(op, x, ())
    right = truth(x.double())[0]
    row.add(x, actual, right, torch.ones_like(x, dtype=torch.bool), truth)
    return row


def test_either_side_of_a_jump_is_right_only_very_close_to_it():
    text, place = "tanh | hardshrink(0.3)", torch.tensor(math.atanh(0.3))
    near = place * (1 + torch.arange(-3, 4) * 2.0**-23)
    assert exact(dualop.chain(text), near.double(), ())[0].unique().numel() > 1  # the jump lies among them
    both = judged(text, torch.cat([near, near]), torch.cat([torch.zeros(7), torch.tanh(near)]))
    assert both.beyond == 0 and both.at_jumps == 7 and both.max_ulp < 1
    beside = judged(text, near, torch.full((7,), 0.31))  # no value of either side
    assert beside.beyond == 7 and beside.at_jumps == 0
    far = place * (1 + torch.tensor([-64, 64]) * 2.0**-23)
    assert judged(text, far, torch.tensor([0.3, 0.0])).beyond == 2


def test_a_steep_slope_is_no_jump():
    x = torch.tensor([80.0])
    off = exact(dualop.chain("exp"), x.double() * (1 + 2.0**-22), ())[0].float()
    row = Row("exp", "float32", "right", "forward", limit=4.0, scale=1.0, inputs=0, sampled=False, interpreted=False)
    truth = lambda x: exact(dualop.chain("exp"), x, ())
    row.add(x, off, truth(x.double())[0], torch.ones(1, dtype=torch.bool), truth)
    assert row.beyond == 1 and row.max_ulp > 100


# ---- operands --------------------------------------------------------------------------------------------------------


def test_operands_are_numbers(monkeypatch):
    seen = {}

    def spoil(self, chain, x, operands):
        seen.update({name: t.unique().tolist() for name, t in zip(chain.operands, operands)})
        return Right.exact(self, chain, x, operands)

    monkeypatch.setitem(BACKENDS, "right", type("Seen", (Right,), {"exact": spoil})())
    op = dualop.chain("add(bias) | mul(scale) | div(d) | maximum(m)")
    assert all(row.ok for row in verify(op, ["bfloat16"], ["right"], CPU, SAMPLED_STRIDE))
    assert seen == {"bias": [0.0], "scale": [1.25], "d": [3.0], "m": [0.5]}
    rows = verify(op, ["bfloat16"], ["right"], CPU, SAMPLED_STRIDE, {"scale": 0.1})
    assert seen["scale"] == [torch.tensor(0.1).bfloat16().item()] and all(row.ok for row in rows)
    with pytest.raises(OperandError, match="scales"):
        verify(op, ["bfloat16"], ["right"], CPU, SAMPLED_STRIDE, {"scales": 0.1})
    with pytest.raises(DtypeError, match="float64"):
        verify(op, ["float64"], ["right"], CPU)


def test_progress_comes_to_its_end():
    steps = []
    verify(dualop.chain("neg"), ["bfloat16"], ["reference"], CPU, SAMPLED_STRIDE, progress=lambda *a: steps.append(a))
    assert steps == [(1, 2), (2, 2)]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_only_a_backend_that_says_so_may_lose_subnormals(monkeypatch):
    assert BACKENDS["triton"].flushed == ({torch.bfloat16} if BACKENDS["triton"].interpreted else set())
    assert not BACKENDS["cuda"].flushed and not BACKENDS["reference"].flushed
    tiny = torch.finfo(torch.bfloat16).tiny
    for name, flushed, count in (
        ("triton", {torch.bfloat16}, 254), ("triton", set(), 0), ("right", {torch.float16}, 0), ("right", set(), 0)
    ):  # fmt: skip
        backend = Right(
            lambda x, y: torch.where(x.abs() < tiny, 0.0, y), lambda x, g: torch.where(x.abs() < tiny, 0.0, g)
        )
        backend.name, backend.interpreted, backend.flushed = name, True, frozenset(flushed)
        monkeypatch.setitem(BACKENDS, name, backend)
        rows = verify(dualop.chain("neg"), ["bfloat16"], [name], CPU, SAMPLED_STRIDE)
        assert [row.unjudged for row in rows] == [count, count]
        assert rows[1].beyond == (2 if count else 256)  # the zeros themselves


def test_kernels_on_all_16_bits(device, tmp_path, monkeypatch):
    file, page = tmp_path / "v.json", tmp_path / "V.md"
    arguments = [
        "hardtanh",
        "--backend",
        "cuda,triton",
        "--dtype",
        "float16",
        "--json",
        str(file),
        "--markdown",
        str(page),
    ]
    monkeypatch.setattr(sys, "argv", ["dualop", "verify", *arguments])
    result = run("verify", *arguments, *(["--stride", "4096"] if device.type == "cuda" else []))
    assert result.exit_code == 0, result.output
    found = json.loads(file.read_text())
    assert found["ok"] and found["device"]["type"] == device.type
    assert [(r["backend"], r["quantity"], r["inputs"], r["sampled"]) for r in found["rows"]] == [
        (backend, quantity, 65536, False) for backend in ("cuda", "triton") for quantity in ("forward", "gradient")
    ]
    assert all(r["interpreted"] == (device.type == "cpu") and r["max_ulp"] == 0 for r in found["rows"])
    text = page.read_text()
    assert f"dualop verify hardtanh --backend cuda,triton --dtype float16 --json {file}" in text
    assert text.count("| `hardtanh` | float16 |") == 4 and "all 65,536 numbers" in text and torch.__version__ in text
    assert "all ok" in result.output


@pytest.mark.gpu
def test_the_default_chain_on_the_gpu():
    """16 bits within their limits and eager's error; all of float32 in seconds, without NaN and infinities."""
    gpu = torch.device("cuda")
    rows = verify(dualop.chain(DEFAULT_CHAIN), ["bfloat16", "float16", "float32"], ["cuda", "triton"], gpu)
    assert len(rows) == 12 and not any(row.sampled or row.interpreted for row in rows)
    assert [row.inputs for row in rows] == [2**16] * 8 + [2**32] * 4
    assert all(row.ok for row in rows[:8]), [(row, row.problem) for row in rows[:8] if not row.ok]
    assert all(row.max_ulp < 100 and row.unjudged == 0 for row in rows[8:]), rows[8:]


def test_the_command_says_that_float32_is_sampled(monkeypatch):
    monkeypatch.setitem(BACKENDS, "right", Right())
    result = run("verify", "tanh", "--backend", "right", "--dtype", "float32", "--stride", "65536")
    assert result.exit_code == 0 and "float32 is sampled, every 65,536th number" in result.output
    assert "65,536 numbers, sampled" in result.output


def test_the_command_exits_1_and_shows_the_worst_input(monkeypatch, tmp_path):
    place = at("bfloat16", 0x3FA5)
    monkeypatch.setitem(BACKENDS, "right", Right(lambda x, y: torch.where(x == place, math.nan, y)))
    file, page = tmp_path / "v.json", tmp_path / "V.md"
    arguments = ["verify", "tanh", "neg", "--backend", "right", "--dtype", "bf16", "--stride", "65536"]
    result = run(*arguments, "--json", str(file), "--markdown", str(page))
    assert result.exit_code == 1 and "0x3fa5" in result.output and "1 beyond 1 ulp" in result.output
    found = json.loads(file.read_text())
    bad = [row for row in found["rows"] if not row["ok"]]
    assert not found["ok"] and {row["chain"] for row in bad} == {"tanh", "neg"}
    assert all(row["max_ulp"] == "inf" and row["actual"] == "nan" for row in bad)
    assert "2 not ok" in page.read_text() and "0x3fa5" in page.read_text()


def test_all_stages_are_all(monkeypatch):
    asked = []
    monkeypatch.setattr(verification, "verify", lambda op, *rest: asked.append(str(op)) or rows)
    rows = verify(dualop.chain("neg"), ["bfloat16"], ["reference"], CPU, 2**16)
    assert run("verify", "--all-stages", "--backend", "reference").exit_code == 0
    expected = {stage.example for stage in dualop.stages.STAGES.values()}
    assert expected | {str(dualop.chain(DEFAULT_CHAIN))} <= set(asked) and len(asked) == len(set(asked))
    asked.clear()
    assert run("verify", "--backend", "reference").exit_code == 0 and asked == [str(dualop.chain(DEFAULT_CHAIN))]


@pytest.mark.parametrize(
    "arguments",
    [
        ["tanh", "--operand", "add=1"],
        ["add", "--operand", "add"],
        ["tanh", "--stride", "3"],
        ["tanh", "--dtype", "float64"],
    ],
)
def test_mistakes_exit_2(arguments):
    assert run("verify", *arguments, "--backend", "reference").exit_code == 2
