"""Train a tensor-parallel Linear + chain: each process holds a part of the features and runs the chain on it.

    torchrun --standalone --nproc-per-node 2 examples/tensor_parallel.py

It runs on GPUs where there are enough of them, else on the CPU. The first Linear is split by columns, so its result and
the operand of the chain are sharded along the features. DTensor knows from dualop that the chain needs no communication
and that the gradient of the operand is sharded too. The second Linear is split by rows and ends in an all-reduce.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dualop

BATCH, FEATURES, HIDDEN, STEPS = 32, 64, 256, 5


class MLP(nn.Module):
    """Compute a Linear, the chain and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(FEATURES, HIDDEN)
        self.add = nn.Parameter(torch.randn(HIDDEN))
        self.chain = dualop.chain("add | swish | tanh | gelu | hardtanh(-1, 1)")
        self.down = nn.Linear(HIDDEN, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.chain(self.up(x), self.add))


def train(model: nn.Module, x: Tensor) -> list[float]:
    """Return the loss before each of STEPS steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    gpu = torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (world,))

    torch.manual_seed(0)  # the same weights and data everywhere
    whole, model = MLP().to(device), MLP().to(device)
    model.load_state_dict(whole.state_dict())
    x = torch.randn(BATCH, FEATURES, device=device)

    parallelize_module(model, mesh, {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()})
    model.add = nn.Parameter(distribute_tensor(model.add.detach(), mesh, [Shard(0)]))

    with CommDebugMode() as communication:
        model(x)
    losses, expected = train(model, x), train(whole, x)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    if rank == 0:
        print(f"{world} processes on {device.type}, backend {dualop.explain(model.chain, x, x[0]).chosen}")
        print(f"collectives in a forward pass: {communication.get_total_counts()}")
        print(f"operand held by this process: {model.add.to_local().numel()} of {HIDDEN}")
        print("losses", *(f"{loss:.4f}" for loss in losses), "as in one process")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
