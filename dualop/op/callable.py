"""Define `dualop.chain`: it makes a chain that can be called on tensors."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from dualop.language import syntax
from dualop.language.stages import Call
from dualop.op.library import run


class Chain(syntax.Chain):
    """Represent an immutable chain of stages that can be called on tensors.

    `chain(x, *operands, backend=None, **named_operands)` returns the result of all stages on `x + 0`. x has any shape,
    a dtype of float32, float16, bfloat16 or float64, and is on any device that a backend runs on. The operands, in the
    order of `chain.operands` or by name, broadcast against x as in torch. The result is differentiable in x and in
    every operand. Raises OperandError, ShapeError, DtypeError, DeviceError, BackendUnavailable, BuildError.
    """

    def __call__(self, x: Any, *operands: Any, backend: str | None = None, **named: Any) -> Any:
        if named or len(operands) != len(self.operands):
            operands = self.bind(operands, named)
        return run(self, x, operands, backend)

    def __reduce__(self) -> Any:
        return chain, (self.text,)


def chain(*stages: str | Call | syntax.Chain) -> Chain:
    """Return a chain made of texts (each one or more stages), `dualop.stages` calls and other chains, in order.

    Raises ChainError with the place of the first mistake. The same text gives the same object.
    """
    if len(stages) == 1 and isinstance(stages[0], str):
        return _parsed(stages[0])
    return Chain(syntax.joined(*stages))


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Chain:
    return Chain(syntax.parse(text).calls)
