"""A chain in a matrix product's epilogue: its values, when it is taken, and that it compiles for sm_90."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_nn import gradients
from torch import Tensor, nn

import dualop
from dualop import linear as gemm
from dualop.backends.reference import evaluate
from dualop.bench import linear95
from dualop.errors import BackendUnavailable, ShapeError
from dualop.nn import LinearChain

CHAIN = "add | swish | tanh | gelu | hardtanh(-1, 1)"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of several tiles, and in parts as the large one.
SMALL = gemm.Tile(rows=32, columns=32, depth_bytes=32, group=2)


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> list[tuple[Any, ...]]:
    """Takes the kernel wherever it can run; gives what was launched: (chain, x, weight, operands)."""
    monkeypatch.setattr(gemm, "mode", "on")
    if device.type == "cpu":
        monkeypatch.setattr(gemm, "TILE", SMALL)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    launches: list[tuple[Any, ...]] = []
    launch = gemm.launch
    monkeypatch.setattr(gemm, "launch", lambda *a, **k: launches.append((*a, *k.values())) or launch(*a, **k))
    yield launches
    torch.set_float32_matmul_precision(precision)


def inferred(layer: LinearChain, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def assert_right(ours: LinearChain, x: Tensor) -> None:
    """The result: not much further from that of float64 than that of product and chain apart."""
    exact = inferred(copy.deepcopy(ours).double(), x.double())
    found, again = inferred(ours, x), inferred(ours, x)
    gemm.mode = "off"
    apart = inferred(ours, x)
    gemm.mode = "on"
    roundings = 2.0**-9 if x.dtype == torch.float32 and x.is_cuda else torch.finfo(x.dtype).eps  # TF32 has 10 bits
    assert (found.dtype, found.shape, found.stride()) == (x.dtype, apart.shape, apart.stride())
    assert torch.equal(found, again), "it differs from run to run"
    off, off_apart = ((y.double() - exact).abs().max() for y in (found, apart))
    assert off <= 1.5 * off_apart + 4 * roundings * exact.abs().max()


def assert_trains(ours: LinearChain, x: Tensor, columns: int) -> None:
    """Values and gradients, with the kernel switched on, are those of product and chain apart, bit for bit."""
    gy = torch.randn(*x.shape[:-1], columns, dtype=x.dtype, device=x.device)
    found = gradients(ours, x, gy)
    gemm.mode = "off"
    apart = gradients(ours, x, gy)
    gemm.mode = "on"
    for name, value in apart.items():
        assert torch.equal(found[name], value), name
    exact = gradients(copy.deepcopy(ours).double(), x.double(), gy.double())
    roundings = 2.0**-9 if x.dtype == torch.float32 and x.is_cuda else torch.finfo(x.dtype).eps
    for name, value in found.items():
        assert (value.double() - exact[name]).abs().max() <= 32 * roundings * exact[name].abs().max(), name


# ---- values --------------------------------------------------------------------------------------------

SHAPES = {
    "whole tiles": ((64,), 32, 64),
    "tails": ((70,), 40, 48),
    "rows that start anywhere": ((33,), 37, 41),
    "batches": ((2, 3, 7), 24, 40),
    "one row": ((1,), 16, 24),
    "a vector": ((), 16, 24),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: str, dtype: str, taken, device: torch.device) -> None:
    lead, ins, outs = SHAPES[shape]
    ours = LinearChain(ins, outs, CHAIN, backend="triton", device=device, dtype=DTYPES[dtype])
    x = torch.randn(*lead, ins, device=device, dtype=DTYPES[dtype])
    assert_right(ours, x)
    assert len(taken) == 2  # none when it is off
    assert_trains(ours, x, outs)
    assert len(taken) == 2
    with torch.no_grad():
        torch.testing.assert_close(ours(x), ours.requires_grad_(False)(x))
    assert len(taken) == 4 and len(taken[2][3]) == 2  # bias and add are two vectors then


OPERANDS = {
    "of a row": ("mul(scale) | gelu", {"scale": (35, 1)}),
    "a number": ("mul(scale) | gelu", {"scale": ()}),
    "full": ("gelu | add(skip)", {"skip": (35, 48)}),
    "of a batch": ("gelu | add(skip)", {"skip": (5, 1, 1)}),
    "two": ("mul(scale) | gelu | add(shift)", {"scale": (48,), "shift": (1, 48)}),
    "its own input": ("sigmoid | mul(x)", {}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", OPERANDS)
def test_operands(form: str, bias: bool, taken, device: torch.device) -> None:
    chain, shapes = OPERANDS[form]
    lead = (5, 7) if form == "of a batch" else (35,)
    ours = LinearChain(24, 48, chain, bias=bias, backend="triton", device=device, dtype=torch.bfloat16, **shapes)
    x = torch.randn(*lead, 24, device=device, dtype=torch.bfloat16)
    assert_right(ours, x)
    count = len(taken)
    assert_trains(ours, x, 48)
    assert len(taken) == count and bool(taken) == (
        not (form == "its own input" and bias)
    )  # x is the product with its bias


def test_a_row_that_is_longer_than_a_folded_one(device: torch.device) -> None:
    x, weight = torch.randn(1, 16, device=device).half(), torch.randn(8200, 16, device=device).half()
    scale = torch.randn(1, 8200, device=device).half()
    chain = dualop.chain("mul(scale) | relu")
    tile = gemm.TILE if x.is_cuda else gemm.Tile(rows=16)
    y = gemm.launch(chain, x, weight, (scale,), tile)
    exact = evaluate(chain, x.double() @ weight.double().t(), (scale.double(),))
    torch.testing.assert_close(y.double(), exact, atol=2e-3, rtol=2e-3)


def test_the_chain_takes_the_product_before_it_is_rounded(taken, device: torch.device) -> None:
    x, weight = (torch.randn(n, 64, device=device).bfloat16() for n in (40, 48))
    chain = dualop.chain("sub(b) | mul(64)")
    exact = x.double() @ weight.double().t()
    b = exact[0].bfloat16()
    y = gemm.launch(chain, x, weight, (b,))
    expected = evaluate(chain, exact, (b.double(),))
    torch.testing.assert_close(y.double(), expected, atol=0.02, rtol=2.0**-8)
    rounded = evaluate(chain, exact.bfloat16().double(), (b.double(),))
    assert (rounded - expected).abs().max() > 1


def test_any_gradient_that_is_wanted_takes_the_other_way(taken, device: torch.device) -> None:
    """And is there: the gradient of the weight, of the bias, of the chain's parameter, or of x alone."""
    ours = LinearChain(16, 24, CHAIN, backend="triton", device=device, dtype=torch.bfloat16)
    x = torch.randn(5, 16, device=device, dtype=torch.bfloat16)
    parameters = list(ours.parameters())
    for wanted in parameters:
        for parameter in parameters:
            parameter.requires_grad_(parameter is wanted)
        (gradient,) = torch.autograd.grad(ours(x).sum(), wanted)
        assert gradient.shape == wanted.shape and bool(gradient.any())
    ours.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    ours(leaf).sum().backward()
    assert leaf.grad is not None and not taken
    with torch.inference_mode():
        ours(leaf)
    ours(x)
    assert len(taken) == 2


