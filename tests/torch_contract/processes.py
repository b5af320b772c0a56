"""DDP, FSDP2 and DTensor: several processes of one host, each row checked against one process.

    python -m torch_contract.processes RANK WORLD FOLDER DEVICE BACKEND...

`results` starts two such processes, on gloo and the CPU or on NCCL and two GPUs. They meet in a file of FOLDER, so that
there is no port to be taken, and are killed when their time is up.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from torch_contract.case import Case, Function, Skip, environment, same, two_written_out, written_out

WORLD = 2
SECONDS = 180  # for all rows of all backends; a collective that waits longer than a third of it fails
TOLERANCE = 1e-9


class Model(torch.nn.Module):
    """Linear, the chain, Linear: the same weights in every process."""

    def __init__(self, f: Function) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        self.f = f
        self.first, self.last = torch.nn.Linear(6, 8).double(), torch.nn.Linear(8, 4).double()
        self.add = draw(8)
        for linear in (self.first, self.last):
            linear.weight, linear.bias = draw(*linear.weight.shape), draw(*linear.bias.shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.f(self.first(x), self.add))


def _one_process(device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole batch, and the gradients that one process of torch's own functions gets."""
    x = Case("reference", torch.device("cpu")).tensors((4, 6), grad=False)[0]
    model = Model(written_out)
    model(x).square().mean().backward()
    return x.to(device), {name: p.grad.to(device) for name, p in model.named_parameters() if p.grad is not None}


