"""Launch every form of kernel once, on small tensors: what `make sanitize` runs under compute-sanitizer.

    python tests/sanitize_calls.py cuda              # every call, with its name before it
    python tests/sanitize_calls.py triton --prepare  # compile them first, in parallel

The calls are the consistency matrix (tests/test_consistency.py): forward, backward with all gradients, and backward
with each gradient alone. Loops over several tiles, which the heuristic gives to large tensors only, are called by a
`cut` of their own. Slopes (second derivatives) and the chain in a product's epilogue follow. A form that is new to the
kernels needs a case there, and is then sanitized too.

Inputs are made on the CPU and copied to the device as they lie, gaps included: hardly any kernel of torch's runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from test_consistency import BF16, CASES, F16, F32, F64, Case, d, default, make
from torch import Tensor

import dualop
from dualop import linear as gemm
from dualop.backends.base import Planned
from dualop.backends.registry import BACKENDS
from dualop.language.slopes import Slope
from dualop.launch.grid import Cut
from dualop.launch.layout import layout_of

KERNELS = ("cuda", "triton")
DONE = "calls were made"

# Several tiles for a program, and tails. `loops` has few programs, `tall` one for all rows of its columns.
LOOPED = [
    *(default(f"loop, {t}", d(3001, 72), d(72), dtypes=(t,)) for t in (F32, BF16, F64)),
    default("loop, odd, offset", ((3001, 37), "offset"), d(37), dtypes=(F16,)),
    default("loop, per row", d(5, 30_000), d(5, 1)),
    default("loop, scalar", d(70_001), d()),
    default("loop, channel", d(40, 5, 28, 28), d(5, 1, 1), dtypes=(BF16,)),
    default("loop, channels_last", ((20, 8, 14, 14), "channels_last"), d(8, 1, 1)),
    default("loop, full", d(3001, 72), d(3001, 72), dtypes=(BF16,)),
    Case("loop, two vectors", "add(b) | mul(s) | tanh", d(3001, 72), (d(72), d(72))),
]
CUTS: dict[str, Callable[[Cut], Cut]] = {
    "loops": lambda cut: replace(cut, least=0, most=1),
    "tall": lambda cut: replace(cut, rows=2, threads=256, across=4, least=0, most=0),
}

SLOPES = {
    "rows": ((9, 40), "dense"),
    "odd rows": ((9, 37), "dense"),
    "folded": ((16_385,), "dense"),
    "offset": ((4099,), "offset"),
    "sliced": ((9, 33), "sliced"),
    "transposed": ((20, 24), "transposed"),
    "channels_last": ((2, 8, 4, 4), "channels_last"),
}
SLOPED = "silu | tanh | gelu | hardtanh(-1, 1)"

# Leading dimensions of x, in_features, out_features: whole tiles, tails, rows that start anywhere, a folded row.
PRODUCTS = (((64,), 32, 64), ((70,), 40, 48), ((33,), 37, 41), ((2, 3, 7), 24, 40), ((1,), 16, 24), ((300,), 136, 264))
MANY_TILES = (((2200,), 40, 2120),)  # more than two programs for each of 132 multiprocessors: each loops
EPILOGUES: dict[str, tuple[str, Callable[[tuple[int, ...]], tuple[tuple[int, ...], ...]]]] = {
    "a vector": ("add | swish | tanh | gelu | hardtanh(-1, 1)", lambda y: (y[-1:],)),
    "a row": ("mul(scale) | gelu", lambda y: ((*y[:-1], 1),)),
    "a number": ("mul(scale) | gelu", lambda y: ((),)),
    "full": ("gelu | add(skip)", lambda y: (y,)),
    "two": ("mul(scale) | gelu | add(shift)", lambda y: (y[-1:], (1, y[-1]))),
    "its own input": ("sigmoid | mul(x)", lambda y: ()),
}


@dataclass(frozen=True)
class Call:
    """One call: `run()` launches and gives the results; `planned` is what has to be compiled for it."""

    name: str
    run: Callable[[], Sequence[Tensor]]
    planned: tuple[Planned, ...] = ()


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, with its strides, its offset and what lies in its gaps, by one copy."""
    count = tensor.untyped_storage().nbytes() // tensor.element_size()
    whole = tensor.as_strided((count,), (1,), 0)
    return whole.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def calls(backend: str, device: torch.device) -> Iterator[Call]:
    """All calls of one backend; their tensors are made when they are asked for."""
    for case in CASES:
        yield from of_case(case, backend, device)
    for case in LOOPED:
        for name, change in CUTS.items():
            yield from of_case(case, backend, device, name, change)
    yield from of_slopes(backend, device)
    if backend == gemm.BACKEND:
        yield from of_products(device)


