"""torch.export and AOTInductor."""

from __future__ import annotations

import importlib.util
import io
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from torch_contract.case import Case, Function, Skip, environment, same, slow, written_out

WRITTEN_OUT = "torch"
SECONDS = 300  # of a process with a compiler in it


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


def exported_data_dependent(case: Case) -> None:
    """torch.export, strict and not, with sizes that depend on data"""

    class Masked(torch.nn.Module):
        def forward(self, x: Tensor, mask: Tensor, a: Tensor) -> Tensor:
            return case.chain(x[mask], a)

    x, a = case.tensors((8, 5), (5,), grad=False)
    mask = torch.arange(8, device=x.device) % 3 > 0
    for strict in (False, True):
        module = torch.export.export(Masked(), (x, mask, a), strict=strict).module()
        same(module(x, ~mask, a), written_out(x[~mask], a))


@slow
def onnx(case: Case) -> None:
    """ONNX by torch.onnx.export(dynamo=True), as the functions of the reference (README: dualop.export)"""
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise Skip("needs the packages onnx and onnxscript")
    from onnx.reference import ReferenceEvaluator

    from dualop.export import decompositions

    program, model, x = _exported(case)
    plain = program.run_decompositions(decompositions())
    assert not [n for n in plain.graph.nodes if "dualop" in str(n.target)]
    written: Any = torch.onnx.export(plain, dynamo=True, verbose=False)
    evaluator = ReferenceEvaluator(written.model_proto)
    for rows in (x, x[:3]):
        (found,) = evaluator.run(None, {written.model_proto.graph.input[0].name: rows.cpu().numpy()})
        same(torch.from_numpy(found), model(rows).detach().cpu(), 1e-6)


@slow
def aot_inductor(case: Case) -> None:
    """AOTInductor: packaged, loaded and run on another batch size"""
    # In a process of its own: where its C++ loader crashes, it takes the process along.
    died = _packaged(case.backend, case.device)
    if died and _packaged(WRITTEN_OUT, case.device):
        raise Skip(f"AOTInductor fails on torch's own functions too: {died[-300:]}")
    assert not died, died


def _packaged(backend: str, device: torch.device) -> str:
    """What `main` said in a process that failed, else nothing."""
    command = [sys.executable, "-m", "torch_contract.export", backend, str(device)]
    done = subprocess.run(
        command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS
    )
    return f"exit status {done.returncode}: {done.stderr.strip()[-1000:]}" if done.returncode else ""


def main(backend: str, device: torch.device) -> None:
    """Package, load and run the chain on this backend, or as torch's functions for WRITTEN_OUT."""
    case = Case(backend, device)
    x, a = case.tensors(grad=False)
    model = _Model(written_out if backend == WRITTEN_OUT else case.chain, a)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "model.pt2"))
        run = torch._inductor.aoti_load_package(path)
        same(run(x[:3]), written_out(x[:3], a))


if __name__ == "__main__":
    main(sys.argv[1], torch.device(sys.argv[2]))