def _same_gradients(model: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        same(_full(parameter.grad), expected[name.removeprefix("module.")], TOLERANCE)


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def ddp(case: Case, mesh: Any) -> None:
    """DistributedDataParallel: Linear + chain get the gradients of one process"""
    from torch.nn.parallel import DistributedDataParallel

    x, expected = _one_process(case.device)
    ids = [case.device.index] if case.device.type == "cuda" else None
    model = DistributedDataParallel(Model(case.chain).to(case.device), device_ids=ids)
    model(x.chunk(mesh.size())[mesh.get_rank()]).square().mean().backward()
    _same_gradients(model, expected)


def fsdp2(case: Case, mesh: Any) -> None:
    """FSDP2 (fully_shard): Linear + chain get the gradients of one process"""
    from torch.distributed.fsdp import fully_shard

    x, expected = _one_process(case.device)
    model: Any = fully_shard(Model(case.chain).to(case.device), mesh=mesh)
    model(x.chunk(mesh.size())[mesh.get_rank()]).square().mean().backward()
    _same_gradients(model, expected)


def tensor_parallel(case: Case, mesh: Any) -> None:
    """tensor parallel: column-wise Linear, chain on its shards, row-wise Linear; one all-reduce, behind the last"""
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x, expected = _one_process(case.device)
    model = Model(case.chain).to(case.device)
    plan = {"first": ColwiseParallel(use_local_output=False), "last": RowwiseParallel()}
    parallelize_module(model, mesh, plan)  # type: ignore[arg-type]
    model.add = torch.nn.Parameter(distribute_tensor(model.add.detach(), mesh, [Shard(0)]))
    with CommDebugMode() as communication:
        y = model(x)
    assert communication.get_total_counts() == 1, f"forward communicated {communication.get_comm_counts()}"
    y.square().mean().backward()
    assert model.add.grad.placements == (Shard(0),)  # type: ignore[union-attr]
    _same_gradients(model, expected)


def _sharded(case: Case, mesh: Any, x_placement: Any, operand_placement: Any, gradients: tuple[Any, ...]) -> None:
    """The chain TWO on DTensors: values, placements of the result and the gradients, and no communication."""
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    tensors = case.tensors((8, 6), (6,), (6,), grad=False)
    placements = (x_placement, operand_placement, operand_placement)
    shards = [distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in zip(tensors, placements, strict=True)]
    with CommDebugMode() as communication:
        y = case.two(*shards)
        found = grad(y, shards, torch.ones_like(y))
    assert communication.get_total_counts() == 0, f"communicated {communication.get_comm_counts()}"
    assert y.placements == (x_placement,), f"the result is {y.placements}"  # type: ignore[attr-defined]
    assert tuple(g.placements[0] for g in found) == gradients, f"{[g.placements for g in found]}"  # type: ignore[attr-defined]
    whole = [t.requires_grad_() for t in tensors]
    expected = two_written_out(*whole)
    same(_full(y), expected, TOLERANCE)
    same([_full(g) for g in found], list(grad(expected.sum(), whole)), TOLERANCE)


def batch_sharded(case: Case, mesh: Any) -> None:
    """DTensor sharded along the batch: operands' gradients are partial sums, nothing is communicated"""
    from torch.distributed.tensor import Partial, Replicate, Shard

    _sharded(case, mesh, Shard(0), Replicate(), (Shard(0), Partial(), Partial()))


def feature_sharded(case: Case, mesh: Any) -> None:
    """DTensor sharded along the features: operands and their gradients too, nothing is communicated"""
    from torch.distributed.tensor import Shard

    _sharded(case, mesh, Shard(1), Shard(0), (Shard(1), Shard(0), Shard(0)))


def replicated(case: Case, mesh: Any) -> None:
    """DTensor replicated: nothing is communicated"""
    from torch.distributed.tensor import Replicate

    _sharded(case, mesh, Replicate(), Replicate(), (Replicate(), Replicate(), Replicate()))


def redistributed(case: Case, mesh: Any) -> None:
    """DTensor placed in any other way: unevenly, as partial sums, operand and x unlike"""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    for rows, px, pa in ((8, Shard(1), Replicate()), (8, Replicate(), Shard(0)), (5, Shard(0), Replicate())):
        x, a = case.tensors((rows, 6), (6,), grad=False)
        dx, da = (distribute_tensor(t, mesh, [p]).requires_grad_() for t, p in ((x, px), (a, pa)))
        y = case.chain(dx, da)
        same(_full(y), written_out(x, a), TOLERANCE)
        found = [_full(g) for g in grad(y.square().sum(), (dx, da))]
        whole = [t.requires_grad_() for t in (x, a)]
        same(found, list(grad(written_out(*whole).square().sum(), whole)), TOLERANCE)
    ones = torch.ones(8, 6, dtype=torch.float64, device=case.device)
    partial = DTensor.from_local(ones, mesh, [Partial()])
    a = distribute_tensor(ones[0], mesh, [Replicate()])
    same(_full(case.chain(partial, a)), written_out(ones * mesh.size(), ones[0]), TOLERANCE)


def sharded_without_gradients(case: Case, mesh: Any) -> None:
    """DTensor: no_grad, inference_mode"""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    whole = case.tensors((4, 6), (6,), (6,))
    placements = (Shard(0), Replicate(), Replicate())
    shards = [distribute_tensor(t.detach(), mesh, [p]).requires_grad_() for t, p in zip(whole, placements, strict=True)]
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            same(_full(case.two(*shards)), two_written_out(*whole), TOLERANCE)


def sharded_compiled(case: Case, mesh: Any) -> None:
    """DTensor under torch.compile(fullgraph=True), forward and backward"""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, a = case.tensors((4, 6), (6,))
    dx = distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_()
    da = distribute_tensor(a.detach(), mesh, [Replicate()]).requires_grad_()
    torch._dynamo.reset()
    y = torch.compile(case.chain, fullgraph=True, backend="aot_eager")(dx, da)
    found = [_full(y), *(_full(g) for g in grad(y.square().sum(), (dx, da)))]
    same(found, [written_out(x, a), *grad(written_out(x, a).square().sum(), (x, a))], TOLERANCE)


CHECKS: tuple[Callable[[Case, Any], None], ...] = (
    batch_sharded, feature_sharded, replicated, redistributed, sharded_without_gradients, sharded_compiled,
    tensor_parallel, ddp, fsdp2,
)  # fmt: skip


@lru_cache(maxsize=8)
def results(backends: tuple[str, ...], device_type: str) -> dict[tuple[str, str], tuple[str, float]]:
    """(row, backend) -> what failed (empty: nothing) and the seconds it took. Two processes, at most SECONDS."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise Skip("this torch was built without torch.distributed or gloo")
    variables = {**environment(), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch_contract.processes"]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(WORLD), folder, device_type, *backends],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=(Path(folder) / f"{rank}.log").open("w"),
            )
            for rank in range(WORLD)
        ]
        try:
            end = time.monotonic() + SECONDS
            for process in processes:
                process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
                process.wait()
        reports = [_report(Path(folder), rank) for rank in range(WORLD)]
    found = {}
    for backend in backends:
        for row in CHECKS:
            parts = [report.get(f"{backend} {row.__name__}", report["died"]) for report in reports]
            texts = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(parts) if text]
            found[row.__name__, backend] = "\n".join(texts), max(seconds for _, seconds in parts)
    return found


def _report(folder: Path, rank: int) -> dict[str, tuple[str, float]]:
    """What a process has written; `died` holds the end of its log for the rows that it did not come to."""
    log = (folder / f"{rank}.log").read_text(errors="replace").strip()[-2000:]
    file = folder / f"{rank}.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    return {**rows, "died": (f"the process ended before this row or took too long: {log}", 0.0)}


def main(rank: int, folder: Path, device_type: str, backends: list[str]) -> None:
    """One process: every row of every backend, reported in FOLDER after each."""
    import torch.distributed as dist

    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=SECONDS / 3),
    )
    mesh = dist.device_mesh.init_device_mesh(device.type, (WORLD,))
    report: dict[str, tuple[str, float]] = {}
    for backend in backends:
        for row in CHECKS:
            begin = time.perf_counter()
            try:
                row(Case(backend, device), mesh)
                text = ""
            except Exception as error:
                text = f"{type(error).__name__}: {str(error).strip()[:1000]}"
            report[f"{backend} {row.__name__}"] = text, time.perf_counter() - begin
            new = folder / f"{rank}.tmp"
            new.write_text(json.dumps(report))
            new.replace(folder / f"{rank}.json")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[3]), sys.argv[4], sys.argv[5:])
