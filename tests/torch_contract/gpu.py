"""What only a GPU has: CUDA graphs, streams, synchronisation, several devices."""

from __future__ import annotations

import torch
from torch.autograd import grad

from torch_contract.case import Case, Function, Skip, gpus, same, written_out


@gpus(1)
def cuda_graph(case: Case) -> None:
    """a CUDA graph of forward and backward, replayed on new data"""
    x, a = case.tensors((64, 64), (64,), dtype=torch.float32)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            grad(case.chain(x, a).square().sum(), (x, a))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.chain(x, a)
        gradients = grad(y.square().sum(), (x, a))
    other, b = case.tensors((64, 64), (64,), dtype=torch.float32, grad=False, seed=1)
    with torch.no_grad():
        x.copy_(other)
        a.copy_(b)
    graph.replay()
    same(y, written_out(x, a), 1e-5)
    same(gradients, grad(written_out(x, a).square().sum(), (x, a)), 1e-4)


@gpus(1)
def side_stream(case: Case) -> None:
    """on a side stream, forward and backward, in order with the work before"""
    side = torch.cuda.Stream()
    (a,) = case.tensors((2048,), dtype=torch.float32)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x = torch.linspace(-3, 3, 2048, device=case.device).expand(1024, 2048).clone().requires_grad_()
        found = [case.chain(x, a), *grad(case.chain(x, a).square().sum(), (x, a))]
    side.synchronize()
    same(found, [written_out(x, a), *grad(written_out(x, a).square().sum(), (x, a))], 1e-3)


@gpus(1)
def no_synchronisation(case: Case) -> None:
    """nothing waits for the GPU, forward or backward"""
    x, a = case.tensors(dtype=torch.float32)

    def gradients(f: Function) -> object:
        return grad(f(x, a), (x, a), torch.ones_like(x))

    gradients(case.chain)  # builds
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(case.chain)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpus(1)
def memory(case: Case) -> None:
    """no memory but the result, the gradients and small partial sums"""
    if case.backend == "reference":
        raise Skip("of the reference, torch's functions one after the other")
    (x,), (a,) = case.tensors((4096, 1024), dtype=torch.float32), case.tensors((1024,), dtype=torch.float32)
    gy = torch.ones_like(x)
    grad(case.chain(x, a), (x, a), gy)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(case.device)
    before, size = torch.cuda.memory_allocated(case.device), x.numel() * x.element_size()
    y = case.chain(x, a)
    after = torch.cuda.max_memory_allocated(case.device) - before
    assert after <= 1.01 * size, f"forward took {after / size:.2f} times the result"
    grad(y, (x, a), gy)
    after = torch.cuda.max_memory_allocated(case.device) - before
    assert after <= 2.5 * size, f"forward and backward took {after / size:.2f} times the result"


@gpus(1)
def scalar_on_cpu(case: Case) -> None:
    """a 0-d CPU operand beside CUDA data"""
    (x,), a = case.tensors(dtype=torch.float32, grad=True)[:1], torch.tensor(0.5, requires_grad=True)
    case.agree(lambda f: [f(x, a), *grad(f(x, a).square().sum(), (x, a))], 1e-4)


@gpus(2)
def second_gpu(case: Case) -> None:
    """on the second GPU while the first is current"""
    with torch.cuda.device(0):
        other = Case(case.backend, torch.device("cuda", 1))
        x, a = other.tensors(dtype=torch.float32)
        other.agree(lambda f: [f(x, a), *grad(f(x, a).square().sum(), (x, a))], 1e-4)
        assert torch.cuda.current_device() == 0
