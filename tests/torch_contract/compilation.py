"""torch.compile: whole graphs, forward and backward, with dynamic shapes, with transforms inside."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.autograd import grad
from torch.func import grad as fgrad
from torch.func import hessian, jvp

import dualop
from dualop.backends import registry
from torch_contract.case import CHAIN, Case, Function, gpus, refused, same, slow, written_out


def compiled(f: Any, backend: Any = "aot_eager", **options: Any) -> Any:
    """f compiled into one graph, nothing left over from earlier compilations."""
    torch._dynamo.reset()
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def generated_kernels(code: str) -> list[str]:
    """The names of the kernels that Inductor generated."""
    return re.findall(r"^(\w+) = async_compile\.\w+\(", code, re.MULTILINE)


def _agrees(case: Case, f: Any, *, strides: bool = False) -> None:
    x, a = case.tensors()
    y = f(x, a)
    same(y, written_out(x, a), strides=strides)
    same(grad(y.square().sum(), (x, a)), grad(written_out(x, a).square().sum(), (x, a)))


def whole_graph(case: Case) -> None:
    """torch.compile(fullgraph=True), forward and backward, with aot_eager"""
    _agrees(case, compiled(case.chain))


@slow
def inductor(case: Case) -> None:
    """torch.compile(fullgraph=True), forward and backward, with Inductor"""
    _agrees(case, compiled(case.chain, "inductor"))


def without_gradients(case: Case) -> None:
    """compiled under no_grad and inference_mode"""
    x, a = case.tensors()
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            same(compiled(case.chain)(x, a), written_out(x, a))


def data_dependent_sizes(case: Case) -> None:
    """compiled, sizes that depend on data: f(x[mask], a), with and without operands that broadcast along them"""
    x, a = case.tensors((8, 5), (5,))
    mask = torch.arange(8, device=x.device) % 3 > 0

    def masked(f: Any) -> Any:
        return lambda x, a: (f(x[mask], a), f(x[mask], a[:1, None]), f(x[mask], x[mask]))

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found, expected = compiled(masked(case.chain))(x, a), masked(written_out)(x, a)
        same(found, expected)
        squares = [torch.stack([y.square().sum() for y in ys]).sum() for ys in (found, expected)]
        same(grad(squares[0], (x, a)), grad(squares[1], (x, a)))
        alone = dualop.chain("gelu")
        same(compiled(lambda x: alone(x[mask], backend=case.backend))(x), torch.nn.functional.gelu(x[mask]))


def unbacked_sizes(case: Case) -> None:
    """compiled, sizes that mark_unbacked hides from the compiler"""
    x, a = case.tensors((8, 5), (5,), grad=False)
    unknown = x.clone()
    torch._dynamo.decorators.mark_unbacked(unknown, 0)
    same(compiled(case.chain)(unknown, a), written_out(x, a))


def one_node(case: Case) -> None:
    """compiled, the op is one node forward and one backward, with nothing around it"""
    graphs: list[list[Any]] = []

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return module.forward

    x, a = case.tensors()
    compiled(case.chain, aot_autograd(fw_compiler=keep))(x, a).sum().backward()
    ops = [[t for t in graph if getattr(t, "namespace", "") == "dualop"] for graph in graphs]
    assert ops == [[torch.ops.dualop.forward.default], [torch.ops.dualop.backward.default]], f"ops {ops}"
    around = {str(t) for graph in graphs for t in graph} - {str(t) for graph in ops for t in graph}
    allowed = {"<built-in function getitem>", "aten.expand.default", "aten.detach.default", "aten.clone.default"}
    assert around <= allowed, f"also {around - allowed}"  # expand is the backward of sum()


@slow
def inductor_code(case: Case) -> None:
    """Inductor calls the op once forward and once backward, copies nothing, falls back to nothing else"""
    from torch._inductor.utils import run_and_get_code

    x, a = case.tensors(dtype=torch.float32)

    def step(x: Tensor, a: Tensor) -> Any:
        (model(x, a) * torch.arange(5.0, device=x.device)).sum().backward()

    model = compiled(lambda x, a: case.chain(x * 2, a).relu() + 1, "inductor")
    _, codes = run_and_get_code(step, x, a)
    code = "\n".join(codes)
    called = re.findall(r"= torch\.ops\.([\w.]+)\(", code)
    assert sorted(called) == ["dualop.backward.default", "dualop.forward.default"], f"Inductor calls {called}"
    copies = [k for k in generated_kernels(code) if "copy" in k or "clone" in k]
    assert not copies, f"Inductor copies: {copies}"


def no_recompilation(case: Case) -> None:
    """no recompilation for a new batch size, with dynamic=True and after the second size without"""
    (a,) = case.tensors((5,))
    for dynamic, most in ((True, 1), (None, 2)):
        counter = CompileCounterWithBackend("aot_eager")
        f = compiled(case.chain, counter, dynamic=dynamic)
        for seed, batch in enumerate((4, 7, 3, 9)):
            (x,) = case.tensors((batch, 5), seed=seed)
            same(grad(f(x, a).square().sum(), (x, a)), grad(written_out(x, a).square().sum(), (x, a)))
        assert counter.frame_count <= most, f"dynamic={dynamic}: compiled {counter.frame_count} times"


def context_inside(case: Case) -> None:
    """use_backend, and a chain that is made, inside the compiled function"""

    def inside(x: Tensor, add: Tensor) -> Tensor:
        with dualop.use_backend(case.backend):
            return dualop.chain(CHAIN)(x, add)

    with case.spy("forward") as forward:
        _agrees(case, compiled(inside))
    assert forward.called


def backend_change(case: Case) -> None:
    """use_backend and set_backend around a compiled function are obeyed, at the price of a recompilation"""
    op = dualop.chain(CHAIN)
    f, (x, a) = compiled(lambda x, add: op(x, add)), case.tensors(grad=False)
    for name in ("reference", case.backend, "reference"):
        other = Case(name, case.device)
        with dualop.use_backend(name), other.spy("forward") as forward:
            same(f(x, a), written_out(x, a))
        assert forward.called, f"not run on {name}"
    before = registry._process
    try:
        dualop.set_backend(case.backend)
        with case.spy("forward") as forward:
            same(f(x, a), written_out(x, a))
        assert forward.called, "set_backend was not obeyed"
    finally:
        registry._process = before


@slow
def transform_inside(case: Case) -> None:
    """compiled functions with grad, vmap, jvp, hessian inside"""
    x, a = case.tensors((2, 3), (3,), grad=False)
    one = torch.ones_like(a)
    for make in (
        lambda f: fgrad(lambda x, a: f(x, a).square().sum()),
        lambda f: torch.vmap(f, in_dims=(0, None)),
        lambda f: lambda x, a: jvp(lambda a: f(x, a), (a,), (one,)),
        lambda f: lambda x, a: hessian(lambda a: f(x, a).square().sum())(a),
    ):
        same(compiled(make(case.chain))(x, a), make(written_out)(x, a))  # type: ignore[no-untyped-call]


def transform_outside(case: Case) -> None:
    """jvp, vmap and grad of a compiled function; the kernels' own Python is not traced"""
    x, a = case.tensors(grad=False)
    torch._dynamo.reset()
    case.chain(x, a)
    torch._dynamo.utils.counters.clear()
    f = torch.compile(case.chain, backend="aot_eager")
    same(jvp(f, (x, a), (x, a)), jvp(written_out, (x, a), (x, a)))
    same(torch.vmap(f, in_dims=(0, None))(x, a), written_out(x, a))
    same(fgrad(lambda x: f(x, a).square().sum())(x), fgrad(lambda x: written_out(x, a).square().sum())(x))
    traced = torch._dynamo.utils.counters["frames"]["total"]
    assert traced < 60, f"Dynamo traced {traced} functions"


