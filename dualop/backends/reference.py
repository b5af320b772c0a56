"""Define the reference backend: each stage by its torch function, on any device. It says what correct is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dualop.backends.base import Backend
from dualop.language.slopes import Slope, is_slope, slope_gradients
from dualop.language.syntax import Chain
from dualop.launch.layout import layout_of


def evaluate(chain: Chain, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
    """Return the result of the stages in the tensors' own dtypes, as a user would write them. It is differentiable.

    Numbers beyond float32's range are infinite, as in the kernels, but in float64.
    """
    values = dict(zip(chain.operands, operands, strict=True), x=x)
    z = x
    for call in chain.calls:
        arguments = [values[call.operand]] if isinstance(call.operand, str) else call.numbers(z.dtype)
        z = call.stage.reference(z, *arguments)
    return z


def result_dtype(x: Tensor, operands: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that torch promotes `x + operand + ...` to."""
    result, *more = [torch.empty([0] * min(t.dim(), 1), dtype=t.dtype, device="meta") for t in (x, *operands)]
    for empty in more:
        result = result + empty
    return result.dtype


def reference(chain: Chain, x: Tensor, operands: Sequence[Tensor] = ()) -> Tensor:
    """Return the chain's result in float32 (float64 for float64), rounded once to the promoted dtype.

    It is made of torch's own functions, which are differentiable.
    """
    dtype = result_dtype(x, operands)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    y = evaluate(chain, x.to(wide), [t.to(wide) for t in operands]).to(dtype)
    return y.clone() if y is x else y


def reference_gradients(
    chain: Chain | Slope, gy: Tensor, x: Tensor, operands: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients of `reference` by each stage's own formula, for those of (x, *operands) in `needs`.

    They are made of torch's differentiable functions and of no autograd, so that any transform may look into them.
    """
    tensors = (x, *operands)
    wide = torch.float64 if gy.dtype == torch.float64 else torch.float32
    if is_slope(chain):
        found = slope_gradients(chain, gy.to(wide), x.to(wide), operands[0].to(wide), needs)
        wanted = [t for t, need in zip(tensors, needs, strict=True) if need]
        return [g.sum_to_size(t.shape).to(t.dtype) for g, t in zip(found, wanted, strict=True)]
    values = dict(zip(("x", *chain.operands), (t.to(wide) for t in tensors), strict=True))
    steps, z = [], values["x"]
    for call in chain.calls:
        arguments = [values[call.operand]] if isinstance(call.operand, str) else call.numbers(z.dtype)
        steps.append((call, z, arguments))
        z = call.stage.reference(z, *arguments)
    given: dict[str, list[Tensor]] = {name: [] for name in values}
    g = gy.to(wide)
    for call, z, arguments in reversed(steps):
        gradient = call.stage.gradient(g, z, *arguments)
        g = gradient[0] if call.stage.operand else gradient
        if isinstance(call.operand, str):
            given[call.operand].append(gradient[1])
    given["x"].append(g)
    sums = [sum(terms[1:], terms[0]) for terms in given.values()]
    return [s.sum_to_size(t.shape).to(t.dtype) for s, t, need in zip(sums, tensors, needs, strict=True) if need]


class Reference(Backend):
    """Run everywhere, as fast as torch's own functions."""

    name = "reference"
    torch_formulas = True

    def environment(self) -> list[str]:
        return []

    def reasons(self, chain: Chain | Slope, device: torch.device) -> list[str]:
        return []

    def forward(self, chain: Chain, x: Tensor, operands: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            y = reference(chain, x, operands)
        layout = layout_of(x, operands)
        # Some functions of torch's do not keep the order of memory, such as logsigmoid.
        return y if y.stride() == layout.strides else layout.output().copy_(y)

    def backward(
        self, chain: Chain | Slope, gy: Tensor, x: Tensor, operands: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor]:
        layout = layout_of(x, operands)
        wanted = [t for t, need in zip((x, *operands), needs, strict=True) if need]
        with torch.no_grad():
            found = reference_gradients(chain, gy.to(layout.dtype), x, operands, needs)
            # Into memory of their own: the gradient of an add is gy itself.
            return [layout.like(t).copy_(g) for t, g in zip(wanted, found, strict=True)]

    def source(self, chain: Chain) -> str:
        """Return the chain in Python, a line for each stage."""
        lines = [f"def forward({', '.join(('x', *chain.operands))}):", "    z = x"]
        lines += [f"    z = {call.stage.name}(z{''.join(f', {a}' for a in call.arguments)})" for call in chain.calls]
        return "\n".join([*lines, "    return z"]) + "\n"
