"""torch's own test data (OpInfo): the sample, reference and error inputs of every stage's function in torch.

Through the chain of that stage alone, forward and backward, against torch's function: a test for each stage, dtype and
backend. To torch's samples come tensors of special values, and numbers that its samples leave out.
"""

from __future__ import annotations

import sys
import types
import unittest
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import HAS_GPU, INTERPRETED
from torch import Tensor

import dualop
from dualop.backends import registry
from dualop.errors import ChainError, DualopError
from dualop.language.stages import STAGES
from dualop.language.syntax import Chain
from dualop.launch.layout import layout_of

pytestmark = [pytest.mark.filterwarnings("ignore"), *([pytest.mark.gpu] if HAS_GPU and not INTERPRETED else [])]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# An interpreter takes small tensors, and a compiler a second for each chain, dtype and kind of operands: (elements,
# samples, builds). tests/test_stages.py compiles the same, so that the suite pays for them once.
BUDGETS = {"reference": (20_000, 60, 60), "cuda": (2000, 25, 1), "triton": (2000, 12, 12)}

SPECIAL = (
    0.0, -0.0, 1e-30, -1e-30, 0.5, -0.5, 1.0, -1.0, 2.9999, 3.0, -3.0, 6.0, -6.0, 20.0, -20.0, 21.0, 88.0, -88.0,
    torch.inf, -torch.inf, torch.nan,
)  # fmt: skip
# Numbers that torch's samples leave out. Every stage gets its example's, too.
MORE: dict[str, tuple[str, ...]] = {
    "gelu": ('gelu(approximate="tanh")',),
    "leaky_relu": ("leaky_relu(0.2)", "leaky_relu(-0.5)", "leaky_relu(0)"),
    "clamp": ("clamp(-1, 1)", "clamp(min=0)", "clamp(max=0.5)", "clamp(1, -1)"),
    "celu": ("celu", "celu(-0.5)"),
    "softplus": ("softplus(2, 1)", "softplus"),
}


@dataclass(frozen=True)
class Sample:
    """One call: the chain, its tensors, and torch's function of the same tensors."""

    chain: Chain
    tensors: tuple[Tensor, ...]
    by_torch: Any

    @property
    def build(self) -> Any:
        """What a compiler would have to make for it."""
        kinds = tuple(v.kind for v in layout_of(self.tensors[0], self.tensors[1:]).views)
        return self.chain.text, kinds, tuple(t.dtype for t in self.tensors)


@lru_cache(maxsize=1)
def _database() -> dict[str, Any]:
    """torch's OpInfos by name. Their module imports `expecttest` for its test case's base class only."""
    try:
        import expecttest  # noqa: F401
    except ImportError:
        stub: Any = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        stub.assert_expected_inline = lambda *arguments, **keywords: None
        sys.modules["expecttest"] = stub
    from torch.testing._internal.common_methods_invocations import op_db

    return {info.name: info for info in reversed(op_db) if info.variant_test_name in ("", "no_rounding_mode")}


def _info(stage: str) -> Any:
    found = _database().get(f"nn.functional.{stage}") or _database().get(stage)
    assert found is not None, f"torch has no OpInfo of {stage}"
    return found


def _bind(stage: str, inputs: Any) -> tuple[Chain, tuple[Tensor, ...]] | None:
    """The chain and tensors of a SampleInput, None if it is of something else: alpha=2, tensor bounds."""
    given = (inputs.input, *inputs.args, *inputs.kwargs.values())
    if not all(t.dtype in DTYPES.values() for t in given if isinstance(t, Tensor)) or None in map(type, given):
        return None
    if STAGES[stage].operand:
        if inputs.kwargs or not isinstance(inputs.input, Tensor):
            return None
        (other,) = inputs.args
        if isinstance(other, Tensor):
            return dualop.chain(stage), (inputs.input, other)
        return dualop.chain(getattr(dualop.stages, stage)(other)), (inputs.input,)
    if any(isinstance(t, Tensor) for t in given[1:]):
        return None
    return dualop.chain(getattr(dualop.stages, stage)(*inputs.args, **inputs.kwargs)), (inputs.input,)


@lru_cache(maxsize=2)
def _samples(stage: str, dtype: torch.dtype, device: torch.device) -> list[Sample]:
    samples = [*_of_ours(stage, dtype, device), *_of_torch(stage, dtype, device)]
    return [s for s in samples if max(t.numel() for t in s.tensors) <= BUDGETS["reference"][0]]


