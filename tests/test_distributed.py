"""DTensor in one process, on a mesh of four ranks that do not exist, and the example on two.

What two processes compute with DTensor, DDP and FSDP2 are rows of the contract: tests/torch_contract/processes.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

import dualop
from dualop.op import dtensor

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]


@pytest.mark.parametrize("how", ["inference_mode", "compile"])
def test_rules_are_registered_when_a_process_has_dtensors(how: str) -> None:
    """Importing dualop imports no torch.distributed.tensor; once somebody has, the next call registers the rules."""
    code = """
import sys, torch, dualop, dualop.op.library
from dualop.op import dtensor
op, x = dualop.chain("add | tanh"), torch.ones(4, 6)
assert "torch.distributed.tensor" not in sys.modules and not dtensor.known
import torch.distributed.tensor as dt
from torch.testing._internal.distributed.fake_pg import FakeStore
torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
mesh = dt.init_device_mesh("cpu", (2,))
if sys.argv[1] == "compile":
    op = torch.compile(op, backend="aot_eager", fullgraph=True)
with torch.inference_mode(sys.argv[1] == "inference_mode"), torch.no_grad():
    y = op(dt.distribute_tensor(x, mesh, [dt.Shard(0)]), dt.distribute_tensor(x[0], mesh, [dt.Replicate()]))
assert dtensor.known and y.placements == (dt.Shard(0),), y
"""
    done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        (((8, 6), (6,)), ["S0: S0 R", "S1: S1 S0"]),
        (((8, 6), (6,), (8, 1), ()), ["S0: S0 R S0 R", "S1: S1 S0 R R"]),
        (((6,), (8, 6)), ["S0: R S0", "S1: S0 S1"]),
        (((8, 1), (1, 6)), ["S0: S0 R", "S1: R S1"]),
        (((2, 3, 4), (3, 1)), ["S0: S0 R", "S1: S1 S0", "S2: S2 R"]),
        (((1, 6), (6,)), ["S1: S1 S0"]),
        (((), ()), []),
    ],
    ids=str,
)
def test_shardings_of_shapes(shapes: tuple[tuple[int, ...], ...], expected: list[str]) -> None:
    from torch.distributed.tensor import Shard

    text = lambda p: f"S{p.dim}" if isinstance(p, Shard) else "R"
    found = [f"{text(result)}: {' '.join(map(text, inputs))}" for result, inputs in dtensor.sharded(shapes)]
    assert found == expected


@pytest.fixture(scope="module")
def meshes() -> Iterator[tuple[Any, Any]]:
    """A mesh of four ranks, and the same ranks as two by two; this process is rank 0 and nobody else is there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    torch.distributed.destroy_process_group()


def _placements(text: str) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return [Replicate() if p == "R" else Partial() if p == "P" else Shard(int(p[1:])) for p in text.split()]


# Placements of x and of both operands, of y, of the three gradients; shape of x and of the operands.
LAYOUTS = [
    ("S0", "R", "S0", "S0", "P", (8, 6), (6,)),
    ("S1", "S0", "S1", "S1", "S0", (8, 8), (8,)),
    ("R", "R", "R", "R", "R", (8, 6), (6,)),
    ("S0", "R", "S0", "S0", "P", (7, 6), (6,)),
    ("S1", "S0", "S1", "S1", "S0", (2, 8, 5), (8, 1)),
    ("S0 S1", "R S0", "S0 S1", "S0 S1", "P S0", (8, 6), (6,)),
    ("S0 S0", "R R", "S0 S0", "S0 S0", "P P", (8, 6), (6,)),
    ("S0 R", "R R", "S0 R", "S0 R", "P R", (8, 6), (6,)),
]