def of_case(
    case: Case, backend: str, device: torch.device, cut_name: str = "", change: Callable[[Cut], Cut] | None = None
) -> Iterator[Call]:
    """Forward, backward with all gradients, and with each alone. With `change`, only backward, in another cut."""
    runs: Any = BACKENDS[backend]
    chain, inputs = dualop.chain(case.text), make(case, "cpu")
    tensors, gy = [moved(t, device) for t in (inputs[0], *inputs[1])], moved(inputs[2], device)
    layout = layout_of(tensors[0], tensors[1:])
    if not layout.total:
        return  # nothing is launched
    x, operands = tensors[0], tensors[1:]
    count = len(tensors)
    wanted = dict.fromkeys([(True,) * count, *(tuple(i == k for k in range(count)) for i in range(count))])
    plan = partial(Planned, chain, tuple(tensors), device)
    if change is None:
        yield Call(
            f"{case.name}: forward", lambda: [runs.forward(chain, x, operands)], (plan(directions=("forward",)),)
        )
    cut = None if change is None else change(runs.heuristic(chain, layout, "backward"))
    title = f"{case.name}, {cut_name}" if cut_name else case.name
    for needs in wanted:
        names = [n for n, need in zip(("x", *chain.operands), needs, strict=True) if need]
        backward = partial(runs.backward, chain, gy, x, operands, needs, **({} if cut is None else {"cut": cut}))
        cuts = () if cut is None else (("backward", cut),)
        yield Call(
            f"{title}: grad {', '.join(names)}", backward, (plan(needs=needs, directions=("backward",), cuts=cuts),)
        )


def of_slopes(backend: str, device: torch.device) -> Iterator[Call]:
    """The backward of order 2: v gy f''(x) and v f'(x), both and each alone."""
    slope: Any = Slope(dualop.chain(SLOPED))
    for dtype in (F32, BF16, F16, F64):
        for name, form in SLOPES.items():
            case = Case(f"slope {name}, {dtype}", "add", form, (form,), (dtype,))
            made = make(case, "cpu")
            x, gy, v = (moved(t, device) for t in (made[0], made[1][0], made[2]))
            for needs in ((True, True), (True, False), (False, True)):
                yield Call(
                    f"{case.name}: {needs}",
                    partial(BACKENDS[backend].backward, slope, v, x, (gy,), needs),
                    (Planned(slope, (x, gy), device, needs, ("backward",)),),
                )


def of_products(device: torch.device) -> Iterator[Call]:
    """The chain in the epilogue of a product; interpreted, in small tiles."""
    tile = gemm.TILE if device.type == "cuda" else gemm.Tile(rows=32, columns=32, depth_bytes=32, group=2)
    generator = torch.Generator().manual_seed(0)
    normal = lambda shape, dtype: torch.randn(shape, generator=generator).to(dtype).to(device)
    for form, (text, shapes) in EPILOGUES.items():
        for dtype in (BF16, F16, F32):
            sizes = PRODUCTS if form == "a vector" else PRODUCTS[1:3]
            for lead, ins, outs in (*sizes, *(MANY_TILES if device.type == "cuda" and form == "a vector" else ())):
                x, weight = normal((*lead, ins), dtype), normal((outs, ins), dtype)
                operands = tuple(normal(shape, dtype) for shape in shapes((*lead, outs)))
                run = partial(gemm.launch, dualop.chain(text), x, weight, operands, tile)
                yield Call(f"product {lead} x {ins} -> {outs}, {form}, {dtype}", lambda run=run: [run()])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=KERNELS)
    parser.add_argument("--prepare", action="store_true", help="Compile in parallel before the first call.")
    parser.add_argument("--only", default="", help="Calls whose names contain this text.")
    chosen = parser.parse_args()
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    some = [call for call in calls(chosen.backend, device) if chosen.only in call.name]
    if chosen.prepare:
        BACKENDS[chosen.backend].prepare([planned for call in some for planned in call.planned])
    for call in some:
        print(f"call: {call.name}", flush=True)
        call.run()
        if device.type == "cuda":
            torch.cuda.synchronize()  # a finding is then printed below its call
    print(f"{len(some)} {DONE}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
