"""Rewrite chains as torch's own functions, for tools that know torch's operators but not dualop's.

program = torch.export.export(model, arguments).run_decompositions(dualop.export.decompositions())
torch.onnx.export(program, file="model.onnx", dynamo=True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import dualop.op.library  # noqa: F401  (registers the ops)
from dualop.backends.reference import reference, reference_gradients
from dualop.language.slopes import of_order
from dualop.language.syntax import parse


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return a table for `ExportedProgram.run_decompositions`: torch's own decompositions and those of dualop's ops.

    A chain becomes the functions of its reference: float32 arithmetic (float64 for float64), rounded once.
    """
    table = torch.export.default_decompositions()
    table[torch.ops.dualop.forward.default] = _forward
    table[torch.ops.dualop.backward.default] = _backward
    return table


def _forward(x: Tensor, operands: Sequence[Tensor], chain: str, backend: str) -> Tensor:
    return reference(parse(chain), x, operands)


def _backward(
    gy: Tensor, x: Tensor, operands: Sequence[Tensor], chain: str, backend: str, needs: Sequence[bool], order: int = 1
) -> list[Tensor]:
    return reference_gradients(of_order(chain, order), gy, x, operands, needs)