def _of_torch(stage: str, dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    info = _info(stage)
    for make in (info.sample_inputs, info.reference_inputs):
        for inputs in make(device, dtype):
            if bound := _bind(stage, inputs):
                rest = tuple(a for a in inputs.args if not isinstance(a, Tensor))
                keywords = inputs.kwargs
                yield Sample(*bound, lambda *t, rest=rest, keywords=keywords: info.op(*t, *rest, **keywords))


def _of_ours(stage: str, dtype: torch.dtype, device: torch.device) -> Iterator[Sample]:
    # Every value beside every other one, so that each lies at each place of a vector access.
    values = torch.tensor(SPECIAL, dtype=dtype, device=device)
    grid = values.repeat(len(SPECIAL), 1)
    texts = (STAGES[stage].example.split(" | ")[-1], *MORE.get(stage, ()))
    for op in map(dualop.chain, texts):
        call = op.calls[0]
        for x in (grid.t().contiguous(), grid.t(), values[:7], values[3], values[:0]):
            if call.stage.operand:
                other = grid if x.dim() == 2 else x.flip(0) if x.dim() else x
                yield Sample(op, (x, other), call.stage.reference)
            else:
                yield Sample(op, (x,), lambda z, call=call: call.stage.reference(z, *call.arguments))


def _chosen(backend: str, samples: list[Sample], stage: str) -> list[Sample]:
    """As many as the backend has time for; those first that test_stages.py compiles anyway."""
    elements, most, builds = BUDGETS[backend]
    small = [s for s in samples if max(t.numel() for t in s.tensors) <= elements]
    example = dualop.chain(STAGES[stage].example.split(" | ")[-1]).text
    full = layout_of(torch.empty(2, 3), []).views[0].kind
    small.sort(key=lambda s: (s.chain.text != example, set(s.build[1]) != {full}))
    allowed = list(dict.fromkeys(s.build for s in small))[:builds]
    return [s for s in small if s.build in allowed][:most]


@pytest.mark.parametrize("backend", registry.BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_samples(stage: str, dtype: str, backend: str, device: torch.device) -> None:
    kind = DTYPES[dtype]
    chosen = _chosen(backend, _samples(stage, kind, device), stage)
    assert len(chosen) >= 3
    if backend == "reference":
        assert any(not s.tensors[0].is_contiguous() for s in chosen)
        assert any(s.tensors[0].isnan().any() for s in chosen)
    generator = torch.Generator(device).manual_seed(0)
    for sample in chosen:
        about = f"{sample.chain} of {', '.join(f'{tuple(t.shape)} strides {t.stride()}' for t in sample.tensors)}"
        expected = sample.by_torch(*(t.float() for t in sample.tensors))
        found = sample.chain(*sample.tensors, backend=backend)
        _assert_same(_undefined(found, expected, sample.tensors), expected.to(kind), about)
        # The gradient at NaN is not the same in torch's own vectorized and scalar loops.
        leaves = [torch.where(t.isnan(), 0.25, t).requires_grad_() for t in sample.tensors]
        # torch rounds after every function that a composite one is made of; a chain rounds its result.
        exact = [t.detach().float().requires_grad_() for t in leaves]
        y, expected = sample.chain(*leaves, backend=backend), sample.by_torch(*exact)
        gy = torch.randn(y.shape, generator=generator, device=device).to(kind)
        wanted = torch.autograd.grad(expected, exact, gy.float(), materialize_grads=True)
        for i, (g, w) in enumerate(zip(torch.autograd.grad(y, leaves, gy), wanted, strict=True)):
            _assert_same(_undefined(g, w, leaves), w.to(kind), f"{about}: gradient {i}")


def _undefined(found: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """NaN where torch's own formula has it at infinity, as for gelu(-inf): a chain may have the limit there."""
    infinite = torch.zeros_like(expected, dtype=torch.bool)
    for t in inputs:
        if t.shape == expected.shape:
            infinite |= t.isinf()
    return torch.where(infinite & expected.isnan(), torch.nan, found)


def _assert_same(found: Tensor, expected: Tensor, about: str) -> None:
    torch.testing.assert_close(found, expected, equal_nan=True, msg=lambda text: f"{about}\n{text}")


@pytest.mark.parametrize("stage", STAGES)
def test_error_inputs(stage: str, device: torch.device) -> None:
    """Where torch's function raises, the chain raises an error of dualop's; of integers and complex numbers always."""
    info = _info(stage)
    errors = list(info.error_inputs(device)) if info.error_inputs_func else []
    calls = [(e.sample_input.input, e.sample_input.args, e.sample_input.kwargs) for e in errors]
    for call in calls:
        with pytest.raises(DualopError):
            _call(stage, *call)
    op = dualop.chain(STAGES[stage].example)
    good = [torch.ones(3, device=device) for _ in op.operands]
    for wrong in (torch.ones(3, dtype=torch.int64, device=device), torch.ones(3, dtype=torch.complex64, device=device)):
        with pytest.raises(dualop.errors.DtypeError, match="x is"):
            op(wrong, *good)
    if op.operands:
        with pytest.raises(dualop.errors.ShapeError, match="do not broadcast"):
            op(torch.ones(4, device=device), *good)


def _call(stage: str, x: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    if STAGES[stage].operand:
        return dualop.chain(stage)(x, *arguments, **keywords)
    return dualop.chain(getattr(dualop.stages, stage)(*arguments, **keywords))(x)


def test_torch_and_dualop_refuse_the_same_numbers() -> None:
    """torch's error inputs that are about a stage's numbers: the error comes when the chain is made."""
    for make in (lambda: dualop.chain("hardtanh(0.5, -0.5)"), lambda: dualop.chain("softshrink(-0.5)")):
        with pytest.raises(ChainError):
            make()
    with pytest.raises(ValueError):
        F.hardtanh(torch.ones(1), 0.5, -0.5)
    with pytest.raises(RuntimeError):
        F.softshrink(torch.ones(1), -0.5)
