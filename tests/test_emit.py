"""What emitted files compute, executed here without a GPU.

Of a CUDA file everything runs but its layer under the kernels (cuda/device.cuh), for which host.cuh stands in, of a
Triton file everything but the functions of platform.py, which Triton's interpreter does not have. Besides those, only
torch.cuda's stream, device and properties are replaced. test_emit_text.py compiles the files as they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import cpp_extension

from dualop.build import Build
from dualop.emit import emit
from dualop.sources import cuda_header

LOAD_INLINE = cpp_extension.load_inline
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
    start, end = cuda.index("// ==== cuda/device.cuh"), cuda.index("// ==== cuda/types.cuh")
    return cuda[:start] + cuda_header("platform.cuh", host=True) + cuda[end:]


def load_inline_on_host(name: str, cuda_sources: list[str], **options: Any) -> str:
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
        two = SimpleNamespace(multi_processor_count=2)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: two)

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

            _, _, section = text.partition("# ---- triton_kernels/platform.py")
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


OTHERS = {
    "odd": (Odd, "sub(scale) | mul | leaky_relu(0.1) | add(scale)", "linear:9x37",
            dict(bias=False, batch=11, shapes={"mul": ()})),
    "residual": (Residual, "add(shift) | sigmoid | mul(2) | add(x)", SMALL, dict(linear="gemm", batch=3)),
    "folded": (Folded, "swish | mul(weight) | swish", SMALL, dict(batch=5)),
    "alone": (Alone, "mish | mul(x) | hardsigmoid", "input:3x7x500", {}),
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
    with pytest.raises(ValueError, match=r"a vector torch.bfloat16 \(40,\) with z torch.float32"):
        module.Tail.apply(torch.randn(4, 40, device=device), torch.randn(40, device=device, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="these gradients have no derivative"):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