def test_second_derivatives(device: torch.device) -> None:
    torch.manual_seed(0)
    ours = LinearChain(16, 24, "add | tanh | gelu", backend="triton", device=device)
    x = torch.randn(5, 16, device=device, requires_grad=True)

    def second(mode: str) -> list[Tensor]:
        gemm.mode = mode
        inputs = [x, *ours.parameters()]
        first = torch.autograd.grad(ours(x).square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    tolerance = 2e-2 if x.is_cuda else 1e-4  # TF32
    for ours_second, apart in zip(second("on"), second("off"), strict=True):
        torch.testing.assert_close(ours_second, apart, atol=tolerance * apart.abs().max().item(), rtol=tolerance)


# ---- when it is taken ------------------------------------------------------------------------------------------------


def test_reasons(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    make = lambda *shape, dtype=torch.bfloat16: torch.randn(*shape, device=device, dtype=dtype)
    x, weight, b = make(8, 16), make(24, 16), make(24)
    why = lambda *tensors, backend="triton": "; ".join(gemm.reasons(*tensors, backend))
    assert why(x, weight, (b,)) == ""
    for training in ((x.clone().requires_grad_(), weight, (b,)), (x, nn.Parameter(weight), (b,)),
                     (x, weight, (nn.Parameter(b),))):  # fmt: skip
        assert "cuBLAS and the chain are as fast in training" in why(*training)
        with torch.no_grad():
            assert why(*training) == ""
    assert "the backend is cuda" in why(x, weight, (b,), backend="cuda")
    assert "not for tensor cores" in why(x.double(), weight.double(), ())
    assert "differ in dtype" in why(x, weight, (b.float(),))
    assert "is empty" in why(x[:0], weight, (b,))
    assert "do not fit" in why(make(8, 17), weight, (b,))
    assert "does not lie along" in why(x, weight, (make(2, 8, 24),))
    assert "do not broadcast" in why(x, weight, (make(23),))
    assert "class of its own" in why(x.as_subclass(type("Own", (Tensor,), {})), weight, (b,))
    with torch.autocast(device.type, torch.bfloat16):
        assert "autocast" in why(x, weight, (b,))
    assert "are to be exact" not in why(x.float(), weight.float(), (b.float(),))
    torch.set_float32_matmul_precision("highest")
    assert "are to be exact" in why(x.float(), weight.float(), (b.float(),))
    seen = []
    torch.func.vmap(lambda row: seen.append(why(row, weight, (b,))) or row)(x)
    assert "functorch" in seen[0]
    monkeypatch.setattr(gemm, "mode", "auto")
    assert "faster at this size" in why(x, weight, (b,))
    monkeypatch.setattr(gemm, "mode", "off")
    assert why(x, weight, (b,)) == "DUALOP_GEMM=off"
    monkeypatch.setattr(gemm, "mode", "sometimes")
    with pytest.raises(BackendUnavailable, match="DUALOP_GEMM=sometimes: it may be auto, on or off"):
        gemm.reasons(x, weight, (b,))


def test_a_rule_of_sizes() -> None:
    assert gemm.pays(16384, 8192, 1024)
    assert not gemm.pays(1024, 8192, 8192) and not gemm.pays(64, 8192, 1024)


def test_where_it_is_not_taken_errors_and_results_are_as_ever(taken, device: torch.device) -> None:
    ours = LinearChain(16, 24, "add", (25,), backend="triton", device=device, dtype=torch.bfloat16)
    with pytest.raises(ShapeError, match="do not broadcast"):
        ours(torch.randn(2, 16, device=device, dtype=torch.bfloat16))
    ours = LinearChain(16, 24, CHAIN, backend="triton", device=device)
    y = torch.compile(ours, fullgraph=True, backend="aot_eager")(torch.randn(2, 16, device=device))
    assert y.shape == (2, 24) and not taken
    torch._dynamo.reset()


@pytest.mark.parametrize("value", ["on", "off"])
def test_the_environment_variable(value: str) -> None:
    code = "from dualop import linear; print(linear.mode)"
    environment = {**os.environ, "DUALOP_GEMM": value, "PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout == (
        f"{value}\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes the large sizes there")
def test_the_benchmark_has_it_beside_the_others(device: torch.device) -> None:
    agreements, rows = linear95.run(["triton"], ["bfloat16"], device, False, 0, lambda text: None)
    assert {a.backend for a in agreements} == {"triton", linear95.IN_PRODUCT} and all(a.ok for a in agreements)
    assert {row.backend for row in rows} == {"eager", "triton", linear95.IN_PRODUCT, linear95.LINEAR}
    # One kernel is for inference: it has a result to compare, and no step to time.
    beside = {a.quantity for a in agreements if a.backend == linear95.IN_PRODUCT}
    assert beside == {"y"} and {a.quantity for a in agreements} > beside
    assert {row.direction for row in rows if row.backend == linear95.IN_PRODUCT} == {"forward"}
    assert all(row.time_us > 0 for row in rows) and gemm.mode == "on"


# ---- compiling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("triton", ["installed", "oldest"])
def test_it_compiles_for_hopper(triton: str, tmp_path: Path) -> None:
    """With TMA and warp-group products, no spills, and two programs on an SM for 16-bit results."""
    oldest = os.environ.get("DUALOP_TRITON36", "")
    if triton == "oldest" and not oldest:
        pytest.skip("DUALOP_TRITON36 names no folder with triton 3.6")
    here = Path(__file__).parent
    places = [*([oldest] if triton == "oldest" else []), str(here.parent), str(here)]
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DUALOP_INTERPRET")}
    environment |= {"PYTHONPATH": os.pathsep.join(places), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(here / "compile_gemm.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) == 4
    for row in rows:
        assert row["wgmma"] and bool(row["tensor_copies"]) == row["descriptors"], row
        if row["dtype"] != "float32" and row["descriptors"]:
            assert not row["spills"], row
            assert 2 * (row["shared"] + 1024) <= 228 * 1024, row
            assert 2 * 32 * row["warps"] * row["registers"] <= 65536, row
