"""The rows of `dualop capabilities`, each a test on each backend, and the command's own parts.

The rows of two processes are in test_distributed.py. On a machine with a GPU these tests run there, marked gpu.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from conftest import HAS_GPU, INTERPRETED
from torch._subclasses import FakeTensorMode

import dualop
from dualop import capabilities
from dualop.backends import registry
from dualop.backends.reference import evaluate
from dualop.capabilities import CAPABILITIES, NOT_ALLOWED, Capability, table, tensors
from dualop.capabilities.case import Case, Skip, gpus, refused
from dualop.language.stages import STAGES

ON_GPU = HAS_GPU and not INTERPRETED
SLOW_ON = "triton"  # what takes seconds runs on one backend without a GPU; this one has nothing to build


def _rows() -> list[Any]:
    rows = []
    for capability in CAPABILITIES:
        for backend in registry.BACKENDS:
            if capability.group != "distributed" and (ON_GPU or backend == SLOW_ON or not capability.slow):
                marks = [pytest.mark.gpu] if ON_GPU or capability.gpus else []
                rows.append(pytest.param(capability, backend, marks=marks, id=f"{capability.name}-{backend}"))
    return rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("capability", "backend"), _rows())
def test_capability(capability: Capability, backend: str, device: torch.device) -> None:
    if missing := capability.missing(device):
        pytest.skip(missing)
    try:
        capability.try_on(backend, device)
    except Skip as skip:
        pytest.skip(str(skip))


def test_every_row_says_what_it_is() -> None:
    texts, names = [c.text for c in CAPABILITIES], [c.name for c in CAPABILITIES]
    assert all(texts) and len(set(texts)) == len(texts)
    assert len(set(names)) == len(names)
    assert {c.group for c in CAPABILITIES} == {*capabilities._MODULES, "distributed"}


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

    (capability,) = [c for c in CAPABILITIES if c.name == name]
    capability.check(case)
    case.chain = lambda x, add: Off.apply(right(x, add))
    with pytest.raises((AssertionError, RuntimeError), match=r"not close|Jacobian mismatch"):
        capability.check(case)


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


def test_run_reports_passes_failures_and_what_it_cannot_try(monkeypatch: pytest.MonkeyPatch) -> None:
    def passes(case: Case) -> None:
        assert case.backend == "reference"

    def fails(case: Case) -> None:
        raise ValueError("it is wrong")

    def skips(case: Case) -> None:
        raise Skip("needs a tailwind")

    @gpus(1000)
    def elsewhere(case: Case) -> None:
        raise AssertionError("is not run")

    rows = [Capability("some", f.__name__, f.__name__, f) for f in (passes, fails, skips)]
    rows.append(Capability("some", "elsewhere", "elsewhere", elsewhere, gpus=1000))
    rows.append(Capability(NOT_ALLOWED, "limit", "a limit", passes))
    monkeypatch.setattr(capabilities, "CAPABILITIES", tuple(rows))
    said: list[str] = []
    found = capabilities.run(["reference"], torch.device("cpu"), progress=said.append)
    assert [(r.name, r.ok) for r in found] == [
        ("passes", True), ("fails", False), ("skips", None), ("elsewhere", None), ("limit", True),
    ]  # fmt: skip
    assert found[1].note == "ValueError: it is wrong"
    assert found[2].note == "needs a tailwind" and "GPU" in found[3].note
    assert said[0] == "passes, reference" and len(said) == 5
    assert [r.name for r in capabilities.run(["reference"], torch.device("cpu"), ["limit"])] == ["limit"]

    as_json = json.loads(json.dumps(table.as_json(found, torch.device("cpu"))))
    assert as_json["ok"] is False and as_json["torch"] == torch.__version__
    assert as_json["rows"][1] | {"seconds": 0} == {
        "group": "some", "name": "fails", "capability": "fails", "backend": "reference", "ok": False,
        "note": "ValueError: it is wrong", "seconds": 0,
    }  # fmt: skip
    assert table.as_json([found[0], found[2]], torch.device("cpu"))["ok"] is True
    assert table.notes(found)[0] == "reference, fails: ValueError: it is wrong"
    assert "not tried, needs a tailwind: skips" in table.notes(found)


def test_the_table_has_a_line_a_capability_and_a_column_a_backend() -> None:
    from rich.console import Console

    rows = [
        capabilities.Row("one", "a", "first thing", "cuda", True, "", 0.1),
        capabilities.Row("one", "a", "first thing", "triton", False, "no", 0.1),
        capabilities.Row("two", "b", "second thing", "cuda", None, "no GPU", 0.1),
        capabilities.Row(NOT_ALLOWED, "c", "third thing", "cuda", True, "", 0.1),
    ]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table.render(rows))
    lines = {line.split("│")[2].strip(): line for line in capture.get().splitlines() if "thing" in line}
    assert lines["first thing"].count("ok") == 1 and "FAILS" in lines["first thing"]
    assert "-" in lines["second thing"] and "refused" in lines["third thing"]
    page = table.markdown(rows, "dualop capabilities", {"name": "a machine", "torch": "2.13"})
    assert "    dualop capabilities\n\na machine, torch 2.13, kernels interpreted." in page
    assert "| one | first thing | ok | FAILS |" in page and "- triton, first thing: no" in page
    assert "- not tried, no GPU: b" in page
