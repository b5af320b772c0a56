"""What emitted files compute, executed here without a GPU.

Of a CUDA file everything runs but its layer under the kernels (cuda/device.cuh), for which host.cuh stands in, of a
Triton file everything but the functions of platform.py, which Triton's interpreter does not have. Besides those, only
torch.cuda's stream, device and properties are replaced. test_emit_text.py compiles the files as they are.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib.util
import inspect
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import cpp_extension

import dualop
from dualop.backends import triton
from dualop.backends.registry import BACKENDS as BACKENDS_OF_LIBRARY
from dualop.build.build import Build
from dualop.build.sources import cuda_header
from dualop.emit import plan
from dualop.emit.file import emit
from dualop.launch.grid import multiprocessors
from dualop.launch.layout import layout_of
from dualop.launch.sums import sum_shape
from dualop.nn import with_bias
from dualop.triton_kernels import tile

LOAD_INLINE = cpp_extension.load_inline
CPU = torch.device("cpu")
BACKENDS = ("cuda", "triton")
SMALL = "linear:24x40"


class Model(nn.Module):
    """KernelBench level 2, problem 95."""

    def __init__(self, in_features: int, out_features: int, add_value_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.matmul = nn.Linear(in_features, out_features)
        self.add_value = nn.Parameter(torch.randn(add_value_shape))

    def forward(self, x: Tensor) -> Tensor:
        x = self.matmul(x)
        x = x + self.add_value
        x = torch.sigmoid(x) * x
        x = torch.tanh(x)
        x = F.gelu(x)
        return F.hardtanh(x, min_val=-1, max_val=1)


# ---- running a file --------------------------------------------------------------------------------------------------


def on_host(cuda: str) -> str:
    """CUDA text as the host compiles it."""
    start, end = cuda.index("// ---- the GPU"), cuda.index("// ---- the functions of the chain")
    return cuda[:start] + cuda_header("platform.cuh", host=True) + cuda[end:]


def load_inline_on_host(name: str, cuda_sources: list[str] | None = None, **options: Any) -> Any:
    if not cuda_sources:  # the library's own
        return LOAD_INLINE(name, cuda_sources=cuda_sources, **options)
    assert options["no_implicit_headers"] and not options["is_python_module"]
    with mock.patch.object(cpp_extension, "load_inline", LOAD_INLINE):  # which Build itself calls
        return str(Build("host", on_host(cuda_sources[0]), host=True).build())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: torch.device):
    """Loads a file as KernelBench does: CUDA is executed as a string, Triton imported as a module. Gives its names."""
    if device.type == "cpu":
        monkeypatch.setattr(cpp_extension, "load_inline", load_inline_on_host)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        small = SimpleNamespace(multi_processor_count=2, major=8, shared_memory_per_block_optin=1 << 20)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: small)

    def load(text: str) -> SimpleNamespace:
        if "load_inline" in text:
            names: dict[str, Any] = {}
            exec(compile(text, "<string>", "exec"), names)
            return SimpleNamespace(**names)
        path = tmp_path / f"model_{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("temp_module", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if device.type == "cpu":
            from dualop.triton_kernels import platform

            _, _, section = text.partition("# ---- platform")
            for name in re.findall(r"^def (\w+)", section.partition("# ---- ")[0], re.MULTILINE):
                setattr(module, name, getattr(platform, name))
            module.libdevice = platform
        return module

    return load


def results(model: nn.Module, x: Tensor, gy: Tensor) -> dict[str, Tensor]:
    leaf = x.detach().requires_grad_()
    y = model(leaf)
    gradients = torch.autograd.grad(y, [leaf, *model.parameters()], gy)
    return dict(zip(["y", "x", *(name for name, _ in model.named_parameters())], [y.detach(), *gradients]))


def compare(module: Any, written_out: type[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """KernelBench's way of evaluating, with every gradient besides, and twice for the bits."""
    models = []
    for kind in (written_out, module.ModelNew):
        torch.manual_seed(42)
        models.append(kind(*module.get_init_inputs()).to(device, dtype))
    reference, ours = models
    (x,) = (t.to(device, dtype) for t in module.get_inputs())
    gy = torch.randn_like(reference(x))
    expected, found, again = results(reference, x, gy), results(ours, x, gy), results(ours, x, gy)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert list(expected) == list(found)
    for name, value in found.items():
        scale = max(1.0, expected[name].abs().max().item())
        assert value.dtype == dtype and torch.equal(value, again[name]), name
        torch.testing.assert_close(value, expected[name], atol=scale * tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_problem_95(run, backend: str, dtype: torch.dtype, device: torch.device) -> None:
    module = run(emit(model=SMALL, backend=backend, batch=70))
    assert module.get_init_inputs() == [24, 40, (40,)] and [t.shape for t in module.get_inputs()] == [(70, 24)]
    compare(module, Model, dtype, device)


class Odd(nn.Module):
    """Two operands, one of them twice, no bias, columns that are no whole vectors."""

    def __init__(self, in_features: int, out_features: int, scale_shape, mul_value_shape) -> None:
        super().__init__()
        self.matmul = nn.Linear(in_features, out_features, bias=False)
        self.scale = nn.Parameter(torch.randn(scale_shape))
        self.mul_value = nn.Parameter(torch.randn(mul_value_shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu((self.matmul(x) - self.scale) * self.mul_value, 0.1) + self.scale


class Residual(nn.Module):
    """2.70 with a parameter in front: `x` is the Linear's output with its bias."""

    def __init__(self, in_features: int, out_features: int, shift_shape, scaling_factor: float) -> None:
        super().__init__()
        self.gemm = nn.Linear(in_features, out_features)
        self.shift = nn.Parameter(torch.randn(shift_shape))
        self.scaling_factor = scaling_factor

    def forward(self, x: Tensor) -> Tensor:
        x = original = self.gemm(x)
        return torch.sigmoid(x + self.shift) * self.scaling_factor + original


class Folded(nn.Module):
    """The Linear's bias goes in front of a chain that does not start with add."""

    def __init__(self, in_features: int, out_features: int, weight_shape) -> None:
        super().__init__()
        self.matmul = nn.Linear(in_features, out_features)
        self.weight = nn.Parameter(torch.randn(weight_shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(F.silu(self.matmul(x)) * self.weight)


class Alone(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.hardsigmoid(x * F.mish(x))


class Channels(nn.Module):
    """2.21 behind a convolution, and a scalar."""

    def __init__(self, bias_shape, scale_shape, top_shape) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(bias_shape))
        self.scale = nn.Parameter(torch.randn(scale_shape))
        self.top = nn.Parameter(torch.randn(top_shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.sigmoid((x + self.bias) * self.scale), self.top)


class Rows(nn.Module):
    """An operand of the rows, one of the columns, a full one."""

    def __init__(self, mean_shape, weight_shape, mask_shape) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.randn(mean_shape))
        self.weight = nn.Parameter(torch.randn(weight_shape))
        self.mask = nn.Parameter(torch.randn(mask_shape))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x - self.mean) * self.weight + self.mask


class Positions(nn.Module):
    """A matrix that repeats along the batch."""

    def __init__(self, position_shape) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(position_shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.position)


OTHERS = {
    "odd": (Odd, "sub(scale) | mul | leaky_relu(0.1) | add(scale)", "linear:9x37",
            dict(bias=False, batch=11, shapes={"mul": ()})),
    "residual": (Residual, "add(shift) | sigmoid | mul(2) | add(x)", SMALL, dict(linear="gemm", batch=3)),
    "folded": (Folded, "swish | mul(weight) | swish", SMALL, dict(batch=5)),
    "alone": (Alone, "mish | mul(x) | hardsigmoid", "input:3x7x500", {}),
    "channels": (Channels, "add(bias) | mul(scale) | sigmoid | minimum(top)", "input:2x6x5x8",
                 dict(shapes={"bias": (6, 1, 1), "scale": (6, 1, 1), "top": ()})),
    "rows": (Rows, "sub(mean) | tanh | mul(weight) | add(mask)", "input:6x24",
             dict(shapes={"mean": (6, 1), "mask": (6, 24)})),
    "row of a row": (Positions, "add(position) | gelu", "input:3x5x40", dict(shapes={"position": (5, 1)})),
    "matrix of a batch": (Positions, "add(position) | gelu", "input:3x2x5x40",
                          dict(shapes={"position": (2, 1, 40)})),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OTHERS)
def test_other_models(run, name: str, backend: str, device: torch.device) -> None:
    written_out, chain, model, options = OTHERS[name]
    module = run(emit(chain, model, backend, **options))
    if name == "residual":
        inputs = module.get_init_inputs
        module.get_init_inputs = lambda: [*inputs(), 2.0]
    compare(module, written_out, torch.float32, device)


# ---- beside the library ----------------------------------------------------------------------------------------------

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}


class Recorder:
    """Stands in for a Triton kernel: keeps the numbers of its launches, and launches it."""

    def __init__(self, kernel: Any, seen: list[dict[str, Any]]) -> None:
        self.kernel, self.seen = kernel, seen
        self.parameters = list(inspect.signature(kernel.fn).parameters)

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*arguments: Any, **named: Any) -> Any:
            numbers = {k: v for k, v in zip(self.parameters, arguments) if not isinstance(v, Tensor)}
            self.seen.append({**numbers, **named, "grid": grid})
            named = {k: v for k, v in named.items() if k in self.parameters}
            return self.kernel[grid](*arguments, **named)

        return launch


def runs(shape: Sequence[int]) -> list[tuple[int, bool]]:
    """The dimensions of partial sums, and which are kept."""
    return [(size, place % 2 == 1) for place, size in enumerate(shape) if size > 1]


def of_library(backend: str, tail: dualop.Chain, inputs: list[Tensor], gy: Tensor) -> list[dict[str, Any]]:
    """What the library decides about its launches in forward and backward."""
    library, layout, found = BACKENDS_OF_LIBRARY[backend], layout_of(inputs[0], inputs[1:], whole=False), []
    for needs in (None, (True,) * len(inputs)):
        direction = "forward" if needs is None else "backward"
        cut = library.chosen(tail, layout, direction)
        tensors = (torch.empty_like(gy), *inputs) if needs is None else (gy, *inputs)
        triton._launch.cache_clear()
        with mock.patch.multiple(triton, INTERPRET=False, OPTIONS={"enable_fp_fusion": True}):
            one = library.launch(tail, layout, needs, None, tensors)
        triton._launch.cache_clear()
        grid = one.grid
        shapes = [runs(sum_shape(layout, i, grid)) if v.reduced else None for i, v in enumerate(layout.views)]
        found.append(
            dict(tile=(grid.tile_rows, grid.tile_cols), programs=(grid.row_programs, grid.col_programs),
                 steps=grid.steps, threads=cut.threads, resident=cut.resident, shapes=shapes if needs else None)
        )  # fmt: skip
        if backend == "triton":
            numbers = {k: v for k, v in one.numbers.items() if k in TRITON_NUMBERS}
            found[-1] |= numbers | {"MASK": bool(numbers["MASK"])}
    return found


TRITON_NUMBERS = ("BITS", "NEEDS", "STAGES", "MASK", "EARLY", "num_warps", "maxnreg", "enable_fp_fusion")


def of_file(backend: str, module: Any, inputs: list[Tensor], gy: Tensor) -> list[dict[str, Any]]:
    """What the file decides, as `of_library` has it."""
    names, dtype = module.tail_forward.__globals__, gy.dtype
    rows, seen, shapes = -(-gy.numel() // layout_of(inputs[0], inputs[1:], whole=False).cols), [], []
    launch_backward = names["launch_backward"]
    named = lambda shapes: [None if shape is None else runs(shape) for shape in shapes]
    record = lambda *arguments: shapes.append(named(arguments[4])) or launch_backward(*arguments)
    kernels = {k: Recorder(names[k], seen) for k in ("forward_kernel", "backward_kernel") if k in names}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"launch_backward": record, **kernels}.items():
            patch.setitem(names, name, value)
        module.tail_forward(inputs)
        module.tail_backward(gy, inputs, [True] * len(inputs))
    found = []
    for i, table in enumerate((module.FORWARD, module.BACKWARD)):
        cut = table[dtype]
        if backend == "cuda":
            each, x, y, resident, _, steps = cut
            tile, threads = (each * y, x * module.TYPES[dtype][3]), x * y
        else:
            tile, threads, steps = (cut["BLOCK_ROWS"], cut["BLOCK_COLS"]), 32 * cut["num_warps"], cut.get("steps", 1)
            resident = 65536 // 256 // cut["maxnreg"] if "maxnreg" in cut else 1
        programs = tuple(module.blocks(cut, rows))
        found.append(dict(tile=tile, programs=programs, steps=steps, threads=threads, resident=resident,
                          shapes=shapes[0] if i else None))  # fmt: skip
        if backend == "triton":
            assert seen[i]["grid"] == (programs[0] * programs[1],)
            found[-1] |= {k: v for k, v in seen[i].items() if k in TRITON_NUMBERS}
    return found


def sums(where: Any, call: Any) -> list[dict[str, Any]]:
    """The launches of a module's sum kernel."""
    seen: list[dict[str, Any]] = []
    with mock.patch.object(where, "sum_kernel", Recorder(where.sum_kernel, seen)):
        call()
    return [{k: v for k, v in one.items() if k.isupper() or k in ("outer", "kept", "inner", "columns", "grid")}
            for one in seen]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own properties would be asked")
@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OTHERS)
def test_it_launches_what_the_library_launches(
    run, name: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same grids, threads, constants and sums; and where the library has the same rows, the results' same bits.

    A file's columns are the innermost dimension, and where they are not whole accesses it reads them one by one.
    """
    monkeypatch.setattr(plan, "MULTIPROCESSORS", multiprocessors(CPU))
    _, chain, model, options = OTHERS[name]
    options = options | ({"batch": 70} if model.startswith("linear") else {})
    module = run(emit(chain, model, backend, dtypes=(NAMES[dtype],), **options))
    tail = with_bias(dualop.chain(chain)) if name == "folded" else dualop.chain(chain)
    shape = (70, int(model.rpartition("x")[2])) if model.startswith("linear") else module.shape
    shapes = [
        options.get("shapes", {}).get(operand, shape[-1:]) if name != "folded" else shape[-1:]
        for operand in tail.operands
    ]
    inputs = [torch.randn(s, dtype=dtype) for s in (shape, *shapes)]
    gy = torch.randn(shape, dtype=dtype)
    library, needs = BACKENDS_OF_LIBRARY[backend], [True] * len(inputs)
    layout = layout_of(inputs[0], inputs[1:], whole=False)
    if not layout.cols % layout.width and not layout.ragged:
        assert of_file(backend, module, inputs, gy) == of_library(backend, tail, inputs, gy)
    alike = all(layout == layout_of(inputs[0], inputs[1:], wanted) for wanted in (None, needs))
    agree = partial(torch.testing.assert_close, **{"rtol": 0, "atol": 0} if alike else {})
    agree(module.tail_forward(inputs), library.forward(tail, inputs[0], inputs[1:]))
    expected = library.backward(tail, gy, inputs[0], inputs[1:], needs)
    agree(module.tail_backward(gy, inputs, needs), expected)
    if alike and backend == "triton" and inputs[1:] and hasattr(module, "sum_kernel"):
        ours = sums(module, lambda: module.tail_backward(gy, inputs, needs))
        assert ours == sums(tile, lambda: library.backward(tail, gy, inputs[0], inputs[1:], needs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_any_batch_where_no_operand_is_of_one(run, batch: int, backend: str, device: torch.device) -> None:
    text = emit("add(bias) | gelu", "input:1x6x5x8", backend, shapes={"bias": (6, 1, 1)})
    module = run(text)
    x, bias = torch.randn(batch, 6, 5, 8, device=device), torch.randn(6, 1, 1, device=device)
    torch.testing.assert_close(module.Tail.apply(x, bias), F.gelu(x + bias))
    with pytest.raises(ValueError, match=r"does not end in \(6, 5, 8\): it needs other kernels"):
        module.Tail.apply(torch.randn(2, 6, 8, 5, device=device), bias)
    fixed = run(emit("add(row) | gelu", "input:4x8", backend, shapes={"row": (4, 1)}))
    with pytest.raises(ValueError, match=r"does not end in \(4, 8\): it needs other kernels"):
        fixed.Tail.apply(torch.randn(8, 8, device=device), torch.randn(4, 1, device=device))


def test_indexes_are_as_wide_as_the_model_needs(run) -> None:
    empty = lambda *shape: torch.empty(shape, device="meta")
    narrow_at = lambda rows: layout_of(empty(rows, 65536), [empty(65536)]).narrow
    most = bisect.bisect(range(65536), False, key=lambda rows: not narrow_at(rows)) - 1
    for backend, mark in (("cuda", "using index_t = {};"), ("triton", "program = tl.program_id(0){}\n")):
        wide, narrow = {"cuda": ("long long", "int"), "triton": (".to(tl.int64)", "")}[backend]
        large = emit("add | gelu", "linear:8x65536", backend, batch=most + 1)
        assert mark.format(wide) in large and mark.format(narrow) not in large and "too large" not in large
        small = emit("add | gelu", "linear:8x65536", backend, batch=most)
        assert mark.format(narrow) in small and mark.format(wide) not in small
        module = run(small)
        assert module.checked(empty(most, 65536), empty(65536))[0].shape[0] == most
        with pytest.raises(ValueError, match="too large for 32-bit indexes"):
            module.checked(empty(most + 1, 65536), empty(65536))


@pytest.mark.parametrize("backend", BACKENDS)
def test_wanted_gradients_empty_batches_and_refusals(run, backend: str, device: torch.device) -> None:
    module = run(emit(model=SMALL, backend=backend, batch=4))
    model = module.ModelNew(24, 40, (40,)).to(device)
    model.add_value.requires_grad_(False)
    model.matmul.requires_grad_(False)
    x = torch.randn(4, 24, device=device, requires_grad=True)
    assert torch.autograd.grad(model(x).sum(), x)[0].shape == x.shape
    assert model(x[:0]).shape == (0, 40) and torch.autograd.grad(model(x[:0]).sum(), x)[0].abs().sum() == 0
    with pytest.raises(ValueError, match="needs other kernels"):
        module.ModelNew(24, 40, (1,))
    with pytest.raises(ValueError, match="not the numbers that are compiled"):
        module.ModelNew(24, 40, (40,), 0.5)
    with pytest.raises(ValueError, match=r"an operand torch.bfloat16 \(40,\) with z torch.float32"):
        module.Tail.apply(torch.randn(4, 40, device=device), torch.randn(40, device=device, dtype=torch.bfloat16))
    with pytest.raises(
        ValueError, match=r"torch.float16 needs other kernels: this file has those for torch.float32, t"
    ):
        module.Tail.apply(torch.randn(4, 40, device=device).half(), torch.randn(40, device=device).half())
    with pytest.raises(RuntimeError, match="these gradients have no derivative"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_at_odd_addresses_and_strides(run, backend: str, device: torch.device) -> None:
    """What no access of 16 bytes can read is copied first: views into the middle, transposed tensors, gradients."""
    module = run(emit("add | gelu", "input:6x40", backend))
    x, add = torch.randn(6 * 40 + 1, device=device)[1:].view(6, 40), torch.randn(41, device=device)[1:]
    gy = torch.randn(40, 6, device=device).t()
    for z in (x, x.t().contiguous().t()):
        leaves = [t.clone().requires_grad_() for t in (z, add)]
        expected = torch.autograd.grad(F.gelu(leaves[0] + leaves[1]), leaves, gy)
        z, operand = z.requires_grad_(), add.requires_grad_()
        found = torch.autograd.grad(module.Tail.apply(z, operand), [z, operand], gy)
        for ours, theirs in zip(found, expected):
            torch.testing.assert_close(ours, theirs)
        z.requires_grad_(False)