@slow
def compiled_autograd(case: Case) -> None:
    """compiled autograd, create_graph too"""
    x, a = case.tensors()
    expected = grad(written_out(x, a).square().sum(), (x, a), create_graph=True)
    for create in (False, True):
        torch._dynamo.reset()
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
            found = grad(case.chain(x, a).square().sum(), (x, a), create_graph=create)
        same(found, expected)
    same(grad(found[0].sum(), (x, a)), grad(expected[0].sum(), (x, a)))


@slow
def checkpoint_inside(case: Case) -> None:
    """activation checkpointing and autocast inside a compiled function"""
    from torch.utils.checkpoint import checkpoint

    _agrees(case, compiled(lambda x, a: checkpoint(case.chain, x, a, use_reentrant=False)))
    x, a = case.tensors(dtype=torch.float32)
    weight = torch.eye(5, device=x.device)

    def model(f: Function) -> Function:
        def forward(x: Tensor, a: Tensor) -> Tensor:
            with torch.autocast(x.device.type, torch.bfloat16):
                return f(x @ weight, a)

        return forward

    same(compiled(model(case.chain))(x, a), model(written_out)(x, a), 2e-2)


@slow
def strides(case: Case) -> None:
    """compiled, strides are those of eager: channels_last, transposed"""
    (x,), (a,) = case.tensors((2, 3, 4, 4), grad=False), case.tensors((3, 1, 1), grad=False)
    f = compiled(case.chain)
    for given in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        same(f(given, a), written_out(given, a), strides=True)


def no_graph_breaks(case: Case) -> None:
    """no graph break in a model around it, and the kernels' own Python is not traced"""
    counter = CompileCounter()
    x, a = case.tensors()
    torch._dynamo.reset()
    f = torch.compile(lambda x, a: (case.chain(x + 1, a) * 2).relu(), backend=counter)
    f(x, a).sum().backward()
    assert counter.frame_count == 1, f"{counter.frame_count} graphs"


def errors_inside(case: Case) -> None:
    """errors in a compiled function say what is wrong with which tensor"""
    x, a = case.tensors(grad=False)
    refused(lambda: compiled(case.chain)(x, a[:3]), "x (4, 5), add (3,)")
    refused(lambda: compiled(case.chain)(x.int(), a), "x is int32")


@gpus(1)
def reduce_overhead(case: Case) -> None:
    """torch.compile(mode="reduce-overhead"), forward and backward in CUDA graphs"""
    torch._dynamo.reset()
    f = torch.compile(case.chain, fullgraph=True, mode="reduce-overhead")
    x, a = case.tensors(dtype=torch.float32)
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        y = f(x, a)
        same(y, written_out(x, a), 1e-5)
        same(grad(y.square().sum(), (x, a)), grad(written_out(x, a).square().sum(), (x, a)), 1e-4)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert not skipped, f"{skipped} graphs were run without a CUDA graph"
