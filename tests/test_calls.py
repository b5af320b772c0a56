"""Calls of the ops by their own names: what makes no sense is refused by name, before a kernel reads memory for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import dualop
from dualop.backends import registry
from dualop.errors import (
    BackendUnavailable,
    ChainError,
    DeviceError,
    DtypeError,
    DualopError,
    OperandError,
    ShapeError,
)

assert dualop.op.library  # registers the ops

if not registry.interpreting():
    pytest.skip("on CPU tensors, with DUALOP_INTERPRET=1", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter computes with NumPy

NAMES = ("reference", "cuda", "triton")
X, B, GY = torch.ones(2, 3), torch.ones(3), torch.ones(2, 3)
MODES = ("plain", "inference", "grad", "forward mode", "vmap", "fake")


def forward(x: Tensor = X, operands: Any = (B,), text: str = "add | silu", backend: str = "reference") -> Tensor:
    return torch.ops.dualop.forward(x, list(operands), text, backend)


def backward(
    gy: Tensor = GY,
    x: Tensor = X,
    operands: Any = (B,),
    text: str = "add | silu",
    backend: str = "reference",
    needs: Any = (True, True),
    order: int = 1,
) -> list[Tensor]:
    return torch.ops.dualop.backward(gy, x, list(operands), text, backend, list(needs), order)


# What is wrong, how the error is called, and what it says.
WRONG: dict[str, tuple[Callable[..., Any], dict[str, Any], type[DualopError], str]] = {
    "a slope run forward": (forward, {"operands": (), "text": "slope of silu"}, ChainError, "slope"),
    "a slope with its gy": (forward, {"operands": (GY,), "text": "slope of silu"}, ChainError, "slope"),
    "no chain": (forward, {"text": "adds"}, ChainError, "unknown stage 'adds'"),
    "no chain backward": (backward, {"text": "adds"}, ChainError, "unknown stage 'adds'"),
    "a slope backward by its text": (backward, {"operands": (GY,), "text": "slope of silu"}, ChainError, "slope"),
    "a slope of two inputs": (backward, {"order": 2}, ChainError, "no slope"),
    "a third order": (backward, {"order": 3, "operands": (GY,), "text": "silu"}, OperandError, "1 or 2, not 3"),
    "too few operands": (forward, {"operands": ()}, OperandError, r"takes \(x, add\); 0 operands"),
    "too many operands": (forward, {"operands": (B, B)}, OperandError, "2 operands given"),
    "backward without": (backward, {"operands": (), "needs": (True,)}, OperandError, "0 operands given"),
    "a slope without gy": (
        backward,
        {"operands": (), "text": "silu", "order": 2, "needs": (True,)},
        OperandError,
        r"takes \(x, gy\)",
    ),
    "too few needs": (backward, {"needs": (True,)}, OperandError, "2 gradients.* needs says 1"),
    "too many needs": (backward, {"needs": (True,) * 3}, OperandError, "2 gradients.* needs says 3"),
    "gy of another shape": (backward, {"gy": torch.ones(3, 2)}, ShapeError, r"\(2, 3\), not \(3, 2\)"),
    "gy of another rank": (backward, {"gy": torch.ones(6)}, ShapeError, r"\(2, 3\), not \(6,\)"),
    "gy of x's shape": (
        backward,
        {"gy": torch.ones(3), "x": torch.ones(3), "operands": (torch.ones(2, 1),)},
        ShapeError,
        r"\(2, 3\), not \(3,\)",
    ),
    "gy too short": (  # of the right strides: a kernel would read behind its end
        backward,
        {"gy": torch.ones(2), "x": torch.ones(9), "operands": (), "text": "silu", "needs": (True,)},
        ShapeError,
        r"\(9,\), not \(2,\)",
    ),
    "gy of a slope": (
        backward,
        {"gy": torch.ones(2), "x": torch.ones(9), "operands": (torch.ones(9),), "text": "silu", "order": 2},
        ShapeError,
        r"\(9,\), not \(2,\)",
    ),
    "an unknown backend": (forward, {"backend": "cudas"}, BackendUnavailable, "unknown backend 'cudas'"),
    "an unknown one backward": (backward, {"backend": "cudas"}, BackendUnavailable, "unknown backend 'cudas'"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_wrong_is_named(name: str, what: str, mode: str) -> None:
    call, changes, error, says = WRONG[what]
    arguments = {"x": X, "operands": (B,), "backend": name, **({"gy": GY} if call is backward else {}), **changes}
    with pytest.raises(error, match=says):
        in_mode(mode, call, arguments)


def in_mode(mode: str, call: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The call, its tensors being what a mode or a transform makes of them."""
    names = [n for n in ("gy", "x") if n in arguments]
    tensors = [*[arguments[n] for n in names], *arguments["operands"]]

    def f(*tensors: Tensor) -> Any:
        given = dict(zip(names, tensors[: len(names)], strict=True))
        return call(**{**arguments, **given, "operands": tensors[len(names) :]})

    if mode == "inference":
        with torch.inference_mode():
            return f(*tensors)
    if mode == "grad":
        return f(*[t.clone().requires_grad_() for t in tensors])
    if mode == "forward mode":
        return torch.func.jvp(f, tuple(tensors), tuple(map(torch.ones_like, tensors)))
    if mode == "vmap":
        return torch.vmap(f)(*[t.expand(2, *t.shape) for t in tensors])
    if mode == "fake":
        with FakeTensorMode() as fake:
            return f(*map(fake.from_tensor, tensors))
    return f(*tensors)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_right_runs(name: str, mode: str) -> None:
    for call, more in (
        (forward, {}),
        (backward, {"gy": GY}),
        (backward, {"gy": GY, "needs": (False, True)}),
        (backward, {"gy": GY, "operands": (GY,), "text": "silu", "order": 2}),
        (backward, {"gy": GY, "x": torch.ones(2, 1)}),
    ):
        in_mode(mode, call, {"x": X, "operands": (B,), "backend": name, **more})


@pytest.mark.parametrize("name", NAMES)
def test_tensors_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(DtypeError, match="x is int64"):
        forward(x=X.long(), backend=name)
    with pytest.raises(DtypeError, match="add is int64"):
        backward(operands=(B.long(),), backend=name)
    with pytest.raises(ShapeError, match="add"):
        forward(operands=(torch.ones(2),), backend=name)
    with pytest.raises(DeviceError, match="gy"):
        backward(torch.ones(2, 3, device="meta"), backend=name)


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_of_another_dtype_is_taken_in_the_results(name: str) -> None:
    """So it is computed as accurately as the chain, whatever the backend."""
    x, b = torch.randn(2, 3, dtype=torch.double), torch.randn(3, dtype=torch.double)
    right = backward(GY.double(), x, (b,), backend=name)
    for got, one in zip(backward(GY, x, (b,), backend=name), right, strict=True):
        torch.testing.assert_close(got, one, rtol=1e-13, atol=1e-13)
