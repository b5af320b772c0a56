"""The contract's own parts: that its checks can fail, what the table shows, and processes that end too early."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HAS_GPU, INTERPRETED, ROOT
from torch._subclasses import FakeTensorMode

import dualop
from dualop.backends.reference import evaluate
from dualop.language.stages import STAGES
from torch_contract import processes, tensors
from torch_contract.case import Case, refused
from torch_contract.rows import DISTRIBUTED, MODULES, NOT_ALLOWED, ROWS, Row
from torch_contract.table import Outcome, notes, page

OTHER_ROWS = """
from torch_contract import rows
from torch_contract.case import Case, Skip, gpus

def passes(case):
    assert case.backend in ("cuda", "triton", "reference")

def fails(case):
    if case.backend == "triton":
        raise ValueError("it is wrong")

def skips(case):
    raise Skip("needs a tailwind")

@gpus(1000)
def elsewhere(case):
    raise AssertionError("is not run")

def takes_long(case):
    pass

checks = (passes, fails, skips, elsewhere, takes_long)
rows.ROWS = tuple(
    rows.Row("some", f.__name__, f"it {f.__name__}", f, f is takes_long, getattr(f, "gpus", 0)) for f in checks
) + (rows.Row(rows.NOT_ALLOWED, "limit", "a limit", passes),)
"""


def test_every_row_says_what_it_is() -> None:
    texts, names = [row.text for row in ROWS], [row.name for row in ROWS]
    assert all(texts) and len(set(texts)) == len(texts)
    assert len(set(names)) == len(names)
    assert {row.group for row in ROWS} == {*MODULES, DISTRIBUTED}


@pytest.mark.parametrize("name", ["gradients", "gradcheck_float64", "third_order", "jacobians", "broadcasting"])
def test_a_gradient_that_is_one_percent_off_fails(name: str, device: torch.device) -> None:
    case = Case("reference", device)
    right = case.chain

    class Off(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(y: torch.Tensor) -> torch.Tensor:
            return y.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, gy: torch.Tensor) -> torch.Tensor:
            return gy * 1.01

    (row,) = [row for row in ROWS if row.name == name]
    row.check(case)
    case.chain = lambda x, add: Off.apply(right(x, add))
    with pytest.raises((AssertionError, RuntimeError), match=r"not close|Jacobian mismatch"):
        row.check(case)


def test_stages_that_autocast_runs_in_float32() -> None:
    """The README names them. On the CPU there are none."""
    found: dict[str, set[str]] = {}
    for kind in ("cpu", "cuda"):
        with FakeTensorMode(), tensors._autocast(kind):
            x = torch.empty(4, dtype=torch.bfloat16, device=kind)
            ops = {name: dualop.chain(stage.example) for name, stage in STAGES.items()}
            dtypes = {name: evaluate(op, x, [x] * len(op.operands)).dtype for name, op in ops.items()}
        found[kind] = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert found == {"cpu": set(), "cuda": {"softplus", "square", "reciprocal", "exp"}}


def test_what_is_allowed_is_not_refused() -> None:
    with pytest.raises(AssertionError, match="out of date"):
        refused(lambda: None, "anything")
    with pytest.raises(AssertionError, match="another reason"):
        refused(lambda: torch.ones(2) + torch.ones(3), "inference")


@pytest.mark.slow
def test_a_run_writes_passes_failures_and_what_it_cannot_try(tmp_path: Path) -> None:
    """With rows of its own, on a worker of xdist, whose reports have to reach the process that writes."""
    pytest.importorskip("xdist")
    (tmp_path / "other_rows.py").write_text(OTHER_ROWS)
    file = tmp_path / "folder" / "table.md"
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join([str(tmp_path), str(ROOT / "tests"), str(ROOT)])
    options = ["-p", "other_rows", "-p", "no:cacheprovider", "-n", "1", "--table", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(ROOT / "tests" / "torch_contract" / "test_rows.py"), *options],
        cwd=ROOT, env={**plain, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1 and f"the table of the contract: {file}" in done.stdout, done.stdout + done.stderr
    text = file.read_text()
    assert f"    python -m pytest tests/torch_contract --table {file}\n\n" in text
    assert f", torch {torch.__version__}, " in text
    assert (", kernels interpreted." in text) == (not HAS_GPU or INTERPRETED)
    assert [line for line in text.splitlines() if line.startswith(("| some", "| not"))] == [
        "| some | it passes | ok | ok | ok |",
        "| some | it fails | ok | FAILS | ok |",
        "| some | it skips | - | - | - |",
        "| some | it elsewhere | - | - | - |",
        "| some | it takes_long | ok | ok | ok |",
        "| not allowed by PyTorch | a limit | refused | refused | refused |",
    ]
    first, second, third = text.splitlines()[-3:]
    assert first == "- triton, it fails: ValueError: it is wrong"
    assert second == "- not tried, needs a tailwind: skips"
    assert third.startswith("- not tried, needs 1000 CUDA GPUs") and third.endswith(": elsewhere")


def test_the_table_has_a_line_a_row_and_a_column_a_backend() -> None:
    nothing = lambda case: None
    groups = (("one", "a", "first"), ("two", "b", "second"), (NOT_ALLOWED, "c", "third"), ("two", "d", "fourth"))
    rows = [Row(group, name, f"{text} thing", nothing) for group, name, text in groups]
    outcomes = {
        ("a", "cuda"): Outcome(True), ("a", "triton"): Outcome(False, "no\n  way"),
        ("b", "cuda"): Outcome(None, "no GPU"),
        ("c", "cuda"): Outcome(True), ("c", "triton"): Outcome(False, "allowed"),
    }  # fmt: skip
    text = page(rows, ["cuda", "triton"], outcomes, "a command", {"name": "a machine", "torch": "2.13"})
    assert "    a command\n\na machine, torch 2.13, kernels interpreted." in text
    assert "interpreted" not in page(rows, ["cuda"], outcomes, "", {"name": "a GPU", "cuda": "13.0"})
    for line in (
        "| | | cuda | triton |", "| one | first thing | ok | FAILS |", "| two | second thing | - |  |",
        "| not allowed by PyTorch | third thing | refused | FAILS |", "| two | fourth thing |  |  |",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert notes(rows, ["cuda", "triton"], outcomes) == [
        "triton, first thing: no way", "triton, third thing: allowed",
        "not tried, no GPU: b", "not tried, not part of that run: b, d",
    ]  # fmt: skip


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_processes_that_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SECONDS", 0.2)
    begin = time.monotonic()
    found = processes.results.__wrapped__(("reference",), "cpu")
    assert time.monotonic() - begin < 20
    assert all("rank 0: the process ended before this row or took too long" in text for text, _ in found.values())


def test_what_failed_in_a_process_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {(check.__name__, "reference"): ("rank 1: AssertionError: no", 0.1) for check in processes.CHECKS}
    monkeypatch.setattr(processes, "results", lambda backends, device_type: found)
    with pytest.raises(AssertionError, match="rank 1: AssertionError: no"):
        next(row for row in ROWS if row.group == DISTRIBUTED).check(Case("reference", torch.device("cpu")))