@pytest.mark.parametrize(("x", "operand", "y", "grad_x", "grad_operand", "shape", "small"), LAYOUTS)
def test_placements_without_communication(
    x: str, operand: str, y: str, grad_x: str, grad_operand: str, shape: Any, small: Any, meshes: tuple[Any, Any]
) -> None:
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = meshes[len(x.split()) - 1]
    op = dualop.chain("mul(scale) | add(bias) | tanh | mul(x)")
    dx = distribute_tensor(torch.ones(shape), mesh, _placements(x)).requires_grad_()
    operands = [distribute_tensor(torch.ones(small), mesh, _placements(operand)).requires_grad_() for _ in range(2)]
    with CommDebugMode() as communication:
        result = op(dx, *operands, backend="reference")
        gradients = torch.autograd.grad(result, [dx, *operands], torch.ones_like(result))
    assert communication.get_total_counts() == 0
    found = [list(t.placements) for t in (result, *gradients)]
    assert found == [_placements(p) for p in (y, grad_x, grad_operand, grad_operand)]
    assert [t.shape for t in gradients] == [shape, small, small]


def test_each_choice_of_gradients_has_its_own_rule(meshes: tuple[Any, Any]) -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    op, mesh = dualop.chain("add | tanh"), meshes[0]
    x = distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)]).requires_grad_()
    a = distribute_tensor(torch.ones(6), mesh, [Replicate()]).requires_grad_()
    y = op(x, a, backend="reference")
    for wanted, placements in (((x, a), (Shard(0), Partial())), ((a,), (Partial(),)), ((x,), (Shard(0),))):
        gradients = torch.autograd.grad(y, wanted, torch.ones_like(y), retain_graph=True)
        assert tuple(g.placements[0] for g in gradients) == placements


def test_gradients_of_a_partial_gradient_are_partial(meshes: tuple[Any, Any]) -> None:
    """As behind a column-wise Linear that follows: nothing is reduced before it has to be."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    op, mesh = dualop.chain("add | tanh"), meshes[0]
    x = distribute_tensor(torch.ones(8, 6), mesh, [Replicate()]).requires_grad_()
    a = distribute_tensor(torch.ones(6), mesh, [Replicate()]).requires_grad_()
    y = op(x, a, backend="reference")
    gy = DTensor.from_local(torch.ones(8, 6), mesh, [Partial()])
    with CommDebugMode() as communication:
        gradients = torch.autograd.grad(y, (x, a), gy)
    assert communication.get_total_counts() == 0
    assert [g.placements for g in gradients] == [(Partial(),), (Partial(),)]


def test_a_partial_x_is_reduced_first(meshes: tuple[Any, Any]) -> None:
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    x = DTensor.from_local(torch.ones(8, 6), meshes[0], [Partial()])
    a = distribute_tensor(torch.ones(6), meshes[0], [Replicate()])
    with CommDebugMode() as communication:
        y = dualop.chain("add | tanh")(x, a, backend="reference")
    assert communication.get_total_counts() == 1
    assert y.placements != (Partial(),)


def test_a_plain_tensor_beside_a_dtensor_is_refused_by_name(meshes: tuple[Any, Any]) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    x = distribute_tensor(torch.ones(8, 6), meshes[0], [Shard(0)])
    op = dualop.chain("add | tanh")
    with pytest.raises(RuntimeError, match=r"dualop.forward.*mixed torch.Tensor and DTensor"):
        op(x, torch.ones(6), backend="reference")
    assert op(x, torch.tensor(1.0), backend="reference").placements == (Shard(0),)


def test_the_example(tmp_path: Path) -> None:
    """examples/tensor_parallel.py on two processes that meet in a file."""
    code = (
        "import sys, runpy, torch.distributed as dist; rank, path, example = int(sys.argv[1]), *sys.argv[2:]\n"
        "dist.init_process_group('gloo', init_method=f'file://{path}', rank=rank, world_size=2)\n"
        "runpy.run_path(example, run_name='__main__')\n"
    )
    environment = {**os.environ, "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    example = str(ROOT / "examples" / "tensor_parallel.py")
    command = [sys.executable, "-c", code]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meeting"), example],
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [process.communicate(timeout=120)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(texts)
    assert "collectives in a forward pass: 1" in texts[0]
    assert "operand held by this process: 128 of 256" in texts[0]
