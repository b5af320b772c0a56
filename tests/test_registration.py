"""torch knows the ops of a saved program once dualop has been imported, before torch or after it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import dualop


@pytest.mark.parametrize("first", ["dualop", "torch"])
def test_a_saved_program_is_loaded(first: str, tmp_path: Path) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor, add: torch.Tensor) -> torch.Tensor:
            return dualop.chain("add | tanh")(x, add, backend="reference")

    x, add = torch.randn(4, 5), torch.randn(5)
    torch.export.save(torch.export.export(Model(), (x, add)), tmp_path / "program.pt2")
    torch.save((x, add, torch.tanh(x + add)), tmp_path / "tensors.pt")
    code = f"""
import sys
import {first}
import dualop, torch
x, add, expected = torch.load("tensors.pt")
torch.testing.assert_close(torch.export.load("program.pt2").module()(x, add), expected)
assert not any(type(finder).__module__.startswith("dualop") for finder in sys.meta_path)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


AGAIN = """
import gc, importlib, sys, warnings
import torch
import dualop
warnings.simplefilter("error", UserWarning)

TEXT = "add | silu | tanh"
own = lambda x, b: torch.tanh(torch.nn.functional.silu(x + b))
same = torch.testing.assert_close

def check(op):
    x, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((8, 16), (16,)))
    for backend in ("cuda", "triton", "reference"):
        f = lambda x, b: op(x, b, backend=backend)
        for _ in range(2):
            same(f(x, b), own(x, b))
            same(torch.autograd.grad(f(x, b).sum(), (x, b)), torch.autograd.grad(own(x, b).sum(), (x, b)))
        same(torch.func.grad(lambda x: f(x, b).sum())(x), torch.func.grad(lambda x: own(x, b).sum())(x))
        same(torch.vmap(lambda x: f(x, b))(x), own(x, b))
        one = dualop.chain("silu | tanh")
        twice = lambda h: torch.autograd.grad(
            torch.autograd.grad(h(x).square().sum(), x, create_graph=True)[0].square().sum(), x
        )
        same(twice(lambda x: one(x, backend=backend)), twice(lambda x: own(x, 0)))

def compiles(op, how="aot_eager"):
    torch._dynamo.reset()
    x, b = (torch.randn(s, requires_grad=True) for s in ((8, 16), (16,)))
    y = torch.compile(lambda x, b: op(x, b, backend="reference") * 2, fullgraph=True, backend=how)(x, b)
    same(y, 2 * own(x, b))
    same(torch.autograd.grad(y.sum(), (x, b)), torch.autograd.grad(2 * own(x, b).sum(), (x, b)))

mine = lambda: sorted(name for name in sys.modules if name.split(".")[0] == "dualop")
old, held = dualop.chain(TEXT), torch.ops.dualop.forward.default
x, b = torch.randn(8, 16), torch.randn(16)
compiled = torch.compile(lambda x, b: old(x, b, backend="reference"), fullgraph=True, backend="aot_eager")
same(compiled(x, b), own(x, b))
check(old)
"""


def again(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", AGAIN + code], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DUALOP_INTERPRET": "1", "DUALOP_NATIVE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


PURGE = """
for _ in range(2):
    for name in mine():
        del sys.modules[name]
    gc.collect()
    import dualop
    dualop.chain(TEXT)(x, b, backend="reference")
    gc.collect()
"""


@pytest.mark.parametrize(
    "what",
    [
        PURGE,
        "for name in mine(): importlib.reload(sys.modules[name])",
        "importlib.reload(dualop)",
        "importlib.reload(dualop.op.library); importlib.reload(dualop.op.library)",
    ],
    ids=["purged", "all reloaded", "the package reloaded", "autograd reloaded"],
)
def test_modules_may_run_again(what: str) -> None:
    """Chains and graphs from before go on, and there are new ones."""
    after = """
assert torch.ops.dualop.forward.default is held
for op in (dualop.chain(TEXT), old):
    check(op)
    same(compiled(x, b), own(x, b))
compiles(dualop.chain(TEXT), "HOW")
compiles(old)
"""
    again(what + after.replace("HOW", "inductor" if what is PURGE else "aot_eager"))


def test_each_module_may_be_reloaded() -> None:
    code = """
for name in mine():
    if "cli" not in name:
        importlib.reload(sys.modules[name])
        check(dualop.chain(TEXT))
        check(old)
"""
    again(code)


def test_another_version_of_the_ops_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dualop.errors import DualopError
    from dualop.op import definition

    monkeypatch.setattr(definition, "SCHEMAS", {**definition.SCHEMAS, "forward": "(Tensor x) -> Tensor"})
    with pytest.raises(DualopError, match="start Python anew"):
        definition.define()
