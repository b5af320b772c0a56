"""torch.export and AOTInductor."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from dualop.capabilities.case import Case, Function, same, slow, written_out


class _Model(torch.nn.Module):
    def __init__(self, f: Function, add: Tensor) -> None:
        super().__init__()
        self.f = f
        self.add = torch.nn.Parameter(add.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, self.add)


def _exported(case: Case, **options: Any) -> tuple[Any, _Model, Tensor]:
    x, a = case.tensors()
    model = _Model(case.chain, a)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x.detach(),), dynamic_shapes=({0: batch},), **options)
    ops = [n.target for n in program.graph.nodes if n.op == "call_function" and "dualop" in str(n.target)]
    assert ops == [torch.ops.dualop.forward.default], f"exported {ops}"
    return program, model, x.detach()


def exported(case: Case) -> None:
    """torch.export, strict and not, with a dynamic batch"""
    for strict in (False, True):
        program, model, x = _exported(case, strict=strict)
        same(program.module()(x[:3]), model(x[:3]))


def exported_training(case: Case) -> None:
    """torch.export for training: the exported module has gradients"""
    program, model, x = _exported(case)
    module = program.module()
    (found,) = grad(module(x).square().sum(), list(module.parameters()))
    same(found, grad(written_out(x, model.add).square().sum(), model.add)[0])


def exported_decomposed(case: Case) -> None:
    """torch.export with decompositions, saved and loaded"""
    program, model, x = _exported(case)
    file = io.BytesIO()
    torch.export.save(program.run_decompositions(), file)
    file.seek(0)
    same(torch.export.load(file).module()(x[:3]), model(x[:3]))


@slow
def aot_inductor(case: Case) -> None:
    """AOTInductor: packaged, loaded and run on another batch size"""
    program, model, x = _exported(case)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "model.pt2"))
        run = torch._inductor.aoti_load_package(path)
        same(run(x[:3]), model(x[:3]))
