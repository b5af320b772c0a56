"""Write the Triton file of a chain's double backward: the backward kernel of gy f'(x), whose inputs are x and gy.

The chain is straight-line code as in `generate.py`: the gradient v goes down it as the tangent t of x, then gy comes up
it as a gradient g, and with it h, the change of g along the tangent. `cuda/second.cuh` does the same.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .generate import Form, Step, call, file, function, gradient, inner, kernels


def generate(title: str, steps: Sequence[Step], curved: Collection[str], form: Form) -> str:
    """Return the file. `curved`: functions with a second derivative; `form`: how x and gy lie."""
    return file(title, _chain(steps, curved), kernels(form)[1])


def _chain(steps: Sequence[Step], curved: Collection[str]) -> str:
    down: list[str] = []
    up: list[str] = []
    bends = [i for i, (name, _, _) in enumerate(steps) if name in curved]  # h is zero behind the last of them
    for i, step in enumerate(steps):
        if i + 1 < len(steps):
            down.append(inner(step, i))
        down.append(gradient(step, i, f"t{i + 1}", f"t{i}"))
        rise = [gradient(step, i, f"h{i}", f"h{i + 1}")] if bends and i < bends[-1] else []
        if i in bends:
            rise.append(f"h{i} {'+=' if rise else '='} {call(step, '_second', f'z{i}')} * t{i} * g{i + 1}")
        if bends and i > bends[0]:
            rise.append(gradient(step, i, f"g{i}", f"g{i + 1}"))
        up[:0] = rise
    return function(
        "chain_backward",
        "in0, in1, gy, BITS: tl.constexpr",
        "z0 = in0",
        "t0 = gy",
        *down,
        f"g{len(steps)} = in1",
        *up,
        f"return {'h0' if bends else 'tl.zeros_like(z0)'}, t{len(steps)}",
    )
