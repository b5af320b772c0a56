"""Writes the Triton file of a chain's double backward: the backward kernel of gy f'(x), whose inputs are x and gy.

The chain is straight-line code as in `generate.py`: the gradient v goes down it as the tangent t of x, then gy comes up
it as a gradient g, and with it h, the change of g along the tangent. `cuda/second.cuh` does the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .generate import _HEAD, Step, _inner, _kernels, _literal, _taken


def generate(title: str, steps: Sequence[Step], curved: Collection[str], kinds: Sequence[int]) -> str:
    """The file's text. `curved`: functions with a second derivative; `kinds` (dualop/launch/layout.py): of x, gy."""
    head = _HEAD.format(title=title, package=__name__.rpartition(".")[0])
    _, backward = _kernels(kinds)
    return "\n\n\n".join(part.strip("\n") for part in (head, _chain(steps, curved), backward)) + "\n"


def _chain(steps: Sequence[Step], curved: Collection[str]) -> str:
    down: list[str] = []
    up: list[str] = []
    bends = [i for i, (name, _, _) in enumerate(steps) if name in curved]  # h is zero behind the last of them
    for i, step in enumerate(steps):
        name, numbers, operand = step
        more = "".join(f", {_literal(n)}" for n in numbers)
        taken = more if operand is None else f", {_taken(operand, f'z{i}')}"
        if i + 1 < len(steps):
            down.append(f"z{i + 1} = stages.{name}{_inner(name)}(z{i}{taken}, BITS)")
        down.append(_backward(step, i, f"t{i + 1}", f"t{i}"))
        rise = [_backward(step, i, f"h{i}", f"h{i + 1}")] if bends and i < bends[-1] else []
        if name in curved:
            bend = f"stages.{name}_second(z{i}{more}, BITS) * t{i} * g{i + 1}"
            rise.append(f"h{i} += {bend}" if rise else f"h{i} = {bend}")
        if bends and i > bends[0]:
            rise.append(_backward(step, i, f"g{i}", f"g{i + 1}"))
        up[:0] = rise
    lines = [
        "@triton.jit",
        "def chain_backward(in0, in1, gy, BITS: tl.constexpr):",
        "    z0 = in0",
        "    t0 = gy",
        *(f"    {line}" for line in down),
        f"    g{len(steps)} = in1",
        *(f"    {line}" for line in up),
        f"    return {'h0' if bends else 'tl.zeros_like(z0)'}, t{len(steps)}",
    ]
    return "\n".join(lines)


def _backward(step: Step, i: int, result: str, gy: str) -> str:
    """The line that makes `result`: the gradient `gy` behind stage i as one before it."""
    name, numbers, operand = step
    if operand is not None:  # a number, whose gradient nobody wants
        return f"{result}, d = stages.{name}_backward(z{i}, {_taken(operand, f'z{i}')}, {gy}, BITS)"
    return f"{result} = stages.{name}_backward(z{i}, {gy}{''.join(f', {_literal(n)}' for n in numbers)}, BITS)"
