"""torch knows the ops of a saved program once dualop has been imported, before torch or after it."""

from __future__ import annotations

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
assert ("torch" in sys.modules) == ({first!r} == "torch")
import dualop, torch
x, add, expected = torch.load("tensors.pt")
torch.testing.assert_close(torch.export.load("program.pt2").module()(x, add), expected)
assert not any(type(finder).__name__ == "_Registration" for finder in sys.meta_path)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
