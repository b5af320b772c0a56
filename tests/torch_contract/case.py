"""What a check gets: the same chain twice, through dualop and written out in torch's own functions."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import dualop
from dualop import replay
from dualop.backends.registry import BACKENDS

CHAIN = "add | swish | tanh | gelu | hardtanh(-1, 1)"
TWO = "mul(scale) | add(bias) | tanh | mul(x)"

Function = Callable[[Tensor, Tensor], Tensor]
Check = Callable[["Case"], None]
C = TypeVar("C", bound=Check)


class Skip(Exception):
    """Raised by a check that this machine cannot run; says what it lacks."""


def written_out(x: Tensor, add: Tensor) -> Tensor:
    """CHAIN as a user of torch alone would write it."""
    return F.hardtanh(F.gelu(torch.tanh(F.silu(x + add))), -1, 1)


def two_written_out(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(x * scale + bias) * x


class Case:
    """One backend on one device. `chain(x, add)` and `two(x, scale, bias)` run on it."""

    def __init__(self, backend: str, device: torch.device) -> None:
        op, other = dualop.chain(CHAIN), dualop.chain(TWO)
        self.backend = backend
        self.device = device
        self.chain: Function = lambda x, add: op(x, add, backend=backend)
        self.two: Callable[..., Tensor] = lambda x, scale, bias: other(x, scale, bias, backend=backend)

    def tensors(
        self, *shapes: Sequence[int], dtype: torch.dtype = torch.float64, grad: bool = True, seed: int = 0
    ) -> Any:
        """Normal random tensors; of shape (4, 5) and (5,) where no shapes are given."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(tuple(s), generator=generator, dtype=torch.float64) for s in shapes or ((4, 5), (5,))]
        return [t.to(self.device, dtype).requires_grad_(grad) for t in drawn]

    def agree(self, calculate: Callable[[Function], Any], tolerance: float = 1e-9, strides: bool = False) -> None:
        """What `calculate` makes of the chain is what it makes of torch's functions: values, shapes, dtypes."""
        same(calculate(self.chain), calculate(written_out), tolerance, strides)

    @contextmanager
    def spy(self, method: str) -> Iterator[Any]:
        """Yield what has each call of the backend's `forward` or `backward` in `.call_args_list`; C++ replays none."""
        backend: Any = BACKENDS[self.backend]
        with mock.patch.object(replay, "on", False), mock.patch.dict(replay.known, clear=True):
            with mock.patch.object(backend, method, wraps=getattr(backend, method)) as seen:
                yield seen


def same(found: Any, expected: Any, tolerance: float = 1e-9, strides: bool = False) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, check_stride=strides)


def refused(call: Callable[[], Any], *words: str) -> str:
    """The text of the error that `call` raises, which has one of `words` in it; AssertionError if it raises none."""
    try:
        call()
    except Exception as error:
        text = str(error)
        assert any(word in text for word in words), f"refused for another reason: {type(error).__name__}: {text[:300]}"
        return text
    raise AssertionError("it is allowed by now: this row is out of date")


def environment() -> dict[str, str]:
    """Return the environment of a process that finds this dualop and this package, wherever they lie."""
    folders = (str(Path(dualop.__file__).parents[1]), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders))}


def slow(check: C) -> C:
    """Takes seconds, mostly of a compiler: CI runs it on one backend."""
    check.slow = True  # type: ignore[attr-defined]
    return check


def gpus(count: int) -> Callable[[C], C]:
    """Needs that many CUDA GPUs."""

    def mark(check: C) -> C:
        check.gpus = count  # type: ignore[attr-defined]
        return check

    return mark
